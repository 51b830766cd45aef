"""Ranks within rows on a device: short rows are sorted in registers by one kernel, long ones by torch.

Both sort the same keys, of which no two are equal: patterns of magnitudes, and behind them places in the row.
So the order is that of :func:`streammerge.engine.rows.rank_rows`, the twin on the CPU.

Memory: :func:`~streammerge.plan.device_rows.sorting_bytes` per element.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton

from streammerge.engine.accelerator.fused.functions import rank_rows as rank_in_registers
from streammerge.engine.accelerator.fused.kernels import launch
from streammerge.lazily import torch
from streammerge.plan.device_rows import MOST_IN_REGISTERS

if TYPE_CHECKING:
    from torch import Tensor

_PER_WARP = 512
"""Elements of such a row for each warp: 16 keys of two registers per thread."""
_INFINITE = 0x7F800000
_NOT_A_NUMBER = 0x7FC00000
"""Patterns of float32."""


def rank_rows(values: Tensor, row: int, ranks: Tensor) -> None:
    """Enqueue the ranks of magnitudes within rows, in numbers from 0 to 1.

    Args:
        values: ``[rows * row]`` float32.
        row: Elements of a row; two or more.
        ranks: ``[rows * row]`` float32; receives them.
    """
    if row <= MOST_IN_REGISTERS:
        rank_short_rows(values, row, ranks)
    else:
        _rank_long_rows(values.view(-1, row), ranks.view(-1, row))


def rank_short_rows(values: Tensor, row: int, ranks: Tensor) -> None:
    """Do so by the kernel, a row by each instance."""
    wide = triton.next_power_of_2(row)
    warps = max(wide // _PER_WARP, 1)
    launch(rank_in_registers, values.numel() // row, values, ranks, row, wide, warps=warps)


def _rank_long_rows(values: Tensor, ranks: Tensor) -> None:
    """Do so for ``[rows, row]`` by torch's sort, which waits for nothing."""
    count, row = values.shape
    places = torch.arange(row, device=values.device)
    patterns = values.abs().view(torch.int32)
    keys = patterns.masked_fill_(patterns > _INFINITE, _NOT_A_NUMBER).to(torch.int64)
    keys = keys.bitwise_left_shift_(32).bitwise_or_(row - 1 - places)
    found = torch.sort(keys, dim=1).values.bitwise_and_(2**32 - 1)
    last = torch.full((1,), row - 1, dtype=torch.float32, device=values.device)
    relative = (places.to(torch.float32) / last).expand(count, row)
    ranks.scatter_(1, found.neg_().add_(row - 1), relative)
