"""One block of a piece as a program on the CPU reads it: converted, changed by adapters, trimmed.

Memory: one row for the base, one for magnitudes, two comparison masks of a block, and what
:class:`~streammerge.engine.changing.ChangeWork` has; the rows are the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streammerge.engine.changing import ChangeWork, PieceSteps
from streammerge.engine.finite import refuse_operand
from streammerge.engine.pieces import PieceInMemory, torch_dtype
from streammerge.engine.rows import KnownRows
from streammerge.engine.segments import Segment
from streammerge.lazily import torch
from streammerge.plan.types import MergePlan
from streammerge.rng import keep_mask, keep_mask_by, stream_key
from streammerge.statistics.topk import count_kept
from streammerge.statistics.trimming import mark_, trim_, trim_rows_
from streammerge.tiles.program import Program

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.adapters.onto_base.deltas import Delta

_LEAST_ROWS = 8
"""Tensors of one size, side by side, that are trimmed together. For fewer, larger ones it takes as
long, or up to a tenth longer: each call does enough by itself."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What one worker reads blocks with."""

    plan: MergePlan
    """The plan."""
    changes: ChangeWork
    """Scratch memory for what adapters do."""
    base: Tensor
    """``[BLOCK]``, for the base."""
    magnitudes: Tensor
    """``[BLOCK]``, scratch."""
    masks: NDArray[np.bool_]
    """``[2, BLOCK]``, scratch."""


