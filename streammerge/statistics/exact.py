"""Sums of float64 numbers that no order and no grouping changes: integers and a power of two.

Totals of blocks are rounded, in an order that their length decides; what is added up from there on is not
rounded until all is there. So parts of a tensor may be added as they come, kept in a journal, and
added to others by another process, and the sum is the one that all blocks at once would have.

Memory: a number of about as many bits as float64 has, and some for each doubling of the count.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Exact = tuple[int, int]
"""A number as an integer, and the power of two that it is multiplied by."""

ZERO: Exact = (0, 0)
NOT_FINITE: Exact = (0, 1)
"""Stands for a sum in which something was infinite or no number: it stays that, whatever is added."""
_MANTISSA_BITS = 53


def exact_sums(totals: NDArray[np.float64]) -> tuple[Exact, ...]:
    """Return the sum of every column of ``[blocks, totals]``."""
    if len(totals) == 1:
        return exact_rows(totals)[0]
    mantissas, exponents, finite = _parts_of(totals.T)
    columns = zip(mantissas.tolist(), exponents.tolist(), finite.tolist(), strict=True)
    return tuple(
        _sum_of(zip(mantissa, exponent, strict=True)) if all(good) else NOT_FINITE
        for mantissa, exponent, good in columns
    )


def exact_rows(totals: NDArray[np.float64]) -> list[tuple[Exact, ...]]:
    """Return every number of ``[rows, totals]`` by itself, row by row."""
    mantissas, exponents, finite = _parts_of(totals)
    rows = [
        tuple(pair if pair[0] else ZERO for pair in zip(mantissa, exponent, strict=True))
        for mantissa, exponent in zip(mantissas.tolist(), exponents.tolist(), strict=True)
    ]
    if not finite.all():
        rows = [
            tuple(each if good else NOT_FINITE for each, good in zip(row, goods, strict=True))
            for row, goods in zip(rows, finite.tolist(), strict=True)
        ]
    return rows


def _parts_of(
    totals: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Return numbers as integers and powers of two, and which of them are finite."""
    finite = np.isfinite(totals)
    fractions, exponents = np.frexp(np.where(finite, totals, 0.0))
    mantissas = np.ldexp(fractions, _MANTISSA_BITS).astype(np.int64)
    return mantissas, exponents.astype(np.int64) - _MANTISSA_BITS, finite


def added(one: Exact, other: Exact) -> Exact:
    """Return the sum of two."""
    if NOT_FINITE in (one, other):
        return NOT_FINITE
    return _sum_of((one, other))


def _sum_of(numbers: Iterable[Exact]) -> Exact:
    given = [each for each in numbers if each[0]]
    if not given:
        return ZERO
    least = min(exponent for _, exponent in given)
    total = sum(mantissa << (exponent - least) for mantissa, exponent in given)
    return (total, least) if total else ZERO


def rounded(number: Exact) -> float:
    """Return the float64 that is nearest; infinity beyond its range, and NaN for no number."""
    mantissa, exponent = number
    if number == NOT_FINITE:
        return float("nan")
    try:
        # Division of integers rounds once, as IEEE 754 says.
        return float(mantissa << exponent) if exponent >= 0 else mantissa / (1 << -exponent)
    except OverflowError:
        return float("inf") if mantissa > 0 else float("-inf")
