"""Pieces measured and merged on a device, in the mathematics that the CPU's stage uses.

Every operation has one rounding, the CPU's. So have totals by fused kernels; by single operations these are
added up in an order of their own, which depends on nothing but the length of a block.

Memory: that of the ring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from streammerge.engine.accelerator.fused.opening import open_fused
from streammerge.engine.accelerator.keeping import KeptPieces
from streammerge.engine.accelerator.ring import Returned, Ring, Step
from streammerge.engine.accelerator.rows import RowComputing, RowsThere
from streammerge.engine.asking import Asking, BlockAnswer
from streammerge.engine.device import Applied
from streammerge.engine.finite import LARGEST
from streammerge.engine.pieces import PieceInMemory, Stored, torch_dtype
from streammerge.engine.plain import bind_numbers, checks_operands, count_kept_of
from streammerge.lazily import torch
from streammerge.methods.base import MergeMethod
from streammerge.methods.programs import Programs
from streammerge.plan.devices import is_fused
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import MergePlan
from streammerge.rng import stream_key
from streammerge.statistics import BLOCK, count_blocks
from streammerge.statistics.in_tensors import (
    COUNTS,
    counted_blocks,
    total_blocks_,
    values_inside,
)
from streammerge.statistics.magnitude import BINS, Bins, Counted, Question
from streammerge.statistics.rounds import Found
from streammerge.statistics.topk import TopK
from streammerge.statistics.trimming import mark_unseen_, trim_unseen_
from streammerge.tiles.interpreter import run_program
from streammerge.tiles.masks import draw_keep_mask
from streammerge.tiles.program import Op, Program

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.engine.accelerator.fused.running import FusedSteps


class Suspicion(Exception):  # noqa: N818 - no error yet: the CPU's stage finds out what it is
    """A value is not finite, or beyond the range of the result's type."""


