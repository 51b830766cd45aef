"""Pieces measured and merged by the compiled machine, from the slots to the output slot.

What it cannot take, of which the planner knows, goes the plain way, with the same bits.

Memory: a worker's bench, and what the plain way takes where it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from numpy.typing import NDArray

from streammerge.engine.asking import Asking, BlockAnswer
from streammerge.engine.compiled.bench import Bench
from streammerge.engine.compiled.changed import ChangedOperands
from streammerge.engine.compiled.measuring import CompiledMeasuring
from streammerge.engine.compiled.merging import CompiledMerging
from streammerge.engine.compiled.rows import CompiledRows
from streammerge.engine.compiled.surveying import CompiledSurveys
from streammerge.engine.device import Applied
from streammerge.engine.pieces import PieceInMemory, Stored
from streammerge.engine.plain import PlainStage, count_kept_of
from streammerge.engine.segments import split_piece
from streammerge.methods.base import MergeMethod
from streammerge.native.library import Kernels
from streammerge.plan.sweeps import programs_of_plan, surveys_of_plan
from streammerge.plan.types import MergePlan
from streammerge.statistics.magnitude import SampleRun
from streammerge.statistics.rounds import Found
from streammerge.statistics.surveying import Surveyed


class CompiledStage:
    """Merges and measures for one worker; see :class:`streammerge.engine.device.DeviceStage`."""

    def __init__(
        self, kernels: Kernels, plan: MergePlan, method: MergeMethod, plain: PlainStage | None
    ) -> None:
        """Allocate scratch memory.

        Args:
            kernels: The compiled functions.
            plan: The plan.
            method: Its method.
            plain: Takes what the machine does not; None where there is no such thing.
        """
        self._programs = programs_of_plan(plan, method)
        self._tells = method.random or plan.model_scope
        surveys = surveys_of_plan(plan, self._programs)
        bench = Bench(kernels, plan, self._programs, surveys)
        rows = CompiledRows(bench, self._programs)
        changed = None
        if any(task.changes for task in plan.tasks):
            bench_of_plain = None if plain is None else plain.bench
            changed = ChangedOperands(kernels, plan, self._programs, bench_of_plain)
        self._merging = CompiledMerging(bench, rows, changed, counts=self._tells)
        self._measuring = CompiledMeasuring(bench, rows, self._programs, changed)
        self._surveys = CompiledSurveys(bench, surveys, changed)
        self._maybe_plain = plain

    @property
    def _plain(self) -> PlainStage:
        assert self._maybe_plain is not None  # noqa: S101 - the planner foresaw it
        return self._maybe_plain

    def apply(self, piece: PieceInMemory, found: Sequence[Found], out: Stored) -> list[Applied]:
        """Merge a piece."""
        programs = self._programs[piece.first.task.setting]
        kept = [[0] * count_kept_of(programs) for _ in piece.parts]
        blocks = split_piece(piece, found, kept)
        if piece.first.task.row:
            merged = self._merging.merge_rows(piece, blocks[0], out)
        else:
            merged = self._merging.merge(piece, blocks, out)
        if not merged:
            return self._plain.apply(piece, found, out)
        told = [programs.kept(each) if self._tells else () for each in kept]
        return [Applied(0, each) for each in told]

    def survey(self, piece: PieceInMemory, found: Sequence[Found], out: Stored) -> list[Surveyed]:
        """Return what a report knows of a piece."""
        totals = self._merging.take_totals(piece)
        surveyed = self._surveys.survey(piece, found, out, totals)
        return self._plain.survey(piece, found, out) if surveyed is None else surveyed

    def convert(self, piece: PieceInMemory, out: Stored) -> Applied:
        """Convert a piece."""
        if self._merging.convert(piece, out):
            return Applied(0, ())
        return self._plain.convert(piece, out)

    def measure(self, piece: PieceInMemory, asking: Asking) -> Iterable[BlockAnswer]:
        """Answer questions about a piece."""
        answers = self._measuring.answer(piece, asking)
        return self._plain.measure(piece, asking) if answers is None else answers

    def gather(self, piece: PieceInMemory, out: NDArray[Any]) -> None:
        """Fill in vectors."""
        self._plain.gather(piece, out)

    def settle(self, piece: PieceInMemory) -> list[Found]:
        """Find all that is asked about small tensors."""
        if piece.first.task.whole:
            return self._plain.settle(piece)
        found = self._measuring.settle(piece)
        return self._plain.settle(piece) if found is None else found

    def sample(
        self, piece: PieceInMemory, runs: Sequence[SampleRun], asking: Asking, out: NDArray[Any]
    ) -> None:
        """Fill in values to be ranked."""
        if not self._measuring.sample(piece, runs, asking, out):
            self._plain.sample(piece, runs, asking, out)
