"""Pieces measured and merged block by block with the operations of torch.

Blocks of 262,144 elements go from the slots through a worker's own scratch memory, small enough for
the core's cache, into the output slot.

Memory: per worker ``(n_sources + 1 + scratch rows + 1)`` blocks in the compute dtype, comparison
masks, and one block's random words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streammerge.dtypes import DType
from streammerge.engine.changing import ChangeWork, PieceSteps
from streammerge.engine.device import Applied
from streammerge.engine.finite import LARGEST, check_range, refuse_operand
from streammerge.engine.pieces import Part, PieceInMemory, Stored, torch_dtype
from streammerge.engine.segments import Block, Segment, split_piece
from streammerge.lazily import torch
from streammerge.methods.base import MagnitudeTopK, MergeChunk, MergeMethod, Operand, Stack
from streammerge.methods.parts import trim_, trim_rows_
from streammerge.plan.types import MergePlan
from streammerge.reductions import BLOCK
from streammerge.reductions.magnitude import Counted, Question, answer_block
from streammerge.reductions.selecting import select_block, select_rows
from streammerge.reductions.topk import TopK, count_kept
from streammerge.rng import keep_mask, stream_key

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_ROWS = 8
"""Tensors of one size, side by side, whose thresholds are handled together. For fewer, larger ones
it takes as long, or up to a tenth longer: each call does enough by itself."""


class PlainStage:
    """Merges block by block on the calling thread."""

    def __init__(self, plan: MergePlan, method: MergeMethod) -> None:
        """Allocate one worker's scratch memory."""
        self._plan = plan
        self._method = method
        self._params = [method.bind(setting.values) for setting in plan.settings]
        self._first_source = 1 if plan.has_base else 0
        self._subtracts = method.operand is Operand.TASK_VECTORS
        self._has_base = plan.has_base
        self._in_turn = [method.in_turn(params) for params in self._params]
        self._n_sources = len(plan.models) - self._first_source
        rows = self._n_sources + 1 + method.scratch_rows + 1
        self._memory = torch.empty(rows * BLOCK, dtype=torch_dtype(plan.compute_dtype))
        self._changes = ChangeWork(plan)
        self._vectors = self._memory[: self._n_sources * BLOCK]
        rest = self._memory[self._n_sources * BLOCK :].view(-1, BLOCK)
        self._base, self._scratch, self._magnitudes = rest[0], rest[1:-1], rest[-1]
        self._masks = np.empty((2, BLOCK), dtype=np.bool_)
        # Making views costs as much as a small operation; nearly all blocks share these.
        self._whole = self._vectors.view(self._n_sources, BLOCK)
        self._full_block = Stack(self._whole, self._whole.unbind())
        self._selected: tuple[PieceInMemory, Tensor | None, Stack] | None = None

    def apply(
        self, piece: PieceInMemory, tops: Sequence[tuple[TopK, ...]], out: Stored
    ) -> list[Applied]:
        """Merge a piece; see :class:`DeviceStage`."""
        kept = [[0] * self._n_sources for _ in piece.parts]
        not_finite = sum(self.merge(piece, block, out) for block in split_piece(piece, tops, kept))
        self._selected = None
        # Values that are not finite are only let through, and counted, in pieces of one part.
        tell = self._method.random or self._plan.model_scope
        return [Applied(not_finite, tuple(counts) if tell else ()) for counts in kept]

    def merge(self, piece: PieceInMemory, block: Block, out: Stored) -> int:
        """Merge one block of a piece.

        Args:
            piece: The inputs.
            block: The block; what is kept is added to its segments' counts.
            out: ``[numel]`` of the piece; the block's part receives the result.

        Returns:
            How many input values are not finite.

        Raises:
            NonFiniteError: As :meth:`apply` does.
        """
        begin, end, segments = block.begin, block.end, block.segments
        params = self._params[piece.first.task.setting]
        in_turn = self._in_turn[piece.first.task.setting]
        check = not self._plan.keep_non_finite and not self._method.sums
        base, vectors = self._load(piece, begin, end, check=check)
        if self._plan.model_scope:
            self._count_kept(segments, vectors)
        chunk = MergeChunk(
            base=base,
            vectors=vectors,
            scratch=self._scratch[:, : end - begin],
            trims=_Trims(segments, self._magnitudes, self._masks),
            masks=_PositionalMasks(self._plan.seed, segments),
            steps=PieceSteps(self._changes, piece, begin, self._first_source),
        )
        not_finite = 0
        if self._plan.keep_non_finite:
            not_finite += _count_stored(piece, begin, end)
            if piece.deltas and not in_turn:
                not_finite += self._count_from_adapters(piece, vectors)
        merged = self._method.apply(chunk, params)
        if self._plan.keep_non_finite:
            if in_turn:
                # The operands are never there by themselves.
                not_finite += _count_non_finite(merged)
        elif not _surely_in_range(merged, out.dtype):
            # A sum tells that something is not finite; only its operands tell what.
            self._load(piece, begin, end, check=self._method.sums)
            check_range(merged.numpy(), piece, begin)
        out.tensor()[begin:end].copy_(merged)
        return not_finite

    def convert(self, piece: PieceInMemory, out: Stored) -> Applied:
        """Convert the values of a piece; see :class:`DeviceStage`."""
        stored = next(each.tensor() for each in piece.inputs if each is not None)
        converted = out.tensor()
        not_finite = 0
        for begin in range(0, piece.numel, BLOCK):
            end = min(begin + BLOCK, piece.numel)
            values = self._base[: end - begin].copy_(stored[begin:end])
            if self._plan.keep_non_finite:
                not_finite += _count_stored(piece, begin, end)
            elif not _surely_in_range(values, out.dtype):
                check_range(values.numpy(), piece, begin)
            converted[begin:end].copy_(stored[begin:end])
        return Applied(not_finite, ())

    def measure(
        self, piece: PieceInMemory, questions: Sequence[Question | None]
    ) -> list[list[Counted | None]]:
        """Answer questions about a piece; see :class:`DeviceStage`."""
        return [
            self._answer(piece, questions, begin, min(begin + BLOCK, piece.numel))
            for begin in range(0, piece.numel, BLOCK)
        ]

    def _answer(
        self, piece: PieceInMemory, questions: Sequence[Question | None], begin: int, end: int
    ) -> list[Counted | None]:
        """Return the answers of one block, one per source."""
        # A tensor is merged right after it is measured, and checked then; a whole model is not.
        check = self._plan.model_scope and not self._plan.keep_non_finite
        _, vectors = self._load(piece, begin, end, check=check)
        magnitudes = self._magnitudes[: end - begin]
        found: list[Counted | None] = []
        for row, question in zip(vectors.rows, questions, strict=True):
            if question is None:
                found.append(None)
                continue
            torch.abs(row, out=magnitudes)
            found.append(answer_block(question, magnitudes.numpy(), self._masks))
        return found

    def select(self, piece: PieceInMemory, need: MagnitudeTopK) -> list[tuple[TopK, ...]]:
        """Find the thresholds of small tensors; see :class:`DeviceStage`."""
        base, vectors = self._load(piece, 0, piece.numel, check=False)
        magnitudes = self._magnitudes[: piece.numel]
        runs = _equal_runs(list(piece.ranges()))
        by_source = []
        for row, density in zip(vectors.rows, need.densities, strict=True):
            values = torch.abs(row, out=magnitudes).numpy()
            found: list[TopK] = []
            for begin, end, count in runs:
                rows = values[begin:end].reshape(count, -1)
                if count < _LEAST_ROWS:
                    found += [select_block(each, density, need.tie_policy) for each in rows]
                else:
                    found += select_rows(rows, density, need.tie_policy, self._scratch[0])
            by_source.append(found)
        # The merge of these tensors comes next, as a rule, and finds them as they are.
        self._selected = piece, base, vectors
        return list(zip(*by_source, strict=True))

    def sample(self, piece: PieceInMemory, start: int, out: NDArray[Any]) -> None:
        """Fill in magnitudes; see :class:`DeviceStage`."""
        begin = start - piece.first.start
        _, vectors = self._load(piece, begin, begin + out.shape[1], check=False)
        for row, magnitudes in zip(vectors.rows, torch.from_numpy(out), strict=True):
            torch.abs(row, out=magnitudes)

    def _count_from_adapters(self, piece: PieceInMemory, vectors: Stack) -> int:
        """Return how many values that adapters make of the base are NaN or infinite."""
        changed = [
            row
            for source, row in enumerate(vectors.rows)
            if piece.deltas[self._first_source + source]
        ]
        return sum(map(_count_non_finite, changed))

    def _count_kept(self, segments: Sequence[Segment], vectors: Stack) -> None:
        """Add how many entries of this block each source keeps under a threshold of the model."""
        for source, row in enumerate(vectors.rows):
            for segment in segments:
                values = row[segment.begin : segment.end]
                magnitudes = torch.abs(values, out=self._magnitudes[: values.numel()]).numpy()
                top = segment.tops[source]
                segment.kept[source] += count_kept(magnitudes, top, segment.block, self._masks)

    def _load(
        self, piece: PieceInMemory, begin: int, end: int, *, check: bool
    ) -> tuple[Tensor | None, Stack]:
        """Convert one block of every input; return the base and the operands."""
        selected, self._selected = self._selected, None
        if selected is not None and selected[0] is piece:
            if check:
                for source, row in enumerate(selected[2].rows):
                    self._check_finite(row, piece, begin, self._first_source + source)
            return selected[1:]
        numel = end - begin
        vectors = self._operands(piece, numel)
        if self._in_turn[piece.first.task.setting]:
            # PEFT loads all adapters first, each in place of what the base has, then merges them.
            stored = next(each.tensor() for each in reversed(piece.inputs) if each is not None)
            in_type = stored[begin:end].to(torch_dtype(piece.first.task.dtype))
            return self._base[:numel].copy_(in_type), vectors
        base = None
        if self._has_base and piece.inputs[0] is not None:
            base = self._base[:numel].copy_(piece.inputs[0].tensor()[begin:end])
        lent = False
        for source, row in enumerate(vectors.rows):
            if piece.inputs[self._first_source + source] is None:
                lent = True
                self._fill_adapted(row, base, piece, source, begin)
            else:
                self._fill_stored(row, base, piece, source, begin)
            if check:
                self._check_finite(row, piece, begin, self._first_source + source)
        if lent and check and base is not None:
            self._check_finite(base, piece, begin, 0)
        return base, vectors

    def _check_finite(self, row: Tensor, piece: PieceInMemory, begin: int, model: int) -> None:
        """Raise if an operand holds NaN or infinity.

        A sum of squares is finite only if every term is, so one cheap reduction acquits almost
        every block; only a suspect is searched.
        """
        if not math.isfinite(float(torch.dot(row, row))) and not torch.isfinite(row).all():
            refuse_operand(row.numpy(), piece, begin, self._plan, model)

    def _fill_stored(
        self, row: Tensor, base: Tensor | None, piece: PieceInMemory, source: int, begin: int
    ) -> None:
        """Write the operand of a source that has values of its own, which it may change as well."""
        model = self._first_source + source
        stored = piece.inputs[model]
        assert stored is not None  # noqa: S101 - the planner gave every merge all its sources
        row.copy_(stored.tensor()[begin : begin + row.numel()])
        for delta in piece.deltas[model] if piece.deltas else ():
            self._changes.apply_(row, delta, piece, begin)
        if self._subtracts and base is not None:
            row.sub_(base)

    def _fill_adapted(
        self, row: Tensor, base: Tensor | None, piece: PieceInMemory, source: int, begin: int
    ) -> None:
        """Write the operand of an adapter: what it adds to the base, or the base with that."""
        assert base is not None  # noqa: S101 - the planner gave every adapter its base
        deltas = piece.deltas[self._first_source + source] if piece.deltas else ()
        if self._subtracts and all(delta.is_sum for delta in deltas):
            # Not by way of the base: adding to it and subtracting it again would round.
            self._changes.sum_into(row, deltas, piece, begin)
            return
        row.copy_(base)
        for delta in deltas:
            self._changes.apply_(row, delta, piece, begin)
        if self._subtracts:
            row.sub_(base)

    def _operands(self, piece: PieceInMemory, numel: int) -> Stack:
        """Return ``[n, numel]`` of scratch memory, laid out as a whole-tensor stack would be.

        torch.sum chooses its order of addition by the layout: a tensor of one block is dense, a
        block of a larger one has rows far apart. This matters for five or more sources.
        """
        if piece.first.task.numel <= BLOCK:
            dense = self._vectors[: self._n_sources * numel].view(self._n_sources, numel)
            return Stack(dense, dense.unbind())
        if numel == BLOCK:
            return self._full_block
        part = self._whole[:, :numel]
        return Stack(part, part.unbind())


