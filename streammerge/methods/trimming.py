"""The trim step of TIES as a round, which several methods share.

Source: Yadav et al. 2023, arXiv:2306.01708, section 4.2, step 1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from enum import StrEnum

from streammerge.recipe.types import ParameterKind, ParameterSpec, Semantics
from streammerge.statistics.rounds import Found, Rank, Round
from streammerge.statistics.topk import TiePolicy, kept_count
from streammerge.tiles.writing import Row, Sheet, Sink, keep_largest, ranked


class KeptCount(StrEnum):
    """How many entries a density keeps of n."""

    FLOOR = "floor"
    """``int(density * n)``, as PEFT does."""
    AT_LEAST_ONE = "at least one"
    """The same, but one if that is none and the density is above 0, as mergekit does."""
    ONE_MORE = "one more"
    """``int(density * n) + 1``, as the authors of TIES do; none, if the density is 0."""


KEPT_COUNT = ParameterSpec(
    name="kept_count",
    kind=ParameterKind.CHOICE,
    doc="How many of n entries are kept: density times n rounded down, at least one, or one more.",
    default=KeptCount.FLOOR.value,
    per_source=False,
    choices=tuple(KeptCount),
    presets=(
        (Semantics.MERGEKIT, KeptCount.AT_LEAST_ONE.value),
        (Semantics.PAPER, KeptCount.ONE_MORE.value),
    ),
)


def trim_round(
    densities: Sequence[float], tie_policy: str, kept: str = KeptCount.FLOOR.value
) -> Round:
    """Return the round that finds which entries of each task vector are its largest.

    Args:
        densities: Fraction kept per source, in [0, 1].
        tie_policy: Which entries exactly at the threshold are kept.
        kept: How many entries a density keeps.
    """
    policy, counting = TiePolicy(tie_policy), KeptCount(kept)

    def sinks(sheet: Sheet) -> Sequence[Sink]:
        return [ranked(vector) for vector in sheet.task_vectors]

    # Models have tensors of few sizes, and may have tens of thousands of them.
    @functools.lru_cache(maxsize=64)
    def ranks_of(numel: int) -> tuple[Rank, ...]:
        return tuple(Rank(_count(density, numel, counting), policy) for density in densities)

    def ranks(numel: int, _before: Found) -> Sequence[Rank]:
        return ranks_of(numel)

    return Round(sinks, ranks, about=(tuple(densities), policy, kept))


def _count(density: float, numel: int, kept: KeptCount) -> int:
    count = kept_count(density, numel)
    if density <= 0 or kept is KeptCount.FLOOR:
        return count
    return count + 1 if kept is KeptCount.ONE_MORE else max(1, count)


def trimmed(sheet: Sheet) -> list[Row]:
    """Return the task vectors, of each what the trim of its source keeps."""
    return [keep_largest(vector, source) for source, vector in enumerate(sheet.task_vectors)]
