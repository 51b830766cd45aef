"""What adapters do to blocks of a piece, on one worker.

Memory: :data:`~streammerge.adapters.onto_base.changes.DELTA_ROWS` blocks in the compute dtype, where a plan has
adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        """Write what changes add to the base, which must all be sums, into a block's row."""
        if not deltas:
            row.zero_()
            return
        start = piece.first.start + begin
        deltas[0].fill(row, start, self._work)
        for delta in deltas[1:]:
            part = self._delta[: row.numel()]
            delta.fill(part, start, self._work)
            row.add_(part)

    def apply_(
        self,
        weights: Tensor,
        delta: Delta,
        piece: PieceInMemory,
        begin: int,
        *,
        base_dtype: torch.dtype | None = None,
    ) -> None:
        """Change a block's weights in place; products are rounded where PEFT does, given a type."""
        start = piece.first.start + begin
        delta.apply_(weights, start, self._work, self._delta, base_dtype)


@dataclass(frozen=True, slots=True)
class PieceSteps:
    """The sources of one block as steps."""

    work: ChangeWork
    piece: PieceInMemory
    begin: int
    first_source: int

    def step_(self, weights: Tensor, *, source: int) -> Tensor:
        """Do one step; see :class:`streammerge.methods.base.Steps`."""
        model = self.first_source + source
        dtype = torch_dtype(self.piece.first.task.dtype)
        for delta in self.piece.deltas[model] if self.piece.deltas else ():
            self.work.apply_(weights, delta, self.piece, self.begin, base_dtype=dtype)
            weights.copy_(weights.to(dtype))
        return weights
