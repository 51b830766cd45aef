"""A report's numbers about the blocks of a piece, by the plain interpreter.

Memory: the registers of a worker, and copies of what is collected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streammerge.engine.pieces import PieceInMemory, Stored
from streammerge.engine.reading import Bench, BlockReader
from streammerge.engine.surveying import Surveying, SurveyJob, with_result
from streammerge.methods.surveying import Survey
from streammerge.statistics.rounds import Found
from streammerge.statistics.surveying import Surveyed
from streammerge.tiles.interpreter import run_program
from streammerge.tiles.program import Program
from streammerge.tiles.totalling import HostSinks

if TYPE_CHECKING:
    from torch import Tensor


class PlainSurveys:
    """Surveys for one worker."""

    def __init__(self, bench: Bench, registers: Tensor, surveys: Sequence[Survey]) -> None:
        """Prepare.

        Args:
            bench: The worker's own.
            registers: ``[rows, BLOCK]`` in the compute dtype; enough for each of the programs.
            surveys: What is found, for each setting.
        """
        self._bench = bench
        self._registers = registers
        self._surveys = surveys
        self._surveying = Surveying()

    def survey(self, piece: PieceInMemory, found: Sequence[Found], out: Stored) -> list[Surveyed]:
        """Return the numbers of every part of a merged piece."""
        survey = self._surveys[piece.first.task.setting]
        answers = _PlainAnswers(self._bench, self._registers, with_result(piece, out), survey)
        return self._surveying.survey(piece, found, survey.layout, answers)


class _PlainAnswers:
    """Answers for one piece; see :class:`streammerge.engine.surveying.BlockAnswers`."""

    def __init__(
        self, bench: Bench, registers: Tensor, piece: PieceInMemory, survey: Survey
    ) -> None:
        self._bench = bench
        self._registers = registers
        self._piece = piece
        self._survey = survey
        setting = bench.plan.settings[piece.first.task.setting]
        self._sources = (*setting.sources, len(piece.inputs) - 1)

    def totals(self, jobs: Sequence[SurveyJob]) -> NDArray[np.float64]:
        """Return what the jobs leave."""
        program = self._survey.totals
        totals = np.empty((len(jobs), len(program.totals)))
        for job, row in zip(jobs, totals, strict=True):
            sinks = HostSinks(program, _no_ranks)
            self._run(program, job, sinks)
            row[:] = sinks.totals[0]
        return totals

    def magnitudes(
        self, jobs: Sequence[SurveyJob], sources: Sequence[int]
    ) -> list[NDArray[np.floating[Any]]]:
        """Return the magnitudes of some sources' vectors."""
        found: list[NDArray[np.floating[Any]]] = []
        for job in jobs:
            by_source: dict[int, NDArray[np.floating[Any]]] = {}

            def take(source: int, row: Tensor, to: dict[int, Any] = by_source) -> None:
                if source in sources:
                    to[source] = row.numpy().copy()

            program = self._survey.magnitudes
            self._run(program, job, HostSinks(program, take))
            found.append(np.stack([by_source[source] for source in sources]))
        return found

    def _run(self, program: Program, job: SurveyJob, sinks: HostSinks) -> None:
        numel = job.end - job.begin
        reader = BlockReader(
            self._bench,
            self._piece,
            job.begin,
            numel,
            [replace(job.segment, begin=0, end=numel)],
            program=program,
            check=False,
            sources=self._sources,
        )
        numbers = [each.value for each in program.numbers]
        run_program(
            program,
            reader,
            numbers=numbers,
            memory=self._registers[:, :numel],
            row_numel=numel,
            sinks=sinks,
        )


def _no_ranks(index: int, values: Tensor) -> None:
    raise AssertionError(f"value {index} of {values.shape} is not asked for")
