"""Samples, answers to questions and statistics of small tensors, by the compiled machine.

Memory: the worker's bench, whose room holds a block of collected values, and copies of what is
collected in a batch of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Never

import numpy as np
from numpy.typing import NDArray

from streammerge.engine.asking import (
    Asking,
    BlockAnswer,
    join_answers,
)
from streammerge.engine.compiled.bench import Bench, Encoded
from streammerge.engine.compiled.changed import ChangedOperands
from streammerge.engine.compiled.operands import (
    CALLS,
    PieceOperands,
    StoredOperand,
    find_operands,
    in_batches,
)
from streammerge.engine.compiled.refusing import refuse_operands
from streammerge.engine.compiled.rows import CompiledRows, WantedRows
from streammerge.engine.pieces import Part, PieceInMemory
from streammerge.engine.rows import KnownRows, Run, iter_covering, iter_measuring, memory_of
from streammerge.engine.segments import Segment, split_piece
from streammerge.methods.programs import Programs, found_of_nothing
from streammerge.native.machine import CRAMMED, MOST_CROWDS, Asked, AskedCall
from streammerge.plan.demanding import MOST_ROWS
from streammerge.statistics import BLOCK, magnitude
from streammerge.statistics.magnitude import BINS, Band, Bins, Counted, Question, SampleRun
from streammerge.statistics.rounds import NOTHING, Answers, Found, Rank, Round
from streammerge.statistics.selecting import statistic_of_block
from streammerge.statistics.topk import TopK, settled_without_values
from streammerge.statistics.totals import join_totals

assert magnitude.MOST_CROWDS <= MOST_CROWDS  # noqa: S101 - a band must fit what asks for it


@dataclass(frozen=True, slots=True)
class _Job:
    """A part of one tensor, and what is asked about it."""

    begin: int
    """First element in the piece."""
    end: int
    """End in the piece."""
    segment: Segment
    """What it is of the tensor."""
    asked: Sequence[_Wish]
    """What is asked, one for each ranked value."""
    rows: KnownRows | None = None
    """What is known of its rows, where that matters."""
    counted: list[Any] = field(default_factory=list)
    """The answers."""
    histograms: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    """What bins are counted in, by the index of their value."""

    def forget(self) -> None:
        """Let go of the answers."""
        self.counted.clear()
        self.histograms.clear()


_Wish = Question | Rank | str | None
"""A question, a rank, :data:`_ALL` for all values, or nothing."""
_ALL = "all"
_EVERYTHING = Band(0.0, float("inf"))
"""The question of a search that has room for all values."""


class CompiledMeasuring:
    """Measures for one worker."""

    def __init__(
        self,
        bench: Bench,
        rows: CompiledRows,
        programs: Sequence[Programs],
        changed: ChangedOperands | None,
    ) -> None:
        """Prepare.

        Args:
            bench: The worker's own.
            rows: Knows rows.
            programs: What the method does, for each of its settings.
            changed: Computes what adapters make of the base; None without any.
        """
        self._bench = bench
        self._changed = changed
        self._rows = rows
        self._plan = bench.plan
        self._programs = programs
        most = max((each.counts.totals for each in programs), default=0)
        in_rows = any(task.row for task in bench.plan.tasks)
        self._totals = np.zeros(max(CALLS, MOST_ROWS * in_rows) * most)

    def answer(self, piece: PieceInMemory, asking: Asking) -> Iterator[BlockAnswer] | None:
        """Answer what is asked for each block of a piece.

        Returns:
            None if the machine cannot read the piece.

        Raises:
            NonFiniteError: A value is not finite.
        """
        encoded = self._bench.rounds[piece.first.task.setting][asking.round]
        operands = self._find_operands(piece, encoded)
        if operands is None:
            return None
        if operands.stored is not None and piece.first.task.row:
            return self._answer_rows(piece, asking, encoded, operands.stored)
        jobs = [
            _Job(block.begin, block.end, block.segments[0], asking.questions)
            for block in split_piece(piece, [asking.found], [[]])
        ]
        return self._answers(piece, encoded, operands, jobs, asking)

    def _answers(
        self,
        piece: PieceInMemory,
        encoded: Encoded,
        operands: PieceOperands,
        jobs: Sequence[_Job],
        asking: Asking,
    ) -> Iterator[BlockAnswer]:
        # One block at a time where much comes of it: a histogram is half a MiB, all values one MiB.
        much = any(isinstance(each, Bins) or each == _EVERYTHING for each in asking.questions)
        for batch in self._batches(jobs, alone=much or operands.stored is None):
            totals = self._run(piece, encoded, operands, batch)
            for job, own in zip(batch, totals, strict=True):
                yield BlockAnswer(tuple(job.counted), own.copy() if asking.totals else None)
                job.forget()

    def _answer_rows(
        self,
        piece: PieceInMemory,
        asking: Asking,
        encoded: Encoded,
        operands: Sequence[StoredOperand],
    ) -> Iterator[BlockAnswer]:
        """Answer for each block of a piece about the rows that belong to it."""
        wide = piece.in_rows()
        for runs in iter_measuring(piece):
            parts = []
            for run in runs:
                job = self._row_job(wide, run, asking.questions, asking.found)
                totals = self._run_rows(wide, encoded, operands, run, job)
                parts.append(BlockAnswer(tuple(job.counted), totals if asking.totals else None))
            yield join_answers(encoded.program.totals, parts, asking)

    def _row_job(self, wide: PieceInMemory, run: Run, asked: Sequence[_Wish], found: Found) -> _Job:
        part = wide.first
        start = part.start + run.begin
        block = part.task.scope_block + start // BLOCK
        segment = Segment(0, run.end - run.begin, part, start, block, found, [])
        return _Job(run.begin, run.end, segment, asked)

    def _run_rows(
        self,
        wide: PieceInMemory,
        encoded: Encoded,
        operands: Sequence[StoredOperand],
        run: Run,
        job: _Job,
    ) -> NDArray[np.float64]:
        """Run a job about whole rows; return its totals, joined."""

        def refuse(asked: Encoded) -> None:
            self._refuse(wide, asked, job)

        known, operands = self._rows.know(wide, operands, WantedRows(run, job.segment, refuse))
        job = replace(job, rows=known)
        totals = self._run(wide, encoded, PieceOperands(operands), [job])
        return np.array(join_totals(encoded.program.totals, totals))

    def _batches(self, jobs: Sequence[_Job], *, alone: bool) -> Iterator[Sequence[_Job]]:
        return iter([job] for job in jobs) if alone else in_batches(jobs)

    def _find_operands(self, piece: PieceInMemory, encoded: Encoded) -> PieceOperands | None:
        """Return what the machine reads of a piece; None if it cannot."""
        stored = self._find_stored(piece, encoded)
        if stored is not None:
            return PieceOperands(stored)
        return None if self._changed is None else self._changed.operands_of(piece, encoded)

    def _find_stored(self, piece: PieceInMemory, encoded: Encoded) -> list[StoredOperand] | None:
        setting = self._plan.settings[piece.first.task.setting]
        return find_operands(piece, setting, loads_base=encoded.loads_base)

    def _stored_of(
        self, piece: PieceInMemory, encoded: Encoded, operands: PieceOperands, job: _Job
    ) -> Sequence[StoredOperand]:
        """Return the operands of one job."""
        if operands.stored is not None:
            return operands.stored
        assert self._changed is not None  # noqa: S101 - it makes them
        return self._changed.of_range(piece, encoded, job.begin, job.end, job.segment)

    def _run(
        self,
        piece: PieceInMemory,
        encoded: Encoded,
        operands: PieceOperands,
        batch: Sequence[_Job],
    ) -> NDArray[np.float64]:
        """Run a batch, or one job about rows; leave what is counted with the jobs.

        Args:
            piece: The piece.
            encoded: What is run.
            operands: The models.
            batch: The jobs; one where each has operands of its own.

        Returns:
            ``[jobs, totals]``, or ``[rows, totals]``.
        """
        bench = self._bench
        bench.begin(operands)
        stored = self._stored_of(piece, encoded, operands, batch[0])
        n_totals = len(encoded.program.totals)
        rows = batch[0].rows
        count = len(batch) if rows is None else len(rows.numbers)
        totals = self._totals[: count * n_totals].reshape(count, n_totals)
        for index, job in enumerate(batch):
            bench.fill(
                index,
                encoded,
                stored,
                begin=job.begin,
                end=job.end,
                segment=job.segment,
                rows=job.rows,
                totals=totals[index:].ctypes.data if n_totals else 0,
            )
            job.counted[:] = [None] * len(job.asked)
            for at in range(len(job.asked)):
                _ask(bench.jobs.asked[index][at], job, at)
        done = 0
        while done < len(batch):
            done += self._run_some(piece, encoded, batch, done)
        return totals

    def _run_some(
        self, piece: PieceInMemory, encoded: Encoded, batch: Sequence[_Job], first: int
    ) -> int:
        """Run as many jobs as there is room for what they collect; return how many."""
        bench = self._bench
        done, refused = bench.run(first, len(batch) - first, collects=True)
        if refused:
            calls = [bench.jobs.calls[first + index].refused for index in range(done)]
            self._refuse(piece, encoded, batch[first + calls.index(1)])
        for index in range(first, first + done):
            crammed = self._take(index, batch[index])
            # Alone each has all the room, which holds a block.
            for at in crammed:
                for other in range(len(batch[index].asked)):
                    bench.jobs.asked[index][other].kind = Asked.NOTHING
                _ask(bench.jobs.asked[index][at], batch[index], at)
                bench.run(index, 1, collects=True)
                left = self._take(index, batch[index], only=at)
                assert not left  # noqa: S101 - a block holds what is collected of a block
        return done

    def _take(self, index: int, job: _Job, only: int | None = None) -> list[int]:
        """Take the answers of a job; return which found no room."""
        crammed = []
        for at, wish in enumerate(job.asked):
            if wish is None or only not in {None, at}:
                continue
            call = self._bench.jobs.asked[index][at]
            if call.collected == CRAMMED:
                crammed.append(at)
                continue
            job.counted[at] = self._answer_of(call, job, at)
        return crammed

    def _answer_of(self, call: AskedCall, job: _Job, at: int) -> Any:
        wish = job.asked[at]
        if isinstance(wish, Rank):
            return call.threshold, call.above, call.equal
        if isinstance(wish, Bins):
            return Counted(call.above, None, (), job.histograms[at])
        values = self._bench.values[call.first : call.first + call.collected].copy()
        if wish == _ALL:
            return values
        return Counted(call.above, values, tuple(call.crowds[: call.n_crowded]), None)

    def _refuse(self, piece: PieceInMemory, encoded: Encoded, job: _Job) -> Never:
        """Raise the error about an operand that is not finite.

        A merge would raise it as well; a sweep over a model need not wait for that.
        """
        begin, end = (0, piece.numel) if len(piece.parts) > 1 else (job.begin, job.end)
        if self._find_stored(piece, encoded) is None:
            assert self._changed is not None  # noqa: S101 - the machine has run it
            self._changed.refuse(piece, encoded, begin, end, job.segment)
            raise AssertionError("the machine refuses what is finite")
        refuse_operands(
            piece,
            begin,
            end,
            self._plan,
            loads_base=encoded.loads_base,
            subtracts=encoded.subtracts,
        )
        raise AssertionError("the machine refuses what is finite")

    def sample(
        self, piece: PieceInMemory, runs: Sequence[SampleRun], asking: Asking, out: NDArray[Any]
    ) -> bool:
        """Fill in values to be ranked; return whether the machine can read them.

        Raises:
            NonFiniteError: A value is not finite.
        """
        encoded = self._bench.rounds[piece.first.task.setting][asking.round]
        operands = self._find_operands(piece, encoded)
        if operands is None:
            return False
        by_rows = bool(piece.first.task.row)
        filled = 0
        alone = by_rows or operands.stored is None
        for batch in ([run] for run in runs) if alone else in_batches(runs):
            count = sum(numel for _, numel in batch)
            room = out[:, filled : filled + count]
            if operands.stored is not None and by_rows:
                self._sample_rows(piece, batch[0], operands.stored, asking=asking, out=room)
            else:
                self._sample_runs(piece, batch, operands, asking=asking, out=room)
            filled += count
        return True

    def _sample_runs(
        self,
        piece: PieceInMemory,
        runs: Sequence[SampleRun],
        operands: PieceOperands,
        *,
        asking: Asking,
        out: NDArray[Any],
    ) -> None:
        encoded = self._bench.rounds[piece.first.task.setting][asking.round]
        part = piece.first
        jobs = []
        for start, count in runs:
            begin = start - part.start
            block = part.task.scope_block + start // BLOCK
            segment = Segment(0, count, part, start, block, asking.found, [])
            jobs.append(_Job(begin, begin + count, segment, [_ALL] * len(out)))
        self._run(piece, encoded, operands, jobs)
        for row, values in zip(out, zip(*(job.counted for job in jobs), strict=True), strict=True):
            np.concatenate(values, out=row)

    def _sample_rows(
        self,
        piece: PieceInMemory,
        sampled: SampleRun,
        operands: Sequence[StoredOperand],
        *,
        asking: Asking,
        out: NDArray[Any],
    ) -> None:
        encoded = self._bench.rounds[piece.first.task.setting][asking.round]
        start, count = sampled
        begin = start - piece.first.start
        wide = piece.in_rows()
        for run, within, part in iter_covering(piece, begin, begin + count):
            job = self._row_job(wide, run, [_ALL] * len(out), asking.found)
            self._run_rows(wide, encoded, operands, run, job)
            for row, values in zip(out, job.counted, strict=True):
                row[part] = values[within]

    def settle(self, piece: PieceInMemory) -> list[Found] | None:
        """Return all that the method asks about whole tensors that fill at most a block, each.

        Returns:
            None where the machine cannot read a tensor.

        Raises:
            NonFiniteError: A value is not finite.
        """
        setting = piece.first.task.setting
        programs = self._programs[setting]
        scopes = [
            _Scope(begin, end, part, replace(NOTHING, rows=memory_of(programs, part.task)))
            for part, begin, end in piece.ranges()
            if part.numel > 0
        ]
        for encoded, asked in zip(self._bench.rounds[setting], programs.work.rounds, strict=True):
            operands = self._find_operands(piece, encoded)
            if operands is None:
                return None
            alone = programs.by_rows or operands.stored is None
            for batch in ([each] for each in scopes) if alone else in_batches(scopes):
                self._settle_round(piece, encoded, asked, operands, batch)
        nothing = found_of_nothing(programs)
        known = iter(scopes)
        return [next(known).known if part.numel > 0 else nothing for part in piece.parts]

    def _settle_round(
        self,
        piece: PieceInMemory,
        encoded: Encoded,
        asked: Round,
        operands: PieceOperands,
        batch: Sequence[_Scope],
    ) -> None:
        """Add to what is known of some tensors what a round finds."""
        ranks = [asked.ranks(scope.numel, scope.known) for scope in batch]
        jobs = [
            _Job(
                scope.begin,
                scope.end,
                Segment(0, scope.numel, scope.part, 0, 0, scope.known, []),
                [rank if rank.is_open(scope.numel) else None for rank in own],
            )
            for scope, own in zip(batch, ranks, strict=True)
        ]
        if operands.stored is not None and piece.first.task.row:
            (job,) = jobs
            run = Run(0, job.end, own=True)
            totals = self._run_rows(piece, encoded, operands.stored, run, job)[None]
        else:
            totals = self._run(piece, encoded, operands, jobs)
        for scope, job, own, sums in zip(batch, jobs, ranks, totals, strict=True):
            joined = join_totals(encoded.program.totals, sums[None])
            tops = _tops(job, own, scope.numel)
            answers = Answers(scope.numel, joined, tops, scope.known)
            scope.known = scope.known.joined(asked.concluded(answers))


@dataclass(slots=True)
class _Scope:
    """A whole tensor of a piece, and what is known of it."""

    begin: int
    end: int
    part: Part
    known: Found

    @property
    def numel(self) -> int:
        return self.end - self.begin


def _tops(job: _Job, ranks: Sequence[Rank], numel: int) -> tuple[TopK, ...]:
    tops = []
    for rank, counted in zip(ranks, job.counted, strict=True):
        settled = settled_without_values(numel, rank.k, of_value=rank.of_value)
        if settled is None:
            settled = statistic_of_block(counted, numel, rank.k, rank.tie_policy)
        tops.append(settled)
    return tuple(tops)


def _ask(call: AskedCall, job: _Job, at: int) -> None:
    """Say what is asked about one of a job's values."""
    wish = job.asked[at]
    call.n_crowded = 0
    if wish is None:
        call.kind = Asked.NOTHING
    elif wish == _ALL:
        call.kind = Asked.KEEP
    elif isinstance(wish, Rank):
        call.kind, call.k = Asked.SELECT, wish.k
    elif isinstance(wish, Bins):
        call.kind = Asked.BINS
        call.low, call.high, call.shift = wish.low_bits, wish.high_bits, wish.shift
        job.histograms[at] = np.zeros(BINS, dtype=np.int64)
        call.histogram = job.histograms[at].ctypes.data
    else:
        assert isinstance(wish, Band)  # noqa: S101 - there is no other
        call.kind = Asked.BAND
        call.low, call.high = _bits_of(wish.low), _bits_of(wish.high)
        call.n_crowded = len(wish.crowded)
        for index, crowd in enumerate(wish.crowded):
            call.crowded[index] = _bits_of(crowd)


def _bits_of(value: float) -> int:
    return int(np.float32(value).view(np.uint32))
