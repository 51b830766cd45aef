"""Adapters beside models on a device: their products have the CPU's bits there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_backend import COMPUTE, MakeDevices
from models import MEMORY, assert_same_model, load_model, write_model
from peft import LoraConfig, get_peft_model
from torch import nn

import streammerge
from streammerge.plan.asking import find_method
from streammerge.plan.devices import runs_on_device
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import MergePlan


class Wide(nn.Module):
    """Two matrices of several blocks; the adapter changes the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(700, 600, bias=False)
        self.second = nn.Linear(700, 601, bias=False)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, object]:
    torch.manual_seed(1)
    base = Wide()
    write_model(tmp_path / "base", base.state_dict())
    tuned = {name: t + torch.randn(t.shape) * 0.1 for name, t in base.state_dict().items()}
    write_model(tmp_path / "tuned", tuned)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["first"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return {
        "base": str(tmp_path / "base"),
        "sources": [{"path": str(tmp_path / "adapter")}, {"path": str(tmp_path / "tuned")}],
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
    asked: dict[str, object], recipe: dict[str, object], devices: MakeDevices, tmp_path: Path
) -> None:
    backend = devices()["cuda:0"]
    manifests = []
    for device in ("cpu", "cuda:0"):
        planned = streammerge.plan(recipe | asked, memory=MEMORY, device=device)
        manifests.append(streammerge.merge(planned, tmp_path / device.replace(":", "")))

    assert isinstance(planned, MergePlan)
    programs = programs_of_plan(planned, find_method(planned.method))
    there = {
        task.name: runs_on_device(task, programs, planned.settings, fused=True)
        for task in planned.tasks
    }
    assert there == {"first.weight": True, "second.weight": True}
    assert ("run", COMPUTE) in backend.log
    assert_same_model(load_model(tmp_path / "cuda0"), load_model(tmp_path / "cpu"))
    assert manifests[0].tensors == manifests[1].tensors