def _surely_in_range(merged: Tensor, dtype: DType) -> bool:
    """Return whether one cheap reduction shows that a block is finite and fits a type.

    No term of a sum of squares exceeds the sum; almost every block is acquitted by it.
    """
    limit = LARGEST[dtype]
    return float(torch.dot(merged, merged)) <= min(limit * limit, LARGEST[DType.F32])


def _count_stored(piece: PieceInMemory, begin: int, end: int) -> int:
    """Return how many stored values of a block, in all models, are NaN or infinite."""
    return sum(
        _count_non_finite(stored.tensor()[begin:end].to(torch.float64))
        for stored in piece.inputs
        if stored is not None
    )


def _count_non_finite(values: Tensor) -> int:
    return values.numel() - int(torch.isfinite(values).sum())


def _equal_runs(ranges: Sequence[tuple[Part, int, int]]) -> list[tuple[int, int, int]]:
    """Return the runs of neighbours of one size: begin, end and how many tensors they are."""
    runs: list[tuple[int, int, int]] = []
    for _, group in groupby(ranges, key=lambda each: each[2] - each[1]):
        ranges_of = list(group)
        runs.append((ranges_of[0][1], ranges_of[-1][2], len(ranges_of)))
    return runs


@dataclass(frozen=True, slots=True)
class _Trims:
    """Trims one block."""

    segments: Sequence[Segment]
    magnitudes: Tensor
    masks: NDArray[np.bool_]

    def trim_(self, row: Tensor, *, source: int) -> Tensor:
        # Small tensors side by side share the calls, which cost more than what is done in them.
        for numel, run in groupby(self.segments, key=lambda each: each.end - each.begin):
            segments = list(run)
            if len(segments) < _LEAST_ROWS:
                for segment in segments:
                    part = row[segment.begin : segment.end]
                    trim_(part, segment.tops[source], segment.block)
            elif numel:
                trim_rows_(
                    row[segments[0].begin : segments[-1].end].view(-1, numel),
                    [segment.tops[source] for segment in segments],
                    [segment.block for segment in segments],
                    magnitudes=self.magnitudes,
                    masks=self.masks,
                )
        return row


@dataclass(frozen=True, slots=True)
class _PositionalMasks:
    """Draws the masks of one block."""

    seed: int
    segments: Sequence[Segment]

    def drop_(self, row: Tensor, *, source: int, density: float) -> Tensor:
        for segment in self.segments:
            values = row[segment.begin : segment.end]
            segment.kept[source] += self._drop(values, segment, source, density)
        return row

    def _drop(self, row: Tensor, segment: Segment, source: int, density: float) -> int:
        """Drop in one tensor; return how many entries are kept."""
        if density >= 1:
            return row.numel()
        if density <= 0:
            row.zero_()
            return 0
        key = stream_key(self.seed, source, segment.part.task.name)
        mask = keep_mask(key, segment.start, row.numel(), density)
        # numpy multiplies floats by bool several times faster than torch, on the same memory.
        values = row.numpy()
        np.multiply(values, mask, out=values)
        return int(np.count_nonzero(mask))
