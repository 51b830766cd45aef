"""What a CPU stage leaves to compiled kernels: blocks in usual types, that turn out to be finite.

Each call says whether it did its work. Where it did not, the caller does it the plain way, which
gives the same bits, and names what is wrong where something is.

Memory: rows of the stage's scratch memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streammerge.dtypes import DType
from streammerge.engine.finite import LARGEST
from streammerge.engine.pieces import PieceInMemory, torch_dtype
from streammerge.engine.segments import Segment
from streammerge.methods.base import Joined, Kept, MergeMethod, Operand, Sweep
from streammerge.methods.parts import ADD_LEFT_TO_RIGHT
from streammerge.native.library import (
    ALL_TIES,
    CROWDS_AT_MOST,
    DTYPE_CODES,
    SOURCES_AT_MOST,
    Combine,
    Keep,
    Kernels,
    MergeCall,
    QuestionCall,
    SourceCall,
    count_scratch,
    load_kernels,
)
from streammerge.plan.types import MergePlan
from streammerge.reductions import BLOCK
from streammerge.reductions.magnitude import BINS, MOST_CROWDS, Bins, Counted, Question
from streammerge.reductions.topk import TopK
from streammerge.rng import keep_limit, stream_key

assert MOST_CROWDS <= CROWDS_AT_MOST  # noqa: S101 - a band must fit a call

_CODES: Mapping[torch.dtype, int] = {
    torch_dtype(dtype): code for dtype, code in DTYPE_CODES.items()
}
_COMBINE = {
    Joined.SUM: Combine.SUM,
    Joined.MAJORITY_TOTAL: Combine.MAJORITY_TOTAL,
    Joined.MAJORITY_FREQUENCY: Combine.MAJORITY_FREQUENCY,
}
_VECTOR_COLUMNS = 64
"""torch.sum adds more rows than a few from left to right in the columns that it takes by whole
vectors, several at a time; this is a multiple of all of them."""


class CompiledBlocks:
    """Merges and measures blocks for one worker."""

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
        self._plan = plan
        self._first_source = 1 if plan.has_base else 0
        self._subtracts = method.operand is Operand.TASK_VECTORS
        self._counts = method.random or plan.model_scope
        self._sweeps = [method.sweep(method.bind(setting.values)) for setting in plan.settings]
        self._memory = memory.numpy()
        count = len(plan.models) - self._first_source
        self._sources = (SourceCall * count)()
        self._merge = MergeCall(
            sources=ctypes.cast(self._sources, ctypes.POINTER(SourceCall)),
            scratch=memory.data_ptr(),
            n_sources=count,
        )
        self._question = QuestionCall()
        self._any_length = count <= ADD_LEFT_TO_RIGHT

    def merge(
        self, piece: PieceInMemory, segments: Sequence[Segment], begin: int, out: Tensor
    ) -> bool:
        """Merge a block of a piece, unless it takes more than the kernels can do.

        Args:
            piece: The inputs.
            segments: What the block holds of each tensor; what was kept is added to their counts.
            begin: First element of the block in the piece.
            out: ``[numel]`` in the output dtype, the piece's; receives the block.

        Returns:
            Whether the block is merged.
        """
        sweep = self._sweeps[piece.first.task.setting]
        if sweep is None or not self._takes(piece):
            return False
        call = self._merge
        call.base_dtype = self._code_of(piece, 0) if self._subtracts else 0
        call.out_dtype = DTYPE_CODES[piece.first.task.dtype]
        call.limit = LARGEST[piece.first.task.dtype]
        call.divisor = sweep.divisor
        call.combine = _COMBINE[sweep.joined]
        for source, weight in zip(self._sources, sweep.weights, strict=True):
            source.weight = weight
        counts = []
        for segment in segments:
            if not self._merge_segment(piece, segment, sweep, begin + segment.begin, out):
                return False
            counts.append([source.kept for source in self._sources])
        if self._counts:
            for segment, kept in zip(segments, counts, strict=True):
                segment.add_kept(kept)
        return True

    def _merge_segment(
        self, piece: PieceInMemory, segment: Segment, sweep: Sweep, at: int, out: Tensor
    ) -> bool:
        numel = segment.end - segment.begin
        if not self._any_length and numel % _VECTOR_COLUMNS:
            return False
        call = self._merge
        call.numel = numel
        call.base = self._address(piece, 0, at) if self._subtracts else None
        call.out = out.data_ptr() + at * out.itemsize
        for index, source in enumerate(self._sources):
            model = self._first_source + index
            source.values = self._address(piece, model, at)
            source.dtype = self._code_of(piece, model)
            if sweep.kept is Kept.LARGEST:
                _keep_largest(source, segment.tops[index], segment.block)
            elif sweep.kept is Kept.RANDOM:
                density = sweep.densities[index]
                key = stream_key(self._plan.seed, index, segment.part.task.name)
                _keep_randomly(source, density, key, segment.start)
        return self._kernels.merge_block(call)

    def answer(
        self, piece: PieceInMemory, source: int, question: Question, begin: int, end: int
    ) -> Counted | None:
        """Answer a question about a block of one source's task vector.

        Returns:
            The answer; None where the kernels cannot tell, or a value is not finite.
        """
        if not self._takes(piece):
            return None
        call = self._ask(piece, source, begin, end)
        if isinstance(question, Bins):
            answer = self._answer_bins(call, question)
        else:
            call.low, call.high = _bits_of(question.low), _bits_of(question.high)
            call.n_crowded = len(question.crowded)
            for index, crowd in enumerate(question.crowded):
                call.crowded[index] = _bits_of(crowd)
            call.collected = self._memory.ctypes.data
            self._kernels.answer_band(call)
            crowds = tuple(call.crowds[: call.n_crowded])
            answer = Counted(call.above, self._memory[: call.inside].copy(), crowds, None)
        return answer if call.largest < _INFINITY_BITS else None

    def sample(self, piece: PieceInMemory, begin: int, out: NDArray[np.float32]) -> bool:
        """Fill ``out``, ``[n_sources, run]``, with magnitudes from the piece's ``begin`` on.

        Returns:
            Whether the kernels can read the piece.
        """
        if not self._takes(piece):
            return False
        for source, row in enumerate(out):
            call = self._ask(piece, source, begin, begin + row.size)
            # A band that holds every pattern: all are collected, in order.
            call.low, call.high, call.n_crowded = 0, _MAGNITUDE_BITS, 0
            call.collected = row.ctypes.data
            self._kernels.answer_band(call)
        return True

    def _ask(self, piece: PieceInMemory, source: int, begin: int, end: int) -> QuestionCall:
        """Prepare a call about a source's task vector."""
        model = self._first_source + source
        call = self._question
        call.numel = end - begin
        call.values, call.dtype = self._address(piece, model, begin), self._code_of(piece, model)
        call.base, call.base_dtype = self._address(piece, 0, begin), self._code_of(piece, 0)
        return call

    def _answer_bins(self, call: QuestionCall, question: Bins) -> Counted:
        histogram = np.zeros(BINS, dtype=np.int64)
        call.low, call.high = question.low_bits, question.high_bits
        call.shift = question.shift
        call.histogram = histogram.ctypes.data
        self._kernels.answer_bins(call)
        return Counted(call.above, None, (), histogram)

    def _takes(self, piece: PieceInMemory) -> bool:
        """Return whether the kernels can read all operands of a piece, and write the result."""
        needed = piece.inputs if self._subtracts else piece.inputs[self._first_source :]
        return (
            all(stored is not None and stored.dtype in _CODES for stored in needed)
            and not any(piece.deltas)
            and piece.first.task.dtype in DTYPE_CODES
        )

    @staticmethod
    def _address(piece: PieceInMemory, model: int, at: int) -> int:
        stored = piece.inputs[model]
        assert stored is not None  # noqa: S101 - was asked before
        return stored.data_ptr() + at * stored.itemsize

    @staticmethod
    def _code_of(piece: PieceInMemory, model: int) -> int:
        stored = piece.inputs[model]
        assert stored is not None  # noqa: S101 - was asked before
        return _CODES[stored.dtype]


