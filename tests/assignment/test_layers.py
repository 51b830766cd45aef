"""Layers put together anew: the result is what merging the same layers by hand gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    BLOCK,
    Models,
    Tensors,
    assert_same_model,
    count_sources,
    load_model,
    recipe_of,
    recut,
    tight_plan,
    write_adapter,
)
from oracles import apply_to_whole_tensors

import streammerge
from streammerge.assignment.layers import Stack, depths, find_stacks
from streammerge.checkpoint.types import TensorEntry
from streammerge.dtypes import DType
from streammerge.errors import MissingTensorError, NonFiniteError, RecipeError
from streammerge.methods import discover_methods
from streammerge.methods.base import Operand

IN_LAYER = {"attn.q": (16, 24), "mlp.up": (40, BLOCK // 64 + 3), "norm": (24,)}
OUTSIDE = {"model.embed_tokens": (30, 24), "model.norm": (24,), "lm_head": (30, 24)}


def draw(layers: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"{name}.weight": shape for name, shape in OUTSIDE.items()}
    shapes |= {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(layers)
        for name, shape in IN_LAYER.items()
    }
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


def taken(model: Tensors, first: int, end: int, start: int) -> Tensors:
    """Return some layers of a model, called as those from ``start`` on."""
    return {
        f"model.layers.{start + layer - first}.{name}.weight": model[
            f"model.layers.{layer}.{name}.weight"
        ]
        for layer in range(first, end)
        for name in IN_LAYER
    }


def outside(model: Tensors, *names: str) -> Tensors:
    return {f"{name}.weight": model[f"{name}.weight"] for name in names or OUTSIDE}


def entries(*names: str) -> dict[str, TensorEntry]:
    return {name: TensorEntry(name, DType.F32, (8,), 0, 0) for name in names}


def test_layers_are_numbered_siblings() -> None:
    names = [f"model.layers.{i}.experts.{j}.w" for i in range(3) for j in range(4)]
    names += [f"vision.blocks.{i}.w" for i in range(2)] + ["head.0.w", "head.2.w", "embed.w"]

    assert find_stacks(entries(*names)) == [Stack("model.layers.", 3), Stack("vision.blocks.", 2)]


def test_numbers_with_gaps_and_numbers_that_share_nothing_are_no_layers() -> None:
    assert find_stacks(entries("a.0.w", "a.2.w", "b.0.w", "b.1.bias", "c.0.w")) == []


def test_small_networks_beside_the_layers_are_none() -> None:
    tensors = entries("projector.0.w", "projector.1.w")
    tensors |= {f"h.{i}.w": TensorEntry("w", DType.F32, (500,), 0, 0) for i in range(2)}

    assert find_stacks(tensors) == [Stack("h.", 2)]


def test_depths_run_from_the_first_layer_to_the_last() -> None:
    position_of = depths([Stack("h.", 5), Stack("v.", 1)])

    names = ["h.0.w", "h.1.w", "h.4.w", "v.0.w", "embed.w", "lm_head.w"]
    assert [position_of(name).depth for name in names] == [0.0, 0.25, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("method", discover_methods())
def test_slices_are_merged_as_the_same_layers_by_themselves(method: str, models: Models) -> None:
    found = discover_methods()[method]
    on_base = found.operand is not Operand.WEIGHTS
    sources = count_sources(found, 2)
    base, *tuned = (draw(layers, seed) for seed, layers in enumerate((6, 6, 8)[: sources + 1]))
    paths = [models.write(each) for each in (base, *tuned)]
    ranges = [[(0, 3), (1, 4), (5, 8)], [(2, 6), (0, 4), (2, 6)]]
    layers = [
        {
            "sources": [
                {"source": "base" if index == 0 else index - 1, "layers": list(each)}
                for index, each in enumerate(part[: sources + 1])
                if on_base or index
            ]
        }
        for part in ranges
    ]
    example = found.examples[0] | ({"scope": "tensor"} if "scope" in found.examples[0] else {})
    recipe = recipe_of(
        method, paths[0] if on_base else None, paths[1:], parameters=example, layers=layers
    )

    merged, manifest = models.merge(recipe)

    arranged = []
    for index, model in enumerate((base, *tuned)):
        first, second = (part[index] for part in ranges)
        arranged.append(outside(model) | taken(model, *first, 0) | taken(model, *second, 3))
    expected = apply_to_whole_tensors(method, arranged[0], arranged[1:], example, has_base=on_base)
    assert_same_model(merged, expected)
    assert any("model.layers.0 to 6" in note.text for note in manifest.notes)


FRANKEN = [
    {"sources": [{"source": 0, "layers": [0, 4]}]},
    {"sources": [{"source": 1, "layers": [2, 6]}]},
    {"sources": [{"source": 2, "layers": [0, 8]}], "scale": 0.5},
    {"sources": [{"source": 0, "layers": [3, 4]}]},
]


def franken(models: Models, **options: Any) -> tuple[dict[str, Any], Tensors]:
    """Return a recipe of three models' layers one after the other, and what comes of it."""
    drawn = [draw(layers, seed) for seed, layers in enumerate((4, 6, 8))]
    paths = [models.write(each, **options) for each in drawn]
    a, b, c = drawn
    expected = outside(a, "model.embed_tokens") | outside(a, "model.norm", "lm_head")
    expected |= taken(a, 0, 4, 0) | taken(b, 2, 6, 4) | taken(a, 3, 4, 16)
    expected |= {name: tensor * 0.5 for name, tensor in taken(c, 0, 8, 8).items()}
    return recipe_of("passthrough", None, paths, layers=FRANKEN), expected


