"""Pieces measured and merged block by block: programs run by the plain interpreter.

Blocks of 262,144 elements go from the slots through a worker's own scratch memory, small enough for
the core's cache, into the output slot.

Memory: per worker :func:`streammerge.plan.demanding.count_plain_rows` blocks in the compute dtype,
comparison masks, and one block's random words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streammerge.dtypes import DType
from streammerge.engine.asking import Asking, BlockAnswer
from streammerge.engine.changing import ChangeWork
from streammerge.engine.device import Applied
from streammerge.engine.finite import LARGEST, check_range
from streammerge.engine.pieces import Part, PieceInMemory, Stored, torch_dtype
from streammerge.engine.reading import Bench, BlockReader
from streammerge.engine.segments import Block, Segment, split_piece
from streammerge.lazily import torch
from streammerge.methods.base import MergeMethod
from streammerge.methods.programs import Programs, found_of_nothing
from streammerge.plan.demanding import count_plain_rows
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import MergePlan
from streammerge.statistics import BLOCK
from streammerge.statistics.magnitude import Counted, answer_block
from streammerge.statistics.rounds import NOTHING, Answers, Found, Rank
from streammerge.statistics.selecting import select_block, select_rows
from streammerge.statistics.topk import TopK
from streammerge.statistics.totals import join_totals
from streammerge.tiles.interpreter import run_program
from streammerge.tiles.program import Op, Origin, Program
from streammerge.tiles.totalling import HostSinks

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_ROWS = 8
"""Tensors of one size, side by side, whose thresholds are found together. For fewer, larger ones it
takes as long, or up to a tenth longer: each call does enough by itself."""


class PlainStage:
    """Merges block by block on the calling thread."""

    def __init__(self, plan: MergePlan, method: MergeMethod) -> None:
        """Allocate one worker's scratch memory."""
        self._plan = plan
        self._method = method
        self._programs = programs_of_plan(plan, method)
        self._in_turn = [method.in_turn(method.bind(each.values)) for each in plan.settings]
        rows = count_plain_rows(self._programs)
        memory = torch.empty(rows * BLOCK, dtype=torch_dtype(plan.compute_dtype)).view(rows, BLOCK)
        masks = np.empty((2, BLOCK), dtype=np.bool_)
        self._bench = Bench(plan, ChangeWork(plan), memory[0], memory[1], masks)
        self._registers = memory[2:]
        self._tells = method.random or plan.model_scope

    def apply(self, piece: PieceInMemory, found: Sequence[Found], out: Stored) -> list[Applied]:
        """Merge a piece; see :class:`DeviceStage`."""
        programs = self._programs[piece.first.task.setting]
        kept = [[0] * count_kept_of(programs) for _ in piece.parts]
        blocks = split_piece(piece, found, kept)
        not_finite = sum(self.merge(piece, block, out) for block in blocks)
        # Values that are not finite are only let through, and counted, in pieces of one part.
        return [Applied(not_finite, self.told(programs, counts)) for counts in kept]

    def told(self, programs: Programs, counts: Sequence[int]) -> tuple[int, ...]:
        """Return what the manifest says about what was kept of a part."""
        return tuple(programs.work.kept(counts)) if self._tells else ()

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
        program = self._programs[piece.first.task.setting].merge
        if len(block.segments) > 1 and program.has_found_numbers:
            return sum(self._merge_whole(piece, each, out) for each in _one_by_one(block))
        return self._merge_whole(piece, block, out)

    def _merge_whole(self, piece: PieceInMemory, block: Block, out: Stored) -> int:
        begin, end = block.begin, block.end
        setting = piece.first.task.setting
        program = self._programs[setting].merge
        keep, in_turn = self._plan.keep_non_finite, self._in_turn[setting]
        not_finite = 0
        if keep:
            not_finite += _count_stored(piece, begin, end)
            if piece.deltas and not in_turn:
                not_finite += self._count_from_adapters(piece, block, program)
        check = not keep and not self._method.sums
        merged = self._run(program, piece, block, check=check, count=self._tells)
        assert merged is not None  # noqa: S101 - a merge stores
        if keep:
            if in_turn:
                # The operands are never there by themselves.
                not_finite += _count_non_finite(merged)
        elif not _surely_in_range(merged, out.dtype):
            # A sum tells that something is not finite; only its operands tell what.
            if self._method.sums:
                merged = self._run(program, piece, block, check=True)
                assert merged is not None  # noqa: S101 - a merge stores
            check_range(merged.numpy(), piece, begin)
        out.tensor()[begin:end].copy_(merged)
        return not_finite

    def _run(
        self,
        program: Program,
        piece: PieceInMemory,
        block: Block,
        *,
        check: bool,
        count: bool = False,
        sinks: HostSinks | None = None,
    ) -> Tensor | None:
        """Run a program on one block."""
        numel = block.end - block.begin
        reader = BlockReader(
            self._bench,
            piece,
            block.begin,
            numel,
            block.segments,
            program=program,
            in_turn=self._in_turn[piece.first.task.setting],
            check=check,
            count=count,
        )
        return run_program(
            program,
            reader,
            numbers=bind_numbers(program, block.segments[0].found),
            memory=self._registers[:, :numel],
            row_numel=numel,
            sinks=sinks,
        )

    def convert(self, piece: PieceInMemory, out: Stored) -> Applied:
        """Convert the values of a piece; see :class:`DeviceStage`."""
        stored = next(each.tensor() for each in piece.inputs if each is not None)
        converted = out.tensor()
        not_finite = 0
        for begin in range(0, piece.numel, BLOCK):
            end = min(begin + BLOCK, piece.numel)
            values = self._bench.base[: end - begin].copy_(stored[begin:end])
            if self._plan.keep_non_finite:
                not_finite += _count_stored(piece, begin, end)
            elif not _surely_in_range(values, out.dtype):
                check_range(values.numpy(), piece, begin)
            converted[begin:end].copy_(stored[begin:end])
        return Applied(not_finite, ())

    def measure(self, piece: PieceInMemory, asking: Asking) -> list[BlockAnswer]:
        """Answer questions about a piece; see :class:`DeviceStage`."""
        program = self._programs[piece.first.task.setting].rounds[asking.round]
        return [
            self._answer(program, piece, block, asking)
            for block in split_piece(piece, [asking.found], [[]])
        ]

    def _answer(
        self, program: Program, piece: PieceInMemory, block: Block, asking: Asking
    ) -> BlockAnswer:
        """Return the answers of one block."""
        counted: list[Counted | None] = [None] * program.ranked

        def answer(index: int, values: Tensor) -> None:
            question = asking.questions[index]
            if question is not None:
                counted[index] = answer_block(question, values.numpy(), self._bench.masks)

        # A tensor is merged right after it is measured, and checked then; a whole model is not.
        check = self._plan.model_scope and not self._plan.keep_non_finite
        sinks = HostSinks(program, answer)
        self._run(program, piece, block, check=check, sinks=sinks)
        return BlockAnswer(tuple(counted), sinks.totals[0] if asking.totals else None)

    def settle(self, piece: PieceInMemory) -> list[Found]:
        """Find all that is asked about small tensors; see :class:`DeviceStage`."""
        programs = self._programs[piece.first.task.setting]
        if piece.numel == 0:
            return [found_of_nothing(programs)] * len(piece.parts)
        if len(programs.rounds) == 1 and not programs.rounds[0].totals:
            return self._rank_together(piece, programs)
        whole = split_piece(piece, [NOTHING] * len(piece.parts), [[] for _ in piece.parts])
        return [
            self._settle_one(piece, segment, programs)
            for block in whole
            for segment in _one_by_one(block)
        ]

    def _settle_one(self, piece: PieceInMemory, block: Block, programs: Programs) -> Found:
        """Go through all rounds of one tensor."""
        numel = block.end - block.begin
        if numel == 0:
            return found_of_nothing(programs)
        known = NOTHING
        for program, asked in zip(programs.rounds, programs.work.rounds, strict=True):
            ranks = asked.ranks(numel, known)
            tops: list[TopK] = []

            def rank(index: int, values: Tensor, ranks: Sequence[Rank] = ranks) -> None:
                wish = ranks[index]
                tops.append(select_block(values.numpy(), wish.k, wish.tie_policy))  # noqa: B023

            asking = replace(block, segments=tuple(_knowing(block.segments, known)))
            sinks = HostSinks(program, rank)
            self._run(program, piece, asking, check=False, sinks=sinks)
            totals = join_totals(program.totals, sinks.totals)
            answers = Answers(numel, totals, tuple(tops), known)
            known = known.joined(asked.concluded(answers))
        return known

    def _rank_together(self, piece: PieceInMemory, programs: Programs) -> list[Found]:
        """Find the ranks of several tensors, those of one size at once."""
        (asked,) = programs.work.rounds
        runs = _equal_runs(list(piece.ranges()))
        by_value: list[list[TopK]] = []

        def rank(index: int, values: Tensor) -> None:
            magnitudes = values.numpy()
            found: list[TopK] = []
            for begin, end, count in runs:
                rows = magnitudes[begin:end].reshape(count, -1)
                wish = asked.ranks(rows.shape[1], NOTHING)[index]
                if count < _LEAST_ROWS:
                    found += [select_block(each, wish.k, wish.tie_policy) for each in rows]
                else:
                    spare = self._bench.magnitudes
                    found += select_rows(rows, wish.k, wish.tie_policy, spare)
            by_value.append(found)

        (block,) = split_piece(piece, [NOTHING] * len(piece.parts), [[] for _ in piece.parts])
        sinks = HostSinks(programs.rounds[0], rank)
        self._run(programs.rounds[0], piece, block, check=False, sinks=sinks)
        return [
            asked.concluded(Answers(part.numel, (), tops, NOTHING))
            for part, tops in zip(piece.parts, zip(*by_value, strict=True), strict=True)
        ]

    def sample(self, piece: PieceInMemory, start: int, asking: Asking, out: NDArray[Any]) -> None:
        """Fill in values to be ranked; see :class:`DeviceStage`."""
        program = self._programs[piece.first.task.setting].rounds[asking.round]
        begin = start - piece.first.start
        end = begin + out.shape[1]
        part = piece.first
        block = part.task.scope_block + start // BLOCK
        segment = Segment(0, end - begin, part, start, block, asking.found, [])

        def keep(index: int, values: Tensor) -> None:
            out[index] = values.numpy()

        sinks = HostSinks(program, keep)
        self._run(program, piece, Block(begin, end, (segment,)), check=False, sinks=sinks)

    def _count_from_adapters(self, piece: PieceInMemory, block: Block, program: Program) -> int:
        """Return how many values that adapters make of the base are NaN or infinite."""
        numel = block.end - block.begin
        reader = BlockReader(
            self._bench, piece, block.begin, numel, block.segments, program=program, check=False
        )
        row = self._registers[0, :numel]
        read = reader.task_vector if program.uses(Op.TASK_VECTOR) else reader.source
        found = 0
        for source, deltas in enumerate(piece.deltas[self._bench.first_source :]):
            if deltas:
                read(source, row)
                found += _count_non_finite(row)
        return found


def bind_numbers(program: Program, found: Found) -> list[float]:
    """Return the numbers of a program for a tensor of which something is known."""
    return [
        found.numbers[each.index] if each.origin is Origin.FOUND else each.value
        for each in program.numbers
    ]


def count_kept_of(programs: Programs) -> int:
    """Return how many counts a merge keeps of what its trims, or random numbers, keep."""
    return max(len(programs.merge.trims), len(programs.merge.streams))


def _one_by_one(block: Block) -> Iterator[Block]:
    """Yield each tensor of a block as a block."""
    for segment in block.segments:
        own = replace(segment, begin=0, end=segment.end - segment.begin)
        yield Block(block.begin + segment.begin, block.begin + segment.end, (own,))


def _knowing(segments: Sequence[Segment], found: Found) -> Iterator[Segment]:
    for segment in segments:
        yield replace(segment, found=found)


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
