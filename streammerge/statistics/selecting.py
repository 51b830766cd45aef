"""The exact k-th largest magnitude of scopes that are at most one block each, at once.

The plain way for what :class:`~streammerge.statistics.magnitude.MagnitudeSearch` finds in rounds;
models of many small tensors would spend most of their time in keeping its books.

    select_block   one scope: guesses, each checked by counting, or else a partition
    select_rows    several scopes of one size: the same guesses for all of them in one operation

Memory: a copy of the scopes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from streammerge.lazily import torch
from streammerge.statistics.topk import (
    Floats,
    TiePolicy,
    TopK,
    settled_without_values,
    ties_kept,
    values_decide,
)

if TYPE_CHECKING:
    from torch import Tensor

_GUESS_SAMPLE = 512
"""Elements of a tensor of one block that its threshold is guessed from."""
_GUESSES = 3
"""Each costs two comparisons per element; a partition of equal numbers costs as much as eight."""
_REACH_SIGMAS = 3.0
"""From the first guess to the second, in standard deviations of the sample's rank: far enough to
have the threshold between them as a rule, near enough that few elements lie there."""

Kth = tuple[float, int, int]
"""The k-th largest magnitude, how many are larger, and how many equal."""


def select_block(
    magnitudes: Floats, k: int, tie_policy: TiePolicy, *, of_value: bool = False
) -> TopK:
    """Return the statistic of a scope that is one block, at once.

    The plain way for what :class:`MagnitudeSearch` finds in rounds; models of many small tensors
    would spend most of their time in keeping its books.

    Args:
        magnitudes: ``[m]`` absolute values.
        k: Elements kept; all, if there are no more than that.
        tie_policy: Which ties are kept.
        of_value: Whether the threshold is needed even where all are kept.
    """
    settled = settled_without_values(magnitudes.size, k, of_value=of_value)
    if settled is not None:
        return settled
    return _statistic(_guess_kth(magnitudes, k), magnitudes, k, tie_policy)


def select_rows(
    magnitudes: Floats, k: int, tie_policy: TiePolicy, answers: Tensor, *, of_value: bool = False
) -> list[TopK]:
    """Return what :func:`select_block` returns for every row.

    Small operations cost a call each, and the interpreter lock, whatever they do; here a call does
    its work for all rows.

    Args:
        magnitudes: ``[n, m]`` absolute values, a scope per row.
        k: Elements kept; all, if there are no more than that.
        tie_policy: Which ties are kept.
        answers: ``[>= n * m]`` float32 or float64 scratch, on the CPU.
        of_value: Whether thresholds are needed even where all are kept.
    """
    rows, numel = magnitudes.shape
    if not values_decide(numel, k, of_value=of_value) or rows <= 1:
        return [select_block(row, k, tie_policy, of_value=of_value) for row in magnitudes]
    found = _guess_rows(magnitudes, k, answers)
    return [_statistic(at, row, k, tie_policy) for at, row in zip(found, magnitudes, strict=True)]


def statistic_of_block(found: Kth, numel: int, k: int, tie_policy: TiePolicy) -> TopK:
    """Return the statistic of a scope that is one block, whose k-th largest magnitude is known.

    Args:
        found: The threshold, a number, and how many are greater and equal.
        numel: Elements in the scope.
        k: Elements that are kept.
        tie_policy: Which ties are.
    """
    threshold, greater, equal = found
    kept = ties_kept(tie_policy, k - greater, equal)
    # Where the last kept tie lies, as place_ties tells it; here in the only block there is.
    if kept == 0:
        return TopK(threshold, numel, greater, equal, 0, -1, 0)
    if kept == equal:
        return TopK(threshold, numel, greater, equal, kept, 1, 0)
    return TopK(threshold, numel, greater, equal, kept, 0, kept)


def _statistic(guessed: Kth | None, magnitudes: Floats, k: int, tie_policy: TiePolicy) -> TopK:
    """Return the statistic of a scope whose threshold was guessed, or was not."""
    numel = magnitudes.size
    found = guessed or _kth_by_partition(magnitudes, k)
    if found is None:
        return TopK(float("inf"), numel, int(np.count_nonzero(np.isnan(magnitudes))), 0, 0, -1, 0)
    return statistic_of_block(found, numel, k, tie_policy)


def _kth_by_partition(magnitudes: Floats, k: int) -> Kth | None:
    """Return the k-th largest magnitude, how many are larger and how many equal; None for NaN."""
    numel = magnitudes.size
    # partition ranks NaN above everything, as the search does.
    threshold = float(np.partition(magnitudes, numel - k)[numel - k])
    if threshold != threshold:  # noqa: PLR0124 - only NaN differs from itself
        return None
    greater = numel - int(np.count_nonzero(magnitudes <= threshold))
    return threshold, greater, int(np.count_nonzero(magnitudes == threshold))


def _guess_kth(magnitudes: Floats, k: int) -> Kth | None:
    """Return the same by guessing from a sample; None unless a guess is exactly right.

    Differences of bfloat16 models have few distinct magnitudes, which is where guesses hit and
    where a partition, among so many equal numbers, takes several times longer.
    """
    numel = magnitudes.size
    sample = np.sort(magnitudes[:: max(1, numel // _GUESS_SAMPLE)])
    index = min(sample.size - 1, int(sample.size * (1 - k / numel)))
    tried_above = tried_below = False
    for _ in range(_GUESSES):
        guess = sample[index]
        greater = numel - int(np.count_nonzero(magnitudes <= guess))
        if greater >= k:
            index = int(np.searchsorted(sample, guess, "right"))
            tried_above = True
        else:
            equal = int(np.count_nonzero(magnitudes == guess))
            if greater + equal >= k:
                return float(guess), greater, equal
            index = int(np.searchsorted(sample, guess)) - 1
            tried_below = True
        # Between two neighbours of the sample lies nothing more to guess.
        if (tried_above and tried_below) or not 0 <= index < sample.size:
            return None
    return None


def _guess_rows(magnitudes: Floats, k: int, answers: Tensor) -> list[Kth | None]:
    """Return the k-th largest magnitude of every row; None where the guesses are no help.

    The first guess is the sample's own k-th largest. Where it misses, a second one lies so far on
    that the threshold is between the two, if it is not the guess itself; of the elements between
    them, which are few, a partition then finds it.
    """
    numel = magnitudes.shape[1]
    sample = np.sort(magnitudes[:, :: max(1, numel // _GUESS_SAMPLE)], axis=1)
    size = sample.shape[1]
    rank = size * (1 - k / numel)
    middle = min(size - 1, int(rank))
    reach = max(1, int(_REACH_SIGMAS * (rank * k / numel) ** 0.5))
    first = _Guesses.count(magnitudes, sample[:, middle], answers)
    found = first.found(k)
    missed = [row for row, at in enumerate(found) if at is None]
    if not missed:
        return found
    steps = [reach if first.greater[row] >= k else -reach for row in missed]
    next_guesses = sample[missed, np.clip(np.add(middle, steps), 0, size - 1)]
    subset = magnitudes if len(missed) == len(magnitudes) else magnitudes[missed]
    second = _Guesses.count(subset, next_guesses, answers)
    for place, (row, at) in enumerate(zip(missed, second.found(k), strict=True)):
        found[row] = at or _kth_between(magnitudes[row], k, first.at(row), second.at(place))
    return found


@dataclass(frozen=True, slots=True)
class _Guesses:
    """A guess per row, and how the row's magnitudes compare with it."""

    values: list[float]
    """The guesses."""
    greater: list[int]
    """How many magnitudes are larger; NaN is larger than all."""
    equal: list[int]
    """How many are equal."""

    @classmethod
    def count(cls, magnitudes: Floats, guesses: Floats, answers: Tensor) -> _Guesses:
        """Compare ``[n, m]`` magnitudes with ``[n]`` guesses."""
        # In torch, whose sums of floats are as fast as the comparisons, and leave the interpreter
        # to others; numbers up to a block are exact in float32.
        values = torch.from_numpy(magnitudes)
        column = torch.from_numpy(guesses[:, None])
        answers = answers[: values.numel()].view_as(values)
        smaller = torch.le(values, column, out=answers).sum(dim=1).tolist()
        equal = torch.eq(values, column, out=answers).sum(dim=1).tolist()
        numel = magnitudes.shape[1]
        return cls(
            guesses.tolist(), [numel - int(each) for each in smaller], [int(n) for n in equal]
        )

    def at(self, row: int) -> Kth:
        """Return one row's guess and counts."""
        return self.values[row], self.greater[row], self.equal[row]

    def found(self, k: int) -> list[Kth | None]:
        """Return the guesses that are the k-th largest magnitude."""
        return [
            self.at(row) if greater < k <= greater + equal else None
            for row, (greater, equal) in enumerate(zip(self.greater, self.equal, strict=True))
        ]


def _kth_between(magnitudes: Floats, k: int, first: Kth, second: Kth) -> Kth | None:
    """Return the k-th largest magnitude if it lies between two guesses that are not it."""
    (high, greater, equal), (low, below_greater, _) = max(first, second), min(first, second)
    above = greater + equal
    # NaN makes either comparison false, or is counted as larger on both sides.
    if not above < k <= below_greater:
        return None
    inside = magnitudes[(magnitudes > low) & (magnitudes < high)]
    rank = inside.size - (k - above)
    threshold = np.partition(inside, rank)[rank]
    greater = int(np.count_nonzero(inside > threshold))
    return float(threshold), above + greater, int(np.count_nonzero(inside == threshold))