class BlockReader:
    """Reads one block; see :class:`streammerge.tiles.interpreter.Models`."""

    def __init__(
        self,
        bench: Bench,
        piece: PieceInMemory,
        begin: int,
        numel: int,
        segments: Sequence[Segment],
        *,
        program: Program,
        in_turn: bool = False,
        check: bool,
        count: bool = False,
        rows: KnownRows | None = None,
        sources: Sequence[int] | None = None,
    ) -> None:
        """Prepare to read.

        Args:
            bench: The worker's own.
            piece: The inputs.
            begin: First element of the block in the piece.
            numel: Elements of the block.
            segments: What it holds of each tensor.
            program: What is run on it.
            in_turn: Whether sources are merged one after the other.
            check: Whether operands that are not finite are an error.
            count: Whether to count what trims keep.
            rows: What is known of the block's rows, where that matters.
            sources: Which of the piece's inputs the sources are; None for those of the tensor.
        """
        self._bench = bench
        self._piece = piece
        self._begin = begin
        self._numel = numel
        self._segments = segments
        self._program = program
        self._in_turn = in_turn
        self._check = check
        self._count = count
        self._rows = rows
        self._base: Tensor | None = None
        setting = bench.plan.settings[piece.first.task.setting]
        self._base_model = setting.models[0]
        self._sources = setting.sources if sources is None else sources

    def base(self, out: Tensor) -> None:
        """Write the base's values."""
        out.copy_(self._base_row())
        if self._check:
            check_operand(out, self._piece, self._begin, self._bench.plan, self._base_model)

    def _base_row(self) -> Tensor:
        """Return the base's values, read once."""
        if self._base is None:
            row = self._bench.base[: self._numel]
            piece, begin = self._piece, self._begin
            if self._in_turn:
                # PEFT loads all adapters first, each in place of what the base has, then merges them.
                last = next(each.tensor() for each in reversed(piece.inputs) if each is not None)
                in_type = last[begin : begin + self._numel]
                row.copy_(in_type.to(torch_dtype(piece.first.task.dtype)))
            else:
                stored = piece.inputs[self._base_model]
                assert stored is not None  # noqa: S101 - the planner gave every merge its base
                row.copy_(stored.tensor()[begin : begin + self._numel])
            self._base = row
        return self._base

    def source(self, source: int, out: Tensor) -> None:
        """Write a source's values, or those that an adapter makes of the base's."""
        stored = self._piece.inputs[self._sources[source]]
        if stored is None:
            out.copy_(self._base_row())
        else:
            out.copy_(stored.tensor()[self._begin : self._begin + self._numel])
        for delta in self._deltas(source):
            self._bench.changes.apply_(out, delta, self._piece, self._begin)
        self._check_finite(out, source)

    def task_vector(self, source: int, out: Tensor) -> None:
        """Write what a source, or an adapter, adds to the base."""
        stored = self._piece.inputs[self._sources[source]]
        deltas = self._deltas(source)
        if stored is None and all(delta.is_sum for delta in deltas):
            # Not by way of the base: adding to it and subtracting it again would round.
            self._bench.changes.sum_into(out, deltas, self._piece, self._begin)
            self._check_finite(out, source)
            return
        if stored is None:
            out.copy_(self._base_row())
        else:
            out.copy_(stored.tensor()[self._begin : self._begin + self._numel])
        for delta in deltas:
            self._bench.changes.apply_(out, delta, self._piece, self._begin)
        out.sub_(self._base_row())
        self._check_finite(out, source)

    def _deltas(self, source: int) -> Sequence[Delta]:
        deltas = self._piece.deltas
        return deltas[self._sources[source]] if deltas else ()

    def _check_finite(self, row: Tensor, source: int) -> None:
        """Raise if an operand holds NaN or infinity."""
        if self._check:
            model = self._sources[source]
            check_operand(row, self._piece, self._begin, self._bench.plan, model)

    def computed(self, index: int, out: Tensor) -> None:
        """Write what was computed before."""
        if self._rows is not None:
            out.copy_(torch.from_numpy(self._rows.computed[index]))
            return
        (segment,) = self._segments
        made = segment.found.made
        assert made is not None  # noqa: S101 - only such programs load it
        out.copy_(torch.from_numpy(made[segment.start : segment.start + out.numel()]))

    def change_(self, row: Tensor, source: int) -> None:
        """Change values as a source's adapter does, and round them."""
        PieceSteps(self._bench.changes, self._piece, self._begin).step_(
            row, model=self._sources[source]
        )

    def trim_(self, row: Tensor, trim: int) -> None:
        """Set to zero what a trim does not keep."""
        self._count_kept(row, trim)
        index = self._program.trims[trim]
        # Small tensors side by side share the calls, which cost more than what is done in them.
        for numel, run in groupby(self._segments, key=lambda each: each.end - each.begin):
            segments = list(run)
            if len(segments) < _LEAST_ROWS:
                for segment in segments:
                    part = row[segment.begin : segment.end]
                    trim_(part, segment.found.tops[index], segment.block)
            elif numel:
                trim_rows_(
                    row[segments[0].begin : segments[-1].end].view(-1, numel),
                    [segment.found.tops[index] for segment in segments],
                    [segment.block for segment in segments],
                    magnitudes=self._bench.magnitudes,
                    masks=self._bench.masks,
                )

    def mark_(self, row: Tensor, trim: int) -> None:
        """Replace values by 1 where a trim keeps them, and by 0 elsewhere."""
        self._count_kept(row, trim)
        index = self._program.trims[trim]
        for segment in self._segments:
            part = row[segment.begin : segment.end]
            mark_(part, segment.found.tops[index], segment.block, self._bench.masks)

    def _count_kept(self, row: Tensor, trim: int) -> None:
        """Add how many entries of this block a trim keeps."""
        if not self._count:
            return
        for segment in self._segments:
            values = row[segment.begin : segment.end]
            magnitudes = values.abs().numpy()
            top = segment.found.tops[self._program.trims[trim]]
            segment.kept[trim] += count_kept(magnitudes, top, segment.block, self._bench.masks)

    def drop_(self, row: Tensor, stream: int, probability: Tensor | float) -> None:
        """Set to zero what a source's random numbers do not keep."""
        source = self._sources[self._program.streams[stream]] - self._bench.plan.has_base
        for segment in self._segments:
            values = row[segment.begin : segment.end]
            own = probability
            if not isinstance(probability, float):
                own = probability[segment.begin : segment.end]
            kept = self._drop(values, segment, source, own)
            # Where both choose, what trims keep is told.
            if self._count and not self._program.trims:
                segment.kept[stream] += kept

    def _drop(self, row: Tensor, segment: Segment, source: int, probability: Tensor | float) -> int:
        """Drop in one tensor; return how many entries are kept."""
        if isinstance(probability, float):
            if probability >= 1:
                return row.numel()
            if probability <= 0:
                row.zero_()
                return 0
        key = stream_key(self._bench.plan.seed, source, segment.part.task.name)
        if isinstance(probability, float):
            mask = keep_mask(key, segment.start, row.numel(), probability)
        else:
            mask = keep_mask_by(key, segment.start, probability.numpy())
        # numpy multiplies floats by bool several times faster than torch, on the same memory.
        values = row.numpy()
        np.multiply(values, mask, out=values)
        return int(np.count_nonzero(mask))


def check_operand(
    row: Tensor, piece: PieceInMemory, begin: int, plan: MergePlan, model: int
) -> None:
    """Raise if an operand holds NaN or infinity.

    A sum of squares is finite only if every term is, so one cheap reduction acquits almost every
    block; only a suspect is searched.
    """
    if not math.isfinite(float(torch.dot(row, row))) and not torch.isfinite(row).all():
        refuse_operand(row.numpy(), piece, begin, plan, model)
