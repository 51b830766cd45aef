"""Products that combinations of adapters decompose whole go to a device; the rest stays on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_backend import FakeBackend, MakeDevices
from models import load_model
from peft import LoraConfig, get_peft_model
from torch import nn

import streammerge
from streammerge.adapters.combining.plans import CombinationPlan
from streammerge.cli.arguments import main
from streammerge.errors import DeviceError, MemoryBudgetError
from streammerge.plan.device_matrices import LEAST_SIDE

SHAPES = {"wide": (LEAST_SIDE + 8, 2000), "square": (600, 700), "small": (40, 700)}
"""Rows and columns of the weights; the last one is too small for a device."""


class Layers(nn.Module):
    """One layer of each shape."""

    def __init__(self) -> None:
        super().__init__()
        for name, (rows, columns) in SHAPES.items():
            setattr(self, name, nn.Linear(columns, rows, bias=False))


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=list(SHAPES), init_lora_weights=False)
        get_peft_model(Layers(), config).save_pretrained(tmp_path / f"adapter{seed}")
    return {
        "method": "ties_svd",
        "parameters": {"density": 0.5, "svd_rank": 8},
        "sources": [{"path": str(tmp_path / f"adapter{seed}")} for seed in (1, 2)],
    }


def planned_on(recipe: dict[str, Any], device: str, **options: Any) -> CombinationPlan:
    planned = streammerge.plan(recipe, memory="4GiB", device=device, **options)
    assert isinstance(planned, CombinationPlan)
    return planned


def products_of(adapter: Path) -> dict[str, torch.Tensor]:
    """Return ``B @ A`` of each layer, in float64."""
    tensors = load_model(adapter)
    return {
        name: tensors[f"base_model.model.{name}.lora_B.weight"].double()
        @ tensors[f"base_model.model.{name}.lora_A.weight"].double()
        for name in SHAPES
    }


@pytest.mark.parametrize(
    ("method", "more"),
    [("ties_svd", {}), ("dare_linear_svd", {}), ("ties_svd", {"compute_dtype": "float64"})],
)
def test_a_device_comes_to_the_same_products(
    method: str,
    more: dict[str, Any],
    recipe: dict[str, Any],
    devices: MakeDevices,
    tmp_path: Path,
) -> None:
    backend = devices()["cuda:0"]
    asked = recipe | {"method": method} | more
    streammerge.merge(planned_on(asked, "cpu"), tmp_path / "cpu")
    assert not backend.log
    plan = planned_on(asked, "cuda:0")
    manifest = streammerge.merge(plan, tmp_path / "there")

    expected, found = products_of(tmp_path / "cpu"), products_of(tmp_path / "there")
    for name, product in expected.items():
        error = (found[name] - product).abs().max() / product.abs().max()
        assert error < 1e-5, name
    assert torch.equal(found["small"], expected["small"])
    assert plan.device is not None
    assert plan.device.matrices == 2
    assert backend.log
    assert manifest.run.device == "cuda:0"
    assert 0 < manifest.run.measured_device_memory <= manifest.run.projected_device_memory


def test_a_plan_says_what_is_decomposed_there(
    recipe: dict[str, Any],
    devices: MakeDevices,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    devices()
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))

    assert main(["plan", str(path), "--device", "cuda:0", "--memory", "4GiB"]) == 0
    assert "cuda:0: 2 matrices, with up to " in capsys.readouterr().out
    assert planned_on(recipe, "auto").device is None
    on_cpu, there = planned_on(recipe, "cpu"), planned_on(recipe, "cuda:0")
    assert there.peak_memory > on_cpu.peak_memory
    assert there.as_json()["device"]["matrices"] == 2
    assert on_cpu.as_json()["device"] is None


def test_a_product_that_does_not_fit_is_refused_with_the_least_that_would_do(
    recipe: dict[str, Any], devices: MakeDevices
) -> None:
    devices()
    with pytest.raises(MemoryBudgetError, match=r"wide.*\[520, 2000\] takes") as refused:
        planned_on(recipe, "cuda:0", device_memory="64MiB")
    least = str(refused.value).split("give --device-memory ")[1].split()[0]

    assert planned_on(recipe, "cuda:0", device_memory=least).device is not None
    little = planned_on(recipe, "cpu").peak_memory + 100 * 2**20
    with pytest.raises(MemoryBudgetError, match=r"cuda:0 needs .* of the process, and --memory"):
        streammerge.plan(recipe, memory=little, device="cuda:0")


@pytest.mark.parametrize("method", ["svd", "cat", "linear"])
def test_combinations_that_decompose_nothing_whole_refuse_a_device(
    method: str, recipe: dict[str, Any], devices: MakeDevices
) -> None:
    devices()
    asked = {"method": method, "sources": recipe["sources"]}

    with pytest.raises(DeviceError, match=f"{method} of adapters is computed on the cpu"):
        streammerge.plan(asked, device="cuda:0")


def test_a_device_without_memory_is_asked_again_and_then_named(
    recipe: dict[str, Any], devices: MakeDevices, tmp_path: Path
) -> None:
    backend: FakeBackend = devices()["cuda:0"]
    plan = planned_on(recipe, "cuda:0")
    backend.capacity = 2**20

    with pytest.raises(MemoryBudgetError, match=r"ran out of memory twice .* then combine again"):
        streammerge.merge(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
