"""What the manifest will say about each tensor, collected while the work runs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.engine.device import Applied
from streammerge.engine.pieces import PieceInMemory
from streammerge.reductions.topk import TopK


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What merging one tensor came to."""

    kept: tuple[int, ...]
    """Entries kept per source; empty for methods that neither trim nor drop."""
    thresholds: tuple[float, ...]
    """Threshold per source; empty for methods that do not trim."""
    not_finite: int
    """Input values that were NaN or infinite and let through."""


class Results:
    """Adds up what threads report per piece."""

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.Lock()
        self._by_task: dict[int, TensorResult] = {}

    def add(
        self,
        piece: PieceInMemory,
        applied: Sequence[Applied],
        tops: Sequence[tuple[TopK, ...]],
    ) -> None:
        """Add what merging a piece came to, part by part."""
        with self._lock:
            for part, part_applied, part_tops in zip(piece.parts, applied, tops, strict=True):
                self._add(part.task_index, part_applied, part_tops)

    def _add(self, task: int, applied: Applied, tops: tuple[TopK, ...]) -> None:
        known = self._by_task.get(task)
        if not applied.kept:
            kept = tuple(top.kept for top in tops)
        elif known is None:
            kept = applied.kept
        else:
            kept = tuple(a + b for a, b in zip(known.kept, applied.kept, strict=True))
        self._by_task[task] = TensorResult(
            kept=kept,
            thresholds=tuple(top.threshold for top in tops),
            not_finite=applied.not_finite + (known.not_finite if known else 0),
        )

    def by_task(self) -> dict[int, TensorResult]:
        """Return the result of every merged tensor, by task index."""
        with self._lock:
            return dict(sorted(self._by_task.items()))
