"""Inputs cross the bus once where a device has room for them, and twice where it has none."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from fake_backend import FakeBackend, MakeDevices
from models import BLOCK, MEMORY, Models, recut
from test_device_merge import SCHEDULES, check_equal, draw, in_steps, plan_on, recipe_for

import streammerge
from streammerge.plan.asking import find_method
from streammerge.plan.devices import plan_step
from streammerge.plan.types import MergePlan

METHODS = {
    "ties": {"density": 0.3},
    "slerp": {"t": 0.3},
    "sce": {"select_topk": 0.3},
}
"""One that ranks, one that adds up, one that asks twice."""


def keeping(plan: MergePlan, pieces: int) -> MergePlan:
    """Return a plan that keeps so many pieces on each device."""
    assert plan.device is not None
    return replace(plan, device=replace(plan.device, kept_pieces=pieces))


def bytes_in(backend: FakeBackend) -> int:
    """Return what was copied of inputs; constants and factors are small beside them."""
    return sum(nbytes for nbytes in backend.brought if nbytes >= BLOCK)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_cross_the_bus_once_where_there_is_room(
    method: str, devices: MakeDevices, models: Models
) -> None:
    drawn = [{"w": each["smooth"]} for each in draw(torch.float32)]
    recipe = recipe_for(method, [models.write(each) for each in drawn], METHODS[method])
    expected = models.merge(recipe, device="cpu")
    backend = devices()["cuda:0"]
    plan = in_steps(plan_on(recipe), 1)
    inputs = len(plan.models) * drawn[0]["w"].nbytes
    check_equal(models.merge(plan), expected)
    assert bytes_in(backend) <= inputs
    backend.brought.clear()
    check_equal(models.merge(keeping(plan, 0)), expected)
    assert bytes_in(backend) >= 2 * (inputs - len(plan.models) * 4 * BLOCK)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pieces", [1, 2])
def test_what_there_is_no_room_for_is_copied_again(
    pieces: int, schedule: str, devices: MakeDevices, models: Models
) -> None:
    paths = [models.write(each) for each in draw(torch.bfloat16)]
    recipe = recipe_for("ties", paths, METHODS["ties"])
    expected = models.merge(recipe, device="cpu")
    devices(eager=SCHEDULES[schedule])
    plan = plan_on(recipe)
    cut = in_steps(recut(plan, slots=12 * len(plan.models), slot_blocks=2), 1)

    check_equal(models.merge(keeping(cut, pieces)), expected)


def test_a_device_keeps_no_more_than_was_stated(devices: MakeDevices, models: Models) -> None:
    paths = [models.write(each) for each in draw(torch.float32)]
    recipe = recipe_for("ties", paths, METHODS["ties"])
    backend = devices()["cuda:0"]
    plan = plan_on(recipe, workers=1)
    assert plan.device is not None
    shape = plan_step(plan, find_method("ties"), plan.device.step_numel, fused=True)
    assert shape is not None
    models.merge(plan)

    kept = plan.device.kept_pieces * shape.piece_bytes
    assert 0 < kept < plan.device.peak
    assert backend.peak + backend.temporary <= shape.device_bytes + kept <= plan.device.peak


def test_what_is_kept_is_what_the_budget_leaves(devices: MakeDevices, models: Models) -> None:
    devices()
    paths = [models.write(each) for each in draw(torch.float32)]
    recipe = recipe_for("ties", paths, METHODS["ties"])
    roomy = plan_on(recipe)
    assert roomy.device is not None
    kept = roomy.device.kept_pieces
    assert kept == roomy.resources.slots // len(roomy.models) > 1
    tight = streammerge.plan(
        recipe, memory=MEMORY, workers=2, device="cuda:0", device_memory=roomy.device.peak - 1
    )

    assert isinstance(tight, MergePlan)
    assert tight.device is not None
    assert tight.device.kept_pieces == kept - 1
    assert tight.device.peak <= tight.device.budget
    linear = plan_on(recipe_for("linear", [models.write({"w": torch.ones(9)})] * 3, {}))
    assert linear.device is not None
    assert linear.device.kept_pieces == 0


def test_a_full_device_keeps_less_and_changes_nothing(devices: MakeDevices, models: Models) -> None:
    """Room for what is kept is asked for when it is needed; whoever gets none copies again."""
    paths = [models.write(each) for each in draw(torch.float32)]
    recipe = recipe_for("ties", paths, METHODS["ties"])
    expected = models.merge(recipe, device="cpu")
    backend = devices()["cuda:0"]
    plan = in_steps(plan_on(recipe, workers=1), 1)
    models.merge(keeping(plan, 0))
    gc.collect()
    backend.capacity = backend.peak

    check_equal(models.merge(plan), expected)
    assert backend.refusals
    assert not backend.trims
