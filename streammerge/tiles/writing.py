"""The sheet on which a method writes down what it does to elements.

A method is given a :class:`Sheet`, takes rows from it, computes with them as with numbers, and
returns the row that is the result. What comes of it is an expression; nothing is computed yet.

    >>> sheet = Sheet(sources=2, has_base=True)
    >>> first, second = sheet.task_vectors
    >>> changed = sheet.base + weighted_sum([first, second], [0.5, 0.5])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from streammerge.tiles.program import Majority, Number, Op, Origin, Vote

Factor = float | Number
"""A number: one that the method knows, or one that statistics will find."""
_TANGENT_IS_ONE = 20.0
"""The hyperbolic tangent of it differs from 1 by less than half a unit in the last place of float64."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """An expression: one value per element. Two of them are the same only if they are one object."""

    op: Op
    """What computes it."""
    rows: tuple[Row, ...] = ()
    """What it is computed from."""
    numbers: tuple[Number, ...] = ()
    """Its numbers."""
    index: int = -1
    """The source, the trim or the stream of random numbers, for steps that have one."""
    majority: Majority | None = None
    """How a majority is found, for the step that does."""

    def __add__(self, other: Row | Factor) -> Row:
        """Return the sum."""
        return _binary(Op.ADD, self, other)

    def __sub__(self, other: Row | Factor) -> Row:
        """Return the difference."""
        return _binary(Op.SUBTRACT, self, other)

    def __mul__(self, other: Row | Factor) -> Row:
        """Return the product."""
        return _binary(Op.MULTIPLY, self, other)

    def __truediv__(self, other: Row | Factor) -> Row:
        """Return the quotient."""
        return _binary(Op.DIVIDE, self, other)

    def __gt__(self, other: Row | Factor) -> Row:
        """Return 1 where it is greater, and 0 elsewhere."""
        return _binary(Op.GREATER, self, other)

    def __ge__(self, other: Row | Factor) -> Row:
        """Return 1 where it is at least as great, and 0 elsewhere."""
        return _binary(Op.AT_LEAST, self, other)

    def __abs__(self) -> Row:
        """Return the magnitude."""
        return Row(Op.ABSOLUTE, (self,))


@dataclass(frozen=True, slots=True)
class Sink:
    """What a program leaves behind: a total, or values that are ranked."""

    op: Op
    """What is done with the rows."""
    rows: tuple[Row, ...]
    """One row, or two."""


@dataclass(slots=True)
class Sheet:
    """What a method may take: the models, what statistics have found, and random numbers."""

    sources: int
    """Number of sources."""
    has_base: bool
    """Whether there is a base."""
    _loads: dict[tuple[Op, int], Row] = field(default_factory=dict)

    @property
    def base(self) -> Row:
        """The base's values."""
        if not self.has_base:
            raise ValueError("the method was written for a merge with a base")
        return self._load(Op.BASE, 0)

    @property
    def values(self) -> tuple[Row, ...]:
        """Every source's own values."""
        return tuple(self._load(Op.SOURCE, source) for source in range(self.sources))

    @property
    def task_vectors(self) -> tuple[Row, ...]:
        """Every source's values minus the base's."""
        if not self.has_base:
            raise ValueError("task vectors are differences from a base")
        return tuple(self._load(Op.TASK_VECTOR, source) for source in range(self.sources))

    @property
    def vectors(self) -> tuple[Row, ...]:
        """Task vectors where there is a base, and the sources' own values where there is none."""
        return self.task_vectors if self.has_base else self.values

    def computed(self, index: int) -> Row:
        """Return what the method's ranks within rows came to, for one of them."""
        return self._load(Op.COMPUTED, index)

    def number(self, index: int) -> Number:
        """Return a number that statistics have found, by its place among all of them."""
        return Number(Origin.FOUND, index=index)

    def row_number(self, index: int) -> Number:
        """Return a number that the statistics of the element's own row have found."""
        return Number(Origin.ROW, index=index)

    def _load(self, op: Op, index: int) -> Row:
        return self._loads.setdefault((op, index), Row(op, index=index))


def minimum(row: Row, other: Row | Factor) -> Row:
    """Return the smaller of two, element by element."""
    return _binary(Op.MINIMUM, row, other)


def maximum(row: Row, other: Row | Factor) -> Row:
    """Return the larger of two, element by element."""
    return _binary(Op.MAXIMUM, row, other)


def equal(row: Row, other: Row | Factor) -> Row:
    """Return 1 where both are equal, and 0 elsewhere."""
    return _binary(Op.EQUAL, row, other)


def sign(row: Row) -> Row:
    """Return -1, 0 or 1."""
    return Row(Op.SIGN, (row,))


def square_root(row: Row) -> Row:
    """Return the square root of values that are not negative."""
    return Row(Op.SQUARE_ROOT, (row,))


def exponential(row: Row) -> Row:
    """Return e to the power of a row."""
    return Row(Op.EXPONENTIAL, (row,))


def logarithm(row: Row) -> Row:
    """Return the natural logarithm of positive values."""
    return Row(Op.LOGARITHM, (row,))


def exponential_less_one(row: Row) -> Row:
    """Return e to the power of a row, minus one, as exact near 0 as elsewhere."""
    return Row(Op.EXPONENTIAL_LESS_ONE, (row,))


