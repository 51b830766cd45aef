"""Programs and jobs as the compiled machine reads them; machine.h has the twins of all that is here.

A program is encoded once. A job says where one run of it finds and leaves what; jobs lie in arrays that
are made once and filled again and again: small tensors come by the hundred thousand, so that filling
one may cost a few microseconds and no more.

Memory: about 100 bytes per job, and for each 16 per operand, 24 per trim, 40 per stream of random
numbers, 128 per ranked value; and 40 bytes per step of an encoded program.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.tiles.program import SINKS, Op, Origin, Program, Step, Vote

ROW_NUMEL = 528
"""``ROW`` of block.h: numbers from one row of a tile to the next."""
MOST_CROWDS = 4
"""Crowded values that a band takes."""
TILE_COLUMNS = 64
"""``BROAD`` of product.h: columns of a factor's tile."""
CRAMMED = -1
"""As :attr:`AskedCall.collected`: there was not room enough."""
ALL_TIES = 2**63 - 1
"""As the ties of a trim: all are kept."""
_SUMS = 16
"""``SUMS`` of totals.h: float64 sums per total."""
_LINE = 64
"""Bytes of a line of the cache, to which each part of a run's memory is aligned."""
_PLACE_NBYTES = 16
"""``place`` of asking.h."""
_BY_FREQUENCY, _DIVIDES = 1, 2
_LOADS = frozenset({Op.BASE, Op.SOURCE, Op.TASK_VECTOR, Op.COMPUTED})
_LOADS_BASE, _USES_BASE, _HAS_ROW_NUMBERS = 1, 2, 4


class StepCall(ctypes.Structure):
    """``sm_step`` of machine.h."""

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in ("op", "out", "a", "b", "c", "number", "first_row", "n_rows", "flags")
    )


