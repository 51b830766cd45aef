"""What the manifest will say about each tensor, added up from what became of its pieces."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.digests import DIGEST_BYTES, LEAF_ELEMENTS
from streammerge.checkpoint.journal import PieceDone
from streammerge.methods import discover_methods
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import MergePlan
from streammerge.statistics.surveying import BINS, Surveyed


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What merging or copying one tensor came to."""

    kept: tuple[int, ...]
    """Entries kept per source; empty for methods that neither trim nor drop."""
    tensor_kept: tuple[int, ...]
    """Entries that each threshold of the tensor keeps."""
    thresholds: tuple[float, ...]
    """The thresholds; empty for methods that do not trim."""
    numbers: tuple[float, ...]
    """What else the statistics came to; empty where that is nothing."""
    not_finite: int
    """Input values that were NaN or infinite and let through."""
    leaves: bytes
    """Digests of its leaves, joined in the order of the data."""
    survey: NDArray[np.float64] | None = None
    """What a report knows of it, as :meth:`~streammerge.statistics.surveying.Surveyed.row` has it."""


class Results:
    """Adds up what threads report per piece.

    Memory: what :func:`streammerge.plan.budgeting.records_bytes` says.
    """

    def __init__(self, plan: MergePlan, done_before: Iterable[PieceDone] = ()) -> None:
        """Start with what an interrupted run did."""
        self._plan = plan
        self._programs = programs_of_plan(plan, discover_methods()[plan.method])
        self._lock = threading.Lock()
        self._by_task: dict[int, _Sum] = {}
        self._histograms = np.zeros((len(plan.models), BINS), dtype=np.int64)
        self.add(done_before)

    def add(self, pieces: Iterable[PieceDone]) -> None:
        """Add pieces of tensors, in any order."""
        with self._lock:
            for piece in pieces:
                found = self._by_task.get(piece.task)
                if found is None:
                    found = _Sum(self._plan.tasks[piece.task].numel)
                    self._by_task[piece.task] = found
                found.add(piece)
                if piece.survey:
                    self._add_survey(found, piece)

    def _add_survey(self, found: _Sum, piece: PieceDone) -> None:
        surveyed = Surveyed(*piece.survey)
        found.add_survey(surveyed, piece.numel)
        sources = self._plan.settings[self._plan.tasks[piece.task].setting].sources
        for model, histogram in zip(sources, surveyed.histograms, strict=True):
            for place, count in histogram:
                self._histograms[model, place] += count

    def histograms(self) -> NDArray[np.int64]:
        """Return how many sampled elements of each model's vector lie in each bin, ``[models, bins]``."""
        return self._histograms

    def by_task(self) -> dict[int, TensorResult]:
        """Return the result of every tensor, by task index."""
        with self._lock:
            return {task: self._result(task) for task in sorted(self._by_task)}

    def _result(self, task: int) -> TensorResult:
        found = self._by_task[task]
        setting = self._plan.tasks[task].setting
        if setting < 0 or not found.tensor_kept or found.kept:
            return found.result(found.kept)
        # By those thresholds that the merge trims with; rounds may have found more.
        programs = self._programs[setting]
        return found.result(
            programs.kept([found.tensor_kept[trim] for trim in programs.merge.trims])
        )


class _Sum:
    """The pieces of one tensor, added up."""

    __slots__ = (
        "_leaves", "_not_finite", "_numbers", "_survey", "_surveyed", "_thresholds",
        "_unsurveyed", "kept", "tensor_kept",
    )  # fmt: skip

    def __init__(self, numel: int) -> None:
        self._unsurveyed = numel
        self._surveyed: Surveyed | None = None
        self._survey: NDArray[np.float64] | None = None
        self._leaves = bytearray(-(-numel // LEAF_ELEMENTS) * DIGEST_BYTES)
        self.kept: tuple[int, ...] = ()
        self.tensor_kept: tuple[int, ...] = ()
        self._thresholds: tuple[float, ...] = ()
        self._numbers: tuple[float, ...] = ()
        self._not_finite = 0

    def add(self, piece: PieceDone) -> None:
        leaves = bytes.fromhex(piece.leaves)
        begin = piece.start // LEAF_ELEMENTS * DIGEST_BYTES
        self._leaves[begin : begin + len(leaves)] = leaves
        if piece.kept:
            known = self.kept or (0,) * len(piece.kept)
            self.kept = tuple(a + b for a, b in zip(known, piece.kept, strict=True))
        self._not_finite += piece.not_finite
        self.tensor_kept, self._thresholds = piece.tensor_kept, piece.thresholds
        self._numbers = piece.numbers

    def add_survey(self, surveyed: Surveyed, numel: int) -> None:
        """Add what a report knows of some elements; rounded, and shorter, when it is all there."""
        known = self._surveyed
        self._surveyed = surveyed if known is None else known.joined(surveyed)
        self._unsurveyed -= numel
        if self._unsurveyed == 0:
            self._survey = self._surveyed.row()
            self._surveyed = None

    def result(self, kept: tuple[int, ...]) -> TensorResult:
        """Return what it came to, of which so many entries per source were kept."""
        return TensorResult(
            kept=kept,
            tensor_kept=self.tensor_kept,
            thresholds=self._thresholds,
            numbers=self._numbers,
            not_finite=self._not_finite,
            leaves=bytes(self._leaves),
            survey=self._survey,
        )
