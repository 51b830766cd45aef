"""Earlier results that are computed where a later recipe reads them, instead of being written first.

    inputs ──▶ earlier recipe ──▶ files ──▶ later recipe         three times through the disk
    inputs ──▶ earlier recipe, in the reader ──▶ later recipe    once

It gives the same bytes, for a reader leaves in its slot what the file would hold, rounded to its type.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from streammerge.checkpoint.types import Note, ShardFile
from streammerge.errors import printable
from streammerge.methods.base import Locality
from streammerge.plan.asking import find_method
from streammerge.plan.chunking import DECODING_BYTES, widest_input
from streammerge.plan.demanding import most_changed_sources
from streammerge.plan.factors import factors_nbytes
from streammerge.plan.kernels import takes_torch
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import FusedStage, MergePlan
from streammerge.statistics import BLOCK
from streammerge.units import format_size

_STEP_BYTES = 2**21
"""Bytes of the widest input that are read and merged at once: large enough for a disk."""
_TENSORS_AT_ONCE = 4
"""Tensors whose adapters' factors have room: readers seldom are at more."""
_WORK_BYTES = 2**21
"""Of a reader that merges, for the kernels' own rows, and for what reads the inputs."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """An earlier recipe that is to be fused."""

    name: str
    """What it is called."""
    folder: Path
    """Where the later recipe finds the headers of its result."""
    plan: MergePlan
    """Its plan."""


def why_apart(plan: MergePlan) -> str | None:
    """Return why the result of a plan has to be written before it is read; None if it need not be."""
    if plan.device is not None:
        return "it is merged on an accelerator"
    if takes_torch(plan):
        return "compiled kernels do not merge all of it"
    programs = programs_of_plan(plan, find_method(plan.method))
    alone = all(
        not each.rounds and not each.row_rounds and each.work.locality is Locality.ELEMENT
        for each in programs
    )
    if not alone or plan.model_scope:
        return f"{plan.method} looks at more of a tensor than the element that it merges"
    for task in plan.tasks:
        if task.region is not None or task.encoding is not None:
            return f"{printable(task.name)} is not made element by element"
    return None


def fuse(
    files: Sequence[ShardFile], earlier: Iterable[Earlier]
) -> tuple[tuple[ShardFile, ...], tuple[FusedStage, ...]]:
    """Replace the files of earlier results by those that they are made of.

    Args:
        files: What is read, as it was planned from the headers of the results.
        earlier: The recipes to fuse; each after those that it reads.

    Returns:
        All files, those of results marked as computed, at the same places; and the stages.
    """
    every = list(files)
    places = {file.path: index for index, file in enumerate(every)}
    stages: list[FusedStage] = []
    for each in earlier:
        results = [places.get(each.folder / shard.name) for shard in each.plan.layout.shards]
        for index in results:
            if index is not None:
                # There is nothing whose time could change.
                every[index] = replace(every[index], computed=True, mtime_ns=0)
        own = []
        for file in each.plan.files:
            if file.path not in places:
                places[file.path] = len(every)
                every.append(file)
            own.append(places[file.path])
        for inner in each.plan.fused:
            within = replace(
                inner,
                files=tuple(own[index] for index in inner.files),
                shards=tuple(None if index is None else own[index] for index in inner.shards),
            )
            stages.append(within)
        stages.append(FusedStage(each.name, _plain(each.plan), tuple(own), tuple(results)))
    return tuple(every), tuple(stages)


def _plain(plan: MergePlan) -> MergePlan:
    """Return a plan as readers need it: without those that it has fused itself, with less room for adapters."""
    itemsize = plan.compute_dtype.itemsize
    largest = max((factors_nbytes(task, itemsize) for task in plan.tasks), default=0)
    factor_bytes = min(plan.resources.factor_bytes, _TENSORS_AT_ONCE * largest)
    resources = replace(plan.resources, factor_bytes=factor_bytes)
    of_plan = {each.name: getattr(plan, each.name) for each in fields(plan)}
    return MergePlan(**of_plan | {"fused": (), "resources": resources})


def note_of(stage: FusedStage) -> Note:
    """Return what a plan says of a stage that is fused."""
    plan = stage.plan
    return Note(
        "fused",
        f"{stage.name} ({plan.method}) is computed while it is read: {format_size(plan.bytes_to_read)} "
        f"of its inputs take the place of {format_size(plan.layout.data_nbytes)} of its result, which "
        "are neither written nor read",
    )


def step_numel(plan: MergePlan) -> int:
    """Return the elements of a tensor that a reader merges at once: whole blocks."""
    return max(BLOCK, _STEP_BYTES // _widest(plan) // BLOCK * BLOCK)


def slot_nbytes(plan: MergePlan) -> int:
    """Return the bytes that a reader keeps for each model, and for the result."""
    return step_numel(plan) * _widest(plan)


def reader_nbytes(stages: Iterable[FusedStage]) -> int:
    """Return what a reader takes to compute what it reads; one stage may read another one."""
    return sum(
        (1 + len(stage.plan.models)) * slot_nbytes(stage.plan)
        + _WORK_BYTES
        + DECODING_BYTES
        + _changed_rows(stage.plan) * BLOCK * stage.plan.compute_dtype.itemsize
        for stage in stages
    )


def shared_nbytes(stages: Iterable[FusedStage]) -> int:
    """Return what all readers share: adapters' factors."""
    return sum(stage.plan.resources.factor_bytes for stage in stages)


def _changed_rows(plan: MergePlan) -> int:
    """Return the blocks that adapters' products take."""
    most = most_changed_sources(programs_of_plan(plan, find_method(plan.method)), plan.tasks)
    return most and most + 1


def _widest(plan: MergePlan) -> int:
    return max((max(widest_input(task), task.dtype.itemsize) for task in plan.tasks), default=1)
