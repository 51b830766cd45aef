"""What the manifest will say about each tensor, added up from what became of its pieces."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from streammerge.checkpoint.journal import PieceDone


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What merging or copying one tensor came to."""

    kept: tuple[int, ...]
    """Entries kept per source; empty for methods that neither trim nor drop."""
    thresholds: tuple[float, ...]
    """Threshold per source; empty for methods that do not trim."""
    not_finite: int
    """Input values that were NaN or infinite and let through."""
    leaves: bytes
    """Digests of its leaves, joined in the order of the data."""


class Results:
    """Collects what threads report per piece."""

    def __init__(self, done_before: Iterable[PieceDone] = ()) -> None:
        """Start with what an interrupted run did."""
        self._lock = threading.Lock()
        self._by_task: dict[int, list[PieceDone]] = {}
        self.add(done_before)

    def add(self, pieces: Iterable[PieceDone]) -> None:
        """Add pieces of tensors, in any order."""
        with self._lock:
            for piece in pieces:
                self._by_task.setdefault(piece.task, []).append(piece)

    def by_task(self) -> dict[int, TensorResult]:
        """Return the result of every tensor, by task index."""
        with self._lock:
            return {task: _add_up(self._by_task[task]) for task in sorted(self._by_task)}


def _add_up(pieces: list[PieceDone]) -> TensorResult:
    in_order = sorted(pieces, key=lambda piece: piece.start)
    counted = [piece.kept for piece in in_order if piece.kept]
    return TensorResult(
        kept=tuple(map(sum, zip(*counted, strict=True))) if counted else in_order[0].tensor_kept,
        thresholds=in_order[0].thresholds,
        not_finite=sum(piece.not_finite for piece in in_order),
        leaves=bytes.fromhex("".join(piece.leaves for piece in in_order)),
    )
