"""The ways to combine adapters without a base: PEFT's combination types, each a table entry.

Source: peft.LoraModel.add_weighted_adapter 0.21.2; the papers are those of the methods of the same
names. Differs from PEFT: a single adapter is combined as asked, not by ``linear``; what PEFT loses
or scales wrongly (rslora, patterns, biases of the factors, trained modules) is kept or refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from streammerge.methods.base import DENSITY, WEIGHT
from streammerge.methods.families import MAJORITY_SIGN_METHOD
from streammerge.recipe.types import ParameterKind, ParameterSpec


class Target(StrEnum):
    """What the sources' values are combined on."""

    FACTORS = "A and B separately"
    """Each factor of its own, with the square root of weight * scaling; an approximation."""
    CONCATENATION = "A and B side by side"
    """Exact; the ranks add up."""
    LOW_RANK_PRODUCT = "B A, factored"
    """Exact up to the rank of the result; the product is never formed."""
    DENSE_PRODUCT = "B A, formed"
    """Elementwise on the products, then a singular value decomposition."""


class Sparsify(StrEnum):
    """What happens to each source before the sum."""

    NOTHING = "nothing"
    """All of it counts."""
    TRIM = "trim"
    """Only the largest magnitudes do."""
    DROP = "drop"
    """Only a random choice does, scaled up."""


@dataclass(frozen=True, slots=True)
class Combination:
    """One combination type."""

    name: str
    """The word in the recipe, and PEFT's ``combination_type``."""
    summary: str
    """One sentence for lists."""
    reference: str
    """Where it comes from."""
    target: Target
    """What is combined."""
    sparsify: Sparsify
    """What happens to each source first."""
    elects: bool
    """Whether a majority sign is elected and only what agrees is averaged, as in TIES."""

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        """The parameters that a recipe may give."""
        specs = [WEIGHT]
        if self.sparsify is not Sparsify.NOTHING:
            specs.append(DENSITY)
        if self.elects:
            specs.append(MAJORITY_SIGN_METHOD)
        if self.makes_rank:
            specs += [SVD_RANK, SVD_CLAMP]
        return tuple(specs)

    @property
    def makes_rank(self) -> bool:
        """Whether the rank of the result may be chosen."""
        return self.target in (Target.LOW_RANK_PRODUCT, Target.DENSE_PRODUCT)


SVD_RANK = ParameterSpec(
    name="svd_rank",
    kind=ParameterKind.INT,
    doc="Rank of the result; 0 takes the largest rank among the sources.",
    default=0,
    per_source=False,
    minimum=0,
    maximum=2**20,
)
SVD_CLAMP = ParameterSpec(
    name="svd_clamp",
    kind=ParameterKind.FLOAT,
    doc="Quantile of the factors' values, above 0.5, that they are clamped to; 0 does not clamp.",
    default=0.0,
    per_source=False,
    minimum=0.0,
    maximum=1.0,
)

_PEFT = "peft.LoraModel.add_weighted_adapter"
_TIES = "Yadav et al. 2023, arXiv:2306.01708"
_DARE = "Yu et al. 2024, arXiv:2311.03099"


def _with_svd(combination: Combination, summary: str) -> tuple[Combination, Combination]:
    """Return the type on factors, and the one on products that PEFT names after it."""
    dense = Combination(
        f"{combination.name}_svd",
        summary,
        combination.reference,
        Target.DENSE_PRODUCT,
        combination.sparsify,
        combination.elects,
    )
    return combination, dense


_FACTORS = Target.FACTORS
_EVERY = (
    Combination(
        "linear",
        "Adds A and B separately; a rough approximation of the sum.",
        _PEFT,
        _FACTORS,
        Sparsify.NOTHING,
        elects=False,
    ),
    Combination(
        "cat",
        "Puts A and B of all adapters side by side; the exact sum.",
        _PEFT,
        Target.CONCATENATION,
        Sparsify.NOTHING,
        elects=False,
    ),
    Combination(
        "svd",
        "Adds the products and keeps the best approximation of the chosen rank.",
        _PEFT,
        Target.LOW_RANK_PRODUCT,
        Sparsify.NOTHING,
        elects=False,
    ),
    *_with_svd(
        Combination(
            "ties",
            "Trims A and B separately, elects signs, averages what agrees.",
            _TIES,
            _FACTORS,
            Sparsify.TRIM,
            elects=True,
        ),
        "Trims the products, elects signs, averages what agrees, keeps the best rank.",
    ),
    *_with_svd(
        Combination(
            "dare_linear",
            "Drops entries of A and B at random, rescales, adds.",
            _DARE,
            _FACTORS,
            Sparsify.DROP,
            elects=False,
        ),
        "Drops entries of the products at random, rescales, adds, keeps the best rank.",
    ),
    *_with_svd(
        Combination(
            "dare_ties",
            "Drops entries of A and B at random, rescales, elects signs, averages what agrees.",
            f"{_DARE}; {_TIES}",
            _FACTORS,
            Sparsify.DROP,
            elects=True,
        ),
        "Drops entries of the products at random, elects signs, averages, keeps the best rank.",
    ),
    *_with_svd(
        Combination(
            "magnitude_prune",
            "Trims A and B separately, adds.",
            _TIES,
            _FACTORS,
            Sparsify.TRIM,
            elects=False,
        ),
        "Trims the products, adds, keeps the best rank.",
    ),
)

COMBINATIONS: Mapping[str, Combination] = MappingProxyType({each.name: each for each in _EVERY})
"""Every combination type, by name."""
