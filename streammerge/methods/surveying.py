"""The programs that find what a report knows of a tensor, whatever the method.

A survey is a program like a round's: it loads every source's vector and what the merge has made, which
stands behind the sources as if it were one more, trims as the merge does, and leaves totals. So it has
the same bits on every machine that runs programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from streammerge.methods.programs import Programs
from streammerge.statistics.surveying import SurveyLayout
from streammerge.tiles.compiling import compile_sinks
from streammerge.tiles.program import Op, Program
from streammerge.tiles.writing import (
    Row,
    Sheet,
    Sink,
    count,
    count_both,
    count_opposed,
    dot,
    largest,
    maximum,
    minimum,
    ranked,
)

_TRIMMING = frozenset({Op.KEEP_LARGEST, Op.SELECT, Op.IN_TOP, Op.FILL})
"""Steps that a method trims one source's vector with."""
_VECTORS = frozenset({Op.TASK_VECTOR, Op.SOURCE})


@dataclass(frozen=True, slots=True)
class Survey:
    """What is found of a tensor, and how."""

    layout: SurveyLayout
    """Which numbers."""
    totals: Program
    """Leaves them, in the order of the layout. It reads one source more than the merge: its result."""
    magnitudes: Program
    """Offers the magnitudes of every source's vector."""
    merging: Program
    """Merges as the method does, and leaves the totals, too; what it has stored is its own result. Only
    for machines that store each tile at once."""
    sources: int
    """Sources that both read: those of the merge, and the result."""
    has_base: bool
    """Whether there is a base."""

    @property
    def all(self) -> tuple[Program, ...]:
        """Every program."""
        return self.totals, self.magnitudes, self.merging


def survey_of(programs: Programs) -> Survey:
    """Return what is surveyed of tensors that a method merges with some parameters."""
    sheet = Sheet(programs.sources, programs.has_base)
    merged = programs.work.merge(sheet)
    kept = _kept_rows(merged, sheet)
    layout = SurveyLayout(programs.sources, programs.has_base, bool(kept))
    vectors = sheet.vectors
    # Computed once more than the merge's own rows: what those keep is the merge's affair.
    result = Row(Op.TASK_VECTOR if programs.has_base else Op.SOURCE, index=programs.sources)
    magnitudes = compile_sinks([ranked(vector) for vector in vectors])
    sinks = _sums(layout, sheet, result, kept)
    sinks += _counts(layout, vectors, kept)
    sinks += [largest(abs(vector)) for vector in vectors]
    merging = compile_sinks([Sink(Op.STORE, (merged,)), *sinks])
    return Survey(
        layout,
        compile_sinks(sinks),
        magnitudes,
        merging,
        programs.sources + 1,
        programs.has_base,
    )


def _sums(layout: SurveyLayout, sheet: Sheet, result: Row, kept: Sequence[Row]) -> list[Sink]:
    vectors = sheet.vectors
    return [
        *(dot(vectors[one], vectors[other]) for one, other in layout.products()),
        *([dot(sheet.base, sheet.base)] if layout.has_base else []),
        dot(result, result),
        *(dot(result, vector) for vector in vectors),
        *(dot(row, row) for row in kept),
    ]


def _counts(layout: SurveyLayout, vectors: Sequence[Row], kept: Sequence[Row]) -> list[Sink]:
    sinks = [*map(count, vectors), *_conflicts(vectors)]
    if kept:
        sinks += map(count, kept)
        sinks += [count_both(kept[one], kept[other]) for one, other in layout.pairs]
        sinks += _conflicts(kept)
    return sinks


def _conflicts(rows: Sequence[Row]) -> list[Sink]:
    """Count the elements of which one row is positive and another one negative."""
    if len(rows) < 2:
        return []
    if len(rows) == 2:
        return [count_opposed(rows[0], rows[1])]
    return [count_opposed(reduce(maximum, rows), reduce(minimum, rows))]


def _kept_rows(merged: Row, sheet: Sheet) -> list[Row]:
    """Return, of a merge, what it keeps of every source's vector; nothing unless it trims each by itself.

    That is the largest part of the expression which depends on one source and its trims alone.
    """
    kept: dict[int, Row] = {}
    owners: dict[Row, int | None] = {}
    open_rows = [merged]
    seen: set[Row] = set()
    while open_rows:
        row = open_rows.pop()
        if row in seen:
            continue
        seen.add(row)
        source = _owner(row, owners)
        if source is None or row.op in _VECTORS:
            open_rows.extend(row.rows)
        elif row.op in (Op.KEEP_LARGEST, Op.SELECT):
            kept[source] = row
    if kept.keys() != set(range(sheet.sources)):
        return []
    return [kept[source] for source in range(sheet.sources)]


def _owner(row: Row, known: dict[Row, int | None]) -> int | None:
    """Return the source whose vector and trims alone a row depends on; None if there is more to it."""
    # Expressions of one source are shallow, and others end at their first step of another kind.
    if row.op in _VECTORS:
        return row.index
    if row.op not in _TRIMMING:
        return None
    if row not in known:
        of_rows = {_owner(each, known) for each in row.rows if each.op is not Op.FILL}
        known[row] = of_rows.pop() if len(of_rows) == 1 else None
    return known[row]
