"""Rotations of blocks of a row's elements, block by block of the flattened tensor that they change."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from streammerge.adapters.onto_base.workings import LEAST_ROWS
from streammerge.lazily import torch
from streammerge.statistics import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

Help = tuple["Tensor", "Tensor", Callable[[int, int], "Tensor"]]
"""Scratch of two blocks, scratch of one, and what reads elements of the tensor from one to another."""


def rotate_(weights: Tensor, begin: int, matrices: Tensor, columns: int, help_: Help) -> None:
    """Multiply every block of every row by its matrix, in place.

    Blocks that reach beyond the range are completed with what the file holds. Those that are
    multiplied by the same matrix are multiplied together, at least
    :data:`~streammerge.adapters.onto_base.workings.LEAST_ROWS` rows at once, so that the bits do not depend on
    how many there are.

    Args:
        weights: ``[m]`` of the tensor in the compute dtype; at most a block.
        begin: Flat index of the first.
        matrices: ``[n * b, b]``, one under the other; one stands for all blocks.
        columns: Elements of a row, a multiple of b.
        help_: Scratch memory, and what reads the tensor.
    """
    work, delta, read = help_
    size = matrices.shape[1]
    stacked = matrices.view(-1, size, size)
    end = begin + weights.numel()
    first, last = begin // size, -(-end // size)
    whole = work[: (last - first) * size]
    head, tail = begin - first * size, last * size - end
    if head:
        whole[:head] = read(first * size, begin)
    if tail:
        whole[-tail:] = read(end, last * size)
    whole[head : head + weights.numel()] = weights
    blocks = whole.view(-1, size)
    period = min(columns // size, stacked.shape[0]) if stacked.shape[0] > 1 else 1
    for place in range(min(period, last - first)):
        same = blocks[place::period]
        _multiply_(same, stacked[(first + place) % period], delta)
    weights.copy_(whole[head : head + weights.numel()])


def _multiply_(rows: Tensor, matrix: Tensor, scratch: Tensor) -> None:
    """Multiply rows by a matrix, in place."""
    size = matrix.shape[0]
    step = max(LEAST_ROWS, BLOCK // (2 * size))
    for begin in range(0, rows.shape[0], step):
        part = rows[begin : begin + step]
        count = part.shape[0]
        if count < LEAST_ROWS:
            padded = rows.new_zeros(LEAST_ROWS, size)
            padded[:count] = part
            part.copy_(torch.mm(padded, matrix)[:count])
        elif count * size <= scratch.numel():
            part.copy_(torch.mm(part, matrix, out=scratch[: count * size].view(count, size)))
        else:
            part.copy_(torch.mm(part, matrix))
