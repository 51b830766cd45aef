"""The mathematics of pass 1: statistics over a whole tensor or a whole model."""

from __future__ import annotations

BLOCK = 262_144
"""Elements per block, the unit in which reductions are computed and combined. It is part of the
numbers' contract. A quarter of it would stay in a core's L2 cache, but then handing the interpreter
lock from thread to thread costs more than the arithmetic."""


def count_blocks(numel: int) -> int:
    """Return how many blocks ``numel`` elements take; the last one may be short."""
    return -(-numel // BLOCK)
