"""Whole matrices are decomposed on a device as on the CPU, within the memory that the plan states."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_backend import MakeDevices
from models import BLOCK, MEMORY, Models, Tensors, assert_same_model, load_model, recipe_of, recut

import streammerge
from streammerge.cli.arguments import main
from streammerge.engine.accelerator.matrices import MatrixBench, MatrixWork
from streammerge.errors import DeviceLostError, MemoryBudgetError
from streammerge.methods import discover_methods
from streammerge.plan import device_matrices
from streammerge.plan.device_matrices import (
    MOST_NUMEL,
    STAGE_BYTES,
    goes_to_device,
    matrix_bytes,
)
from streammerge.plan.types import MergePlan

LEAST = 128
"""In place of the least side of a matrix for a device: much larger ones take long on a core."""
SHAPES: dict[str, tuple[int, ...]] = {
    "wide": (130, 2100),
    "tall": (2300, LEAST),
    "thin": (LEAST - 1, 3000),  # its smaller side is a core's work
    "small": (9, 7),
    "line": (BLOCK + 5,),  # no matrix
}
ON_DEVICE = ("wide", "tall")
LARGEST = 2300 * LEAST
METHODS = [
    ("tsv_m", {}),
    ("tsv_m", {"lambda": 0.5}),
    ("iso_c", {}),
    ("iso_cts", {"common_space_fraction": 0.5}),
]


@pytest.fixture(autouse=True)
def least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_matrices, "LEAST_SIDE", LEAST)


def draw(shapes: dict[str, tuple[int, ...]]) -> list[Tensors]:
    generator = torch.Generator().manual_seed(11)

    def values(scale: float) -> Tensors:
        return {n: torch.randn(s, generator=generator) * scale for n, s in shapes.items()}

    base = values(1.0)
    changes = [values(0.1) for _ in range(2)]
    return [base, *({name: base[name] + change[name] for name in base} for change in changes)]


def recipe_for(
    models: Models, method: str = "tsv_m", parameters: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    paths = [models.write(each) for each in draw(more.pop("shapes", SHAPES))]
    return recipe_of(method, paths[0], paths[1:], parameters=parameters or {}, **more)


def plan_on(recipe: dict[str, Any], device: str = "cuda:0", workers: int = 2) -> MergePlan:
    planned = streammerge.plan(recipe, memory=MEMORY, workers=workers, device=device)
    assert isinstance(planned, MergePlan)
    return planned


LARGEST_ERROR = 1e-12
"""Of the largest element of the change, in float64. Rounding comes to some 1e-14."""


def hadamard(size: int) -> torch.Tensor:
    """Return a matrix of +1 and -1 whose rows are orthogonal; the size is a power of two."""
    found = torch.ones(1, 1, dtype=torch.float64)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found


def known_tasks() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Return task matrices ``[256, 4096]``, and what methods make of them, without any rounding.

    Singular vectors are rows of 1/16 and 1/64 with either sign, and no two tasks share one: so the
    tasks' parts are orthogonal already, and in sum all are left.
    """
    left, right = hadamard(256) / 16, hadamard(4096)[:256] / 64
    values = torch.arange(256, 0, -1, dtype=torch.float64)
    own = (slice(0, 256, 2), slice(1, 256, 2))
    tasks = [(left[:, each] * values[each]) @ right[each] for each in own]
    even = values.mean() * (left @ right)
    return tasks, {"tsv_m": tasks[0] + tasks[1], "iso_c": even, "iso_cts": even}


def error_of(method: str, device: str, models: Models) -> float:
    """Return the largest error of a merge of known matrices, relative to the largest change."""
    tasks, expected = known_tasks()
    zeros = torch.zeros_like(tasks[0])
    paths = [models.write({"w": each}) for each in (zeros, *tasks)]
    recipe = recipe_of(method, paths[0], paths[1:], parameters={}, compute_dtype="float64")
    found, _ = models.merge(recipe, device=device)
    assert found["w"].dtype == torch.float64
    error = (found["w"] - expected[method]).abs().max() / expected[method].abs().max()
    return float(error)


