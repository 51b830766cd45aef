"""Pieces measured and merged on a device, in the mathematics that the CPU's stage uses.

Everything but the sum of more than four rows has one rounding per operation, the CPU's; such sums
add from left to right here, whatever the size of the chunk.

Memory: that of the ring.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from streammerge.engine.accelerator.ring import Returned, Ring, Step
from streammerge.engine.device import Applied
from streammerge.engine.finite import LARGEST
from streammerge.engine.pieces import PieceInMemory, Stored, torch_dtype
from streammerge.lazily import torch
from streammerge.methods.base import MergeChunk, MergeMethod, Operand, Stack
from streammerge.methods.masks import draw_keep_mask
from streammerge.methods.parts import trim_unseen_
from streammerge.plan.types import MergePlan
from streammerge.reductions import BLOCK, count_blocks
from streammerge.reductions.in_tensors import COUNTS, counted_blocks, values_inside
from streammerge.reductions.magnitude import BINS, Bins, Counted, Question
from streammerge.reductions.topk import TopK
from streammerge.rng import stream_key

if TYPE_CHECKING:
    from torch import Tensor


class Suspicion(Exception):  # noqa: N818 - no error yet: the CPU's stage finds out what it is
    """A value is not finite, or beyond the range of the result's type."""


class DeviceComputing:
    """Measures and merges the pieces of one worker on its device."""

    def __init__(self, plan: MergePlan, method: MergeMethod, ring: Ring) -> None:
        """Prepare to compute in a ring's memory."""
        self._plan = plan
        self._method = method
        self._params = [method.bind(setting.values) for setting in plan.settings]
        self._ring = ring
        self._first_source = 1 if plan.has_base else 0
        self._n_sources = len(plan.models) - self._first_source
        self._subtracts = method.operand is Operand.TASK_VECTORS
        self._tells = method.random or plan.model_scope

    def merge(self, piece: PieceInMemory, tops: tuple[TopK, ...], out: Stored) -> Applied:
        """Merge a piece of one part; see :meth:`streammerge.engine.device.DeviceStage.apply`.

        Raises:
            Suspicion: A value is not finite or out of range, and the recipe forbids it.
        """
        ring = self._ring
        ring.run(ring.clear)
        merge = partial(self._merge_step, piece, tops, torch_dtype(piece.first.task.made_dtype))
        ring.stream(_tensors(piece), piece.numel, merge, torch.from_numpy(out.memory))
        checked = not self._plan.keep_non_finite
        self._fetch(piece, [(ring.counts, self._n_sources + 1)], checked=checked)
        *kept, not_finite = ring.counts.host.tolist()
        return Applied(not_finite, tuple(kept) if self._tells else ())

    def measure(
        self, piece: PieceInMemory, questions: Sequence[Question | None]
    ) -> list[list[Counted | None]]:
        """Answer questions; see :meth:`streammerge.engine.device.DeviceStage.measure`.

        What was collected lies in memory that the next call overwrites.

        Raises:
            Suspicion: A value is not finite, where a sweep over the model has to look.
        """
        ring = self._ring
        asked = [index for index, question in enumerate(questions) if question is not None]
        # A tensor is merged right after it is measured, and checked then; a whole model is not.
        checked = self._plan.model_scope and not self._plan.keep_non_finite
        ring.run(ring.clear)
        measure = partial(self._measure_step, questions, checked=checked)
        ring.stream(_tensors(piece), piece.numel, measure, None)
        blocks = count_blocks(piece.numel)
        self._fetch(
            piece,
            [(ring.counted[index], blocks * COUNTS) for index in asked]
            + [(ring.histograms[i], BINS) for i in asked if isinstance(questions[i], Bins)],
            checked=checked,
        )
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
        return [[None if own is None else own[block] for own in answers] for block in range(blocks)]

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
        operands, merged = largest[: self._n_sources + 1], largest[self._n_sources + 1]
        limit = LARGEST[piece.first.task.made_dtype]
        if not (all(map(math.isfinite, operands)) and merged <= limit):
            raise Suspicion

    def _merge_step(
        self,
        piece: PieceInMemory,
        tops: tuple[TopK, ...],
        dtype: torch.dtype,
        step: Step,
    ) -> None:
        checked = not self._plan.keep_non_finite
        base, rows = self._load(step, checked=checked)
        place = _Place(piece, step)
        kept = self._ring.counts.device
        if self._plan.model_scope:
            for source, (row, top) in enumerate(zip(rows, tops, strict=True)):
                self._count_kept(row, top, place, kept[source])
        if not checked:
            _count_non_finite(step.inputs, kept[self._n_sources])
        chunk = MergeChunk(
            base=base,
            vectors=Stack(None, rows),
            scratch=self._ring.rows[self._n_sources + 1 : -1, : step.numel],
            trims=_Trims(tops, place),
            masks=_Masks(self._plan.seed, place, kept),
            steps=_NoSteps(),
        )
        merged = self._method.apply(chunk, self._params[piece.first.task.setting])
        if checked:
            self._note(merged, step, self._n_sources + 1)
        step.out.view(dtype).copy_(merged)

    def _measure_step(
        self, questions: Sequence[Question | None], step: Step, *, checked: bool
    ) -> None:
        _, rows = self._load(step, checked=checked)
        magnitudes = self._ring.rows[-1, : step.numel]
        for row, question, answers in zip(rows, questions, self._ring.answers, strict=True):
            if question is not None:
                torch.abs(row, out=magnitudes)
                answers.add_(question, magnitudes, step.begin // BLOCK)

    def _load(self, step: Step, *, checked: bool) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Convert a step of every input; return the base and the operands."""
        memory = self._ring.rows[:, : step.numel]
        base = None
        if self._first_source:
            stored = step.inputs[0]
            assert stored is not None  # noqa: S101 - else the piece would not be here
            base = memory[self._n_sources].copy_(stored)
        rows = memory[: self._n_sources].unbind()
        for source, row in enumerate(rows):
            stored = step.inputs[self._first_source + source]
            if stored is not None:
                row.copy_(stored)
                if self._subtracts and base is not None:
                    row.sub_(base)
            elif self._subtracts:
                # An adapter that leaves this tensor alone.
                row.zero_()
            else:
                assert base is not None  # noqa: S101 - the planner gave every adapter its base
                row.copy_(base)
            if checked:
                self._note(row, step, source)
        if checked and base is not None and None in step.inputs:
            self._note(base, step, self._n_sources)
        return base, rows

    def _note(self, row: Tensor, step: Step, column: int) -> None:
        """Note the largest magnitude, which is NaN or infinite if any value is."""
        magnitudes = torch.abs(row, out=self._ring.rows[-1, : step.numel])
        notes = self._ring.notes.device.view(-1, self._ring.shape.notes)
        torch.amax(magnitudes, dim=0, out=notes[step.index, column])

    def _count_kept(self, row: Tensor, top: TopK, place: _Place, kept: Tensor) -> None:
        """Add how many entries a source keeps under a threshold of the model."""
        if top.greater == top.numel:
            kept.add_(row.numel())
            return
        magnitudes = torch.abs(row, out=self._ring.rows[-1, : row.numel()])
        for begin, end, block in place.fates(top):
            part = magnitudes[begin:end]
            ties = top.ties_to_keep(block)
            if ties is None:
                kept.add_((part >= top.threshold).sum())
            else:
                kept.add_((part > top.threshold).sum()).add_(ties)


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


@dataclass(frozen=True, slots=True)
class _Trims:
    """Trims a step."""

    tops: tuple[TopK, ...]
    place: _Place

    def trim_(self, row: Tensor, *, source: int) -> Tensor:
        for begin, end, block in self.place.fates(self.tops[source]):
            trim_unseen_(row[begin:end], self.tops[source], block)
        return row


@dataclass(frozen=True, slots=True)
class _Masks:
    """Draws the masks of a step."""

    seed: int
    place: _Place
    kept: Tensor

    def drop_(self, row: Tensor, *, source: int, density: float) -> Tensor:
        if density >= 1:
            self.kept[source].add_(row.numel())
            return row
        if density <= 0:
            return row.zero_()
        key = stream_key(self.seed, source, self.place.piece.first.task.name)
        mask = draw_keep_mask(key, self.place.start, row.numel(), density, device=row.device)
        self.kept[source].add_(mask.sum())
        return row.mul_(mask)


class _NoSteps:
    """Adapters in turn are the CPU's."""

    def step_(self, weights: Tensor, *, source: int) -> Tensor:
        raise AssertionError(f"source {source} has no step here, for {weights.shape}")
