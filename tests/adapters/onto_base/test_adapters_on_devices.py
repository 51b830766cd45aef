"""Adapters beside models on a device: their products, and DoRA's, have the CPU's bits there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_backend import COMPUTE, MakeDevices
from models import MEMORY, assert_same_model, load_model, write_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

import streammerge
from streammerge.plan.asking import find_method
from streammerge.plan.devices import norms_of_plan, plan_step, runs_on_device
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import MergePlan

ROWS, COLUMNS = 600, 700


class Wide(nn.Module):
    """Two matrices of several blocks; the adapters change the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(COLUMNS, ROWS, bias=False)
        self.second = nn.Linear(COLUMNS, 601, bias=False)


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, str]:
    """A base, a model, and adapters: a plain one, and DoRA's of rows and of columns."""
    torch.manual_seed(1)
    base = Wide()
    write_model(tmp_path / "base", base.state_dict())
    tuned = {name: t + torch.randn(t.shape) * 0.1 for name, t in base.state_dict().items()}
    write_model(tmp_path / "tuned", tuned)
    for name, rank, dora in (("plain", 3, False), ("rows", 9, True)):
        config = LoraConfig(
            r=rank, target_modules=["first"], init_lora_weights=False, use_dora=dora
        )
        model = get_peft_model(Wide(), config)
        for parameter in model.parameters():
            if parameter.requires_grad and dora and parameter.dim() == 1:
                nn.init.uniform_(parameter, 0.5, 1.5)
        model.save_pretrained(tmp_path / name)
    # PEFT has norms of outputs alone; LyCORIS had those of inputs.
    columns = {
        "lora_down.weight": torch.randn(4, COLUMNS) / 8,
        "lora_up.weight": torch.randn(ROWS, 4) / 8,
        "dora_scale": torch.rand(1, COLUMNS) + 0.5,
        "alpha": torch.tensor(3.0),
    }
    raw = {f"lora_unet_first.{key}": value for key, value in columns.items()}
    save_file(raw, tmp_path / "columns.safetensors")
    names = {"base", "tuned", "plain", "rows", "columns.safetensors"}
    return {name.removesuffix(".safetensors"): str(tmp_path / name) for name in names}


def merge_on_both(
    recipe: dict[str, Any], devices: MakeDevices, directory: Path
) -> tuple[MergePlan, int]:
    """Merge on the CPU and on a device, with the same bytes; return the latter's plan and its peak."""
    backend = devices()["cuda:0"]
    directory.mkdir()
    manifests = []
    for device in ("cpu", "cuda:0"):
        planned = streammerge.plan(recipe, memory=MEMORY, device=device, workers=1)
        manifests.append(streammerge.merge(planned, directory / device.replace(":", "")))

    assert isinstance(planned, MergePlan)
    assert ("run", COMPUTE) in backend.log
    assert_same_model(load_model(directory / "cuda0"), load_model(directory / "cpu"))
    assert manifests[0].tensors == manifests[1].tensors
    return planned, backend.peak + backend.temporary


def those_there(planned: MergePlan) -> dict[str, bool]:
    """Return of each tensor whether it is the device's."""
    programs = programs_of_plan(planned, find_method(planned.method))
    return {
        task.name: runs_on_device(
            task,
            programs,
            planned.settings,
            fused=True,
            compute_itemsize=planned.compute_dtype.itemsize,
        )
        for task in planned.tasks
    }


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "task_arithmetic"},
        {"method": "linear"},
        {"method": "ties", "parameters": {"density": 0.3}},
        {"method": "ties", "parameters": {"density": 0.3, "scope": "model"}},
        {"method": "dare_ties", "parameters": {"density": 0.3}},
    ],
    ids=str,
)
def test_adapters_and_models_have_the_bytes_of_the_cpu(
    asked: dict[str, object], stored: dict[str, str], devices: MakeDevices, tmp_path: Path
) -> None:
    sources = [{"path": stored["plain"]}, {"path": stored["tuned"]}]
    recipe = {"base": stored["base"], "sources": sources} | asked

    planned, _ = merge_on_both(recipe, devices, tmp_path / "out")

    assert those_there(planned) == {"first.weight": True, "second.weight": True}


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "task_arithmetic"},
        {"method": "linear"},
        {"method": "ties", "parameters": {"density": 0.3}},
    ],
    ids=str,
)
@pytest.mark.parametrize("names", ["rows", "columns", "rows columns", "plain rows tuned"])
def test_dora_has_the_bytes_of_the_cpu(
    names: str,
    asked: dict[str, object],
    stored: dict[str, str],
    devices: MakeDevices,
    tmp_path: Path,
) -> None:
    sources = [{"path": stored[name]} for name in names.split()]
    recipe = {"base": stored["base"], "sources": sources} | asked

    planned, peak = merge_on_both(recipe, devices, tmp_path / "out")

    assert those_there(planned)["first.weight"]
    assert planned.device is not None
    shape = plan_step(
        planned, find_method(planned.method), planned.device.step_numel, fused=planned.device.fused
    )
    assert shape is not None
    benches = planned.device.norm_benches
    norms = norms_of_plan(planned, find_method(planned.method), fused=True)
    normed = sum(name in {"rows", "columns"} for name in names.split())
    assert norms.changes == planned.device.norms == normed
    assert benches == planned.resources.readers
    assert peak <= shape.device_bytes + benches * norms.device_bytes <= planned.device.peak
    assert f"DoRA's norms of {normed} matrices are found there" in str(planned)


def test_a_model_with_an_adapter_of_its_own_is_normed_by_its_own_weights(
    stored: dict[str, str], devices: MakeDevices, tmp_path: Path
) -> None:
    sources = [
        {"path": stored["tuned"], "adapter": stored["rows"]},
        {"path": stored["base"], "adapter": stored["columns"]},
    ]
    for method, base in (("task_arithmetic", {"base": stored["base"]}), ("linear", {})):
        recipe = {"method": method, "sources": sources} | base

        planned, _ = merge_on_both(recipe, devices, tmp_path / method)

        assert those_there(planned)["first.weight"]


def test_in_float64_adapters_stay_on_the_cpu(
    stored: dict[str, str], devices: MakeDevices, tmp_path: Path
) -> None:
    """Products are torch's there, which no kernel has the bits of."""
    sources = [{"path": stored["plain"]}, {"path": stored["tuned"]}]
    recipe = {"method": "linear", "base": stored["base"], "sources": sources}

    planned, _ = merge_on_both(recipe | {"compute_dtype": "float64"}, devices, tmp_path / "out")

    assert those_there(planned) == {"first.weight": False, "second.weight": True}
