"""What a sweep over a block may do, by the numbers that calls.h has for it."""

from __future__ import annotations

from enum import IntEnum


class Keep(IntEnum):
    """Which entries of the operands are kept; ``enum keep``."""

    ALL = 0
    LARGEST = 1
    """What the statistics of their scope say."""
    RANDOM = 2
    """By place; what is kept is divided by the density."""


class Combine(IntEnum):
    """How all operands become one; ``enum combine``."""

    SUM = 0
    """Weighted, from left to right."""
    MAJORITY_TOTAL = 1
    """The weighted mean of those with the sign of their unweighted sum."""
    MAJORITY_FREQUENCY = 2
    """The weighted mean of those with the sign that most have."""
