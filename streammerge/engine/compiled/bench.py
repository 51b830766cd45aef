"""What one worker has to run programs with: encoded programs, an array of jobs, memory.

Memory: :data:`CALLS` jobs of some hundred bytes, and what the largest program needs, two rows of 2 KiB
for each of its registers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.dtypes import DType
from streammerge.engine.compiled.operands import CALLS, PieceOperands, StoredOperand
from streammerge.engine.rows import KnownRows
from streammerge.engine.segments import Segment
from streammerge.methods.programs import Programs
from streammerge.methods.surveying import Survey
from streammerge.native.library import DTYPE_CODES, Kernels
from streammerge.native.machine import ALL_TIES, EncodedProgram, JobCall, Jobs, RoomCall
from streammerge.plan.demanding import count_rooms
from streammerge.plan.types import MergePlan
from streammerge.rng import keep_limit, stream_key
from streammerge.statistics import BLOCK
from streammerge.tiles.compiling import compile_result
from streammerge.tiles.program import Op, Origin, Program
from streammerge.tiles.writing import Sheet


@dataclass(frozen=True, slots=True)
class Draw:
    """One step that drops at random."""

    source: int
    """Whose random numbers decide, among the sources that are merged."""
    number: int
    """Index of the probability among the program's numbers; below 0 where a row has it."""


class Encoded:
    """A program, and what has to be said about its jobs."""

    def __init__(self, program: Program, *, sources: int, has_base: bool) -> None:
        """Encode it."""
        self.program = program
        self.code = EncodedProgram(program, sources=sources, has_base=has_base)
        self.loads_base = program.uses(Op.BASE, Op.TASK_VECTOR)
        self.subtracts = program.uses(Op.TASK_VECTOR)
        by_stream = {step.c: step.number for step in program.steps if step.op is Op.KEEP_RANDOM}
        self.draws = [Draw(source, by_stream[at]) for at, source in enumerate(program.streams)]


