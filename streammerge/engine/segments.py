"""What one block of a piece holds of each tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from streammerge.engine.pieces import Part, PieceInMemory
from streammerge.engine.rows import Run
from streammerge.statistics import BLOCK
from streammerge.statistics.rounds import Found


@dataclass(frozen=True, slots=True)
class Segment:
    """What one block holds of one tensor."""

    begin: int
    """First element in the block."""
    end: int
    """End in the block."""
    part: Part
    """The part of the piece."""
    start: int
    """Flat index in the tensor of the first element."""
    block: int
    """Which block of the statistics' scope this is."""
    found: Found
    """What is known of the tensor, or of the model."""
    kept: list[int]
    """Counts of what trims, or random numbers, keep; of the whole part."""

    def add_kept(self, counts: Sequence[int]) -> None:
        """Add what is kept of this block."""
        for index, count in enumerate(counts):
            self.kept[index] += count


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a piece."""

    begin: int
    """First element in the piece."""
    end: int
    """End in the piece."""
    segments: tuple[Segment, ...]
    """What it holds of each tensor."""


def split_piece(
    piece: PieceInMemory, found: Sequence[Found], kept: Sequence[list[int]]
) -> list[Block]:
    """Return the blocks of a piece.

    Args:
        piece: The piece.
        found: What is known of each of its parts.
        kept: Counts for each of its parts.
    """
    if len(piece.parts) > 1:
        # Several tensors are one block, each of them whole.
        segments = tuple(
            Segment(begin, end, part, 0, part.task.scope_block, known, counts)
            for (part, begin, end), known, counts in zip(piece.ranges(), found, kept, strict=True)
        )
        return [Block(0, piece.numel, segments)]
    part = piece.first
    blocks = []
    for begin in range(0, piece.numel, BLOCK):
        end = min(begin + BLOCK, piece.numel)
        start = part.start + begin
        scope_block = part.task.scope_block + start // BLOCK
        segment = Segment(0, end - begin, part, start, scope_block, found[0], kept[0])
        blocks.append(Block(begin, end, (segment,)))
    return blocks


def one_by_one(block: Block) -> Iterator[Block]:
    """Yield each tensor of a block as a block."""
    for segment in block.segments:
        own = replace(segment, begin=0, end=segment.end - segment.begin)
        yield Block(block.begin + segment.begin, block.begin + segment.end, (own,))


def knowing(segments: Sequence[Segment], found: Found) -> Iterator[Segment]:
    """Yield segments of which so much is known."""
    for segment in segments:
        yield replace(segment, found=found)


def block_of(piece: PieceInMemory, run: Run, found: Found, kept: list[int]) -> Block:
    """Return a range of a piece of one part as a block."""
    part = piece.first
    start = part.start + run.begin
    block = part.task.scope_block + start // BLOCK
    segment = Segment(0, run.end - run.begin, part, start, block, found, kept)
    return Block(run.begin, run.end, (segment,))


def equal_runs(ranges: Sequence[tuple[Part, int, int]]) -> list[tuple[int, int, int]]:
    """Return the runs of neighbours of one size: begin, end and how many tensors they are."""
    runs: list[tuple[int, int, int]] = []
    for _, group in groupby(ranges, key=lambda each: each[2] - each[1]):
        ranges_of = list(group)
        runs.append((ranges_of[0][1], ranges_of[-1][2], len(ranges_of)))
    return runs
