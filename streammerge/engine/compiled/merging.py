"""Blocks of a piece to blocks of the output, by the compiled machine.

Memory: the worker's bench, and a block of float32 where a result is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Never

import numpy as np
from numpy.typing import NDArray

from streammerge.dtypes import DType
from streammerge.engine.compiled.bench import Bench, Encoded
from streammerge.engine.compiled.changed import ChangedOperands
from streammerge.engine.compiled.operands import (
    PieceOperands,
    StoredOperand,
    find_operands,
    in_batches,
)
from streammerge.engine.compiled.refusing import refuse_operands
from streammerge.engine.compiled.rows import CompiledRows, WantedRows
from streammerge.engine.finite import LARGEST, check_range
from streammerge.engine.pieces import PieceInMemory, Stored
from streammerge.engine.rows import KnownRows, Run, iter_merging
from streammerge.engine.segments import Block, Segment
from streammerge.native.library import DTYPE_CODES
from streammerge.statistics import BLOCK


class CompiledMerging:
    """Merges blocks for one worker."""

    def __init__(
        self,
        bench: Bench,
        rows: CompiledRows,
        changed: ChangedOperands | None,
        *,
        counts: bool,
    ) -> None:
        """Prepare.

        Args:
            bench: The worker's own.
            rows: Knows rows.
            changed: Computes what adapters make of the base; None without any.
            counts: Whether what trims and random numbers keep is counted.
        """
        self._bench = bench
        self._rows = rows
        self._changed = changed
        in_rows = any(task.row for task in bench.plan.tasks)
        widest = max([BLOCK, *(task.row for task in bench.plan.tasks)])
        self._spare = np.empty(4 * widest if in_rows else 0, dtype=np.uint8)
        self._plan = bench.plan
        self._counts = counts
        self._surveyed: list[NDArray[np.float64]] = []
        self.surveyed_piece: PieceInMemory | None = None

    def merge(self, piece: PieceInMemory, blocks: Sequence[Block], out: Stored) -> bool:
        """Merge the blocks of a piece; return whether the machine can.

        Args:
            piece: The inputs.
            blocks: Its blocks; what was kept is added to their counts.
            out: ``[numel]`` in the output dtype; receives them.

        Raises:
            NonFiniteError: An operand is not finite, or a result does not fit the output type.
        """
        setting = piece.first.task.setting
        encoded = self._bench.merges[setting]
        if out.dtype not in DTYPE_CODES:
            return False
        surveying = self._surveying_of(piece)
        loads_base = (surveying or encoded).loads_base
        operands = find_operands(piece, self._plan.settings[setting], loads_base=loads_base)
        jobs = [
            _Job(block.begin + segment.begin, block.begin + segment.end, segment)
            for block in blocks
            for segment in block.segments
        ]
        if operands is None:
            return self._merge_changed(piece, encoded, surveying, jobs, out)
        for batch in in_batches(jobs):
            refused = self._run_jobs(encoded, PieceOperands(operands), batch, out, surveying)
            if refused:
                first = self._bench.first_refused(len(batch))
                self._refuse(piece, encoded, operands, batch[first])
        return True

    def _surveying_of(self, piece: PieceInMemory) -> Encoded | None:
        """Return what merges a piece and surveys it at once; None where it is surveyed apart, or not."""
        self._surveyed = []
        self.surveyed_piece = None
        if not self._bench.surveys:
            return None
        surveying = self._bench.surveys[piece.first.task.setting][2]
        if any(piece.deltas) and not (self._changed and self._changed.serve(piece, surveying)):
            return None
        self.surveyed_piece = piece
        return surveying

    def take_totals(self, piece: PieceInMemory) -> NDArray[np.float64] | None:
        """Return what merging a piece has left of totals, job by job; None where it has left none."""
        if piece is not self.surveyed_piece or not self._surveyed:
            return None
        return np.concatenate(self._surveyed)

    def _merge_changed(
        self,
        piece: PieceInMemory,
        encoded: Encoded,
        surveying: Encoded | None,
        jobs: Sequence[_Job],
        out: Stored,
    ) -> bool:
        """Merge what adapters make of a piece; return whether the machine can."""
        changed = self._changed
        ours = None if changed is None else changed.operands_of(piece, surveying or encoded)
        if changed is None or ours is None:
            self.surveyed_piece = None
            return False
        if ours.stored is not None:
            for batch in in_batches(jobs):
                if self._run_jobs(encoded, ours, batch, out, surveying):
                    self._refuse_changed(
                        piece, encoded, batch[self._bench.first_refused(len(batch))]
                    )
            return True
        for job in jobs:
            operands = changed.of_range(
                piece, surveying or encoded, job.begin, job.end, job.segment
            )
            if self._run_jobs(encoded, PieceOperands(operands), [job], out, surveying):
                self._refuse_changed(piece, encoded, job)
        return True

    def _refuse_changed(self, piece: PieceInMemory, encoded: Encoded, job: _Job) -> Never:
        """Raise the error about what adapters make of a job."""
        assert self._changed is not None  # noqa: S101 - the machine has run it
        self._changed.refuse(piece, encoded, job.begin, job.end, job.segment)
        operands = self._changed.of_range(piece, encoded, job.begin, job.end, job.segment)
        self._refuse_result(piece, encoded, operands, job)

    def merge_rows(self, piece: PieceInMemory, block: Block, out: Stored) -> bool:
        """Merge a piece whose rows must be seen whole; return whether the machine can.

        Args:
            piece: The inputs.
            block: All of it; what was kept is added to its counts.
            out: ``[numel]`` in the output dtype; receives the result.

        Raises:
            NonFiniteError: An operand is not finite, or a result does not fit the output type.
        """
        setting = piece.first.task.setting
        encoded = self._bench.merges[setting]
        wide = piece.in_rows()
        operands = find_operands(wide, self._plan.settings[setting], loads_base=True)
        if operands is None or out.dtype not in DTYPE_CODES:
            return False
        (segment,) = block.segments
        for run in iter_merging(piece):
            own = replace(
                segment,
                end=run.end - run.begin,
                start=wide.first.start + run.begin,
                # What two pieces have a part of is counted once.
                kept=segment.kept if run.own else [0] * len(segment.kept),
            )
            self._run_rows(encoded, wide, operands, _RowJob(run, own, piece), out)
        return True

    def _run_rows(
        self,
        encoded: Encoded,
        wide: PieceInMemory,
        operands: Sequence[StoredOperand],
        job: _RowJob,
        out: Stored,
    ) -> None:
        """Merge some rows, of which perhaps a part alone is asked for."""
        run, piece = job.run, job.piece

        def refuse(asked: Encoded) -> None:
            refuse_operands(
                wide,
                run.begin,
                run.end,
                self._plan,
                loads_base=asked.loads_base,
                subtracts=asked.subtracts,
            )

        known, operands = self._rows.know(wide, operands, WantedRows(run, job.segment, refuse))
        itemsize = out.dtype.itemsize
        first = run.begin - piece.before
        inside = first >= 0 and run.end - piece.before <= piece.numel
        memory = out.memory[first * itemsize :] if inside else self._spare
        if self._merge_known(encoded, operands, job, known, Stored(memory, out.dtype)):
            refuse(encoded)
            self._merge_known(encoded, operands, job, known, Stored(self._spare, DType.F32))
            merged = self._spare[: (run.end - run.begin) * 4].view(np.float32)
            check_range(merged, wide, run.begin)
        if self._counts:
            self._count(encoded, [_Job(run.begin, run.end, job.segment)])
        if not inside:
            begin, end = max(first, 0), min(run.end - piece.before, piece.numel)
            own = slice((begin - first) * itemsize, (end - first) * itemsize)
            out.memory[begin * itemsize : end * itemsize] = memory[own]

    def _merge_known(
        self,
        encoded: Encoded,
        operands: Sequence[StoredOperand],
        job: _RowJob,
        known: KnownRows,
        out: Stored,
    ) -> int:
        """Merge rows into the beginning of some memory; return whether the machine refused."""
        self._bench.begin()
        self._bench.fill(
            0,
            encoded,
            operands,
            begin=job.run.begin,
            end=job.run.end,
            segment=job.segment,
            rows=known,
            out=out.memory.ctypes.data,
            out_code=DTYPE_CODES[out.dtype],
            limit=LARGEST[out.dtype],
        )
        return self._bench.run(0, 1, collects=False)[1]

    def _run_jobs(
        self,
        encoded: Encoded,
        operands: PieceOperands,
        batch: Sequence[_Job],
        out: Stored,
        surveying: Encoded | None,
    ) -> int:
        """Run jobs, and count what they keep; return how many were refused.

        Where they are surveyed at once, what they leave is kept for :meth:`take_totals`.
        """
        target, limit = StoredOperand.of(out), LARGEST[out.dtype]
        bench, program = self._bench, surveying or encoded
        totals = np.empty((len(batch), len(program.program.totals)))
        assert operands.stored is not None  # noqa: S101 - merging asks for those of its jobs
        stored = [*operands.stored]
        if surveying is not None:
            # What was stored of a tile is read as if it were one more source.
            stored.append(target)
        bench.begin(operands)
        for index, job in enumerate(batch):
            bench.fill(
                index,
                program,
                stored,
                begin=job.begin,
                end=job.end,
                segment=job.segment,
                out=target.at(job.begin),
                out_code=target.code,
                limit=limit,
                totals=totals[index:].ctypes.data if surveying is not None else 0,
            )
        _, refused = bench.run(0, len(batch), collects=False)
        if self._counts and not refused:
            self._count(program, batch)
        if surveying is not None:
            # Of a tensor without elements nothing is asked.
            self._surveyed.append(totals[[job.end > job.begin for job in batch]])
        return refused

    def _count(self, encoded: Encoded, batch: Sequence[_Job]) -> None:
        jobs, program = self._bench.jobs, encoded.program
        for index, job in enumerate(batch):
            if program.trims:
                kept = [jobs.trims[index][at].kept for at in range(len(program.trims))]
            else:
                kept = [jobs.streams[index][at].kept for at in range(len(program.streams))]
            job.segment.add_kept(kept)

    def convert(self, piece: PieceInMemory, out: Stored) -> bool:
        """Store the values of a piece's one input in another type; return whether the machine can.

        Raises:
            NonFiniteError: A value is not finite, or does not fit the type.
        """
        stored = next(each for each in piece.inputs if each is not None)
        if not {stored.dtype, out.dtype} <= DTYPE_CODES.keys():
            return False
        bench = self._bench
        operand, target = StoredOperand.of(stored), StoredOperand.of(out)
        for batch in in_batches(list(range(0, piece.numel, BLOCK))):
            bench.begin()
            for index, begin in enumerate(batch):
                end = min(begin + BLOCK, piece.numel)
                bench.fill(
                    index,
                    bench.conversion,
                    [operand],
                    begin=begin,
                    end=end,
                    segment=None,
                    out=target.at(begin),
                    out_code=target.code,
                    limit=LARGEST[out.dtype],
                )
            _, refused = bench.run(0, len(batch), collects=False)
            if refused:
                begin = batch[bench.first_refused(len(batch))]
                check_range(stored.widen(begin, min(begin + BLOCK, piece.numel)), piece, begin)
        return True

    def _refuse(
        self,
        piece: PieceInMemory,
        encoded: Encoded,
        operands: Sequence[StoredOperand],
        job: _Job,
    ) -> Never:
        """Raise the error about an operand, or about a result."""
        # As the plain way does: of several tensors side by side, all operands are looked at first.
        begin, end = (0, piece.numel) if len(piece.parts) > 1 else (job.begin, job.end)
        refuse_operands(
            piece,
            begin,
            end,
            self._plan,
            loads_base=encoded.loads_base,
            subtracts=encoded.subtracts,
        )
        self._refuse_result(piece, encoded, operands, job)

    def _refuse_result(
        self,
        piece: PieceInMemory,
        encoded: Encoded,
        operands: Sequence[StoredOperand],
        job: _Job,
    ) -> Never:
        """Raise the error about a result, which is computed once more."""
        merged = np.empty(job.end - job.begin, dtype=np.float32)
        self._bench.begin()
        self._bench.fill(
            0,
            encoded,
            operands,
            begin=job.begin,
            end=job.end,
            segment=job.segment,
            out=merged.ctypes.data,
            out_code=DTYPE_CODES[DType.F32],
            limit=LARGEST[DType.F32],
        )
        self._bench.run(0, 1, collects=False)
        check_range(merged, piece, job.begin)
        raise AssertionError("the machine refuses what is finite and fits")


@dataclass(frozen=True, slots=True)
class _RowJob:
    """Rows that are merged at once."""

    run: Run
    """The rows, in the piece with all of its rows."""
    segment: Segment
    """What they are of the tensor."""
    piece: PieceInMemory
    """The piece that has a part of them."""


@dataclass(frozen=True, slots=True)
class _Job:
    """One tensor's part of a block."""

    begin: int
    """First element in the piece."""
    end: int
    """End in the piece."""
    segment: Segment
    """What it is of the tensor."""
