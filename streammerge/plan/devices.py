"""How much memory of an accelerator a job takes, and how its chunks are cut there.

A chunk goes through a device in steps of whole blocks, in lanes that take turns: while one step is
computed, the next one is copied in and the last one out. The parts, in bytes, for each worker:

    lanes       LANES · step · (inputs · widest input + widest output)
    rows        (registers of the programs, base, magnitudes) · step in the compute dtype
    temporary   what single operations need beside that, per element of a step
    answers     per ranked value: what is collected, a histogram, counts per block; totals per block
    constants   numbers of a piece, of its questions too, and the factors of one tensor's adapters, for
                fused kernels
    notes       largest magnitudes per step, to tell NaN, infinity and overflows

for each reader that finds norms there a bench (:mod:`~streammerge.plan.device_norms`); and once for each
device the inputs of chunks that stay there between measuring and merging, as many as
there is room for; the allocator's slack; and what one decomposition takes
(:mod:`~streammerge.plan.device_matrices`). The driver's own memory, a few hundred MiB that it
takes before a first kernel runs, is not in it.

Which tensors go there is decided by the tensor alone, never by how it is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from streammerge.assignment.types import Action, Setting
from streammerge.dtypes import DType
from streammerge.errors import MemoryBudgetError
from streammerge.methods.base import MergeMethod
from streammerge.methods.programs import Counts, Programs
from streammerge.plan.budgeting import LARGEST_SLOT, Demand, values_limit
from streammerge.plan.chunking import widest_input
from streammerge.plan.demanding import count_plain_rows
from streammerge.plan.device_matrices import shape_matrices, told_matrix, with_matrices
from streammerge.plan.device_norms import NormsShape, shape_norms
from streammerge.plan.device_products import factor_bytes, has_products_for_device
from streammerge.plan.device_rows import (
    count_rows_before_ranks,
    count_rows_of,
    has_rows_for_device,
    sorting_bytes,
)
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import DeviceResources, MergePlan, TensorTask
from streammerge.statistics import BLOCK, count_blocks
from streammerge.statistics.in_tensors import ASKED, COUNTS
from streammerge.statistics.magnitude import BINS
from streammerge.tiles.fusing import Layout, count_sink_rows
from streammerge.tiles.program import FUNCTIONS, Op, Program
from streammerge.units import MIB, format_budget, format_size

LANES = 2
"""One is computed while the other is copied. The workers of a device add further ones."""
_STAGED_BYTES = 2 * MIB
"""What of the factors of a tensor is page-locked at once: a multiple of 4."""
KEPT_ALIGNMENT = 256
"""Where inputs that stay on a device begin, in bytes: those of several lie side by side."""
_TEMPORARY_BYTES = 56
"""Per element of a step: a random mask, or the places of collected magnitudes, at their peak."""
_SORT_BYTES = 64 * BLOCK
"""For one block that is sorted into a histogram: keys, indices, twice each, and the sort's own."""
_SLACK_BYTES = 96 * MIB
"""Requests of the allocator are rounded up to 2 and 20 MiB. An estimate, see docs/design/devices.md."""
_LARGEST_STEP = 16 * BLOCK
"""4 million elements: an operation on them takes several times longer than to ask for it."""
FUSED_DTYPES = frozenset({DType.F32, DType.BF16, DType.F16, DType.F64})
"""Types that fused kernels read and write."""
TRIAL_NUMEL = BLOCK + 4096
"""Elements of the tensor by which a device shows what it computes: two blocks, the second one short."""
HOST_GROWTH_BYTES = 192 * MIB
"""What a device's kernels and streams take of the process once they are used. An estimate."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a worker holds on its device; all memory there follows from it."""

    models: int
    """Models that are copied in."""
    input_itemsize: int
    """Widest element among them, in bytes."""
    output_itemsize: int
    """Widest element of the result, in bytes."""
    rows: int
    """Rows in the compute dtype."""
    compute_itemsize: int
    """Bytes per element there."""
    searches: int
    """Values that are ranked on the device; 0 for none."""
    totals: int
    """Totals per block."""
    collected: int
    """Most magnitudes collected per source and chunk."""
    chunk_numel: int
    """Elements in the largest chunk."""
    step_numel: int
    """Elements in a step; whole blocks."""
    ranks: int = 0
    """Ranks of a tensor."""
    constants: int = 0
    """Numbers that a piece brings along, of 8 bytes; 0 without fused kernels."""
    factor_bytes: int = 0
    """Factors of one tensor's adapters."""
    temporary_bytes: int = _TEMPORARY_BYTES
    """What single operations need, per element of a step."""
    row_totals: int = 0
    """Totals of the rows of a chunk."""
    row_numbers: int = 0
    """What is known of the rows of a chunk."""

    @property
    def steps(self) -> int:
        """Steps in the largest chunk."""
        return -(-self.chunk_numel // self.step_numel)

    @property
    def chunk_blocks(self) -> int:
        """Blocks in the largest chunk."""
        return count_blocks(self.chunk_numel)

    @property
    def input_bytes(self) -> int:
        """Bytes of one model in a lane."""
        return self.step_numel * self.input_itemsize

    @property
    def output_bytes(self) -> int:
        """Bytes of the result in a lane."""
        return self.step_numel * self.output_itemsize

    @property
    def piece_bytes(self) -> int:
        """Bytes of the inputs of the largest chunk, where they stay on the device."""
        nbytes = self.chunk_numel * self.input_itemsize
        return self.models * -(-nbytes // KEPT_ALIGNMENT) * KEPT_ALIGNMENT

    @property
    def notes(self) -> int:
        """Columns of notes per step: models and result."""
        return self.models + 1

    @property
    def device_bytes(self) -> int:
        """Bytes that one worker takes of its device."""
        lanes = LANES * (self.models * self.input_bytes + self.output_bytes)
        rows = self.rows * self.step_numel * self.compute_itemsize
        temporary = self.temporary_bytes * self.step_numel
        temporary += _SORT_BYTES if self.searches else 0
        notes = self.steps * self.notes * self.compute_itemsize
        borders = 4 * (BINS + 1) if self.searches else 0
        answers = self.searches * self._answer_bytes + self._total_bytes + self._row_bytes
        return lanes + rows + temporary + notes + borders + answers + self._brought_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of page-locked memory that one worker takes for what comes back."""
        notes = self.steps * self.notes * self.compute_itemsize
        # torch rounds page-locked memory up to powers of two.
        answers = self.searches * self._answer_bytes + self._total_bytes + self._row_bytes
        return 2 * (notes + answers + 8 * max(1, self.constants) + self.staged_bytes)

    @property
    def staged_bytes(self) -> int:
        """Bytes of page-locked memory through which factors are copied."""
        return max(4, min(self.factor_bytes, _STAGED_BYTES))

    @property
    def _brought_bytes(self) -> int:
        """Bytes of what comes with a piece, and of what is found of its ties."""
        return 8 * (max(1, self.constants) + max(1, self.ranks)) + max(4, self.factor_bytes)

    @property
    def _total_bytes(self) -> int:
        return 8 * max(1, self.totals * self.chunk_blocks)

    @property
    def _row_bytes(self) -> int:
        return 8 * (max(1, self.row_totals) + max(1, self.row_numbers))

    @property
    def _answer_bytes(self) -> int:
        counts = 8 * COUNTS * self.chunk_blocks
        return (self.collected + 1) * self.compute_itemsize + 8 * BINS + counts + 8


def runs_on_device(
    task: TensorTask,
    programs: Sequence[Programs],
    settings: Sequence[Setting],
    *,
    fused: bool = False,
    compute_itemsize: int = 4,
) -> bool:
    """Return whether a tensor is measured and merged on an accelerator, if there is one.

    A tensor of at most a block costs a core less time than it takes to ask a device for some thirty
    operations. What sees whole tensors together is the CPU's, and without fused kernels so are whole
    rows, roots, exponentials, logarithms and the products of adapters, whose bits torch's operations do
    not have. What is copied or converted has no arithmetic.

    Args:
        task: The tensor.
        programs: What the method does, for each of its settings.
        settings: These settings.
        fused: Whether kernels can be compiled there.
        compute_itemsize: Bytes per element that is computed with; in float64 whole rows and the products
            of adapters are the CPU's, whatever there is.
    """
    if task.action is not Action.MERGE or task.numel <= BLOCK:
        return False
    work, setting = programs[task.setting], settings[task.setting]
    rows = work.by_rows and fused and is_fused(task)
    if any(_has_steps_of_the_cpu(program, by_rows=rows) for program in work.all):
        return False
    if work.by_rows and not (rows and has_rows_for_device(task, work, compute_itemsize)):
        return False
    if setting.has_base and task.inputs[setting.models[0]] is None:
        return False
    if fused and is_fused(task):
        has_bits = not task.changes or compute_itemsize == DType.F32.itemsize
        return has_bits and has_products_for_device(task.changes)
    return not task.changes and not any(program.uses(*FUNCTIONS) for program in work.all)


def _tasks_there(
    tasks: Iterable[TensorTask],
    programs: Sequence[Programs],
    settings: Sequence[Setting],
    *,
    fused: bool,
    compute_itemsize: int,
) -> list[TensorTask]:
    """Return those that go to a device; see :func:`runs_on_device`."""
    return [
        task
        for task in tasks
        if runs_on_device(task, programs, settings, fused=fused, compute_itemsize=compute_itemsize)
    ]


def is_fused(task: TensorTask) -> bool:
    """Return whether fused kernels read and write a tensor, where there are any."""
    stored = {entry.dtype for entry in task.inputs if entry is not None}
    return {*stored, task.made_dtype} <= FUSED_DTYPES


def _has_steps_of_the_cpu(program: Program, *, by_rows: bool) -> bool:
    """Return whether a program has a step that no device does, or does with other bits."""
    if by_rows:
        return program.uses(Op.CHANGED)
    draws_by_row = any(step.op is Op.KEEP_RANDOM and step.b >= 0 for step in program.steps)
    return draws_by_row or program.uses(Op.COMPUTED, Op.CHANGED)


def shape_step(
    tasks: Iterable[TensorTask],
    *,
    slot_bytes: int,
    step_numel: int,
    compute_itemsize: int,
    searched_numel: int,
    programs: Sequence[Programs],
    settings: Sequence[Setting],
    fused: bool,
) -> StepShape | None:
    """Return what a worker needs on a device; None where no tensor goes there.

    Args:
        tasks: The plan's tensors.
        slot_bytes: Size of an input buffer, which limits chunks.
        step_numel: Most elements in a step.
        compute_itemsize: Bytes per element that is computed with.
        searched_numel: Elements in the largest scope of a statistic; 0 where none is needed.
        programs: What the method does, for each of its settings.
        settings: These settings.
        fused: Whether kernels can be compiled there.
    """
    there = _tasks_there(tasks, programs, settings, fused=fused, compute_itemsize=compute_itemsize)
    if not there:
        return None
    products = max(len(task.changes) for task in there)
    models = len(there[0].inputs)
    rows = max((count_rows_of(task, slot_bytes) for task in there if task.row), default=0)
    counts = reduce(Counts.joined, (each.counts for each in programs))
    # A tensor that fits a buffer is one chunk, whatever its last block has.
    largest = max(min(task.numel, slot_bytes // widest_input(task)) for task in there)
    return StepShape(
        models=models,
        input_itemsize=max(widest_input(task) for task in there),
        output_itemsize=max(task.made_dtype.itemsize for task in there),
        rows=max(count_plain_rows(programs, ()), _count_sink_rows(programs) if fused else 0),
        temporary_bytes=max(_TEMPORARY_BYTES, sorting_bytes(there, programs)),
        row_totals=rows * max(max(each.row_counts.totals, each.counts.totals) for each in programs),
        row_numbers=rows * max(each.row_numbers for each in programs),
        compute_itemsize=compute_itemsize,
        searches=counts.ranked,
        totals=counts.totals,
        collected=min(largest, values_limit(searched_numel)) if counts.ranked else 0,
        chunk_numel=largest,
        step_numel=min(step_numel, -(-largest // BLOCK) * BLOCK),
        ranks=max(sum(each.ranked for each in one.rounds) for one in programs),
        constants=_count_constants(programs, products) + ASKED * counts.ranked if fused else 0,
        factor_bytes=max(map(factor_bytes, there)),
    )


def _count_sink_rows(programs: Sequence[Programs]) -> int:
    """Return the most rows that fused kernels leave to those who count, or rank them once more."""
    asking = (each for one in programs for each in (*one.rounds, *one.row_rounds))
    ranking = (count_rows_before_ranks(one) + one.row_counts.ranked for one in programs)
    return max([0, *map(count_sink_rows, asking), *ranking])


def trial_bytes(shape: StepShape) -> int:
    """Return the page-locked bytes of a trial: inputs, and both results.

    torch rounds each up to a power of two, and keeps them.
    """
    return 2 * TRIAL_NUMEL * (shape.models * shape.input_itemsize + 2 * shape.output_itemsize)


def _count_constants(programs: Sequence[Programs], products: int) -> int:
    """Return the most constants of a piece: those of one program, and of all rounds."""
    return max(sum(Layout(each, products).size for each in one.all) for one in programs)


def add_devices(
    demand: Demand,
    tasks: Sequence[TensorTask],
    programs: Sequence[Programs],
    settings: Sequence[Setting],
    *,
    count: int,
    fused: bool,
) -> Demand:
    """Return a demand with what the use of ``count`` devices takes of the host."""
    shape = shape_step(
        tasks,
        slot_bytes=LARGEST_SLOT,
        step_numel=BLOCK,
        compute_itemsize=demand.compute_itemsize,
        searched_numel=demand.statistic_numel,
        programs=programs,
        settings=settings,
        fused=fused,
    )
    norms = _shape_norms(tasks, programs, settings, demand.compute_itemsize, fused=fused)
    demand = replace(
        demand,
        reader_bytes=demand.reader_bytes + norms.host_bytes,
        device_worker_bytes=0 if shape is None else shape.host_bytes,
        device_growth=count * HOST_GROWTH_BYTES + (0 if shape is None else trial_bytes(shape)),
    )
    return with_matrices(demand, tasks, programs, count=count)


def plan_step(
    plan: MergePlan, method: MergeMethod, step_numel: int, *, fused: bool
) -> StepShape | None:
    """Return the shape of a plan's steps; see :func:`shape_step`."""
    merged = [task.numel for task in plan.tasks if task.action is Action.MERGE]
    scope = sum(merged) if plan.model_scope else max(merged, default=0)
    return shape_step(
        plan.tasks,
        slot_bytes=plan.resources.slot_bytes,
        step_numel=step_numel,
        compute_itemsize=plan.compute_dtype.itemsize,
        searched_numel=scope,
        programs=programs_of_plan(plan, method),
        settings=plan.settings,
        fused=fused,
    )


def norms_of_plan(plan: MergePlan, method: MergeMethod, *, fused: bool) -> NormsShape:
    """Return what a bench holds where the norms of a plan's tensors are found."""
    itemsize = plan.compute_dtype.itemsize
    return _shape_norms(
        plan.tasks, programs_of_plan(plan, method), plan.settings, itemsize, fused=fused
    )


def _shape_norms(
    tasks: Iterable[TensorTask],
    programs: Sequence[Programs],
    settings: Sequence[Setting],
    itemsize: int,
    *,
    fused: bool,
) -> NormsShape:
    there = _tasks_there(tasks, programs, settings, fused=fused, compute_itemsize=itemsize)
    return shape_norms(there)


def choose_device_resources(
    plan: MergePlan,
    method: MergeMethod,
    *,
    names: Sequence[str],
    budget: int | None,
    free: int,
    fused: bool,
) -> DeviceResources:
    """Cut chunks into steps as large as is useful within the memory of the devices.

    Args:
        plan: The plan, complete but for this.
        method: Its method.
        names: The devices.
        budget: Most bytes on each of them; None takes what is useful.
        free: Bytes that are free on the fullest of them.
        fused: Whether kernels can be compiled there.

    Raises:
        MemoryBudgetError: Not even steps of one block fit; names the smallest budget that does.
    """
    workers = -(-plan.resources.workers // len(names))
    allowed = free if budget is None else min(budget, free)
    matrices = shape_matrices(
        plan.tasks, programs_of_plan(plan, method), plan.compute_dtype.itemsize
    )
    least = _peak(plan_step(plan, method, BLOCK, fused=fused), workers) + matrices.nbytes
    if least > allowed:
        limit = (
            f"only {format_size(free)} are free there"
            if least > free
            else (f"--device-memory is {format_size(allowed)}")
        )
        raise MemoryBudgetError(
            f"{workers} worker(s) need at least {format_size(least)} of each of "
            f"{', '.join(names)}{told_matrix(matrices)}, and {limit}; give --device-memory {format_budget(least)} or more, "
            "fewer --workers, a smaller --memory, which makes chunks smaller, or --device cpu"
        )
    step_numel = BLOCK
    while step_numel < _LARGEST_STEP:
        shape = plan_step(plan, method, 2 * step_numel, fused=fused)
        # No step needs to be larger than half a chunk: the other half is copied meanwhile.
        if shape is None or shape.chunk_numel < 4 * step_numel:
            break
        if _peak(shape, workers) + matrices.nbytes > allowed:
            break
        step_numel *= 2
    shape = plan_step(plan, method, step_numel, fused=fused)
    peak = _peak(shape, workers) + matrices.nbytes
    norms = norms_of_plan(plan, method, fused=fused)
    benches = _count_benches(plan, norms, len(names), allowed - peak)
    peak += benches * norms.device_bytes
    kept = _count_kept(plan, shape, allowed - peak)
    return DeviceResources(
        tuple(names),
        step_numel=step_numel,
        peak=peak + (0 if shape is None else kept * shape.piece_bytes),
        budget=allowed,
        kept_pieces=kept,
        matrices=matrices.count,
        matrix_bytes=matrices.nbytes,
        norms=norms.changes if benches else 0,
        norm_benches=benches,
        fused=fused,
    )


def _count_benches(plan: MergePlan, norms: NormsShape, devices: int, room: int) -> int:
    """Return how many readers find norms on each device: no more than there are, and may be none."""
    if not norms.changes:
        return 0
    readers = -(-plan.resources.readers // devices)
    return max(0, min(readers, room // norms.device_bytes))


def _count_kept(plan: MergePlan, shape: StepShape | None, room: int) -> int:
    """Return how many chunks' inputs can stay on a device: no more than wait in the host's memory."""
    if shape is None or not (shape.searches or shape.totals or shape.row_totals):
        return 0
    return min(plan.resources.slots // shape.models, room // shape.piece_bytes)


def _peak(shape: StepShape | None, workers: int) -> int:
    return 0 if shape is None else workers * shape.device_bytes + _SLACK_BYTES
