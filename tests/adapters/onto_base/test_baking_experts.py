"""Adapters of stacked experts, merged into bases that store the stack or a tensor per expert."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import streammerge as sm
from streammerge.errors import ShapeMismatchError, UnsupportedAdapterError
from tests.adapters.onto_base.test_baking import bake_both
from tests.adapters.tiny import Tensors, gpt_oss, make_lora, mixtral, qwen_moe, rewrite

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "per expert": mixtral,
    "stacked": qwen_moe,
    "transposed": gpt_oss,
}


def bake(directory: Path, sources: list[Path], **parameters: Any) -> Tensors:
    """Merge adapters into ``directory/base``."""
    recipe = {
        "method": "task_arithmetic",
        "base": str(directory / "base"),
        "sources": [{"path": str(path)} for path in sources],
        "parameters": parameters,
    }
    sm.merge(recipe, directory / "out", overwrite=True)
    return load_file(directory / "out" / "model.safetensors")


def stack_experts(directory: Path) -> None:
    """Store the experts of a saved model as they are in memory."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    parts: dict[str, list[torch.Tensor]] = {}
    for name in sorted(tensors):
        head, experts, tail = name.partition(".experts.")
        if experts and tail.split(".")[1] == "gate_proj":
            up = tensors[name.replace("gate_proj", "up_proj")]
            parts.setdefault(f"{head}.experts.gate_up_proj", []).append(
                torch.cat([tensors[name], up])
            )
        elif experts and tail.split(".")[1] == "down_proj":
            parts.setdefault(f"{head}.experts.down_proj", []).append(tensors[name])
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    save_file(kept | {name: torch.stack(each) for name, each in parts.items()}, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("model", MODELS)
def test_experts_equal_merge_and_unload(
    tmp_path: Path, model: str, targets: list[str], dtype: torch.dtype
) -> None:
    options = {"r": 2, "target_modules": ["q_proj"], "target_parameters": targets}
    got, expected = bake_both(
        tmp_path, MODELS[model], options, dtype=dtype, adapters=1, rounding="peft"
    )

    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_a_stacked_base_gets_what_a_base_per_expert_gets(tmp_path: Path) -> None:
    qwen_moe().save_pretrained(tmp_path / "base")
    adapter = make_lora(
        tmp_path / "a", qwen_moe(), seed=1, r=2, target_modules=[], target_parameters=BOTH
    )
    bake(tmp_path, [adapter])
    stack_experts(tmp_path / "out")
    expected = load_file(tmp_path / "out" / "model.safetensors")
    stack_experts(tmp_path / "base")

    got = bake(tmp_path, [adapter])

    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_stack_of_one_expert_is_a_stack(tmp_path: Path) -> None:
    def lonely() -> nn.Module:
        return qwen_moe(num_experts=1, num_experts_per_tok=1)

    lonely().save_pretrained(tmp_path / "base")
    options = {"r": 2, "target_modules": [], "target_parameters": BOTH}
    adapter = make_lora(tmp_path / "a", lonely(), seed=1, **options)
    peft = PeftModel.from_pretrained(lonely(), tmp_path / "a")
    peft.merge_and_unload().save_pretrained(tmp_path / "expected")
    for name in ("base", "expected"):
        stack_experts(tmp_path / name)

    got = bake(tmp_path, [adapter], rounding="peft")

    expected = load_file(tmp_path / "expected" / "model.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_single_matrix_can_be_a_target_parameter(tmp_path: Path) -> None:
    options = {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}
    got, expected = bake_both(
        tmp_path, mixtral, options, dtype=torch.bfloat16, adapters=1, rounding="peft"
    )

    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_ranks_may_differ_between_the_parameters(tmp_path: Path) -> None:
    """Adapters per expert get such ranks when transformers 5 loads and PEFT saves them again."""
    options = {
        "r": 2,
        "target_modules": ["q_proj"],
        "target_parameters": ["gate_up_proj", "down_proj"],
        "rank_pattern": {r".*\.gate_up_proj": 4},
        "alpha_pattern": {r".*\.gate_up_proj": 16},
    }
    got, expected = bake_both(
        tmp_path, mixtral, options, dtype=torch.float32, adapters=1, rounding="peft"
    )

    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_factors_of_old_versions_are_the_other_way_round(tmp_path: Path) -> None:
    """Up to 0.19.0 PEFT took every stack for [experts, in, out]: A and B swap their dimensions."""
    mixtral().save_pretrained(tmp_path / "base")
    targets = BOTH[1:]
    adapter = make_lora(
        tmp_path / "a", mixtral(), seed=1, r=2, target_modules=[], target_parameters=targets
    )
    expected = bake(tmp_path, [adapter])

    def swap(tensors: Tensors) -> Tensors:
        down, up = (
            next(tensor for name, tensor in tensors.items() if side in name and ".0." in name)
            for side in ("lora_A", "lora_B")
        )
        rank, experts = 2, 4
        swapped = {}
        for name, tensor in tensors.items():
            if "lora_A" in name:
                by_expert = tensor.reshape(experts, rank, -1)
                swapped[name.replace("lora_A", "lora_B")] = by_expert.permute(2, 1, 0).reshape(
                    down.shape[1], -1
                )
            else:
                by_expert = tensor.reshape(up.shape[0], rank, experts)
                swapped[name.replace("lora_B", "lora_A")] = by_expert.permute(2, 1, 0).reshape(
                    -1, up.shape[0]
                )
        return swapped

    got = bake(tmp_path, [rewrite(adapter, swap, peft_version="0.19.0")])

    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-6)


def square_adapter(directory: Path, **config: Any) -> Path:
    """Return an adapter of square expert matrices, over a base that has such."""
    mixtral(intermediate_size=32).save_pretrained(directory / "base")
    adapter = make_lora(
        directory / "a",
        mixtral(intermediate_size=32),
        seed=1,
        r=2,
        target_modules=[],
        target_parameters=BOTH[1:],
    )
    return rewrite(adapter, **config)


def test_square_stacks_go_by_the_version_that_saved_them(tmp_path: Path) -> None:
    new = bake(tmp_path, [square_adapter(tmp_path)])
    old = bake(tmp_path, [square_adapter(tmp_path, peft_version="0.18.1")])
    base = load_file(tmp_path / "base" / "model.safetensors")

    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    torch.testing.assert_close(old[name] - base[name], (new[name] - base[name]).T)


def test_square_stacks_of_an_unknown_version_are_refused(tmp_path: Path) -> None:
    adapter = square_adapter(tmp_path, peft_version=None)

    with pytest.raises(UnsupportedAdapterError, match=r"square matrices.*peft_version"):
        bake(tmp_path, [adapter])


def test_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    adapter = make_lora(
        tmp_path / "a", mixtral(), seed=1, r=2, target_modules=[], target_parameters=BOTH
    )
    mixtral(num_local_experts=5).save_pretrained(tmp_path / "base")

    with pytest.raises(ShapeMismatchError, match=r"adapts 4 experts.*experts\.4\.w"):
        bake(tmp_path, [adapter])


def test_experts_of_another_width_are_refused(tmp_path: Path) -> None:
    adapter = make_lora(
        tmp_path / "a", mixtral(), seed=1, r=2, target_modules=[], target_parameters=BOTH[1:]
    )
    mixtral(intermediate_size=40).save_pretrained(tmp_path / "base")

    with pytest.raises(ShapeMismatchError, match=r"4 matrices of \[32, 48\].*\[32, 40\]"):
        bake(tmp_path, [adapter])


def test_wrappers_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "base")
    adapter = make_lora(
        tmp_path / "a", mixtral(), seed=1, r=2, target_modules=[], target_parameters=BOTH
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    strange = [*config["target_parameters"], "mlp.experts.other"]

    with pytest.raises(UnsupportedAdapterError, match=r"does not say which of target_parameters"):
        bake(tmp_path, [rewrite(adapter, target_parameters=strange)])
