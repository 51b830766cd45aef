"""The exact k-th largest magnitude of numbers that are seen block by block, in any order.

The search keeps an interval of magnitudes that must hold the k-th largest, and asks questions
about it. One question is put to every block, the answers add up whatever their order, and the
sum either settles the matter or narrows the interval:

    sample   a few thousand elements suggest a narrow band            (a guess, only ever for speed)
    Band     count what lies above it, collect what lies inside; of   one sweep; settles it as a rule
             values that very many elements share, only count them
    Bins     when the guess missed or too much lies inside: histogram of the bit patterns of an
             interval in 2^16 bins                                    two sweeps settle float32
    Band     of one value, to find in which block the last kept tie lies

Fine-tunes in bfloat16 have few distinct differences, each shared by up to a fifth of the elements:
the threshold usually is such a crowded value. Non-negative IEEE numbers order like their bit
patterns, which is what makes the bins exact.

Memory: per source five int32 per block, 512 KiB of bins, and the room that the caller gives for
collected magnitudes.

Source: the trim step of TIES, Yadav et al. 2023, arXiv:2306.01708, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.statistics import BLOCK
from streammerge.statistics.ranking import select_rank
from streammerge.statistics.topk import (
    Floats,
    TiePolicy,
    TopK,
    place_ties,
    settled_without_values,
    ties_kept,
)

_BIN_BITS = 16
"""65,536 bins: 512 KiB of counters, and 31 bits of float32 in two sweeps."""
BINS = 1 << _BIN_BITS
"""Counters of a histogram."""
_SIGMAS = 5.0
"""Half-width of the sampled band in standard deviations of the sample's rank. Fewer would miss
more often and cost a sweep; more would collect more. Neither changes a result."""
MOST_CROWDS = 4
"""Each costs a comparison per element; the sampled band rarely holds more."""
_CROWD_SHARE = 8
"""A value is crowded if it would fill one part in so many of the room."""
_ROOM_SHARE = 0.8
"""Share of the room that a band of a spread-out sample may be expected to fill. A band that
overflows costs two sweeps, one that misses as well."""
STATE_ARRAYS = ("values", "segments", "crowds", "histogram")
"""Names of the arrays in the state of a search."""
SampleRun = tuple[int, int]
"""First element in its tensor, and number of elements."""
SAMPLE_RUN = BLOCK // 256
"""Consecutive elements per sampled run: about a page of a shard, read in one request, and never
across the border of a block."""


@dataclass(frozen=True, slots=True)
class Band:
    """How many magnitudes lie above ``high``, and which lie in ``[low, high]``?"""

    low: float
    """Smallest magnitude inside."""
    high: float
    """Largest magnitude inside."""
    crowded: tuple[float, ...] = ()
    """Magnitudes inside that are counted, not collected; in descending order."""


@dataclass(frozen=True, slots=True)
class Bins:
    """How are the bit patterns of ``[low_bits, high_bits]`` distributed?"""

    low_bits: int
    """Bit pattern of the smallest magnitude inside."""
    high_bits: int
    """Bit pattern of the largest magnitude inside."""

    @property
    def shift(self) -> int:
        """Low bits that share a bin."""
        return max(0, (self.high_bits - self.low_bits).bit_length() - _BIN_BITS)


Question = Band | Bins


class MagnitudeSearch:
    """The search for one source's k-th largest magnitude over one scope.

    Call order: :meth:`ask_after_sample` once (or leave the first question as it is), then until
    :attr:`result` is set: :meth:`answer` for every block once, in any order, then
    :meth:`conclude`. Not thread-safe; :func:`answer_block` is, and does the work.
    """

    def __init__(
        self,
        *,
        numel: int,
        blocks: int,
        k: int,
        tie_policy: TiePolicy,
        room: Floats,
        spare: Floats,
        of_value: bool = False,
    ) -> None:
        """Start a search.

        Args:
            numel: Elements in the scope.
            blocks: Blocks in the scope; every tensor starts a new one.
            k: Elements kept; all, if there are no more than that.
            tie_policy: Which ties are kept.
            room: ``[limit]`` float32 or float64; a band collects at most so many magnitudes.
            spare: As large; used while concluding, so searches may share it.
            of_value: Whether the threshold is needed even where all are kept.
        """
        self._k = k
        self._numel = numel
        self._blocks = blocks
        self._tie_policy = tie_policy
        self._room = room
        self._spare = spare
        self._float, self._uint = _types(room.itemsize)
        self._infinity_bits = int(self._float(np.inf).view(self._uint))
        self._above = 0
        self._inside = 0
        self._segments: list[tuple[int, int]] = []
        self._crowds = np.zeros((0, 0), dtype=np.int32)
        self._histogram = np.zeros(0, dtype=np.int64)
        self.question: Question = Band(0.0, float("inf"))
        self.result: TopK | None = settled_without_values(numel, k, of_value=of_value)
        if self.result is None and numel > room.size:
            self.question = Bins(0, self._infinity_bits)
        self._clear()

    def ask_after_sample(self, sample: Floats, *, run_numel: int) -> None:
        """Let a sample of magnitudes choose the first question; only speed depends on it.

        Args:
            sample: Magnitudes drawn evenly over the scope, run by run; what the room could not
                hold is ignored.
            run_numel: Elements of a run, which lie side by side.
        """
        sample = sample[: self._spare.size]
        if self.result is not None or sample.size == 0:
            return
        share = self._k / self._numel
        rank = sample.size * (1 - share)
        slack = _SIGMAS * (sample.size * share * (1 - share)) ** 0.5
        affordable = _ROOM_SHARE * self._room.size / self._numel * sample.size / 2
        ordered = self._spare[: sample.size]
        ordered[:] = sample
        ordered.sort()
        if slack < affordable:
            middle = float(ordered[min(int(rank), sample.size - 1)])
            spread = _spread_of_runs(sample, middle, run_numel)
            slack = max(slack, min(affordable, _SIGMAS * spread))
        low = max(0, int(rank - slack) - 1)
        high = min(sample.size - 1, int(rank + slack) + 1)
        top = float("inf") if high == sample.size - 1 else float(ordered[high])
        self.question = Band(
            float(ordered[low]) if low else 0.0, top, self._crowded(ordered, low, high)
        )
        self._clear()

    def _crowded(self, sample: Floats, low: int, high: int) -> tuple[float, ...]:
        """Return the values in a window of the sorted sample that are better counted."""
        values = np.unique(sample[low : high + 1])
        # The whole sample is asked: a value may reach beyond the window, or even fill it.
        counts = np.searchsorted(sample, values, "right") - np.searchsorted(sample, values)
        crowd = max(2.0, self._room.size / _CROWD_SHARE / self._numel * sample.size)
        most = np.argsort(-counts, kind="stable")[:MOST_CROWDS]
        return tuple(sorted((float(values[i]) for i in most if counts[i] >= crowd), reverse=True))

    def answer(self, block: int, counted: Counted) -> None:
        """Add what :func:`answer_block` found in one block."""
        self._above += counted.above
        if counted.histogram is not None:
            self._histogram += counted.histogram
        if counted.values is not None:
            self._crowds[:, block] = counted.crowds
            self._collect(block, counted.values)

    def _collect(self, block: int, values: Floats) -> None:
        """Keep the values while there is room for all; always count them."""
        begin = self._inside
        self._inside += values.size
        if values.size and self._inside <= self._room.size:
            self._room[begin : self._inside] = values
            self._segments.append((block, begin))

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return all that is known so far, as JSON and as views of arrays; see :meth:`restore`."""
        facts = {
            "band": asdict(self.question) if isinstance(self.question, Band) else None,
            "bins": asdict(self.question) if isinstance(self.question, Bins) else None,
            "result": None if self.result is None else astuple(self.result),
            "above": self._above,
            "inside": self._inside,
        }
        arrays = {
            "values": self._room[: min(self._inside, self._room.size)],
            "segments": np.array(self._segments, dtype=np.int64).reshape(-1, 2),
            "crowds": self._crowds,
            "histogram": self._histogram,
        }
        return facts, arrays

    def has_room_for(self, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bool:
        """Return whether :meth:`restore` can take what another search had collected."""
        values = arrays["values"].size
        # One whose room overflowed has lost values, which more room would hide.
        lost = facts["inside"] > values
        return self._room.size == values if lost else self._room.size >= values

    def restore(self, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from the :meth:`state` of a search over the same scope, if there is room for it."""
        if facts["result"] is not None:
            self.result = TopK(*facts["result"])
        elif facts["band"] is not None:
            band = facts["band"]
            self.question = Band(band["low"], band["high"], tuple(band["crowded"]))
        else:
            self.question = Bins(**facts["bins"])
        self._above, self._inside = facts["above"], facts["inside"]
        self._room[: arrays["values"].size] = arrays["values"]
        self._segments = [(int(block), int(begin)) for block, begin in arrays["segments"]]
        self._crowds, self._histogram = arrays["crowds"], arrays["histogram"]

    def absorb(self, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Add the answers of other blocks that another search has, which was asked the same question."""
        values, begin = arrays["values"], self._inside
        self._above += facts["above"]
        self._inside += facts["inside"]
        self._crowds += arrays["crowds"]
        self._histogram += arrays["histogram"]
        if facts["inside"] > values.size:
            # It had too little room, so some are lost: there are more than fit, whatever room is here.
            self._inside = max(self._inside, self._room.size + 1)
        if self._inside <= self._room.size:
            self._room[begin : self._inside] = values
            self._segments += [(int(block), begin + int(at)) for block, at in arrays["segments"]]

    def conclude(self) -> None:
        """Set :attr:`result`, or the next :attr:`question`, from the answers of all blocks."""
        question = self.question
        if self._above >= self._k and self._reaches_infinity(question):
            # Only NaN ranks above infinity, and there are k of them or more: no number is kept.
            self.result = TopK(float("inf"), self._numel, self._above, 0, 0, -1, 0)
        elif isinstance(question, Bins):
            self._conclude_bins(question)
        elif self._above >= self._k:
            self.question = Bins(self._bits_of(question.high) + 1, self._infinity_bits)
        elif self._above + self._inside + int(self._crowds.sum()) < self._k:
            self.question = Bins(0, self._bits_of(question.low) - 1)
        elif self._inside > self._room.size:
            self.question = Bins(self._bits_of(question.low), self._bits_of(question.high))
        else:
            self._conclude_band(question)
        self._clear()

    def _clear(self) -> None:
        """Get ready for the answers to the present question, or let go of everything."""
        self._above = 0
        self._inside = 0
        self._segments = []
        self._histogram = np.zeros(0, dtype=np.int64)
        self._crowds = np.zeros((0, 0), dtype=np.int32)
        if self.result is not None:
            return
        if isinstance(self.question, Bins):
            self._histogram = np.zeros(BINS, dtype=np.int64)
        else:
            self._crowds = np.zeros((len(self.question.crowded), self._blocks), dtype=np.int32)

    def _reaches_infinity(self, question: Question) -> bool:
        if isinstance(question, Bins):
            return question.high_bits == self._infinity_bits
        return question.high == float("inf")

    def _bits_of(self, magnitude: float) -> int:
        return int(self._float(magnitude).view(self._uint))

    def _conclude_bins(self, question: Bins) -> None:
        above = self._above + np.cumsum(self._histogram[::-1])
        bin_index = self._histogram.size - 1 - int(np.searchsorted(above, self._k))
        low = question.low_bits + (bin_index << question.shift)
        high = min(question.high_bits, low + (1 << question.shift) - 1)
        if low < high:
            self.question = Bins(low, high)
            return
        equal = int(self._histogram[bin_index])
        greater = int(above[self._histogram.size - 1 - bin_index]) - equal
        self._settle(self._with_ties(float(self._uint(low).view(self._float)), greater, equal))

    def _conclude_band(self, question: Band) -> None:
        """Find the threshold among the collected values and the crowded ones."""
        wanted = self._k - self._above
        values = self._room[: self._inside]
        chosen = self._spare.view(np.bool_)[: values.size]
        heavier = 0
        for crowd, in_blocks in zip(question.crowded, self._crowds, strict=True):
            size = int(in_blocks.sum())
            greater = heavier + int(np.count_nonzero(np.greater(values, crowd, out=chosen)))
            if greater < wanted <= greater + size:
                found = self._with_ties(crowd, self._above + greater, size)
                self.result = place_ties(found, in_blocks)
                return
            if greater < wanted:
                heavier += size
        self._conclude_values(values, wanted - heavier, self._above + heavier)

    def _conclude_values(self, values: Floats, wanted: int, above: int) -> None:
        """Take the ``wanted``-th largest collected value; ``above`` others are larger."""
        threshold = select_rank(values, values.size - wanted, self._spare)
        # The spare has served; its bytes now hold comparisons instead of a new array.
        chosen = self._spare.view(np.bool_)[: values.size]
        greater = int(np.count_nonzero(np.greater(values, threshold, out=chosen)))
        np.equal(values, threshold, out=chosen)
        blocks, begins = (list(column) for column in zip(*self._segments, strict=True))
        in_blocks = np.zeros(self._blocks, dtype=np.int32)
        in_blocks[blocks] = np.add.reduceat(chosen, begins, dtype=np.int32)
        equal = int(np.count_nonzero(chosen))
        found = self._with_ties(float(threshold), above + greater, equal)
        self.result = place_ties(found, in_blocks)

    def _with_ties(self, threshold: float, greater: int, equal: int) -> TopK:
        kept = ties_kept(self._tie_policy, self._k - greater, equal)
        return TopK(threshold, self._numel, greater, equal, kept, -1, 0)

    def _settle(self, found: TopK) -> None:
        """Finish when all ties share one fate; otherwise ask where they are."""
        if found.ties_kept in {0, found.equal}:
            self.result = place_ties(found, np.zeros(self._blocks, dtype=np.int32))
        else:
            self.question = Band(found.threshold, found.threshold, (found.threshold,))


@dataclass(frozen=True, slots=True)
class Counted:
    """The answer of one block."""

    above: int
    """Magnitudes above the question's interval; NaN ranks above everything, as in torch.topk."""
    values: Floats | None
    """Magnitudes inside that are not crowded, in flat order, for a band."""
    crowds: tuple[int, ...]
    """How many magnitudes share each crowded value, for a band."""
    histogram: NDArray[np.int64] | None
    """Their distribution, for bins."""


def answer_block(question: Question, magnitudes: Floats, masks: NDArray[np.bool_]) -> Counted:
    """Return one block's answer.

    Args:
        question: What the search asks.
        magnitudes: ``[m]`` absolute values, float32 or float64.
        masks: ``[2, >= m]`` scratch.
    """
    numel = magnitudes.size
    if isinstance(question, Bins):
        return _count_bins(question, magnitudes)
    inside, below = masks[0, :numel], masks[1, :numel]
    np.less_equal(magnitudes, question.high, out=inside)
    above = numel - int(np.count_nonzero(inside))
    if question.crowded == (question.high,) == (question.low,):
        # One shared value is all that lies inside: nothing to collect, the usual case by far.
        np.equal(magnitudes, question.low, out=inside)
        return Counted(above, magnitudes[:0], (int(np.count_nonzero(inside)),), None)
    if question.low > 0:
        np.less(magnitudes, question.low, out=below)
        np.greater(inside, below, out=inside)
    crowds = []
    for crowd in question.crowded:
        np.equal(magnitudes, crowd, out=below)
        crowds.append(int(np.count_nonzero(below)))
        np.greater(inside, below, out=inside)
    return Counted(above, magnitudes[inside], tuple(crowds), None)


def _count_bins(question: Bins, magnitudes: Floats) -> Counted:
    patterns = magnitudes.view(_types(magnitudes.itemsize)[1])
    above = int(np.count_nonzero(patterns > question.high_bits))
    inside = patterns[(patterns >= question.low_bits) & (patterns <= question.high_bits)]
    bins = ((inside - inside.dtype.type(question.low_bits)) >> question.shift).astype(np.int64)
    histogram = np.bincount(bins, minlength=BINS)
    return Counted(above, None, (), histogram)


def _spread_of_runs(sample: Floats, middle: float, run_numel: int) -> float:
    """Return the standard deviation of the rank of ``middle``, as the runs of a sample show it.

    Neighbours differ less than others where rows or whole tensors have scales of their own, as in
    the products of adapters; so a run is worth less than its length. Runs are compared with the
    next ones, since their places are evenly spaced, not random.
    """
    runs = sample[: sample.size // run_numel * run_numel].reshape(-1, run_numel)
    if len(runs) < 2:
        return 0.0
    # One by one: a sample may be large, and there is no room for as many comparisons.
    steps = np.diff([np.count_nonzero(run > middle) for run in runs])
    return float((len(runs) * np.square(steps, dtype=np.float64).mean() / 2) ** 0.5)


def choose_sample_runs(numel: int, runs: int, *, run_numel: int) -> list[SampleRun]:
    """Return up to ``runs`` evenly spaced ``(start, count)`` ranges of ``run_numel`` elements.

    Starts are multiples of the run length, which divides a block, so that a run never crosses one.
    """
    available = -(-numel // run_numel)
    runs = min(runs, available)
    starts = [(index * available // runs) * run_numel for index in range(runs)]
    return [(start, min(run_numel, numel - start)) for start in starts]


def _types(itemsize: int) -> tuple[Any, Any]:
    return (np.float32, np.uint32) if itemsize == 4 else (np.float64, np.uint64)
