"""A merge on a device has the bytes of one on the CPU; streams and events are those of a fake."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import Parts, choose, cover, parts_of, share
from fake_backend import COMPUTE, COPY_IN, COPY_OUT, MakeDevices
from models import (
    BLOCK,
    MEMORY,
    Models,
    Tensors,
    assert_same_model,
    count_sources,
    load_model,
    recipe_of,
    recut,
)

import streammerge
from streammerge.checkpoint.manifest import Manifest
from streammerge.engine.accelerator.fused.running import FusedSteps
from streammerge.errors import (
    DeviceLostError,
    MemoryBudgetError,
    NonFiniteError,
    StageError,
)
from streammerge.methods import discover_methods
from streammerge.methods.base import Operand
from streammerge.plan.asking import find_method
from streammerge.plan.devices import plan_step, runs_on_device
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import MergePlan
from streammerge.statistics.in_tensors import Answers
from streammerge.tiles.program import Op

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
EXAMPLES = [
    (method.name, number, example)
    for method in discover_methods().values()
    for number, example in enumerate(method.examples)
]


def parts_of_example(example: tuple[str, int, dict[str, Any]]) -> Parts:
    method, _, parameters = example
    return parts_of(method, parameters, has_base=has_base(method))


def has_base(method: str) -> bool:
    return discover_methods()[method].operand is not Operand.WEIGHTS


IN_TYPES = cover(
    choose(EXAMPLES, parts_of_example, lambda example: example[0]), DTYPES, parts_of_example
)
CUTS = share(
    IN_TYPES,
    ["tight", "steps"],
    lambda pair: parts_of_example(pair[0]) | {("dtype", pair[1])},
    lambda pair: (pair[0][0], repr(pair[0][2]), pair[1]),
)
"""How each is merged once more on the device."""
CASES = [
    pytest.param(method, example, dtype, id=f"{method}-{number}-{dtype}")
    for (method, number, example), dtype in IN_TYPES
]
SHAPES = {
    "smooth": (
        4 * BLOCK + 99,
    ),  # pieces of three blocks, in steps of two: two, one, one and a rest
    "grid": (2, BLOCK + 31),  # full of equal magnitudes
    "small": (7, 5),
    "zeros": (300,),
    "empty": (0,),
}
SCHEDULES = {
    "as late as may be": frozenset[int](),
    "copies in run ahead": frozenset({COPY_IN}),
    "copies out lag behind": frozenset({COPY_IN, COMPUTE}),
    "all at once": frozenset({COPY_IN, COMPUTE, COPY_OUT}),
}


def draw(dtype: torch.dtype, sources: int = 2, seed: int = 5) -> list[Tensors]:
    generator = torch.Generator().manual_seed(seed)

    def values(name: str, scale: float) -> torch.Tensor:
        if name == "zeros":
            return torch.zeros(SHAPES[name])
        if name == "grid":
            return torch.randint(-24, 25, SHAPES[name], generator=generator) / 16
        return torch.randn(SHAPES[name], generator=generator) * scale

    base = {name: values(name, 1.0) for name in SHAPES}
    tuned = [{n: t + values(n, 0.25) for n, t in base.items()} for _ in range(sources)]
    return [{name: t.to(dtype) for name, t in model.items()} for model in [base, *tuned]]


def recipe_for(
    method: str, paths: list[Path], parameters: dict[str, Any], **document: Any
) -> dict[str, Any]:
    found = discover_methods()[method]
    base = paths[0] if has_base(method) else None
    sources = paths[1 : 1 + count_sources(found, len(paths) - 1)]
    return recipe_of(method, base, sources, parameters=parameters, **document)


def adds_up(plan: MergePlan) -> bool:
    """Return whether a merge depends on sums over whole tensors, which torch adds otherwise."""
    programs = programs_of_plan(plan, find_method(plan.method))
    return any(
        not {Op.SUM, Op.DOT}.isdisjoint(each.totals) for one in programs for each in one.rounds
    )


def plan_on(recipe: dict[str, Any], device: str = "cuda:0", workers: int = 2) -> MergePlan:
    planned = streammerge.plan(recipe, memory=MEMORY, workers=workers, device=device)
    assert isinstance(planned, MergePlan)
    return planned


def refuse_on_both(recipe: dict[str, Any], directory: Path) -> str:
    """Merge what is not finite on the CPU and on a device; return what both say of it."""
    said = []
    for device in ("cpu", "cuda:0"):
        with pytest.raises(NonFiniteError) as caught:
            streammerge.merge(plan_on(recipe, device), directory / device.replace(":", ""))
        said.append(str(caught.value))
    assert said[0] == said[1]
    return said[0]


def in_steps(plan: MergePlan, blocks: int) -> MergePlan:
    """Return a plan whose steps on the device have so many blocks."""
    assert plan.device is not None
    return replace(plan, device=replace(plan.device, step_numel=blocks * BLOCK))


def by_single_operations(plan: MergePlan) -> MergePlan:
    """Return a plan without fused kernels."""
    assert plan.device is not None
    return replace(plan, device=replace(plan.device, fused=False))


def check_close(found: Tensors, expected: Tensors) -> None:
    """Sums differ by some units in the last place of float64: mostly by nothing, and else a rounding."""
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0.01, atol=1e-5)


def check_equal(found: tuple[Tensors, Manifest], expected: tuple[Tensors, Manifest]) -> None:
    """Values, thresholds, densities and counts are the same."""
    assert_same_model(found[0], expected[0])
    assert found[1].tensors == expected[1].tensors


@pytest.mark.parametrize(("method", "parameters", "dtype"), CASES)
def test_every_method_has_the_bytes_of_the_cpu(
    method: str,
    parameters: dict[str, Any],
    dtype: torch.dtype,
    devices: MakeDevices,
    models: Models,
) -> None:
    paths = [models.write(each) for each in draw(dtype)]
    document = {"compute_dtype": "float64"} if dtype == torch.float64 else {}
    recipe = recipe_for(method, paths, parameters, **document)
    expected = models.merge(recipe, device="cpu", workers=1)
    backend = devices(eager=SCHEDULES["copies in run ahead"])["cuda:0"]
    plan = plan_on(recipe)

    check_equal(models.merge(plan), expected)
    inputs = len(plan.models)
    cuts = CUTS[method, repr(parameters), dtype]
    if "tight" in cuts:
        tight = in_steps(recut(plan, slots=inputs, workers=1, statistics_bytes=1), 1)
        found = models.merge(by_single_operations(tight))
        if adds_up(plan):
            check_close(found[0], expected[0])
        else:
            check_equal(found, expected)
    if "steps" in cuts:
        steps = in_steps(recut(plan, slots=4 * inputs, slot_blocks=3), 2)
        check_equal(models.merge(steps), expected)
    programs = programs_of_plan(plan, find_method(plan.method))
    computes_there = any(
        runs_on_device(task, programs, plan.settings, fused=plan.device.fused)
        for task in plan.tasks
    )
    assert (("run", COMPUTE) in backend.log) is computes_there


def test_fused_merges_ask_kernels_and_others_torch(
    devices: MakeDevices, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [models.write(each) for each in draw(torch.float32)]
    recipe = recipe_for("ties", paths, {"density": 0.3})
    devices()
    plan = plan_on(recipe)
    asked = {"kernels": 0, "torch": 0}

    def count(name: str, original: Callable[..., None]) -> Callable[..., None]:
        def counting(*arguments: Any) -> None:
            asked[name] += 1
            original(*arguments)

        return counting

    monkeypatch.setattr(FusedSteps, "rank", count("kernels", FusedSteps.rank))
    monkeypatch.setattr(Answers, "add_", count("torch", Answers.add_))
    models.merge(plan)
    assert asked["kernels"]
    assert not asked["torch"]
    asked["kernels"] = 0
    models.merge(by_single_operations(plan))
    assert asked["torch"]
    assert not asked["kernels"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0.3}),
        ("ties", {"density": 0.3, "scope": "model"}),
        ("dare_linear", {"density": 0.3}),
    ],
)
def test_no_schedule_of_the_streams_changes_a_byte(
    method: str,
    parameters: dict[str, Any],
    schedule: str,
    devices: MakeDevices,
    models: Models,
) -> None:
    paths = [models.write(each) for each in draw(torch.bfloat16)]
    recipe = recipe_for(method, paths, parameters)
    expected = models.merge(recipe, device="cpu")
    devices(eager=SCHEDULES[schedule])

    check_equal(models.merge(in_steps(plan_on(recipe), 1)), expected)


@pytest.mark.parametrize(
    ("schedule", "ignored"),
    [
        ("as late as may be", (COMPUTE, COPY_IN)),
        ("as late as may be", (COPY_OUT, COMPUTE)),
        ("copies in run ahead", (COPY_IN, COMPUTE)),
        ("copies out lag behind", (COMPUTE, COPY_OUT)),
    ],
)
def test_a_wait_that_is_left_out_is_noticed(
    schedule: str, ignored: tuple[int, int], devices: MakeDevices, models: Models
) -> None:
    """So the tests above would fail if the ring forgot one."""
    paths = [models.write(each) for each in draw(torch.float32)]
    recipe = recipe_for("task_arithmetic", paths, {})
    expected, _ = models.merge(recipe, device="cpu")
    devices(eager=SCHEDULES[schedule], ignored_waits=frozenset({ignored}))

    try:
        found, _ = models.merge(in_steps(plan_on(recipe, workers=1), 1))
    except (NonFiniteError, StageError):
        return
    assert not torch.equal(found["smooth"], expected["smooth"])


def test_copying_in_computing_and_copying_out_may_overlap(
    devices: MakeDevices, models: Models
) -> None:
    """The second step is copied in before the first is computed, and the host waits once a piece."""
    paths = [models.write({"w": each["smooth"]}) for each in draw(torch.float32)]
    backend = devices(eager=SCHEDULES["copies in run ahead"])["cuda:0"]
    models.merge(in_steps(plan_on(recipe_for("task_arithmetic", paths, {}), workers=1), 1))

    copies, steps = ("copy", COPY_IN), ("run", COMPUTE)
    first_step = backend.log.index(steps)
    assert backend.log[:first_step].count(copies) == 1 + 2 * len(paths)
    # Once for the piece, of five steps, and three times when the worker ends.
    assert backend.log.count(("synchronize", -1)) == 1 + 3
    assert backend.log.count(("copy", COPY_OUT)) == 5 + 2


def test_two_devices_share_the_chunks(devices: MakeDevices, models: Models) -> None:
    """The first work of each device waits for that of the other, so that neither is left out."""
    paths = [models.write(each) for each in draw(torch.float32)]
    recipe = recipe_for("ties", paths, {"density": 0.2})
    expected = models.merge(recipe, device="cpu")
    made = devices(meeting=threading.Barrier(2))
    plan = recut(plan_on(recipe, "cuda:0,cuda:1", workers=2), slots=24, workers=2)
    found = models.merge(plan)

    check_equal(found, expected)
    assert found[1].run.device == "cuda:0,cuda:1"
    assert all(("run", COMPUTE) in backend.log for backend in made.values())


def test_many_sources_are_added_in_the_order_of_the_cpu(
    devices: MakeDevices, models: Models
) -> None:
    paths = [models.write({"w": each["smooth"]}) for each in draw(torch.float32, sources=7)]
    recipe = recipe_for("task_arithmetic", paths, {"weight": 1 / 7})
    expected, _ = models.merge(recipe, device="cpu")
    devices()
    plan = plan_on(recipe)

    assert_same_model(models.merge(plan)[0], expected)
    for blocks in (1, 2):
        again, _ = models.merge(in_steps(recut(plan, slots=16, slot_blocks=blocks), blocks))
        assert_same_model(again, expected)


def test_values_that_are_not_finite_are_counted_and_let_through(
    devices: MakeDevices, models: Models
) -> None:
    drawn = draw(torch.float32)
    for each in drawn:
        flat = each["smooth"]
        flat[::1009], flat[5::1013], flat[7::1019] = float("nan"), float("inf"), -float("inf")
    paths = [models.write(each) for each in drawn]
    parameters = {"density": 0.3}
    for more in ({}, {"scope": "model"}):
        recipe = recipe_for("ties", paths, parameters | more, non_finite="keep")
        expected, manifest = models.merge(recipe, device="cpu")
        devices()
        found, again = models.merge(in_steps(plan_on(recipe), 2))

        assert again.tensors == manifest.tensors
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_as_on_the_cpu(
    value: float, scope: str, devices: MakeDevices, models: Models
) -> None:
    drawn = draw(torch.float32)
    drawn[2]["smooth"][3 * BLOCK + 5] = value
    paths = [models.write(each) for each in drawn]
    recipe = recipe_for("ties", paths, {"density": 0.3, "scope": scope})
    devices()
    messages = []
    for device in ("cpu", "cuda:0"):
        with pytest.raises(NonFiniteError) as caught:
            models.merge(recipe, device=device, workers=1)
        messages.append(str(caught.value))

    assert messages[0] == messages[1]
    assert "smooth" in messages[0]


def test_a_result_beyond_its_type_is_named_as_on_the_cpu(
    devices: MakeDevices, models: Models
) -> None:
    drawn = draw(torch.float32)
    drawn[1]["smooth"][2 * BLOCK] = 1e6
    paths = [models.write(each) for each in drawn]
    recipe = recipe_for("task_arithmetic", paths, {}, output={"dtype": "float16"})
    devices()

    with pytest.raises(NonFiniteError, match=r"smooth: the merged value .* exceeds 65504"):
        models.merge(recipe, device="cuda:0")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16", "float32"])
def test_other_output_types_are_rounded_alike(
    dtype: str, devices: MakeDevices, models: Models
) -> None:
    paths = [models.write(each) for each in draw(torch.bfloat16)]
    recipe = recipe_for("ties", paths, {"density": 0.3}, output={"dtype": dtype})
    out = models.new_output()
    streammerge.merge(recipe, out, memory=MEMORY, device="cpu")
    devices()
    other = models.new_output()
    streammerge.merge(recipe, other, memory=MEMORY, device="cuda:0")

    for shard in out.glob("*.safetensors"):
        assert shard.read_bytes() == (other / shard.name).read_bytes()


# -- memory and faults


def test_a_plan_states_what_the_device_is_asked_for(devices: MakeDevices, models: Models) -> None:
    paths = [models.write(each) for each in draw(torch.float32)]
    for method, parameters in (("ties", {"density": 0.3}), ("dare_ties", {"density": 0.3})):
        backend = devices()["cuda:0"]
        plan = plan_on(recipe_for(method, paths, parameters), workers=1)
        _, manifest = models.merge(plan)
        assert plan.device is not None
        shape = plan_step(
            plan, find_method(method), plan.device.step_numel, fused=plan.device.fused
        )
        assert shape is not None

        stated = shape.device_bytes + plan.device.kept_pieces * shape.piece_bytes
        assert 0 < backend.peak + backend.temporary <= stated <= plan.device.peak
        # Not far below either: what is stated is what is needed.
        assert backend.peak + backend.temporary > stated // 3
        assert manifest.run.measured_device_memory == backend.peak
        assert manifest.run.projected_device_memory == plan.device.peak
        # Triton's interpreter leaves circles behind, with what they were given.
        gc.collect()
        assert backend.used == 0


def test_one_refusal_of_device_memory_is_met_with_smaller_steps(
    devices: MakeDevices, models: Models
) -> None:
    paths = [models.write(each) for each in draw(torch.float32)]
    recipe = recipe_for("ties", paths, {"density": 0.2})
    expected = models.merge(recipe, device="cpu")
    backend = devices()["cuda:0"]
    plan = in_steps(plan_on(recipe, workers=1), 4)
    backend.capacity = 24 * 2**20

    check_equal(models.merge(plan), expected)
    assert backend.refusals == backend.trims == 1


def test_a_second_refusal_ends_with_the_budget_error(devices: MakeDevices, models: Models) -> None:
    paths = [models.write(each) for each in draw(torch.float32)]
    recipe = recipe_for("ties", paths, {"density": 0.2})
    expected, _ = models.merge(recipe, device="cpu")
    backend = devices()["cuda:0"]
    plan = plan_on(recipe, workers=1)
    backend.capacity = 2**20
    out = models.new_output()

    with pytest.raises(MemoryBudgetError, match=r"cuda:0 ran out of memory twice.*--resume"):
        streammerge.merge(plan, out)
    assert backend.refusals == 2
    streammerge.merge(recipe, out, memory=MEMORY, device="cpu", resume=True)
    assert_same_model(load_model(out), expected)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize("lost_after", [1, 14, 30])
def test_a_lost_device_ends_the_merge_which_resumes_elsewhere(
    lost_after: int, device: str, devices: MakeDevices, models: Models
) -> None:
    paths = [models.write(each) for each in draw(torch.bfloat16)]
    recipe = recipe_for("ties", paths, {"density": 0.2})
    expected, _ = models.merge(recipe, device="cpu")
    made = devices()
    made["cuda:0"].lost_after = lost_after
    plan = in_steps(recut(plan_on(recipe), slots=24), 1)
    out = models.new_output()

    with pytest.raises(DeviceLostError, match=r"cuda:0 failed: CUDA error.*--resume"):
        streammerge.merge(plan, out)
    assert not out.exists()
    streammerge.merge(recipe, out, memory=MEMORY, device=device, resume=True)
    assert_same_model(load_model(out), expected)
