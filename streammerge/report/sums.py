"""Sums of surveys in one layout for all tensors, and the measures that they come to.

A row holds the sums of one tensor, or of several added up; measures are made of rows of either kind.

Memory: eight bytes per number and tensor, and as much again for the measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from streammerge.statistics.surveying import SurveyLayout

Floats = NDArray[np.float64]

MEASURES: Mapping[str, str] = {
    "base_norm": "Norm of the base's values.",
    "change_norm": "Norm of what the merge changed: the result less the base, or the result itself.",
    "change": "Norm of what the merge changed, as a share of the base's.",
    "conflicts": "Share of elements in which sources have opposite signs.",
    "kept_conflicts": "Share of elements in which what is kept of the sources has opposite signs.",
    "norm": "Norm of the source's vector: its task vector, or its own values without a base.",
    "relative": "Norm of the source's vector, as a share of the base's.",
    "unchanged": "Share of elements in which the source's vector is exactly 0.",
    "largest": "Largest magnitude of the source's vector.",
    "largest_at": "The first element that has the largest magnitude: flat index in the tensor.",
    "largest_in": "The tensor that has the largest magnitude.",
    "carried": "How much of the source's vector the result carries: the projection on it, 1 for all.",
    "aligned": "Cosine between what the merge changed and the source's vector.",
    "density": "Share of elements of the source's vector that the method keeps.",
    "threshold": "Smallest magnitude that is kept of the source's vector.",
    "kept_norm": "Norm of what is kept, as a share of that of all of the source's vector.",
    "cosine": "Cosine between two sources' vectors.",
    "overlap": "Elements kept of both sources, as a share of those kept of either.",
}
"""What each column means; those of a source end with its number, those of a pair with two."""

_WHOLE = ("numel", "base", "result", "contested", "conflicts", "trimmed", "kept_conflicts")
_OF_SOURCE = (
    "numel", "square", "changed", "carried", "kept_square", "of_kept", "kept", "chosen", "choosing",
    "base",
)  # fmt: skip
_OF_PAIR = ("product", "square", "other_square", "both", "either")


@dataclass(frozen=True, slots=True)
class Columns:
    """Where each sum stands in a row."""

    sources: int
    """Sources of the merge, each with a place, whether it takes part in a tensor or not."""

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Two different sources, the lower one first, in order."""
        return list(combinations(range(self.sources), 2))

    @property
    def width(self) -> int:
        """Sums in a row."""
        return len(_WHOLE) + len(_OF_SOURCE) * self.sources + len(_OF_PAIR) * len(self.pairs)

    def of_all(self, name: str) -> int:
        """Return where a sum about all sources stands."""
        return _WHOLE.index(name)

    def of_source(self, name: str, source: int) -> int:
        """Return where a sum about a source stands."""
        return len(_WHOLE) + len(_OF_SOURCE) * source + _OF_SOURCE.index(name)

    def of_pair(self, name: str, pair: int) -> int:
        """Return where a sum about the pair of this number stands."""
        before = len(_WHOLE) + len(_OF_SOURCE) * self.sources
        return before + len(_OF_PAIR) * pair + _OF_PAIR.index(name)


