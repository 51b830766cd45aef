"""How fast the CPU computes a plan's own programs, and how fast its inputs come.

Reading: some requests spread over all files, as they lie on the disk or in the page cache, so that a model that
is half in memory has a rate between. Computing: what is asked of, and made of, two blocks of numbers drawn at
random, by the very stage that merges. What a large tensor takes once, a sample and the choice of a rank among
the few values that were collected, is left out, for of its billions of values it is nothing.

Memory: :data:`_THREADS` requests of 4 MiB; then what is drawn (:mod:`~streammerge.probing.drawing`), and what
a worker has.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.adapters.onto_base.deltas import WORK_NUMEL, Delta
from streammerge.adapters.onto_base.products import PlainProduct
from streammerge.assignment.types import Action
from streammerge.checkpoint.types import ShardFile
from streammerge.dtypes import DType
from streammerge.engine.compiled.opening import open_cpu_stage
from streammerge.engine.device import DeviceStage
from streammerge.engine.pieces import PieceInMemory, Stored
from streammerge.engine.resident import measure, sample_pieces
from streammerge.engine.scopes import ScopeStatistics
from streammerge.errors import StreamMergeError
from streammerge.floats import KINDS
from streammerge.lazily import torch
from streammerge.machine import count_cores
from streammerge.methods.base import MergeMethod
from streammerge.methods.programs import Programs
from streammerge.native.library import load_kernels
from streammerge.plan.budgeting import values_limit
from streammerge.plan.estimating import Rates
from streammerge.plan.kernels import takes_torch
from streammerge.plan.loads import count_sources, count_terms
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import MergePlan, TensorTask
from streammerge.probing.drawing import DRAWN_NUMEL, draw_piece
from streammerge.statistics import BLOCK, count_blocks
from streammerge.statistics.rounds import NOTHING, Found
from streammerge.units import MIB

_REQUEST = 4 * MIB
_REQUESTS = 32
"""128 MiB of a fast disk, or of the page cache, in some 50 ms; a slow disk ends earlier."""
_READING_SECONDS = 0.2
_THREADS = 4
"""Requests at once; a merge has as many."""
_MOST_WRITTEN = 2e9
"""Bytes per second. Where the output goes is not known when a merge is planned, so it is taken to be written as
fast as inputs are read, which may come from memory, but no faster than common disks write."""
_COMPUTING_SECONDS = 0.05
"""For the repetitions, of which the fastest counts."""
_SAMPLED_SHARE = 8
"""A large tensor's values are ranked by way of a sample and a narrow band: a search that may collect an eighth of
the trial's takes that way, one that may collect all would not."""


def measure_host(plan: MergePlan, method: MergeMethod) -> Rates | str:
    """Return the rates of this machine for a plan, or why they cannot be had.

    Args:
        plan: A plan for the CPU, whose inputs are files.
        method: Its method.
    """
    read = measure_reading(plan.files)
    if read is None:
        return "the inputs cannot be read to see how fast they come"
    computing = measure_computing(plan, method)
    if isinstance(computing, str):
        return computing
    write = min(read, _MOST_WRITTEN)
    cores = count_cores()
    return Rates(read, write, computing.value, cores, computing.changed, computing.term)


