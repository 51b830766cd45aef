"""A device that does not compute what the CPU does is found out before it is trusted with a merge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_backend import COMPUTE, COPY_OUT, FakeStream, MakeDevices
from models import BLOCK, MEMORY, Models, assert_same_model, load_model, write_model
from peft import LoraConfig, get_peft_model
from test_device_merge import by_single_operations, draw, plan_on, recipe_for
from torch import nn

import streammerge
from streammerge.engine.accelerator import proving, sharing
from streammerge.engine.accelerator.fused import running
from streammerge.engine.accelerator.fused.running import FusedSteps
from streammerge.engine.accelerator.proving import prove
from streammerge.engine.small import delta_of
from streammerge.errors import DeviceError
from streammerge.plan.asking import find_method
from streammerge.plan.devices import TRIAL_NUMEL, plan_step, trial_bytes
from streammerge.plan.types import MergePlan

METHODS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.3},
    "dare_ties": {"density": 0.3},
    "slerp": {"t": 0.3},
    "sce": {"select_topk": 0.3},
    "linear": {},
}


def refuse(plan: MergePlan, models: Models, match: str) -> None:
    """Expect that a merge is refused before it has written anything."""
    out = models.new_output()
    with pytest.raises(DeviceError, match=match):
        streammerge.merge(plan, out)
    assert not list(out.parent.glob(f"{out.name}/*.safetensors"))


@pytest.mark.parametrize("method", METHODS)
def test_a_device_that_computes_alike_is_trusted(
    method: str, devices: MakeDevices, models: Models
) -> None:
    backend = devices(proves=True)["cuda:0"]
    paths = [models.write(each) for each in draw(torch.bfloat16)]
    recipe = recipe_for(method, paths, METHODS[method])
    plan = plan_on(recipe)
    prove(plan, find_method(method), backend)
    runs = backend.log.count(("run", COMPUTE))

    assert runs
    found, _ = models.merge(plan)
    assert_same_model(found, models.merge(recipe, device="cpu")[0])
    assert backend.log.count(("run", COMPUTE)) > 2 * runs


@pytest.mark.parametrize(
    ("method", "parameters", "document"),
    [
        ("ties", {"density": 0.3, "scope": "model"}, {}),
        ("ties", {"density": 0.3}, {"non_finite": "keep"}),
        ("pcb", {"ratio": 0.2}, {"compute_dtype": "float64"}),
    ],
)
def test_what_else_plans_ask_for_is_trusted_too(
    method: str,
    parameters: dict[str, Any],
    document: dict[str, Any],
    devices: MakeDevices,
    models: Models,
) -> None:
    backend = devices()["cuda:0"]
    paths = [models.write(each) for each in draw(torch.float32)]
    prove(plan_on(recipe_for(method, paths, parameters, **document)), find_method(method), backend)

    assert ("run", COMPUTE) in backend.log


def test_single_operations_are_tried_too_unless_they_add_up(
    devices: MakeDevices, models: Models
) -> None:
    backend = devices()["cuda:0"]
    paths = [models.write(each) for each in draw(torch.float32)]
    for method, tried in (("ties", True), ("slerp", False)):
        backend.log.clear()
        plan = by_single_operations(plan_on(recipe_for(method, paths, METHODS[method])))
        prove(plan, find_method(method), backend)
        assert (("run", COMPUTE) in backend.log) is tried


def test_a_result_that_differs_by_a_bit_is_refused(
    devices: MakeDevices, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices(proves=True)
    paths = [models.write(each) for each in draw(torch.float32)]
    plan = plan_on(recipe_for("linear", paths, {}))
    copy = FakeStream.copy

    def spoil(self: FakeStream, target: torch.Tensor, source: torch.Tensor) -> None:
        copy(self, target, source)
        if self.kind == COPY_OUT and target.numel() == 4 * BLOCK:
            self._enqueue_spoiling(target)

    def enqueue(self: FakeStream, target: torch.Tensor) -> None:
        self.run(lambda: target[4 * 17 : 4 * 17 + 1].bitwise_xor_(1))

    monkeypatch.setattr(FakeStream, "_enqueue_spoiling", enqueue, raising=False)
    monkeypatch.setattr(FakeStream, "copy", spoil)

    refuse(plan, models, r"cuda:0 does not compute .* of linear, .* made .* of element 17, and the")


@pytest.mark.parametrize(
    "broken",
    [
        ("dare_ties", "keep_limit", lambda density: round(density * 2**32) + 2**20),
        ("ties", "_threshold", lambda top: top.threshold * 1.001),
    ],
)
def test_a_mask_or_a_trim_of_its_own_is_refused(
    broken: tuple[str, str, object],
    devices: MakeDevices,
    models: Models,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method, name, wrong = broken
    devices(proves=True)
    paths = [models.write(each) for each in draw(torch.bfloat16)]
    plan = plan_on(recipe_for(method, paths, METHODS[method]))
    monkeypatch.setattr(running, name, wrong)

    refuse(plan, models, r"does not compute what the CPU does: .* made .* of element")


def test_statistics_of_its_own_are_refused(
    devices: MakeDevices, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices(proves=True)
    paths = [models.write(each) for each in draw(torch.bfloat16)]
    plan = plan_on(recipe_for("slerp", paths, METHODS["slerp"]))
    total = FusedSteps.total

    def wrong(op: Any, a: Any, b: Any, column: torch.Tensor) -> None:
        total(op, a, b, column)
        column.add_(1.0)

    monkeypatch.setattr(FusedSteps, "total", staticmethod(wrong))

    refuse(plan, models, r"it found Found\(.* and the CPU Found\(")


class Wide(nn.Module):
    """A matrix of several blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(700, 600, bias=False)


