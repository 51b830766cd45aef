"""Products of adapters whose factors lie another way round, or are parts of larger ones, on a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_backend import MakeDevices
from models import (
    BLOCK,
    MEMORY,
    assert_same_model,
    load_model,
    recipe_of,
    write_adapter,
    write_model,
)
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import streammerge
from streammerge.adapters.onto_base.changes import Change, ChangeKind
from streammerge.checkpoint.types import TensorEntry
from streammerge.dtypes import DType
from streammerge.plan import devices as planning_devices
from streammerge.plan.asking import find_method
from streammerge.plan.device_products import MOST_PLACED, has_products_for_device
from streammerge.plan.devices import runs_on_device
from streammerge.plan.estimating import why_not
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import MergePlan, TensorTask
from streammerge.probing.host import CoreSeconds, measure_computing
from tests.adapters.onto_base.test_baking_experts import stack_experts
from tests.adapters.tiny import gpt_oss, llama, make_lora, mixtral, qwen_moe

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROWS, COLUMNS = 333, 321
"""Of a part of a fused layer, all three of which have a row that two blocks share."""
WIDE = {"hidden_size": 528, "intermediate_size": 512, "num_hidden_layers": 1}


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 528, "n_layer": 1, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, **sizes)).eval()


def convolution() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(177, 176, 3, bias=False))
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "transposed": (gpt2, {"r": 3, "target_modules": ["c_attn", "c_proj"]}),
    "transposed, DoRA": (gpt2, {"r": 3, "target_modules": ["c_attn"], "use_dora": True}),
    "embedding": (
        lambda: llama(vocab_size=520, **WIDE),
        {"r": 3, "target_modules": ["embed_tokens", "q_proj"]},
    ),
    "a tensor per expert": (
        lambda: mixtral(num_local_experts=2, **WIDE),
        {
            "r": 2,
            "target_modules": [],
            "target_parameters": STACKS,
        },
    ),
    "stack": (
        lambda: qwen_moe(moe_intermediate_size=136, num_experts=4, hidden_size=528),
        {"r": 2, "target_modules": [], "target_parameters": STACKS},
    ),
    "transposed stack": (
        lambda: gpt_oss(hidden_size=272, intermediate_size=272),
        {"r": 2, "target_modules": [], "target_parameters": STACKS},
    ),
    "convolution": (convolution, {"r": 2, "target_modules": ["conv"]}),
    "convolution, DoRA": (convolution, {"r": 2, "target_modules": ["conv"], "use_dora": True}),
}


def write_case(case: str, directory: Path, method: str, dtype: torch.dtype) -> dict[str, Any]:
    make, options = CASES[case]
    model = make().to(dtype)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(directory / "base")
        if case == "stack":
            stack_experts(directory / "base")
    else:
        write_model(directory / "base", model.state_dict())
    adapters = [make_lora(directory / f"a{seed}", make(), seed=seed, **options) for seed in (1, 2)]
    return {
        "method": method,
        "base": str(directory / "base"),
        "sources": [{"path": str(path), "weight": 0.7} for path in adapters],
        "parameters": {"density": 0.4} if method == "ties" else {},
    }


def changed_there(plan: MergePlan) -> list[TensorTask]:
    """Return the tensors that adapters change and a device merges."""
    programs = programs_of_plan(plan, find_method(plan.method))
    return [
        task
        for task in plan.tasks
        if task.changes and runs_on_device(task, programs, plan.settings, fused=True)
    ]


@pytest.mark.parametrize(
    ("case", "method", "dtype"),
    [
        *((case, "task_arithmetic", torch.float32) for case in CASES),
        ("transposed", "ties", torch.bfloat16),
        ("stack", "ties", torch.bfloat16),
    ],
)
def test_products_have_the_bits_of_the_cpu(
    case: str, method: str, dtype: torch.dtype, devices: MakeDevices, tmp_path: Path
) -> None:
    backend = devices(proves=True)["cuda:0"]
    recipe = write_case(case, tmp_path, method, dtype)
    expected = streammerge.plan(recipe, memory=MEMORY, device="cpu", workers=1)
    planned = streammerge.plan(recipe, memory=MEMORY, device="cuda:0", workers=1)
    assert isinstance(planned, MergePlan)

    streammerge.merge(expected, tmp_path / "cpu")
    streammerge.merge(planned, tmp_path / "there")

    large = [task for task in planned.tasks if task.changes and task.numel > BLOCK]
    assert large
    assert changed_there(planned) == large
    assert planned.device is not None
    assert planned.device.norms == (len(large) * 2 if case.endswith("DoRA") else 0)
    assert not all(each.adds_plain_product for task in planned.tasks for each in task.changes)
    assert backend.log
    assert_same_model(load_model(tmp_path / "there"), load_model(tmp_path / "cpu"))


def recipe_of_parts(parts: str, method: str, directory: Path) -> dict[str, Any]:
    """Return a recipe with adapters for some of what a base has in one layer."""
    torch.manual_seed(1)
    base = {"double_blocks.0.img_attn.qkv.weight": torch.randn(3 * ROWS, COLUMNS)}
    write_model(directory / "base", base)
    adapters = []
    for seed in range(1 if method == "slerp" else 2):
        tensors = {}
        for part in parts:
            stem = f"transformer.transformer_blocks.0.attn.to_{part}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(3, COLUMNS)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(ROWS, 3)
        adapters.append(directory / f"a{seed}.safetensors")
        save_file(tensors, adapters[-1])
    parameters = {"ties": {"density": 0.4}, "slerp": {"t": 0.3}}.get(method, {})
    return recipe_of(method, directory / "base", adapters, parameters=parameters)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "slerp"])
@pytest.mark.parametrize("parts", ["qkv", "k", "qv"])
def test_rows_of_a_fused_layer_change_alone(
    parts: str, method: str, devices: MakeDevices, tmp_path: Path
) -> None:
    devices(proves=True)
    recipe = recipe_of_parts(parts, method, tmp_path)
    planned = streammerge.plan(recipe, memory=MEMORY, device="cuda:0", workers=1)
    assert isinstance(planned, MergePlan)
    assert len(changed_there(planned)) == 1

    streammerge.merge(planned, tmp_path / "there")
    streammerge.merge(recipe, tmp_path / "cpu", memory=MEMORY, device="cpu")

    assert_same_model(load_model(tmp_path / "there"), load_model(tmp_path / "cpu"))


@pytest.mark.parametrize("case", CASES)
def test_how_long_products_take_is_tried(case: str, tmp_path: Path) -> None:
    recipe = write_case(case, tmp_path, "ties", torch.float32)
    planned = streammerge.plan(recipe, memory=MEMORY, device="cpu")
    assert isinstance(planned, MergePlan)
    method = find_method("ties")

    tried = measure_computing(planned, method)

    assert why_not(planned, method) is None
    assert isinstance(tried, CoreSeconds)
    assert tried.term > 0


def test_long_rows_that_adapters_change_are_seen_whole(
    devices: MakeDevices, tmp_path: Path
) -> None:
    """In trials, too, which leave columns out of other matrices."""
    columns = 140_000
    devices(proves=True)
    torch.manual_seed(2)
    write_model(tmp_path / "base", {"layer.weight": torch.randn(8, columns)})
    shape = {"layer.weight": (8, columns)}
    adapters = [write_adapter(tmp_path / f"a{seed}", shape, seed=seed) for seed in range(2)]
    recipe = recipe_of("della", tmp_path / "base", adapters, parameters={"density": 0.5})
    planned = streammerge.plan(recipe, memory=MEMORY, device="cuda:0", workers=1)
    assert isinstance(planned, MergePlan)
    assert changed_there(planned)

    streammerge.merge(planned, tmp_path / "there")
    streammerge.merge(recipe, tmp_path / "cpu", memory=MEMORY, device="cpu")

    assert isinstance(measure_computing(planned, find_method("della")), CoreSeconds)
    assert_same_model(load_model(tmp_path / "there"), load_model(tmp_path / "cpu"))


def test_many_placed_products_stay_on_the_cpu() -> None:
    """A kernel that adds the parts of a layer that is cut by head would take minutes to compile."""
    plain, placed = change(), change(window=(0, 24))

    assert has_products_for_device([plain] * 40)
    assert has_products_for_device([plain] * (MOST_PLACED - 1) + [placed])
    assert not has_products_for_device([plain] * MOST_PLACED + [placed])
    assert has_products_for_device([])


@pytest.mark.parametrize(
    ("more", "numel"),
    [
        ({}, 2 * (6 + 4)),
        ({"expert": 1, "experts": 3}, 2 * (6 + 4)),
        ({"experts": 3}, 3 * 2 * (6 + 4)),
        ({"first_row": 5}, 2 * (6 + 4)),
    ],
)
def test_what_a_product_takes_of_its_factors(more: dict[str, Any], numel: int) -> None:
    assert change(**more).product_numel == numel


@pytest.mark.parametrize(
    "more",
    [{"matrix": (1, 24)}, {"matrix": (4, 6)}, {"transposed": True}, {"rows": 1}, {"columns": 8}],
)
def test_factors_of_another_matrix_are_no_product(more: dict[str, Any]) -> None:
    """Or a kernel would read beyond them."""
    down, up = (2, more.pop("columns", 4)), (6, 2)
    rows = more.pop("rows", 0)
    factors = tuple(TensorEntry("x", DType.F32, shape, 0, 0) for shape in (down, up))
    fits = {"kind": ChangeKind.LOW_RANK, "factors": factors, "matrix": (6, 4), "first_row": rows}

    assert not Change(**fits | more).adds_product


def test_factors_larger_than_a_stage_come_in_parts(
    devices: MakeDevices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which parts of rows are, of a matrix that is stored the other way round."""
    monkeypatch.setattr(planning_devices, "_STAGED_BYTES", 4 * 100)
    devices()
    recipe = write_case("transposed", tmp_path, "task_arithmetic", torch.float32)

    streammerge.merge(recipe, tmp_path / "there", memory=MEMORY, device="cuda:0")

    streammerge.merge(recipe, tmp_path / "cpu", memory=MEMORY, device="cpu")
    assert_same_model(load_model(tmp_path / "there"), load_model(tmp_path / "cpu"))


def change(**more: Any) -> Change:
    """Return a product for a matrix of 6 x 4 elements, but for what is given."""
    experts = more.get("experts", 1)
    down, up = (2 * experts, 4), (6 + more.get("first_row", 0), 2 * experts)
    if more.get("transposed"):
        down, up = (2, 6), (4, 2)
    factors = [TensorEntry("x", DType.F32, shape, 0, 0) for shape in (down, up)]
    kind = more.pop("kind", ChangeKind.LOW_RANK)
    return Change(kind, tuple(factors), (6, 4), **more)


@pytest.mark.parametrize(
    ("more", "product", "plain"),
    [
        ({}, True, True),
        ({"transposed": True}, True, False),
        ({"first_row": 1}, True, False),
        ({"experts": 2, "expert": 1}, True, False),
        # A stack has a product per expert, and rows of a tensor leave others as they are.
        ({"experts": 2}, True, False),
        ({"window": (0, 24)}, True, False),
        ({"window": (0, 24), "kind": ChangeKind.NORMED}, False, False),
    ],
)
def test_what_is_one_product(more: dict[str, Any], *, product: bool, plain: bool) -> None:
    assert change(**more).adds_product is product
    assert change(**more).adds_plain_product is plain
