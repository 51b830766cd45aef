"""Exponential and logarithm in elementary operations, which are the same bits on every machine.

Libraries differ in the last bits of these functions, and so does one library on two processors. Here
they are computed in float64 from sums, products and one division, each rounded once, and rounded to
the compute dtype at the end. The compiled machine does the same operations in the same order.

Source: range reduction after Cody and Waite 1980, "Software Manual for the Elementary Functions",
chapters 5 and 6; the series of e**r for ``|r| <= ln(2) / 2``, and of the area tangent for
``|s| <= 0.1716``, to where the next term is below half a unit in the last place of float64; of what
is rounded to float32 afterwards four terms less, which leaves 2e-11 of a value.
With ``n`` and ``r`` of the reduction ``e**x - 1`` is ``2**n (e**r - 1) + (2**n - 1)``, which cancels
nothing near 0; and where ``1 + x`` lies around 1 the area tangent is that of ``x / (2 + x)``.

Memory: about 64 bytes per element of a slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LN2_HIGH = 0.693147180369123816490
"""The upper 33 bits of the natural logarithm of 2: products with small integers are exact."""
LN2_LOW = 1.90821492927058770002e-10
"""The rest of it."""
LOG2_E = 1.44269504088896338700
EXPONENTIAL_TERMS = tuple(1.0 / factorial for factorial in (
    6227020800.0, 479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0,
    24.0, 6.0, 2.0, 1.0,
))  # fmt: skip
"""1 / 13! to 1 / 1!, the order of Horner's rule: of ``(e**r - 1) / r``."""
LOGARITHM_TERMS = tuple(1.0 / odd for odd in range(21, 0, -2))
"""1 / 21, 1 / 19, to 1, likewise."""
NOT_FOR_SINGLE = 4
"""Terms, the first of either series, that float32 does without."""
LOWEST, HIGHEST = -745.2, 709.7
"""Powers that float64 can hold; what lies beyond is cut off there."""
SQRT_HALF = 0.70710678118654752440
"""Mantissas below it are doubled, so that they lie around 1."""


def exponential(values: Floats, *, single: bool = False) -> Floats:
    """Return e to the power of each value, ``[m]``.

    Args:
        values: ``[m]``.
        single: Whether the result will be rounded to float32: here and in the functions below.
    """
    powers, rest = _reduce(values)
    series = _sum_series(EXPONENTIAL_TERMS, rest, single=single)
    series *= rest
    series += 1.0
    # In two factors: the smallest results are beyond what one factor can be.
    half = np.floor(powers * 0.5)
    series *= _power_of_two(half)
    series *= _power_of_two(powers - half)
    return series


def exponential_less_one(values: Floats, *, single: bool = False) -> Floats:
    """Return e to the power of each value, minus one, ``[m]``: ``2**n (e**r - 1) + (2**n - 1)``."""
    powers, rest = _reduce(values)
    series = _sum_series(EXPONENTIAL_TERMS, rest, single=single)
    series *= rest
    half = np.floor(powers * 0.5)
    other = powers - half
    scale = _power_of_two(half)
    series *= scale
    series += scale - _power_of_two(-other)
    series *= _power_of_two(other)
    return series


def logarithm(values: Floats, *, single: bool = False) -> Floats:
    """Return the natural logarithm of each normal positive value, ``[m]``; NaN of what is not finite."""
    exponents, above = _split(values)
    return _logarithm_of(exponents, above, values, single=single)


def logarithm_of_one_more(values: Floats, *, single: bool = False) -> Floats:
    """Return the natural logarithm of one plus each value above -1, ``[m]``; likewise."""
    exponents, above = _split(1.0 + values)
    # Near 1 the sum has lost what the value still tells.
    return _logarithm_of(
        exponents, np.where(exponents == 0.0, values, above), values, single=single
    )


def square_root(values: Floats, *, single: bool = False) -> Floats:  # noqa: ARG001 - the same for both
    """Return the square root of each value, ``[m]``, rounded once.

    Of float32 numbers it may be rounded once more, to float32: the result is the nearest one.
    """
    with np.errstate(invalid="ignore"):
        return np.sqrt(values)


def _reduce(values: Floats) -> tuple[Floats, Floats]:
    """Return whole numbers n and the rest r, so that each value is ``n ln(2) + r``."""
    values = np.minimum(np.maximum(values, LOWEST), HIGHEST)
    powers = np.rint(values * LOG2_E)
    return powers, values - powers * LN2_HIGH - powers * LN2_LOW


def _split(values: Floats) -> tuple[Floats, Floats]:
    """Return whole numbers n and x, so that each value is ``2**n (1 + x)`` with 1 + x around 1."""
    bits = values.view(np.int64)
    exponents = ((bits >> 52) - 1022).astype(np.float64)
    mantissas = ((bits & (1 << 52) - 1) | 1022 << 52).view(np.float64)
    small = mantissas < SQRT_HALF
    mantissas = np.where(small, mantissas + mantissas, mantissas)
    return np.where(small, exponents - 1.0, exponents), mantissas - 1.0


def _logarithm_of(exponents: Floats, above: Floats, values: Floats, *, single: bool) -> Floats:
    """Return the logarithm of ``2**exponents (1 + above)``; NaN where values are not finite."""
    ratio = above / (above + 2.0)
    series = _sum_series(LOGARITHM_TERMS, ratio * ratio, single=single)
    series *= ratio + ratio
    series += exponents * LN2_LOW
    series += exponents * LN2_HIGH
    with np.errstate(invalid="ignore"):
        # What is not finite gives no number, instead of one that looks like any other.
        series += values - values
    return series


def _sum_series(terms: Sequence[float], variable: Floats, *, single: bool) -> Floats:
    """Return a polynomial, whose highest term comes first, by Horner's rule."""
    if single:
        terms = terms[NOT_FOR_SINGLE:]
    series = np.full_like(variable, terms[0])
    for term in terms[1:]:
        series *= variable
        series += term
    return series


def _power_of_two(exponents: Floats) -> Floats:
    """Return 2 to the power of whole numbers in [-1022, 1023], and anything for NaN."""
    with np.errstate(invalid="ignore"):
        # What it is multiplied with is NaN as well.
        whole = exponents.astype(np.int64)
    return ((whole + 1023) << 52).view(np.float64)
