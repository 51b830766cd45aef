"""The trim step of TIES as a round, which several methods share.

Source: Yadav et al. 2023, arXiv:2306.01708, section 4.2, step 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from streammerge.statistics.rounds import Found, Rank, Round
from streammerge.statistics.topk import TiePolicy, kept_count
from streammerge.tiles.writing import Row, Sheet, Sink, keep_largest, ranked


def trim_round(densities: Sequence[float], tie_policy: str) -> Round:
    """Return the round that finds which entries of each task vector are its largest.

    Args:
        densities: Fraction kept per source, in [0, 1].
        tie_policy: Which entries exactly at the threshold are kept.
    """
    policy = TiePolicy(tie_policy)

    def sinks(sheet: Sheet) -> Sequence[Sink]:
        return [ranked(vector) for vector in sheet.task_vectors]

    def ranks(numel: int, _before: Found) -> Sequence[Rank]:
        return [Rank(kept_count(density, numel), policy) for density in densities]

    return Round(sinks, ranks, about=(tuple(densities), policy))


def trimmed(sheet: Sheet) -> list[Row]:
    """Return the task vectors, of each what the trim of its source keeps."""
    return [keep_largest(vector, source) for source, vector in enumerate(sheet.task_vectors)]