def open_compiled(plan: MergePlan, method: MergeMethod, memory: Tensor) -> CompiledBlocks | None:
    """Return the compiled way for a plan; None where there is none.

    Args:
        plan: The plan.
        method: Its method.
        memory: ``[BLOCK]`` in the compute dtype, scratch of one worker.
    """
    kernels = load_kernels()
    count = len(plan.models) - plan.has_base
    if kernels is None or plan.keep_non_finite or plan.compute_dtype is not DType.F32:
        return None
    if not 0 < count <= SOURCES_AT_MOST or count_scratch(count) > memory.numel():
        return None
    if count > ADD_LEFT_TO_RIGHT and not _torch_adds_left_to_right(count):
        return None
    return CompiledBlocks(kernels, plan, method, memory)


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


def _torch_adds_left_to_right(rows: int) -> bool:
    """Return whether this torch adds so many rows as the kernels do, in columns taken as vectors."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, 2 * _VECTOR_COLUMNS, generator=generator)
    added = values[0].clone()
    for row in values[1:]:
        added += row
    apart = torch.empty(rows, BLOCK)[:, : 2 * _VECTOR_COLUMNS].copy_(values)
    return torch.equal(values.sum(dim=0), added) and torch.equal(apart.sum(dim=0), added)


def _bits_of(magnitude: float) -> int:
    return int(np.float32(magnitude).view(np.uint32))


_INFINITY_BITS = _bits_of(float("inf"))
_MAGNITUDE_BITS = 2**31 - 1
