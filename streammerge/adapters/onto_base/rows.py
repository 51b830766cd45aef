"""Flat ranges of matrices, cut at the ends of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Flat = TypeVar("Flat", "Tensor", NDArray[np.float32])
"""A range of elements, contiguous, of torch's or numpy's."""


def by_rows(flat: Flat, begin: int, columns: int) -> Iterator[tuple[Flat, int, int]]:
    """Cut a flat range into matrices: parts ``[n, c]``, each with its first row and column."""
    done = 0
    while done < len(flat):
        row, column = divmod(begin + done, columns)
        left = len(flat) - done
        count = left // columns * columns if column == 0 and left >= columns else 0
        width = columns
        if not count:
            # The rest of a row that began earlier, or the beginning of one that ends later.
            count = width = min(columns - column, left)
        yield flat[done : done + count].reshape(-1, width), row, column
        done += count
