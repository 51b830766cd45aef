"""What a stage is asked about a piece, and what each of its blocks answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streammerge.statistics.magnitude import Counted, Question
from streammerge.statistics.rounds import Found


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