@pytest.mark.parametrize(("method", "parameters"), METHODS)
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_a_merge_has_the_values_of_the_cpu(
    method: str, parameters: dict[str, Any], compute: str, devices: MakeDevices, models: Models
) -> None:
    """Equal here, where the fake device is the CPU; and they depend on no cut, nor on who gathers."""
    recipe = recipe_for(models, method, parameters, compute_dtype=compute)
    expected, _ = models.merge(recipe, device="cpu")
    backend = devices()["cuda:0"]
    plan = plan_on(recipe)

    assert_same_model(models.merge(plan)[0], expected)
    assert plan.device is not None
    assert plan.device.matrices == len(ON_DEVICE)
    # One more, which loads the library.
    assert sum(kind == "waiting" for kind, _ in backend.log) == len(ON_DEVICE) + 1
    streamed = recut(plan, slots=len(plan.models), workers=1)
    assert_same_model(models.merge(streamed)[0], expected)


def test_every_method_that_says_it_decomposes_does_so_where_the_vectors_lie(
    devices: MakeDevices,
) -> None:
    """The fake device refuses operands and results of the host."""
    backend = devices()["cuda:0"]
    shape = (24, 15)
    methods = discover_methods()
    found = [
        methods[name].work(methods[name].bind(({"lambda": 1.0} | parameters).items()))
        for name, parameters in METHODS
    ]
    assert all(work.decomposes for work in found)
    for work in found:
        for fill in (0.0, 1.0):
            memory = backend.allocate(2 * 24 * 15 * 8).view(torch.float64).view(2, *shape)
            memory.normal_().mul_(fill)
            assert work.whole is not None
            with backend.computing():
                made = work.whole(memory.unbind())
            assert made.shape == shape
            assert made.dtype == torch.float64


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_the_error_is_a_few_units_of_float64(
    method: str, device: str, devices: MakeDevices, models: Models
) -> None:
    devices()
    assert error_of(method, device, models) < LARGEST_ERROR


def test_two_devices_share_the_matrices(devices: MakeDevices, models: Models) -> None:
    recipe = recipe_for(models)
    expected, _ = models.merge(recipe, device="cpu")
    made = devices(meeting=threading.Barrier(2))
    plan = plan_on(recipe, "cuda:0,cuda:1", workers=2)

    assert_same_model(models.merge(plan)[0], expected)
    assert all(backend.peak for backend in made.values())


# -- memory


@pytest.mark.parametrize("shape", [(520, 530), SHAPES["wide"], SHAPES["tall"]], ids=str)
@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_a_plan_states_what_a_decomposition_takes(
    method: str,
    parameters: dict[str, Any],
    shape: tuple[int, int],
    devices: MakeDevices,
    models: Models,
) -> None:
    recipe = recipe_for(models, method, parameters, shapes={"w": shape})
    backend = devices()["cuda:0"]
    plan = plan_on(recipe)
    _, manifest = models.merge(plan)
    numel = shape[0] * shape[1]

    assert plan.device is not None
    assert plan.device.peak == plan.device.matrix_bytes == matrix_bytes(2, numel, 4)
    assert manifest.run.measured_device_memory == backend.peak
    assert manifest.run.projected_device_memory == plan.device.peak
    # Torch's part; what is left is cuSOLVER's, and was estimated.
    assert 3 * 4 + 3 * 8 < backend.peak / numel <= 3 * 4 + 9 * 8
    assert backend.used == 0


def test_too_little_device_memory_is_refused_with_the_matrix_and_what_would_do(
    devices: MakeDevices, models: Models
) -> None:
    devices()
    recipe = recipe_for(models)

    def attempt(size: str) -> MergePlan:
        planned = streammerge.plan(recipe, memory=MEMORY, device="cuda:0", device_memory=size)
        assert isinstance(planned, MergePlan)
        return planned

    with pytest.raises(MemoryBudgetError, match=r"to decompose tall \[2300, 128\]") as caught:
        attempt("100MiB")
    least = str(caught.value).split("give --device-memory ")[1].split()[0]
    found = attempt(least)
    assert found.device is not None
    assert found.device.peak <= found.device.budget
    with pytest.raises(MemoryBudgetError):
        attempt(f"{int(least.removesuffix('MiB')) - 1}MiB")


