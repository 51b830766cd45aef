"""Exponential and logarithm in elementary operations, which are the same bits on every machine.

Libraries differ in the last bits of these functions, and so does one library on two processors. Here
they are computed in float64 from sums, products and one division, each rounded once, and rounded to
the compute dtype at the end. The compiled machine does the same operations in the same order.

Source: range reduction after Cody and Waite 1980, "Software Manual for the Elementary Functions",
chapters 5 and 6; the series of e**r for ``|r| <= ln(2) / 2``, and of the area tangent for
``|s| <= 0.1716``, to where the next term is below half a unit in the last place of float64.

Memory: about 48 bytes per element of a slice.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LN2_HIGH = 0.693147180369123816490
"""The upper 33 bits of the natural logarithm of 2: products with small integers are exact."""
LN2_LOW = 1.90821492927058770002e-10
"""The rest of it."""
LOG2_E = 1.44269504088896338700
EXPONENTIAL_TERMS = tuple(1.0 / factorial for factorial in (
    6227020800.0, 479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0,
    24.0, 6.0, 2.0, 1.0, 1.0,
))  # fmt: skip
"""1 / 13! to 1 / 0!, the order of Horner's rule."""
LOGARITHM_TERMS = tuple(1.0 / odd for odd in range(21, 0, -2))
"""1 / 21, 1 / 19, to 1, likewise."""
LOWEST, HIGHEST = -745.2, 709.7
"""Powers that float64 can hold; what lies beyond is cut off there."""
_SQRT_HALF = 0.70710678118654752440
"""Mantissas below it are doubled, so that they lie around 1."""


def exponential(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return e to the power of each value, ``[m]``."""
    values = np.minimum(np.maximum(values, LOWEST), HIGHEST)
    powers = np.rint(values * LOG2_E)
    rest = values - powers * LN2_HIGH - powers * LN2_LOW
    series = np.full_like(rest, EXPONENTIAL_TERMS[0])
    for term in EXPONENTIAL_TERMS[1:]:
        series = series * rest + term
    # In two factors: the smallest results are beyond what one factor can be.
    half = np.floor(powers * 0.5)
    return series * _power_of_two(half) * _power_of_two(powers - half)


def logarithm(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the natural logarithm of each normal positive value, ``[m]``; NaN of what is not finite."""
    bits = values.view(np.int64)
    exponents = ((bits >> 52) - 1022).astype(np.float64)
    mantissas = ((bits & (1 << 52) - 1) | 1022 << 52).view(np.float64)
    small = mantissas < _SQRT_HALF
    mantissas = np.where(small, mantissas + mantissas, mantissas)
    exponents = np.where(small, exponents - 1.0, exponents)
    ratio = (mantissas - 1.0) / (mantissas + 1.0)
    square = ratio * ratio
    series = np.full_like(square, LOGARITHM_TERMS[0])
    for term in LOGARITHM_TERMS[1:]:
        series = series * square + term
    result = exponents * LN2_HIGH + (exponents * LN2_LOW + (ratio + ratio) * series)
    with np.errstate(invalid="ignore"):
        # What is not finite gives no number, instead of one that looks like any other.
        return result + (values - values)


def square_root(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the square root of each value, ``[m]``, rounded once.

    Of float32 numbers it may be rounded once more, to float32: the result is the nearest one.
    """
    with np.errstate(invalid="ignore"):
        return np.sqrt(values)


def _power_of_two(exponents: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 2 to the power of whole numbers in [-1022, 1023]."""
    return ((exponents.astype(np.int64) + 1023) << 52).view(np.float64)