def logarithm_of_one_more(row: Row) -> Row:
    """Return the natural logarithm of one plus a row of values above -1, likewise."""
    return Row(Op.LOGARITHM_OF_ONE_MORE, (row,))


def hyperbolic_tangent(row: Row) -> Row:
    """Return the hyperbolic tangent, odd to the last bit.

    ``tanh |z| = t / (t + 2)`` with ``t = e ** (2 |z|) - 1``; from 20 on it is 1 in every type.
    """
    powers = exponential_less_one(minimum(abs(row), _TANGENT_IS_ONE) * 2.0)
    return sign(row) * powers / (powers + 2.0)


def fill(value: Factor) -> Row:
    """Return a number in every element."""
    return Row(Op.FILL, (), (_number(value),))


def where(condition: Row, chosen: Row, otherwise: Row) -> Row:
    """Return ``chosen`` where the condition is not 0, and ``otherwise`` elsewhere."""
    return Row(Op.SELECT, (chosen, otherwise, condition))


def keep_largest(row: Row, trim: int) -> Row:
    """Return what a trim keeps, and 0 elsewhere.

    Args:
        row: The values whose magnitudes were ranked.
        trim: Which of the ranks that were found. A program uses each once.
    """
    return Row(Op.KEEP_LARGEST, (row,), index=trim)


def in_top(row: Row, trim: int) -> Row:
    """Return 1 where a trim keeps the value, and 0 elsewhere; see :func:`keep_largest`."""
    return Row(Op.IN_TOP, (row,), index=trim)


def keep_random(row: Row, source: int, probability: Row | float) -> Row:
    """Return what is kept at random, and 0 elsewhere.

    Args:
        row: The values.
        source: Whose random numbers decide. A program uses each source's once.
        probability: Of an element to be kept, in [0, 1].
    """
    if isinstance(probability, Row):
        return Row(Op.KEEP_RANDOM, (row, probability), index=source)
    return Row(Op.KEEP_RANDOM, (row,), (_number(probability),), index=source)


def changed(row: Row, source: int) -> Row:
    """Return values as a source's adapter leaves them, rounded to the base's type."""
    return Row(Op.CHANGED, (row,), index=source)


def weighted_sum(rows: Sequence[Row], weights: Sequence[Factor]) -> Row:
    """Return the sum of weighted rows, added from left to right; a zero has no sign.

    Source: equation 1 of Ilharco et al. 2023, arXiv:2212.04089.
    """
    total = rows[0] if weights[0] == 1 else rows[0] * weights[0]
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        total = total + row if weight == 1 else Row(Op.ADD_SCALED, (total, row), (_number(weight),))
    # A sum that starts from +0.0 is never -0.0; one that starts from a -0.0 may be.
    return total + 0.0


def majority_mean(
    rows: Sequence[Row],
    *,
    vote: Vote,
    factors: Sequence[Factor],
    shares: Sequence[Factor] | None,
    zero_elects: Factor = 1.0,
) -> Row:
    """Return the mean of those entries that have the sign that the rows elect.

    ``sum_i f_i r_i [r_i s > 0] / sum_i h_i [r_i s > 0]`` with the sign ``s`` of the vote, and 0 where
    nothing agrees.

    Source: Yadav et al. 2023, arXiv:2306.01708, section 4.2, steps 2 and 3.

    Args:
        rows: What votes, and is averaged.
        vote: How the sign is elected.
        factors: ``f``, by which rows are multiplied before they are added.
        shares: ``h``; None leaves the sum undivided.
        zero_elects: The sign that a vote of zero elects.
    """
    numbers = (*factors, *(shares or [1.0] * len(rows)), zero_elects)
    how = Majority(vote, shares is not None)
    return Row(Op.MAJORITY_MEAN, tuple(rows), tuple(map(_number, numbers)), majority=how)


def total(row: Row) -> Sink:
    """Ask for the sum of a row over a scope."""
    return Sink(Op.SUM, (row,))


def dot(row: Row, other: Row) -> Sink:
    """Ask for the sum of the products of two rows over a scope."""
    return Sink(Op.DOT, (row, other))


def largest(row: Row) -> Sink:
    """Ask for the largest value of a row over a scope."""
    return Sink(Op.LARGEST, (row,))


def count(row: Row) -> Sink:
    """Ask for the number of elements of a scope that are not 0."""
    return Sink(Op.COUNT, (row,))


def count_both(row: Row, other: Row) -> Sink:
    """Ask for the number of elements of a scope that are 0 in neither of two rows."""
    return Sink(Op.COUNT, (row, other))


def count_opposed(row: Row, other: Row) -> Sink:
    """Ask for the number of elements of a scope that are positive in one row and negative in the other."""
    return Sink(Op.OPPOSED, (row, other))


def ranked(row: Row) -> Sink:
    """Ask for a rank among the magnitudes of a row over a scope."""
    return Sink(Op.RANK, (abs(row),))


def _number(value: Factor) -> Number:
    return value if isinstance(value, Number) else Number(Origin.CONSTANT, float(value))


def _binary(op: Op, row: Row, other: Row | Factor) -> Row:
    if isinstance(other, Row):
        return Row(op, (row, other))
    return Row(op, (row,), (_number(other),))