def test_layers_of_several_models_follow_each_other(models: Models) -> None:
    recipe, expected = franken(models)

    merged, _ = models.merge(recipe)

    assert_same_model(merged, expected)


def test_no_cut_of_the_work_changes_a_byte(models: Models) -> None:
    recipe, expected = franken(models, shards=3, layout="interleaved")
    plan = streammerge.plan(recipe, memory="3GiB")
    for asked in (
        recut(plan, slots=3, workers=1),
        recut(plan, slots=30, slot_blocks=2, workers=3),
        tight_plan(recipe | {"output": {"max_shard_size": "100KB"}}, workers=2),
    ):
        assert_same_model(models.merge(asked)[0], expected)


def test_what_comes_first_is_the_first_slices_and_what_comes_last_the_last_ones(
    models: Models,
) -> None:
    drawn = [draw(2, seed) for seed in range(2)]
    layers = [
        {"sources": [{"source": 1, "layers": [0, 2]}]},
        {"sources": [{"source": 0, "layers": [0, 2]}]},
    ]
    paths = [models.write(each) for each in drawn]

    merged, _ = models.merge(recipe_of("passthrough", None, paths, layers=layers))

    assert torch.equal(merged["model.embed_tokens.weight"], drawn[1]["model.embed_tokens.weight"])
    assert torch.equal(merged["lm_head.weight"], drawn[0]["lm_head.weight"])
    assert torch.equal(merged["model.norm.weight"], drawn[0]["model.norm.weight"])


def test_gradients_run_over_the_layers_of_their_slice(models: Models) -> None:
    a, b = (draw(4, seed, torch.float64) for seed in range(2))
    recipe = recipe_of(
        "linear",
        None,
        [models.write(a), models.write(b)],
        parameters={"weight": {"gradient": [0.0, 1.0]}, "normalize": False},
        compute_dtype="float64",
        layers=[
            {"sources": [{"source": i, "layers": [0, 3]} for i in range(2)]},
            {"sources": [{"source": 0, "layers": [1, 4]}]},
            {"sources": [{"source": 1, "layers": [3, 4]}]},
        ],
    )

    merged, _ = models.merge(recipe)

    for layer, depth in enumerate([0.0, 0.5, 1.0]):
        name = f"model.layers.{layer}.attn.q.weight"
        torch.testing.assert_close(merged[name], depth * (a[name] + b[name]))
    for layer, depth in enumerate([0.0, 0.5, 1.0]):
        found = merged[f"model.layers.{3 + layer}.attn.q.weight"]
        torch.testing.assert_close(found, depth * a[f"model.layers.{1 + layer}.attn.q.weight"])
    # A slice of one layer has the last value, what is outside of all layers the first.
    last = merged["model.layers.6.attn.q.weight"]
    assert torch.equal(last, b["model.layers.3.attn.q.weight"])
    assert not merged["model.embed_tokens.weight"].any()