class Bench:
    """One worker's own; its users take turns."""

    def __init__(
        self,
        kernels: Kernels,
        plan: MergePlan,
        programs: Sequence[Programs],
        surveys: Sequence[Survey],
    ) -> None:
        """Encode all programs and allocate everything."""
        self.kernels = kernels
        self.plan = plan

        def encode(program: Program, of: Programs) -> Encoded:
            return Encoded(program, sources=of.sources, has_base=of.has_base)

        self.merges = [encode(each.merge, each) for each in programs]
        """Of every setting."""
        self.rounds = [[encode(program, each) for program in each.rounds] for each in programs]
        """``[settings][rounds]``."""
        self.row_rounds = [
            [encode(program, each) for program in each.row_rounds] for each in programs
        ]
        """``[settings][rounds about rows]``."""
        self.row_ranks = [
            None if each.row_ranks is None else encode(each.row_ranks, each) for each in programs
        ]
        """What offers the values that are ranked within rows, of every setting that has some."""
        self.surveys = [
            tuple(
                Encoded(program, sources=each.sources, has_base=each.has_base)
                for program in each.all
            )
            for each in surveys
        ]
        """What a report asks of every setting: its totals, and magnitudes; nothing without one."""
        one = compile_result(Sheet(1, has_base=False).values[0])
        self.conversion = Encoded(one, sources=1, has_base=False)
        """Stores what it loads."""
        asking = [each for rounds in (*self.rounds, *self.row_rounds) for each in rounds]
        every = [*self.merges, *asking, *(each for each in self.row_ranks if each is not None)]
        every += [each for pair in self.surveys for each in pair]
        codes = [each.code for each in (*every, self.conversion)]
        self.jobs = Jobs(codes, CALLS)
        most = max(each.memory_numel for each in codes)
        self._memory = np.empty(most, dtype=np.float32)
        width = max([BLOCK, *(task.row for task in plan.tasks)])
        rooms = count_rooms(programs)
        self.values: NDArray[np.float32] = np.empty(rooms * width, dtype=np.float32)
        """Where questions collect."""
        self._room = RoomCall(self.values.ctypes.data, self.values.size)
        self._numbers: list[NDArray[np.float32]] = []
        self._changes: PieceOperands | None = None

    def begin(self, operands: PieceOperands | None = None) -> None:
        """Forget the jobs before.

        Args:
            operands: Says what is to be computed before each of those that come; None for nothing.
        """
        self._numbers.clear()
        self._changes = operands

    def fill(
        self,
        index: int,
        encoded: Encoded,
        operands: Sequence[StoredOperand],
        *,
        begin: int,
        end: int,
        segment: Segment | None,
        rows: KnownRows | None = None,
        **places: Any,
    ) -> None:
        """Say what a job is about.

        Args:
            index: Which job.
            encoded: What it runs.
            operands: The models.
            begin: First element in the piece.
            end: End in the piece.
            segment: What it is of its tensor; None where programs do not care.
            rows: What is known of its rows, where that matters.
            places: Where results go; see :meth:`streammerge.native.machine.Jobs.fill`.
        """
        program, code = encoded.program, encoded.code
        if segment is not None and segment.found.made is not None:
            made = segment.found.made[segment.start :]
            place = made.ctypes.data - begin * made.itemsize
            operands = [*operands, StoredOperand(place, made.itemsize, DTYPE_CODES[DType.F32])]
        flat = [word for each in operands[: code.operands] for word in (each.at(begin), each.code)]
        numbers = None
        if segment is not None and (program.has_found_numbers or program.has_row_numbers):
            by_row = None if rows is None else rows.numbers
            own = code.numbers(segment.found.numbers, by_row)
            # It must live until the job has run.
            self._numbers.append(own)
            numbers = own.ctypes.data
        if self._changes is not None and self._changes.changes:
            changes = self._changes.changes
            places["changes"] = ctypes.addressof(changes), len(changes)
            places["start"] = self._changes.start + begin
        self.jobs.fill(
            index,
            code,
            flat,
            numel=end - begin,
            row_numel=None if rows is None else rows.numel,
            numbers=numbers,
            **places,
        )
        if segment is None:
            return
        for at, trim in enumerate(program.trims):
            top = segment.found.tops[trim]
            ties = top.ties_to_keep(segment.block)
            self.jobs.trim(
                index,
                at,
                top.threshold,
                ties=ALL_TIES if ties is None else ties,
                everything=top.greater == top.numel,
            )
        self._draw(index, encoded, segment)

    def _draw(self, index: int, encoded: Encoded, segment: Segment) -> None:
        if not encoded.draws:
            return
        found = segment.found.numbers
        numbers = [
            found[each.index] if each.origin is Origin.FOUND else each.value
            for each in encoded.program.numbers
        ]
        for at, draw in enumerate(encoded.draws):
            task = segment.part.task
            source = self.plan.settings[task.setting].sources[draw.source] - self.plan.has_base
            key = stream_key(self.plan.seed, source, task.name)
            density = numbers[draw.number] if draw.number >= 0 else 0.0
            limit = keep_limit(min(max(density, 0.0), 1.0))
            self.jobs.draw(index, at, key, start=segment.start, limit=limit)

    def run(self, first: int, count: int, *, collects: bool) -> tuple[int, int]:
        """Run jobs; return how many were done, and how many of them were refused."""
        room = self._room if collects else None
        refused = self.kernels.run(
            self.jobs.calls, first, count, memory=self._memory.ctypes.data, room=room
        )
        return (room.done if room is not None else count), refused

    def first_refused(self, count: int) -> int:
        """Return the first of the jobs that was refused."""
        return next(index for index, call in enumerate(self._calls(count)) if call.refused)

    def _calls(self, count: int) -> Sequence[JobCall]:
        return [self.jobs.calls[index] for index in range(count)]
