"""What a method asks about single rows, found by the compiled machine.

Memory: totals of :data:`~streammerge.plan.demanding.MOST_ROWS` rows, and for values that are ranked
within rows their ranks, for as many elements as are computed at once, and the keys of one row's sort.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from streammerge.dtypes import DType
from streammerge.engine.compiled.bench import Bench, Encoded
from streammerge.engine.compiled.operands import StoredOperand
from streammerge.engine.pieces import PieceInMemory
from streammerge.engine.rows import KnownRows, Run, make_relative
from streammerge.engine.segments import Segment
from streammerge.methods.programs import Programs
from streammerge.native.library import DTYPE_CODES
from streammerge.native.machine import Asked
from streammerge.plan.demanding import MOST_ROWS
from streammerge.statistics import BLOCK
from streammerge.statistics.rounds import RowAnswers, RowNumbers


@dataclass(frozen=True, slots=True)
class WantedRows:
    """Rows of which something is to be known."""

    run: Run
    """The rows, in the piece with all of its rows."""
    segment: Segment
    """What they are of the tensor."""
    refuse: Callable[[Encoded], None]
    """Raises the error about a value that is not finite, given what loaded it."""


class CompiledRows:
    """Knows rows, for one worker."""

    def __init__(self, bench: Bench, programs: Sequence[Programs]) -> None:
        """Allocate.

        Args:
            bench: The worker's own.
            programs: What the method does, for each of its settings.
        """
        self._bench = bench
        self._programs = programs
        counts = [each.row_counts for each in programs]
        ranked = max((each.ranked for each in counts), default=0)
        self._totals = np.empty(MOST_ROWS * max((each.totals for each in counts), default=0))
        width = max([BLOCK, *(task.row for task in bench.plan.tasks)])
        self._computed = np.empty((ranked, width if ranked else 0), dtype=np.float32)
        widest = max((task.row for task in bench.plan.tasks), default=0)
        self._keys = np.empty(2 * widest if ranked else 0, dtype=np.uint64)

    def know(
        self, piece: PieceInMemory, operands: Sequence[StoredOperand], wanted: WantedRows
    ) -> tuple[KnownRows, list[StoredOperand]]:
        """Find what is asked about some rows.

        Args:
            piece: The piece with all of its rows.
            operands: Its models.
            wanted: Which rows.

        Returns:
            What is known, and the operands with what was computed.
        """
        setting = piece.first.task.setting
        row = piece.first.task.row
        count = (wanted.run.end - wanted.run.begin) // row
        first, memory = wanted.segment.start // row, wanted.segment.found.rows
        numbers = None if memory is None else memory.recall(first, count)
        if numbers is None:
            numbers = self._ask(setting, operands, wanted, KnownRows(row, np.zeros((count, 0))))
            if memory is not None:
                memory.remember(first, numbers)
        known = KnownRows(row, numbers)
        ranks = self._bench.row_ranks[setting]
        if ranks is None:
            return known, list(operands)
        for at in range(ranks.program.ranked):
            self._rank(at, ranks, operands, wanted, known)
        computed = self._computed_operands(wanted.run, ranks.program.ranked)
        return known, [*operands, *computed]

    def _ask(
        self,
        setting: int,
        operands: Sequence[StoredOperand],
        wanted: WantedRows,
        known: KnownRows,
    ) -> RowNumbers:
        """Go through all rounds about some rows."""
        count, row = len(known.numbers), known.numel
        for encoded, asked in zip(
            self._bench.row_rounds[setting],
            self._programs[setting].work.row_rounds,
            strict=True,
        ):
            width = len(encoded.program.totals)
            totals = self._totals[: count * width].reshape(count, width)
            self._run(encoded, operands, wanted, known, totals=totals.ctypes.data)
            found = asked.concluded(RowAnswers(row, totals, known.numbers))
            known = KnownRows(row, np.concatenate([known.numbers, found], axis=1))
        return known.numbers

    def _run(
        self,
        encoded: Encoded,
        operands: Sequence[StoredOperand],
        wanted: WantedRows,
        known: KnownRows,
        *,
        totals: int = 0,
        collects: bool = False,
    ) -> None:
        bench = self._bench
        bench.begin()
        bench.fill(
            0,
            encoded,
            operands,
            begin=wanted.run.begin,
            end=wanted.run.end,
            segment=wanted.segment,
            rows=known,
            totals=totals,
        )
        _, refused = bench.run(0, 1, collects=collects)
        if refused:
            wanted.refuse(encoded)

    def _rank(
        self,
        at: int,
        encoded: Encoded,
        operands: Sequence[StoredOperand],
        wanted: WantedRows,
        known: KnownRows,
    ) -> None:
        """Rank one of the values within its rows."""
        bench = self._bench
        # One by one: the room holds what is computed at once.
        for other in range(encoded.program.ranked):
            bench.jobs.asked[0][other].kind = Asked.KEEP if other == at else Asked.NOTHING
        self._run(encoded, operands, wanted, known, collects=True)
        count, row = len(known.numbers), known.numel
        ranks = self._computed[at, : count * row].reshape(count, row)
        bench.kernels.rank_rows(
            bench.values.ctypes.data,
            rows=count,
            row_numel=row,
            ranks=ranks.ctypes.data,
            scratch=self._keys.ctypes.data,
        )
        make_relative(ranks)

    def _computed_operands(self, run: Run, count: int) -> list[StoredOperand]:
        """Return what was computed as operands whose element ``run.begin`` is the first."""
        itemsize = self._computed.itemsize
        return [
            StoredOperand(
                self._computed[at].ctypes.data - run.begin * itemsize,
                itemsize,
                DTYPE_CODES[DType.F32],
            )
            for at in range(count)
        ]
