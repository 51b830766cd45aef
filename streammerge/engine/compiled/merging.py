"""Blocks of a piece to blocks of the output, by the compiled kernels.

Memory: 6 KiB and 96 bytes per source and call, and rows of the stage's scratch memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from streammerge.engine.compiled.operands import CALLS, StoredOperand, find_operands, in_batches
from streammerge.engine.finite import LARGEST
from streammerge.engine.pieces import PieceInMemory
from streammerge.engine.segments import Block, Segment
from streammerge.methods.base import MergeMethod, Operand, Sweep
from streammerge.methods.parts import ADD_LEFT_TO_RIGHT
from streammerge.native.library import (
    ALL_TIES,
    DTYPE_CODES,
    Kernels,
    MergeCall,
    SourceCall,
)
from streammerge.native.words import Keep
from streammerge.plan.types import MergePlan
from streammerge.reductions.topk import TopK
from streammerge.rng import keep_limit, stream_key

VECTOR_COLUMNS = 64
"""torch.sum adds more rows than a few from left to right in the columns that it takes by whole
vectors, several at a time; this is a multiple of all of them."""


class CompiledMerging:
    """Merges blocks for one worker."""

    def __init__(
        self, kernels: Kernels, plan: MergePlan, method: MergeMethod, memory: Tensor
    ) -> None:
        """Prepare the calls.

        Args:
            kernels: The compiled functions.
            plan: The plan.
            method: Its method.
            memory: ``[BLOCK]`` float32, scratch.
        """
        self._kernels = kernels
        self._seed = plan.seed
        self._subtracts = method.operand is Operand.TASK_VECTORS
        self._first = 0 if self._subtracts else int(plan.has_base)
        self._counts = method.random or plan.model_scope
        self._sweeps = [method.sweep(method.bind(setting.values)) for setting in plan.settings]
        self._memory = memory
        self._n_sources = len(plan.models) - plan.has_base
        self._any_length = self._n_sources <= ADD_LEFT_TO_RIGHT
        self._sources = (SourceCall * (CALLS * self._n_sources))()
        self._calls = (MergeCall * CALLS)()
        for index, call in enumerate(self._calls):
            own = ctypes.byref(self._sources, index * self._n_sources * ctypes.sizeof(SourceCall))
            call.sources = ctypes.cast(own, ctypes.POINTER(SourceCall))

    def merge(self, piece: PieceInMemory, blocks: Sequence[Block], out: Tensor) -> list[Block]:
        """Merge blocks of a piece, as far as the kernels can.

        Args:
            piece: The inputs.
            blocks: Its blocks; what was kept is added to the counts of those that are merged.
            out: ``[numel]`` in the output dtype; receives them.

        Returns:
            The blocks that are left.
        """
        sweep = self._sweeps[piece.first.task.setting]
        operands = find_operands(piece, self._first)
        if sweep is None or operands is None or piece.first.task.dtype not in DTYPE_CODES:
            return list(blocks)
        jobs = [
            (block, segment)
            for block in blocks
            if self._any_length or (block.end - block.begin) % VECTOR_COLUMNS == 0
            for segment in block.segments
        ]
        refused = {block.begin for block in blocks} - {block.begin for block, _ in jobs}
        kept: list[list[int]] = []
        for batch in in_batches(jobs):
            for index, (block, segment) in enumerate(batch):
                at = block.begin + segment.begin
                self._calls[index].out = out.data_ptr() + at * out.itemsize
                self._ask(index, sweep, operands, segment, at)
            if self._kernels.merge_blocks(self._calls, len(batch), self._memory.data_ptr()):
                calls = zip(self._calls, batch, strict=False)
                refused |= {block.begin for call, (block, _) in calls if call.refused}
            kept += self._read_kept(len(batch))
        for (block, segment), counts in zip(jobs, kept, strict=self._counts):
            if block.begin not in refused:
                segment.add_kept(counts)
        return [block for block in blocks if block.begin in refused]

    def _ask(
        self,
        index: int,
        sweep: Sweep,
        operands: Sequence[StoredOperand],
        segment: Segment,
        at: int,
    ) -> None:
        """Prepare the call for one tensor's part of a block, from element ``at`` of the piece on."""
        call = self._calls[index]
        dtype = segment.part.task.dtype
        call.numel = segment.end - segment.begin
        call.out_dtype, call.limit = DTYPE_CODES[dtype], LARGEST[dtype]
        call.divisor = sweep.divisor
        call.n_sources = self._n_sources
        call.combine = sweep.combine
        if self._subtracts:
            base, *operands = operands
            call.base, call.base_dtype = base.at(at), base.code
        for number, (operand, weight) in enumerate(zip(operands, sweep.weights, strict=True)):
            source = self._sources[index * self._n_sources + number]
            source.values, source.dtype = operand.at(at), operand.code
            source.weight = weight
            if sweep.keep is Keep.LARGEST:
                _keep_largest(source, segment.tops[number], segment.block)
            elif sweep.keep is Keep.RANDOM:
                key = stream_key(self._seed, number, segment.part.task.name)
                _keep_randomly(source, sweep.densities[number], key, segment.start)

    def _read_kept(self, count: int) -> list[list[int]]:
        """Return what each source of the first calls kept, where it is to be counted."""
        if not self._counts:
            return []
        n = self._n_sources
        return [[source.kept for source in self._sources[i * n : i * n + n]] for i in range(count)]


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
