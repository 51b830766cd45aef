"""Which device is meant, what is refused and with which exit code, what a plan says of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from fake_backend import MakeDevices
from models import BLOCK, MEMORY, Models, recipe_of

import streammerge
from streammerge.cli.arguments import main
from streammerge.engine.accelerator.opening import choose_devices
from streammerge.engine.accelerator.stage import AcceleratorStage
from streammerge.errors import DeviceError, MemoryBudgetError
from streammerge.plan.codec import dump_plan, parse_plan
from streammerge.plan.types import MergePlan


@pytest.fixture
def recipe(models: Models, tmp_path: Path) -> str:
    paths = [models.write({"w": torch.arange(2.0 * BLOCK) + n}) for n in range(3)]
    path = tmp_path / "recipe.yaml"
    document = recipe_of("ties", paths[0], paths[1:], parameters={"density": 0.2})
    path.write_text(yaml.safe_dump(document))
    return str(path)


def run(recipe: str, *options: str) -> int:
    return main(["plan", recipe, "--memory", MEMORY, *options])


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("cpu", ()),
        ("auto", ()),
        ("cuda", ("cuda:0",)),
        ("cuda:1", ("cuda:1",)),
        ("cuda:1,cuda:0", ("cuda:1", "cuda:0")),
    ],
)
def test_devices_are_chosen_by_name(
    wanted: str, chosen: tuple[str, ...], devices: MakeDevices
) -> None:
    devices()

    assert choose_devices(wanted) == chosen


def test_without_a_word_the_device_is_the_cpu(recipe: str, devices: MakeDevices) -> None:
    devices()

    planned = streammerge.plan(recipe, memory=MEMORY)

    assert isinstance(planned, MergePlan)
    assert planned.device is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_torch_was_not_built_for_is_refused(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe, "--device", "cuda:0") == 2
    printed = capsys.readouterr().err
    assert "DeviceError: device: 'cuda:0', but " in printed
    assert "use --device cpu" in printed


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("gpu", 'expected "auto", "cpu", "cuda:0"'),
        ("cuda:x", 'expected "auto"'),
        ("cuda:-1", 'expected "auto"'),
        ("", 'expected "auto"'),
        ("cpu,cuda:0", 'expected "auto"'),
        ("cuda:0,cuda:0", "names a device twice"),
        ("cuda,cuda:0", "names a device twice"),
        ("cuda:3", "there is no cuda:3, only cuda:0 to cuda:1"),
        ("cuda:0,cuda:2", "there is no cuda:2"),
    ],
)
def test_a_device_that_is_none_is_a_usage_error(
    wanted: str,
    message: str,
    recipe: str,
    devices: MakeDevices,
    capsys: pytest.CaptureFixture[str],
) -> None:
    devices()

    assert run(recipe, "--device", wanted) == 2
    assert message in capsys.readouterr().err


def test_too_little_device_memory_is_refused_with_the_least_that_would_do(
    recipe: str, devices: MakeDevices, capsys: pytest.CaptureFixture[str]
) -> None:
    devices()

    assert run(recipe, "--device", "cuda:0", "--device-memory", "1MiB") == 3
    said = capsys.readouterr().err
    assert "3 worker(s) need at least" in said
    least = said.split("give --device-memory ")[1].split()[0]
    assert run(recipe, "--device", "cuda:0", "--device-memory", least) == 0
    below = f"{int(least.removesuffix('MiB')) - 1}MiB"
    assert run(recipe, "--device", "cuda:0", "--device-memory", below) == 3


def test_a_plan_says_why_there_are_no_fused_kernels(
    recipe: str, devices: MakeDevices, capsys: pytest.CaptureFixture[str]
) -> None:
    devices(obstacle="Triton is not installed")

    assert run(recipe, "--device", "cuda:0") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "no fused kernels, for Triton is not installed: slower, and sums" in said
    assert "elements, by single operations" in said
    planned = streammerge.plan(recipe, memory=MEMORY, device="cuda:0")
    assert isinstance(planned, MergePlan)
    assert planned.device is not None
    assert not planned.device.fused


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("missing", "Triton is not installed"),
        ("raising", "Triton cannot compile for it: no C compiler"),
        (
            "fusing",
            "a kernel of Triton's computes 0.5 where each operation rounds to 0.00048828125",
        ),
    ],
)
def test_kernels_are_tried_before_a_plan_counts_on_them(
    broken: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streammerge.engine.accelerator.fused import kernels, opening

    def launch(_kernel: object, _instances: int, values: torch.Tensor) -> None:
        if broken == "raising":
            raise RuntimeError("no C compiler\nand more")
        values.fill_(0.5)

    if broken == "missing":
        monkeypatch.setattr(opening.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(kernels, "launch", launch)
    opening.why_not_fused.cache_clear()
    try:
        assert opening.why_not_fused(torch.device("cpu")) == said
    finally:
        opening.why_not_fused.cache_clear()


def test_a_plan_with_kernels_is_refused_where_there_are_none(
    recipe: str, devices: MakeDevices, tmp_path: Path
) -> None:
    devices()
    planned = streammerge.plan(recipe, memory=MEMORY, device="cuda:0")
    devices(obstacle="Triton is not installed")

    with pytest.raises(DeviceError, match="counts on fused kernels there, and Triton is not"):
        streammerge.merge(planned, tmp_path / "out")


def test_a_kernel_that_rounds_is_taken() -> None:
    from streammerge.engine.accelerator.fused.opening import why_not_fused

    assert why_not_fused(torch.device("cuda" if torch.cuda.is_available() else "cpu")) is None


def test_a_device_that_is_full_is_refused(recipe: str, devices: MakeDevices) -> None:
    devices(capacity=2**20)

    with pytest.raises(MemoryBudgetError, match=r"only 1\.0 MiB are free there"):
        streammerge.plan(recipe, memory=MEMORY, device="cuda:0")


def test_device_memory_needs_a_device(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--device", "cpu"], []):
        assert run(recipe, *words, "--device-memory", "1GiB") == 2
        assert "DeviceError: device_memory: the device is the cpu" in capsys.readouterr().err


def test_a_plan_says_what_the_device_takes_and_survives_json(
    recipe: str, devices: MakeDevices, capsys: pytest.CaptureFixture[str]
) -> None:
    devices()
    assert run(recipe, "--device", "cuda:0,cuda:1", "--device-memory", "1GiB") == 0
    said = capsys.readouterr().out
    assert "device       cuda:0, cuda:1: up to " in said
    assert re.search(r"the inputs of \d+ chunks stay there until they are merged", said)
    planned = streammerge.plan(recipe, memory=MEMORY, device="cuda:0", device_memory="1GiB")

    assert isinstance(planned, MergePlan)
    assert parse_plan(dump_plan(planned)) == planned
    assert planned.device is not None
    assert planned.device.peak <= planned.device.budget == 2**30


def test_the_host_pays_for_what_comes_back(recipe: str, devices: MakeDevices) -> None:
    devices()
    on_cpu = streammerge.plan(recipe, memory=MEMORY, device="cpu", workers=3)
    on_device = streammerge.plan(recipe, memory=MEMORY, device="cuda:0", workers=3)

    assert isinstance(on_cpu, MergePlan)
    assert isinstance(on_device, MergePlan)
    assert on_device.memory.scratch > on_cpu.memory.scratch
    assert on_device.memory.growth > on_cpu.memory.growth


def test_a_plan_brings_its_device(recipe: str, devices: MakeDevices, tmp_path: Path) -> None:
    devices()
    planned = streammerge.plan(recipe, memory=MEMORY)

    with pytest.raises(ValueError, match="already says what memory, workers and device"):
        streammerge.merge(planned, tmp_path / "out", device="cpu")


def test_small_tensors_stay_on_the_cpu(
    devices: MakeDevices, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    backend = devices()["cuda:0"]
    monkeypatch.setattr(AcceleratorStage, "_attempt", refuse)
    paths = [models.write({"a": torch.ones(BLOCK) * n, "b": torch.ones(3)}) for n in range(3)]
    recipe = recipe_of("ties", paths[0], paths[1:], parameters={"density": 0.2})
    models.merge(recipe, device="cuda:0")

    assert not backend.log


def test_verify_merges_again_on_the_device_that_is_asked_for(
    recipe: str, devices: MakeDevices, tmp_path: Path
) -> None:
    backend = devices()["cuda:0"]
    out = tmp_path / "out"
    streammerge.merge(recipe, out, memory=MEMORY, device="cpu")
    assert not backend.log
    options = ["--against", recipe, "--sample", "1", "--memory", MEMORY, "--quiet"]

    assert main(["verify", str(out), *options, "--device", "cuda:0"]) == 0
    assert backend.log


def test_combining_adapters_refuses_a_device(devices: MakeDevices, tmp_path: Path) -> None:
    devices()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
    recipe = {"method": "cat", "sources": [{"path": str(adapter)}] * 2}

    with pytest.raises(DeviceError, match="cat of adapters is computed on the cpu"):
        streammerge.plan(recipe, device="cuda:0")