def test_a_gradient_of_a_rule_runs_over_the_layers_among_its_tensors(models: Models) -> None:
    """Also over those of a small part, which are none among the layers of the whole model."""
    tower = {f"tower.blocks.{i}.w": torch.ones(8, 5) for i in range(3)}
    tower |= {f"tower.adapter.{i}.w": torch.ones(1) for i in range(2)}
    drawn = [draw(4, seed) | tower for seed in range(2)]
    rules = [
        {"tensors": "tower.blocks.2.*", "weight": 7.0},
        {"tensors": "tower.*", "weight": {"gradient": [1.0, 3.0]}},
    ]
    recipe = recipe_of(
        "linear",
        None,
        [models.write(each) for each in drawn],
        parameters={"weight": 0.5, "normalize": False},
        rules=rules,
    )
    plan = streammerge.plan(recipe)

    merged, _ = models.merge(plan)

    expected = {"blocks.0": 2.0, "blocks.1": 4.0, "blocks.2": 14.0, "adapter.1": 2.0}
    for name, value in expected.items():
        assert (merged[f"tower.{name}.w"] == value).all(), name
    (note,) = (each.text for each in plan.notes if each.topic == "layers")
    assert "model.layers.0 to 3, tower.blocks.0 to 2;" in note


def test_an_adapter_gives_the_layers_of_its_base(models: Models, tmp_path: Path) -> None:
    base = draw(4, 0)
    weights = {f"model.layers.{i}.attn.q.weight": IN_LAYER["attn.q"] for i in range(4)}
    adapter = write_adapter(tmp_path / "adapter", weights, seed=3)
    path = models.write(base)
    whole, _ = models.merge(recipe_of("task_arithmetic", path, [adapter]))
    layers = [
        {"sources": [{"source": 0, "layers": [1, 4]}]},
        {"sources": [{"source": 0, "layers": [0, 2]}]},
    ]

    merged, _ = models.merge(recipe_of("task_arithmetic", path, [adapter], layers=layers))

    expected = outside(whole) | taken(whole, 1, 4, 0) | taken(whole, 0, 2, 3)
    assert_same_model(merged, expected)


def test_the_configuration_says_how_many_layers_there_are(models: Models) -> None:
    recipe, _ = franken(models)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    for source, layers in zip(recipe["sources"], (4, 6, 8), strict=True):
        text = json.dumps(config | {"num_hidden_layers": layers})
        (Path(source["path"]) / "config.json").write_text(text)
    out = models.new_output()

    streammerge.merge(recipe, out)

    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 17
    assert len(load_model(out)) == 17 * len(IN_LAYER) + len(OUTSIDE)


def test_what_each_layer_is_goes_along_with_it(models: Models) -> None:
    drawn = [draw(4, seed) for seed in range(2)]
    paths = [models.write(each) for each in drawn]
    kinds = [["full", "sliding", "full", "sliding"], ["a", "b", "c", "d"]]
    for path, types in zip(paths, kinds, strict=True):
        config = {"model_type": "llama", "architectures": ["X"], "num_hidden_layers": 4}
        config |= {"tie_word_embeddings": False}
        (path / "config.json").write_text(json.dumps(config | {"layer_types": types}))
    layers = [
        {"sources": [{"source": 0, "layers": [1, 4]}]},
        {"sources": [{"source": 1, "layers": [0, 3]}]},
    ]
    out = models.new_output()

    streammerge.merge(recipe_of("passthrough", None, paths, layers=layers), out)

    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == ["sliding", "full", "sliding", "a", "b", "c"]


def refused(models: Models, method: str, layers: list[Any], **document: Any) -> str:
    paths = [models.write(draw(layers, seed)) for seed, layers in enumerate((4, 6))]
    with pytest.raises(RecipeError) as caught:
        streammerge.plan(recipe_of(method, None, paths, layers=layers, **document))
    return str(caught.value)


def test_layers_that_a_model_does_not_have_are_refused(models: Models) -> None:
    slices = [{"sources": [{"source": each, "layers": [2, 5]}]} for each in (1, 0)]

    said = refused(models, "passthrough", slices)

    assert "layers[1].sources[0].layers: [2, 5] goes beyond the 4 layers of sources[0]" in said
    assert "model.layers.0 to 3" in said


