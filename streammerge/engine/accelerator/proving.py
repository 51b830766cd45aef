"""A device shows that it computes what the CPU does, before a merge is trusted to it.

That fused kernels have the CPU's bits is tested, and rests on what compilers, drivers and devices do with
them: any may be newer than the tests. So what a plan has its devices do is done once on a tensor of two
blocks, drawn, with ties and zeros, by the device and by the CPU, for every setting and every set of stored
types: what is found about it, and each bit of the result, must be the same.

Memory: :func:`~streammerge.plan.devices.trial_bytes` page-locked, a ring for steps of a block, and a
stage of the CPU, which are all given back before the merge takes its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streammerge.adapters.onto_base.changes import Change
from streammerge.adapters.onto_base.deltas import WORK_NUMEL, Delta
from streammerge.adapters.onto_base.norms import rounded_roots
from streammerge.engine.accelerator.backend import Backend
from streammerge.engine.accelerator.keeping import KeptPieces
from streammerge.engine.accelerator.norms import NormBench
from streammerge.engine.accelerator.stage import AcceleratorStage
from streammerge.engine.compiled.opening import open_cpu_stage
from streammerge.engine.device import DeviceStage
from streammerge.engine.factors import NormWork
from streammerge.engine.pieces import Part, PieceInMemory, Stored
from streammerge.engine.resident import measure, sample_pieces
from streammerge.engine.scopes import ScopeStatistics
from streammerge.engine.small import by_model, delta_of, draw_factors, shrink_task
from streammerge.errors import DeviceError, printable
from streammerge.floats import narrow, widen
from streammerge.lazily import torch
from streammerge.methods.base import MergeMethod
from streammerge.methods.programs import Programs
from streammerge.plan.device_norms import has_norms_for_device, shape_norms
from streammerge.plan.devices import TRIAL_NUMEL, runs_on_device
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import DeviceResources, MergePlan, TensorTask
from streammerge.statistics import BLOCK, count_blocks
from streammerge.statistics.rounds import NOTHING, Found
from streammerge.tiles.program import Op

if TYPE_CHECKING:
    from torch import Tensor

_GRID = 2.0**-6
"""Values are multiples of it, so that many magnitudes are equal."""


def prove(plan: MergePlan, method: MergeMethod, backend: Backend) -> None:
    """Have a device do what a plan has for it, beside the CPU; the calling thread is on the device.

    Raises:
        DeviceError: They do not come to the same.
    """
    assert plan.device is not None  # noqa: S101 - it names the device
    programs = programs_of_plan(plan, method)
    kinds: dict[object, TensorTask] = {}
    for task in plan.tasks:
        if runs_on_device(
            task,
            programs,
            plan.settings,
            fused=plan.device.fused,
            compute_itemsize=plan.compute_dtype.itemsize,
        ):
            stored = tuple(entry and entry.dtype for entry in task.inputs)
            # Rows of another length may be ranked by another kernel.
            changes = tuple((change.model, change.product_kind) for change in task.changes)
            kind = task.setting, stored, task.made_dtype, changes, task.row
            kinds.setdefault(kind, task)
    for task in kinds.values():
        if plan.device.fused or not _adds_up(programs[task.setting]):
            _Trial(plan, method, task, backend).run()


def _adds_up(programs: Programs) -> bool:
    """Return whether totals are asked for, which single operations of a device add in another order."""
    return any(not {Op.SUM, Op.DOT}.isdisjoint(each.totals) for each in programs.rounds)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a stage comes to."""

    found: Found
    """What it finds about the tensor."""
    made: NDArray[np.uint8]
    """The result, as it is stored."""


