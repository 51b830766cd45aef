"""What a merged piece comes to in numbers for a report: asked block by block, joined here.

The inputs are in memory and so is the result, so nothing is read for it. Whoever answers for the blocks,
the machine or the interpreter, the numbers have the same bits.

Memory: totals of a piece's blocks, one source's magnitudes of a block, and a sample of all of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streammerge.engine.pieces import PieceInMemory, Stored
from streammerge.engine.segments import Segment, split_piece
from streammerge.statistics.exact import exact_rows, exact_sums
from streammerge.statistics.rounds import Found
from streammerge.statistics.surveying import (
    Surveyed,
    SurveyLayout,
    count_bins,
    nothing_surveyed,
    sampled_run,
)

_SKIPPED = -1
"""In place of the element of a largest magnitude that another piece of the tensor is known to exceed."""


@dataclass(frozen=True, slots=True)
class SurveyJob:
    """What one block of a piece holds of one tensor."""

    begin: int
    """First element in the piece."""
    end: int
    """End in the piece."""
    segment: Segment
    """What it is of the tensor."""
    part: int
    """Which part of the piece it belongs to."""

    def cut(self, begin: int, numel: int) -> SurveyJob:
        """Return a range of it, whose magnitudes are wanted: trims do not matter there."""
        return replace(self, begin=self.begin + begin, end=self.begin + begin + numel)


class BlockAnswers(Protocol):
    """Who runs a survey's programs on the blocks of one piece."""

    def totals(self, jobs: Sequence[SurveyJob]) -> NDArray[np.float64]:
        """Return what each job's program leaves, ``[jobs, totals]``."""
        ...

    def magnitudes(
        self, jobs: Sequence[SurveyJob], sources: Sequence[int]
    ) -> list[NDArray[np.floating[Any]]]:
        """Return the magnitudes of some sources' vectors, ``[sources, elements]`` for each job."""
        ...


class Surveying:
    """Surveys for one worker."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._task = -1
        self._records: list[float] = []

    def survey(
        self,
        piece: PieceInMemory,
        found: Sequence[Found],
        layout: SurveyLayout,
        answers: BlockAnswers,
    ) -> list[Surveyed]:
        """Return the numbers of every part of a piece.

        Args:
            piece: The inputs, without what lies around it.
            found: What is known of each of its parts.
            layout: Which numbers there are.
            answers: Answers for its blocks.
        """
        jobs = _jobs_of(piece, found)
        surveyed = [nothing_surveyed(layout) for _ in piece.parts]
        if not jobs:
            return surveyed
        totals = answers.totals(jobs)
        if len(piece.parts) > 1:
            for job, numbers in zip(
                jobs, _survey_whole(jobs, totals, layout, answers), strict=True
            ):
                surveyed[job.part] = numbers
            return surveyed
        sums, counts, largest = np.split(totals, _ends_of(layout), axis=1)
        runs = [job.cut(*sampled_run(job.segment.start, job.end - job.begin)) for job in jobs]
        sample = np.concatenate(answers.magnitudes(runs, range(layout.sources)), axis=1)
        numels = [sample.shape[1]]
        surveyed[0] = Surveyed(
            exact_sums(sums),
            tuple(map(int, counts.sum(axis=0).tolist())),
            self._find_largest(jobs, largest, answers),
            tuple(count_bins(numels, row.astype(np.float32))[0] for row in sample),
        )
        return surveyed

    def _find_largest(
        self, jobs: Sequence[SurveyJob], largest: NDArray[np.float64], answers: BlockAnswers
    ) -> tuple[tuple[float, int], ...]:
        """Return the largest magnitude of every source in one part, and where it is.

        Args:
            jobs: The part's, in flat order.
            largest: ``[jobs, sources]``.
            answers: Answers for blocks.
        """
        task = jobs[0].segment.part.task_index
        if task != self._task:
            self._task, self._records = task, [0.0] * largest.shape[1]
        found = []
        for source, column in enumerate(largest.T):
            # Of what is no number there is no larger.
            at = int(np.argmax(column))
            value = float(column[at])
            if value < self._records[source]:
                found.append((value, _SKIPPED))
                continue
            element = 0
            if value != 0:
                (row,) = answers.magnitudes([jobs[at]], [source])
                element = jobs[at].segment.start + int(np.argmax(row[0]))
            self._records[source] = value
            found.append((value, element))
        return tuple(found)


def _ends_of(layout: SurveyLayout) -> list[int]:
    """Return where sums end, and counts."""
    return [layout.n_sums, layout.n_sums + layout.n_counts]


def _survey_whole(
    jobs: Sequence[SurveyJob],
    totals: NDArray[np.float64],
    layout: SurveyLayout,
    answers: BlockAnswers,
) -> Iterator[Surveyed]:
    """Yield the numbers of small tensors, each of which is whole in one job.

    They come by the ten thousand, so that what can be is done for all of them at once.
    """
    sums, counts, largest = np.split(totals, _ends_of(layout), axis=1)
    values = answers.magnitudes(jobs, range(layout.sources))
    runs = [sampled_run(job.segment.start, job.end - job.begin) for job in jobs]
    sample = np.concatenate(
        [own[:, first : first + numel] for own, (first, numel) in zip(values, runs, strict=True)],
        axis=1,
    ).astype(np.float32)
    numels = [numel for _, numel in runs]
    histograms = zip(*(count_bins(numels, row) for row in sample), strict=True)
    # Of what is no number there is no larger; of all zeros the first is.
    places = [own.argmax(axis=1).tolist() for own in values]
    for own, count, best, at, bins in zip(
        exact_rows(sums),
        counts.astype(np.int64).tolist(),
        largest.tolist(),
        places,
        histograms,
        strict=True,
    ):
        yield Surveyed(own, tuple(count), tuple(zip(best, at, strict=True)), bins)


def _jobs_of(piece: PieceInMemory, found: Sequence[Found]) -> list[SurveyJob]:
    # What a method made of a whole tensor is no concern here, nor what is known of rows.
    known = [Found(each.tops, each.numbers) for each in found]
    places = {id(part): index for index, part in enumerate(piece.parts)}
    return [
        SurveyJob(
            block.begin + segment.begin,
            block.begin + segment.end,
            segment,
            places[id(segment.part)],
        )
        for block in split_piece(piece, known, [[] for _ in piece.parts])
        for segment in block.segments
        if segment.end > segment.begin
    ]


def with_result(piece: PieceInMemory, out: Stored) -> PieceInMemory:
    """Return a piece without what lies around it, and with its result behind the models."""
    inputs = tuple(
        None if each is None else _within(each, piece.before, piece.numel) for each in piece.inputs
    )
    deltas = (*piece.deltas, ()) if piece.deltas else ()
    return PieceInMemory(piece.parts, (*inputs, out), deltas)


def _within(stored: Stored, begin: int, numel: int) -> Stored:
    size = stored.dtype.itemsize
    return Stored(stored.memory[begin * size : (begin + numel) * size], stored.dtype)
