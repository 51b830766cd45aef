"""What an interrupted run has done already, cut as this run cuts its work.

A piece counts as done if the journal has exactly this piece, or if what the journal has of its
tensor covers the whole tensor, however it was cut. So a tensor that was half done is redone when
this run cuts it differently, which takes another memory budget.

Memory: the journal's entries until their records are taken, then a start and a length per piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, replace

from streammerge.checkpoint.journal import Entry, PieceDone, ScopeFound
from streammerge.plan.chunking import Chunk, Piece, Unit
from streammerge.plan.types import MergePlan, TensorTask, find_scale_tasks
from streammerge.statistics.rounds import Found
from streammerge.statistics.topk import TopK

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
        self._records: dict[int, dict[int, PieceDone]] = {}
        self._found: dict[int, Found] = {}
        for entry in entries:
            if isinstance(entry, ScopeFound):
                tops = tuple(
                    TopK(float(threshold), *(int(count) for count in counts))
                    for threshold, *counts in entry.tops
                )
                self._found[entry.task] = Found(tops, tuple(map(float, entry.numbers)))
            else:
                # A later record of the same place is of the cut that the last run used.
                self._records.setdefault(entry.task, {})[entry.start] = entry
        self._numels = {
            task: {start: piece.numel for start, piece in records.items()}
            for task, records in self._records.items()
        }
        self._whole = {
            task for task, numels in self._numels.items() if _covers(numels, plan.tasks[task].numel)
        }
        self._scale_tasks = find_scale_tasks(plan)
        if self._scale_tasks:
            self._forget_halves()

    def _forget_halves(self) -> None:
        """Forget scales without all of their codes, which are found again, and codes without scales."""
        for index, task in enumerate(self._plan.tasks):
            if task.encoding is None:
                continue
            scales = self._scale_tasks[task.encoding.scales]
            if index in self._whole and scales in self._whole:
                continue
            for lost in (scales,) if scales in self._whole else (scales, index):
                self._records.pop(lost, None)
                self._numels.pop(lost, None)
                self._whole.discard(lost)

    def has_scales(self, task: TensorTask) -> bool:
        """Return whether the scales of a tensor need not be done; so too of one that has none."""
        if task.encoding is None:
            return True
        index = self._scale_tasks[task.encoding.scales]
        return self.has(Piece(index, 0, self._plan.tasks[index].numel))

    def found_of(self, task: int) -> Found | None:
        """Return the statistics of a tensor, or of :data:`WHOLE_MODEL`, where they are known."""
        return self._found.get(task)

    def has(self, piece: Piece) -> bool:
        """Return whether a piece need not be done."""
        if self._wanted is not None and not self._wanted(piece):
            return True
        if piece.task in self._whole:
            return True
        known = self._numels.get(piece.task)
        return known is not None and known.get(piece.start) == piece.numel

    def take_pieces(self, units: Iterable[Unit]) -> list[PieceDone]:
        """Give away the records of what counts as done when the work is cut into these units."""
        records, self._records = self._records, {}
        done = [piece for task in sorted(self._whole) for piece in records[task].values()]
        if len(self._whole) == len(records):
            return done
        for unit in units:
            for chunk in unit.chunks:
                for piece in chunk.pieces:
                    if piece.task not in self._whole and self.has(piece):
                        known = records.get(piece.task, {}).get(piece.start)
                        if known is not None:
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
        scales = [self._plan.tasks[index] for index in self._scale_tasks.values()]
        owners = [task for task in self._plan.tasks if task.encoding and self.has_scales(task)]
        done = {task.encoding.scales for task in owners if task.encoding}
        return total + sum(each.numel * each.dtype.itemsize for each in scales if each.name in done)

    def rest_of(self, chunk: Chunk) -> Chunk | None:
        """Return what is left to do of a chunk; None when nothing is."""
        left = tuple(piece for piece in chunk.pieces if not self._is_done(piece))
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

    def _is_done(self, piece: Piece) -> bool:
        """Return whether nothing is left of a piece; the scales of a whole tensor are made with it."""
        task = self._plan.tasks[piece.task]
        return self.has(piece) and (piece.numel < task.numel or self.has_scales(task))


def scope_found(task: int, found: Found) -> ScopeFound:
    """Return the journal's entry about the statistics of a scope."""
    return ScopeFound(task, tuple(astuple(top) for top in found.tops), found.numbers)


def _covers(numels: Mapping[int, int], numel: int) -> bool:
    """Return whether ranges, given by start and length, lie end to end from 0 to ``numel``."""
    end = 0
    for start in sorted(numels):
        if start != end:
            return False
        end += numels[start]
    return end == numel
