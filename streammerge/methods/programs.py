"""What a method does with some parameters, as programs that a machine runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from streammerge.methods.base import Locality, MergeMethod, Work
from streammerge.recipe.types import ParameterValue
from streammerge.statistics.rounds import NOTHING, Answers, Found
from streammerge.statistics.topk import keep_everything
from streammerge.statistics.totals import join_totals, no_totals
from streammerge.tiles.compiling import compile_result, compile_sinks
from streammerge.tiles.program import Origin, Program
from streammerge.tiles.writing import Sheet, ranked


@dataclass(frozen=True, slots=True)
class Counts:
    """How much the statistics of a scope hold at once."""

    ranked: int
    """Values that are ranked."""
    totals: int
    """Totals per block."""

    def joined(self, other: Counts) -> Counts:
        """Return the larger of each."""
        return Counts(max(self.ranked, other.ranked), max(self.totals, other.totals))


@dataclass(frozen=True, slots=True)
class RowCounts:
    """How much is held of rows at once."""

    ranked: int
    """Values per element that are ranked within rows."""
    totals: int
    """Totals per row."""


@dataclass(frozen=True, slots=True)
class Programs:
    """A method at work on some sources."""

    work: Work
    """What it does, and what answers come to."""
    merge: Program
    """The merge."""
    rounds: tuple[Program, ...]
    """What each round asks of a tile."""
    sources: int
    """Number of sources."""
    has_base: bool
    """Whether there is a base."""
    row_rounds: tuple[Program, ...] = ()
    """What each round about rows asks of a tile."""
    row_ranks: Program | None = None
    """Offers the values that are ranked within rows."""

    @property
    def all(self) -> tuple[Program, ...]:
        """Every program."""
        ranks = () if self.row_ranks is None else (self.row_ranks,)
        return (*self.row_rounds, *ranks, *self.rounds, self.merge)

    @property
    def by_rows(self) -> bool:
        """Whether whole rows must be seen together."""
        return self.work.locality is Locality.ROW

    @property
    def row_counts(self) -> RowCounts:
        """How much is held of rows at once."""
        return RowCounts(
            0 if self.row_ranks is None else self.row_ranks.ranked,
            max((len(each.totals) for each in self.row_rounds), default=0),
        )

    @property
    def row_numbers(self) -> int:
        """Numbers of each row that programs use."""
        of_rows = [n for each in self.all for n in each.numbers if n.origin is Origin.ROW]
        return max((number.index + 1 for number in of_rows), default=0)

    def kept(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Return the entries that each source keeps; see :attr:`Work.kept`.

        Args:
            counts: What the merge's trims, or random numbers where it has none, keep; in the order of
                their use.
        """
        order = self.merge.trims or self.merge.streams
        by_index = sorted(zip(order, counts, strict=True))
        return tuple(self.work.kept([count for _, count in by_index]))

    @property
    def counts(self) -> Counts:
        """What the statistics of one scope hold."""
        return Counts(self.ranked, max((len(each.totals) for each in self.rounds), default=0))

    @property
    def ranked(self) -> int:
        """Values that the round which ranks most of them ranks at once; 0 where none does."""
        return max((program.ranked for program in self.rounds), default=0)


def found_of_nothing(programs: Programs) -> Found:
    """Return what is known of a tensor without elements."""
    known = NOTHING
    for asked, program in zip(programs.work.rounds, programs.rounds, strict=True):
        totals = join_totals(program.totals, no_totals(program.totals, 0))
        tops = (keep_everything(0),) * program.ranked
        known = known.joined(asked.concluded(Answers(0, totals, tops, known)))
    return known


def programs_of(
    method: MergeMethod,
    values: Iterable[tuple[str, ParameterValue]],
    *,
    sources: int,
    has_base: bool,
) -> Programs:
    """Return the programs of a method with given parameters.

    Args:
        method: The method.
        values: Its parameters by name, as a setting holds them.
        sources: Number of sources.
        has_base: Whether there is a base.
    """
    return _programs_of(method.work, method.bind(values), sources, has_base=has_base)


# A plan may give every layer values of its own.
@lru_cache(maxsize=1024)
def _programs_of(
    work_of: Callable[[Any], Work], params: Hashable, sources: int, *, has_base: bool
) -> Programs:
    work = work_of(params)
    return Programs(
        work,
        compile_result(work.merge(Sheet(sources, has_base))),
        tuple(compile_sinks(each.sinks(Sheet(sources, has_base))) for each in work.rounds),
        sources,
        has_base,
        tuple(compile_sinks(each.sinks(Sheet(sources, has_base))) for each in work.row_rounds),
        None
        if work.row_ranks is None
        else compile_sinks(ranked(row) for row in work.row_ranks(Sheet(sources, has_base))),
    )
