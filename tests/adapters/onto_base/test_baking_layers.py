"""Layers beyond the linear ones of a language model, merged as PEFT's merge_and_unload does it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import streammerge as sm
from tests.adapters.tiny import Tensors, bert, convnet, gpt2, llama, make_ia3, make_lora

ALL_CONVNET = ["conv1d", "conv2d", "point", "head"]


def saved(model: nn.Module, directory: Path) -> Path:
    """Save the tensors of any model, those that are shared once."""
    directory.mkdir()
    seen: dict[int, Tensor] = {}
    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if seen.setdefault(tensor.data_ptr(), tensor) is tensor
    }
    save_file(tensors, directory / "model.safetensors")
    return directory


def bake(base: Path, adapter: Path, out: Path) -> Tensors:
    recipe = {
        "method": "task_arithmetic",
        "base": str(base),
        "sources": [{"path": str(adapter)}],
        "parameters": {"rounding": "peft"},
    }
    sm.merge(recipe, out)
    return load_file(out / "model.safetensors")


def bake_in_peft(model: nn.Module, adapter: Path) -> Tensors:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


LORA: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "convolutions": (convnet, {"target_modules": ALL_CONVNET}),
    "convolutions, dora": (convnet, {"target_modules": ["conv2d", "point"], "use_dora": True}),
    "convolutions, dora 1d": (convnet, {"target_modules": ["conv1d"], "use_dora": True}),
    "convolutions, bias of B": (convnet, {"target_modules": ["conv2d"], "lora_bias": True}),
    "convolutions, rslora": (convnet, {"target_modules": ALL_CONVNET, "use_rslora": True}),
    "embedding": (convnet, {"target_modules": ["embed", "head"]}),
    "trained biases": (bert, {"target_modules": ["query"], "bias": "lora_only"}),
    "all biases": (bert, {"target_modules": ["query"], "bias": "all"}),
    "rank of a module alone": (
        gpt2,
        {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"h.1.attn.c_attn": 5}},
    ),
    "regular expression": (llama, {"target_modules": r".*\.1\.self_attn\.[qk]_proj"}),
    "some layers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LORA)
def test_lora_equals_merge_and_unload(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    make, options = LORA[case]
    base = saved(make().to(dtype), tmp_path / "base")
    adapter = make_lora(tmp_path / "a", make(), seed=1, **{"r": 3, "lora_alpha": 5} | options)
    expected = bake_in_peft(make().to(dtype), adapter)

    got = bake(base, adapter, tmp_path / "out")

    changed = [name for name in got if not torch.equal(got[name], make().state_dict()[name])]
    assert changed
    for name, tensor in got.items():
        if make is convnet:
            # PEFT convolves where products are taken here, with other bits for other threads, and
            # libraries multiply matrices of fewer than 16 columns in another order of addition.
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(tensor, expected[name], rtol=2 * eps, atol=8 * eps)
        else:
            assert torch.equal(tensor, expected[name]), name


IA3: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (
        llama,
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "with biases": (
        bert,
        {
            "target_modules": ["key", "value", "output.dense"],
            "feedforward_modules": ["output.dense"],
        },
    ),
    "transposed": (
        gpt2,
        {
            "target_modules": ["c_attn", "mlp.c_proj"],
            "feedforward_modules": ["mlp.c_proj"],
            "fan_in_fan_out": True,
        },
    ),
    "convolutions": (
        convnet,
        {"target_modules": ["conv2d", "point", "head"], "feedforward_modules": ["point"]},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", IA3)
def test_ia3_equals_merge_and_unload(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    make, options = IA3[case]
    base = saved(make().to(dtype), tmp_path / "base")
    adapter = make_ia3(tmp_path / "a", make(), seed=1, **options)
    expected = bake_in_peft(make().to(dtype), adapter)

    got = bake(base, adapter, tmp_path / "out")

    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name
