"""Steps of one worker through fused kernels: what depends on the tensor, and where ranks cut.

What is the same for a whole piece (numbers, thresholds, keys, limits) is copied in with it, as one
row of constants per program. Only where a trim keeps some ties of a block and drops the others does
something depend on the step: the last tie that is kept is looked for in that block alone, in the values
that the round has ranked, so by the same kernel.

Memory: the numbers of a piece, on the device and page-locked, and the factors of one tensor.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from streammerge.dtypes import DType
from streammerge.engine.accelerator.fused.factors import FactorRoom
from streammerge.engine.accelerator.fused.functions import add_up
from streammerge.engine.accelerator.fused.kernels import kernel_of, launch
from streammerge.engine.accelerator.fused.selecting import add_answers_, write_question
from streammerge.engine.accelerator.fused.writing import Kind
from streammerge.engine.accelerator.ring import Ring, Step
from streammerge.engine.pieces import PieceInMemory, torch_dtype
from streammerge.lazily import torch
from streammerge.methods.programs import Programs
from streammerge.plan.types import MergePlan
from streammerge.rng import keep_limit, stream_key
from streammerge.statistics import BLOCK, count_blocks
from streammerge.statistics.in_tensors import ASKED
from streammerge.statistics.magnitude import Question
from streammerge.statistics.rounds import Found
from streammerge.statistics.topk import TopK
from streammerge.tiles.fusing import Layout, sink_rows
from streammerge.tiles.program import Number, Op, Origin, Program

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.engine.accelerator.rows import RowsThere

_ALL, _NONE = 2**62, -1
"""Last ties where all are kept, and where none is."""
_UNROLL = 32
"""Elements per running sum of a total that are loaded at once."""
_LEAST_WARPS, _MOST_WARPS = 4, 16
"""Of a program instance: 16 elements per thread, or fewer."""
_ROWS_AT_ONCE = 6
"""Rows of 16 elements per thread for which its 255 registers do, beside what steps need."""


class FusedSteps:
    """Runs the programs of one piece after the other, step by step."""

    def __init__(self, plan: MergePlan, ring: Ring, tile: int) -> None:
        """Prepare to run.

        Args:
            plan: The plan.
            ring: The worker's memory.
            tile: Elements per program instance; a power of two.
        """
        self._plan = plan
        self._ring = ring
        self._tile = tile
        self._factors = FactorRoom(ring)
        self._kernels: dict[tuple[Any, ...], Any] = {}

    def begin(
        self,
        piece: PieceInMemory,
        programs: Programs,
        program: Program,
        found: Found,
        questions: Sequence[Question | None],
        *,
        also: Sequence[Program] = (),
    ) -> None:
        """Bring what steps of a piece need; nothing may be in flight.

        Args:
            piece: The piece, of one part.
            programs: What is done to its tensor.
            program: Which of that now.
            found: What is known of the tensor.
            questions: What is asked of each value that the program ranks.
            also: What else is done now.
        """
        self._piece, self._programs, self._found = piece, programs, found
        self._setting = self._plan.settings[piece.first.task.setting]
        self._products = self._factors.bring(piece, self._setting.sources)
        first = piece.first.task.scope_block + piece.first.start // BLOCK
        inside = range(first, first + count_blocks(piece.numel))
        needed = _ranks_before(programs, program)
        self._cuts = {
            rank: found.tops[rank].cutoff_block - first
            for rank in needed
            if found.tops[rank].cutoff_block in inside and found.tops[rank].cutoff_ties
        }
        self._places: dict[int, int] = {}
        # First of all, so that they begin aligned.
        written = [number for question in questions for number in write_question(question)]
        for each in (program, *also, *(self._round_of(rank)[0] for rank in self._cuts)):
            if id(each) not in self._places:
                self._places[id(each)] = len(written)
                written += self._constants_of(each)
        self._ring.bring_constants(written)
        # Where the last one is looked for, those before it are kept until it has been found.
        behind = {rank: found.tops[rank].cutoff_block >= first for rank in needed}
        self._ring.run(lambda: self._set_lasts(behind))

    def _set_lasts(self, keep: dict[int, bool]) -> None:
        for rank, keeps in keep.items():
            self._ring.lasts[rank].fill_(_ALL if keeps else _NONE)

    def _round_of(self, rank: int) -> tuple[Program, int]:
        """Return the round that ranked something, and which of its values that was."""
        for program in self._programs.rounds:
            if rank < program.ranked:
                return program, rank
            rank -= program.ranked
        raise AssertionError("a rank of no round")

    def _constants_of(self, program: Program) -> list[int]:
        """Return a program's constants, as :class:`Layout` has them."""
        piece, plan = self._piece, self._plan
        numbers = [_number_of_all(each, self._found) for each in program.numbers]
        written = [_bits(number) for number in numbers]
        written.append(piece.first.start)
        written += [_bits(_threshold(self._found.tops[rank])) for rank in program.trims]
        for own in program.streams:
            source = self._setting.sources[own] - plan.has_base
            key = stream_key(plan.seed, source, piece.first.task.name)
            written += [_signed(key), _signed(key >> 64)]
        drawn = (step for step in program.steps if step.op is Op.KEEP_RANDOM)
        # With probabilities of single elements there is none for all.
        probabilities = {step.c: 0.0 if step.b >= 0 else numbers[step.number] for step in drawn}
        for stream in range(len(program.streams)):
            written += _limits(probabilities[stream])
        products = [product for own in self._products for product in own]
        for product in products:
            written += product.numbers
        assert len(written) == Layout(program, len(products)).size  # noqa: S101 - its twin
        return written

    def merge(
        self,
        program: Program,
        step: Step,
        *,
        checked: bool,
        count: bool,
        rows: RowsThere | None = None,
    ) -> None:
        """Enqueue the merge of a step, whose result goes where the step says."""
        self._find_lasts(step)
        made = self._piece.first.task.made_dtype
        kernel = self._kernel(program, made, checked=checked, count=count)
        self._launch(kernel, program, step, _as_integers(step.out.view(torch_dtype(made))), rows)

    def measure(
        self, program: Program, step: Step, *, checked: bool, rows: RowsThere | None = None
    ) -> list[SinkRows]:
        """Enqueue a round's program on a step; return the rows that its sinks are about."""
        self._find_lasts(step)
        kernel = self._kernel(program, None, checked=checked, count=False)
        self._launch(kernel, program, step, self._ring.rows.view(-1), rows)
        return self._rows_of(program, step.numel)

    def _rows_of(self, program: Program, numel: int) -> list[SinkRows]:
        rows = self._ring.rows[:, :numel]
        return [
            SinkRows(
                program.steps[index].op,
                program.steps[index].out,
                rows[a],
                None if b is None else rows[b],
            )
            for index, (a, b) in sink_rows(program).items()
        ]

    def rank(self, index: int, question: Question, row: Tensor, first_block: int) -> None:
        """Enqueue the answers about a ranked row ``[m]`` whose first block is that of the piece."""
        asked = self._ring.constants.device[index * ASKED :]
        answers = self._ring.answers[index]
        add_answers_(answers, question, asked, row, first_block, tile=self._tile)

    @staticmethod
    def total(op: Op, a: Tensor, b: Tensor | None, column: Tensor, length: int = BLOCK) -> None:
        """Enqueue the totals of blocks, or of rows, of a length, to ``[blocks]`` float64, in the CPU's order."""
        other = a if b is None else b
        blocks, stride = -(-a.numel() // length), column.stride(0)
        products = op is Op.DOT
        launch(
            add_up, blocks, a, other, column, stride, a.numel(), length, products, _UNROLL, warps=1
        )

    def _kernel(self, program: Program, made: DType | None, *, checked: bool, count: bool) -> Any:
        piece, plan, setting = self._piece, self._plan, self._setting
        stored = tuple(None if each is None else each.dtype for each in piece.inputs)
        products = tuple(tuple(each.kind for each in own) for own in self._products)
        key = id(program), made, stored, products, checked, count
        if key not in self._kernels:
            self._kernels[key] = kernel_of(
                Kind(
                    program,
                    stored[setting.models[0]] if setting.has_base else None,
                    tuple(stored[model] for model in setting.sources),
                    plan.compute_dtype,
                    made,
                    models=len(plan.models),
                    has_base=setting.has_base,
                    counts=count,
                    notes=checked,
                    products=products,
                )
            )
        return self._kernels[key]

    def _launch(
        self,
        kernel: Any,
        program: Program,
        step: Step,
        out: Tensor,
        rows: RowsThere | None = None,
    ) -> None:
        ring, setting = self._ring, self._setting
        base = step.inputs[setting.models[0]] if setting.has_base else None
        stored = (base, *(step.inputs[model] for model in setting.sources))
        # What nothing reads needs an address all the same.
        models = [out if each is None else _as_integers(each) for each in stored]
        factors = [side for own in self._products for each in own for side in each.sides]
        notes = ring.notes.device.view(-1, ring.shape.notes)[step.index]
        launch(
            kernel,
            -(-step.numel // self._tile),
            *models,
            *factors,
            out,
            ring.constants.device[self._places[id(program)] :],
            ring.lasts,
            notes.view(torch.int32 if notes.itemsize == 4 else torch.int64),
            ring.counts.device,
            *self._row_arguments(rows),
            step.begin,
            step.numel,
            ring.rows.shape[1],
            self._tile,
            warps=count_warps(program),
        )

    def _row_arguments(self, rows: RowsThere | None) -> tuple[Any, ...]:
        if rows is None:
            return (self._ring.rows, self._ring.row_numbers.device, 16, 16)
        return (rows.computed, rows.numbers, rows.numel, rows.known)

    def _find_lasts(self, step: Step) -> None:
        """Enqueue searches for the last ties that are kept, where they lie in this step.

        Ranks come in the order in which they were found, for which earlier ones were known.
        """
        first = step.begin // BLOCK
        for rank, block in self._cuts.items():
            if first <= block < first + count_blocks(step.numel):
                self._find_last(rank, self._found.tops[rank], block * BLOCK, step)

    def _find_last(self, rank: int, top: TopK, begin: int, step: Step) -> None:
        """Find one of them in the block of the piece that begins there."""
        program, own = self._round_of(rank)
        first = begin - step.begin
        end = min(first + BLOCK, step.numel)
        inputs = tuple(None if each is None else each[first:end] for each in step.inputs)
        alone = Step(step.index, begin, end - first, inputs, step.out)
        # Nothing is to be noted here that the step itself does not note.
        kernel = self._kernel(program, None, checked=False, count=False)
        self._launch(kernel, program, alone, self._ring.rows.view(-1))
        (row,) = (
            each.a
            for each in self._rows_of(program, alone.numel)
            if each.op is Op.RANK and each.index == own
        )
        seen = torch.cumsum(row == top.threshold, dim=0, dtype=torch.int32)
        self._ring.lasts[rank].copy_((seen < top.cutoff_ties).sum()).add_(begin)


def count_warps(program: Program) -> int:
    """Return how many warps share a tile: more where many rows are alive, which must fit registers."""
    warps = _LEAST_WARPS
    while warps < _MOST_WARPS and program.registers * _LEAST_WARPS > _ROWS_AT_ONCE * warps:
        warps *= 2
    return warps


def _as_integers(stored: Tensor) -> Tensor:
    """Return bfloat16 as patterns, which is how kernels read and write it."""
    return stored.view(torch.int16) if stored.dtype == torch.bfloat16 else stored


class SinkRows:
    """What one sink of a round is about."""

    __slots__ = ("a", "b", "index", "op")

    def __init__(self, op: Op, index: int, a: Tensor, b: Tensor | None) -> None:
        """Take rows ``[m]``; the second one of sinks that are about two."""
        self.op, self.index, self.a, self.b = op, index, a, b


def _ranks_before(programs: Programs, program: Program) -> list[int]:
    """Return the ranks that a program trims by, and those that these were ranked after, in order."""
    wanted = set(program.trims)
    first = sum(each.ranked for each in programs.rounds)
    for each in reversed(programs.rounds):
        first -= each.ranked
        if any(first <= rank < first + each.ranked for rank in wanted):
            wanted |= set(each.trims)
    return sorted(wanted)


def _number_of_all(number: Number, found: Found) -> float:
    """Return a number that all elements share; 0 for those of single rows, which come by themselves."""
    match number.origin:
        case Origin.CONSTANT:
            return number.value
        case Origin.FOUND:
            return found.numbers[number.index]
        case Origin.ROW:
            return 0.0


def _threshold(top: TopK) -> float:
    """Return what magnitudes are compared with; below 0 where all of them are kept."""
    return -1.0 if top.greater == top.numel else top.threshold


def _limits(probability: float) -> list[int]:
    """Return what the upper and the lower lane are compared with; -1 where all is dropped."""
    if probability <= 0:
        return [-1, 0]
    return list(divmod(keep_limit(min(probability, 1.0)), 2**16))


def _bits(number: float) -> int:
    """Return the pattern of a float64 as a signed integer."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _signed(word: int) -> int:
    """Return the signed integer with the low 64 bits of a number."""
    return int(np.uint64(word & 2**64 - 1).astype(np.int64))
