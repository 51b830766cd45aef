"""Rows of float32 or float64 trimmed to what ranks have found, with the operations of torch and numpy.

trim_           one block: float arithmetic, which is several times faster than boolean tensors
trim_unseen_    the same without a look at any value, for accelerators
trim_rows_      small scopes of one size, at once
mark_           1 for what is kept, and 0 for the rest
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streammerge.lazily import torch
from streammerge.statistics.topk import TopK

if TYPE_CHECKING:
    from torch import Tensor

_TIES_GROUP = 128
"""Entries that are counted together to find the last kept tie; a byte must hold their number."""


def trim_(vector: Tensor, top: TopK, block: int) -> Tensor:
    """Set everything outside the top k to zero.

    Args:
        vector: ``[m]``, one block of a task vector; overwritten.
        top: The statistic over the whole scope.
        block: Which block of the scope this is.
    """
    return _trim_(vector, top, block, _drop_late_ties_)


def trim_unseen_(vector: Tensor, top: TopK, block: int) -> Tensor:
    """Do what :func:`trim_` does without a look at any value, which an accelerator would wait for.

    Args:
        vector: ``[m]``, one block or several that keep the same of their ties; overwritten.
        top: The statistic over the whole scope.
        block: Which block of the scope this is, or the first of them.
    """
    return _trim_(vector, top, block, _drop_late_ties_unseen_)


def _trim_(
    vector: Tensor, top: TopK, block: int, drop_late_ties_: Callable[[Tensor, float, int], None]
) -> Tensor:
    if top.threshold == 0:
        return vector
    keep_ties = top.ties_to_keep(block)
    if keep_ties == 0:
        return _hardshrink_(vector, top.threshold)
    if keep_ties is not None:
        drop_late_ties_(vector, top.threshold, keep_ties)
    return _hardshrink_(vector, _next_below(top.threshold, vector))


def _drop_late_ties_(vector: Tensor, threshold: float, count: int) -> None:
    """Zero all but the first ``count`` entries with exactly this magnitude."""
    # On small tensors numpy is several times faster than nonzero.
    values = vector.numpy()
    values[(np.abs(values) == threshold).nonzero()[0][count:]] = 0


def _drop_late_ties_unseen_(vector: Tensor, threshold: float, count: int) -> None:
    """Do the same by counting: nonzero would wait for the number of ties."""
    ties = vector.abs() == threshold
    vector.masked_fill_(ties & (torch.cumsum(ties, dim=0, dtype=torch.int32) > count), 0)


def _hardshrink_(vector: Tensor, limit: float) -> Tensor:
    """Zero what has a magnitude of at most ``limit``; NaN stays."""
    return torch.ops.aten.hardshrink.out(vector, limit, out=vector)  # type: ignore[no-any-return]


def _next_below(threshold: float, vector: Tensor) -> float:
    dtype = np.float32 if vector.dtype == torch.float32 else np.float64
    return float(np.nextafter(dtype(threshold), dtype(0)))


def trim_rows_(
    rows: Tensor,
    tops: Sequence[TopK],
    blocks: Sequence[int],
    *,
    magnitudes: Tensor,
    masks: NDArray[np.bool_],
) -> None:
    """Do what :func:`trim_` does to every row, but for the sign of zeros, at once.

    An entry that is dropped becomes a zero of its own sign, which no method lets through.

    Args:
        rows: ``[n, m]``, finite, on the CPU; overwritten.
        tops: One statistic per row.
        blocks: Which block of its scope each row is.
        magnitudes: ``[>= n * m]`` scratch of the same type.
        masks: ``[2, >= n * m]`` scratch.
    """
    values = rows.numpy()
    absolute = torch.abs(rows, out=magnitudes[: rows.numel()].view_as(rows)).numpy()
    kept, tied = (mask[: values.size].reshape(values.shape) for mask in masks)
    # Below 0, so that a threshold of 0 keeps the zeros too.
    thresholds = np.array([top.threshold or -1.0 for top in tops], values.dtype)[:, None]
    np.greater(absolute, thresholds, out=kept)
    ties = [top.ties_to_keep(block) for top, block in zip(tops, blocks, strict=True)]
    if any(count != 0 for count in ties):
        np.equal(absolute, thresholds, out=tied)
        _keep_first_(tied, [tied.shape[1] if count is None else count for count in ties])
        np.logical_or(kept, tied, out=kept)
    np.multiply(values, kept, out=values)


def _keep_first_(tied: NDArray[np.bool_], counts: Sequence[int]) -> None:
    """Clear all but the first ``counts[row]`` entries of every row."""
    in_groups = _count_groups(tied)
    ends = np.cumsum(in_groups, axis=1, dtype=np.int32)
    wanted = np.array(counts, dtype=np.int32)[:, None]
    # Where there are no more than are kept, the group is the last one, and nothing comes after it.
    groups = np.minimum(np.sum(ends < wanted, axis=1), ends.shape[1] - 1)[:, None]
    before = np.take_along_axis(ends, groups, axis=1) - np.take_along_axis(
        in_groups, groups, axis=1
    )
    places = groups * _TIES_GROUP + np.arange(_TIES_GROUP)
    # Beyond the end of a row stands its last entry again, after all others.
    places = np.minimum(places, tied.shape[1] - 1)
    seen = np.cumsum(np.take_along_axis(tied, places, axis=1), axis=1, dtype=np.int32)
    last_kept = np.sum(seen < wanted - before, axis=1)
    ends_of_kept = np.where(wanted[:, 0] > 0, groups[:, 0] * _TIES_GROUP + last_kept + 1, 0)
    for row, end in zip(tied, ends_of_kept.tolist(), strict=True):
        row[end:] = False


def _count_groups(tied: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return how many are set in every group of consecutive entries of each row."""
    rows, numel = tied.shape
    if numel % _TIES_GROUP == 0:
        # Equal to the line below, and meanwhile other threads may run.
        groups = torch.from_numpy(tied).view(rows, -1, _TIES_GROUP)
        counted: NDArray[np.uint8] = groups.sum(dim=2, dtype=torch.uint8).numpy()
        return counted
    starts = np.arange(0, numel, _TIES_GROUP)
    return np.add.reduceat(tied.view(np.uint8), starts, axis=1, dtype=np.uint8)


