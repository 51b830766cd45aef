"""Which device a merge takes of its own accord, by which rates, and what it says of it."""

from __future__ import annotations

import ctypes
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fake_backend import FakeBackend, MakeDevices
from models import (
    BLOCK,
    Models,
    assert_same_model,
    count_sources,
    load_model,
    recipe_of,
    write_adapter,
    write_model,
)

import streammerge
from streammerge.chaining.foreseeing import plan_chain
from streammerge.chaining.stages import Chain, Stage
from streammerge.cli import doctor
from streammerge.cli.arguments import main
from streammerge.engine.accelerator import driver, opening
from streammerge.engine.accelerator.cuda import CudaBackend
from streammerge.engine.accelerator.driver import count_driver_devices
from streammerge.errors import MemoryBudgetError
from streammerge.extracting.extraction import extract
from streammerge.extracting.plans import ExtractionPlan
from streammerge.methods import discover_methods
from streammerge.methods.base import Operand
from streammerge.native.library import load_kernels
from streammerge.plan.choice import Seconds
from streammerge.plan.codec import dump_plan, parse_plan
from streammerge.plan.estimating import (
    COMPILING_SECONDS,
    PRODUCT_SECONDS,
    START_SECONDS,
    DeviceRates,
    Rates,
    estimate_on_cpu,
    estimate_on_device,
    why_not,
    wins,
)
from streammerge.plan.types import MergePlan
from streammerge.probing import device as probing_device
from streammerge.probing import host as probing_host
from streammerge.run import load_recipe
from streammerge.together import plan_together
from streammerge.units import GIB, MIB

SLOW_CPU = {"value_seconds": 1e-3}
"""With everything else as fast as can be: 1,573 s for what the recipe below computes."""
MakeAuto = Callable[..., dict[str, FakeBackend]]


@pytest.fixture
def recipe(models: Models) -> dict[str, Any]:
    """Three models of two blocks in float32: 6.3 MB to read, 2.1 to write, 1,572,864 values."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, BLOCK, generator=generator) for _ in range(3)]
    paths = [models.write({"w": each}) for each in drawn]
    return recipe_of("ties", paths[0], paths[1:], parameters={"density": 0.2})


@pytest.fixture
def auto(devices: MakeDevices, monkeypatch: pytest.MonkeyPatch) -> MakeAuto:
    """Return a function that makes fake devices and lets a driver see them, with rates of one's choice."""

    def make(
        *,
        read: float = 1e12,
        write: float = 1e12,
        value_seconds: float = 1e-12,
        bus: float = 1e12,
        memory: float = 1e12,
        locking: float = 1e12,
        sorting: float = 1e12,
        term_seconds: float = 1e-15,
        **options: Any,
    ) -> dict[str, FakeBackend]:
        monkeypatch.setattr(driver, "count_driver_devices", lambda: 2)
        monkeypatch.setattr(opening, "why_no_cuda", lambda: None)
        rates = Rates(read, write, value_seconds, cores=1, term_seconds=term_seconds)
        monkeypatch.setattr(probing_host, "measure_host", lambda *_: rates)
        measured = DeviceRates(bus, memory, locking, sorting)
        monkeypatch.setattr(probing_device, "measure_device", lambda *_, **__: measured)
        return devices(**options)

    return make


def least_device_memory(recipe: dict[str, Any]) -> str:
    """Return the smallest budget with which a merge fits a device."""
    with pytest.raises(MemoryBudgetError) as refused:
        planned_of(recipe, device="cuda:0", workers=1, device_memory="1MiB")
    found = re.search(r"give --device-memory (\w+)", str(refused.value))
    assert found
    return found[1]


def planned_of(recipe: dict[str, Any], **options: Any) -> MergePlan:
    planned = streammerge.plan(recipe, memory="4GiB", **options)
    assert isinstance(planned, MergePlan)
    return planned


