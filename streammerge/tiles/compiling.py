"""From expressions to programs: an order, registers, and steps that are done at once.

An expression is walked from what it leaves behind to what it needs, so that a model is loaded right
before its first use, and a sum of many models never holds more than two of them. A register is free
again after the last use of its row, and may be filled by the very step that reads it last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from streammerge.tiles.program import SINKS, TOTALS, Number, Op, Program, Step
from streammerge.tiles.writing import Row, Sink

_INDEXED = frozenset({Op.BASE, Op.SOURCE, Op.TASK_VECTOR, Op.COMPUTED})
"""Steps whose ``a`` is an index."""
_PLACED = frozenset({Op.KEEP_LARGEST, Op.IN_TOP, Op.KEEP_RANDOM, Op.CHANGED})
"""Steps whose ``c`` is an index."""


def compile_result(result: Row) -> Program:
    """Return the program that stores a row."""
    return _Compiler([Sink(Op.STORE, (result,))]).program()


def compile_sinks(sinks: Iterable[Sink]) -> Program:
    """Return the program that totals and ranks."""
    return _Compiler(list(sinks)).program()


class _Compiler:
    """Compiles one program."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = [_with_base(sink) for sink in sinks]
        self._steps: list[Step] = []
        self._numbers: dict[tuple[Number, ...], int] = {}
        self._table: list[Number] = []
        self._uses: Counter[Row] = Counter()
        self._place: dict[Row, int] = {}
        self._free: list[int] = []
        self._registers = 0
        self._trims: list[int] = []
        self._streams: list[int] = []
        self._totals: list[Op] = []
        self._ranked = 0

    def program(self) -> Program:
        """Return the program."""
        for sink in self._sinks:
            self._count(sink)
        for sink in self._sinks:
            self._leave(sink)
        return Program(
            tuple(self._steps),
            self._registers,
            tuple(self._table),
            tuple(self._trims),
            tuple(self._streams),
            tuple(self._totals),
            self._ranked,
        )

    def _count(self, sink: Sink) -> None:
        """Count how often each row is used."""
        open_rows = list(sink.rows)
        while open_rows:
            row = open_rows.pop()
            self._uses[row] += 1
            if self._uses[row] == 1:
                open_rows.extend(row.rows)

    def _leave(self, sink: Sink) -> None:
        places = [self._fill(row) for row in sink.rows]
        for row in sink.rows:
            self._let_go(row)
        out = 0
        if sink.op in TOTALS:
            out = len(self._totals)
            self._totals.append(sink.op)
        elif sink.op is Op.RANK:
            out = self._ranked
            self._ranked += 1
        self._steps.append(Step(sink.op, out, places[0], places[1] if places[1:] else -1))

    def _fill(self, wanted: Row) -> int:
        """Add the steps that a row needs; return its register."""
        # Not by recursion: sums of many models are deep.
        open_rows = [wanted]
        while open_rows:
            row = open_rows[-1]
            if row in self._place:
                open_rows.pop()
                continue
            missing = [each for each in row.rows if each not in self._place]
            if missing:
                open_rows.append(missing[0])
                continue
            self._add(row)
            open_rows.pop()
        return self._place[wanted]

    def _add(self, row: Row) -> None:
        """Add the step of a row whose own rows are all there."""
        places = [self._place[each] for each in row.rows]
        index = self._index_of(row)
        for each in row.rows:
            self._let_go(each)
        step = self._step(row, places, index)
        if row.op is Op.KEEP_LARGEST and self._loads_only_for(row.rows[0]):
            # A task vector that is only trimmed is trimmed while it is loaded.
            load = self._steps.pop()
            step = Step(Op.TASK_VECTOR, step.out, load.a, c=index)
        self._steps.append(step)

    def _loads_only_for(self, row: Row) -> bool:
        """Return whether the last step loads a task vector that nothing else will use."""
        last = self._steps[-1]
        loaded = row.op is Op.TASK_VECTOR and last.op is Op.TASK_VECTOR and last.c < 0
        return loaded and last.a == row.index and self._uses[row] == 0

    def _index_of(self, row: Row) -> int:
        if row.op in (Op.KEEP_LARGEST, Op.IN_TOP):
            return self._use_once(self._trims, row.index, "trim")
        if row.op is Op.KEEP_RANDOM:
            return self._use_once(self._streams, row.index, "random numbers of source")
        return row.index

    def _step(self, row: Row, places: Sequence[int], index: int) -> Step:
        number = self._number(row.numbers)
        if row.op is Op.MAJORITY_MEAN:
            return Step(
                row.op, self._take(row), number=number, rows=tuple(places), majority=row.majority
            )
        a, b, c = [*places, -1, -1, -1][:3]
        if row.op in _INDEXED:
            a = index
        if row.op in _PLACED:
            c = index
        return Step(row.op, self._take(row), a, b, c, number)

    def _number(self, numbers: tuple[Number, ...]) -> int:
        """Return where numbers stand in the table."""
        if not numbers:
            return -1
        if numbers not in self._numbers:
            self._numbers[numbers] = len(self._table)
            self._table.extend(numbers)
        return self._numbers[numbers]

    def _take(self, row: Row) -> int:
        """Give a row a register."""
        if self._free:
            place = self._free.pop()
        else:
            place = self._registers
            self._registers += 1
        self._place[row] = place
        return place

    def _let_go(self, row: Row) -> None:
        """Note a use of a row; after the last one its register is free."""
        self._uses[row] -= 1
        if self._uses[row] == 0:
            self._free.append(self._place[row])

    def _use_once(self, used: list[int], index: int, what: str) -> int:
        """Note the use of something that counts down while it is used; return its place."""
        if index in used:
            raise ValueError(f"a program may use the {what} {index} once")
        used.append(index)
        return len(used) - 1


def _with_base(sink: Sink) -> Sink:
    """Let a result that is added to the base be added while it is stored."""
    if sink.op is not Op.STORE:
        return sink
    (result,) = sink.rows
    if result.op is Op.ADD and len(result.rows) == 2 and result.rows[0].op is Op.BASE:
        base, merged = result.rows
        return Sink(Op.STORE, (merged, base))
    return sink


assert not SINKS & _INDEXED  # noqa: S101 - a sink has no index of its own
