"""What an interrupted run has done already, cut as this run cuts its work.

A piece counts as done if the journal has exactly this piece, or if what the journal has of its
tensor covers the whole tensor, however it was cut. So a tensor that was half done is redone when
this run cuts it differently, which takes another memory budget.

Memory: what :class:`~streammerge.checkpoint.recorded.Recorded` has of each piece until the records are taken,
then that of pieces of tensors that are half done; a byte per tensor.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, replace

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.journal import PieceDone, ScopeFound
from streammerge.checkpoint.recorded import Recorded
from streammerge.plan.chunking import Chunk, Piece, Unit
from streammerge.plan.types import MergePlan, TensorTask, find_scale_tasks
from streammerge.statistics.rounds import Found
from streammerge.statistics.topk import TopK

WHOLE_MODEL = -1
"""Stands for the whole model where a tensor's index is expected."""


class Recovered:
    """What need not be done again."""

    def __init__(
        self, plan: MergePlan, recorded: Recorded, wanted: Callable[[Piece], bool] | None
    ) -> None:
        """Match journals with a plan of the same merge.

        Args:
            plan: The plan of this run.
            recorded: What the journals hold.
            wanted: Which pieces are of interest at all; None for all. What is not of interest
                counts as done.
        """
        self._plan = plan
        self._wanted = wanted
        self._recorded = recorded
        self._found: dict[int, Found] = {}
        for scope in recorded.scopes.values():
            tops = tuple(
                TopK(float(threshold), *(int(count) for count in counts))
                for threshold, *counts in scope.tops
            )
            self._found[scope.task] = Found(tops, tuple(map(float, scope.numbers)))
        self._whole = np.zeros(len(plan.tasks), dtype=bool)
        self._rows: dict[int, tuple[int, int]] = {}
        if len(recorded):
            self._match()
        self._scale_tasks = find_scale_tasks(plan)
        if self._scale_tasks:
            self._forget_halves()

    def _match(self) -> None:
        """Find the tensors that are whole, and the rows of those that are not."""
        tasks, starts = self._recorded.tasks, self._recorded.starts
        ends = starts + self._recorded.numels
        first = np.flatnonzero(np.concatenate([[True], tasks[1:] != tasks[:-1]]))
        last = np.concatenate([first[1:], [len(tasks)]]) - 1
        # Ranges that lie end to end, from 0 to the tensor's end.
        meets = np.ones(len(tasks), dtype=bool)
        meets[1:] = starts[1:] == ends[:-1]
        meets[first] = starts[first] == 0
        whole = np.logical_and.reduceat(meets, first)
        numels = np.fromiter(
            (self._plan.tasks[task].numel for task in tasks[first]), dtype=np.int64
        )
        whole &= ends[last] == numels
        self._whole[tasks[first[whole]]] = True
        self._find_rows(first, last)

    def _find_rows(self, first: NDArray[np.int64], last: NDArray[np.int64]) -> None:
        tasks = self._recorded.tasks[first].tolist()
        self._rows = {
            task: (begin, end + 1)
            for task, begin, end in zip(tasks, first.tolist(), last.tolist(), strict=True)
            if not self._whole[task]
        }

    def _forget_halves(self) -> None:
        """Forget scales without all of their codes, which are found again, and codes without scales."""
        for index, task in enumerate(self._plan.tasks):
            if task.encoding is None:
                continue
            scales = self._scale_tasks[task.encoding.scales]
            if self._whole[index] and self._whole[scales]:
                continue
            for lost in (scales,) if self._whole[scales] else (scales, index):
                self._rows.pop(lost, None)
                self._whole[lost] = False

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
        return bool(self._whole[piece.task]) or self._row_of(piece) is not None

    def _row_of(self, piece: Piece) -> int | None:
        """Return the number of the record of exactly this piece of a tensor that is half done."""
        rows = self._rows.get(piece.task)
        if rows is None:
            return None
        begin, end = rows
        row = begin + int(np.searchsorted(self._recorded.starts[begin:end], piece.start))
        if row == end or self._recorded.starts[row] != piece.start:
            return None
        return row if self._recorded.numels[row] == piece.numel else None

    def take_pieces(self, units: Iterable[Unit]) -> Iterator[PieceDone]:
        """Give away the records of what counts as done when the work is cut into these units."""
        recorded = self._recorded
        if not len(recorded):
            return
        whole = self._whole[recorded.tasks]
        yield from recorded.read(None if whole.all() else np.flatnonzero(whole))
        rows = array("q")
        if self._rows:
            for unit in units:
                for chunk in unit.chunks:
                    for piece in chunk.pieces:
                        if not self._whole[piece.task] and self.has(piece):
                            row = self._row_of(piece)
                            if row is not None:
                                rows.append(row)
        yield from recorded.read(np.frombuffer(rows, dtype=np.int64))
        self._recorded = recorded.only(~whole)
        if len(self._recorded):
            tasks = self._recorded.tasks
            first = np.flatnonzero(np.concatenate([[True], tasks[1:] != tasks[:-1]]))
            kept = set(self._rows)
            self._find_rows(first, np.concatenate([first[1:], [len(tasks)]]) - 1)
            self._rows = {task: rows for task, rows in self._rows.items() if task in kept}

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