class DeviceComputing:
    """Measures and merges the pieces of one worker on its device."""

    def __init__(
        self, plan: MergePlan, method: MergeMethod, ring: Ring, kept: KeptPieces, tile: int
    ) -> None:
        """Prepare to compute in a ring's memory.

        Args:
            plan: The plan.
            method: Its method.
            ring: The memory.
            kept: The pieces that the device keeps.
            tile: Elements per instance of a fused kernel; 0 for operations of torch.
        """
        self._kept = kept
        self._plan = plan
        self._programs = programs_of_plan(plan, method)
        self._ring = ring
        self._n_models = len(plan.models)
        self._tells = method.random or plan.model_scope
        self._fused = open_fused(plan, ring, tile) if tile else None
        self._rows = None if self._fused is None else RowComputing(ring, self._fused)

    def merge(self, piece: PieceInMemory, found: Found, out: Stored) -> Applied:
        """Merge a piece of one part; see :meth:`streammerge.engine.device.DeviceStage.apply`.

        Raises:
            Suspicion: A value is not finite or out of range, and the recipe forbids it.
        """
        ring = self._ring
        programs = self._programs[piece.first.task.setting]
        ring.run(ring.clear)
        result = torch.from_numpy(out.memory)
        if programs.by_rows:
            assert self._rows is not None  # noqa: S101 - or the piece would not be here
            merge_rows = partial(self._merge_rows, piece, programs.merge)
            kept = self._kept.find_room(piece) if programs.row_rounds else self._kept.find(piece)
            self._rows.merge(piece, programs, found, merge_rows, result, kept=kept)
        else:
            dtype = torch_dtype(piece.first.task.made_dtype)
            fused = self._begin_fused(piece, programs.merge, found, ())
            merge = partial(self._merge_step, piece, programs.merge, found, dtype, fused=fused)
            ring.stream(_tensors(piece), piece.numel, merge, result, self._kept.find(piece))
        checked = not self._plan.keep_non_finite
        counts = ring.counts.device.numel()
        self._fetch(piece, [(ring.counts, counts)], checked=checked)
        # Others may have its room now; where this ends with an error, its piece's end gives it back.
        self._kept.forget(piece)
        *counted, not_finite = ring.counts.host.tolist()
        of_each = counted[: count_kept_of(programs)]
        return Applied(not_finite, programs.kept(of_each) if self._tells else ())

    def measure(self, piece: PieceInMemory, asking: Asking) -> list[BlockAnswer]:
        """Answer questions; see :meth:`streammerge.engine.device.DeviceStage.measure`.

        What was collected lies in memory that the next call overwrites.

        Raises:
            Suspicion: A value is not finite, where a round has to look.
        """
        ring = self._ring
        programs = self._programs[piece.first.task.setting]
        program = programs.rounds[asking.round]
        if programs.by_rows:
            return self._measure_rows(piece, programs, asking)
        questions = asking.questions
        asked = [index for index, question in enumerate(questions) if question is not None]
        checked = checks_operands(self._plan, program)
        ring.run(ring.clear)
        fused = self._begin_fused(piece, program, asking.found, questions)
        measure = partial(self._measure_step, piece, program, asking, checked=checked, fused=fused)
        kept = self._kept.find_room(piece)
        ring.stream(_tensors(piece), piece.numel, measure, None, kept)
        blocks = count_blocks(piece.numel)
        totals = len(program.totals)
        self._fetch(
            piece,
            [(ring.counted[index], blocks * COUNTS) for index in asked]
            + [(ring.histograms[i], BINS) for i in asked if isinstance(questions[i], Bins)]
            + ([(ring.totals, blocks * ring.shape.totals)] if totals else []),
            checked=checked,
        )
        if kept is not None:
            kept.is_there = True
        sizes = [
            values_inside(question, ring.counted[index].host.numpy()[:blocks])
            for index, question in enumerate(questions)
        ]
        # More than there is room for is more than any search has room for: their number will do.
        wanted = [(i, n) for i, n in enumerate(sizes) if 0 < n <= ring.shape.collected]
        if wanted:
            ring.fetch(*((ring.values[index], count) for index, count in wanted))
        answers = [
            None if question is None else self._counted(index, question, piece.numel, sizes[index])
            for index, question in enumerate(questions)
        ]
        of_blocks = ring.totals.host.numpy()
        return [
            BlockAnswer(
                tuple(None if own is None else own[block] for own in answers),
                of_blocks[block, :totals].copy() if asking.totals else None,
            )
            for block in range(blocks)
        ]

    def _measure_rows(
        self, piece: PieceInMemory, programs: Programs, asking: Asking
    ) -> list[BlockAnswer]:
        assert self._rows is not None  # noqa: S101 - or the piece would not be here
        checked = checks_operands(self._plan, programs.rounds[asking.round])
        self._ring.run(self._ring.clear)
        kept = self._kept.find_room(piece)
        totals = self._rows.measure(piece, programs, asking, checked=checked, kept=kept)
        self._fetch(piece, [(self._ring.row_totals, totals.count)], checked=checked)
        if kept is not None:
            kept.is_there = True
        return totals.answers(asking)

    def _begin_fused(
        self,
        piece: PieceInMemory,
        program: Program,
        found: Found,
        questions: Sequence[Question | None],
    ) -> FusedSteps | None:
        """Return what runs fused kernels on a piece; None if they do not take it."""
        task = piece.first.task
        if self._fused is None or not is_fused(task):
            return None
        self._fused.begin(piece, self._programs[task.setting], program, found, questions)
        return self._fused

    def _counted(self, source: int, question: Question, numel: int, size: int) -> list[Counted]:
        ring = self._ring
        values = ring.values[source].host.numpy()
        if size > ring.shape.collected:
            values = np.broadcast_to(values[:1], (size,))
        counts = ring.counted[source].host.numpy()[: count_blocks(numel)]
        return counted_blocks(question, numel, counts, values, ring.histograms[source].host.numpy())

    def _fetch(
        self, piece: PieceInMemory, returned: list[tuple[Returned, int]], *, checked: bool
    ) -> None:
        """Fetch results, and the notes if they are to be looked at."""
        ring = self._ring
        if not checked:
            ring.fetch(*returned)
            return
        width = ring.shape.notes
        steps = -(-piece.numel // ring.shape.step_numel)
        ring.fetch(*returned, (ring.notes, steps * width))
        # A largest magnitude is NaN where any is.
        largest = ring.notes.host[: steps * width].view(steps, width).amax(dim=0).tolist()
        operands, merged = largest[: self._n_models], largest[self._n_models]
        limit = LARGEST[piece.first.task.made_dtype]
        if not (all(map(math.isfinite, operands)) and merged <= limit):
            raise Suspicion

    def _merge_step(
        self,
        piece: PieceInMemory,
        program: Program,
        found: Found,
        dtype: torch.dtype,
        step: Step,
        *,
        fused: FusedSteps | None,
    ) -> None:
        checked = not self._plan.keep_non_finite
        if not checked:
            _count_non_finite(step.inputs, self._ring.counts.device[-1])
        if fused is not None:
            fused.merge(program, step, checked=checked, count=self._tells)
            return
        merged = self._run(program, piece, step, found, checked=checked, count=self._tells)
        assert merged is not None  # noqa: S101 - a merge stores
        if checked:
            self.note(merged, step, self._n_models)
        step.out.view(dtype).copy_(merged)

    def _merge_rows(
        self, piece: PieceInMemory, program: Program, step: Step, rows: RowsThere
    ) -> None:
        """Merge a step of whole rows; only what is the piece's own is counted."""
        assert self._fused is not None  # noqa: S101 - or the piece would not be here
        checked = not self._plan.keep_non_finite
        if not checked:
            first = max(piece.before - step.begin, 0)
            last = piece.before + piece.numel - step.begin
            own = [None if each is None else each[first:last] for each in step.inputs]
            _count_non_finite(own, self._ring.counts.device[-1])
        count = self._tells and rows.are_own
        self._fused.merge(program, step, checked=checked, count=count, rows=rows)

    def _measure_step(
        self,
        piece: PieceInMemory,
        program: Program,
        asking: Asking,
        step: Step,
        *,
        checked: bool,
        fused: FusedSteps | None,
    ) -> None:
        sinks = _DeviceSinks(self._ring, asking, step, fused)
        if fused is not None:
            for each in fused.measure(program, step, checked=checked):
                if each.op is Op.RANK:
                    sinks.rank(each.index, each.a)
                else:
                    sinks.total(each.index, each.op, each.a, each.b)
            return
        self._run(program, piece, step, asking.found, checked=checked, sinks=sinks)

    def _run(
        self,
        program: Program,
        piece: PieceInMemory,
        step: Step,
        found: Found,
        *,
        checked: bool,
        count: bool = False,
        sinks: _DeviceSinks | None = None,
    ) -> Tensor | None:
        memory = self._ring.rows[:, : step.numel]
        reader = _StepReader(
            program,
            _Place(piece, step),
            found,
            plan=self._plan,
            base_row=memory[0],
            note=partial(self.note, step=step) if checked else None,
            kept=self._ring.counts.device if count else None,
        )
        return run_program(
            program,
            reader,
            numbers=bind_numbers(program, found),
            memory=memory[2:],
            row_numel=step.numel,
            sinks=sinks,
        )

    def note(self, row: Tensor, step: Step, column: int) -> None:
        """Note the largest magnitude, which is NaN or infinite if any value is."""
        magnitudes = torch.abs(row, out=self._ring.rows[1, : step.numel])
        notes = self._ring.notes.device.view(-1, self._ring.shape.notes)
        torch.amax(magnitudes, dim=0, out=notes[step.index, column])


@dataclass(frozen=True, slots=True)
class _DeviceSinks:
    """Takes what a program does not store; see :class:`streammerge.tiles.interpreter.Sinks`."""

    ring: Ring
    asking: Asking
    step: Step
    fused: FusedSteps | None = None

    def rank(self, index: int, row: Tensor) -> None:
        question = self.asking.questions[index]
        first = self.step.begin // BLOCK
        if question is None:
            return
        if self.fused is not None:
            self.fused.rank(index, question, row, first)
        else:
            self.ring.answers[index].add_(question, row, first)

    def total(self, index: int, op: Op, a: Tensor, b: Tensor | None) -> None:
        if not self.asking.totals:
            return
        first = self.step.begin // BLOCK
        column = self.ring.totals.device[first : first + count_blocks(a.numel()), index]
        if self.fused is not None and op in (Op.SUM, Op.DOT):
            self.fused.total(op, a, b, column)
        else:
            total_blocks_(op, a, b, column)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a step lies in its tensor."""

    piece: PieceInMemory
    step: Step

    @property
    def start(self) -> int:
        """Flat index of the first element; the first of a block."""
        return self.piece.first.start + self.step.begin

    def fates(self, top: TopK) -> Iterator[tuple[int, int, int]]:
        """Yield begin, end and first block of the parts of a step that keep their ties alike.

        All blocks before the cut-off block keep theirs, all behind it none.
        """
        first = self.piece.first.task.scope_block + self.start // BLOCK
        borders = [(top.cutoff_block - first + more) * BLOCK for more in (0, 1)]
        inner = sorted(border for border in borders if 0 < border < self.step.numel)
        for begin, end in pairwise([0, *inner, self.step.numel]):
            yield begin, end, first + begin // BLOCK


def _tensors(piece: PieceInMemory) -> list[Tensor | None]:
    return [None if stored is None else stored.tensor() for stored in piece.inputs]


def _count_non_finite(inputs: Sequence[Tensor | None], found: Tensor) -> None:
    """Add how many stored values, in all models, are NaN or infinite."""
    for stored in inputs:
        if stored is not None:
            wide = stored if stored.dtype == torch.float64 else stored.to(torch.float32)
            found.add_(torch.isfinite(wide).logical_not_().sum())


class _StepReader:
    """Reads one step on the device; see :class:`streammerge.tiles.interpreter.Models`."""

    def __init__(
        self,
        program: Program,
        place: _Place,
        found: Found,
        *,
        plan: MergePlan,
        base_row: Tensor,
        note: Callable[..., None] | None,
        kept: Tensor | None,
    ) -> None:
        self._program = program
        self._place = place
        self._found = found
        self._plan = plan
        setting = plan.settings[place.piece.first.task.setting]
        self._base_model = setting.models[0]
        self._sources = setting.sources
        self._base_row = base_row
        self._note = note
        self._kept = kept
        self._base_is_here = False

    def base(self, out: Tensor) -> None:
        out.copy_(self._base())

    def _base(self) -> Tensor:
        if not self._base_is_here:
            stored = self._place.step.inputs[self._base_model]
            assert stored is not None  # noqa: S101 - else the piece would not be here
            self._base_row.copy_(stored)
            self._base_is_here = True
            if self._note is not None:
                self._note(self._base_row, column=self._base_model)
        return self._base_row

    def source(self, source: int, out: Tensor) -> None:
        stored = self._place.step.inputs[self._sources[source]]
        # An adapter that leaves this tensor alone.
        out.copy_(self._base() if stored is None else stored)
        if self._note is not None:
            self._note(out, column=self._sources[source])

    def task_vector(self, source: int, out: Tensor) -> None:
        stored = self._place.step.inputs[self._sources[source]]
        base = self._base()
        if stored is None:
            out.zero_()
        else:
            out.copy_(stored).sub_(base)
        if self._note is not None:
            self._note(out, column=self._sources[source])

    def trim_(self, row: Tensor, trim: int) -> None:
        top = self._found.tops[self._program.trims[trim]]
        self._count_kept(row, trim, top)
        for begin, end, block in self._place.fates(top):
            trim_unseen_(row[begin:end], top, block)

    def mark_(self, row: Tensor, trim: int) -> None:
        top = self._found.tops[self._program.trims[trim]]
        for begin, end, block in self._place.fates(top):
            mark_unseen_(row[begin:end], top, block)
        if self._kept is not None:
            self._kept[trim].add_(row.sum(dtype=torch.float64).to(torch.int64))

    def _count_kept(self, row: Tensor, trim: int, top: TopK) -> None:
        """Add how many entries a trim keeps."""
        if self._kept is None:
            return
        kept = self._kept[trim]
        if top.greater == top.numel:
            kept.add_(row.numel())
            return
        for begin, end, block in self._place.fates(top):
            if begin == end:
                continue
            part = row[begin:end].abs()
            ties = top.ties_to_keep(block)
            # What is no number ranks above everything, so those below are counted.
            below = part < top.threshold if ties is None else part <= top.threshold
            kept.add_(part.numel() + (ties or 0)).sub_(below.sum())

    def drop_(self, row: Tensor, stream: int, probability: Tensor | float) -> None:
        assert isinstance(probability, float)  # noqa: S101 - other programs stay on the CPU
        if probability >= 1:
            self._add_kept(stream, row.numel())
            return
        if probability <= 0:
            row.zero_()
            return
        source = self._sources[self._program.streams[stream]] - self._plan.has_base
        key = stream_key(self._plan.seed, source, self._place.piece.first.task.name)
        mask = draw_keep_mask(key, self._place.start, row.numel(), probability, device=row.device)
        self._add_kept(stream, mask.sum())
        row.mul_(mask)

    def _add_kept(self, stream: int, count: Tensor | int) -> None:
        # Where both choose, what trims keep is told.
        if self._kept is not None and not self._program.trims:
            self._kept[stream].add_(count)

    def computed(self, index: int, out: Tensor) -> None:
        raise AssertionError(f"row {index} of {out.shape} is the CPU's")

    def change_(self, row: Tensor, source: int) -> None:
        raise AssertionError(f"source {source} changes nothing here, of {row.shape}")
