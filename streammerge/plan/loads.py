"""What a tensor asks of cores, of a device and of the bus between them, in numbers without time.

    cores    values of its inputs, and terms of products of adapters' factors
    device   bytes moved in its memory, values sorted, operations to ask for, kernels to compile
    bus      bytes that cross: inputs, factors, what is told of rows, the result

How long that takes is up to rates (:mod:`~streammerge.plan.estimating`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from streammerge.adapters.onto_base.changes import Change, ChangeKind
from streammerge.methods.programs import Programs
from streammerge.plan.device_norms import has_norms_for_device
from streammerge.plan.device_products import factor_bytes
from streammerge.plan.devices import StepShape, is_fused
from streammerge.plan.factors import changed_input
from streammerge.plan.sweeps import asks
from streammerge.plan.types import DeviceResources, MergePlan, TensorTask
from streammerge.tiles.program import Op, Program

_RANDOM_OPERATIONS = 400
"""Single operations that a random mask takes."""
_RANKING_OPERATIONS = 20
"""Those that find a ranked value's place among the collected and the counted ones."""
_RANKING_KERNELS = 2
"""Fused ones that do it."""
_RANKING = ("bins", "band", "collected")
"""Kernels that every ranked value shares."""
_NORMS = ("changed", "squares")
"""Kernels that find norms."""
_MOVED_ITEMSIZE = 12
"""Bytes that a single operation moves per element: two float32 read, one written."""
_FUSED_SHARE = 0.25
"""Of the rate of copying, what a fused kernel reaches, which computes meanwhile. An estimate, on the safe side."""
_TERM_BYTES = 4
"""What could be moved meanwhile for each term of a product, whose factors are in caches. An estimate, on the safe
side: a device that moves 4 TB/s has cores for some 16 million million terms a second, of which this is a
sixteenth."""
_NUMBER_BYTES = 8
"""Of a total, or of a number of a row."""


@dataclass(frozen=True, slots=True)
class CoreLoad:
    """What cores compute."""

    values: int = 0
    """Values of inputs, once however often they are asked for."""
    changed: int = 0
    """Likewise, of tensors that adapters change."""
    terms: int = 0
    """Terms of products."""

    def __add__(self, other: CoreLoad) -> CoreLoad:
        """Return both together."""
        return CoreLoad(
            self.values + other.values, self.changed + other.changed, self.terms + other.terms
        )


@dataclass(frozen=True, slots=True)
class DeviceLoad:
    """What a device does for a tensor."""

    crossing: int
    """Bytes that cross the bus."""
    moved: float
    """Bytes that are moved in its memory, or could be while something else limits."""
    sorted: int
    """Values that are sorted."""
    operations: int
    """Operations that it is asked for."""
    kernels: frozenset[tuple[Hashable, int]]
    """What tells the kernels that it must have compiled from others, and the products that are written out in each."""


def load_cores(plan: MergePlan, programs: Programs, task: TensorTask) -> CoreLoad:
    """Return what a merged tensor takes of cores: products anew for every round, and for norms."""
    values = task.numel * count_sources(task)
    if not task.changes:
        return CoreLoad(values)
    passes = len(_rounds_of(plan, programs, task)) + 1
    terms = passes * sum(count_terms(task, change) for change in task.changes)
    return CoreLoad(changed=values, terms=terms) + _load_norms(task, task.changes)


def load_cores_beside(device: DeviceResources, task: TensorTask) -> CoreLoad:
    """Return what a tensor that is merged on a device takes of cores: norms that are not found there."""
    left = (each for each in task.changes if not _has_norms_there(device, each))
    return _load_norms(task, left)


def _load_norms(task: TensorTask, changes: Iterable[Change]) -> CoreLoad:
    ranks = [each.rank for each in changes if each.kind is ChangeKind.NORMED]
    return CoreLoad(changed=task.numel * len(ranks), terms=task.numel * sum(ranks))


def count_sources(task: TensorTask) -> int:
    """Return the models that a tensor is computed from: those that hold it, or change it."""
    stored = {model for model, entry in enumerate(task.inputs) if entry is not None}
    return len(stored | {change.model for change in task.changes})


def count_terms(task: TensorTask, change: Change) -> int:
    """Return the terms of a product that a core adds to a tensor, or to a part of it."""
    begin, end = change.window or (0, task.numel)
    return (end - begin) * change.rank


