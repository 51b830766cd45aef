"""A model with an adapter of its own is a source like the model that comes of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import (
    Models,
    Tensors,
    assert_same_model,
    count_sources,
    product_of,
    recipe_of,
    recut,
    tight_plan,
    write_adapter,
)
from oracles import apply_to_whole_tensors
from safetensors.torch import load_file

import streammerge
from streammerge.errors import CheckpointError, RecipeError
from streammerge.methods import discover_methods
from streammerge.methods.base import Operand

SHAPES = {
    "model.embed_tokens.weight": (50, 24),
    "model.layers.0.q.weight": (24, 24),
    "model.layers.0.up.weight": (700, 777),
    "model.layers.1.q.weight": (24, 24),
    "model.layers.1.up.weight": (700, 777),
    "model.norm.weight": (24,),
}
CHANGED = {name: shape for name, shape in SHAPES.items() if "layers" in name}


def draw(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(s, generator=generator).bfloat16() for name, s in SHAPES.items()}


def merged_with(model: Tensors, adapter: Path) -> Tensors:
    """Return what comes of a model and an adapter, in float32."""
    factors = load_file(adapter / "adapter_model.safetensors")
    made = {name: tensor.float() for name, tensor in model.items()}
    for name in CHANGED:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        up, down = (factors[f"{module}.lora_{side}.weight"] for side in "BA")
        made[name] = made[name] + product_of(up, down) * 2
    return made


@pytest.mark.parametrize("method", discover_methods())
def test_it_is_merged_like_the_model_that_comes_of_both(
    method: str, models: Models, tmp_path: Path
) -> None:
    found = discover_methods()[method]
    on_base = found.operand is not Operand.WEIGHTS
    drawn = [draw(seed) for seed in range(3)]
    adapters = [write_adapter(tmp_path / f"lora{i}", CHANGED, seed=7 + i) for i in range(2)]
    base, *paths = (models.write(each) for each in drawn)
    count = count_sources(found, 2)
    sources = [
        {"path": path, "adapter": str(adapter)}
        for path, adapter in zip(paths, adapters, strict=True)
    ][:count]
    example = found.examples[0]
    recipe = recipe_of(method, base if on_base else None, sources, parameters=example)

    got, _ = models.merge(recipe)

    whole = [merged_with(*each) for each in zip(drawn[1:], adapters, strict=True)][:count]
    # Without a base the first source says what the result is stored in.
    base_tensors = {name: tensor.float() for name, tensor in drawn[0].items()}
    expected = apply_to_whole_tensors(method, base_tensors, whole, example, has_base=on_base)
    assert_same_model(got, {name: tensor.bfloat16() for name, tensor in expected.items()})


def test_no_cut_of_the_work_changes_a_byte(models: Models, tmp_path: Path) -> None:
    adapter = str(write_adapter(tmp_path / "lora", CHANGED, seed=7))
    base, one, two = (models.write(draw(seed), shards=2) for seed in range(3))
    sources = [{"path": one, "adapter": adapter}, {"path": two, "adapter": adapter}]
    recipe = recipe_of("ties", base, sources, parameters={"density": 0.3})
    plan = streammerge.plan(recipe, memory="3GiB")
    expected, _ = models.merge(plan)
    for asked in (
        recut(plan, slots=3, workers=1, statistics_bytes=1),
        tight_plan(recipe, workers=2),
    ):
        assert_same_model(models.merge(asked)[0], expected)


def test_one_adapter_on_two_models_has_norms_of_its_own_on_each(
    models: Models, tmp_path: Path
) -> None:
    """DoRA's norms depend on the weights."""
    adapter = write_adapter(tmp_path / "dora", CHANGED, seed=7, dora=True)
    paths = [models.write(draw(seed)) for seed in range(2)]
    alone = [
        models.merge(recipe_of("task_arithmetic", path, [adapter], output={"dtype": "float32"}))[0]
        for path in paths
    ]

    both, _ = models.merge(
        recipe_of(
            "linear",
            None,
            [{"path": path, "adapter": str(adapter)} for path in paths],
            output={"dtype": "float32"},
        )
    )

    for name, tensor in both.items():
        expected = (alone[0][name].double() + alone[1][name].double()) / 2
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)


