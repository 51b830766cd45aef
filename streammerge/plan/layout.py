"""Where every output byte goes: shards, headers and offsets, from names, dtypes and shapes alone.

The layout follows tensor names, never the inputs' sharding, so that the output does not depend on
how the inputs happen to be stored. Inside a shard wider element types come first, as the
safetensors library stores them, which keeps every tensor aligned to its element size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from math import prod
from typing import Protocol

from streammerge.assignment.types import AssignedTensor
from streammerge.dtypes import DType
from streammerge.plan.types import MergePlan, OutputLayout, OutputShard

# Not all digits at once: Python refuses to convert 4,300 of them, and a name may have more.
_DIGITS = re.compile(r"(\d{1,18})")
_HEADER_ALIGNMENT = 8
"""The data section starts at a multiple of this many bytes, as the format recommends."""


def plan_layout(
    tensors: Sequence[AssignedTensor], max_shard_bytes: int
) -> tuple[OutputLayout, list[tuple[int, int]]]:
    """Assign every tensor a shard and an absolute offset.

    Args:
        tensors: Output tensors, in any order.
        max_shard_bytes: Largest data size of a shard; a larger tensor gets its own.

    Returns:
        The layout, and ``(shard, offset)`` per tensor in the order given.
    """
    nbytes = [_nbytes(tensor) for tensor in tensors]
    order = sorted(range(len(tensors)), key=lambda index: _natural(tensors[index].name))
    groups: list[list[int]] = [[]]
    filled = 0
    for index in order:
        if groups[-1] and filled + nbytes[index] > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += nbytes[index]
    places: list[tuple[int, int]] = [(0, 0)] * len(tensors)
    shards = []
    for shard_index, group in enumerate(groups):
        # sort() is stable: names stay in natural order within one element size.
        group.sort(key=lambda index: -tensors[index].dtype.itemsize)
        header = _header([tensors[index] for index in group])
        offset = len(header)
        for index in group:
            places[index] = (shard_index, offset)
            offset += nbytes[index]
        name = _shard_name(shard_index, len(groups))
        shards.append(OutputShard(name, len(header), offset - len(header), tuple(group)))
    index_name = "model.safetensors.index.json" if len(groups) > 1 else None
    return OutputLayout(tuple(shards), index_name), places


def render_header(plan: MergePlan, shard: int) -> bytes:
    """Return the bytes of a shard before its tensor data."""
    return _header([plan.tasks[index] for index in plan.layout.shards[shard].tasks])


def render_index(plan: MergePlan) -> bytes:
    """Return the bytes of ``model.safetensors.index.json``."""
    weight_map = {
        plan.tasks[index].name: shard.name for shard in plan.layout.shards for index in shard.tasks
    }
    parameters = sum(task.numel for task in plan.tasks)
    index = {
        "metadata": {"total_parameters": parameters, "total_size": plan.layout.data_nbytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


class _Stored(Protocol):
    """What a header says about a tensor; tensors before and after planning both know it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def _header(tensors: Sequence[_Stored]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + _nbytes(tensor)
        fields[tensor.name] = {
            "dtype": tensor.dtype.value,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _nbytes(tensor: _Stored) -> int:
    return tensor.dtype.nbytes(prod(tensor.shape))


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Order ``layers.2`` before ``layers.10``; names that only differ in zeros by themselves."""
    parts = _DIGITS.split(name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p], name


def _shard_name(index: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"