def test_a_slice_of_too_many_sources_is_refused(models: Models) -> None:
    both = [{"source": index, "layers": [0, 2]} for index in range(2)]

    said = refused(models, "passthrough", [{"sources": both}])

    assert said.startswith("layers[0].sources: passthrough merges exactly one, and the slice has 2")


def test_models_without_numbered_layers_have_none_to_put_together(models: Models) -> None:
    path = models.write({"weight": torch.ones(3)})
    layers = [{"sources": [{"source": 0, "layers": [0, 1]}]}]

    with pytest.raises(RecipeError, match="no numbered layers are found in the first model"):
        streammerge.plan(recipe_of("passthrough", None, [path], layers=layers))


def test_several_stacks_are_named(models: Models) -> None:
    tensors = {
        f"{side}.block.{i}.w": torch.ones(3) for side in ("encoder", "decoder") for i in (0, 1)
    }
    layers = [{"sources": [{"source": 0, "layers": [0, 1]}]}]

    with pytest.raises(RecipeError, match=r"decoder\.block\.0 to 1, encoder\.block\.0 to 1"):
        streammerge.plan(recipe_of("passthrough", None, [models.write(tensors)], layers=layers))


def test_one_threshold_over_models_that_differ_is_refused(models: Models) -> None:
    base = models.write(draw(4, 9))
    paths = [models.write(draw(4, seed)) for seed in range(2)]
    layers = [{"sources": [{"source": index, "layers": [0, 2]}]} for index in range(2)]
    recipe = recipe_of(
        "ties", base, paths, layers=layers, parameters={"density": 0.5, "scope": "model"}
    )

    with pytest.raises(RecipeError, match="not all tensors are made of the same models"):
        streammerge.plan(recipe)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({}, r"layers: no slice has layers of sources\[1\]"),
        ({"output": {"quantization": "as base"}}, "output.quantization: "),
        ({"parameters": {"rounding": "peft"}}, "parameters.rounding: peft merges adapters"),
    ],
)
def test_what_goes_by_the_bases_tensors_is_refused(
    document: dict[str, Any], said: str, models: Models
) -> None:
    paths = [models.write(draw(4, seed)) for seed in range(2)]
    count = 1 if document else 2
    layers = [{"sources": [{"source": 0, "layers": [0, 2]}]}]
    recipe = recipe_of(
        "task_arithmetic", models.write(draw(4, 9)), paths[:count], layers=layers, **document
    )

    with pytest.raises(RecipeError, match=said):
        streammerge.plan(recipe)


def test_verify_merges_a_sample_of_layers_again(models: Models) -> None:
    recipe, _ = franken(models)
    out = models.new_output()
    streammerge.merge(recipe, out)

    assert not streammerge.verify_files(out).damages
    comparison = streammerge.verify_against(recipe, out, fraction=1.0)
    assert not comparison.differing
    assert comparison.nbytes == sum(tensor.nbytes for tensor in load_model(out).values())


def test_what_lies_outside_of_the_layers_is_told_apart_by_its_name(models: Models) -> None:
    """Heads and final norms come behind the layers, all else, what belongs to no layer, before."""
    names = {"model.rotary.scale": (5,), "vision.merger.weight": (4, 4), "score.weight": (3, 24)}
    drawn = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        drawn.append(
            draw(2, seed) | {n: torch.randn(s, generator=generator) for n, s in names.items()}
        )
    layers = [{"sources": [{"source": i, "layers": [0, 2]}]} for i in (1, 0)]
    recipe = recipe_of("passthrough", None, [models.write(each) for each in drawn], layers=layers)

    plan = streammerge.plan(recipe)
    merged, _ = models.merge(plan)

    first = {"model.embed_tokens.weight", "model.rotary.scale", "vision.merger.weight"}
    for name in merged.keys() - {each for each in merged if ".layers." in each}:
        assert torch.equal(merged[name], drawn[1 if name in first else 0][name]), name
    notes = [note.text for note in plan.notes if note.topic == "layers"]
    assert any(note.startswith("before them ") and "sources[1]" in note for note in notes)
    assert any("score.weight" in note and note.endswith("sources[0]") for note in notes)