class ProgramCall(ctypes.Structure):
    """``sm_program`` of machine.h."""

    _fields_ = (
        ("steps", ctypes.POINTER(StepCall)),
        ("rows", ctypes.POINTER(ctypes.c_int32)),
        ("n_steps", ctypes.c_int32),
        ("n_rows", ctypes.c_int32),
        ("n_registers", ctypes.c_int32),
        ("n_numbers", ctypes.c_int32),
        ("n_trims", ctypes.c_int32),
        ("n_streams", ctypes.c_int32),
        ("n_totals", ctypes.c_int32),
        ("n_ranked", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class OperandCall(ctypes.Structure):
    """``sm_operand`` of machine.h."""

    _fields_ = (("values", ctypes.c_void_p), ("dtype", ctypes.c_int64))


class TrimCall(ctypes.Structure):
    """``sm_trim`` of machine.h."""

    _fields_ = (
        ("ties", ctypes.c_int64),
        ("kept", ctypes.c_int64),
        ("threshold", ctypes.c_float),
        ("everything", ctypes.c_int32),
    )


class StreamCall(ctypes.Structure):
    """``sm_stream`` of machine.h."""

    _fields_ = (
        ("start", ctypes.c_int64),
        ("key", ctypes.c_uint64 * 2),
        ("limit", ctypes.c_uint64),
        ("kept", ctypes.c_int64),
    )


class Asked(IntEnum):
    """What is asked about a ranked value."""

    NOTHING = 0
    """What only this value needs is not computed."""
    BAND = 1
    """How many lie above an interval, how many are crowded in it, and which others are inside."""
    BINS = 2
    """How many lie above an interval, and a histogram of what is inside."""
    KEEP = 3
    """All of them, in order."""
    SELECT = 4
    """The k-th largest, how many are larger, and how many as large."""


class AskedCall(ctypes.Structure):
    """``sm_asked`` of machine.h."""

    _fields_ = (
        ("histogram", ctypes.c_void_p),
        ("k", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("collected", ctypes.c_int64),
        ("above", ctypes.c_int64),
        ("equal", ctypes.c_int64),
        ("crowds", ctypes.c_int64 * MOST_CROWDS),
        ("crowded", ctypes.c_int32 * MOST_CROWDS),
        ("n_crowded", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("low", ctypes.c_int32),
        ("high", ctypes.c_int32),
        ("shift", ctypes.c_int32),
        ("largest", ctypes.c_int32),
        ("threshold", ctypes.c_float),
        ("unused", ctypes.c_int32),
    )


class ChangeCall(ctypes.Structure):
    """``sm_change`` of machine.h."""

    _fields_ = (
        ("up", ctypes.c_void_p),
        ("tiles", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("scaling", ctypes.c_float),
        ("adds", ctypes.c_int32),
    )


class JobCall(ctypes.Structure):
    """``sm_job`` of machine.h."""

    _fields_ = (
        ("program", ctypes.c_void_p),
        ("operands", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("numbers", ctypes.c_void_p),
        ("trims", ctypes.c_void_p),
        ("streams", ctypes.c_void_p),
        ("asked", ctypes.c_void_p),
        ("totals", ctypes.c_void_p),
        ("changes", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("row_numel", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("limit", ctypes.c_float),
        ("out_dtype", ctypes.c_int32),
        ("refused", ctypes.c_int32),
        ("n_changes", ctypes.c_int32),
    )


class RoomCall(ctypes.Structure):
    """``sm_room`` of machine.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("used", ctypes.c_int64),
        ("done", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


def list_sizes() -> list[int]:
    """Return what ``sm_machine_size_of`` of machine.c must answer."""
    calls = (
        StepCall, ProgramCall, OperandCall, TrimCall, StreamCall, AskedCall, ChangeCall, JobCall,
        RoomCall,
    )  # fmt: skip
    sizes = map(ctypes.sizeof, calls)
    return [*sizes, _PLACE_NBYTES, ROW_NUMEL, MOST_CROWDS, _SUMS, TILE_COLUMNS]


class EncodedProgram:
    """A program that the compiled machine can run."""

    def __init__(self, program: Program, *, sources: int, has_base: bool) -> None:
        """Encode a program.

        Args:
            program: The program.
            sources: Number of sources of the merge.
            has_base: Whether it has a base.

        Raises:
            ValueError: The machine has no such step: what adapters change is not for it.
        """
        if program.uses(Op.CHANGED):
            raise ValueError("the compiled machine does not run adapters")
        self.program = program
        steps = _without_absolutes(program.steps)
        rows = [register for step in steps for register in step.rows]
        self._steps = (StepCall * len(steps))()
        self._rows = (ctypes.c_int32 * len(rows))(*rows)
        first_row = 0
        for call, step in zip(self._steps, steps, strict=True):
            _encode(call, step, first_row, has_base=has_base, sources=sources)
            first_row += len(step.rows)
        self._call = ProgramCall(
            self._steps,
            self._rows,
            len(steps),
            len(rows),
            program.registers,
            len(program.numbers),
            len(program.trims),
            len(program.streams),
            len(program.totals),
            program.ranked,
            _flags_of(program),
        )
        self.address = ctypes.addressof(self._call)
        """Of its description, which lives as long as this object."""
        computed = [step.a for step in steps if step.op is Op.COMPUTED]
        self.operands = int(has_base) + sources + max(computed, default=-1) + 1
        """How many operands a job has: the base, sources, computed rows."""
        self.constants = np.array([n.value for n in program.numbers], dtype=np.float32)
        """``[numbers]``; those that are found are zero."""
        self.constants_address = self.constants.ctypes.data

    @property
    def n_steps(self) -> int:
        """Return how many steps a tile goes through."""
        return int(self._call.n_steps)

    @property
    def memory_numel(self) -> int:
        """Return how many float32 numbers a run needs."""
        call = self._call
        parts = (
            ROW_NUMEL * 4,
            ROW_NUMEL * 4 * call.n_registers,
            _SUMS * 8 * call.n_totals,
            8 * call.n_registers,
            8 * call.n_rows,
            _PLACE_NBYTES * call.n_ranked,
            call.n_registers,
            call.n_steps,
        )
        return sum(-(-nbytes // _LINE) * _LINE for nbytes in (_LINE, *parts)) // 4

    def numbers(
        self, found: Sequence[float], by_row: NDArray[np.floating] | None = None
    ) -> NDArray[np.float32]:
        """Return its numbers, of which statistics have found some.

        Args:
            found: What they have found in the tensor or the model.
            by_row: ``[rows, numbers]`` that they have found in rows.

        Returns:
            ``[numbers]``; ``[rows, numbers]`` where they differ from row to row.
        """
        filled = self.constants.copy()
        if by_row is not None and self.program.has_row_numbers:
            filled = np.repeat(filled[None], len(by_row), axis=0)
        for index, number in enumerate(self.program.numbers):
            if number.origin is Origin.FOUND:
                filled[..., index] = found[number.index]
            elif number.origin is Origin.ROW:
                assert by_row is not None  # noqa: S101 - rows have found theirs
                filled[:, index] = by_row[:, number.index]
        return filled


class Jobs:
    """An array of jobs, and what they point to."""

    def __init__(self, programs: Iterable[EncodedProgram], count: int) -> None:
        """Allocate them.

        Args:
            programs: What they will run: each job has room for what any of these needs.
            count: How many there are.
        """
        programs = list(programs)
        of = [each.program for each in programs]
        most = max(each.operands for each in programs)
        self.calls = (JobCall * count)()
        self.trims = ((TrimCall * max(len(each.trims) for each in of)) * count)()
        """``[jobs][trims]``."""
        self.streams = ((StreamCall * max(len(each.streams) for each in of)) * count)()
        """``[jobs][streams]``."""
        self.asked = ((AskedCall * max(each.ranked for each in of)) * count)()
        """``[jobs][ranked]``."""
        self._operands = ((OperandCall * most) * count)()
        self._operand_formats = [struct.Struct("=" + "Qq" * n) for n in range(most + 1)]
        arrays: tuple[ctypes.Array[Any], ...] = (
            self._operands, self.trims, self.streams, self.asked,
        )  # fmt: skip
        self._nbytes = [ctypes.sizeof(array) // count for array in arrays]
        """Of what one job has of each."""
        self._addresses = [
            tuple(
                ctypes.addressof(array) + index * nbytes
                for array, nbytes in zip(arrays, self._nbytes, strict=True)
            )
            for index in range(count)
        ]

    def fill(
        self,
        index: int,
        program: EncodedProgram,
        operands: Sequence[int],
        *,
        numel: int,
        row_numel: int | None = None,
        numbers: int | None = None,
        out: int = 0,
        out_code: int = 0,
        limit: float = 0.0,
        totals: int = 0,
        changes: tuple[int, int] = (0, 0),
        start: int = 0,
    ) -> None:
        """Say what a job is about; what it trims, draws and is asked is said apart.

        Args:
            index: Which job.
            program: What it runs.
            operands: Address and type of the base, if there is one, of every source, and of computed
                rows: one after the other.
            numel: Elements.
            row_numel: Elements per row; None where rows do not matter.
            numbers: Address of float32 numbers; None for the program's constants.
            out: Address of the result.
            out_code: Its type.
            limit: The largest magnitude that it can hold.
            totals: Address of ``[rows, totals]`` float64.
            changes: Address of :class:`ChangeCall` to be computed before, and how many there are.
            start: Flat index of the first element in the matrix that changes.
        """
        where, *others = self._addresses[index]
        if numbers is None:
            numbers = program.constants_address
        if row_numel is None:
            row_numel = numel
        self._operand_formats[program.operands].pack_into(
            self._operands, index * self._nbytes[0], *operands
        )
        _JOB.pack_into(
            self.calls, index * _JOB.size, program.address, where, out, numbers, *others,
            totals, changes[0], numel, row_numel, start, limit, out_code, 0, changes[1],
        )  # fmt: skip

    def trim(
        self, index: int, trim: int, threshold: float, *, ties: int, everything: bool = False
    ) -> None:
        """Say what a trim keeps in a job.

        Args:
            index: Which job.
            trim: Which of the program's trims.
            threshold: What has a larger magnitude is kept.
            ties: How many that have this magnitude are kept, the first; :data:`ALL_TIES` for all.
            everything: Whether all is kept.
        """
        at = index * self._nbytes[1] + trim * _TRIM.size
        _TRIM.pack_into(self.trims, at, ties, 0, threshold, everything)

    def draw(self, index: int, stream: int, key: int, *, start: int, limit: int) -> None:
        """Say which random numbers a job draws.

        Args:
            index: Which job.
            stream: Which of the program's streams.
            key: Of the source's stream for the tensor.
            start: Flat index in the tensor of the job's first element.
            limit: What is below it is kept; 0 where a row says what is.
        """
        at = index * self._nbytes[2] + stream * _STREAM.size
        _STREAM.pack_into(self.streams, at, start, key & _WORD, key >> 64, limit, 0)


_JOB = struct.Struct("=9Q3qfiii")
_TRIM = struct.Struct("=qqfi")
_STREAM = struct.Struct("=qQQQq")
_WORD = 2**64 - 1
assert (_JOB.size, _TRIM.size, _STREAM.size) == tuple(  # noqa: S101 - as they are packed
    map(ctypes.sizeof, (JobCall, TrimCall, StreamCall))
)


def _without_absolutes(steps: Sequence[Step]) -> list[Step]:
    """Return steps in which only magnitudes that something else needs are computed.

    The machine ranks magnitudes in any case. A register that is filled right before it is ranked, and is
    filled anew before it is read again, need not hold them.
    """
    kept: list[Step] = []
    for index, step in enumerate(steps):
        last = kept[-1] if kept else None
        if (
            step.op is Op.RANK
            and last is not None
            and last.op is Op.ABSOLUTE
            and last.out == step.a
            and not _is_read(step.a, steps[index + 1 :])
        ):
            kept[-1] = replace(step, a=last.a)
        else:
            kept.append(step)
    return kept


def _is_read(register: int, steps: Sequence[Step]) -> bool:
    """Return whether steps read a register before they fill it."""
    for step in steps:
        if register in _registers_of(step):
            return True
        if step.op not in SINKS and step.out == register:
            return False
    return False


def _registers_of(step: Step) -> set[int]:
    """Return the registers that a step reads."""
    if step.op in _LOADS:
        return set()
    chosen = {step.c} if step.op is Op.SELECT else set()
    return {step.a, step.b, *step.rows} | chosen


def _encode(call: StepCall, step: Step, first_row: int, *, has_base: bool, sources: int) -> None:
    call.op, call.out = step.op, step.out
    call.a, call.b, call.c, call.number = step.a, step.b, step.c, step.number
    call.first_row, call.n_rows = first_row, len(step.rows)
    if step.op in (Op.SOURCE, Op.TASK_VECTOR):
        call.a = has_base + step.a
    elif step.op is Op.COMPUTED:
        call.a = has_base + sources + step.a
    if step.majority is not None:
        call.flags |= _BY_FREQUENCY * (step.majority.vote is Vote.FREQUENCY)
        call.flags |= _DIVIDES * step.majority.divides


def _flags_of(program: Program) -> int:
    flags = _LOADS_BASE * program.uses(Op.BASE, Op.TASK_VECTOR)
    flags |= _USES_BASE * program.uses(Op.BASE)
    return flags | _HAS_ROW_NUMBERS * program.has_row_numbers