def mark_(vector: Tensor, top: TopK, block: int, masks: NDArray[np.bool_]) -> Tensor:
    """Replace every value by 1 if it is kept, and by 0 if not.

    Args:
        vector: ``[m]``, one block of values whose magnitudes were ranked, on the CPU; overwritten.
        top: The statistic over the whole scope.
        block: Which block of the scope this is.
        masks: ``[2, >= m]`` scratch.
    """
    if top.greater == top.numel:
        return vector.fill_(1.0)
    if not vector.numel():
        # An empty tensor has the number of the block that follows, and none of its ties.
        return vector
    values = vector.abs_().numpy()
    kept, tied = masks[0, : values.size], masks[1, : values.size]
    # NaN ranks above everything.
    np.less_equal(values, top.threshold, out=kept)
    np.logical_not(kept, out=kept)
    keep_ties = top.ties_to_keep(block)
    if keep_ties != 0:
        np.equal(values, top.threshold, out=tied)
        if keep_ties is not None:
            _keep_first_(tied[None], [keep_ties])
        np.logical_or(kept, tied, out=kept)
    np.copyto(values, kept)
    return vector


def mark_unseen_(vector: Tensor, top: TopK, block: int) -> Tensor:
    """Do what :func:`mark_` does without a look at any value, which an accelerator would wait for."""
    if top.greater == top.numel:
        return vector.fill_(1.0)
    vector.abs_()
    keep_ties = top.ties_to_keep(block)
    ties = vector == top.threshold
    if keep_ties is not None:
        ties &= torch.cumsum(ties, dim=0, dtype=torch.int32) <= keep_ties
    return vector.copy_(~(vector <= top.threshold) | ties)
