"""Names of adapters found among the names of bases, or refused with what was not found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge as sm
from streammerge.errors import (
    HeaderError,
    MissingTensorError,
    RecipeError,
    ShapeMismatchError,
    StreamMergeError,
    UnsupportedAdapterError,
)
from tests.adapters.tiny import Tensors

RANK, WIDTH = 2, 6


def base_of(directory: Path, *names: str, shape: tuple[int, ...] = (WIDTH, WIDTH)) -> Path:
    """Save a base with a tensor of each name, and return its directory."""
    path = directory / "base"
    path.mkdir()
    torch.manual_seed(len(names))
    save_file({name: torch.randn(*shape) for name in names}, path / "model.safetensors")
    return path


def factors(*stems: str, down: str, up: str, seed: int = 0, out: int = WIDTH) -> Tensors:
    torch.manual_seed(seed)
    tensors = {f"{stem}.{down}.weight": torch.randn(RANK, WIDTH) for stem in stems}
    return tensors | {f"{stem}.{up}.weight": torch.randn(out, RANK) for stem in stems}


def peft_adapter(directory: Path, *modules: str, out: int = WIDTH, **config: Any) -> Path:
    """Save a PEFT adapter of linear modules, and return its directory."""
    path = directory / "adapter"
    path.mkdir()
    stems = [f"base_model.model.{module}" for module in modules]
    save_file(
        factors(*stems, down="lora_A", up="lora_B", out=out), path / "adapter_model.safetensors"
    )
    targets = sorted({module.rpartition(".")[2] for module in modules})
    document = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    (path / "adapter_config.json").write_text(json.dumps(document | config))
    return path


def raw_adapter(directory: Path, tensors: Tensors) -> Path:
    path = directory / "lora.safetensors"
    save_file(tensors, path)
    return path


def bake(base: Path, source: dict[str, Any] | Path, out: Path) -> Tensors:
    """Return what an adapter adds to each tensor that it changes."""
    source = {"path": str(source)} if isinstance(source, Path) else source
    recipe = {"method": "task_arithmetic", "base": str(base), "sources": [source]}
    sm.merge(recipe, out)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert after.keys() == before.keys()
    return {
        name: after[name] - before[name]
        for name in before
        if not torch.equal(after[name], before[name])
    }


@pytest.mark.parametrize(
    ("module", "name"),
    [
        # As it is.
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj.weight"),
        # Trained in transformers 5, saved under the names of before, and the reverse.
        (
            "model.language_model.layers.0.self_attn.q_proj",
            "language_model.model.layers.0.self_attn.q_proj.weight",
        ),
        (
            "language_model.model.layers.0.self_attn.q_proj",
            "model.language_model.layers.0.self_attn.q_proj.weight",
        ),
        ("model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate.weight"),
        # Trained on the model without its head, and the reverse.
        ("layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj.weight"),
        ("model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj.weight"),
        # Wrappers of compilers and of larger models.
        ("model.layers.0.self_attn.q_proj", "_orig_mod.model.layers.0.self_attn.q_proj.weight"),
        ("model.layers.0.self_attn.q_proj", "thinker.model.layers.0.self_attn.q_proj.weight"),
        # A wrapper that nobody has heard of.
        ("model.layers.0.self_attn.q_proj", "strange.inner.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_a_module_is_found_under_its_other_names(tmp_path: Path, module: str, name: str) -> None:
    layers = [name.replace(".0.", f".{index}.") for index in range(2)]
    base = base_of(tmp_path, *layers, "model.norm.weight", "other.weight")
    adapter = peft_adapter(tmp_path, *(module.replace(".0.", f".{i}.") for i in range(2)))

    assert sorted(bake(base, adapter, tmp_path / "out")) == sorted(layers)


def test_two_stacks_of_layers_that_both_fit_are_refused(tmp_path: Path) -> None:
    names = [f"{part}.layers.0.self_attn.q_proj.weight" for part in ("encoder", "decoder")]
    base = base_of(tmp_path, *names)
    adapter = peft_adapter(tmp_path, "model.layers.0.self_attn.q_proj")

    with pytest.raises(UnsupportedAdapterError, match="could be 2 tensors of the base") as refusal:
        bake(base, adapter, tmp_path / "out")

    assert all(name in str(refusal.value) for name in names)


def test_shapes_decide_between_two_stacks_of_layers(tmp_path: Path) -> None:
    path = base_of(tmp_path, "encoder.layers.0.self_attn.q_proj.weight")
    tensors = load_file(path / "model.safetensors")
    name = "decoder.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: torch.zeros(WIDTH, WIDTH + 1)}, path / "model.safetensors")
    adapter = peft_adapter(tmp_path, "model.layers.0.self_attn.q_proj")

    assert list(bake(path, adapter, tmp_path / "out")) == list(tensors)


def test_tensors_without_a_home_are_listed(tmp_path: Path) -> None:
    base = base_of(tmp_path, "model.layers.0.self_attn.q_proj.weight")
    modules = [f"model.layers.{index}.self_attn.q_proj" for index in range(3)]
    adapter = peft_adapter(tmp_path, *modules)

    with pytest.raises(MissingTensorError, match=r"2 tensor\(s\) that the adapter") as refusal:
        bake(base, adapter, tmp_path / "out")

    assert all(f"{module}.weight" in str(refusal.value) for module in modules[1:])


def test_another_shape_is_refused_with_both(tmp_path: Path) -> None:
    base = base_of(tmp_path, "model.layers.0.self_attn.q_proj.weight")
    adapter = peft_adapter(tmp_path, "model.layers.0.self_attn.q_proj", out=9)

    with pytest.raises(ShapeMismatchError, match=r"B @ A is \[9, 6\].* is \[6, 6\]"):
        bake(base, adapter, tmp_path / "out")


def test_two_modules_of_one_tensor_are_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path, "model.layers.0.self_attn.q_proj.weight", "model.norm.weight")
    adapter = peft_adapter(tmp_path, "model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj")

    with pytest.raises(HeaderError, match=r"both belong to model\.layers\.0\.self_attn"):
        bake(base, adapter, tmp_path / "out")


UNET = "down_blocks.0.attentions.0.to_q"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def kohya_stem(mark: str, module: str) -> str:
    return f"{mark}_{module.replace('.', '_')}"


def kohya(*stems: str, alpha: float) -> Tensors:
    tensors = factors(*stems, down="lora_down", up="lora_up")
    return tensors | {f"{stem}.alpha": torch.tensor(alpha) for stem in stems}


def test_kohya_parts_are_found_in_a_file_of_a_whole_pipeline(tmp_path: Path) -> None:
    names = {
        kohya_stem("lora_unet", UNET): f"model.diffusion_model.{UNET}.weight",
        kohya_stem("lora_te", TEXT): f"cond_stage_model.transformer.{TEXT}.weight",
    }
    base = base_of(tmp_path, *names.values(), "first_stage_model.quant_conv.weight")
    tensors = kohya(*names, alpha=3.0)

    changed = bake(base, raw_adapter(tmp_path, tensors), tmp_path / "out")

    assert changed.keys() == {*names.values()}
    for stem, name in names.items():
        product = tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]
        torch.testing.assert_close(changed[name], 3.0 / RANK * product, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_one_part_of_an_adapter_is_taken_on_demand(tmp_path: Path, naming: str) -> None:
    base = base_of(tmp_path, f"{UNET}.weight", "conv_in.weight")
    if naming == "kohya":
        tensors = kohya(kohya_stem("lora_unet", UNET), kohya_stem("lora_te", TEXT), alpha=1.0)
    else:
        tensors = factors(f"unet.{UNET}", f"text_encoder.{TEXT}", down="lora_A", up="lora_B")
    path = raw_adapter(tmp_path, tensors)

    with pytest.raises(MissingTensorError, match="take one part of it with `component: unet`"):
        bake(base, path, tmp_path / "out")
    changed = bake(base, {"path": str(path), "component": "unet"}, tmp_path / "out")

    assert list(changed) == [f"{UNET}.weight"]


def test_a_part_can_be_combined_without_a_base(tmp_path: Path) -> None:
    tensors = factors(f"unet.{UNET}", f"text_encoder.{TEXT}", down="lora_A", up="lora_B")
    source = {"path": str(raw_adapter(tmp_path, tensors)), "component": "text_encoder"}
    sm.merge({"method": "cat", "sources": [source, source]}, tmp_path / "out")

    (written,) = (tmp_path / "out").glob("*.safetensors")

    assert {name.partition(".")[0] for name in load_file(written)} == {"text_encoder"}


def test_old_names_of_diffusers_are_found(tmp_path: Path) -> None:
    base = base_of(tmp_path, f"{UNET}.weight", "conv_in.weight")
    stem = f"unet.{UNET.removesuffix('.to_q')}.processor.to_q_lora"
    path = raw_adapter(tmp_path, factors(stem, down="down", up="up"))

    assert list(bake(base, path, tmp_path / "out")) == [f"{UNET}.weight"]


@pytest.mark.parametrize(
    ("component", "error", "says"),
    [
        ("unett", RecipeError, "the adapter has text_encoder, unet; did you mean"),
        ("vae", RecipeError, "the adapter has text_encoder, unet"),
    ],
)
def test_an_unknown_part_is_refused_with_those_there_are(
    tmp_path: Path, component: str, error: type[StreamMergeError], says: str
) -> None:
    base = base_of(tmp_path, f"{UNET}.weight")
    tensors = factors(f"unet.{UNET}", f"text_encoder.{TEXT}", down="lora_A", up="lora_B")
    source = {"path": str(raw_adapter(tmp_path, tensors)), "component": component}

    with pytest.raises(error, match=says):
        bake(base, source, tmp_path / "out")


def test_a_model_and_an_adapter_of_one_model_have_no_parts(tmp_path: Path) -> None:
    base = base_of(tmp_path, "model.layers.0.self_attn.q_proj.weight")
    adapter = peft_adapter(tmp_path, "model.layers.0.self_attn.q_proj")

    with pytest.raises(RecipeError, match="it adapts one model; remove the key"):
        bake(base, {"path": str(adapter), "component": "unet"}, tmp_path / "out")
    with pytest.raises(
        RecipeError, match="it is a model, and so is the first one; neither has parts: remove"
    ):
        bake(base, {"path": str(base), "component": "unet"}, tmp_path / "out")
