"""What adapters do to pieces, on one worker.

A product of torch's is computed for a whole block of the tensor, even where a part of it is asked for: the
bits of a row of it may depend on how many are multiplied.

Memory: :data:`~streammerge.adapters.onto_base.changes.DELTA_ROWS` blocks in the compute dtype, where a plan has
adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.adapters.onto_base.deltas import WORK_NUMEL, Delta
from streammerge.engine.pieces import PieceInMemory, torch_dtype
from streammerge.lazily import torch
from streammerge.plan.types import MergePlan
from streammerge.statistics import BLOCK

if TYPE_CHECKING:
    from torch import Tensor


class ChangeWork:
    """One worker's scratch memory for changes."""

    def __init__(self, plan: MergePlan) -> None:
        """Allocate it, if the plan has changes."""
        changes = any(task.changes for task in plan.tasks)
        memory = torch.empty(
            WORK_NUMEL + BLOCK if changes else 0, dtype=torch_dtype(plan.compute_dtype)
        )
        self._work, self._delta = memory[:WORK_NUMEL], memory[WORK_NUMEL:]

    def sum_into(
        self, row: Tensor, deltas: Sequence[Delta], piece: PieceInMemory, begin: int
    ) -> None:
        """Write what changes add to the base, which must all be sums, into some of its elements."""
        if not deltas:
            row.zero_()
            return
        for part, start, block in _by_block(row, piece, begin):
            if part.numel() == len(block) or not deltas[0].depends_on_cut:
                deltas[0].fill(part, start, self._work)
            else:
                part.copy_(self._products(deltas[0], start, block)[: part.numel()])
            for delta in deltas[1:]:
                own = block if delta.depends_on_cut else range(start, start + part.numel())
                part.add_(self._products(delta, start, own)[: part.numel()])

    def _products(self, delta: Delta, start: int, block: range) -> Tensor:
        """Return what a change adds in a range, from an element of it on."""
        products = self._delta[: len(block)]
        delta.fill(products, block.start, self._work)
        return products[start - block.start :]

    def apply_(
        self,
        weights: Tensor,
        delta: Delta,
        piece: PieceInMemory,
        begin: int,
        *,
        base_dtype: torch.dtype | None = None,
    ) -> None:
        """Change weights in place; products are rounded where PEFT does, given a type."""
        for part, start, block in _by_block(weights, piece, begin):
            delta.apply_(part, start, self._work, self._delta, base_dtype, block=block)


def _by_block(row: Tensor, piece: PieceInMemory, begin: int) -> Iterator[tuple[Tensor, int, range]]:
    """Cut a range of a piece at the ends of its tensor's blocks: parts, where they begin, and blocks."""
    start = piece.first.start + begin
    end = start + row.numel()
    for first in range(start // BLOCK * BLOCK, end, BLOCK):
        block = range(first, min(first + BLOCK, piece.first.task.numel))
        low, high = max(start, block.start), min(end, block.stop)
        yield row[low - start : high - start], low, block


@dataclass(frozen=True, slots=True)
class PieceSteps:
    """The sources of one block as steps."""

    work: ChangeWork
    piece: PieceInMemory
    begin: int

    def step_(self, weights: Tensor, *, model: int) -> Tensor:
        """Do one step, given a source's place among the models."""
        dtype = torch_dtype(self.piece.first.task.dtype)
        for delta in self.piece.deltas[model] if self.piece.deltas else ():
            self.work.apply_(weights, delta, self.piece, self.begin, base_dtype=dtype)
            weights.copy_(weights.to(dtype))
        return weights
