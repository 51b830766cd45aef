"""Blocks of a piece to blocks of the output, by the compiled kernels.

Memory: 6 KiB and 96 bytes per source and call, and rows of the stage's scratch memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Never

import numpy as np
from numpy.typing import NDArray

from streammerge.dtypes import DType
from streammerge.engine.compiled.operands import CALLS, StoredOperand, find_operands, in_batches
from streammerge.engine.compiled.refusing import refuse_operands
from streammerge.engine.finite import LARGEST, check_range
from streammerge.engine.pieces import PieceInMemory, Stored
from streammerge.engine.segments import Block, Segment
from streammerge.methods.base import MergeMethod, Operand, Sweep
from streammerge.native.library import ALL_TIES, DTYPE_CODES, Kernels, MergeCall, SourceCall
from streammerge.native.words import Combine, Keep
from streammerge.plan.kernels import VECTOR_COLUMNS, any_length, first_operand
from streammerge.plan.types import MergePlan
from streammerge.reductions import BLOCK
from streammerge.reductions.topk import TopK
from streammerge.rng import keep_limit, stream_key


class CompiledMerging:
    """Merges blocks for one worker."""

    def __init__(
        self, kernels: Kernels, plan: MergePlan, method: MergeMethod, memory: NDArray[np.float32]
    ) -> None:
        """Prepare the calls.

        Args:
            kernels: The compiled functions.
            plan: The plan.
            method: Its method.
            memory: ``[BLOCK]``, scratch.
        """
        self._kernels = kernels
        self._plan = plan
        self._subtracts = method.operand is Operand.TASK_VECTORS
        self._first = first_operand(method, has_base=plan.has_base)
        self._counts = method.random or plan.model_scope
        self._sweeps = [method.sweep(method.bind(setting.values)) for setting in plan.settings]
        self._scratch = memory.ctypes.data
        self._n_sources = len(plan.models) - plan.has_base
        self._calls = (MergeCall * CALLS)()
        self._sources = [(SourceCall * self._n_sources)() for _ in range(CALLS)]
        for call, sources in zip(self._calls, self._sources, strict=True):
            call.sources = ctypes.cast(sources, ctypes.POINTER(SourceCall))
            call.n_sources = self._n_sources

    def merge(self, piece: PieceInMemory, blocks: Sequence[Block], out: Stored) -> Sequence[Block]:
        """Merge blocks of a piece, as far as the kernels can.

        Args:
            piece: The inputs.
            blocks: Its blocks; what was kept is added to the counts of those that are merged.
            out: ``[numel]`` in the output dtype; receives them.

        Returns:
            The blocks that are left.

        Raises:
            NonFiniteError: An operand is not finite, or a result does not fit the output type.
        """
        sweep = self._sweeps[piece.first.task.setting]
        operands = find_operands(piece, self._first)
        if sweep is None or operands is None or out.dtype not in DTYPE_CODES:
            return blocks
        left = [block for block in blocks if not self._takes(block)]
        jobs = [
            _Job(block.begin + segment.begin, block.begin + segment.end, segment)
            for block in blocks
            if self._takes(block)
            for segment in block.segments
        ]
        target = StoredOperand.of(out)
        for batch in in_batches(jobs):
            for index, job in enumerate(batch):
                self._ask(index, sweep, operands, job)
                call = self._calls[index]
                call.out, call.out_dtype = target.at(job.begin), target.code
                call.limit = LARGEST[out.dtype]
            if self._kernels.merge_blocks(self._calls, len(batch), self._scratch):
                refused = next(
                    job for call, job in zip(self._calls, batch, strict=False) if call.refused
                )
                self._refuse(piece, sweep, operands, refused)
            if self._counts:
                for sources, job in zip(self._sources, batch, strict=False):
                    job.segment.add_kept([source.kept for source in sources])
        return left

    def convert(self, piece: PieceInMemory, out: Stored) -> bool:
        """Store the values of a piece's one input in another type; return whether kernels can.

        Every value is added to minus zero, which keeps all: the sum of what it differs from itself
        by, divided by minus one.

        Raises:
            NonFiniteError: A value is not finite, or does not fit the type.
        """
        stored = next(each for each in piece.inputs if each is not None)
        if not {stored.dtype, out.dtype} <= DTYPE_CODES.keys():
            return False
        operand, target = StoredOperand.of(stored), StoredOperand.of(out)
        for batch in in_batches(list(range(0, piece.numel, BLOCK))):
            for index, begin in enumerate(batch):
                call, source = self._calls[index], self._sources[index][0]
                call.numel = min(BLOCK, piece.numel - begin)
                call.combine, call.divisor, call.n_sources = Combine.SUM, -1.0, 1
                call.base, call.base_dtype = operand.at(begin), operand.code
                source.values, source.dtype = operand.at(begin), operand.code
                source.weight, source.keep = 1.0, Keep.ALL
                call.out, call.out_dtype = target.at(begin), target.code
                call.limit = LARGEST[out.dtype]
            refused = self._kernels.merge_blocks(self._calls, len(batch), self._scratch)
            for call, begin in zip(self._calls, batch, strict=False):
                call.n_sources, call.base = self._n_sources, None
                if refused and call.refused:
                    check_range(stored.widen(begin, begin + call.numel), piece, begin)
        return True

    def _takes(self, block: Block) -> bool:
        """Return whether the kernels add the rows of a block as torch.sum does."""
        return any_length(self._n_sources) or (block.end - block.begin) % VECTOR_COLUMNS == 0

    def _refuse(
        self, piece: PieceInMemory, sweep: Sweep, operands: Sequence[StoredOperand], job: _Job
    ) -> Never:
        """Raise the error about an operand, or about a result, which is computed once more."""
        # As the plain way does: of several tensors side by side, all operands are looked at first.
        begin, end = (0, piece.numel) if len(piece.parts) > 1 else (job.begin, job.end)
        refuse_operands(piece, begin, end, self._plan, subtracts=self._subtracts)
        merged = np.empty(job.end - job.begin, dtype=np.float32)
        self._ask(0, sweep, operands, job)
        call = self._calls[0]
        call.out, call.out_dtype = merged.ctypes.data, DTYPE_CODES[DType.F32]
        self._kernels.merge_blocks(self._calls, 1, self._scratch)
        check_range(merged, piece, job.begin)
        raise AssertionError("the kernels refuse what is finite and fits")

    def _ask(self, index: int, sweep: Sweep, operands: Sequence[StoredOperand], job: _Job) -> None:
        """Prepare the call for one tensor's part of a block, but for where the result goes."""
        call, segment = self._calls[index], job.segment
        call.numel = job.end - job.begin
        call.divisor = sweep.divisor
        call.combine = sweep.combine
        if self._subtracts:
            base, *operands = operands
            call.base, call.base_dtype = base.at(job.begin), base.code
        for number, (operand, weight) in enumerate(zip(operands, sweep.weights, strict=True)):
            source = self._sources[index][number]
            source.values, source.dtype = operand.at(job.begin), operand.code
            source.weight = weight
            if sweep.keep is Keep.LARGEST:
                _keep_largest(source, segment.tops[number], segment.block)
            elif sweep.keep is Keep.RANDOM:
                key = stream_key(self._plan.seed, number, segment.part.task.name)
                _keep_randomly(source, sweep.densities[number], key, segment.start)


@dataclass(frozen=True, slots=True)
class _Job:
    """One tensor's part of a block."""

    begin: int
    """First element in the piece."""
    end: int
    """End in the piece."""
    segment: Segment
    """What it is of the tensor."""


def _keep_largest(source: SourceCall, top: TopK, block: int) -> None:
    ties = top.ties_to_keep(block)
    source.keep = Keep.ALL if top.greater == top.numel else Keep.LARGEST
    source.threshold = top.threshold
    source.ties = ALL_TIES if ties is None else ties


def _keep_randomly(source: SourceCall, density: float, key: int, start: int) -> None:
    source.keep = Keep.ALL if density >= 1 else Keep.RANDOM
    if density <= 0:
        # Larger than infinity is nothing.
        source.keep, source.threshold, source.ties = Keep.LARGEST, float("inf"), 0
    source.density = density
    source.upper_limit, source.lower_limit = divmod(keep_limit(density), 2**16)
    source.key[0], source.key[1] = key & 2**64 - 1, key >> 64
    source.start = start
