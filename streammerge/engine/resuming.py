"""What an interrupted run has done already, cut as this run cuts its work.

A piece counts as done if the journal has exactly this piece, or if what the journal has of its
tensor covers the whole tensor, however it was cut. So a tensor that was half done is redone when
this run cuts it differently, which takes another memory budget.

Memory: the journal's entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, replace

from streammerge.checkpoint.journal import Entry, PieceDone, ScopeFound
from streammerge.plan.chunking import Chunk, Piece, Unit
from streammerge.plan.types import MergePlan
from streammerge.reductions.topk import TopK

WHOLE_MODEL = -1
"""Stands for the whole model where a tensor's index is expected."""


class Recovered:
    """What need not be done again."""

    def __init__(
        self, plan: MergePlan, entries: Sequence[Entry], wanted: Callable[[Piece], bool] | None
    ) -> None:
        """Match a journal with a plan of the same merge.

        Args:
            plan: The plan of this run.
            entries: What the journal holds.
            wanted: Which pieces are of interest at all; None for all. What is not of interest
                counts as done.
        """
        self._plan = plan
        self._wanted = wanted
        self._pieces: dict[int, dict[tuple[int, int], PieceDone]] = {}
        self._tops: dict[int, tuple[TopK, ...]] = {}
        for entry in entries:
            if isinstance(entry, ScopeFound):
                self._tops[entry.task] = tuple(
                    TopK(float(threshold), *(int(count) for count in counts))
                    for threshold, *counts in entry.tops
                )
            else:
                # The same piece may be there twice: a merge that stopped between bytes and record.
                self._pieces.setdefault(entry.task, {})[entry.start, entry.numel] = entry
        self._whole = {
            task for task, pieces in self._pieces.items() if _covers(pieces, plan.tasks[task].numel)
        }

    def tops_of(self, task: int) -> tuple[TopK, ...] | None:
        """Return the statistics of a tensor, or of :data:`WHOLE_MODEL`, where they are known."""
        return self._tops.get(task)

    def has(self, piece: Piece) -> bool:
        """Return whether a piece need not be done."""
        if self._wanted is not None and not self._wanted(piece):
            return True
        known = self._pieces.get(piece.task)
        return known is not None and (
            piece.task in self._whole or (piece.start, piece.numel) in known
        )

    def pieces(self, units: Iterable[Unit]) -> list[PieceDone]:
        """Return the records of what counts as done when the work is cut into these units."""
        done = [piece for task in sorted(self._whole) for piece in self._pieces[task].values()]
        if len(self._whole) == len(self._pieces):
            return done
        for unit in units:
            for chunk in unit.chunks:
                for piece in chunk.pieces:
                    known = self._pieces.get(piece.task, {}).get((piece.start, piece.numel))
                    if known is not None and piece.task not in self._whole:
                        done.append(known)
        return done

    def nbytes(self, units: Iterable[Unit]) -> int:
        """Return the bytes that are neither read nor written when the work is cut like this."""
        total = 0
        for unit in units:
            for chunk in unit.chunks:
                for piece in chunk.pieces:
                    if self.has(piece):
                        task = self._plan.tasks[piece.task]
                        stored = [entry.dtype for entry in task.inputs if entry is not None]
                        total += piece.numel * sum(t.itemsize for t in (*stored, task.dtype))
        return total

    def rest_of(self, chunk: Chunk) -> Chunk | None:
        """Return what is left to do of a chunk; None when nothing is."""
        left = tuple(piece for piece in chunk.pieces if not self.has(piece))
        if len(left) == len(chunk.pieces):
            return chunk
        if not left:
            return None
        models = {
            model
            for piece in left
            for model, entry in enumerate(self._plan.tasks[piece.task].inputs)
            if entry is not None
        }
        return replace(chunk, pieces=left, models=tuple(sorted(models)))


def scope_found(task: int, tops: Sequence[TopK]) -> ScopeFound:
    """Return the journal's entry about the statistics of a scope."""
    return ScopeFound(task, tuple(astuple(top) for top in tops))


def _covers(pieces: Iterable[tuple[int, int]], numel: int) -> bool:
    """Return whether (start, numel) ranges lie end to end from 0 to ``numel``."""
    end = 0
    for start, count in sorted(pieces):
        if start != end:
            return False
        end += count
    return end == numel
