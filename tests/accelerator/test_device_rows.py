"""What sees whole rows is merged on a device with the bytes of the CPU, whatever way pieces cut rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_backend import COMPUTE, COPY_IN, MakeDevices
from models import BLOCK, Models, Tensors, recipe_of, recut, write_model
from peft import LoraConfig, get_peft_model
from test_device_merge import check_equal, in_steps, plan_on, refuse_on_both
from torch import nn

import streammerge
from streammerge.engine.rows import make_relative, rank_rows
from streammerge.errors import DeviceError
from streammerge.plan.asking import find_method
from streammerge.plan.devices import plan_step, runs_on_device
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import MergePlan

SHAPES = {
    "even": (600, 1008),  # a block ends within a row
    "wide": (9, 32_000),
    "stack": (2, 300, 512),  # rows, for all dimensions but the last
    "odd": (400, 700),  # rows begin within a block of random numbers
    "wider": (2, BLOCK + 16),  # no step is as wide
    "small": (7, 16),
}
THERE = {"even", "wide", "stack"}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("della", {"density": 0.4, "epsilon": 0.2}),
    ("della", {"density": 0.4, "epsilon": 0.2, "rescale": "probability"}),
    ("della_linear", {"density": [0.4, 1.0], "epsilon": 0.1}),
    ("nuslerp", {"axis": "rows", "weight": [0.3, 0.6]}),
    ("model_stock", {"filter_wise": True}),
]
DELLA, MODEL_STOCK = METHODS[0], METHODS[-1]


def draw(dtype: torch.dtype, shapes: dict[str, tuple[int, ...]]) -> list[Tensors]:
    """Return a base and two models, whose task vectors have many equal magnitudes."""
    generator = torch.Generator().manual_seed(5)

    def values(scale: float) -> Tensors:
        return {
            name: torch.randint(-24, 25, shape, generator=generator) * scale
            for name, shape in shapes.items()
        }

    base = values(1 / 16)
    changes = [values(1 / 32) for _ in range(2)]
    models = [base, *({name: base[name] + change[name] for name in base} for change in changes)]
    return [{name: values.to(dtype) for name, values in model.items()} for model in models]


def recipe_for(
    models: Models,
    chosen: tuple[str, dict[str, Any]],
    dtype: torch.dtype = torch.bfloat16,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    **document: Any,
) -> dict[str, Any]:
    method, parameters = chosen
    base, *sources = (models.write(each) for each in draw(dtype, shapes))
    return recipe_of(method, base, sources, parameters=parameters, **document)


def those_there(plan: MergePlan) -> set[str]:
    programs = programs_of_plan(plan, find_method(plan.method))
    itemsize = plan.compute_dtype.itemsize
    return {
        task.name
        for task in plan.tasks
        if runs_on_device(task, programs, plan.settings, fused=True, compute_itemsize=itemsize)
    }


@pytest.mark.parametrize("chosen", METHODS, ids=str)
def test_rows_have_the_bytes_of_the_cpu(
    chosen: tuple[str, dict[str, Any]], devices: MakeDevices, models: Models
) -> None:
    recipe = recipe_for(models, chosen)
    expected = models.merge(recipe, device="cpu", workers=1)
    backend = devices(eager=frozenset({COPY_IN}))["cuda:0"]
    plan = plan_on(recipe)

    check_equal(models.merge(plan), expected)

    assert ("run", COMPUTE) in backend.log
    assert those_there(plan) == THERE


@pytest.mark.parametrize("chosen", [DELLA, MODEL_STOCK], ids=str)
def test_pieces_that_cut_rows_make_no_difference(
    chosen: tuple[str, dict[str, Any]], devices: MakeDevices, models: Models
) -> None:
    shapes = {name: SHAPES[name] for name in ("even", "wide")}
    recipe = recipe_for(models, chosen, torch.float32, shapes)
    expected = models.merge(recipe, device="cpu", workers=1)
    devices()
    plan = plan_on(recipe)

    small = in_steps(recut(plan, slots=len(plan.models), workers=1, slot_blocks=1), 1)

    check_equal(models.merge(small), expected)
    assert small.device is not None
    assert small.device.kept_pieces
    without = replace(small, device=replace(small.device, kept_pieces=0))
    check_equal(models.merge(without), expected)


@pytest.mark.parametrize("chosen", [DELLA, MODEL_STOCK], ids=str)
def test_inputs_cross_the_bus_once_where_they_can_stay(
    chosen: tuple[str, dict[str, Any]], devices: MakeDevices, models: Models
) -> None:
    shapes = {"even": SHAPES["even"]}
    backend = devices()["cuda:0"]
    plan = plan_on(recipe_for(models, chosen, shapes=shapes))
    assert plan.device is not None
    without = replace(plan, device=replace(plan.device, kept_pieces=0))
    inputs = 3 * 600 * 1008 * 2
    for each, crossings in ((plan, 1), (without, 2)):
        backend.brought.clear()
        models.merge(each)
        # What is known of rows, and constants, come beside.
        assert crossings * inputs <= sum(backend.brought) < crossings * inputs + 100_000


def test_without_kernels_rows_are_the_cpus(devices: MakeDevices, models: Models) -> None:
    shapes = {"even": SHAPES["even"]}
    recipe = recipe_for(models, DELLA, shapes=shapes)
    expected = models.merge(recipe, device="cpu", workers=1)
    backend = devices(obstacle="Triton is not installed")["cuda:0"]

    check_equal(models.merge(plan_on(recipe)), expected)

    assert not backend.log


def test_in_float64_rows_are_the_cpus(devices: MakeDevices, models: Models) -> None:
    devices()
    recipe = recipe_for(models, DELLA, compute_dtype="float64")

    assert those_there(plan_on(recipe)) == set()


class Wide(nn.Module):
    """One matrix, whose rows an adapter changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(512, 600, bias=False)


