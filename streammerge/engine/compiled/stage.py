"""Pieces measured and merged by compiled kernels, in one sweep from the slots to the output slot.

What kernels cannot take, of which the planner knows, goes the plain way, with the same bits.

Memory: one block of float32 per worker, its calls, and what the plain way takes where it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.engine.compiled.measuring import CompiledMeasuring
from streammerge.engine.compiled.merging import CompiledMerging
from streammerge.engine.device import Applied
from streammerge.engine.pieces import PieceInMemory, Stored
from streammerge.engine.plain import PlainStage
from streammerge.engine.segments import split_piece
from streammerge.methods.base import MagnitudeTopK, MergeMethod
from streammerge.native.library import Kernels
from streammerge.plan.types import MergePlan
from streammerge.reductions import BLOCK
from streammerge.reductions.magnitude import Counted, Question
from streammerge.reductions.topk import TopK


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
            plain: Takes what the kernels do not; None where there is no such thing.
        """
        memory = np.empty(BLOCK, dtype=np.float32)
        self._merging = CompiledMerging(kernels, plan, method, memory)
        self._measuring = CompiledMeasuring(kernels, plan, method, memory)
        self._maybe_plain = plain
        self._n_sources = len(plan.models) - plan.has_base
        self._tells = method.random or plan.model_scope

    @property
    def _plain(self) -> PlainStage:
        assert self._maybe_plain is not None  # noqa: S101 - the planner foresaw it
        return self._maybe_plain

    def apply(
        self, piece: PieceInMemory, tops: Sequence[tuple[TopK, ...]], out: Stored
    ) -> list[Applied]:
        """Merge a piece."""
        kept = [[0] * self._n_sources for _ in piece.parts]
        for block in self._merging.merge(piece, split_piece(piece, tops, kept), out):
            self._plain.merge(piece, block, out)
        return [Applied(0, tuple(counts) if self._tells else ()) for counts in kept]

    def convert(self, piece: PieceInMemory, out: Stored) -> Applied:
        """Convert a piece."""
        if self._merging.convert(piece, out):
            return Applied(0, ())
        return self._plain.convert(piece, out)

    def measure(
        self, piece: PieceInMemory, questions: Sequence[Question | None]
    ) -> list[list[Counted | None]]:
        """Answer questions about a piece."""
        answers = self._measuring.answer(piece, questions)
        return self._plain.measure(piece, questions) if answers is None else answers

    def select(self, piece: PieceInMemory, need: MagnitudeTopK) -> list[tuple[TopK, ...]]:
        """Find the thresholds of small tensors."""
        tops = self._measuring.select(piece, need)
        return self._plain.select(piece, need) if tops is None else tops

    def sample(self, piece: PieceInMemory, start: int, out: NDArray[Any]) -> None:
        """Fill in magnitudes."""
        if not self._measuring.sample(piece, start - piece.first.start, out):
            self._plain.sample(piece, start, out)
