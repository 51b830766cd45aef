"""What a method may ask about a whole tensor or a whole model, and what comes of it.

A method asks in rounds. In each it writes down, on a sheet like that of its merge, what every element
contributes: to totals (sums, products, largest values), and to ranks (the k-th largest of some
values). Blocks answer in any order. What has been found is given to the next round, and to the merge:

    round 0   sinks ─▶ every block ─▶ totals, tops ─▶ settle ─▶ numbers
    round 1   sinks, which may refer to those ...
    merge     the program, with all numbers and tops

A method that works on whole rows has rounds about them, too: each row is asked by itself, and what comes
of it is numbers for its own elements. They are found again wherever a row is measured or merged, or
remembered (:class:`RowMemory`): the bits are the same.

Totals are added up in float64 within a block, in an order that only the block's length decides, and
then over all blocks exactly, with one rounding; so they have the same bits for any order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.statistics.topk import TiePolicy, TopK, values_decide
from streammerge.tiles.writing import Sheet, Sink

RowNumbers = NDArray[np.float64]
"""``[rows, numbers]``."""


class RowMemory:
    """What has been found about the rows of one tensor, from its first round until it is merged.

    Any number of threads may use it: whoever finds something about a row finds the same.
    """

    def __init__(self, rows: int, numbers: int) -> None:
        """Remember nothing yet about so many rows, of so many numbers each."""
        self._numbers = np.empty((rows, numbers))
        self._known = np.zeros(rows, dtype=np.bool_)

    @staticmethod
    def nbytes_of(rows: int, numbers: int) -> int:
        """Return the bytes that a memory of this size takes."""
        return rows * (8 * numbers + 1) if numbers else 0

    def recall(self, first: int, count: int) -> RowNumbers | None:
        """Return what is known of some rows, ``[count, numbers]``; None unless all of them are."""
        if not self._known[first : first + count].all():
            return None
        return self._numbers[first : first + count]

    def remember(self, first: int, numbers: RowNumbers) -> None:
        """Take what was found about the rows from ``first`` on; what no program uses is left out."""
        end = first + len(numbers)
        self._numbers[first:end] = numbers[:, : self._numbers.shape[1]]
        self._known[first:end] = True


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of a scope."""

    tops: tuple[TopK, ...] = ()
    """Which elements are kept of each ranked value, of all rounds so far in order."""
    numbers: tuple[float, ...] = ()
    """What rounds settled on, in order."""
    made: NDArray[Any] | None = None
    """``[numel]`` in the compute dtype: what was made of the whole tensor, for methods that do."""
    rows: RowMemory | None = field(default=None, compare=False)
    """What is known of a tensor's rows, where that is remembered."""

    def joined(self, other: Found) -> Found:
        """Return this, and what a later round found."""
        tops, numbers = self.tops + other.tops, self.numbers + other.numbers
        return Found(tops, numbers, self.made, self.rows)


NOTHING = Found()
"""What is known where nothing was asked."""


@dataclass(frozen=True, slots=True)
class Rank:
    """A wish for the k largest of the values that a sink offers."""

    k: int
    """How many are kept; all, if there are no more than that."""
    tie_policy: TiePolicy
    """Which elements exactly at the threshold are kept."""
    of_value: bool = False
    """Whether the threshold is needed even where all are kept, as that of a quantile. ``k`` is then in
    [1, numel], but for a scope without elements."""

    def is_open(self, numel: int) -> bool:
        """Return whether the values of a scope of so many elements have to be seen."""
        return values_decide(numel, self.k, of_value=self.of_value)


@dataclass(frozen=True, slots=True)
class Answers:
    """What a round came to."""

    numel: int
    """Elements of the scope."""
    totals: tuple[float, ...]
    """Its totals, in the order of its sinks."""
    tops: tuple[TopK, ...]
    """Its ranks, in the order of its sinks."""
    before: Found
    """What earlier rounds found."""


def _all_totals(answers: Answers) -> Sequence[float]:
    return answers.totals


def _no_ranks(_numel: int, _before: Found) -> Sequence[Rank]:
    return ()


@dataclass(frozen=True, slots=True)
class Round:
    """A set of questions that one sweep can answer."""

    sinks: Callable[[Sheet], Sequence[Sink]]
    """What every element contributes."""
    ranks: Callable[[int, Found], Sequence[Rank]] = _no_ranks
    """Given the elements of the scope and what is known: a wish for each ranked sink, in order."""
    settle: Callable[[Answers], Sequence[float]] = _all_totals
    """The numbers that the answers come to."""
    about: tuple[Hashable, ...] = ()
    """The parameters that all this depends on; rounds of one method that are about the same ask the
    same."""

    def concluded(self, answers: Answers) -> Found:
        """Return what this round found."""
        if self.settle is _all_totals:
            return Found(answers.tops, answers.totals)
        # What is let through that is not finite has no need to be spoken of once more.
        with np.errstate(all="ignore"):
            return Found(answers.tops, tuple(float(number) for number in self.settle(answers)))


@dataclass(frozen=True, slots=True)
class RowAnswers:
    """What a round about rows came to, for some of them."""

    numel: int
    """Elements of a row."""
    totals: NDArray[np.float64]
    """``[rows, totals]``."""
    before: RowNumbers
    """What earlier rounds about rows found."""


@dataclass(frozen=True, slots=True)
class RowRound:
    """A set of totals over single rows."""

    sinks: Callable[[Sheet], Sequence[Sink]]
    """What every element contributes: totals alone."""
    settle: Callable[[RowAnswers], RowNumbers]
    """The numbers that they come to, ``[rows, numbers]``."""

    def concluded(self, answers: RowAnswers) -> RowNumbers:
        """Return what this round found."""
        with np.errstate(all="ignore"):
            return self.settle(answers)
