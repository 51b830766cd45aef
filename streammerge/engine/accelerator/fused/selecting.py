"""Answers to the questions of :mod:`streammerge.statistics.magnitude`, in kernels by hand.

They do what :class:`~streammerge.statistics.in_tensors.Answers` does in some 25 operations of torch
per ranked row, with the same integers and the same values in the same order:

    band   count_band      counts per block, and how many lie inside per tile
           collect_inside  each tile finds its place from the numbers of those behind it
    bins   count_bins      a histogram, and what is not above per block

Nothing but integers is added by atomic operations, so that their order does not matter. Each tile
adds to a counter once at most, except to bins. Atomic additions to one address queue up, and half of
all values may be zeros or share a few magnitudes; so each tile counts some bins by a sum first, those
of elements that it picks all over itself. A bin is picked the more surely the more lies in it: one
that holds a share s of what is spread at random is missed by about (1 - s)^8 of all tiles, so that
at most some 4 % of all elements are left to queue at one counter, which is where s is a ninth.

Memory: an int32 per tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import triton
import triton.language as tl

from streammerge.engine.accelerator.fused.kernels import launch
from streammerge.lazily import torch
from streammerge.statistics import BLOCK
from streammerge.statistics.in_tensors import ASKED, COUNTS, Answers
from streammerge.statistics.magnitude import BINS, MOST_CROWDS, Band, Bins, Question

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = tl.constexpr(BLOCK)
_COUNTS = tl.constexpr(COUNTS)
_CROWDS = tl.constexpr(MOST_CROWDS)
_BINS = tl.constexpr(BINS)
_PICKS = tl.constexpr(8)
"""Bins that a tile counts apart. Each costs two passes over what lies in registers; fewer leave more
elements to queue where values pile up."""
_NONE = tl.constexpr(2**62)
"""More than any place in a tile times the number of bins."""
_NUMBERS_AT_ONCE = tl.constexpr(512)
"""Tiles whose numbers are added in one pass; the largest step has 2,048 on a device."""


def write_question(question: Question | None) -> list[int]:
    """Return what kernels are told of a question, ``[ASKED]``.

    Of a band, patterns of float64: low, high, and crowds, with NaN, which equals nothing, for those
    that it has not. Of bins, low and high pattern and the shift.
    """
    if question is None:
        return [0] * ASKED
    if isinstance(question, Bins):
        numbers = [question.low_bits, question.high_bits, question.shift]
        return numbers + [0] * (ASKED - len(numbers))
    told = np.full(ASKED, np.nan)
    # Only a low above zero is compared with.
    told[0] = question.low if question.low > 0 else -np.inf
    told[1] = question.high
    told[2 : 2 + len(question.crowded)] = question.crowded
    return list(map(int, told.view(np.int64)))


def add_answers_(
    answers: Answers,
    question: Question,
    asked: Tensor,
    magnitudes: Tensor,
    first_block: int,
    *,
    tile: int,
) -> None:
    """Enqueue what :meth:`~streammerge.statistics.in_tensors.Answers.add_` does.

    Counts are added to what is there, which is nothing after a ``clear_``.

    Args:
        answers: What has been answered so far.
        question: What the search asks.
        asked: ``[ASKED]`` int64: the same, as :func:`write_question` has it.
        magnitudes: ``[m]`` absolute values, contiguous; the first one begins a block.
        first_block: Which row of the counts belongs to their first block.
        tile: Elements per program instance; a power of two, of at most a block.
    """
    tiles, numel = -(-magnitudes.numel() // tile), magnitudes.numel()
    rows = answers.counts[first_block:]
    if isinstance(question, Bins):
        patterns = magnitudes.view(torch.int32 if magnitudes.itemsize == 4 else torch.int64)
        launch(count_bins, tiles, patterns, asked, rows, answers.histogram, numel, tile)
        return
    inside = magnitudes.new_empty(tiles, dtype=torch.int32)
    band = asked.view(torch.float64)
    launch(count_band, tiles, magnitudes, band, rows, answers.filled, inside, numel, tile)
    if not _collects_nothing(question):
        limit = answers.values.numel() - 1
        launch(
            collect_inside, tiles, magnitudes, band, answers.filled, inside, answers.values,
            limit, numel, tile,
        )  # fmt: skip


def _collects_nothing(question: Band) -> bool:
    """Return whether one shared value is all that lies inside, the usual case by far."""
    return question.crowded == (question.high,) == (question.low,)


@triton.jit  # type: ignore[untyped-decorator]
def _count(chosen: tl.tensor, counter: tl.tensor) -> tl.tensor:
    """Add how many elements of a tile are chosen to a counter in int64; return it in int32."""
    number = tl.sum(chosen.to(tl.int32))
    if number > 0:
        tl.atomic_add(counter, number.to(tl.int64), sem="relaxed")
    return number


@triton.jit  # type: ignore[untyped-decorator]
def count_band(
    magnitudes: tl.tensor,
    asked: tl.tensor,
    counts: tl.tensor,
    filled: tl.tensor,
    numbers: tl.tensor,
    numel: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Count what a band asks for, in each block and tile.

    Args:
        magnitudes: ``[numel]`` float32 or float64.
        asked: The band, ``[ASKED]`` float64.
        counts: ``[blocks, COUNTS]`` int64; added to.
        filled: ``[1]`` int64: values to be collected in all; added to.
        numbers: ``[tiles]`` int32: receives how many values of each tile are to be collected.
        numel: Elements.
        TILE: Elements of a program instance.
    """
    tile = tl.program_id(0)
    own = tile * TILE + tl.arange(0, TILE)
    here = own < numel
    found = tl.load(magnitudes + own, mask=here, other=0)
    row = counts + tile * TILE // _BLOCK * _COUNTS
    inside = here & (found <= tl.load(asked + 1).to(found.dtype))
    _count(inside, row)
    inside = inside & (found >= tl.load(asked).to(found.dtype))
    for index in tl.static_range(_CROWDS):
        crowd = tl.load(asked + 2 + index).to(found.dtype)
        # No number where there is no crowd.
        if crowd == crowd:
            crowded = here & (found == crowd)
            _count(crowded, row + 2 + index)
            inside = inside & ~crowded
    number = _count(inside, row + 1)
    tl.store(numbers + tile, number)
    if number > 0:
        tl.atomic_add(filled, number.to(tl.int64), sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def collect_inside(
    magnitudes: tl.tensor,
    asked: tl.tensor,
    filled: tl.tensor,
    numbers: tl.tensor,
    values: tl.tensor,
    limit: tl.tensor,
    numel: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Append what lies inside a band, in flat order, as far as there is room.

    A tile's first place is what has been filled, less what it and those behind it have: so nothing is
    written here that another tile reads.

    Args:
        magnitudes: ``[numel]``, as in :func:`count_band`.
        asked: See there.
        filled: ``[1]``, as it has been left there.
        numbers: ``[tiles]``, likewise.
        values: ``[limit]``, and more that is left alone.
        limit: How many values there is room for.
        numel: Elements.
        TILE: Elements of a program instance.
    """
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    if tl.load(numbers + tile) > 0:
        place = tl.load(filled)
        at = tile
        while at < tiles:
            others = at + tl.arange(0, _NUMBERS_AT_ONCE)
            place -= tl.sum(tl.load(numbers + others, mask=others < tiles, other=0)).to(tl.int64)
            at += _NUMBERS_AT_ONCE
        if place < limit:
            own = tile * TILE + tl.arange(0, TILE)
            here = own < numel
            found = tl.load(magnitudes + own, mask=here, other=0)
            inside = here & (found <= tl.load(asked + 1).to(found.dtype))
            inside = inside & (found >= tl.load(asked).to(found.dtype))
            for index in tl.static_range(_CROWDS):
                inside = inside & (found != tl.load(asked + 2 + index).to(found.dtype))
            places = place + tl.cumsum(inside.to(tl.int32)) - 1
            tl.store(values + places, found, mask=inside & (places < limit))


@triton.jit  # type: ignore[untyped-decorator]
def count_bins(
    patterns: tl.tensor,
    asked: tl.tensor,
    counts: tl.tensor,
    histogram: tl.tensor,
    numel: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Count patterns of magnitudes in bins, and those not above them in each block.

    Args:
        patterns: ``[numel]`` int32 or int64.
        asked: The bins, ``[ASKED]`` int64.
        counts: ``[blocks, COUNTS]`` int64; the first column is added to.
        histogram: ``[BINS]`` int64; added to.
        numel: Elements.
        TILE: Elements of a program instance.
    """
    tile = tl.program_id(0)
    own = tl.arange(0, TILE)
    here = tile * TILE + own < numel
    found = tl.load(patterns + tile * TILE + own, mask=here, other=0)
    low = tl.load(asked).to(found.dtype)
    not_above = here & (found <= tl.load(asked + 1).to(found.dtype))
    _count(not_above, counts + tile * TILE // _BLOCK * _COUNTS)
    left = not_above & (found >= low)
    bins = ((found - low) >> tl.load(asked + 2).to(found.dtype)).to(tl.int32)
    for pick in tl.static_range(_PICKS):
        # The first one that is left from some place on: values may pile up in one part of a tile.
        order = (own ^ (pick * (TILE // _PICKS))).to(tl.int64) * _BINS + bins
        picked = (tl.min(tl.where(left, order, _NONE)) % _BINS).to(tl.int32)
        crowded = left & (bins == picked)
        _count(crowded, histogram + picked)
        left = left & ~crowded
    tl.atomic_add(histogram + bins, tl.full([TILE], 1, tl.int64), mask=left, sem="relaxed")
