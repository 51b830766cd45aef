"""What follows from the numbers: each sentence where its arithmetic holds, and nowhere else."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from models import MEMORY, Models, recipe_of

import streammerge
from streammerge.report.advice import density_for
from streammerge.report.naming import natural, place_of
from streammerge.statistics.surveying import BINS, bin_edges

NUMEL = 40_000


def advice_of(
    models: Models,
    vectors: list[dict[str, torch.Tensor]],
    method: str = "task_arithmetic",
    **more: Any,
) -> dict[str, list[dict[str, Any]]]:
    """Merge a base of ones with sources that differ from it by these vectors; advice by kind."""
    base = {name: torch.ones_like(each) for name, each in vectors[0].items()}
    sources = [
        models.write({name: base[name] + each for name, each in vector.items()})
        for vector in vectors
    ]
    recipe = recipe_of(method, models.write(base), sources, **more)
    found: dict[str, list[dict[str, Any]]] = {}
    for each in streammerge.analyze(recipe, memory=MEMORY).advice:
        found.setdefault(each["kind"], []).append(each)
    return found


def normal(seed: int, numel: int = NUMEL) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * 0.1


def test_sources_that_differ_get_no_advice(models: Models) -> None:
    found = advice_of(
        models,
        [{"w": normal(1)}, {"w": normal(2)}],
        parameters={"weight": [0.5, 0.5]},
    )

    assert found == {}


def test_sources_that_are_nearly_equal_are_named_with_their_cosine(models: Models) -> None:
    one = normal(1)
    found = advice_of(
        models,
        [{"w": one}, {"w": normal(2)}, {"w": 2 * one}],
        parameters={"weight": [0.3, 0.3, 0.3]},
    )

    (said,) = found["nearly equal"]
    assert said["number"] > 0.999
    assert "sources[0] and sources[2]" in said["text"]


def test_a_source_that_equals_the_base_is_named(models: Models) -> None:
    found = advice_of(
        models,
        [{"w": normal(1)}, {"w": torch.zeros(NUMEL)}],
        parameters={"weight": [0.5, 0.5]},
    )

    (said,) = found["equals base"]
    assert (said["source"], said["number"]) == (1, 1.0)


def test_a_density_that_keeps_little_is_told_with_one_that_keeps_more(models: Models) -> None:
    found = advice_of(
        models,
        [{"w": normal(1)}, {"w": normal(2)}],
        "ties",
        parameters={"density": [0.02, 0.6], "weight": [0.5, 0.5]},
    )

    (said,) = found["little kept"]
    assert said["source"] == 0
    order = normal(1).abs().double().sort(descending=True).values
    share = float(order[: NUMEL // 50].norm() / order.norm())
    assert said["number"] == pytest.approx(share, rel=1e-3)
    assert re.search(r"In the sample a density of 0\.1\d? keeps 0\.7\.", said["text"])


def test_layers_in_which_conflicts_concentrate_are_named(models: Models) -> None:
    agreeing, opposed = normal(1), normal(3)
    layers = {f"layers.{at}.w": agreeing for at in range(6)}
    one = layers | {"layers.6.w": opposed}
    other = layers | {"layers.6.w": -opposed}

    found = advice_of(models, [one, other], parameters={"weight": [0.5, 0.5]})

    (said,) = found["conflicts"]
    assert said["layer"] == "layers.6"
    assert said["number"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("weights", "more", "total"),
    [
        ([1.0, 1.0], {}, 2.0),
        ([0.1, 0.1], {}, 0.2),
        ([1.0, 1.0], {"lambda": 0.5}, None),
        ([0.4, 0.6], {}, None),
    ],
)
def test_weights_that_scale_a_shared_change_are_told(
    weights: list[float], more: dict[str, float], total: float | None, models: Models
) -> None:
    found = advice_of(
        models,
        [{"w": normal(1)}, {"w": normal(2)}],
        parameters={"weight": weights} | more,
    )

    said = [each["number"] for each in found.get("weights", [])]
    assert said == pytest.approx([] if total is None else [total])


def test_the_density_for_a_share_of_the_norm_is_that_of_the_largest() -> None:
    counts = [0] * BINS
    at = int((bin_edges() <= 1.0).sum()) - 1
    counts[0], counts[at], counts[at + 20] = 700, 200, 100

    # What is a thousand times as large has all of the norm; evenly within its bin.
    assert density_for(counts, 0.5) == pytest.approx(0.1 * 0.25, rel=1e-4)
    assert density_for([10] + [0] * (BINS - 1), 0.5) is None


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("model.layers.3.mlp.up.weight", "model.layers.3", "mlp.up.weight"),
        ("model.layers.3.mlp.experts.17.w1.weight", "model.layers.3", "mlp.experts.*.w1.weight"),
        ("unet/down_blocks.0.attn.1.weight", "unet/down_blocks.0", "attn.*.weight"),
        ("0.weight", "0", "weight"),
        ("lm_head.weight", "", "lm_head.weight"),
        ("layer4", "", "layer4"),
        ("blocks.7", "", "blocks.7"),
        ("", "", ""),
    ],
)
def test_names_tell_layer_and_module(name: str, layer: str, module: str) -> None:
    assert place_of(name) == (layer, module)


def test_names_are_sorted_as_people_count() -> None:
    names = ["l.10.a", "l.2.b", "l.2.a", "x", "l.٣.a"]

    assert sorted(names, key=natural) == ["l.2.a", "l.2.b", "l.10.a", "l.٣.a", "x"]