class _Trial:
    """One tensor, drawn, on both."""

    def __init__(
        self, plan: MergePlan, method: MergeMethod, task: TensorTask, backend: Backend
    ) -> None:
        """Draw it."""
        assert plan.device is not None  # noqa: S101 - the caller looked
        self._task = shrink_task(task, TRIAL_NUMEL)
        self._plan = replace(plan, tasks=(self._task,))
        self._method = method
        self._backend = backend
        self._resources = replace(plan.device, step_numel=BLOCK, kept_pieces=0)
        self._programs = programs_of_plan(plan, method)[task.setting]
        self._piece = self._draw()

    def run(self) -> None:
        """Compute it on both, and compare."""
        expected = self._compute(open_cpu_stage(self._plan, self._method))
        stage = self._open(self._resources)
        try:
            found = self._compute(stage)
        finally:
            stage.close()
        if found.found != expected.found:
            raise self._refusal(f"found {found.found}, and the CPU {expected.found}")
        if not np.array_equal(found.made, expected.made):
            raise self._refusal(self._difference(found.made, expected.made))
        if self._resources.norm_benches:
            self._try_norms()

    def _try_norms(self) -> None:
        """Have norms found on both, and compare."""
        shape = shape_norms([self._task])
        bench = NormBench(self._backend, shape)
        taken = {model: iter(deltas) for model, deltas in enumerate(self._piece.deltas)}
        try:
            for change in self._task.changes:
                delta = next(taken[change.model])
                if has_norms_for_device(change):
                    self._compare_norms(bench, change, delta)
        finally:
            bench.abandon()

    def _compare_norms(self, bench: NormBench, change: Change, delta: Delta) -> None:
        product = delta.product()
        stored = self._piece.inputs[change.model] or self._piece.inputs[0]
        assert product is not None  # noqa: S101 - or the tensor would not be here
        assert stored is not None  # noqa: S101 - it is what the change is made to
        size, columns = stored.dtype.itemsize, change.matrix[1]

        def read(start: int, numel: int, memory: NDArray[np.uint8]) -> None:
            memory[:] = stored.memory[start * size : (start + numel) * size]

        def read_rows(begin: int, end: int) -> Tensor:
            own = stored.memory[begin * columns * size : end * columns * size]
            return torch.from_numpy(widen(own, stored.dtype).astype(np.float32))

        work = NormWork(product, stored.dtype, read, along_rows=change.along_rows)
        found = rounded_roots(bench.square(work), torch.float32)
        expected = delta.norms(read_rows, torch.empty(WORK_NUMEL))
        if not torch.equal(found, expected):
            first = int((found != expected).nonzero()[0])
            norms = (
                f"{float(found[first])!r} of norm {first:,}, and the CPU {float(expected[first])!r}"
            )
            raise self._refusal(f"made {norms}")

    def _open(self, resources: DeviceResources) -> AcceleratorStage:
        kept = KeptPieces(self._backend, 0, 0)
        return AcceleratorStage(self._plan, self._method, resources, self._backend, kept)

    def _compute(self, stage: DeviceStage) -> _Outcome:
        found = self._find(stage)
        dtype = self._task.made_dtype
        nbytes = self._task.numel * dtype.itemsize
        out = Stored(self._backend.pin(nbytes)[:nbytes], dtype)
        stage.apply(self._piece, [found], out)
        return _Outcome(found, out.memory)

    def _find(self, stage: DeviceStage) -> Found:
        if not self._programs.rounds:
            return NOTHING
        statistics = ScopeStatistics(
            self._programs,
            numel=self._task.numel,
            blocks=count_blocks(self._task.numel),
            compute_dtype=self._plan.compute_dtype,
            # Some are collected, so that both ways of a search are tried.
            limit=self._task.numel // 8,
        )
        while statistics.found is None:
            sample_pieces(stage, statistics, [self._piece])
            measure(stage, statistics, self._piece)
            statistics.conclude()
        return statistics.found

    def _draw(self) -> PieceInMemory:
        task, generator = self._task, np.random.default_rng(0)
        inputs: list[Stored | None] = []
        for entry in task.inputs:
            if entry is None:
                inputs.append(None)
                continue
            steps = np.rint(generator.standard_normal(task.numel) * 8)
            values = narrow(steps * _GRID, entry.dtype)
            memory = self._backend.pin(values.nbytes)[: values.nbytes]
            memory[:] = values
            inputs.append(Stored(memory, entry.dtype))
        part = Part(task, 0, 0, task.numel)
        drawn = (delta_of(each, draw_factors(each, generator)) for each in task.changes)
        deltas = by_model(task.changes, len(self._plan.models), drawn)
        return PieceInMemory((part,), tuple(inputs), deltas)

    def _difference(self, found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> str:
        size = self._task.made_dtype.itemsize
        first = int(np.flatnonzero((found != expected).reshape(-1, size).any(axis=1))[0])
        mine, plain = (
            float(widen(each[first * size : (first + 1) * size], self._task.made_dtype)[0])
            for each in (found, expected)
        )
        return f"made {mine!r} of element {first:,}, and the CPU {plain!r}"

    def _refusal(self, difference: str) -> DeviceError:
        return DeviceError(
            f"{self._backend.name} does not compute what the CPU does: in a trial of {self._method.name}, with "
            f"the types of {printable(self._task.name)}, it {difference}; use --device cpu, and report it "
            "with what `streammerge doctor` says"
        )