def test_the_base_gives_its_layers_only_to_methods_that_take_one(models: Models) -> None:
    """To others it says what the tensors are called, and may have fewer layers than its sources."""
    base, deep = draw(2, 9), draw(4, 0)
    layers = [{"sources": [{"source": 0, "layers": [1, 4]}]}]
    paths = [models.write(deep)]

    merged, _ = models.merge(recipe_of("linear", models.write(base), paths, layers=layers))

    assert_same_model(merged, outside(deep) | taken(deep, 1, 4, 0))


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("mlp_only_layers", ([0, 3], [2]), [2, 5]),
        ("mlp_only_layers", ([], []), []),
        ("first_k_dense_replace", (4, 0), 3),
        ("no_rope_layers", ([1, 0, 1, 1], [0, 0, 1, 0]), [0, 1, 1, 0, 0, 1]),
    ],
)
def test_numbers_and_counts_of_layers_of_a_kind_follow_them(
    key: str, values: tuple[Any, Any], expected: Any, models: Models
) -> None:
    paths = [models.write(draw(4, seed)) for seed in range(2)]
    for path, value in zip(paths, values, strict=True):
        config = {"model_type": "x", "architectures": ["X"], "num_hidden_layers": 4}
        config |= {"tie_word_embeddings": False}
        (path / "config.json").write_text(json.dumps(config | {key: value}))
    layers = [
        {"sources": [{"source": 0, "layers": [1, 4]}]},
        {"sources": [{"source": 1, "layers": [0, 3]}]},
    ]
    out = models.new_output()

    streammerge.merge(recipe_of("passthrough", None, paths, layers=layers), out)

    assert json.loads((out / "config.json").read_text())[key] == expected


def test_layers_of_a_leading_kind_behind_others_are_refused(models: Models) -> None:
    paths = [models.write(draw(4, seed)) for seed in range(2)]
    for path in paths:
        config = {"model_type": "x", "num_hidden_layers": 4, "first_k_dense_replace": 1}
        (path / "config.json").write_text(json.dumps(config))
    layers = [{"sources": [{"source": i, "layers": [0, 4]}]} for i in range(2)]

    with pytest.raises(RecipeError, match="first_k_dense_replace counts the layers at the beginn"):
        streammerge.plan(recipe_of("passthrough", None, paths, layers=layers))


def test_each_slice_has_the_factor_of_its_own_source(models: Models) -> None:
    drawn = [draw(2, seed) for seed in range(2)]
    sources = [
        {"path": models.write(each), "scale": scale}
        for each, scale in zip(drawn, (0.5, -2.0), strict=True)
    ]
    layers = [{"sources": [{"source": i, "layers": [0, 2]}]} for i in range(2)]

    merged, _ = models.merge(recipe_of("passthrough", None, sources, layers=layers))

    for i, factor in enumerate((0.5, -2.0)):
        for name, tensor in taken(drawn[i], 0, 2, 2 * i).items():
            assert torch.equal(merged[name], tensor * factor), name


def own_base_layers() -> list[dict[str, Any]]:
    """Return slices of the recipe's base, of a source in its place, and of the base again."""
    return [
        {
            "sources": [
                {"source": "base", "layers": [0, 3]},
                {"source": 0, "layers": [1, 4]},
                {"source": 1, "layers": [5, 8]},
            ]
        },
        {
            "base": {"source": 2, "layers": [1, 5]},
            "sources": [{"source": 0, "layers": [0, 4]}, {"source": 1, "layers": [2, 6]}],
        },
    ]


def cut(layers: list[dict[str, Any]], sources: int) -> list[dict[str, Any]]:
    """Return slices of the first sources alone."""
    keep = ("base", *range(sources))
    return [
        part | {"sources": [each for each in part["sources"] if each["source"] in keep]}
        for part in layers
    ]


