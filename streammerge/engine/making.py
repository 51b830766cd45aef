"""Numbers that no file has: gate vectors, drawn or written down in the plan.

They depend on nothing but the plan: a tensor's are drawn from a stream of its own, in its order, and
rounded once to the type that it is stored in.

Source: the polar method of Marsaglia and Bray 1964, "A convenient method for generating normal
variables", with the logarithm of ``tiles/functions.py``, which is the same bits on every machine.
Memory: what :attr:`~streammerge.checkpoint.types.MadeFile.nbytes` says, and 64 KiB to draw.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.types import MadeFile, MadeKind
from streammerge.dtypes import DType
from streammerge.floats import narrow, widen
from streammerge.rng import stream_key
from streammerge.tiles.functions import logarithm

_AT_ONCE = 1024
"""Pairs of numbers that are drawn at once."""


def make_numbers(made: MadeFile) -> bytes:
    """Return what a file of made numbers holds: its tensors one after the other."""
    if made.kind is MadeKind.GIVEN:
        given = np.frombuffer(bytes.fromhex(made.given), dtype=np.uint8)
        return narrow(widen(given, DType.F32), made.dtype).tobytes()
    rows, columns = made.shape
    draw = _draw_normal if made.kind is MadeKind.NORMAL else _draw_even
    bound = 1 / math.sqrt(columns)
    parts = []
    for name in made.names:
        values = draw(np.random.Philox(key=stream_key(made.seed, 0, name)), rows * columns)
        if made.kind is MadeKind.UNIFORM:
            values *= bound
        parts.append(narrow(values, made.dtype).tobytes())
    return b"".join(parts)


def _draw_even(generator: np.random.Philox, count: int) -> NDArray[np.float64]:
    """Return numbers spread evenly over (-1, 1), from the upper 53 bits of 64."""
    words = np.asarray(generator.random_raw(count), dtype=np.uint64)
    # Odd multiples of a half: as many above zero as below it.
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-52 - 1.0


def _draw_normal(generator: np.random.Philox, count: int) -> NDArray[np.float64]:
    """Return numbers of mean 0 and variance 1: of each pair inside of the circle, two."""
    found: list[NDArray[np.float64]] = []
    missing = count
    while missing > 0:
        pairs = _draw_even(generator, 2 * _AT_ONCE).reshape(-1, 2)
        squares = pairs[:, 0] * pairs[:, 0] + pairs[:, 1] * pairs[:, 1]
        inside = (squares < 1.0) & (squares > 0.0)
        pairs, squares = pairs[inside], squares[inside]
        factors = np.sqrt(-2.0 * logarithm(squares) / squares)
        normal = (pairs * factors[:, None]).reshape(-1)[:missing]
        found.append(normal)
        missing -= normal.size
    return np.concatenate(found) if found else np.empty(0)
