"""Samples, answers to questions and thresholds of small tensors, by the compiled kernels.

Memory: 20 KiB of calls, and rows of the stage's scratch memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Never

import numpy as np
from numpy.typing import NDArray

from streammerge.engine.compiled.operands import CALLS, StoredOperand, find_operands, in_batches
from streammerge.engine.compiled.refusing import refuse_operands
from streammerge.engine.pieces import PieceInMemory
from streammerge.methods.base import MagnitudeTopK, MergeMethod, Operand
from streammerge.native.library import CROWDS_AT_MOST, Kernels, QuestionCall, SelectionCall
from streammerge.plan.types import MergePlan
from streammerge.reductions import BLOCK
from streammerge.reductions.magnitude import BINS, MOST_CROWDS, Band, Bins, Counted, Question
from streammerge.reductions.selecting import settled_without_values, statistic_of_block
from streammerge.reductions.topk import TopK, kept_count

assert MOST_CROWDS <= CROWDS_AT_MOST  # noqa: S101 - a band must fit a call

_MAGNITUDE_BITS = 2**31 - 1
_INFINITY = float("inf")


class CompiledMeasuring:
    """Measures task vectors for one worker."""

    def __init__(
        self, kernels: Kernels, plan: MergePlan, method: MergeMethod, memory: NDArray[np.float32]
    ) -> None:
        """Prepare the calls.

        Args:
            kernels: The compiled functions.
            plan: The plan.
            method: Its method; only task vectors can be measured.
            memory: ``[BLOCK]``, scratch.
        """
        self._kernels = kernels
        self._subtracts = method.operand is Operand.TASK_VECTORS
        self._plan = plan
        self._memory = memory
        self._questions = (QuestionCall * CALLS)()
        self._selections = (SelectionCall * CALLS)()

    def answer(
        self, piece: PieceInMemory, questions: Sequence[Question | None]
    ) -> list[list[Counted | None]] | None:
        """Answer every source's question for each block of a piece.

        Returns:
            ``[blocks][sources]``; None if the kernels cannot read the piece.

        Raises:
            NonFiniteError: A value is not finite.
        """
        operands = self._find_operands(piece)
        if operands is None:
            return None
        base, *sources = operands
        ranges = [(i, min(i + BLOCK, piece.numel)) for i in range(0, piece.numel, BLOCK)]
        found: list[list[Counted | None]] = [[None] * len(questions) for _ in ranges]
        asked = [
            (block, source, question)
            for block in range(len(ranges))
            for source, question in enumerate(questions)
            if question is not None
        ]
        for batch in in_batches(asked):
            for index, (block, source, question) in enumerate(batch):
                _ask(self._questions[index], base, sources[source], *ranges[block])
                _ask_about(self._questions[index], question)
            answers = self._answer_batch([question for *_, question in batch])
            for (block, source, _), answer in zip(batch, answers, strict=True):
                if answer is None:
                    self._refuse(piece, *ranges[block])
                found[block][source] = answer
        return found

    def _refuse(self, piece: PieceInMemory, begin: int, end: int) -> Never:
        """Raise the error about an operand that is not finite.

        A merge would raise it as well; a sweep over a model need not wait for that.
        """
        refuse_operands(piece, begin, end, self._plan, subtracts=True)
        raise AssertionError("the kernels refuse what is finite")

    def _find_operands(self, piece: PieceInMemory) -> list[StoredOperand] | None:
        """Return the base and the sources; None if there is no base, or the kernels cannot read."""
        return find_operands(piece, 0) if self._subtracts else None

    def _answer_batch(self, questions: Sequence[Question]) -> list[Counted | None]:
        """Answer what has been asked; None for a block in which a value is not finite."""
        answers: list[Counted | None] = []
        while len(answers) < len(questions):
            first = len(answers)
            if isinstance(questions[first], Bins):
                answers.append(self._answer_bins(first))
                continue
            bands = 1
            while first + bands < len(questions) and isinstance(questions[first + bands], Band):
                bands += 1
            answers += self._answer_bands(first, bands)
        return answers

    def _answer_bands(self, first: int, count: int) -> list[Counted | None]:
        """Answer at least one question, as many as there is room for what they collect."""
        done = self._kernels.answer_bands(self._questions, first, count, self._memory)
        answers: list[Counted | None] = []
        begin = 0
        for call in self._questions[first : first + done]:
            values = self._memory[begin : begin + call.inside].copy()
            begin += call.inside
            answer = Counted(call.above, values, tuple(call.crowds[: call.n_crowded]), None)
            answers.append(answer if call.largest < _INFINITY_BITS else None)
        return answers

    def _answer_bins(self, index: int) -> Counted | None:
        call = self._questions[index]
        histogram = np.zeros(BINS, dtype=np.int64)
        call.histogram = histogram.ctypes.data
        self._kernels.answer_bins(self._questions, index, 1)
        answer = Counted(call.above, None, (), histogram)
        return answer if call.largest < _INFINITY_BITS else None

    def sample(self, piece: PieceInMemory, begin: int, out: NDArray[np.float32]) -> bool:
        """Fill ``out``, ``[n_sources, run]``, with magnitudes from the piece's ``begin`` on.

        Returns:
            Whether the kernels can read the piece.
        """
        operands = self._find_operands(piece)
        if operands is None or out.size > self._memory.size:
            return False
        base, *sources = operands
        for batch in in_batches(list(zip(sources, out, strict=True))):
            for index, (source, row) in enumerate(batch):
                _ask(self._questions[index], base, source, begin, begin + row.size)
                # A band that holds every pattern: all are collected, in order.
                call = self._questions[index]
                call.low, call.high, call.n_crowded = 0, _MAGNITUDE_BITS, 0
            self._kernels.answer_bands(self._questions, 0, len(batch), self._memory)
            for index, (_, row) in enumerate(batch):
                row[:] = self._memory[index * row.size :][: row.size]
        return True

    def select(self, piece: PieceInMemory, need: MagnitudeTopK) -> list[tuple[TopK, ...]] | None:
        """Return the statistics of whole tensors that fill at most a block: parts, then sources.

        Returns:
            None where the kernels cannot read a tensor.

        Raises:
            NonFiniteError: A threshold is not finite.
        """
        operands = self._find_operands(piece)
        if operands is None:
            return None
        base, *sources = operands
        found = [
            [settled_without_values(end - begin, density) for density in need.densities]
            for _, begin, end in piece.ranges()
        ]
        jobs = [
            (part, source, begin, end)
            for part, (_, begin, end) in enumerate(piece.ranges())
            for source in range(len(sources))
            if found[part][source] is None
        ]
        for batch in in_batches(jobs):
            for call, (_, source, begin, end) in zip(self._selections, batch, strict=False):
                _ask(call, base, sources[source], begin, end)
                call.k = kept_count(need.densities[source], end - begin)
            self._kernels.select(self._selections, len(batch), self._memory.ctypes.data)
            for call, (part, source, *_) in zip(self._selections, batch, strict=False):
                if not call.threshold < _INFINITY:
                    self._refuse(piece, 0, piece.numel)
                found[part][source] = statistic_of_block(
                    (call.threshold, call.greater, call.equal), call.numel, call.k, need.tie_policy
                )
        return [tuple(top for top in tops if top is not None) for tops in found]


def _ask(
    call: QuestionCall | SelectionCall,
    base: StoredOperand,
    source: StoredOperand,
    begin: int,
    end: int,
) -> None:
    """Say which part of which task vector a call is about."""
    call.numel = end - begin
    call.values, call.dtype = source.at(begin), source.code
    call.base, call.base_dtype = base.at(begin), base.code


def _ask_about(call: QuestionCall, question: Question) -> None:
    """Say what is asked about it."""
    if isinstance(question, Bins):
        call.low, call.high = question.low_bits, question.high_bits
        call.shift = question.shift
        return
    call.low, call.high = _bits_of(question.low), _bits_of(question.high)
    call.n_crowded = len(question.crowded)
    for index, crowd in enumerate(question.crowded):
        call.crowded[index] = _bits_of(crowd)


def _bits_of(magnitude: float) -> int:
    return int(np.float32(magnitude).view(np.uint32))


_INFINITY_BITS = _bits_of(_INFINITY)
