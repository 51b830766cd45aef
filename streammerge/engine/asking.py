"""What a stage is asked about a piece, and what each of its blocks answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streammerge.statistics.magnitude import Counted, Question
from streammerge.statistics.rounds import Found
from streammerge.statistics.totals import join_totals, no_totals
from streammerge.tiles.program import Op


@dataclass(frozen=True, slots=True)
class Asking:
    """What every block of a scope is asked now."""

    round: int
    """Which of the method's rounds it is."""
    found: Found
    """What the rounds before have found."""
    questions: tuple[Question | None, ...]
    """What is asked about each ranked value; None where its rank is known."""
    totals: bool
    """Whether the totals are asked for, too."""


@dataclass(frozen=True, slots=True)
class BlockAnswer:
    """What one block answers."""

    counted: tuple[Counted | None, ...]
    """About each ranked value; None where nothing is asked."""
    totals: NDArray[np.float64] | None
    """``[totals]``; None where they are not asked for."""


def join_answers(
    kinds: Sequence[Op], answers: Sequence[BlockAnswer], asking: Asking
) -> BlockAnswer:
    """Return the answer of a block that was asked in parts.

    Args:
        kinds: What each total is.
        answers: Of its parts, in flat order; there may be none.
        asking: What it was asked.
    """
    if len(answers) == 1:
        return answers[0]
    counted = [
        _join_counted([answer.counted[at] for answer in answers])
        for at in range(len(asking.questions))
    ]
    if not asking.totals:
        return BlockAnswer(tuple(counted), None)
    totals = [answer.totals for answer in answers if answer.totals is not None]
    parts = np.stack(totals) if totals else no_totals(kinds, 0)
    return BlockAnswer(tuple(counted), np.array(join_totals(kinds, parts)))


def _join_counted(parts: Sequence[Counted | None]) -> Counted | None:
    own = [part for part in parts if part is not None]
    if not own:
        return None
    values = [part.values for part in own if part.values is not None]
    histograms = [part.histogram for part in own if part.histogram is not None]
    return Counted(
        sum(part.above for part in own),
        np.concatenate(values) if values else None,
        tuple(sum(crowd) for crowd in zip(*(part.crowds for part in own), strict=True)),
        np.sum(histograms, axis=0) if histograms else None,
    )
