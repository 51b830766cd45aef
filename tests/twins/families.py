"""Sparsified task vectors, combined: ties, dare, breadcrumbs, della and magnitude_prune.

Every method is the same five steps with other parts: sparsify each task vector, rescale it, weigh
it, elect a sign per entry, and divide what agrees. :data:`PRESETS` says which parts PEFT 0.21.2,
mergekit 0.1.5 and the papers have.

Random methods take their masks, one per source, of 0 and 1, for no two generators draw the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from twins.shapes import Array, spread, subtract_base
from twins.sparsifying import (
    KRule,
    Rescale,
    TiePolicy,
    della_probabilities,
    keep_between,
    keep_largest,
    keep_masked,
    rescale,
)

Sparsify = Literal["none", "largest", "between", "masks"]
Vote = Literal["none", "unweighted", "weighted"]
Count = Literal["total", "frequency"]
Divisor = Literal["none", "count", "weights"]
Cancelled = Literal["plus", "majority"]
Preset = Literal["peft", "mergekit", "paper"]


@dataclass(frozen=True)
class Parts:
    """What a method is made of."""

    sparsify: Sparsify = "none"
    """``largest``, ``between`` two cuts, or by given ``masks``."""
    k_rule: KRule = "floor"
    """Of ``largest``."""
    tie_policy: TiePolicy = "exact"
    """Of ``largest``."""
    rescale: Rescale = "none"
    """What makes up for what was dropped."""
    vote: Vote = "none"
    """Whether signs are elected, by the sparsified task vectors or by those times their weights."""
    count: Count = "total"
    """Whether values vote, or their signs."""
    divisor: Divisor = "none"
    """What the sum of agreeing entries is divided by: their number or the sum of their weights."""
    cancelled: Cancelled = "plus"
    """What a vote of 0 elects: +, or the sign that most entries elect, - where as many elect either."""


PRESETS: dict[str, dict[str, Parts]] = {
    "ties": {
        "peft": Parts("largest", vote="unweighted", divisor="count"),
        "mergekit": Parts("largest", "at_least_one", vote="weighted", divisor="weights"),
        "paper": Parts(
            "largest",
            "one_more",
            "inclusive",
            vote="unweighted",
            divisor="count",
            cancelled="majority",
        ),
    },
    "magnitude_prune": {"peft": Parts("largest")},
    "dare_linear": {
        "peft": Parts("masks", rescale="density"),
        "mergekit": Parts("masks", rescale="l1"),
        "paper": Parts("masks", rescale="density"),
    },
    "dare_ties": {
        "peft": Parts("masks", rescale="density", vote="unweighted", divisor="count"),
        "mergekit": Parts("masks", rescale="l1", vote="weighted"),
        "paper": Parts("masks", rescale="density", vote="unweighted", divisor="count"),
    },
    "breadcrumbs": {"mergekit": Parts("between"), "paper": Parts("between")},
    "breadcrumbs_ties": {"mergekit": Parts("between", vote="weighted")},
    "della": {
        "mergekit": Parts("masks", rescale="l1", vote="weighted", divisor="weights"),
        "paper": Parts("masks", rescale="probability", vote="unweighted", divisor="count"),
    },
    "della_linear": {
        "mergekit": Parts("masks", rescale="l1"),
        "paper": Parts("masks", rescale="probability"),
    },
}
"""The parts of each method as each reference has them.

