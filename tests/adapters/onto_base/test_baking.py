"""Adapters merged into a base equal PEFT's merge_and_unload, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import streammerge as sm
from streammerge.errors import RecipeError
from tests.adapters.tiny import bert, gpt2, llama, make_lora, mixtral

Tensors = dict[str, Tensor]
LINEAR = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
GPT2 = {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (llama, LINEAR),
    "patterns and rslora": (
        llama,
        LINEAR
        | {"rank_pattern": {"v_proj": 8}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    ),
    "transposed": (gpt2, GPT2),
    "embedding": (llama, {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}),
    "classifier": (bert, {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bias of B": (bert, {"r": 4, "target_modules": ["query", "dense"], "lora_bias": True}),
    "dora": (llama, LINEAR | {"use_dora": True}),
    "dora embedding": (
        llama,
        {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    ),
    "dora transposed": (gpt2, GPT2 | {"use_dora": True}),
    "saved module": (llama, LINEAR | {"modules_to_save": ["lm_head"]}),
    "tokens": (llama, LINEAR | {"trainable_token_indices": [3, 5, 60]}),
    "attention of experts": (mixtral, {"r": 4, "target_modules": ["q_proj"]}),
}


def bake_both(
    directory: Path,
    make: Callable[[], nn.Module],
    options: dict[str, Any],
    *,
    dtype: torch.dtype,
    adapters: int,
    rounding: str,
) -> tuple[Tensors, Tensors]:
    """Return what this project and what PEFT make of a base and adapters."""
    make().to(dtype).save_pretrained(directory / "base")
    names = [f"a{index}" for index in range(adapters)]
    for seed, name in enumerate(names):
        make_lora(directory / name, make(), seed=seed, **options)
    recipe = {
        "method": "task_arithmetic",
        "base": str(directory / "base"),
        "sources": [{"path": str(directory / name)} for name in names],
        "parameters": {"rounding": rounding},
    }
    sm.merge(recipe, directory / "out")
    with warnings.catch_warnings():
        # PEFT warns of patterns for parameters, which it goes by all the same, and of tied weights.
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(make().to(dtype), directory / "a0", adapter_name="a0")
        for name in names[1:]:
            model.load_adapter(directory / name, adapter_name=name)
        model.base_model.set_adapter(names)
        model.merge_and_unload(adapter_names=names).save_pretrained(directory / "expected")
    return (
        load_file(directory / "out" / "model.safetensors"),
        load_file(directory / "expected" / "model.safetensors"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["once", "peft"])
@pytest.mark.parametrize("case", CASES)
def test_one_adapter_equals_merge_and_unload(
    tmp_path: Path, case: str, rounding: str, dtype: torch.dtype
) -> None:
    make, options = CASES[case]
    got, expected = bake_both(tmp_path, make, options, dtype=dtype, adapters=1, rounding=rounding)

    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        if rounding == "once":
            # PEFT rounds some products before, and torch adds their terms in another order: a few units
            # of terms that may be larger than their sum.
            close = (32 if dtype is torch.float32 else 2) * torch.finfo(dtype).eps
            torch.testing.assert_close(got[name], tensor, rtol=close, atol=close)
        else:
            assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["linear", "transposed", "embedding", "bias of B"])
def test_several_adapters_are_rounded_in_turn_as_in_peft(
    tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    make, options = CASES[case]
    got, expected = bake_both(tmp_path, make, options, dtype=dtype, adapters=3, rounding="peft")

    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_what_no_adapter_touches_is_scaled_like_the_rest(tmp_path: Path) -> None:
    """Weights that do not add up to one change every tensor, not only those of the adapters."""
    llama().save_pretrained(tmp_path / "base")
    sources = [
        {"path": str(make_lora(tmp_path / name, llama(), seed=seed, **LINEAR)), "weight": weight}
        for seed, (name, weight) in enumerate({"a": 0.5, "b": 0.25}.items())
    ]
    recipe = {"method": "linear", "base": str(tmp_path / "base"), "sources": sources}
    sm.merge(recipe | {"parameters": {"normalize": False}}, tmp_path / "scaled")
    sm.merge(recipe, tmp_path / "averaged")
    base, scaled, averaged = (
        load_file(tmp_path / name / "model.safetensors") for name in ("base", "scaled", "averaged")
    )

    for name in ("model.norm.weight", "model.layers.0.self_attn.k_proj.weight"):
        assert torch.equal(scaled[name], base[name] * 0.75), name
        assert torch.equal(averaged[name], base[name]), name


@pytest.mark.parametrize("case", ["dora", "dora transposed"])
def test_several_dora_adapters_are_not_rounded_in_turn(tmp_path: Path, case: str) -> None:
    """For the norms of one, PEFT takes those before it out of the weights, and puts them back."""
    make, options = CASES[case]

    with pytest.raises(RecipeError, match="takes the earlier one out and puts it back"):
        bake_both(tmp_path, make, options, dtype=torch.float32, adapters=2, rounding="peft")
