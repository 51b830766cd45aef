"""The mathematics of pass 1: statistics over a whole tensor or a whole model."""

from __future__ import annotations

BLOCK = 65_536
"""Elements per block, the unit in which reductions are computed and combined. It is part of the
numbers' contract: 64 Ki float32 elements are 256 KiB, so a handful of them stay in a core's L2
cache, and one operation on a block still takes several times longer than its dispatch."""


def count_blocks(numel: int) -> int:
    """Return how many blocks ``numel`` elements take; the last one may be short."""
    return -(-numel // BLOCK)