``ties`` in the paper trims over the whole model and resolves a cancelled vote by the whole model's
sign: so it does here through ``shapes.over_model``, and ``twins.paper_ties`` has it without parts. DARE's paper hands its task vectors to whatever comes after, so ``dare_ties`` there would trim
a second time: give ``ties`` the dropped task vectors for that.
"""


def combine(
    base: Array | None,
    sources: Sequence[Array],
    *,
    parts: Parts,
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 1.0,
    gamma: float | Sequence[float] = 0.01,
    epsilon: float | Sequence[float] = 0.15,
    masks: Sequence[Array] | None = None,
    rescale_by: float | Sequence[float] | None = None,
    lambda_: float = 1.0,
) -> Array:
    """Return the base plus what the parts make of the task vectors.

    Args:
        base: Required.
        sources: One or more.
        parts: What to do.
        weight: One factor per source.
        density: Fraction kept per source, or the mean probability.
        gamma: Fraction dropped at the top, of ``between``.
        epsilon: Half the range of probabilities, of ``probability``.
        masks: One per source, of ``masks``.
        rescale_by: What ``rescale`` takes for the density, DAREx's q.
        lambda_: A factor on the whole change.
    """
    start, tasks = subtract_base(base, sources)
    count = len(tasks)
    densities, gammas, epsilons = (spread(each, count) for each in (density, gamma, epsilon))
    divisors = densities if rescale_by is None else spread(rescale_by, count)
    kept = []
    for source, task in enumerate(tasks):
        mask = None if masks is None else masks[source]
        sparse = _sparsify(task, parts, densities[source], gammas[source], mask)
        probabilities = None
        if parts.rescale == "probability":
            probabilities = della_probabilities(
                task, density=densities[source], epsilon=epsilons[source]
            )
        if densities[source] < 1:
            sparse = rescale(
                sparse,
                task,
                by=parts.rescale,
                density=divisors[source],
                probabilities=probabilities,
            )
        kept.append(sparse)
    return start + lambda_ * disjoint(kept, spread(weight, count), parts)


def _sparsify(task: Array, parts: Parts, density: float, gamma: float, mask: Array | None) -> Array:
    if density >= 1 or parts.sparsify == "none":
        return task
    if parts.sparsify == "largest":
        return keep_largest(task, density=density, k_rule=parts.k_rule, tie_policy=parts.tie_policy)
    if parts.sparsify == "between":
        return keep_between(task, density=density, gamma=gamma)
    if mask is None:
        raise ValueError("no masks")
    return keep_masked(task, mask)


def elect(voters: Sequence[Array], count: Count, cancelled: Cancelled = "plus") -> Array:
    """Return +1 and -1: the sign of the sum of values or of signs, with what a sum of 0 elects."""
    total = np.zeros_like(voters[0])
    for voter in voters:
        total = total + (voter if count == "total" else np.sign(voter))
    plus = cancelled == "plus" or np.sum(np.sign(total)) > 0
    return np.where(total >= 0 if plus else total > 0, 1.0, -1.0)


def disjoint(kept: Sequence[Array], weights: Sequence[float], parts: Parts) -> Array:
    """Return the sum of the weighted task vectors that agree with the elected sign, divided.

    A divisor of 0 counts as 1; a sum of weights without a vote does so within 1e-8 of 0.
    """
    weighted = [factor * task for factor, task in zip(weights, kept, strict=True)]
    if parts.vote == "none":
        agree = [np.ones(task.shape, dtype=bool) for task in kept]
    else:
        voters = kept if parts.vote == "unweighted" else weighted
        elected = elect(voters, parts.count, parts.cancelled)
        # A zero has no sign, so it agrees with none.
        agree = [np.sign(voter) == elected for voter in voters]
    mixed, divisor = np.zeros_like(kept[0]), np.zeros_like(kept[0])
    for factor, task, selected in zip(weights, weighted, agree, strict=True):
        mixed = mixed + np.where(selected, task, 0.0)
        divisor = divisor + np.where(selected, factor if parts.divisor == "weights" else 1.0, 0.0)
    if parts.divisor == "none":
        return mixed
    smallest = 1e-8 if parts.divisor == "weights" and parts.vote == "none" else 0.0
    return mixed / np.where(np.abs(divisor) <= smallest, 1.0, divisor)


def _parts(
    name: str, preset: Preset, *, normalize: bool | None, rescaled: bool | None, count: Count
) -> Parts:
    """Return a preset's parts with mergekit's switches applied, None leaving what they are."""
    parts = replace(PRESETS[name][preset], count=count)
    if normalize is not None:
        parts = replace(parts, divisor="weights" if normalize else "none")
    if rescaled is not None:
        parts = replace(parts, rescale="l1" if rescaled else "none")
    return parts


def ties(
    base: Array | None,
    sources: Sequence[Array],
    *,
    preset: Preset = "peft",
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 1.0,
    majority_sign_method: Count = "total",
    normalize: bool | None = None,
    rescaled: bool | None = None,
    lambda_: float = 1.0,
) -> Array:
    """Trim each task vector, elect a sign per entry, average what agrees.

    Args:
        base: Required.
        sources: One or more.
        preset: Which reference.
        weight: One factor per source.
        density: Fraction kept per source.
        majority_sign_method: What votes.
        normalize: mergekit's switch: divide by the sum of the agreeing weights.
        rescaled: mergekit's switch: keep each task vector's sum of magnitudes.
        lambda_: A factor on the whole change.

    Source: Yadav et al. 2023, arXiv:2306.01708, Algorithm 1, per tensor.
    """
    parts = _parts(
        "ties", preset, normalize=normalize, rescaled=rescaled, count=majority_sign_method
    )
    return combine(base, sources, parts=parts, weight=weight, density=density, lambda_=lambda_)


def magnitude_prune(
    base: Array | None,
    sources: Sequence[Array],
    *,
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 1.0,
    tie_policy: TiePolicy = "exact",
    lambda_: float = 1.0,
) -> Array:
    """Trim each task vector and add them; over whole models through ``shapes.over_model``."""
    parts = replace(PRESETS["magnitude_prune"]["peft"], tie_policy=tie_policy)
    return combine(base, sources, parts=parts, weight=weight, density=density, lambda_=lambda_)


def dare_linear(
    base: Array | None,
    sources: Sequence[Array],
    *,
    masks: Sequence[Array],
    preset: Preset = "peft",
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 1.0,
    rescale_by: float | Sequence[float] | None = None,
    normalize: bool | None = None,
    rescaled: bool | None = None,
    lambda_: float = 1.0,
) -> Array:
    """Drop entries at random, rescale what is kept, and add.

    Args:
        base: Required.
        sources: One or more.
        masks: What is kept of each; not looked at where the density is 1.
        preset: Which reference.
        weight: One factor per source.
        density: The probability with which the masks were drawn.
        rescale_by: DAREx-q: what to divide by in place of the density.
        normalize: mergekit's switch: divide by the sum of the weights.
        rescaled: mergekit's switch: keep each task vector's sum of magnitudes.
        lambda_: A factor on the whole change.

    Source: Yu et al. 2023, arXiv:2311.03099, ``m * delta / (1 - p)``; Deng et al. 2024,
    arXiv:2410.09344, DAREx-q.
    """
    parts = _parts("dare_linear", preset, normalize=normalize, rescaled=rescaled, count="total")
    return combine(
        base,
        sources,
        parts=parts,
        weight=weight,
        density=density,
        masks=masks,
        rescale_by=rescale_by,
        lambda_=lambda_,
    )


def dare_ties(
    base: Array | None,
    sources: Sequence[Array],
    *,
    masks: Sequence[Array],
    preset: Preset = "peft",
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 1.0,
    majority_sign_method: Count = "total",
    rescale_by: float | Sequence[float] | None = None,
    normalize: bool | None = None,
    rescaled: bool | None = None,
    lambda_: float = 1.0,
) -> Array:
    """Drop entries at random, rescale what is kept, and average what agrees in sign.

    Args and sources: as :func:`dare_linear` and :func:`ties`.
    """
    parts = _parts(
        "dare_ties", preset, normalize=normalize, rescaled=rescaled, count=majority_sign_method
    )
    return combine(
        base,
        sources,
        parts=parts,
        weight=weight,
        density=density,
        masks=masks,
        rescale_by=rescale_by,
        lambda_=lambda_,
    )


def breadcrumbs(
    base: Array | None,
    sources: Sequence[Array],
    *,
    preset: Preset = "mergekit",
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 1.0,
    gamma: float | Sequence[float] = 0.01,
    normalize: bool | None = None,
    rescaled: bool | None = None,
    lambda_: float = 1.0,
) -> Array:
    """Drop the largest and the smallest entries of each task vector, and add.

    Args:
        base: Required.
        sources: One or more.
        preset: Which reference; they differ in nothing but the switches.
        weight: One factor per source; the paper has none.
        density: Fraction kept per source: 1 - beta - (1 - gamma) in the paper's letters.
        gamma: Fraction dropped for being largest: 1 - gamma in the paper's letters.
        normalize: mergekit's switch: divide by the sum of the weights.
        rescaled: mergekit's switch: keep each task vector's sum of magnitudes.
        lambda_: A factor on the whole change, the paper's alpha.

    Source: Davari and Belilovsky 2023, arXiv:2312.06795.
    """
    parts = _parts("breadcrumbs", preset, normalize=normalize, rescaled=rescaled, count="total")
    return combine(
        base, sources, parts=parts, weight=weight, density=density, gamma=gamma, lambda_=lambda_
    )


def breadcrumbs_ties(
    base: Array | None,
    sources: Sequence[Array],
    *,
    preset: Preset = "mergekit",
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 1.0,
    gamma: float | Sequence[float] = 0.01,
    majority_sign_method: Count = "total",
    normalize: bool | None = None,
    rescaled: bool | None = None,
    lambda_: float = 1.0,
) -> Array:
    """Do what :func:`breadcrumbs` does, and add what agrees in sign."""
    parts = _parts(
        "breadcrumbs_ties",
        preset,
        normalize=normalize,
        rescaled=rescaled,
        count=majority_sign_method,
    )
    return combine(
        base, sources, parts=parts, weight=weight, density=density, gamma=gamma, lambda_=lambda_
    )


def della(
    base: Array | None,
    sources: Sequence[Array],
    *,
    masks: Sequence[Array],
    preset: Preset = "mergekit",
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 1.0,
    epsilon: float | Sequence[float] = 0.15,
    majority_sign_method: Count = "total",
    normalize: bool | None = None,
    rescaled: bool | None = None,
    lambda_: float = 1.0,
) -> Array:
    """Drop entries at random, the small ones sooner, and average what agrees in sign.

    Args:
        base: Required.
        sources: One or more.
        masks: What is kept of each; drawn with ``sparsifying.della_probabilities``.
        preset: ``paper`` divides each kept entry by its probability; ``mergekit`` rescales the
            task vector to its sum of magnitudes.
        weight: One factor per source.
        density: The mean probability per source.
        epsilon: Half the range of probabilities per source.
        majority_sign_method: What votes.
        normalize: mergekit's switch: divide by the sum of the agreeing weights.
        rescaled: mergekit's switch: keep each task vector's sum of magnitudes.
        lambda_: A factor on the whole change.

    Source: Deep, Bhardwaj and Poria 2024, arXiv:2406.11617.
    """
    parts = _parts(
        "della", preset, normalize=normalize, rescaled=rescaled, count=majority_sign_method
    )
    return combine(
        base,
        sources,
        parts=parts,
        weight=weight,
        density=density,
        epsilon=epsilon,
        masks=masks,
        lambda_=lambda_,
    )


def della_linear(
    base: Array | None,
    sources: Sequence[Array],
    *,
    masks: Sequence[Array],
    preset: Preset = "mergekit",
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 1.0,
    epsilon: float | Sequence[float] = 0.15,
    normalize: bool | None = None,
    rescaled: bool | None = None,
    lambda_: float = 1.0,
) -> Array:
    """Drop entries at random, the small ones sooner, and add; see :func:`della`."""
    parts = _parts("della_linear", preset, normalize=normalize, rescaled=rescaled, count="total")
    return combine(
        base,
        sources,
        parts=parts,
        weight=weight,
        density=density,
        epsilon=epsilon,
        masks=masks,
        lambda_=lambda_,
    )
