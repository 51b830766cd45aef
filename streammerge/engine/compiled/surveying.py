"""A report's numbers about the blocks of a piece, by the compiled machine.

Memory: totals of a batch of blocks, and copies of what is collected of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streammerge.engine.compiled.bench import Bench, Encoded
from streammerge.engine.compiled.changed import ChangedOperands
from streammerge.engine.compiled.operands import (
    CALLS,
    PieceOperands,
    StoredOperand,
    find_operands,
)
from streammerge.engine.pieces import PieceInMemory, Stored
from streammerge.engine.surveying import Surveying, SurveyJob, with_result
from streammerge.methods.surveying import Survey
from streammerge.native.library import DTYPE_CODES
from streammerge.native.machine import Asked
from streammerge.statistics.rounds import Found
from streammerge.statistics.surveying import Surveyed


class CompiledSurveys:
    """Surveys for one worker."""

    def __init__(
        self, bench: Bench, surveys: Sequence[Survey], changed: ChangedOperands | None
    ) -> None:
        """Prepare.

        Args:
            bench: The worker's own.
            surveys: What is found, for each setting.
            changed: Computes what adapters make of the base; None without any.
        """
        self._bench = bench
        self._surveys = surveys
        self._changed = changed
        self._surveying = Surveying()

    def survey(
        self,
        piece: PieceInMemory,
        found: Sequence[Found],
        out: Stored,
        totals: NDArray[np.float64] | None,
    ) -> list[Surveyed] | None:
        """Return the numbers of every part of a merged piece; None if the machine cannot read it.

        Args:
            piece: The inputs.
            found: What it was merged with.
            out: The result.
            totals: What merging has left, for each tensor's part of each block; None for nothing.
        """
        setting = piece.first.task.setting
        answers = _CompiledAnswers(
            self._bench, with_result(piece, out), self._surveys[setting], self._changed, totals
        )
        if out.dtype not in DTYPE_CODES or not answers.serve():
            return None
        return self._surveying.survey(piece, found, self._surveys[setting].layout, answers)


class _CompiledAnswers:
    """Answers for one piece; see :class:`streammerge.engine.surveying.BlockAnswers`."""

    def __init__(
        self,
        bench: Bench,
        piece: PieceInMemory,
        survey: Survey,
        changed: ChangedOperands | None,
        known: NDArray[np.float64] | None,
    ) -> None:
        self._known = known
        self._bench = bench
        self._piece = piece
        self._changed = changed
        setting = bench.plan.settings[piece.first.task.setting]
        self._totals, self._magnitudes, _ = bench.surveys[piece.first.task.setting]
        self._sources = survey.layout.sources
        result = piece.inputs[-1]
        assert result is not None  # noqa: S101 - it was put there
        self._result = StoredOperand(
            result.memory.ctypes.data, result.dtype.itemsize, DTYPE_CODES.get(result.dtype, 0)
        )
        stored = find_operands(piece, setting, loads_base=self._totals.loads_base)
        self._operands: PieceOperands | None = None
        if stored is not None:
            self._operands = PieceOperands(stored)
        elif changed is not None:
            self._operands = changed.operands_of(piece, self._totals)

    def serve(self) -> bool:
        """Return whether the machine can read the piece."""
        return self._operands is not None

    @property
    def _taken(self) -> PieceOperands:
        assert self._operands is not None  # noqa: S101 - serve() said so
        return self._operands

    def _operands_of(self, job: SurveyJob) -> list[StoredOperand]:
        if self._taken.stored is not None:
            return [*self._taken.stored, self._result]
        assert self._changed is not None  # noqa: S101 - it makes them
        operands = self._changed.of_range(
            self._piece, self._totals, job.begin, job.end, job.segment
        )
        return [*operands, self._result]

    def totals(self, jobs: Sequence[SurveyJob]) -> NDArray[np.float64]:
        """Return what the jobs leave."""
        if self._known is not None:
            return self._known
        bench, encoded = self._bench, self._totals
        totals = np.empty((len(jobs), len(encoded.program.totals)))
        done = 0
        for batch in self._batches(jobs, CALLS):
            bench.begin(self._taken)
            for index, job in enumerate(batch):
                self._fill(index, encoded, job, totals=totals[done + index :].ctypes.data)
            bench.run(0, len(batch), collects=False)
            done += len(batch)
        return totals

    def magnitudes(
        self, jobs: Sequence[SurveyJob], sources: Sequence[int]
    ) -> list[NDArray[np.float32]]:
        """Return the magnitudes of some sources' vectors."""
        largest = max(job.end - job.begin for job in jobs)
        together = max(1, self._bench.values.size // max(1, largest * len(sources)))
        found: list[NDArray[np.float32]] = []
        if together == 1 and largest * len(sources) > self._bench.values.size:
            rows = [self.magnitudes(jobs, [source]) for source in sources]
            return [np.concatenate(of_job) for of_job in zip(*rows, strict=True)]
        for batch in self._batches(jobs, min(CALLS, together)):
            self._collect(batch, sources, found)
        return found

    def _collect(
        self,
        batch: Sequence[SurveyJob],
        sources: Sequence[int],
        found: list[NDArray[np.float32]],
    ) -> None:
        bench = self._bench
        bench.begin(self._taken)
        for index, job in enumerate(batch):
            self._fill(index, self._magnitudes, job)
            for source in range(self._sources):
                call = bench.jobs.asked[index][source]
                call.n_crowded = 0
                call.kind = Asked.KEEP if source in sources else Asked.NOTHING
        bench.run(0, len(batch), collects=True)
        for index, job in enumerate(batch):
            rows = np.empty((len(sources), job.end - job.begin), dtype=np.float32)
            for row, source in zip(rows, sources, strict=True):
                call = bench.jobs.asked[index][source]
                np.abs(bench.values[call.first : call.first + call.collected], out=row)
            found.append(rows)

    def _batches(self, jobs: Sequence[SurveyJob], most: int) -> list[Sequence[SurveyJob]]:
        # What adapters make of a range is good until the next one.
        size = most if self._taken.stored is not None else 1
        return [jobs[at : at + size] for at in range(0, len(jobs), size)]

    def _fill(self, index: int, encoded: Encoded, job: SurveyJob, totals: int = 0) -> None:
        self._bench.fill(
            index,
            encoded,
            self._operands_of(job),
            begin=job.begin,
            end=job.end,
            segment=job.segment,
            totals=totals,
        )
