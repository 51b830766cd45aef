"""benchmarks/gpu.py: what is run and reported; nothing here needs a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import write_model

pytest.importorskip("benchmarks", reason="needs the project's root on the path")

from benchmarks import bus, gpu
from benchmarks.jobs import FEW, METHODS, Job
from benchmarks.models import Models
from streammerge.engine.accelerator.opening import count_devices


@pytest.fixture
def job(tmp_path: Path) -> Job:
    tensors = {"a": torch.zeros(1000).bfloat16()}
    paths = [write_model(tmp_path / f"model-{index}", tensors) for index in range(3)]
    return Job(METHODS["ties"], Models("0.15B", paths[0], tuple(paths[1:])))


def test_every_contender_is_told_its_device(job: Job, tmp_path: Path) -> None:
    options = gpu.parse_arguments(["--device", "cuda:1"])
    commands = {
        contender.name: contender.command(job, tmp_path / "job.json", tmp_path / "out")
        for contender in gpu.on_device(options, tmp_path)
    }

    assert list(commands) == ["streammerge", "streammerge cpu", "mergekit", "floor"]
    assert commands["streammerge"][-4:] == ["--device", "cuda:1", "--device-memory", "2GiB"]
    assert commands["streammerge cpu"][-2:] == ["--device", "cpu"]
    assert "--cuda" in commands["mergekit"]


def test_both_sizes_both_caches_and_few_methods_are_measured_unless_told_otherwise() -> None:
    options = gpu.parse_arguments([])

    assert options.sizes == ["1.1B", "8B"]
    assert options.caches == ["warm", "cold"]
    assert options.methods == list(FEW)


def test_the_bus_copies_every_byte() -> None:
    sizes = bus.count_copies(3 * bus.BUFFER_NBYTES + 5)

    assert sizes == [bus.BUFFER_NBYTES] * 3 + [5]
    assert bus.count_copies(0) == []


def test_warming_reads_every_byte(job: Job) -> None:
    files = [file for model in job.inputs for file in model.glob("*.safetensors")]

    assert gpu.read_all(files) == sum(file.stat().st_size for file in files) > 6000


def test_the_time_is_set_beside_that_of_the_bus() -> None:
    own = {"failure": None, "wall_seconds": 3.0}
    result = {"contenders": {"streammerge": own}, "bus_seconds": 2.0}

    assert gpu.render_bus(result) == "  bus alone: 2.00 s; streammerge takes 1.50 of it"
    own["failure"] = "killed"
    assert gpu.render_bus(result) == "  bus alone: 2.00 s"


@pytest.mark.skipif(count_devices() > 0, reason="there is a CUDA device here")
def test_without_a_device_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--work", str(tmp_path / "work")]) == 2
    assert capsys.readouterr().err.startswith("cuda:0 cannot be used: ")
    assert not (tmp_path / "work").exists()