@pytest.mark.parametrize("chosen", [DELLA, METHODS[2]], ids=str)
def test_adapters_are_ranked_by_rows_as_models_are(
    chosen: tuple[str, dict[str, Any]], devices: MakeDevices, tmp_path: Path, models: Models
) -> None:
    torch.manual_seed(1)
    base = Wide()
    tuned = {"first.weight": base.first.weight.detach() + torch.randn(600, 512) / 50}
    paths = [write_model(tmp_path / "base", base.state_dict())]
    paths.append(write_model(tmp_path / "tuned", tuned))
    config = LoraConfig(r=3, target_modules=["first"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    method, parameters = chosen
    recipe = recipe_of(method, paths[0], [paths[1], tmp_path / "adapter"], parameters=parameters)
    expected = models.merge(recipe, device="cpu")
    devices()
    plan = plan_on(recipe)

    check_equal(models.merge(plan), expected)

    assert those_there(plan) == {"first.weight"}


# Triton's interpreter computes with numpy, which tells of infinities.
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_what_is_not_finite_is_refused_or_counted_as_on_the_cpu(
    devices: MakeDevices, models: Models, tmp_path: Path
) -> None:
    shapes = {"even": SHAPES["even"]}
    base, one, two = draw(torch.float32, shapes)
    for row, column in ((3, 5), (260, 1000), (261, 0), (599, 1007)):
        one["even"][row, column] = float("inf")
    paths = [models.write(each) for each in (base, one, two)]
    recipe = recipe_of("della", paths[0], paths[1:], parameters=DELLA[1])
    devices()
    assert "even" in refuse_on_both(recipe, tmp_path)

    kept = recipe | {"non_finite": "keep"}
    counts = []
    for device in ("cpu", "cuda:0"):
        plan = plan_on(kept, device)
        small = recut(plan, slots=len(plan.models), workers=1, slot_blocks=1)
        _, manifest = models.merge(small)
        counts.append([each.not_finite for each in manifest.tensors.values()])

    assert counts[0] == counts[1]


def test_rows_take_the_memory_that_is_stated(devices: MakeDevices, models: Models) -> None:
    backend = devices()["cuda:0"]
    for chosen in (DELLA, MODEL_STOCK):
        plan = plan_on(recipe_for(models, chosen), workers=1)
        device = plan.device
        assert device is not None
        shape = plan_step(plan, find_method(plan.method), device.step_numel, fused=True)
        assert shape is not None
        backend.peak = backend.temporary = 0

        models.merge(plan)

        stated = shape.device_bytes + device.kept_pieces * shape.piece_bytes
        assert backend.peak + backend.temporary <= stated <= device.peak


def test_ranks_are_tried_before_a_merge(
    devices: MakeDevices, models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    devices(proves=True)
    from streammerge.engine.accelerator.fused import ranking

    plan = plan_on(recipe_for(models, DELLA, shapes={"even": SHAPES["even"]}))

    def wrong(values: torch.Tensor, row: int, ranks: torch.Tensor) -> None:
        ranks.zero_()

    monkeypatch.setattr(ranking, "rank_short_rows", wrong)

    with pytest.raises(DeviceError, match="does not compute what the CPU does"):
        streammerge.merge(plan, tmp_path / "out")


# -- kernels


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("row", [2, 16, 48, 100])
def test_ranks_are_those_of_the_cpu(
    row: int, monkeypatch: pytest.MonkeyPatch, *, by_torch: bool
) -> None:
    """By the kernel, which takes Triton's interpreter seconds, and as long rows are ranked."""
    pytest.importorskip("triton")
    from streammerge.engine.accelerator.fused import ranking

    values = torch.randint(-6, 7, (4, row), generator=torch.Generator().manual_seed(row)) / 4
    values[1, row // 2] = float("nan")
    values[1, 0] = -values[1, row // 2]
    values[2, 0] = float("-inf")
    values[2, -1] = float("inf")
    values[3, :] = torch.tensor([0.0, -0.0]).repeat(row)[:row]
    found = torch.empty(values.numel())
    monkeypatch.setattr(ranking, "MOST_IN_REGISTERS", 0 if by_torch else 8192)

    ranking.rank_rows(values.view(-1), row, found)

    expected = rank_rows(values.numpy()).copy()
    make_relative(expected)
    np.testing.assert_array_equal(found.view(4, row).numpy(), expected)
