"""The stage between loader and writer: merges and measures pieces of tensors that lie in memory.

A stage gets host memory and fills host memory; what lies between is its own affair. On the CPU
nothing is copied: blocks of 131,072 elements go from the slot through a worker's own scratch memory,
small enough for the core's cache, into the output slot. An accelerator's stage would stage the
slots through device memory behind the same calls.

Memory: per worker ``(n_sources + 1 + scratch rows + 1)`` blocks in the compute dtype, comparison
masks, and one block's random words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streammerge.dtypes import DType
from streammerge.engine.finite import check_finite, check_range, count_non_finite
from streammerge.methods.base import MagnitudeTopK, MergeChunk, MergeMethod, Operand, Stack
from streammerge.plan.types import MergePlan, TensorTask
from streammerge.reductions import BLOCK
from streammerge.reductions.magnitude import (
    Counted,
    Question,
    TopK,
    answer_block,
    count_kept,
    select_block,
)
from streammerge.rng import keep_mask, stream_key


@dataclass(frozen=True, slots=True)
class PieceInMemory:
    """A flat range of one tensor, in every input."""

    task: TensorTask
    """The tensor."""
    task_index: int
    """Its index in the plan."""
    start: int
    """First element; a multiple of a block."""
    inputs: tuple[Tensor | None, ...]
    """``[numel]`` per model, in the stored dtype, on the host; None takes no part."""

    @property
    def numel(self) -> int:
        """Elements in the piece."""
        return next(tensor.numel() for tensor in self.inputs if tensor is not None)


@dataclass(frozen=True, slots=True)
class Applied:
    """What merging a piece came to."""

    not_finite: int
    """Input values that were NaN or infinite; always 0 unless the recipe keeps them."""
    kept: tuple[int, ...]
    """Entries of the piece kept per source; empty where the statistics of the tensor tell, and for
    methods that neither trim nor drop."""


class DeviceStage(Protocol):
    """What a device must be able to do. One per worker thread; never called concurrently."""

    def apply(self, piece: PieceInMemory, tops: tuple[TopK, ...], out: Tensor) -> Applied:
        """Merge a piece into ``out``, ``[numel]`` in the output dtype, on the host.

        Args:
            piece: The inputs.
            tops: One statistic per source; empty when the method needs none.
            out: Receives the result.

        Returns:
            What the manifest records.

        Raises:
            NonFiniteError: An input or the result is not finite and the recipe forbids it.
        """
        ...

    def measure(
        self, piece: PieceInMemory, questions: Sequence[Question | None]
    ) -> list[list[Counted | None]]:
        """Answer every source's question for each block of a piece; ``[blocks][sources]``."""
        ...

    def select(self, piece: PieceInMemory, need: MagnitudeTopK) -> tuple[TopK, ...]:
        """Return the statistics of a tensor that is one block, one per source."""
        ...

    def sample(self, piece: PieceInMemory, start: int, out: NDArray[Any]) -> None:
        """Fill ``out``, ``[n_sources, run]``, with magnitudes from element ``start`` on."""
        ...