@pytest.mark.parametrize(
    ("rates", "taken", "says"),
    [
        # Only the CPU is slow.
        (SLOW_CPU, True, "instead of 1,573 s on 1 core (computing 1,573 s)"),
        # 629 s of reading, which nothing shortens; the CPU is not slower, and then by less than a fifth.
        ({"value_seconds": 3e-4, "read": 1e4}, False, "reading takes 629 s either way"),
        ({"value_seconds": 4.6e-4, "read": 1e4}, False, "on any device the merge would take 632 s"),
        ({"value_seconds": 6e-4, "read": 1e4}, True, "(reading 629 s, start "),
        ({"value_seconds": 3e-4, "write": 4e3}, False, "writing takes 524 s either way"),
        # To start takes longer than all of the work.
        ({"value_seconds": 2e-6}, False, "computing takes 3.1 s"),
        # What crosses the bus, is moved there, and is page-locked for it.
        (SLOW_CPU | {"bus": 6e3}, False, "the bus 1,398 s"),
        (SLOW_CPU | {"bus": 1e4}, True, "the bus 839 s"),
        (SLOW_CPU | {"memory": 2e4}, False, "which is less than 20% to win"),
        (SLOW_CPU | {"locking": 5e4}, False, "which is less than 20% to win"),
    ],
)
def test_the_device_is_taken_where_it_wins(
    rates: dict[str, float], *, taken: bool, says: str, recipe: dict[str, Any], auto: MakeAuto
) -> None:
    auto(**rates)

    planned = planned_of(recipe)

    assert planned.choice is not None
    assert says in str(planned.choice)
    assert planned.choice.taken is taken
    assert planned.device == (planned_of(recipe, device="cuda:0").device if taken else None)
    assert str(planned.choice).startswith(
        "cuda:0, of its own accord: " if taken else "cpu, though cuda:0 is there: "
    )


def test_a_fifth_less_is_what_wins() -> None:
    on_cpu = Seconds(1.0, 2.0, 0.0, 10.0)

    assert wins(Seconds(1.0, 2.0, 3.0, 5.0, start=3.0), on_cpu)
    assert not wins(Seconds(1.0, 2.0, 3.0, 5.1, start=3.0), on_cpu)


def test_stages_go_on_side_by_side_after_the_start() -> None:
    seconds = Seconds(4.0, 3.0, 12.0, 6.0, start=2.0)

    assert (seconds.total, seconds.limit) == (14.0, "bus")
    assert (
        seconds.told() == "reading 4.0 s, writing 3.0 s, the bus 12 s, computing 6.0 s, start 2.0 s"
    )


