"""Answers to the questions of :mod:`streammerge.statistics.magnitude`, in tensor arithmetic.

What :func:`~streammerge.statistics.magnitude.answer_block` does for one block in numpy, for many
blocks at once and without a look at any value: results are added to tensors on the device, whose
sizes are known beforehand, and fetched when all is done.

A histogram is made by sorting each block's bins and looking for their borders. Counting with
atomic additions would queue up at a few counters, which is what the differences of fine-tunes,
with their many zeros and few distinct values, lead to; and its usual kernels ask for the largest
bin first, which means to wait.

Where kernels can be compiled, :mod:`streammerge.engine.accelerator.fused.selecting` takes the place
of :meth:`Answers.add_`, which is its oracle.

Memory: about 48 bytes per element while an answer is counted, and what :class:`Answers` holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streammerge.lazily import torch
from streammerge.statistics import BLOCK, count_blocks
from streammerge.statistics.magnitude import BINS, MOST_CROWDS, Band, Bins, Counted, Question
from streammerge.statistics.topk import Floats
from streammerge.tiles.program import Op

if TYPE_CHECKING:
    from torch import Tensor

COUNTS = 2 + MOST_CROWDS
"""Counters per block and source: magnitudes that are not above, that lie inside, and the crowds."""
ASKED = 8
"""Numbers by which a fused kernel is told a question: 64 bytes, so that each begins aligned."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What one source's blocks have answered so far; all on one device."""

    counts: Tensor
    """``[blocks, COUNTS]`` int64."""
    values: Tensor
    """``[limit + 1]`` in the compute dtype: magnitudes inside a band, in flat order. The last one
    takes what finds no room."""
    filled: Tensor
    """``[1]`` int64: magnitudes inside a band, those without room as well."""
    histogram: Tensor
    """``[BINS]`` int64."""
    borders: Tensor
    """``[BINS + 1]`` int32: 0, 1, 2 and so on."""

    def clear_(self) -> None:
        """Start anew."""
        self.counts.zero_()
        self.filled.zero_()
        self.histogram.zero_()

    def add_(self, question: Question, magnitudes: Tensor, first_block: int) -> None:
        """Answer a question for some blocks; the last one may be short.

        Args:
            question: What the search asks.
            magnitudes: ``[m]`` absolute values.
            first_block: Which row of the counts belongs to their first block.
        """
        rows = self.counts[first_block : first_block + count_blocks(magnitudes.numel())]
        if isinstance(question, Bins):
            self._add_bins_(question, magnitudes, rows)
        else:
            self._add_band_(question, magnitudes, rows)

    def _add_band_(self, question: Band, magnitudes: Tensor, rows: Tensor) -> None:
        inside = magnitudes <= question.high
        _count_(inside, rows[:, 0])
        if question.crowded == (question.high,) == (question.low,):
            _count_(magnitudes == question.low, rows[:, 2])
            return
        if question.low > 0:
            inside &= magnitudes >= question.low
        for index, crowd in enumerate(question.crowded):
            crowded = magnitudes == crowd
            _count_(crowded, rows[:, 2 + index])
            inside &= ~crowded
        _count_(inside, rows[:, 1])
        self._collect_(magnitudes, inside)

    def _collect_(self, magnitudes: Tensor, inside: Tensor) -> None:
        """Append the values inside: each one's place is the number of those before it."""
        limit = self.values.numel() - 1
        places = torch.cumsum(inside, dim=0, dtype=torch.int64)
        total = places[-1:].clone()
        places.add_(self.filled - 1)
        places.masked_fill_(~inside, limit).clamp_max_(limit)
        self.values.scatter_(0, places, magnitudes)
        self.filled.add_(total)

    def _add_bins_(self, question: Bins, magnitudes: Tensor, rows: Tensor) -> None:
        patterns = magnitudes.view(torch.int32 if magnitudes.itemsize == 4 else torch.int64)
        _count_(patterns <= question.high_bits, rows[:, 0])
        for begin in range(0, patterns.numel(), BLOCK):
            block = patterns[begin : begin + BLOCK]
            outside = (block < question.low_bits) | (block > question.high_bits)
            bins = ((block - question.low_bits) >> question.shift).masked_fill_(outside, BINS)
            ordered = bins.to(torch.int32).sort().values
            ends = torch.searchsorted(ordered, self.borders)
            self.histogram.add_(ends[1:] - ends[:-1])