def test_what_goes_there_is_decided_by_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert goes_to_device((512, 512))
    assert not goes_to_device((511, 4000))
    assert not goes_to_device((4000, 511))
    assert not goes_to_device((512, 512, 1))
    assert not goes_to_device((BLOCK,))
    assert not goes_to_device((512, MOST_NUMEL // 512 + 1))


def test_a_plan_says_how_many_matrices_are_decomposed_there(
    devices: MakeDevices, models: Models
) -> None:
    devices()
    told = str(plan_on(recipe_for(models)))

    assert "2 matrices are decomposed there, the largest in " in told
    assert "in steps of" not in told


def test_a_host_pays_for_what_the_libraries_take(devices: MakeDevices, models: Models) -> None:
    devices()
    recipe = recipe_for(models)
    other = recipe | {"method": "task_arithmetic"}

    growth = plan_on(recipe).memory.growth - plan_on(other).memory.growth
    assert growth >= 2 * STAGE_BYTES


# -- faults


def test_one_refusal_is_met_by_giving_back_what_is_unused(
    devices: MakeDevices, models: Models
) -> None:
    recipe = recipe_for(models)
    expected, _ = models.merge(recipe, device="cpu")
    backend = devices()["cuda:0"]
    plan = plan_on(recipe)
    backend.unused = backend.capacity - 8 * 2**20

    assert_same_model(models.merge(plan)[0], expected)
    assert backend.refusals == 1
    assert backend.used == 0


def test_a_second_refusal_ends_with_the_budget_error(devices: MakeDevices, models: Models) -> None:
    recipe = recipe_for(models)
    expected, _ = models.merge(recipe, device="cpu")
    backend = devices()["cuda:0"]
    plan = plan_on(recipe, workers=1)
    backend.capacity = 8 * 2**20
    out = models.new_output()

    with pytest.raises(
        MemoryBudgetError, match=r"ran out of memory twice with (wide|tall).*--resume"
    ):
        streammerge.merge(plan, out)
    assert backend.refusals == 2
    streammerge.merge(recipe, out, memory=MEMORY, device="cpu", resume=True)
    assert_same_model(load_model(out), expected)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize("lost_after", [0, 1, 2])
def test_a_lost_device_ends_the_merge_which_resumes_elsewhere(
    lost_after: int, device: str, devices: MakeDevices, models: Models
) -> None:
    recipe = recipe_for(models)
    expected, _ = models.merge(recipe, device="cpu")
    devices()["cuda:0"].lost_after = lost_after
    out = models.new_output()

    with pytest.raises(DeviceLostError, match=r"cuda:0 failed: CUDA error.*--resume"):
        streammerge.merge(plan_on(recipe), out)
    assert not out.exists()
    streammerge.merge(recipe, out, memory=MEMORY, device=device, resume=True)
    assert_same_model(load_model(out), expected)


def test_other_errors_are_those_of_the_cpu(devices: MakeDevices) -> None:
    backend = devices()["cuda:0"]
    bench = MatrixBench(backend, threading.Lock(), "go on")

    def fail(_given: object, _made: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bench.run(MatrixWork("w", 1, [], [], fail))
    assert backend.used == 0


# -- what looks at the result


def test_verify_and_a_report_have_the_device_too(
    devices: MakeDevices, models: Models, tmp_path: Path
) -> None:
    recipe = recipe_for(models)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    backend = devices()["cuda:0"]
    out = tmp_path / "out"
    manifest = streammerge.merge(recipe, out, memory=MEMORY, device="cuda:0", report=True)
    ran = len(backend.log)

    assert manifest.run.device == "cuda:0"
    assert (out / "streammerge_report.json").exists()
    options = ["--against", str(tmp_path / "recipe.json"), "--sample", "1", "--memory", MEMORY]
    assert main(["verify", str(out), *options, "--quiet", "--device", "cuda:0"]) == 0
    assert len(backend.log) > ran


def test_the_fake_device_refuses_what_a_real_one_would(devices: MakeDevices) -> None:
    """So that the tests above would fail if something lay in the host's memory."""
    backend = devices()["cuda:0"]
    there = backend.allocate(32).view(torch.float64).view(2, 2)
    here = torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="add of host memory"), backend.computing():
        there + here
    with pytest.raises(AssertionError, match="of the host"), backend.computing():
        torch.zeros(2, 2)
    with backend.computing():
        there.zero_()
        there @ there + 1.5
