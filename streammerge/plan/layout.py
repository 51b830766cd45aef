"""Where every output byte goes: shards, headers and offsets, from names, dtypes and shapes alone.

The layout follows tensor names, never the inputs' sharding, so that the output does not depend on
how the inputs happen to be stored. Inside a shard wider element types come first, as the
safetensors library stores them, which keeps every tensor aligned to its element size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from json.encoder import encode_basestring
from math import prod
from typing import Protocol

from streammerge.assignment.types import Region
from streammerge.checkpoint.metadata import FORMAT, Metadata
from streammerge.checkpoint.naming import MODEL_NAMES, WeightNames, name_single, name_weights
from streammerge.checkpoint.types import Checkpoint
from streammerge.dtypes import DType
from streammerge.errors import RecipeError
from streammerge.plan.types import MergePlan, OutputLayout, OutputShard, TensorTask
from streammerge.recipe.types import OutputSpec
from streammerge.units import format_size

# Not all digits at once: Python refuses to convert 4,300 of them, and a name may have more.
_PARTS = re.compile(r"\d{1,18}|\D+")
_HEADER_ALIGNMENT = 8
"""The data section starts at a multiple of this many bytes, as the format recommends."""
USUAL_SHARD_BYTES = 5 * 10**9
"""Largest shard where neither the recipe nor the base says otherwise; what transformers wrote for years."""


def plan_layout_like(
    tensors: Sequence[_Stored], first: Checkpoint, output: OutputSpec, *, grows: bool = False
) -> tuple[OutputLayout, list[tuple[int, int]]]:
    """Assign every tensor a place in files like those of the first model.

    One file becomes one file, however large, unless the recipe limits its size: programs that take a
    model from one file cannot use several.

    Args:
        tensors: Output tensors, in any order.
        first: The base, or the first source.
        output: What the recipe says about the output.
        grows: Whether it is several times the first model, and becomes several files of the usual size.

    Returns:
        As :func:`plan_layout`.
    """
    if first.parts:
        return _plan_parts(tensors, first, output)
    limit = output.max_shard_bytes
    if limit is None and (grows or len(first.files) > 1):
        limit = USUAL_SHARD_BYTES
    return plan_layout(
        tensors, limit, names=name_weights(first), metadata=first.metadata or (FORMAT,)
    )


def _plan_parts(
    tensors: Sequence[_Stored], first: Checkpoint, output: OutputSpec
) -> tuple[OutputLayout, list[tuple[int, int]]]:
    """Assign every tensor a place in the folder that it is called after."""
    folders = {folder: part for folder, part in first.parts if folder}
    root = dict(first.parts).get("")
    members: dict[str, list[int]] = {}
    for index, tensor in enumerate(tensors):
        folder = tensor.name.partition("/")[0]
        members.setdefault(folder if folder in folders else "", []).append(index)
    shards: list[OutputShard] = []
    places: list[tuple[int, int]] = [(0, 0)] * len(tensors)
    indexes: list[tuple[str, str]] = []
    for folder, part in (*([] if root is None else [("", root)]), *folders.items()):
        indices = members.get(folder, [])
        prefix = f"{folder}/" if folder else ""
        if folder and not indices:
            # A rule drops all of it.
            continue
        inside = [_inside(tensors[index], prefix) for index in indices]
        layout, own = plan_layout_like(inside, part, output)
        if layout.index_name is not None:
            indexes.append((folder, layout.index_name))
        for index, (shard, offset) in zip(indices, own, strict=True):
            places[index] = (len(shards) + shard, offset)
        shards += (
            replace(
                shard,
                name=prefix + shard.name,
                tasks=tuple(indices[position] for position in shard.tasks),
            )
            for shard in layout.shards
        )
    own_index = next((name for folder, name in indexes if not folder), None)
    of_parts = tuple((folder, name) for folder, name in indexes if folder)
    return OutputLayout(tuple(shards), own_index, of_parts), places


Places = list[tuple[int, int]]
"""Shard and offset of each tensor."""


def place_parts(
    tensors: Sequence[_MaybePart],
    lay_out: Callable[[Sequence[_Stored]], tuple[OutputLayout, Places]],
) -> tuple[OutputLayout, Places]:
    """Assign a place to tensors, some of which are parts of one.

    Args:
        tensors: The tensors and parts of tensors.
        lay_out: Assigns every whole tensor a place.

    Returns:
        The layout, whose shards name the parts that lead, and a place for each tensor and part.
    """
    if all(tensor.region is None for tensor in tensors):
        return lay_out(tensors)
    leading = [
        index
        for index, tensor in enumerate(tensors)
        if tensor.region is None or tensor.region.leads
    ]
    wholes: list[_Stored] = []
    for index in leading:
        tensor = tensors[index]
        shape = tensor.shape if tensor.region is None else tensor.region.shape
        wholes.append(_Inside(tensor.name, tensor.dtype, shape))
    layout, found = lay_out(wholes)
    whole_place = {whole.name: place for whole, place in zip(wholes, found, strict=True)}
    places = []
    for tensor in tensors:
        shard, offset = whole_place[tensor.name]
        first = 0 if tensor.region is None else tensor.region.first
        places.append((shard, offset + tensor.dtype.nbytes(first)))
    shards = tuple(
        replace(shard, tasks=tuple(leading[index] for index in shard.tasks))
        for shard in layout.shards
    )
    return replace(layout, shards=shards), places


def plan_layout(
    tensors: Sequence[_Stored],
    max_shard_bytes: int | None,
    *,
    names: WeightNames = MODEL_NAMES,
    metadata: Metadata = (FORMAT,),
) -> tuple[OutputLayout, list[tuple[int, int]]]:
    """Assign every tensor a shard and an absolute offset.

    Args:
        tensors: Output tensors, in any order.
        max_shard_bytes: Largest data size of a shard; a larger tensor gets its own. None puts all
            into one.
        names: What the files are called.
        metadata: What their headers say beside the tensors.

    Returns:
        The layout, and ``(shard, offset)`` per tensor in the order given.
    """
    nbytes = [_nbytes(tensor) for tensor in tensors]
    itemsizes = [tensor.dtype.itemsize for tensor in tensors]
    ranks = _natural([tensor.name for tensor in tensors])
    order = sorted(range(len(tensors)), key=ranks.__getitem__)
    groups: list[list[int]] = [[]]
    filled = 0
    for index in order:
        full = max_shard_bytes is not None and filled + nbytes[index] > max_shard_bytes
        if groups[-1] and full:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += nbytes[index]
    places: list[tuple[int, int]] = [(0, 0)] * len(tensors)
    shards = []
    for shard_index, group in enumerate(groups):
        # sort() is stable, backwards too: names stay in natural order within one element size.
        group.sort(key=itemsizes.__getitem__, reverse=True)
        header = _header([tensors[index] for index in group], metadata)
        offset = len(header)
        for index in group:
            places[index] = (shard_index, offset)
            offset += nbytes[index]
        name = names.shard(shard_index, len(groups))
        data_nbytes = offset - len(header)
        shards.append(OutputShard(name, len(header), data_nbytes, tuple(group), metadata))
    index_name = names.index if len(groups) > 1 else None
    return OutputLayout(tuple(shards), index_name), places


def in_one_file(plan: MergePlan, name: str, limit: int | None) -> MergePlan:
    """Return the same merge with all of its tensors in a file called ``name``, and nothing beside it.

    Args:
        plan: A merge.
        name: Name of the file.
        limit: What the recipe gives as ``output.max_shard_size``; None if it gives none.

    Raises:
        RecipeError: The recipe's limit makes several files.
    """
    if [shard.name for shard in plan.layout.shards] == [name] and not plan.companions:
        return plan
    folders = sorted({shard.folder for shard in plan.layout.shards})
    if folders != [""]:
        raise RecipeError(
            f"{name} is one file, and the first model has tensors in {', '.join(folders)}; name a "
            "directory as the output"
        )
    if limit is not None and len(plan.layout.shards) > 1:
        raise RecipeError(
            f"output.max_shard_size: {format_size(limit)} makes {len(plan.layout.shards)} files of "
            f"{format_size(plan.layout.data_nbytes)}, and {name} is one; leave the key out, or name "
            "a directory as the output"
        )
    layout, places = place_parts(
        plan.tasks,
        lambda tensors: plan_layout(
            tensors, None, names=name_single(name), metadata=plan.layout.shards[0].metadata
        ),
    )
    tasks = tuple(
        replace(task, shard=shard, offset=offset)
        for task, (shard, offset) in zip(plan.tasks, places, strict=True)
    )
    beside = (*plan.left_behind, *(companion.name for companion in plan.companions))
    return replace(
        plan, tasks=tasks, layout=layout, companions=(), left_behind=tuple(sorted(beside))
    )


def render_header(plan: MergePlan, shard: int) -> bytes:
    """Return the bytes of a shard before its tensor data."""
    planned = plan.layout.shards[shard]
    tasks = [_inside_task(plan.tasks[index], planned.folder) for index in planned.tasks]
    return _header(tasks, planned.metadata)


def render_indexes(plan: MergePlan) -> dict[str, bytes]:
    """Return the bytes of every index, such as ``model.safetensors.index.json``, by its name."""
    layout = plan.layout
    named = [(f"{folder}/", name) for folder, name in layout.part_indexes]
    named += [] if layout.index_name is None else [("", layout.index_name)]
    return {folder + name: _render_index(plan, folder) for folder, name in named}


def _render_index(plan: MergePlan, folder: str) -> bytes:
    shards = [shard for shard in plan.layout.shards if shard.folder == folder]
    weight_map = {
        plan.tasks[index].name.removeprefix(folder): shard.name.removeprefix(folder)
        for shard in shards
        for index in shard.tasks
    }
    parameters = sum(
        prod(plan.tasks[index].output_shape) for shard in shards for index in shard.tasks
    )
    total = sum(shard.data_nbytes for shard in shards)
    index = {
        "metadata": {"total_parameters": parameters, "total_size": total},
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


class _MaybePart(_Stored, Protocol):
    """A tensor, or a part of one."""

    @property
    def region(self) -> Region | None: ...


@dataclass(frozen=True, slots=True)
class _Inside:
    """A tensor as the file in its folder calls it."""

    name: str
    """Without the folder."""
    dtype: DType
    """Stored element type."""
    shape: tuple[int, ...]
    """Elements per dimension."""


def _inside(tensor: _Stored, folder: str) -> _Inside:
    return _Inside(tensor.name.removeprefix(folder), tensor.dtype, tensor.shape)


def _inside_task(task: TensorTask, folder: str) -> _Inside:
    return _Inside(task.name.removeprefix(folder), task.dtype, task.output_shape)


def _header(tensors: Sequence[_Stored], metadata: Metadata) -> bytes:
    outside = json.dumps(
        {"__metadata__": dict(metadata)}, separators=(",", ":"), ensure_ascii=False
    )
    fields = [outside.removesuffix("}")]
    begin = 0
    # As JSON writes it, piece by piece: 50,000 objects of objects take five times as long.
    kinds: dict[tuple[DType, tuple[int, ...]], tuple[str, int]] = {}
    for tensor in tensors:
        kind = (tensor.dtype, tensor.shape)
        if kind not in kinds:
            sizes = ",".join(map(str, tensor.shape))
            kinds[kind] = f'"dtype":"{tensor.dtype.value}","shape":[{sizes}]', _nbytes(tensor)
        described, nbytes = kinds[kind]
        end = begin + nbytes
        fields.append(
            f'{encode_basestring(tensor.name)}:{{{described},"data_offsets":[{begin},{end}]}}'
        )
        begin = end
    text = (",".join(fields) + "}").encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _nbytes(tensor: _Stored) -> int:
    return tensor.dtype.nbytes(prod(tensor.shape))


def _natural(names: Sequence[str]) -> list[tuple[list[tuple[int, int, str]], str]]:
    """Order ``layers.2`` before ``layers.10``; names that only differ in zeros by themselves."""
    split = [*map(_PARTS.findall, names)]
    # Names have few parts that are not another one's too.
    ranks = {
        part: (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in set(chain.from_iterable(split))
    }
    return [
        ([*map(ranks.__getitem__, parts)], name) for parts, name in zip(split, names, strict=True)
    ]