@pytest.mark.parametrize("dora", [False, True])
def test_products_are_tried_as_well(
    devices: MakeDevices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, dora: bool
) -> None:
    backend = devices(proves=True)["cuda:0"]
    torch.manual_seed(1)
    base = Wide()
    write_model(tmp_path / "base", base.state_dict())
    config = LoraConfig(r=3, target_modules=["first"], init_lora_weights=False, use_dora=dora)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    recipe = {
        "method": "task_arithmetic",
        "base": str(tmp_path / "base"),
        "sources": [{"path": str(tmp_path / "adapter")}],
    }
    seen = []

    def make_and_tell(*made: Any) -> Any:
        seen.append(made[0])
        return delta_of(*made)

    monkeypatch.setattr(proving, "delta_of", make_and_tell)
    for device in ("cpu", "cuda:0"):
        planned = streammerge.plan(recipe, memory=MEMORY, device=device)
        streammerge.merge(planned, tmp_path / device.replace(":", ""))

    (change,) = seen
    assert change.model == 1
    assert ("run", COMPUTE) in backend.log
    assert_same_model(load_model(tmp_path / "cuda0"), load_model(tmp_path / "cpu"))


def test_a_trial_takes_no_more_than_the_plan_says(devices: MakeDevices, models: Models) -> None:
    """Page-locked memory is stated; that of the device is what a worker takes, at most."""
    backend = devices()["cuda:0"]
    paths = [models.write(each) for each in draw(torch.float32)]
    plan = plan_on(recipe_for("ties", paths, METHODS["ties"]), workers=1)
    shape = plan_step(plan, find_method("ties"), BLOCK, fused=True)
    assert shape is not None
    assert plan.device is not None
    pinned: list[int] = []
    pin = backend.pin

    def count(nbytes: int) -> Any:
        pinned.append(nbytes)
        return pin(nbytes)

    backend.pin = count  # type: ignore[method-assign]
    prove(plan, find_method("ties"), backend)

    large = [nbytes for nbytes in pinned if nbytes >= TRIAL_NUMEL]
    assert sum(large[: len(plan.models) + 2]) <= trial_bytes(shape)
    assert backend.peak + backend.temporary <= shape.device_bytes
    small = replace(plan.device, step_numel=BLOCK)
    assert small.peak >= shape.device_bytes
    assert sharing.prove is not prove