class CpuStage:
    """Merges block by block on the calling thread."""

    def __init__(self, plan: MergePlan, method: MergeMethod) -> None:
        """Allocate one worker's scratch memory."""
        self._plan = plan
        self._method = method
        self._params = [method.bind(setting.values) for setting in plan.settings]
        self._first_source = 1 if plan.has_base else 0
        self._subtracts = method.operand is Operand.TASK_VECTORS
        self._n_sources = len(plan.models) - self._first_source
        rows = self._n_sources + 1 + method.scratch_rows + 1
        self._memory = torch.empty(rows * BLOCK, dtype=torch_dtype(plan.compute_dtype))
        self._vectors = self._memory[: self._n_sources * BLOCK]
        rest = self._memory[self._n_sources * BLOCK :].view(-1, BLOCK)
        self._base, self._scratch, self._magnitudes = rest[0], rest[1:-1], rest[-1]
        self._masks = np.empty((2, BLOCK), dtype=np.bool_)
        # Making views costs as much as a small operation; nearly all blocks share these.
        whole = self._vectors.view(self._n_sources, BLOCK)
        self._full_block = Stack(whole, whole.unbind())

    def apply(self, piece: PieceInMemory, tops: tuple[TopK, ...], out: Tensor) -> Applied:
        """Merge a piece; see :class:`DeviceStage`."""
        task = piece.task
        params = self._params[task.setting]
        kept = [0] * self._n_sources
        not_finite = 0
        for begin in range(0, piece.numel, BLOCK):
            end = min(begin + BLOCK, piece.numel)
            base, vectors = self._load(piece, begin, end, check=not self._plan.keep_non_finite)
            block = task.scope_block + (piece.start + begin) // BLOCK
            if self._plan.model_scope:
                self._count_kept(kept, vectors, tops, block)
            chunk = MergeChunk(
                base=base,
                vectors=vectors,
                scratch=self._scratch[:, : end - begin],
                block=block,
                stats=tops,
                masks=_PositionalMasks(self._plan.seed, task.name, piece.start + begin, kept),
            )
            merged = self._method.apply(chunk, params)
            if self._plan.keep_non_finite:
                not_finite += count_non_finite(piece.inputs, begin, end)
            else:
                check_range(merged, task, piece.start + begin)
            out[begin:end].copy_(merged)
        if self._method.random or self._plan.model_scope:
            return Applied(not_finite, tuple(kept))
        return Applied(not_finite, ())

    def measure(
        self, piece: PieceInMemory, questions: Sequence[Question | None]
    ) -> list[list[Counted | None]]:
        """Answer questions about a piece; see :class:`DeviceStage`."""
        answers = []
        for begin in range(0, piece.numel, BLOCK):
            end = min(begin + BLOCK, piece.numel)
            # A tensor is merged right after it is measured, and checked then; a whole model is not.
            check = self._plan.model_scope and not self._plan.keep_non_finite
            _, vectors = self._load(piece, begin, end, check=check)
            magnitudes = self._magnitudes[: end - begin]
            found: list[Counted | None] = []
            for row, question in zip(vectors.rows, questions, strict=True):
                if question is None:
                    found.append(None)
                    continue
                torch.abs(row, out=magnitudes)
                found.append(answer_block(question, magnitudes.numpy(), self._masks))
            answers.append(found)
        return answers

    def select(self, piece: PieceInMemory, need: MagnitudeTopK) -> tuple[TopK, ...]:
        """Find the thresholds of a small tensor; see :class:`DeviceStage`."""
        _, vectors = self._load(piece, 0, piece.numel, check=False)
        magnitudes = torch.abs(vectors.whole, out=vectors.whole).numpy()
        return tuple(
            select_block(row, density, need.tie_policy)
            for row, density in zip(magnitudes, need.densities, strict=True)
        )

    def sample(self, piece: PieceInMemory, start: int, out: NDArray[Any]) -> None:
        """Fill in magnitudes; see :class:`DeviceStage`."""
        begin = start - piece.start
        _, vectors = self._load(piece, begin, begin + out.shape[1], check=False)
        torch.abs(vectors.whole, out=torch.from_numpy(out))

    def _count_kept(
        self, kept: list[int], vectors: Stack, tops: tuple[TopK, ...], block: int
    ) -> None:
        """Add how many entries of this block each source keeps under a threshold of the model."""
        magnitudes = self._magnitudes[: vectors.whole.shape[1]]
        for source, (row, top) in enumerate(zip(vectors.rows, tops, strict=True)):
            torch.abs(row, out=magnitudes)
            kept[source] += count_kept(magnitudes.numpy(), top, block, self._masks)

    def _load(
        self, piece: PieceInMemory, begin: int, end: int, *, check: bool
    ) -> tuple[Tensor | None, Stack]:
        """Convert one block of every input; return the base and the operands."""
        numel = end - begin
        vectors = self._operands(piece, numel)
        base = None
        if self._subtracts:
            stored = piece.inputs[0]
            assert stored is not None  # noqa: S101 - the planner gave every merge its base
            base = self._base[:numel].copy_(stored[begin:end])
        for row, stored in zip(vectors.rows, piece.inputs[self._first_source :], strict=True):
            assert stored is not None  # noqa: S101 - and all its sources
            row.copy_(stored[begin:end])
            if base is not None:
                row.sub_(base)
            if check:
                check_finite(
                    row,
                    piece.inputs,
                    plan=self._plan,
                    task=piece.task,
                    start=piece.start,
                    begin=begin,
                    end=end,
                )
        return base, vectors

    def _operands(self, piece: PieceInMemory, numel: int) -> Stack:
        """Return ``[n, numel]`` of scratch memory, laid out as a whole-tensor stack would be.

        torch.sum chooses its order of addition by the layout: a tensor of one block is dense, a
        block of a larger one has rows far apart. This matters for five or more sources.
        """
        if piece.task.numel <= BLOCK:
            dense = self._vectors[: self._n_sources * numel].view(self._n_sources, numel)
            return Stack(dense, dense.unbind())
        if numel == BLOCK:
            return self._full_block
        part = self._full_block.whole[:, :numel]
        return Stack(part, part.unbind())


@dataclass(frozen=True, slots=True)
class _PositionalMasks:
    """Draws the masks of one block."""

    seed: int
    tensor_name: str
    start: int
    kept: list[int]

    def drop_(self, row: Tensor, *, source: int, density: float) -> Tensor:
        if density >= 1:
            self.kept[source] += row.numel()
            return row
        if density <= 0:
            return row.zero_()
        key = stream_key(self.seed, source, self.tensor_name)
        mask = keep_mask(key, self.start, row.numel(), density)
        # numpy multiplies floats by bool several times faster than torch, on the same memory.
        values = row.numpy()
        np.multiply(values, mask, out=values)
        self.kept[source] += int(np.count_nonzero(mask))
        return row


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's element type of that name."""
    found = getattr(torch, dtype.torch_name)
    assert isinstance(found, torch.dtype)  # noqa: S101 - the table is fixed
    return found
