"""What follows from the numbers by arithmetic alone. Whether a model is good is not among it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from streammerge.statistics.surveying import bin_edges

NEARLY_EQUAL = 0.999
"""Sources whose vectors have a larger cosine add nothing to each other but length."""
_LITTLE_KEPT = 0.7
"""Share of a vector's norm below which what is kept of it is spoken of: about half of its square."""
_CONCENTRATED = 1.25
"""Times the model's share of conflicts from which on a layer is spoken of."""
_LEAST_CONFLICTS = 0.01
"""Share of the model below which conflicts are too few to lie anywhere."""
_MOST_LAYERS = 8
"""Layers that are named; the table has all."""
_WEIGHTS_FROM, _WEIGHTS_TO = 0.5, 1.5
"""Sums of weights between these leave the length of a vector that all sources share about as it is."""
FRACTIONS = (0.5, 0.7, 0.9, 0.95, 0.99)
"""Of a vector's norm, for which the density that keeps so much is told."""

Advice = dict[str, Any]
"""What it is about (``kind``), the number, and a sentence."""


def advise(
    document: Mapping[str, Any],
    weights: Sequence[tuple[tuple[int, ...], Mapping[str, Any]]],
    *,
    has_base: bool,
) -> list[Advice]:
    """Return what there is to say about a report.

    Args:
        document: The report, as far as it is there.
        weights: Of each setting the models that are merged, and the values of the parameters.
        has_base: Whether vectors are task vectors.
    """
    names = [f"sources[{number}]" for number in range(len(document["sources"]))]
    model = {name: column[0] for name, column in document["tables"]["model"].items() if column}
    return [
        *_about_sources(model, names, has_base=has_base),
        *_about_pairs(model, names),
        *_about_densities(document, model, names),
        *_about_layers(document["tables"]["layers"], model),
        *_about_weights(weights, has_base=has_base),
    ]


def _about_sources(
    model: Mapping[str, Any], names: Sequence[str], *, has_base: bool
) -> Iterator[Advice]:
    if not has_base:
        return
    for number, name in enumerate(names):
        if model.get(f"unchanged.{number}") == 1.0:
            yield _advice(
                "equals base", 1.0, f"{name} equals the base in every element that was merged.",
                source=number,
            )  # fmt: skip


def _about_pairs(model: Mapping[str, Any], names: Sequence[str]) -> Iterator[Advice]:
    for one, name in enumerate(names):
        for other in range(one + 1, len(names)):
            cosine = model.get(f"cosine.{one}.{other}")
            if cosine is not None and cosine > NEARLY_EQUAL:
                yield _advice(
                    "nearly equal",
                    cosine,
                    f"{name} and {names[other]} point the same way: their cosine is {cosine:.6f}.",
                    source=one,
                )


def _about_densities(
    document: Mapping[str, Any], model: Mapping[str, Any], names: Sequence[str]
) -> Iterator[Advice]:
    for number, name in enumerate(names):
        share, density = model.get(f"kept_norm.{number}"), model.get(f"density.{number}")
        if share is None or density is None or share >= _LITTLE_KEPT:
            continue
        needed = density_for(document["histograms"]["counts"][number], _LITTLE_KEPT)
        more = (
            ""
            if needed is None
            else f" In the sample a density of {needed:.2g} keeps {_LITTLE_KEPT}."
        )
        yield _advice(
            "little kept",
            share,
            f"A density of {density:.3g} keeps {share:.3f} of the norm of {name}.{more}",
            source=number,
        )


def _about_layers(layers: Mapping[str, list[Any]], model: Mapping[str, Any]) -> Iterator[Advice]:
    whole = model.get("conflicts")
    if whole is None or whole < _LEAST_CONFLICTS or len(layers["layer"]) < 2:
        return
    shares = zip(layers["conflicts"], layers["layer"], strict=True)
    most = sorted(
        ((share, layer) for share, layer in shares if share and share >= _CONCENTRATED * whole),
        key=lambda each: -each[0],
    )
    for share, layer in most[:_MOST_LAYERS]:
        yield _advice(
            "conflicts",
            share,
            f"Signs conflict in {share:.1%} of {f'layer {layer}' if layer else 'what is in no layer'}, and in "
            f"{whole:.1%} of the model.",
            layer=layer,
        )


def _about_weights(
    weights: Sequence[tuple[tuple[int, ...], Mapping[str, Any]]], *, has_base: bool
) -> Iterator[Advice]:
    said = set()
    for _, values in weights:
        given = values.get("weight")
        if not has_base or not isinstance(given, tuple) or _are_divided(values):
            continue
        total = math.fsum(given) * float(values.get("lambda", 1.0))
        if _WEIGHTS_FROM <= abs(total) <= _WEIGHTS_TO or total in said:
            continue
        said.add(total)
        yield _advice(
            "weights",
            total,
            f"The weights add up to {total:g}, by which a change that all sources share is multiplied.",
        )


def _are_divided(values: Mapping[str, Any]) -> bool:
    """Return whether the sum of the weights does not matter."""
    return bool(values.get("normalize")) or values.get("divisor", "none") in ("weights", "count")


def density_for(counts: Sequence[int], fraction: float) -> float | None:
    """Return the density whose largest elements have a fraction of the norm, as the sample tells it.

    Args:
        counts: How many sampled magnitudes lie in each bin.
        fraction: Of the norm, in (0, 1).

    Returns:
        The density, in (0, 1]; None where nothing but zeros was sampled.
    """
    found = np.asarray(counts, dtype=np.float64)[::-1]
    edges = bin_edges()
    # Of a bin from a to b, the mean of the squares between: (a^2 + ab + b^2) / 3.
    upper = np.append(edges[1:], edges[-1] * 1.5)
    squares = found * ((edges**2 + edges * upper + upper**2) / 3)[::-1]
    squares[-1] = 0.0
    whole = squares.sum()
    if whole == 0:
        return None
    reached = np.cumsum(squares) / whole
    at = int(np.searchsorted(reached, fraction**2))
    before = reached[at - 1] if at else 0.0
    within = (fraction**2 - before) / (reached[at] - before)
    return float((found[:at].sum() + within * found[at]) / found.sum())


def _advice(kind: str, number: float, text: str, **where: int | str) -> Advice:
    return {"kind": kind, "number": number, "text": text} | where
