"""What a fused kernel of a program is given beside models, and what it leaves to those who count.

A fused kernel does all steps of a program on a tile that stays in registers; see
``engine/accelerator/fused``. Plans count its memory from here, without the compiler.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import count

from streammerge.tiles.program import SINKS, Op, Program

PER_PRODUCT = 7
"""Numbers about each product."""


@dataclass(frozen=True)
class Layout:
    """Where in ``constants`` what stands."""

    program: Program
    """Whose."""
    products: int = 0
    """Products of adapters, in the order of sources."""

    @cached_property
    def start(self) -> int:
        """Flat index of the piece's first element."""
        return len(self.program.numbers)

    @cached_property
    def thresholds(self) -> int:
        """One per trim, as float64; -1 where all is kept."""
        return self.start + 1

    @cached_property
    def streams(self) -> int:
        """Per random step: lower and upper half of its key."""
        return self.thresholds + len(self.program.trims)

    @cached_property
    def limits(self) -> int:
        """Per random step: what the upper and the lower lane are compared with."""
        return self.streams + 2 * len(self.program.streams)

    @cached_property
    def factors(self) -> int:
        """Per product: scaling as float64, rank, columns, those of a tile of A, rows, and where it is added.

        That is the flat index of the first element of the tensor, and past the last.
        """
        return self.limits + 2 * len(self.program.streams)

    @cached_property
    def size(self) -> int:
        """Numbers in all."""
        return self.factors + PER_PRODUCT * self.products


def sink_rows(program: Program) -> dict[int, tuple[int, int | None]]:
    """Return which rows a round leaves each sink's operands in, by the index of its step.

    What several sinks take of one register, while it holds the same, has one row.
    """
    found: dict[int, tuple[int, int | None]] = {}
    held: dict[int, int] = {}
    rows = count()
    for index, step in enumerate(program.steps):
        if step.op is Op.STORE:
            continue
        if step.op not in SINKS:
            held.pop(step.out, None)
            continue
        for register in (step.a, step.b):
            if register >= 0 and register not in held:
                held[register] = next(rows)
        found[index] = held[step.a], held[step.b] if step.b >= 0 else None
    return found


def count_sink_rows(program: Program) -> int:
    """Return how many rows that takes."""
    return 1 + max(
        (row for pair in sink_rows(program).values() for row in pair if row is not None), default=-1
    )
