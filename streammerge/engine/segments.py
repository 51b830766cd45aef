"""What one block of a piece holds of each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.engine.pieces import Part, PieceInMemory
from streammerge.reductions import BLOCK
from streammerge.reductions.topk import TopK


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
    tops: tuple[TopK, ...]
    """One statistic per source, or none."""
    kept: list[int]
    """Counts per source, of the whole part."""

    def add_kept(self, counts: Sequence[int]) -> None:
        """Add what each source keeps of this block."""
        for source, count in enumerate(counts):
            self.kept[source] += count


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
    piece: PieceInMemory, tops: Sequence[tuple[TopK, ...]], kept: Sequence[list[int]]
) -> list[Block]:
    """Return the blocks of a piece.

    Args:
        piece: The piece.
        tops: One statistic per source, or none, for each of its parts.
        kept: Counts per source for each of its parts.
    """
    if len(piece.parts) > 1:
        # Several tensors are one block, each of them whole.
        segments = tuple(
            Segment(begin, end, part, 0, part.task.scope_block, part_tops, counts)
            for (part, begin, end), part_tops, counts in zip(
                piece.ranges(), tops, kept, strict=True
            )
        )
        return [Block(0, piece.numel, segments)]
    part = piece.first
    blocks = []
    for begin in range(0, piece.numel, BLOCK):
        end = min(begin + BLOCK, piece.numel)
        start = part.start + begin
        scope_block = part.task.scope_block + start // BLOCK
        segment = Segment(0, end - begin, part, start, scope_block, tops[0], kept[0])
        blocks.append(Block(begin, end, (segment,)))
    return blocks
