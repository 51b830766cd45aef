"""Programs over tiles: steps, registers, numbers. Plain data that any machine can run.

The compiled machine has its twin of these numbers in ``native/machine.h``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum


class Op(IntEnum):
    """What a step does. ``a`` and ``b`` are rows in registers; ``n`` is a number.

    Every operation rounds once, as IEEE 754 says, in the compute dtype.
    """

    BASE = 0
    """The base's values."""
    SOURCE = 1
    """A source's values."""
    TASK_VECTOR = 2
    """A source's values minus the base's; with a trim, what it does not keep is zero."""
    COMPUTED = 3
    """A row that was computed before, of one value per element."""
    CHANGED = 4
    """``a`` as a source's adapter leaves it, rounded to the base's type."""
    FILL = 5
    """``n`` in every element."""
    ADD = 6
    """``a + b`` or ``a + n``."""
    SUBTRACT = 7
    """``a - b`` or ``a - n``."""
    MULTIPLY = 8
    """``a * b`` or ``a * n``."""
    DIVIDE = 9
    """``a / b`` or ``a / n``."""
    MINIMUM = 10
    """The smaller of ``a`` and ``b`` or ``n``; a zero has no sign."""
    MAXIMUM = 11
    """The larger one, likewise."""
    GREATER = 12
    """1 where ``a > b`` or ``a > n``, and 0 elsewhere."""
    AT_LEAST = 13
    """1 where ``a >= b`` or ``a >= n``, and 0 elsewhere."""
    EQUAL = 14
    """1 where ``a == b`` or ``a == n``, and 0 elsewhere."""
    ADD_SCALED = 15
    """``a + b * n``: two operations, each rounded."""
    ABSOLUTE = 16
    """``|a|``."""
    SIGN = 17
    """-1, 0 or 1."""
    SQUARE_ROOT = 18
    """The square root of ``a``."""
    EXPONENTIAL = 19
    """``e ** a``, as :mod:`streammerge.tiles.functions` computes it."""
    LOGARITHM = 20
    """The natural logarithm of ``a > 0``, likewise."""
    SELECT = 21
    """``a`` where the row ``c`` is not 0, and ``b`` elsewhere."""
    KEEP_LARGEST = 22
    """``a`` where a trim keeps it, and 0 elsewhere."""
    IN_TOP = 23
    """1 where a trim keeps ``a``, and 0 elsewhere."""
    KEEP_RANDOM = 24
    """``a`` where a source's random number is below ``n``, or below ``b``; 0 elsewhere."""
    MAJORITY_MEAN = 25
    """The weighted mean of those rows that have the elected sign; see :class:`Majority`."""
    EXPONENTIAL_LESS_ONE = 26
    """``e ** a - 1``, as :mod:`streammerge.tiles.functions` computes it, without cancellation near 0."""
    LOGARITHM_OF_ONE_MORE = 27
    """The natural logarithm of ``1 + a``, likewise; ``a > -1``."""
    STORE = 28
    """``a``, or ``b + a``, is the result."""
    SUM = 29
    """Adds ``a``, in float64, to a total."""
    DOT = 30
    """Adds ``a * b``, in float64, to a total."""
    LARGEST = 31
    """A total becomes the largest ``a``, if it was smaller."""
    COUNT = 32
    """Counts in a total where ``a`` is not 0, or neither ``a`` nor ``b`` is."""
    OPPOSED = 33
    """Counts in a total where ``a`` and ``b`` have opposite signs, and neither is 0."""
    RANK = 34
    """``a``, none of them negative, are values among which a rank is looked for."""


TOTALS = frozenset({Op.SUM, Op.DOT, Op.LARGEST, Op.COUNT, Op.OPPOSED})
"""Sinks that leave one number."""
SINKS = TOTALS | {Op.STORE, Op.RANK}
"""Steps that leave something behind; the others only fill a register."""
FUNCTIONS = frozenset({
    Op.SQUARE_ROOT, Op.EXPONENTIAL, Op.LOGARITHM, Op.EXPONENTIAL_LESS_ONE, Op.LOGARITHM_OF_ONE_MORE,
})  # fmt: skip
"""Steps of :mod:`streammerge.tiles.functions`, whose bits no library has."""


class Origin(Enum):
    """Where a number comes from."""

    CONSTANT = "constant"
    """From the recipe."""
    FOUND = "found"
    """From the statistics of the tensor, or of the model."""
    ROW = "row"
    """From the statistics of the row that an element lies in."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number that is the same for many elements."""

    origin: Origin
    """Where it comes from."""
    value: float = 0.0
    """The number itself, of a constant."""
    index: int = 0
    """Which one of those that were found."""


class Vote(IntEnum):
    """How the sign of an element is elected."""

    TOTAL = 0
    """By the sign of the sum of the rows."""
    FREQUENCY = 1
    """By the sign of the sum of their signs."""


@dataclass(frozen=True, slots=True)
class Majority:
    """How :attr:`Op.MAJORITY_MEAN` elects and divides."""

    vote: Vote
    """How the sign is elected."""
    divides: bool
    """Whether the sum of what agrees is divided by the sum of its shares, where that is not 0."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a program."""

    op: Op
    """What it does."""
    out: int
    """The register that it fills; of sinks, which of their kind it is."""
    a: int = -1
    """Register of the first row; of loads, the index of the source or row."""
    b: int = -1
    """Register of the second row; -1 for none."""
    c: int = -1
    """Register of a third row; of trims and random steps, which one they are."""
    number: int = -1
    """Index of its number, or of the first of them; -1 for none."""
    rows: tuple[int, ...] = ()
    """Registers of :attr:`Op.MAJORITY_MEAN`. Its numbers are a factor for each row, by which it is
    multiplied before it is added, a share for each row, and the sign that a vote of zero elects."""
    majority: Majority | None = None
    """How :attr:`Op.MAJORITY_MEAN` is done."""


@dataclass(frozen=True, slots=True)
class Program:
    """What happens to a tile."""

    steps: tuple[Step, ...]
    """In order."""
    registers: int
    """Rows that it needs."""
    numbers: tuple[Number, ...]
    """What steps refer to."""
    trims: tuple[int, ...] = ()
    """Which trims it uses, in the order of their use; each once."""
    streams: tuple[int, ...] = ()
    """Whose random numbers it uses, in the order of their use; each source once."""
    totals: tuple[Op, ...] = ()
    """Kinds of its totals, in order."""
    ranked: int = 0
    """How many values it offers to be ranked."""

    @property
    def has_row_numbers(self) -> bool:
        """Whether numbers differ from row to row."""
        return any(number.origin is Origin.ROW for number in self.numbers)

    @property
    def has_found_numbers(self) -> bool:
        """Whether numbers come from the statistics of a tensor or the model."""
        return any(number.origin is Origin.FOUND for number in self.numbers)

    def uses(self, *ops: Op) -> bool:
        """Return whether any step does one of these."""
        return any(step.op in ops for step in self.steps)
