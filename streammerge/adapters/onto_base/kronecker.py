"""Kronecker products, block by block of the flattened tensor that they are added to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.adapters.onto_base.rows import by_rows
from streammerge.lazily import torch

if TYPE_CHECKING:
    from torch import Tensor


def fill_kronecker(out: Tensor, begin: int, outer: Tensor, inner: Tensor, work: Tensor) -> None:
    """Write ``kron(outer, inner)`` from flat index ``begin`` on.

    Element ``[i c + k, j d + l]`` is ``outer[i, j] * inner[k, l]``: one multiplication, so that the
    bits are those of the whole product however it is cut.

    Args:
        out: ``[m]`` in the compute dtype; at most a block.
        begin: Flat index of its first element.
        outer: ``[a, b]``.
        inner: ``[c, d]``.
        work: Scratch of at least m elements in the compute dtype.
    """
    (_, outer_columns), (inner_rows, inner_columns) = outer.shape, inner.shape
    for part, row, column in by_rows(out, begin, outer_columns * inner_columns):
        rows = torch.arange(row, row + part.shape[0])
        upper = outer[rows // inner_rows]
        if part.shape[1] < outer_columns * inner_columns:
            _fill_part_of_row(part[0], column, upper[0], inner[row % inner_rows])
            continue
        lower = work[: part.shape[0] * inner_columns].view(-1, inner_columns)
        torch.index_select(inner, 0, rows % inner_rows, out=lower)
        whole = part.view(-1, outer_columns, inner_columns)
        torch.mul(upper[:, :, None], lower[:, None, :], out=whole)


def _fill_part_of_row(part: Tensor, column: int, upper: Tensor, lower: Tensor) -> None:
    """Write a part of one row, from a column on."""
    width, done = lower.numel(), 0
    while done < part.numel():
        place, start = divmod(column + done, width)
        count = min(part.numel() - done, width - start)
        torch.mul(lower[start : start + count], upper[place], out=part[done : done + count])
        done += count