def _count_(chosen: Tensor, column: Tensor) -> None:
    """Write how many elements of each block are chosen into ``[blocks]``."""
    whole = chosen.numel() // BLOCK
    if whole:
        column[:whole].copy_(chosen[: whole * BLOCK].view(whole, BLOCK).sum(dim=1))
    if chosen.numel() > whole * BLOCK:
        column[whole].copy_(chosen[whole * BLOCK :].sum())


def total_blocks_(op: Op, a: Tensor, b: Tensor | None, column: Tensor) -> None:
    """Write the total of each block into ``[blocks]`` float64.

    Args:
        op: What kind of total.
        a: ``[m]``, whole blocks but for the last one.
        b: ``[m]``, for products and counts of two rows; None for one row.
        column: Receives the totals.
    """
    terms = _terms(op, a, b)
    whole = terms.numel() // BLOCK
    if whole:
        column[:whole].copy_(_total_(op, terms[: whole * BLOCK].view(whole, BLOCK)))
    if terms.numel() > whole * BLOCK:
        column[whole:].copy_(_total_(op, terms[None, whole * BLOCK :]))


def _terms(op: Op, a: Tensor, b: Tensor | None) -> Tensor:
    """Return what is totalled of each element, ``[m]`` float64."""
    if op is Op.COUNT:
        chosen = a != 0
        return (chosen if b is None else chosen & (b != 0)).to(torch.float64)
    if op is Op.OPPOSED:
        assert b is not None  # noqa: S101 - it is about two
        return (((a > 0) & (b < 0)) | ((a < 0) & (b > 0))).to(torch.float64)
    terms = a.to(torch.float64, copy=True)
    if op is Op.DOT:
        assert b is not None  # noqa: S101 - it is about two
        terms *= b
    return terms


def _total_(op: Op, terms: Tensor) -> Tensor:
    """Return the total of each row of ``[rows, m]``, which is overwritten."""
    if op is Op.LARGEST:
        return terms.amax(dim=1)
    # A sum of torch's would choose its order by the number of rows, which is that of the cut.
    numel = terms.shape[1]
    while numel > 1:
        rest = numel // 2
        terms[:, :rest] += terms[:, numel - rest : numel]
        numel -= rest
    return terms[:, 0]


def values_inside(question: Question | None, counts: NDArray[np.int64]) -> int:
    """Return how many magnitudes were to be collected, from one source's fetched counts."""
    return int(counts[:, 1].sum()) if isinstance(question, Band) else 0


def counted_blocks(
    question: Question,
    numel: int,
    counts: NDArray[np.int64],
    values: Floats,
    histogram: NDArray[np.int64],
) -> list[Counted]:
    """Return one source's answers, block by block, from what was fetched.

    A histogram covers all blocks, and the first one hands it in: histograms are only ever added.

    Args:
        question: What was asked.
        numel: Elements in the blocks.
        counts: ``[blocks, COUNTS]``.
        values: What was collected, in flat order.
        histogram: ``[BINS]``.
    """
    found = []
    begin = 0
    for block, (not_above, inside, *crowds) in enumerate(counts.tolist()):
        above = min(BLOCK, numel - block * BLOCK) - not_above
        if isinstance(question, Bins):
            found.append(Counted(above, None, (), None if block else histogram))
            continue
        own = values[begin : begin + inside]
        begin += inside
        found.append(Counted(above, own, tuple(crowds[: len(question.crowded)]), None))
    return found
