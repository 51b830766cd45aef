"""Merges that choose entries by how the sources differ: nearswap, ram, ramplus_tl, arcee_fusion."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twins.shapes import Array, subtract_base


def nearswap(
    base: Array | None, sources: Sequence[Array], *, t: float, smallest_gap: float = 1e-6
) -> Array:
    """Return the base, moved towards the only source the more the nearer they are.

    ``w = min(t / |a - b|, 1)``, and ``(1 - w) a + w b`` with ``a`` the base.

    Args:
        base: Required.
        sources: Exactly one.
        t: The distance up to which the source replaces the base.
        smallest_gap: Distances below count as this.

    Agrees with mergekit 0.1.5 ``nearswap``.
    """
    start, (task,) = subtract_base(base, sources)
    other = start + task
    share = np.clip(t / np.maximum(np.abs(task), smallest_gap), 0.0, 1.0)
    return (1 - share) * start + share * other


def ram(base: Array | None, sources: Sequence[Array], *, epsilon: float = 1e-5) -> Array:
    """Return the base plus, per entry, the mean over the task vectors that move it.

    Args:
        base: Required.
        sources: One or more.
        epsilon: An entry moves when its change is larger than this in magnitude.

    Source: Yuan et al. 2026, arXiv:2601.13572, reinforced agent merging. Agrees with mergekit 0.1.5 ``ram``.
    """
    return ramplus_tl(base, sources, r=0.0, alpha=0.0, epsilon=epsilon)


def ramplus_tl(
    base: Array | None,
    sources: Sequence[Array],
    *,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
) -> Array:
    """Return what :func:`ram` does, with what only one source moves made larger.

    Entries that source i alone moves are multiplied by ``1 + r clip(shared_i / unique_i, 0,
    alpha)``: of the entries it moves, ``shared_i`` are moved by others too, ``unique_i`` are not.

    Args:
        base: Required.
        sources: One or more.
        r: How much larger.
        alpha: The bound on the ratio.
        epsilon: As in :func:`ram`; also the least denominator of the ratio.

    Source: Yuan et al. 2026, arXiv:2601.13572, RAM+, counted per tensor instead of per model.
    Agrees with mergekit 0.1.5 ``ramplus_tl``, whose factors are float32 whatever the tensors are.
    """
    start, tasks = subtract_base(base, sources)
    moves = [np.abs(task) > epsilon for task in tasks]
    movers = sum((move.astype(np.int64) for move in moves), start=np.zeros(start.shape, np.int64))
    merged = np.zeros_like(start)
    for task, move in zip(tasks, moves, strict=True):
        unique = int(np.sum(move & (movers == 1)))
        shared = int(np.sum(move & (movers > 1)))
        factor = 1 + r * min(max(shared / max(unique, epsilon), 0.0), alpha)
        merged = merged + np.where(move & (movers == 1), factor * task, 0.0)
        merged = merged + np.where(move & (movers > 1), task / np.maximum(movers, 1), 0.0)
    return start + merged


def arcee_fusion(base: Array | None, sources: Sequence[Array]) -> Array:
    """Return the base with those entries of the only source that matter unusually much.

    An entry scores its change in magnitude times the Kullback-Leibler divergence of the softmax
    of its row, source against base. Entries are taken whose score is at least the median plus 1.5
    times the distance of the quartiles, quantile q being entry ``floor(q (n - 1))`` of the sorted
    scores.

    Args:
        base: Required.
        sources: Exactly one.

    Agrees with mergekit 0.1.5 ``arcee_fusion``, where a row is a vector along the last dimension.
    Differs from mergekit: quantiles are exact for tensors of any size; it takes a million entries
    at random of those that have more.
    """
    start, (task,) = subtract_base(base, sources)
    if start.size == 0:
        return start
    source = start + task
    scores = np.abs(task) * _divergence(source, start)
    ordered = np.sort(scores.ravel())
    quarter, half, three = (ordered[int(q * (ordered.size - 1))] for q in (0.25, 0.5, 0.75))
    return np.where(scores >= half + 1.5 * (three - quarter), source, start)


def _divergence(source: Array, start: Array) -> Array:
    """Return one divergence per row, broadcasting against the tensors."""
    if source.ndim == 0:
        return _divergence(source.reshape(1), start.reshape(1)).reshape(())
    p, q = _softmax(source) + 1e-8, _softmax(start) + 1e-8
    return np.asarray(np.sum(p * np.log(p / q), axis=-1, keepdims=True))


def _softmax(values: Array) -> Array:
    powers = np.exp(values - np.max(values, axis=-1, keepdims=True))
    return np.asarray(powers / np.sum(powers, axis=-1, keepdims=True))