def load_device(
    plan: MergePlan, shape: StepShape, programs: Programs, task: TensorTask, *, fused: bool
) -> DeviceLoad:
    """Return what a tensor takes of the device that merges it.

    Args:
        plan: A plan for a device.
        shape: Its steps.
        programs: What is done with the tensor.
        task: The tensor.
        fused: Whether kernels can be compiled there.
    """
    assert plan.device is not None  # noqa: S101 - the caller's matter
    passes = _Passes.of(plan, programs, task)
    by_kernel = fused and is_fused(task)
    norms = [each for each in task.changes if _has_norms_there(plan.device, each)]
    stored = sum(entry.dtype.itemsize for entry in task.inputs if entry is not None)
    loads = [_load_of(each, stored, by_kernel=by_kernel) for each in passes.all]
    moved = task.made_dtype.itemsize + sum(each for each, _ in loads)
    moved += len(norms) * _MOVED_ITEMSIZE
    # A kernel goes through all elements, wherever a product is added.
    terms = len(loads) * sum(change.rank for change in task.changes)
    terms += sum(change.rank for change in norms)
    steps = -(-task.numel // plan.device.step_numel)
    return DeviceLoad(
        crossing=_crossing_bytes(plan, shape, task, passes) + _norm_bytes(task, norms),
        moved=task.numel * (moved + terms * _TERM_BYTES),
        sorted=task.numel * sum(each.ranked for each in passes.ranking),
        operations=steps * sum(count for _, count in loads),
        kernels=frozenset(_kernels_of(passes, task, norms=bool(norms)) if by_kernel else ()),
    )


@dataclass(frozen=True, slots=True)
class _Passes:
    """What is done with all values of a tensor."""

    through: tuple[Program, ...]
    """Each time that the inputs go through: rounds, of rows too, and the merge."""
    row_numbers: int
    """Numbers of each row that are known meanwhile."""
    ranking: tuple[Program, ...]
    """Meanwhile: what is ranked within rows."""

    @classmethod
    def of(cls, plan: MergePlan, programs: Programs, task: TensorTask) -> _Passes:
        """Return what is done with a tensor, about whose rows is asked anew in every round."""
        through: list[Program] = []
        ranking: list[Program] = []
        for each in (*_rounds_of(plan, programs, task), programs.merge):
            through += (*programs.row_rounds, each)
            ranking += () if programs.row_ranks is None else (programs.row_ranks,)
        return cls(tuple(through), programs.row_numbers, tuple(ranking))

    @property
    def all(self) -> tuple[Program, ...]:
        """Every program, as often as it is run."""
        return (*self.through, *self.ranking)


def _rounds_of(plan: MergePlan, programs: Programs, task: TensorTask) -> Sequence[Program]:
    """Return the rounds in which a tensor is measured."""
    if programs.rounds and (plan.model_scope or asks(programs, task.numel)):
        return programs.rounds
    return ()


def _has_norms_there(device: DeviceResources, change: Change) -> bool:
    """Return whether the norms of a change are found on a device that merges its tensor."""
    return device.norm_benches > 0 and has_norms_for_device(change)


def _norm_bytes(task: TensorTask, norms: Iterable[Change]) -> int:
    """Return what crosses the bus for norms: the tensor, for each of them."""
    stored = (changed_input(task, each, in_turn=False).dtype.itemsize for each in norms)
    return task.numel * sum(stored)


def _kernels_of(
    passes: _Passes, task: TensorTask, *, norms: bool
) -> Iterator[tuple[Hashable, int]]:
    """Yield what tells kernels apart, and the products in each.

    That is steps, stored types and kinds of changes, for numbers are not compiled.
    """
    stored = tuple(None if entry is None else entry.dtype for entry in task.inputs)
    changes = tuple((change.model, change.product_kind) for change in task.changes)
    for each in passes.all:
        yield (each.steps, stored, task.made_dtype, changes), len(changes)
        yield from ((("total", op), 0) for op in each.totals)
    if any(each.ranked for each in passes.through):
        yield from ((name, 0) for name in _RANKING)
    if passes.ranking:
        yield "ranks", 0
    if norms:
        yield from ((name, 0) for name in _NORMS)


def _crossing_bytes(plan: MergePlan, shape: StepShape, task: TensorTask, passes: _Passes) -> int:
    """Return what crosses the bus: inputs, factors for each worker, numbers of rows, and the result."""
    stored = sum(entry.dtype.itemsize for entry in task.inputs if entry is not None)
    inputs = (
        _count_crossings(plan, shape, task, len(passes.through)) * stored + task.made_dtype.itemsize
    )
    chunks = -(-task.numel // shape.chunk_numel)
    factors = min(chunks, plan.resources.workers) * factor_bytes(task)
    rows = task.numel // task.row if task.row else 0
    numbers = sum(len(each.totals) + passes.row_numbers for each in passes.through)
    return task.numel * inputs + factors + rows * numbers * _NUMBER_BYTES


def _count_crossings(plan: MergePlan, shape: StepShape, task: TensorTask, passes: int) -> int:
    """Return how often the inputs of a tensor cross the bus: once, if all of them stay there until the merge.

    Those of a sweep over the whole model are let go before the next one begins.
    """
    if plan.device is None or plan.model_scope:
        return passes
    kept = plan.device.kept_pieces * shape.chunk_numel
    return 1 if task.numel <= kept else passes


def _load_of(program: Program, stored: int, *, by_kernel: bool) -> tuple[float, int]:
    """Return the bytes of device memory that a program moves per element, and its operations per step.

    Args:
        program: A round, or the merge.
        stored: Bytes per element of all inputs.
        by_kernel: Whether it is one kernel; else every step is an operation of its own.
    """
    sinks = program.ranked + len(program.totals)
    if by_kernel:
        sinks += program.ranked * _RANKING_KERNELS
        return stored / _FUSED_SHARE + sinks * _MOVED_ITEMSIZE, 1 + sinks
    single = sum(_operations(program)) + program.ranked * _RANKING_OPERATIONS + sinks
    return stored + single * _MOVED_ITEMSIZE, single


def _operations(program: Program) -> Iterator[int]:
    for step in program.steps:
        yield _RANDOM_OPERATIONS if step.op is Op.KEEP_RANDOM else 1