def test_layers_take_their_changes_along(models: Models, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", CHANGED, seed=7)
    model = draw(1)
    source = {"path": models.write(model), "adapter": str(adapter)}
    layers = [
        {"sources": [{"source": 0, "layers": [0, 2]}]},
        {"sources": [{"source": 0, "layers": [1, 2]}]},
    ]

    got, _ = models.merge(recipe_of("passthrough", None, [source], layers=layers))

    expected = merged_with(model, adapter)
    for part in ("q", "up"):
        expected[f"model.layers.2.{part}.weight"] = expected[f"model.layers.1.{part}.weight"]
    assert_same_model(got, {name: tensor.bfloat16() for name, tensor in expected.items()})


def test_what_an_adapter_changes_is_not_copied_without_it(models: Models, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", CHANGED, seed=7)
    source = {"path": models.write(draw(1)), "adapter": str(adapter)}
    rules = [{"tensors": "*.0.q.*", "copy": 0}]

    with pytest.raises(
        RecipeError, match=r"model\.layers\.0\.q\.weight is to be copied .* whose adapter"
    ):
        streammerge.plan(recipe_of("linear", None, [source], rules=rules))


def test_an_adapter_of_an_adapter_and_one_of_another_model_are_refused(
    models: Models, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "lora", CHANGED, seed=7)
    other = write_adapter(tmp_path / "other", {"model.layers.0.down.weight": (8, 8)}, seed=7)
    base = models.write(draw(0))

    with pytest.raises(RecipeError, match=r"sources\[0\]\.adapter: .* is an adapter itself"):
        streammerge.plan(
            recipe_of("task_arithmetic", base, [{"path": adapter, "adapter": str(adapter)}])
        )
    with pytest.raises(CheckpointError, match=r"sources\[0\]\.adapter"):
        streammerge.plan(recipe_of("linear", None, [{"path": base, "adapter": str(other)}]))


def test_tensors_that_an_adapter_brings_along_are_not_those_that_were_tied(
    models: Models, tmp_path: Path
) -> None:
    """Embeddings that were trained whole: the head of the model stays as it was."""
    from safetensors.torch import save_file

    model = draw(1) | {"lm_head.weight": draw(1)["model.embed_tokens.weight"].clone()}
    path = models.write(model)
    (path / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    adapter = write_adapter(tmp_path / "lora", CHANGED, seed=7)
    factors = load_file(adapter / "adapter_model.safetensors")
    brought = torch.randn(50, 24).bfloat16()
    factors["base_model.model.model.embed_tokens.weight"] = brought
    save_file(factors, adapter / "adapter_model.safetensors")
    config = (adapter / "adapter_config.json").read_text()
    saved = ', "modules_to_save": ["embed_tokens"]}'
    (adapter / "adapter_config.json").write_text(config[:-1] + saved)

    got, _ = models.merge(recipe_of("passthrough", None, [{"path": path, "adapter": str(adapter)}]))

    assert torch.equal(got["model.embed_tokens.weight"], brought)
    assert torch.equal(got["lm_head.weight"], model["lm_head.weight"])


def test_the_vocabulary_of_a_model_with_an_adapter_is_that_of_the_embeddings_it_brings(
    models: Models, tmp_path: Path
) -> None:
    import json

    from safetensors.torch import save_file

    path = models.write(draw(1))
    config = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": 50}
    (path / "config.json").write_text(json.dumps(config))
    adapter = write_adapter(tmp_path / "lora", CHANGED, seed=7)
    factors = load_file(adapter / "adapter_model.safetensors")
    factors["base_model.model.model.embed_tokens.weight"] = torch.randn(53, 24).bfloat16()
    save_file(factors, adapter / "adapter_model.safetensors")
    out = models.new_output()

    streammerge.merge(
        recipe_of("passthrough", None, [{"path": path, "adapter": str(adapter)}]), out
    )

    assert json.loads((out / "config.json").read_text())["vocab_size"] == 53