@dataclass(slots=True)
class Sums:
    """Sums of some tensors, one row each."""

    columns: Columns
    """Where they stand."""
    rows: Floats
    """``[tensors, width]``."""
    largest: Floats
    """``[tensors, sources]``: the largest magnitudes; NaN where there is none."""
    largest_at: Floats
    """``[tensors, sources]``: the elements that have them."""
    filled: int = field(default=0)
    """Rows that are filled."""

    @classmethod
    def empty(cls, tensors: int, sources: int) -> Sums:
        """Return room for so many tensors."""
        columns = Columns(sources)
        places = np.full((tensors, sources), np.nan)
        return cls(columns, np.zeros((tensors, columns.width)), places, places.copy())

    def add(
        self,
        numel: int,
        layout: SurveyLayout,
        found: Floats,
        sources: Sequence[int],
        kept: Sequence[int],
    ) -> None:
        """Fill the next row.

        Args:
            numel: Elements of the tensor.
            layout: Which numbers are known of it.
            found: They, as a survey's row.
            sources: Which of all sources each of its own is.
            kept: Entries that the method keeps of each; empty where it does not choose.
        """
        row, columns = self.rows[self.filled], self.columns
        contested = layout.sources > 1
        row[columns.of_all("numel")] = numel
        row[columns.of_all("base")] = found[layout.base_square] if layout.has_base else np.nan
        row[columns.of_all("result")] = found[layout.result_square]
        if contested:
            row[columns.of_all("contested")] = numel
            row[columns.of_all("conflicts")] = found[layout.conflicts]
        if contested and layout.keeps:
            row[columns.of_all("trimmed")] = numel
            row[columns.of_all("kept_conflicts")] = found[layout.kept_conflicts]
        for own, source in enumerate(sources):
            at = columns.of_source("numel", source)
            square = found[layout.product(own, own)]
            row[at : at + len(_OF_SOURCE)] = (
                numel,
                square,
                found[layout.changed(own)],
                found[layout.carried(own)],
                found[layout.kept_square(own)] if layout.keeps else 0.0,
                square if layout.keeps else 0.0,
                found[layout.kept(own)] if layout.keeps else 0.0,
                kept[own] if kept else 0.0,
                numel if kept else 0.0,
                row[columns.of_all("base")],
            )
            self.largest[self.filled, source] = found[layout.largest(own)]
            self.largest_at[self.filled, source] = found[layout.largest_at(own)]
        for pair, (one, other) in enumerate(columns.pairs):
            if one in sources and other in sources:
                own_one, own_other = sources.index(one), sources.index(other)
                self._add_pair(row, pair, layout, found, (own_one, own_other))
        self.filled += 1

    def _add_pair(
        self, row: Floats, pair: int, layout: SurveyLayout, found: Floats, own: tuple[int, int]
    ) -> None:
        one, other = own
        both = either = 0.0
        if layout.keeps:
            both = found[layout.overlap(one, other)]
            either = found[layout.kept(one)] + found[layout.kept(other)] - both
        at = self.columns.of_pair("product", pair)
        row[at : at + len(_OF_PAIR)] = (
            found[layout.product(one, other)],
            found[layout.product(one, one)],
            found[layout.product(other, other)],
            both,
            either,
        )

    def grouped(self, groups: NDArray[np.int64], count: int) -> tuple[Sums, NDArray[np.int64]]:
        """Return the sums of groups of tensors, and the tensor of each largest magnitude.

        Args:
            groups: ``[tensors]``, the group of each.
            count: How many groups there are.

        Returns:
            The sums, and ``[groups, sources]`` rows of tensors; below 0 where there is none.
        """
        rows = np.zeros((count, self.rows.shape[1]))
        # One after the other in the order of the tensors, which is that of their names.
        np.add.at(rows, groups, self.rows)
        owners = np.full((count, self.columns.sources), -1, dtype=np.int64)
        largest, places = np.full(owners.shape, np.nan), np.full(owners.shape, np.nan)
        for source in range(self.columns.sources):
            (given,) = np.nonzero(~np.isnan(self.largest[:, source]))
            order = given[np.lexsort((given, -self.largest[given, source], groups[given]))]
            found, first = np.unique(groups[order], return_index=True)
            owners[found, source] = order[first]
            largest[found, source] = self.largest[order[first], source]
            places[found, source] = self.largest_at[order[first], source]
        return Sums(self.columns, rows, largest, places, count), owners

    def measures(self) -> Iterator[tuple[str, Floats]]:
        """Yield every measure by column, ``[rows]``; NaN where there is none. See :data:`MEASURES`."""
        with np.errstate(all="ignore"):
            yield from self._measures()

    def _measures(self) -> Iterator[tuple[str, Floats]]:
        columns = self.columns

        def of_all(name: str) -> Floats:
            column: Floats = self.rows[:, columns.of_all(name)]
            return column

        base, change = np.sqrt(of_all("base")), np.sqrt(of_all("result"))
        yield "base_norm", base
        yield "change_norm", change
        yield "change", _ratio(change, base)
        yield "conflicts", _ratio(of_all("conflicts"), of_all("contested"))
        yield "kept_conflicts", _ratio(of_all("kept_conflicts"), of_all("trimmed"))
        for source in range(columns.sources):
            for name, column in self._of_source(source, change):
                yield f"{name}.{source}", column
        for pair, (one, other) in enumerate(columns.pairs):
            product, square, other_square, both, either = (
                self.rows[:, columns.of_pair(name, pair)] for name in _OF_PAIR
            )
            norms = np.sqrt(square) * np.sqrt(other_square)
            yield f"cosine.{one}.{other}", np.clip(_ratio(product, norms), -1.0, 1.0)
            yield f"overlap.{one}.{other}", _ratio(both, either)

    def _of_source(self, source: int, change: Floats) -> Iterator[tuple[str, Floats]]:
        numel, square, changed, carried, kept_square, of_kept, _, chosen, choosing, base = (
            self.rows[:, self.columns.of_source(name, source)] for name in _OF_SOURCE
        )
        norm = np.sqrt(square)
        yield "norm", np.where(numel > 0, norm, np.nan)
        yield "relative", _ratio(norm, np.sqrt(base))
        yield "unchanged", _ratio(numel - changed, numel)
        yield "largest", self.largest[:, source]
        yield "largest_at", self.largest_at[:, source]
        yield "carried", _ratio(carried, square)
        yield "aligned", np.clip(_ratio(carried, norm * change), -1.0, 1.0)
        yield "density", _ratio(chosen, choosing)
        yield "kept_norm", _ratio(np.sqrt(kept_square), np.sqrt(of_kept))


def _ratio(part: Floats, whole: Floats) -> Floats:
    found = part / whole
    return np.where(np.isfinite(found), found, np.nan)
