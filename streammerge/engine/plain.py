"""Pieces measured and merged block by block: programs run by the plain interpreter.

Blocks of 262,144 elements go from the slots through a worker's own scratch memory, small enough for
the core's cache, into the output slot.

Memory: per worker :func:`streammerge.plan.demanding.count_plain_rows` blocks in the compute dtype,
comparison masks, and one block's random words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streammerge.engine.asking import (
    Asking,
    BlockAnswer,
    join_answers,
)
from streammerge.engine.changing import ChangeWork
from streammerge.engine.device import Applied
from streammerge.engine.finite import (
    check_range,
    count_non_finite,
    count_stored,
    surely_in_range,
)
from streammerge.engine.gathering import make_whole
from streammerge.engine.pieces import PieceInMemory, Stored, torch_dtype
from streammerge.engine.plain_surveying import PlainSurveys
from streammerge.engine.reading import Bench, BlockReader
from streammerge.engine.rows import (
    KnownRows,
    Run,
    iter_covering,
    iter_measuring,
    iter_merging,
    make_relative,
    memory_of,
    rank_rows,
)
from streammerge.engine.segments import (
    Block,
    block_of,
    equal_runs,
    knowing,
    one_by_one,
    split_piece,
)
from streammerge.lazily import torch
from streammerge.methods.base import MergeMethod
from streammerge.methods.programs import Programs, found_of_nothing
from streammerge.plan.demanding import count_plain_rows
from streammerge.plan.sweeps import programs_of_plan, surveys_of_plan
from streammerge.plan.types import MergePlan
from streammerge.statistics import BLOCK
from streammerge.statistics.magnitude import Counted, SampleRun, answer_block
from streammerge.statistics.rounds import NOTHING, Answers, Found, Rank, RowAnswers
from streammerge.statistics.selecting import select_block, select_rows
from streammerge.statistics.surveying import Surveyed
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
        surveys = surveys_of_plan(plan, self._programs)
        rows = count_plain_rows(self._programs, surveys)
        width = max([BLOCK, *(task.row for task in plan.tasks)])
        memory = torch.empty(rows * width, dtype=torch_dtype(plan.compute_dtype)).view(rows, width)
        masks = np.empty((2, width), dtype=np.bool_)
        self._bench = Bench(plan, ChangeWork(plan), memory[0], memory[1], masks)
        self._registers = memory[2:]
        self._tells = method.random or plan.model_scope
        self._surveys = PlainSurveys(self._bench, self._registers, surveys)

    @property
    def bench(self) -> Bench:
        """What blocks are read with."""
        return self._bench

    def apply(self, piece: PieceInMemory, found: Sequence[Found], out: Stored) -> list[Applied]:
        """Merge a piece; see :class:`DeviceStage`."""
        programs = self._programs[piece.first.task.setting]
        kept = [[0] * count_kept_of(programs) for _ in piece.parts]
        if piece.first.task.row:
            not_finite = self._merge_rows(piece, found[0], kept[0], out)
            return [Applied(not_finite, self.told(programs, kept[0]))]
        blocks = split_piece(piece, found, kept)
        not_finite = sum(self.merge(piece, block, out) for block in blocks)
        # Values that are not finite are only let through, and counted, in pieces of one part.
        return [Applied(not_finite, self.told(programs, counts)) for counts in kept]

    def told(self, programs: Programs, counts: Sequence[int]) -> tuple[int, ...]:
        """Return what the manifest says about what was kept of a part."""
        return programs.kept(counts) if self._tells else ()

    def _merge_rows(self, piece: PieceInMemory, found: Found, kept: list[int], out: Stored) -> int:
        """Merge a piece whose rows must be seen whole; return how many values are not finite."""
        wide = piece.in_rows()
        result = out.tensor()
        not_finite = 0
        for run in iter_merging(piece):
            block = block_of(wide, run, found, kept)
            # What two pieces have a part of is counted once.
            counts = self._tells and run.own
            not_finite += self._count_not_finite(wide, block) if run.own else 0
            merged = self._merge_block(wide, block, out, count=counts)
            begin, end = max(run.begin, piece.before), min(run.end, piece.before + piece.numel)
            own = merged[begin - run.begin : end - run.begin]
            result[begin - piece.before : end - piece.before].copy_(own)
        return not_finite

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
            return sum(self._merge_whole(piece, each, out) for each in one_by_one(block))
        return self._merge_whole(piece, block, out)

    def _merge_whole(self, piece: PieceInMemory, block: Block, out: Stored) -> int:
        not_finite = self._count_not_finite(piece, block)
        merged = self._merge_block(piece, block, out, count=self._tells)
        if self._plan.keep_non_finite and self._in_turn[piece.first.task.setting]:
            # The operands are never there by themselves.
            not_finite += count_non_finite(merged)
        out.tensor()[block.begin : block.end].copy_(merged)
        return not_finite

    def _count_not_finite(self, piece: PieceInMemory, block: Block) -> int:
        """Return how many values of a block are NaN or infinite, where they are let through."""
        if not self._plan.keep_non_finite:
            return 0
        setting = piece.first.task.setting
        found = count_stored(piece, block.begin, block.end)
        if piece.deltas and not self._in_turn[setting]:
            found += self._count_from_adapters(piece, block, self._programs[setting].merge)
        return found

    def _merge_block(
        self, piece: PieceInMemory, block: Block, out: Stored, *, count: bool
    ) -> Tensor:
        """Return a block's result, which is good until the next one's."""
        programs = self._programs[piece.first.task.setting]
        keep, sums = self._plan.keep_non_finite, self._method.sums
        check = not keep and not sums
        known = self._know_rows(programs, piece, block, check=check) if programs.by_rows else None
        merged = self._run(programs.merge, piece, block, check=check, count=count, rows=known)
        assert merged is not None  # noqa: S101 - a merge stores
        if not keep and not surely_in_range(merged, out.dtype):
            # A sum tells that something is not finite; only its operands tell what.
            if sums:
                merged = self._run(programs.merge, piece, block, check=True)
                assert merged is not None  # noqa: S101 - a merge stores
            check_range(merged.numpy(), piece, block.begin)
        return merged

    def _know_rows(
        self, programs: Programs, piece: PieceInMemory, block: Block, *, check: bool
    ) -> KnownRows:
        """Find what the method asks about each row of a block of whole rows."""
        row = piece.first.task.row
        count = (block.end - block.begin) // row
        segment = block.segments[0]
        first, memory = segment.start // row, segment.found.rows
        known = KnownRows(row, np.zeros((count, 0)))
        remembered = None if memory is None else memory.recall(first, count)
        if remembered is not None:
            known = replace(known, numbers=remembered)
        else:
            known = self._ask_rows(programs, piece, block, known, check=check)
            if memory is not None:
                memory.remember(first, known.numbers)
        if programs.row_ranks is None:
            return known
        computed: list[NDArray[Any]] = []

        def rank(_index: int, values: Tensor) -> None:
            ranks = rank_rows(values.numpy().reshape(count, row))
            make_relative(ranks)
            computed.append(ranks.flatten())

        sinks = HostSinks(programs.row_ranks, rank, rows=count)
        self._run(programs.row_ranks, piece, block, check=check, rows=known, sinks=sinks)
        return replace(known, computed=tuple(computed))

    def _ask_rows(
        self,
        programs: Programs,
        piece: PieceInMemory,
        block: Block,
        known: KnownRows,
        *,
        check: bool,
    ) -> KnownRows:
        """Go through all rounds about the rows of a block."""
        for program, asked in zip(programs.row_rounds, programs.work.row_rounds, strict=True):
            sinks = HostSinks(program, _no_ranks, rows=len(known.numbers))
            self._run(program, piece, block, check=check, rows=known, sinks=sinks)
            found = asked.concluded(RowAnswers(known.numel, sinks.totals, known.numbers))
            known = replace(known, numbers=np.concatenate([known.numbers, found], axis=1))
        return known

    def _run(
        self,
        program: Program,
        piece: PieceInMemory,
        block: Block,
        *,
        check: bool,
        count: bool = False,
        sinks: HostSinks | None = None,
        rows: KnownRows | None = None,
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
            rows=rows,
        )
        return run_program(
            program,
            reader,
            numbers=bind_numbers(program, block.segments[0].found, rows),
            memory=self._registers[:, :numel],
            row_numel=numel if rows is None else rows.numel,
            sinks=sinks,
        )

    def survey(self, piece: PieceInMemory, found: Sequence[Found], out: Stored) -> list[Surveyed]:
        """Return what a report knows of a piece; see :class:`DeviceStage`."""
        return self._surveys.survey(piece, found, out)

    def convert(self, piece: PieceInMemory, out: Stored) -> Applied:
        """Convert the values of a piece; see :class:`DeviceStage`."""
        stored = next(each.tensor() for each in piece.inputs if each is not None)
        converted = out.tensor()
        not_finite = 0
        for begin in range(0, piece.numel, BLOCK):
            end = min(begin + BLOCK, piece.numel)
            values = self._bench.base[: end - begin].copy_(stored[begin:end])
            if self._plan.keep_non_finite:
                not_finite += count_stored(piece, begin, end)
            elif not surely_in_range(values, out.dtype):
                check_range(values.numpy(), piece, begin)
            converted[begin:end].copy_(stored[begin:end])
        return Applied(not_finite, ())

    def measure(self, piece: PieceInMemory, asking: Asking) -> Iterator[BlockAnswer]:
        """Answer questions about a piece; see :class:`DeviceStage`."""
        programs = self._programs[piece.first.task.setting]
        program = programs.rounds[asking.round]
        if piece.first.task.row:
            wide = piece.in_rows()
            for runs in iter_measuring(piece):
                blocks = [block_of(wide, run, asking.found, []) for run in runs]
                answers = [self._answer(program, wide, block, asking) for block in blocks]
                yield join_answers(program.totals, answers, asking)
            return
        for block in split_piece(piece, [asking.found], [[]]):
            yield self._answer(program, piece, block, asking)

    def _answer(
        self, program: Program, piece: PieceInMemory, block: Block, asking: Asking
    ) -> BlockAnswer:
        """Return the answers of one block."""
        counted: list[Counted | None] = [None] * program.ranked
        programs = self._programs[piece.first.task.setting]

        def answer(index: int, values: Tensor) -> None:
            question = asking.questions[index]
            if question is not None:
                counted[index] = answer_block(question, values.numpy(), self._bench.masks)

        check = checks_operands(self._plan, program)
        known = self._know_rows(programs, piece, block, check=check) if programs.by_rows else None
        count = 1 if known is None else len(known.numbers)
        sinks = HostSinks(program, answer, rows=count)
        self._run(program, piece, block, check=check, sinks=sinks, rows=known)
        totals = np.array(join_totals(program.totals, sinks.totals))
        return BlockAnswer(tuple(counted), totals if asking.totals else None)

    def gather(self, piece: PieceInMemory, out: NDArray[Any]) -> None:
        """Fill in vectors; see :class:`DeviceStage`."""
        programs = self._programs[piece.first.task.setting]
        check = not self._plan.keep_non_finite
        for block in split_piece(piece, [NOTHING], [[]]):
            reader = BlockReader(
                self._bench,
                piece,
                block.begin,
                block.end - block.begin,
                block.segments,
                program=programs.merge,
                check=check,
            )
            read = reader.task_vector if programs.merge.uses(Op.BASE) else reader.source
            for source, row in enumerate(torch.from_numpy(out).unbind()):
                read(source, row[block.begin : block.end])

    def settle(self, piece: PieceInMemory) -> list[Found]:
        """Find all that is asked about small tensors; see :class:`DeviceStage`."""
        programs = self._programs[piece.first.task.setting]
        if piece.numel == 0:
            return [found_of_nothing(programs)] * len(piece.parts)
        if programs.work.whole is not None:
            vectors = np.empty((programs.sources, piece.numel), dtype=self._registers.numpy().dtype)
            self.gather(piece, vectors)
            return [make_whole(programs.work, vectors, piece.first.task.shape)]
        if len(programs.rounds) == 1 and not programs.rounds[0].totals and not programs.by_rows:
            return self._rank_together(piece, programs)
        whole = split_piece(piece, [NOTHING] * len(piece.parts), [[] for _ in piece.parts])
        return [
            self._settle_one(piece, segment, programs)
            for block in whole
            for segment in one_by_one(block)
        ]

    def _settle_one(self, piece: PieceInMemory, block: Block, programs: Programs) -> Found:
        """Go through all rounds of one tensor."""
        numel = block.end - block.begin
        if numel == 0:
            return found_of_nothing(programs)
        known = replace(NOTHING, rows=memory_of(programs, piece.first.task))
        by_rows = programs.by_rows
        for program, asked in zip(programs.rounds, programs.work.rounds, strict=True):
            ranks = asked.ranks(numel, known)
            tops: list[TopK] = []

            def rank(index: int, values: Tensor, ranks: Sequence[Rank] = ranks) -> None:
                tops.append(_select(values.numpy(), ranks[index]))  # noqa: B023

            asking = replace(block, segments=tuple(knowing(block.segments, known)))
            check = checks_operands(self._plan, program)
            rows = self._know_rows(programs, piece, asking, check=check) if by_rows else None
            sinks = HostSinks(program, rank, rows=1 if rows is None else len(rows.numbers))
            self._run(program, piece, asking, check=check, sinks=sinks, rows=rows)
            totals = join_totals(program.totals, sinks.totals)
            answers = Answers(numel, totals, tuple(tops), known)
            known = known.joined(asked.concluded(answers))
        return known

    def _rank_together(self, piece: PieceInMemory, programs: Programs) -> list[Found]:
        """Find the ranks of several tensors, those of one size at once."""
        (asked,) = programs.work.rounds
        runs = equal_runs(list(piece.ranges()))
        by_value: list[list[TopK]] = []

        def rank(index: int, values: Tensor) -> None:
            magnitudes = values.numpy()
            found: list[TopK] = []
            for begin, end, count in runs:
                rows = magnitudes[begin:end].reshape(count, -1)
                wish = asked.ranks(rows.shape[1], NOTHING)[index]
                if count < _LEAST_ROWS:
                    found += [_select(each, wish) for each in rows]
                else:
                    spare = self._bench.magnitudes
                    found += select_rows(
                        rows, wish.k, wish.tie_policy, spare, of_value=wish.of_value
                    )
            by_value.append(found)

        (block,) = split_piece(piece, [NOTHING] * len(piece.parts), [[] for _ in piece.parts])
        sinks = HostSinks(programs.rounds[0], rank)
        self._run(programs.rounds[0], piece, block, check=False, sinks=sinks)
        return [
            asked.concluded(Answers(part.numel, (), tops, NOTHING))
            for part, tops in zip(piece.parts, zip(*by_value, strict=True), strict=True)
        ]

    def sample(
        self, piece: PieceInMemory, runs: Sequence[SampleRun], asking: Asking, out: NDArray[Any]
    ) -> None:
        """Fill in values to be ranked; see :class:`DeviceStage`."""
        filled = 0
        for start, count in runs:
            self._sample_run(piece, start, asking, out[:, filled : filled + count])
            filled += count

    def _sample_run(
        self, piece: PieceInMemory, start: int, asking: Asking, out: NDArray[Any]
    ) -> None:
        begin = start - piece.first.start
        end = begin + out.shape[1]
        if not self._programs[piece.first.task.setting].by_rows:
            self._sample_block(piece, Run(begin, end, own=True), slice(None), asking, out)
            return
        for run, within, part in iter_covering(piece, begin, end):
            self._sample_block(piece.in_rows(), run, within, asking, out[:, part])

    def _sample_block(
        self, piece: PieceInMemory, run: Run, within: slice, asking: Asking, out: NDArray[Any]
    ) -> None:
        """Fill in a part of what is asked about a block."""
        programs = self._programs[piece.first.task.setting]
        program = programs.rounds[asking.round]
        block = block_of(piece, run, asking.found, [])
        known = self._know_rows(programs, piece, block, check=False) if programs.by_rows else None

        def keep(index: int, values: Tensor) -> None:
            out[index] = values.numpy()[within]

        sinks = HostSinks(program, keep, rows=1 if known is None else len(known.numbers))
        self._run(program, piece, block, check=False, sinks=sinks, rows=known)

    def _count_from_adapters(self, piece: PieceInMemory, block: Block, program: Program) -> int:
        """Return how many values that adapters make of the base are NaN or infinite."""
        numel = block.end - block.begin
        reader = BlockReader(
            self._bench, piece, block.begin, numel, block.segments, program=program, check=False
        )
        row = self._registers[0, :numel]
        read = reader.task_vector if program.uses(Op.TASK_VECTOR) else reader.source
        found = 0
        for source, model in enumerate(self._plan.settings[piece.first.task.setting].sources):
            if piece.deltas[model]:
                read(source, row)
                found += count_non_finite(row)
        return found


def checks_operands(plan: MergePlan, program: Program) -> bool:
    """Return whether what a round's program loads must be finite, or else is an error there and then.

    A tensor is merged right after it is measured, and checked then; a whole model is not. And what
    its totals come to spoils every block, of which most have nothing that could be named.
    """
    return not plan.keep_non_finite and (plan.model_scope or bool(program.totals))


def bind_numbers(
    program: Program, found: Found, rows: KnownRows | None = None
) -> list[float | NDArray[np.float64]]:
    """Return the numbers of a program for a tensor, or some of its rows, of which something is known."""
    numbers: list[float | NDArray[np.float64]] = []
    for each in program.numbers:
        if each.origin is Origin.ROW:
            assert rows is not None  # noqa: S101 - only methods that ask about rows have them
            numbers.append(rows.numbers[:, each.index])
        else:
            is_found = each.origin is Origin.FOUND
            numbers.append(found.numbers[each.index] if is_found else each.value)
    return numbers


def _select(magnitudes: NDArray[Any], wish: Rank) -> TopK:
    return select_block(magnitudes, wish.k, wish.tie_policy, of_value=wish.of_value)


def count_kept_of(programs: Programs) -> int:
    """Return how many counts a merge keeps: of its trims, or of random numbers where it has none."""
    return len(programs.merge.trims) or len(programs.merge.streams)


def _no_ranks(index: int, values: Tensor) -> None:
    raise AssertionError(f"value {index} of {values.shape} is not asked for")