@pytest.mark.parametrize(
    "method",
    [name for name, each in discover_methods().items() if each.operand is not Operand.WEIGHTS],
)
def test_a_slice_is_compared_with_a_base_of_its_own(method: str, models: Models) -> None:
    found = discover_methods()[method]
    sources = count_sources(found, 2)
    base, other, *tuned = (draw(layers, seed) for seed, layers in enumerate((6, 5, 6, 8)))
    tuned = tuned[:sources]
    layers = cut(own_base_layers(), sources)
    layers[1]["base"]["source"] = sources
    paths = [models.write(each) for each in (*tuned, other)]
    example = found.examples[0] | ({"scope": "tensor"} if "scope" in found.examples[0] else {})
    # A list has a value for the base of the second slice too, which is a source.
    given = {k: v if isinstance(v, float | int | str) else [*v, 1.0] for k, v in example.items()}
    recipe = recipe_of(method, models.write(base), paths, parameters=given, layers=layers)

    merged, manifest = models.merge(recipe)

    # What comes first is compared with the first slice's base, what comes last with the last one's.
    ends = outside(base, "model.embed_tokens") | outside(other, "model.norm", "lm_head")
    arranged = [ends | taken(base, 0, 3, 0) | taken(other, 1, 5, 3)]
    for model, (first, second) in zip(tuned, (((1, 4), (0, 4)), ((5, 8), (2, 6))), strict=False):
        arranged.append(outside(model) | taken(model, *first, 0) | taken(model, *second, 3))
    expected = apply_to_whole_tensors(method, arranged[0], arranged[1:], example, has_base=True)
    assert_same_model(merged, expected)
    said = f"on 1 to 4 of sources[{sources}] as their base"
    assert any(said in note.text for note in manifest.notes)


def on_another_base(models: Models, **options: Any) -> tuple[dict[str, Any], list[Tensors]]:
    """Return a recipe one of whose slices has a base of its own, and the base and the sources."""
    drawn = [draw(layers, seed, torch.float64) for seed, layers in enumerate((6, 6, 8, 5))]
    base, *paths = [models.write(each, **options) for each in drawn]
    recipe = recipe_of(
        "task_arithmetic",
        base,
        paths,
        parameters={"weight": 0.25},
        compute_dtype="float64",
        layers=own_base_layers(),
    )
    return recipe, drawn


def test_task_vectors_are_those_of_the_slices_own_base(models: Models) -> None:
    recipe, (base, a, b, other) = on_another_base(models)

    merged, _ = models.merge(recipe)

    rows = [(base, layer, layer + 1, layer + 5) for layer in range(3)]
    rows += [(other, layer + 1, layer, layer + 2) for layer in range(4)]
    for layer, (model, own, *theirs) in enumerate(rows):
        for name in IN_LAYER:
            start = model[f"model.layers.{own}.{name}.weight"]
            first, second = (
                each[f"model.layers.{index}.{name}.weight"]
                for each, index in zip((a, b), theirs, strict=True)
            )
            expected = start + 0.25 * (first - start) + 0.25 * (second - start)
            found = merged[f"model.layers.{layer}.{name}.weight"]
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_no_cut_of_the_work_changes_a_byte_of_a_slice_with_its_base(models: Models) -> None:
    recipe, _ = on_another_base(models, shards=3, layout="interleaved")
    plan = streammerge.plan(recipe, memory="3GiB")
    expected = models.merge(plan)[0]
    for asked in (
        recut(plan, slots=3, workers=1),
        recut(plan, slots=30, slot_blocks=2, workers=3),
        tight_plan(recipe | {"output": {"max_shard_size": "100KB"}}, workers=2),
    ):
        assert_same_model(models.merge(asked)[0], expected)


def test_a_copy_of_the_base_is_one_of_the_slices_own(models: Models) -> None:
    recipe, (base, _, _, other) = on_another_base(models)
    rules = [{"tensors": "*.attn.q.*", "copy": "base"}]

    merged, _ = models.merge(recipe | {"rules": rules})

    for layer, (model, own) in {0: (base, 0), 2: (base, 2), 3: (other, 1), 6: (other, 4)}.items():
        expected = model[f"model.layers.{own}.attn.q.weight"]
        assert torch.equal(merged[f"model.layers.{layer}.attn.q.weight"], expected)


def test_what_is_wrong_with_a_slices_base_is_said_of_the_model_that_it_is(models: Models) -> None:
    drawn = [draw(layers, seed) for seed, layers in enumerate((6, 6, 8, 5))]
    drawn[3]["model.layers.2.norm.weight"][5] = torch.nan
    base, *paths = [models.write(each) for each in drawn]
    recipe = recipe_of("task_arithmetic", base, paths, layers=own_base_layers())

    with pytest.raises(
        NonFiniteError, match=r"layers\.4\.norm\.weight: sources\[2\] \(.* holds nan"
    ):
        models.merge(recipe)


