"""``doctor`` says what is here, and what is not and why; probes move what they say and leave nothing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from models import Models, recipe_of

from streammerge.checkpoint.types import ShardFile
from streammerge.cli import doctor, probing
from streammerge.cli.arguments import main
from streammerge.native import library
from streammerge.units import MIB
from streammerge.version import VERSION


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probing, "_MOST", 2 * MIB)
    monkeypatch.setattr(probing, "_REQUEST", MIB)
    return tmp_path


def test_it_says_what_is_here(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["streammerge"] == VERSION
    assert found["versions"]["numpy"] == np.__version__
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert (found["kernels"] is None) == (library.load_kernels() is None)
    assert (found["kernels"] is None) == (found["why_no_kernels"] is not None)
    assert bool(found["devices"]) == torch.cuda.is_available()
    assert 0 < found["budget"] <= found["memory"]
    assert found["read_per_second"] > 0
    assert found["write_per_second"] > 0
    assert list(here.iterdir()) == []


def test_people_read_the_same(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0

    said = capsys.readouterr().out
    rows = [line.split(maxsplit=1)[0] for line in said.splitlines()]
    first = ["versions", "system", "kernels", "devices", "auto", "memory", "limits", "disk"]
    assert rows[:8] == first
    assert re.search(r"^disk +\.: reads .*/s, writes .*/s, by a short probe$", said, re.MULTILINE)


def test_the_disk_is_left_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here.chmod(0o500)

    assert main(["doctor", "--no-probe"]) == 0

    assert re.search(r"^disk +not tried$", capsys.readouterr().out, re.MULTILINE)


def test_a_disk_that_cannot_be_tried_is_named_among_what_is_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "--directory", "no/such"]) == 0

    printed = capsys.readouterr().out
    assert re.search(r"^disk +no/such: cannot be written in", printed, re.MULTILINE)
    assert re.search(r"^versions +streammerge", printed)


def test_it_says_why_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(library.SWITCH, "0")
    switched_off = doctor.examine(None)
    monkeypatch.delenv(library.SWITCH)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    missing = doctor.examine(None)
    (tmp_path / "_kernels.so").write_bytes(b"no library")
    damaged = doctor.examine(None)

    assert switched_off.why_no_kernels == "switched off by STREAMMERGE_NATIVE=0"
    assert missing.why_no_kernels is not None
    assert missing.why_no_kernels.startswith("not compiled")
    assert damaged.why_no_kernels is not None
    assert "_kernels.so: " in damaged.why_no_kernels
    assert all("several times slower" in " ".join(each.advice) for each in (missing, damaged))


def test_a_library_that_cannot_be_loaded_does_not_hide_one_that_can(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = library.load_kernels()
    if found is None:
        pytest.skip("no compiler was found at installation")
    first, last = library.EXTENSION_SUFFIXES[-1], library.EXTENSION_SUFFIXES[0]
    (tmp_path / f"_kernels{first}").write_bytes(b"no library")
    (tmp_path / f"_kernels{last}").write_bytes(found.path.read_bytes())
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))

    assert isinstance(library.find_kernels(), library.Kernels)


def test_libraries_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name in {"torch", "blake3", "huggingface_hub"}:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    requires = ["torch>=2.4", "blake3>=1.0", "numpy>=1.26", 'huggingface_hub>=0.34; extra == "hub"']
    monkeypatch.setattr(importlib.metadata, "version", without)
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: requires)

    found = doctor.examine(None)

    assert found.versions["torch"] is None
    assert found.why_no_devices == "torch is not installed"
    assert doctor.Extra("hub", ("huggingface_hub",)) in found.extras
    install, torch_is_missing = found.advice[:2]
    assert install.endswith("pip install blake3")
    assert torch_is_missing.startswith("torch is missing")


def test_a_probe_reads_and_writes_what_it_says(here: Path) -> None:
    file = here / "file"
    file.write_bytes(os.urandom(5 * MIB))

    read, written = probing.probe_reading(file), probing.probe_writing(here)

    assert read.nbytes == written.nbytes == 2 * MIB
    assert list(here.iterdir()) == [file]


def test_small_and_empty_files_have_a_rate(here: Path) -> None:
    (here / "small").write_bytes(b"12345")
    (here / "empty").write_bytes(b"")

    assert probing.probe_reading(here / "small").nbytes == 5
    assert probing.probe_reading(here / "empty").per_second > 0


def test_an_estimate_is_the_longer_of_reading_and_writing(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "large").write_bytes(b"1" * 100)
    (here / "small").write_bytes(b"1")
    asked = []

    def read(path: Path) -> probing.Rate:
        asked.append(path.name)
        return probing.Rate(200, 2.0)

    monkeypatch.setattr(probing, "probe_reading", read)
    monkeypatch.setattr(probing, "probe_writing", lambda _: probing.Rate(50, 1.0))
    sizes = {"small": 1, "large": 100, "absent": 1000}
    files = [ShardFile(here / name, nbytes, 0, "") for name, nbytes in sizes.items()]

    slow_reads = probing.estimate_seconds(
        files, bytes_to_read=1000, bytes_to_write=100, directory=here
    )
    slow_writes = probing.estimate_seconds(
        files, bytes_to_read=10, bytes_to_write=100, directory=here
    )
    nothing_read = probing.estimate_seconds([], bytes_to_read=0, bytes_to_write=100, directory=here)

    assert [each.seconds for each in (slow_reads, slow_writes, nothing_read)] == [10.0, 2.0, 2.0]
    assert asked == ["large", "large"]


def test_a_plan_says_how_long_the_disk_will_take(
    here: Path, models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [models.write({"a": torch.randn(300, 300)}) for _ in range(2)]
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe_of("linear", None, sources)))
    before = sorted(here.iterdir())

    assert main(["plan", "recipe.yaml", "--estimate"]) == 0
    said = capsys.readouterr().out
    assert main(["plan", "recipe.yaml"]) == 0
    said_without = capsys.readouterr().out

    assert re.search(r"^time +at least \d+\.\d s: the disk reads .*/s, writes ", said, re.MULTILINE)
    assert "\ntime " not in said_without
    assert sorted(here.iterdir()) == before