def test_an_estimate_is_the_sum_of_what_is_moved(recipe: dict[str, Any], auto: MakeAuto) -> None:
    """Inputs cross the bus once if they stay, else once to be measured and once to be merged; the result once."""
    auto()
    method = discover_methods()["ties"]
    stored, cores = 3 * 2 * BLOCK * 4, 2
    rates = Rates(1e6, 1e5, 1e-3, cores)

    planned = planned_of(recipe, device="cpu", workers=3)
    on_cpu = estimate_on_cpu(planned, method, rates)
    there = planned_of(recipe, device="cuda:0")
    on_device = estimate_on_device(there, method, rates, DeviceRates(1e6, 1e30, 1e30, 1e30))

    assert on_cpu.reading == on_device.reading == planned.bytes_to_read / 1e6
    assert on_cpu.writing == on_device.writing == planned.bytes_to_write / 1e5
    assert on_cpu.computing == pytest.approx(3 * 2 * BLOCK * 1e-3 / cores)
    assert there.device is not None
    assert there.device.kept_pieces
    assert on_device.bus == (stored + stored // 3) / 1e6
    let_go = replace(there, device=replace(there.device, kept_pieces=0))
    again = estimate_on_device(let_go, method, rates, DeviceRates(1e6, 1e30, 1e30, 1e30))
    assert again.bus == (2 * stored + stored // 3) / 1e6
    assert on_device.start > START_SECONDS
    assert (on_cpu.start, on_cpu.bus) == (0.0, 0.0)


def test_what_stays_on_the_cpu_is_computed_there(models: Models, auto: MakeAuto) -> None:
    """Tensors of at most a block, by as many workers as a merge on a device has."""
    auto(**SLOW_CPU)
    shapes = {"large": 2 * BLOCK, **{f"small{index}": BLOCK for index in range(2)}}
    paths = [
        models.write({name: torch.randn(numel) for name, numel in shapes.items()}) for _ in range(3)
    ]
    recipe = recipe_of("ties", paths[0], paths[1:], parameters={"density": 0.2})

    choice = planned_of(recipe).choice

    assert choice is not None
    assert choice.on_cpu is not None
    assert choice.on_device is not None
    assert choice.on_device.computing == pytest.approx(choice.on_cpu.computing / 2)


def test_a_merge_that_took_the_device_has_the_same_bytes_and_says_so(
    recipe: dict[str, Any], auto: MakeAuto, tmp_path: Path
) -> None:
    backend = auto(**SLOW_CPU)["cuda:0"]
    manifest = streammerge.merge(recipe, tmp_path / "there", memory="4GiB")
    assert backend.log
    on_cpu = streammerge.merge(recipe, tmp_path / "here", memory="4GiB", device="cpu")

    assert_same_model(load_model(tmp_path / "there"), load_model(tmp_path / "here"))
    assert manifest.run.device == "cuda:0"
    assert manifest.run.device_choice.startswith("cuda:0, of its own accord: ")
    assert (on_cpu.run.device, on_cpu.run.device_choice) == ("cpu", "")


def test_a_merge_that_took_the_device_tells_so_at_its_end(
    recipe: dict[str, Any], auto: MakeAuto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    auto(**SLOW_CPU)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ["merge", str(tmp_path / "recipe.yaml"), "--memory", "4GiB"]

    assert main([*words, str(tmp_path / "there")]) == 0
    assert "  device: cuda:0, of its own accord: " in capsys.readouterr().err
    assert main([*words, str(tmp_path / "here"), "--device", "cpu"]) == 0

    assert "of its own accord" not in capsys.readouterr().err


def test_no_device_is_opened_where_the_disk_is_the_limit(
    recipe: dict[str, Any], auto: MakeAuto, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto(read=1e4)
    opened: list[str] = []

    def open_devices(names: Sequence[str]) -> list[FakeBackend]:
        opened.extend(names)
        return []

    monkeypatch.setattr(opening, "open_devices", open_devices)

    assert planned_of(recipe).choice is not None
    assert not opened


def test_a_plan_prints_both_estimates_and_survives_json(
    recipe: dict[str, Any], auto: MakeAuto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    auto(**SLOW_CPU)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    assert main(["plan", str(tmp_path / "recipe.yaml"), "--memory", "4GiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(index for index, line in enumerate(lines) if line.startswith("device "))
    planned = planned_of(recipe)

    assert "device       cuda:0, of its own accord: " in lines[row]
    assert lines[row + 1].strip().startswith("cuda:0: up to ")
    assert parse_plan(dump_plan(planned)) == planned


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({"non_finite": "keep"}, {}, "what is no number may have other bits there"),
        ({}, {"report": True}, "what a report tells is found on the cpu"),
        ({"method": "iso_c", "parameters": {}}, {}, "nothing of this merge is for it"),
    ],
)
def test_what_is_not_estimated_stays_on_the_cpu(
    change: dict[str, Any],
    options: dict[str, Any],
    says: str,
    recipe: dict[str, Any],
    auto: MakeAuto,
) -> None:
    backend = auto(**SLOW_CPU)["cuda:0"]

    planned = planned_of(recipe | change, **options)

    assert planned.device is None
    assert f"cpu, though cuda:0 is there: {says}" in str(planned)
    assert not backend.log


def test_whole_matrices_stay_on_the_cpu(models: Models, auto: MakeAuto) -> None:
    """Their last bits differ, and no result may depend on a measurement."""
    auto(**SLOW_CPU)
    paths = [models.write({"w": torch.randn(512, 512)}) for _ in range(3)]

    planned = planned_of(recipe_of("iso_c", paths[0], paths[1:]))

    assert planned.device is None
    assert "decomposed there have other last bits, and an estimate decides no bit" in str(planned)


@dataclass(frozen=True)
class Baking:
    """A base of 1024 x 512 elements in float32, and adapters of rank 4."""

    models: Models
    base: Path

    def recipe(self, method: str, count: int, *, dora: bool = False) -> dict[str, Any]:
        shapes = {"layer.weight": (1024, 512)}
        adapters = [
            write_adapter(self.models.new_output(), shapes, seed=seed, dora=dora)
            for seed in range(count)
        ]
        parameters = {"density": 0.5} if method == "ties" else {}
        return recipe_of(method, self.base, adapters, parameters=parameters)

    def plan(self, method: str, count: int, *, dora: bool = False, **options: Any) -> MergePlan:
        return planned_of(self.recipe(method, count, dora=dora), **options)


NUMEL, RANK = 1024 * 512, 4


@pytest.fixture
def baking(models: Models) -> Baking:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(1024, 512, generator=generator)
    return Baking(models, models.write({"layer.weight": drawn}))


@pytest.mark.parametrize("dora", [False, True])
def test_products_of_adapters_are_computed_where_that_is_faster(
    baking: Baking, auto: MakeAuto, tmp_path: Path, *, dora: bool
) -> None:
    backend = auto(term_seconds=1e-3)["cuda:0"]
    recipe = baking.recipe("task_arithmetic", 2, dora=dora)

    manifest = streammerge.merge(recipe, tmp_path / "there", memory="4GiB")
    assert backend.log
    streammerge.merge(recipe, tmp_path / "here", memory="4GiB", device="cpu")

    assert_same_model(load_model(tmp_path / "there"), load_model(tmp_path / "here"))
    # Terms of two products, and once more for their norms.
    seconds = (4 if dora else 2) * NUMEL * RANK / 1e3
    assert f"instead of {seconds:,.0f} s on 1 core" in manifest.run.device_choice


def test_products_stay_where_the_bus_is_slow(baking: Baking, auto: MakeAuto) -> None:
    auto(term_seconds=1e-3, bus=1e3)

    planned = baking.plan("task_arithmetic", 1)

    assert planned.device is None
    assert "the bus 4,2" in str(planned)


def test_terms_are_counted_for_every_round(baking: Baking, auto: MakeAuto) -> None:
    """Thresholds of products are found of products that are computed for it."""
    auto()
    method = discover_methods()["ties"]
    planned = baking.plan("ties", 3, device="cpu", workers=1)

    on_cpu = estimate_on_cpu(planned, method, Rates(1e9, 1e9, 0.0, 1, term_seconds=1.0))
    by_values = estimate_on_cpu(planned, method, Rates(1e9, 1e9, 0.0, 1, changed_seconds=1.0))
    by_others = estimate_on_cpu(planned, method, Rates(1e9, 1e9, 1.0, 1))

    assert on_cpu.computing == 2 * 3 * NUMEL * RANK
    assert by_values.computing == 4 * NUMEL
    assert by_others.computing == 0


def test_what_crosses_the_bus_for_products(baking: Baking, auto: MakeAuto) -> None:
    """The base, once more for norms if the device finds them, factors for a worker, and the result."""
    auto()
    method = discover_methods()["task_arithmetic"]
    rates, device = Rates(1e30, 1e30, 0.0, 1, term_seconds=1.0), DeviceRates(1.0, 1e30, 1e30, 1e30)
    factors = 4 * RANK * (1024 + 512)

    plain = baking.plan("task_arithmetic", 2, device="cuda:0")
    dora = baking.plan("task_arithmetic", 2, dora=True, device="cuda:0")
    assert dora.device is not None
    without = replace(dora, device=replace(dora.device, norm_benches=0))
    estimates = [estimate_on_device(each, method, rates, device) for each in (plain, dora, without)]

    vectors = 2 * 4 * 1024
    bus = [2 * 4 * NUMEL + 2 * factors, 4 * 4 * NUMEL + 2 * factors + vectors]
    assert [each.bus for each in estimates] == [*bus, 2 * 4 * NUMEL + 2 * factors + vectors]
    # Nothing is left to the CPU but norms, where the device has no room for them.
    assert [round(each.computing) for each in estimates] == [0, 0, 2 * NUMEL * RANK]


def row_recipe(models: Models, method: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    paths = [models.write({"w": torch.randn(2048, 256, generator=generator)}) for _ in range(3)]
    parameters: dict[str, Any] = {
        "nuslerp": {"axis": "rows"},
        "model_stock": {"filter_wise": True},
        "task_arithmetic": {},
    }.get(method, {"density": 0.5})
    return recipe_of(method, paths[0], paths[1:], parameters=parameters)


@pytest.fixture(
    params=[
        "task_arithmetic",
        "ties",
        "della",
        "model_stock",
        "nuslerp",
        "baked",
        "baked ties",
        "dora",
    ]
)
def any_recipe(request: pytest.FixtureRequest, models: Models, baking: Baking) -> dict[str, Any]:
    if request.param in {"baked", "dora"}:
        return baking.recipe("task_arithmetic", 2, dora=request.param == "dora")
    return (
        baking.recipe("ties", 2)
        if request.param == "baked ties"
        else row_recipe(models, request.param)
    )


@pytest.mark.parametrize("fits", [False, True])
def test_what_is_foreseen_to_cross_the_bus_does(
    any_recipe: dict[str, Any], devices: MakeDevices, tmp_path: Path, *, fits: bool
) -> None:
    """But for some constants: whether inputs stay on the device, or cross once more for every round."""
    backend, recipe = devices()["cuda:0"], any_recipe
    device_memory = "4GiB" if fits else least_device_memory(recipe)
    named = {"device": "cuda:0", "workers": 1, "device_memory": device_memory}
    planned = planned_of(recipe, **named)
    method = discover_methods()[planned.method]
    device = DeviceRates(1.0, 1e30, 1e30, 1e30)
    foreseen = estimate_on_device(planned, method, Rates(1e30, 1e30, 0.0, 1), device).bus

    streammerge.merge(recipe, tmp_path / "out", memory="4GiB", **named)

    written = 4 * NUMEL
    assert foreseen == pytest.approx(sum(backend.brought) + written, rel=0.02)


@pytest.mark.parametrize(
    ("method", "dora", "kernels"),
    [
        # Two products are written out in it.
        ("task_arithmetic", False, (1, 2)),
        # One measures; three count in bins, count in a band and collect from it.
        ("ties", False, (1 + 1 + 3, 2 + 2)),
        # Two change rows and add up their squares.
        ("task_arithmetic", True, (1 + 2, 2)),
    ],
)
def test_every_kernel_takes_time_to_be_compiled(
    method: str, kernels: tuple[int, int], baking: Baking, auto: MakeAuto, *, dora: bool
) -> None:
    auto()
    planned = baking.plan(method, 2, dora=dora, device="cuda:0")
    rates, device = Rates(1e30, 1e30, 0.0, 1), DeviceRates(1e30, 1e30, 1e30, 1e30)

    foreseen = estimate_on_device(planned, discover_methods()[method], rates, device)

    count, products = kernels
    compiling = count * COMPILING_SECONDS + products * PRODUCT_SECONDS
    assert foreseen.start == pytest.approx(START_SECONDS + compiling)


def test_what_is_more_than_a_product_stays_on_the_cpu(models: Models, auto: MakeAuto) -> None:
    """IA3 multiplies rows."""
    auto(**SLOW_CPU)
    base = models.write({f"{name}.weight": torch.randn(1024, 512) for name in ("layer", "other")})
    product = write_adapter(models.new_output(), {"layer.weight": (1024, 512)}, seed=0)
    scaling = models.new_output()
    vector = {"base_model.model.other.ia3_l": torch.ones(1024, 1)}
    write_model(scaling / "adapter_model.safetensors", vector)
    config = {"peft_type": "IA3", "target_modules": ["other"], "feedforward_modules": []}
    (scaling / "adapter_config.json").write_text(json.dumps(config))

    planned = planned_of(recipe_of("task_arithmetic", base, [product, scaling]))

    assert planned.device is None
    assert "what adapters change by more than some products is not estimated" in str(planned)


@pytest.mark.parametrize("method", ["della", "model_stock"])
def test_rows_are_ranked_and_measured_where_that_is_faster(
    method: str, models: Models, auto: MakeAuto, tmp_path: Path
) -> None:
    backend = auto(**SLOW_CPU)["cuda:0"]
    recipe = row_recipe(models, method)

    manifest = streammerge.merge(recipe, tmp_path / "there", memory="4GiB")
    assert backend.log
    streammerge.merge(recipe, tmp_path / "here", memory="4GiB", device="cpu")

    assert manifest.run.device == "cuda:0"
    assert_same_model(load_model(tmp_path / "there"), load_model(tmp_path / "here"))


def test_rows_stay_where_sorting_is_slow(models: Models, auto: MakeAuto) -> None:
    auto(**SLOW_CPU, sorting=1e3)

    planned = planned_of(row_recipe(models, "della"))
    without = planned_of(row_recipe(models, "task_arithmetic"))

    assert planned.device is None
    # Two sources, ranked to be measured, and once more to be merged.
    assert "computing 2,097 s" in str(planned)
    assert without.device is not None


def test_matrices_seen_whole_beside_others_are_no_obstacle(models: Models, auto: MakeAuto) -> None:
    """Nobody has tried how long those take whose columns have angles of their own."""
    auto(**SLOW_CPU)
    shapes = {"columns": (1024, 512), "tensor": (512, 520)}
    paths = [
        models.write({name: torch.randn(shape) for name, shape in shapes.items()}) for _ in range(3)
    ]
    rules = {"rules": [{"tensors": "columns", "axis": "columns"}]}

    planned = planned_of(recipe_of("nuslerp", paths[0], paths[1:]) | rules)

    assert planned.device is None
    assert "how long matrices take that are seen whole is not estimated" in str(planned)


@pytest.mark.parametrize(("obstacle", "taken"), [("there is no Triton", False), (None, True)])
def test_sums_decide_no_bit_by_a_measurement(
    obstacle: str | None, *, taken: bool, recipe: dict[str, Any], auto: MakeAuto
) -> None:
    """Torch adds up in another order than the CPU; fused kernels do not."""
    auto(**SLOW_CPU, obstacle=obstacle)

    planned = planned_of(recipe | {"method": "model_stock", "parameters": {}})

    assert planned.choice is not None
    assert planned.choice.taken is taken
    assert ("sums over tensors have other last bits" in str(planned)) is not taken


def test_device_memory_is_for_the_device_that_may_be_taken(
    recipe: dict[str, Any], auto: MakeAuto
) -> None:
    auto(**SLOW_CPU)
    planned = planned_of(recipe, device_memory="1GiB")
    assert planned.device is not None
    assert planned.device.budget == GIB

    too_little = planned_of(recipe, device_memory="1MiB")

    assert too_little.device is None
    assert "it cannot be used (" in str(too_little)
    assert "give --device-memory" in str(too_little)


def test_a_device_that_is_full_or_gone_is_left_alone(
    recipe: dict[str, Any], auto: MakeAuto, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto(**SLOW_CPU, capacity=2**20)
    assert "only 1.0 MiB of its memory are free" in str(planned_of(recipe).choice)
    auto(**SLOW_CPU)
    monkeypatch.setattr(opening, "count_devices", lambda: 0)

    assert "CUDA" in str(planned_of(recipe).choice)


def test_a_budget_without_room_for_the_driver_rules_the_device_out(
    recipe: dict[str, Any], auto: MakeAuto
) -> None:
    """Where it is less than 1 GiB, and where what is left of it is too little for the merge."""
    backend = auto(**SLOW_CPU)["cuda:0"]
    in_use = planned_of(recipe, device="cpu").memory.baseline

    for memory in (in_use + GIB // 2, in_use + GIB + 16 * MIB):
        planned = streammerge.plan(recipe, memory=memory)

        assert "may take 1.0 GiB of the process, which --memory has not" in str(planned)
    assert not backend.log


def test_merges_side_by_side_and_one_after_the_other_stay_on_the_cpu(
    recipe: dict[str, Any], auto: MakeAuto
) -> None:
    auto(**SLOW_CPU)
    (group,) = plan_together([recipe, recipe | {"seed": 1}], memory="4GiB")
    last = load_recipe(recipe | {"base": "first"})
    stages = (Stage("first", load_recipe(recipe), ()), Stage("last", last, ("first",)))
    chain = plan_chain(Chain(Path("recipes.yaml"), "", stages), memory="4GiB")
    assert len(group.plans) == 2

    for planned, why in (
        *((each, "merges side by side") for each in group.plans),
        *((each, "recipes of one file") for each in chain),
    ):
        assert isinstance(planned, MergePlan)
        assert planned.device is None
        assert f"cpu, though cuda:0 is there: {why}" in str(planned)


def test_a_comparison_is_computed_on_the_cpu(
    recipe: dict[str, Any], auto: MakeAuto, tmp_path: Path
) -> None:
    backend = auto(**SLOW_CPU)["cuda:0"]
    streammerge.merge(recipe, tmp_path / "out", memory="4GiB", device="cpu")

    streammerge.verify_against(recipe, tmp_path / "out", memory="4GiB", fraction=1.0)

    assert not backend.log


def test_without_a_driver_nothing_changes(recipe: dict[str, Any]) -> None:
    planned = planned_of(recipe)

    assert planned.choice is None
    assert "choice" not in json.loads(dump_plan(planned))
    # What the process takes before changes from one moment to the next.
    named = replace(planned_of(recipe, device="cpu"), memory=planned.memory)
    assert (planned, str(planned)) == (named, str(named))


@pytest.mark.skipif(load_kernels() is None, reason="no compiler was found at installation")
def test_torch_is_not_imported_where_a_device_would_not_win(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """With a driver that has devices, and the machine's own rates."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    program = (
        "import sys, streammerge\n"
        "from streammerge.engine.accelerator import driver, opening\n"
        "driver.count_driver_devices = lambda: 1\n"
        "opening.why_no_cuda = lambda: None\n"
        "print(streammerge.plan(sys.argv[1], memory='4GiB').choice)\n"
        "assert 'torch' not in sys.modules"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.startswith("cpu, though cuda:0 is there: ")


def test_the_doctor_says_what_auto_comes_to(
    auto: MakeAuto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "count_driver_devices", lambda: 0)
    assert doctor.examine(None).auto == "the cpu: no CUDA driver has a device here"
    auto()
    monkeypatch.setattr(doctor, "_devices", lambda: (("cuda:0 (a device)",), None))
    assert doctor.examine(None).auto.startswith("cuda:0, where a plan's estimate says")
    monkeypatch.setattr(opening, "why_no_cuda", lambda: "this build of torch has no CUDA")

    assert "\nauto      the cpu: there is a CUDA" in doctor.render(doctor.examine(None))
    assert doctor.examine(None).auto.startswith("the cpu: there is a CUDA driver, but this build")


def test_the_machine_is_measured_by_the_plan_s_own_work(recipe: dict[str, Any]) -> None:
    planned = planned_of(recipe, device="cpu")

    rates = probing_host.measure_host(planned, discover_methods()["ties"])

    assert isinstance(rates, Rates)
    # Between what no processor reaches and what an interpreter would take.
    assert 1e-11 < rates.value_seconds < 1e-5
    assert rates.read > 0
    assert 0 < rates.write <= min(rates.read, 2e9)


def test_files_that_are_gone_have_no_rate(recipe: dict[str, Any]) -> None:
    planned = planned_of(recipe, device="cpu")
    planned.files[0].path.unlink()

    rates = probing_host.measure_host(planned, discover_methods()["ties"])

    assert rates == "the inputs cannot be read to see how fast they come"


@pytest.mark.parametrize(
    ("method", "shape"), [("linear", (3,)), ("della", (7, 64)), ("dare_ties", (2, BLOCK))]
)
def test_tensors_of_any_kind_are_tried(method: str, shape: tuple[int, ...], models: Models) -> None:
    paths = [models.write({"w": torch.randn(shape).bfloat16()}) for _ in range(4)]
    parameters = {} if method == "linear" else {"density": 0.5}
    planned = planned_of(recipe_of(method, paths[0], paths[1:], parameters=parameters))

    tried = probing_host.measure_computing(planned, discover_methods()[method])

    assert isinstance(tried, probing_host.CoreSeconds)
    assert tried.value > 0
    assert tried.term == 0


@pytest.mark.parametrize("method", discover_methods())
def test_what_is_estimated_can_be_tried(method: str, models: Models) -> None:
    """With every parameter that its examples give a method: a number, and no error."""
    found = discover_methods()[method]
    shapes = {"matrix": (1024, 528), "vector": (BLOCK + 5,), "small": (7,)}
    paths = [
        models.write({name: torch.randn(shape) for name, shape in shapes.items()}) for _ in range(3)
    ]
    base = None if found.operand is Operand.WEIGHTS else paths[2]
    for parameters in found.examples:
        recipe = recipe_of(method, base, paths[: count_sources(found, 2)], parameters=parameters)
        planned = planned_of(recipe, device="cpu")
        if why_not(planned, found) is not None:
            continue

        tried = probing_host.measure_computing(planned, found)

        assert isinstance(tried, probing_host.CoreSeconds)
        assert tried.value > 0


@pytest.mark.parametrize("dora", [False, True])
def test_products_of_adapters_are_tried(baking: Baking, *, dora: bool) -> None:
    planned = baking.plan("ties", 2, dora=dora, device="cpu")
    assert planned.needs_torch is dora

    tried = probing_host.measure_computing(planned, discover_methods()["ties"])

    assert isinstance(tried, probing_host.CoreSeconds)
    # Between what no processor reaches and what an interpreter would take.
    assert 1e-12 < tried.term < 1e-6
    assert tried.changed >= 0
    assert tried.value == 0


def test_what_adapters_change_is_tried_apart_from_the_rest(models: Models, baking: Baking) -> None:
    """A small layer that takes torch says nothing of how long others take; nor is torch left with one thread."""
    drawn = load_model(baking.base)
    base = models.write(drawn | {"large.weight": torch.randn(2048, 512)})
    tuned = models.write(
        {"layer.weight": drawn["layer.weight"] * 1.1, "large.weight": torch.randn(2048, 512)}
    )
    adapter = write_adapter(models.new_output(), {"layer.weight": (1024, 512)}, seed=0, dora=True)
    planned = planned_of(recipe_of("task_arithmetic", base, [tuned, adapter]), device="cpu")
    assert planned.needs_torch
    threads = torch.get_num_threads()
    method = discover_methods()["task_arithmetic"]

    tried = probing_host.measure_computing(planned, method)
    on_cpu = estimate_on_cpu(planned, method, Rates(1.0, 1.0, 1.0, 1, 0.0, 0.0))

    assert isinstance(tried, probing_host.CoreSeconds)
    assert min(tried.value, tried.changed, tried.term) > 0
    assert on_cpu.computing == 2 * 2048 * 512
    assert torch.get_num_threads() == threads


def test_what_torch_says_of_a_trial_is_no_reason_to_end(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(probing_host, "_try", fail)
    planned = planned_of(recipe, device="cpu")

    tried = probing_host.measure_computing(planned, discover_methods()["ties"])

    assert tried == "a moment of its work on the cpu failed (no such thing)"


def test_rows_that_are_too_wide_to_try_are_named(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing_host, "DRAWN_NUMEL", 63)
    paths = [models.write({"w": torch.randn(8, 64)}) for _ in range(3)]
    recipe = recipe_of("nuslerp", paths[0], paths[1:], parameters={"axis": "rows"})
    planned = planned_of(recipe, device="cpu")

    tried = probing_host.measure_computing(planned, discover_methods()["nuslerp"])

    assert tried == "how long rows of 64 elements take is not tried"


def test_types_that_are_not_drawn_are_named(models: Models) -> None:
    paths = [models.write({"w": torch.ones(9).to(torch.float8_e4m3fn)}) for _ in range(3)]
    planned = planned_of(recipe_of("task_arithmetic", paths[0], paths[1:]))

    tried = probing_host.measure_computing(planned, discover_methods()["task_arithmetic"])

    assert tried == "how long values stored as F8_E4M3 take is not tried"


class FakeDriver:
    """What the driver's library answers."""

    def __init__(self, *, count: int, initialised: int = 0) -> None:
        self._count = count
        self._initialised = initialised

    def cuInit(self, flags: int) -> int:  # noqa: N802 - its name
        assert flags == 0
        return self._initialised

    def cuDeviceGetCount(self, place: Any) -> int:  # noqa: N802 - its name
        place._obj.value = self._count
        return 0


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        (FakeDriver(count=2), 2),
        (FakeDriver(count=0), 0),
        # No device, and a driver older than its library.
        (FakeDriver(count=1, initialised=100), 0),
        (FakeDriver(count=1, initialised=803), 0),
        (object(), 0),
        (None, 0),
    ],
)
def test_the_driver_is_asked_by_its_library(
    library: object, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(_: str) -> object:
        if library is None:
            raise OSError
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(driver, "_PLACES", (str(tmp_path),))
    assert count_driver_devices() == expected
    monkeypatch.setattr(driver, "_PLACES", (str(tmp_path / "none"),))

    assert count_driver_devices() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
def test_a_real_device_is_found_and_measured() -> None:
    assert count_driver_devices() > 0

    rates = probing_device.measure_device(CudaBackend(0), ranks=True)

    assert rates.memory > rates.bus > 0
    assert 0 < rates.sorting < rates.memory


def test_an_extraction_says_why_it_stays_on_the_cpu(
    models: Models, auto: MakeAuto, tmp_path: Path
) -> None:
    auto(**SLOW_CPU)
    base, tuned = (models.write({"layer.weight": torch.randn(16, 16)}) for _ in range(2))
    plans: list[ExtractionPlan] = []

    extract(base, tuned, tmp_path / "out", rank=4, memory="4GiB", on_plan=plans.append)

    assert "cpu, though cuda:0 is there: factors have other last bits there" in str(plans[0])


def test_a_device_is_measured_by_copies_and_gets_its_memory_back() -> None:
    backend = FakeBackend()

    rates = probing_device.measure_device(backend)

    assert min(rates.bus, rates.memory, rates.locking) > 0
    assert math.isinf(rates.sorting)
    assert backend.used == 0
    assert 0 < backend.peak <= probing_device.ROOM_BYTES
    assert backend.trims == 1