def test_a_tensor_that_a_slices_base_lacks_is_missed_there(models: Models) -> None:
    drawn = [draw(layers, seed) for seed, layers in enumerate((6, 6, 8, 5))]
    del drawn[3]["model.layers.4.mlp.up.weight"]
    base, *paths = [models.write(each) for each in drawn]
    recipe = recipe_of("task_arithmetic", base, paths, layers=own_base_layers())

    with pytest.raises(MissingTensorError, match=r"not in sources\[2\] \("):
        streammerge.plan(recipe)


@pytest.mark.parametrize(
    ("method", "own", "document", "said"),
    [
        ("linear", {}, {}, r"layers\[1\]\.base: linear takes no task vectors"),
        ("ties", {}, {"base": None}, r"layers\[1\]\.base: the recipe has no base"),
        ("ties", {"source": 3}, {}, r"layers\[1\]\.base\.source: expected the index of one of 3"),
        ("ties", {"source": 0}, {}, r"layers\[1\]\.base\.source: 0 is merged into this slice too"),
        ("ties", {"layers": [1, 4]}, {}, r"base\.layers: the slice has 4 layers, these are 3"),
        ("ties", {"layers": [3, 7]}, {}, r"layers\[1\]\.base\.layers: \[3, 7\] goes beyond the 5"),
        ("ties", {"source": "base"}, {}, r"layers\[1\]\.base\.source: "),
        ("ties", {"weight": 1}, {}, r"layers\[1\]\.base\.weight: unknown key"),
    ],
)
def test_a_base_of_a_slice_that_cannot_be_one_is_refused(
    method: str, own: dict[str, Any], document: dict[str, Any], said: str, models: Models
) -> None:
    recipe, _ = on_another_base(models)
    recipe["layers"][1]["base"] |= own
    recipe |= {"method": method, "parameters": {"density": 0.5} if method == "ties" else {}}
    if method == "linear":
        del recipe["layers"][0]["sources"][0]
    recipe = {key: value for key, value in (recipe | document).items() if value is not None}

    with pytest.raises(RecipeError, match=said):
        streammerge.plan(recipe)


def test_an_adapter_in_a_slice_with_another_base_is_refused(models: Models, tmp_path: Path) -> None:
    weights = {f"model.layers.{i}.attn.q.weight": IN_LAYER["attn.q"] for i in range(4)}
    adapter = write_adapter(tmp_path / "adapter", weights, seed=3)
    base, other = (models.write(draw(4, seed)) for seed in range(2))
    ranges = [{"source": 0, "layers": [0, 4]}, {"source": 1, "layers": [0, 4]}]
    for lent, merged, said in (
        (ranges[1], ranges[0], r"sources\[0\]\.layers: .* is an adapter of the recipe's base"),
        (ranges[0], ranges[1], r"base\.source: sources\[0\] .* is an adapter or has one"),
    ):
        layers = [{"base": lent, "sources": [merged]}]
        with pytest.raises(RecipeError, match=said):
            streammerge.plan(recipe_of("task_arithmetic", base, [adapter, other], layers=layers))


def test_verify_merges_layers_on_their_own_base_again(models: Models) -> None:
    recipe, _ = on_another_base(models)
    out = models.new_output()
    streammerge.merge(recipe, out)

    assert not streammerge.verify_files(out).damages
    assert not streammerge.verify_against(recipe, out, fraction=1.0).differing


def test_a_source_that_only_lends_its_layers_needs_no_parameters(models: Models) -> None:
    recipe, drawn = on_another_base(models)
    del recipe["parameters"]
    for index, source in enumerate(recipe["sources"][:2]):
        source["weight"] = 0.25 * (index + 1)

    merged, _ = models.merge(recipe)

    _, a, b, other = (each["lm_head.weight"] for each in drawn)
    expected = other + 0.25 * (a - other) + 0.5 * (b - other)
    torch.testing.assert_close(merged["lm_head.weight"], expected)
