"""What one block of a piece holds of each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.engine.pieces import Part, PieceInMemory
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