def measure_reading(files: Sequence[ShardFile]) -> float | None:
    """Return the bytes per second that files give where they are; None if they give none."""
    there = [file for file in files if file.nbytes]
    everything = sum(file.nbytes for file in there)
    count = min(_REQUESTS, -(-everything // _REQUEST))
    places = []
    begin, files_left = 0, iter(there)
    file = next(files_left, None)
    for index in range(count):
        at = index * everything // count
        while file is not None and at >= begin + file.nbytes:
            begin += file.nbytes
            file = next(files_left, None)
        if file is not None:
            places.append((file.path, at - begin))
    started = perf_counter()

    def read(place: tuple[Path, int]) -> int:
        if perf_counter() - started > _READING_SECONDS:
            return 0
        with place[0].open("rb", buffering=0) as stream:
            stream.seek(place[1])
            return len(stream.read(_REQUEST))

    # Those that come first decide where a disk is slow: they must not all be of one model.
    spread = [places[index::_THREADS] for index in range(_THREADS)]
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            nbytes = sum(pool.map(read, [place for some in spread for place in some]))
    except OSError:
        return None
    return nbytes / max(perf_counter() - started, 1e-9) if nbytes else None


@dataclass(frozen=True, slots=True)
class CoreSeconds:
    """How long one core takes; 0 for what a plan has not."""

    value: float = 0.0
    """For a value of an input, with all that is asked of it and its merge."""
    changed: float = 0.0
    """Likewise of a tensor that adapters change, beside the products of their factors."""
    term: float = 0.0
    """For a term of such a product."""

    def joined(self, other: CoreSeconds) -> CoreSeconds:
        """Return what is known of either."""
        return CoreSeconds(
            self.value + other.value, self.changed + other.changed, self.term + other.term
        )


def measure_computing(plan: MergePlan, method: MergeMethod) -> CoreSeconds | str:
    """Return how long a core takes, or why that cannot be had.

    Tried are the largest tensor of those that adapters change, and of the others, each of the setting that
    most values are merged with.
    """
    merged = [task for task in plan.tasks if task.action is Action.MERGE and task.numel]
    found = CoreSeconds()
    try:
        with _on_one_core(plan):
            for changed in (False, True):
                among = [task for task in merged if bool(task.changes) is changed]
                if not among:
                    continue
                task = _choose_task(among)
                if (why := _why_not_tried(task)) is not None:
                    return why
                found = found.joined(_try(plan, method, task))
    # Of torch's, too: an estimate is no reason to end.
    except (StreamMergeError, RuntimeError) as error:
        return f"a moment of its work on the cpu failed ({error})"
    return found


@contextmanager
def _on_one_core(plan: MergePlan) -> Iterator[None]:
    """Let torch, if it is needed, compute as it does for a worker: on one thread, with nothing recorded."""
    if not takes_torch(plan):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


def _why_not_tried(task: TensorTask) -> str | None:
    kinds = {entry.dtype for entry in task.inputs if entry is not None} | {task.made_dtype}
    if others := sorted(str(kind) for kind in kinds - {*KINDS, DType.BF16}):
        return f"how long values stored as {', '.join(others)} take is not tried"
    if task.row > DRAWN_NUMEL:
        return f"how long rows of {task.row:,} elements take is not tried"
    return None


def _try(plan: MergePlan, method: MergeMethod, task: TensorTask) -> CoreSeconds:
    """Return how long a core takes for a small tensor in the place of a large one."""
    trial = _Trial.of(plan, method, task)
    # Memory that is touched for the first time takes longer than the arithmetic.
    trial.run()
    seconds = _fastest(trial.run)
    small = trial.piece.first.task
    values = small.numel * count_sources(small)
    if not small.changes:
        return CoreSeconds(value=seconds / values)
    terms = sum(count_terms(small, change) for change in small.changes)
    term = _fastest(_Products.of(trial.piece, plan.compute_dtype).run) / terms
    # Products are computed anew for every round.
    rest = seconds - (len(trial.programs.rounds) + 1) * terms * term
    return CoreSeconds(changed=max(rest, 0.0) / values, term=term)


def _choose_task(among: Sequence[TensorTask]) -> TensorTask:
    values: dict[int, int] = {}
    for task in among:
        values[task.setting] = values.get(task.setting, 0) + task.numel
    setting = max(values, key=values.__getitem__)
    return max((task for task in among if task.setting == setting), key=lambda task: task.numel)


@dataclass(frozen=True, slots=True)
class _Trial:
    """A method at work on a small tensor in memory."""

    stage: DeviceStage
    """That of a worker."""
    programs: Programs
    """What is done."""
    compute_dtype: DType
    """F32 or F64."""
    piece: PieceInMemory
    """The tensor."""
    out: Stored
    """Receives the result."""
    limit: int
    """Most values that each search collects; all of them stand for a tensor that is as small."""

    @classmethod
    def of(cls, plan: MergePlan, method: MergeMethod, task: TensorTask) -> _Trial:
        """Prepare what is done to a tensor of a plan."""
        piece = draw_piece(task, plan.compute_dtype, by_torch=plan.needs_torch)
        small = piece.first.task
        searched_whole = values_limit(task.numel) >= task.numel
        memory = np.empty(small.numel * small.made_dtype.itemsize, np.uint8)
        return cls(
            open_cpu_stage(replace(plan, tasks=(small,)), method),
            programs_of_plan(plan, method)[task.setting],
            plan.compute_dtype,
            piece,
            Stored(memory, small.made_dtype),
            small.numel if searched_whole else small.numel // _SAMPLED_SHARE,
        )

    def run(self) -> float:
        """Find all that the method asks, and merge; return the seconds that count."""
        found, seconds = self._find()
        began = perf_counter()
        self.stage.apply(self.piece, [found], self.out)
        return seconds + perf_counter() - began

    def _find(self) -> tuple[Found, float]:
        if not self.programs.rounds:
            return NOTHING, 0.0
        began, sweeps = perf_counter(), 0.0
        statistics = ScopeStatistics(
            self.programs,
            numel=self.piece.numel,
            blocks=count_blocks(self.piece.numel),
            compute_dtype=self.compute_dtype,
            limit=self.limit,
        )
        while statistics.found is None:
            sample_pieces(self.stage, statistics, [self.piece])
            sweep = perf_counter()
            measure(self.stage, statistics, self.piece)
            sweeps += perf_counter() - sweep
            statistics.conclude()
        small = self.limit == self.piece.numel
        return statistics.found, perf_counter() - began if small else sweeps


@dataclass(frozen=True, slots=True)
class _Products:
    """What adapters add to a small tensor, and nothing else."""

    deltas: tuple[Delta | PlainProduct, ...]
    """What is added."""
    out: NDArray[Any]
    """``[numel]``, float32 or float64; receives it."""

    @classmethod
    def of(cls, piece: PieceInMemory, dtype: DType) -> _Products:
        """Prepare what is added to a piece, in the compute dtype."""
        deltas = tuple(each for some in piece.deltas for each in some)
        kind = np.float32 if dtype is DType.F32 else np.float64
        return cls(deltas, np.empty(piece.numel, kind))

    def run(self) -> float:
        """Compute all of it; return the seconds."""
        began = perf_counter()
        for delta in self.deltas:
            if isinstance(delta, Delta):
                self._fill(delta)
            else:
                self._compute(delta)
        return perf_counter() - began

    def _fill(self, delta: Delta) -> None:
        out = torch.from_numpy(self.out)
        work = torch.empty(WORK_NUMEL, dtype=out.dtype)
        for begin in range(0, self.out.size, BLOCK):
            delta.fill(out[begin : begin + BLOCK], begin, work)

    def _compute(self, product: PlainProduct) -> None:
        kernels = load_kernels()
        assert kernels is not None  # noqa: S101 - without them plans need torch
        call = product.call(self.out, adds=False)
        kernels.change_range(ctypes.addressof(call), start=0, numel=self.out.size)


def _fastest(work: Callable[[], float]) -> float:
    """Return the least seconds of some repetitions: whatever else runs here only adds to them."""
    fastest = float("inf")
    begin = perf_counter()
    while perf_counter() - begin < _COMPUTING_SECONDS:
        fastest = min(fastest, work())
    return fastest
