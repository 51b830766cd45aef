"""What every engine must do, asked of any: ``on`` is what ``--on`` is given."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from clusters import bytes_of, has_work, start_merge, units, wait_until
from models import MEMORY, write_model

import streammerge
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.checkpoint.verifying import verify_files
from streammerge.errors import NonFiniteError, ResumeError
from streammerge.executors.driving import merge_on
from streammerge.statistics import BLOCK

BUDGET = "700MiB"
"""Of each process, in tests that start some."""


def check_same_bytes(on: str, recipe: dict[str, Any], place: Path) -> None:
    """Merge on two workers of a thread each, as one process does."""
    alone = streammerge.merge(recipe, place / "alone", memory=MEMORY)

    manifest = merge_on(recipe, place / "out", on=on, memory=MEMORY)

    assert bytes_of(place / "out") == bytes_of(place / "alone")
    assert manifest.tensors == alone.tensors
    assert not verify_files(place / "out").damages
    assert not list(place.glob("out.*"))
    assert [part.part for part in manifest.run.parts] == [1, 2]
    # Each process keeps to what it was allowed.
    assert all(part.workers == 1 for part in manifest.run.parts)
    assert all(0 < part.measured_memory <= part.memory_budget for part in manifest.run.parts)


def check_one_error(on: str, recipe: dict[str, Any], place: Path) -> None:
    """Merge a model of which the second of two parts is bad: one error, in the words of a merge."""
    bad = {f"{i}": torch.zeros(8 * BLOCK) for i in range(8)}
    bad["5"][7] = float("nan")
    write_model(place / "two", bad)

    process = start_merge(recipe, place / "out", "--on", on, "--memory", BUDGET)
    _, said = process.communicate(timeout=120)

    assert process.returncode == 1
    assert said.count("NonFiniteError") == 1, said
    assert "part 2/2, on " in said
    assert "Traceback" not in said
    assert "raylet" not in said
    assert not (place / "out").exists()
    with pytest.raises(NonFiniteError):
        merge_on(recipe, place / "out", on=on, memory=MEMORY)


def check_other_version(on: str, recipe: dict[str, Any], place: Path) -> None:
    """Merge on a worker of another version."""
    with pytest.raises(ResumeError, match=r"versions streammerge was .*, is 9\.9") as caught:
        merge_on(recipe, place / "out", on=on, memory=MEMORY)

    assert any("part 1/1, on " in note for note in caught.value.__notes__)


def start_and_wait(on: str, recipe: dict[str, Any], out: Path) -> subprocess.Popen[str]:
    """Start a merge on slow workers, and wait until something of it is safely on the disk."""
    process = start_merge(recipe, out, "--on", on, "--memory", BUDGET)
    wait_until(lambda: has_work(out))
    return process


def check_done_again(
    process: subprocess.Popen[str], out: Path, alone: Path, seconds: float
) -> None:
    """Wait for a merge of which a part was lost: it was done again, with the bytes of one process."""
    _, said = process.communicate(timeout=seconds)

    assert process.returncode == 0, said
    assert bytes_of(out) == bytes_of(alone)
    run = json.loads((out / MANIFEST_NAME).read_text())["run"]
    assert max(part["attempts"] for part in run["parts"]) >= 2


def check_driver_that_ends(on: str, number: int, recipe: dict[str, Any], place: Path) -> None:
    """End a driver in the middle of its work by a signal: nobody works on, and a resume reads less."""
    alone = streammerge.merge(recipe, place / "alone", memory=MEMORY)
    out = place / "out"
    process = start_and_wait(on, recipe, out)

    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode in {-number, 130}, said
    # Parts look after their driver every few seconds.
    wait_until(lambda: not units(), 30)
    manifest = streammerge.merge(recipe, out, memory=MEMORY, resume=True)

    assert bytes_of(out) == bytes_of(place / "alone")
    assert manifest.run.bytes_by_stage["read"] < alone.run.bytes_by_stage["read"]
