"""Merged models load where models are loaded, and compute what PEFT computes with the adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import streammerge as sm
from tests.adapters.onto_base.test_baking_layers import saved
from tests.adapters.tiny import bert, convnet, gpt2, llama, load_peft, make_ia3, make_lora

TOKENS = torch.tensor([[1, 3, 5, 7, 9, 11]])


def load_convnet(path: Path) -> nn.Module:
    model = convnet()
    model.load_state_dict(load_file(path / "model.safetensors"), strict=True)
    return model


def load_with(auto: Any) -> Callable[[Path], nn.Module]:
    """Load as a user does, where a tensor that is missing or left over fails the test."""

    def load(path: Path) -> nn.Module:
        model, found = auto.from_pretrained(path, output_loading_info=True)
        assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return model.eval()

    return load


load_causal = load_with(AutoModelForCausalLM)
load_classifier = load_with(AutoModelForSequenceClassification)
Make = Callable[[Path, nn.Module], Path]


def lora(**config: Any) -> Make:
    return lambda path, model: make_lora(path, model, seed=1, r=4, **config)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[Path], nn.Module], Make]] = {
    "llama": (llama, load_causal, lora(target_modules="all-linear")),
    "llama, dora": (llama, load_causal, lora(target_modules=["q_proj", "up_proj"], use_dora=True)),
    "llama, tokens": (
        llama,
        load_causal,
        lora(target_modules=["v_proj"], trainable_token_indices=[3, 7, 40]),
    ),
    "gpt2": (gpt2, load_causal, lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "gpt2, positions": (gpt2, load_causal, lora(target_modules=["wpe"])),
    "bert": (
        bert,
        load_classifier,
        lora(target_modules=["query", "dense"], modules_to_save=["classifier"]),
    ),
    "bert, ia3": (
        bert,
        load_classifier,
        lambda path, model: make_ia3(
            path,
            model,
            seed=1,
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
        ),
    ),
    "convnet": (
        convnet,
        load_convnet,
        lora(target_modules=["conv1d", "conv2d", "point", "head", "embed"]),
    ),
}


def computed(model: Any) -> Tensor:
    with torch.inference_mode():
        found = model(TOKENS)
    return found if isinstance(found, Tensor) else found.logits


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_computes_what_the_adapter_computes(case: str, tmp_path: Path) -> None:
    build, load, make = CASES[case]
    if build is convnet:
        saved(build(), tmp_path / "base")
    else:
        build().save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        # PEFT says that it corrects fan_in_fan_out.
        warnings.simplefilter("ignore")
        adapter = make(tmp_path / "adapter", build())
    loaded = {}
    for rounding in ("once", "peft"):
        recipe = {
            "method": "task_arithmetic",
            "base": str(tmp_path / "base"),
            "sources": [{"path": str(adapter)}],
            "parameters": {"rounding": rounding},
        }
        sm.merge(recipe, tmp_path / rounding)
        loaded[rounding] = load(tmp_path / rounding)

    tuned = load_peft(build(), adapter)
    active = computed(tuned)
    unloaded = tuned.merge_and_unload()

    assert (computed(build()) - active).abs().max() > 0.01 * active.abs().max()
    for model in loaded.values():
        torch.testing.assert_close(computed(model), active, rtol=1e-4, atol=1e-4)
    # PEFT convolves where products are taken here; the bits of logits depend on addresses as well.
    torch.testing.assert_close(computed(loaded["peft"]), computed(unloaded), rtol=1e-5, atol=1e-5)
    if build is not convnet:
        tensors = loaded["peft"].state_dict()
        for name, tensor in unloaded.state_dict().items():
            assert torch.equal(tensors[name], tensor), name
