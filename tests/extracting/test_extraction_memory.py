"""What an extraction takes stays within what its plan says, and a budget too small is named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import Models

RUNNER = """
import json, sys, threading, time
from streammerge import extract
from streammerge.engine.memory import resident_memory
peak, plans, ended = [0], [], threading.Event()
def watch():
    while not ended.wait(0.002):
        peak[0] = max(peak[0], resident_memory())
watcher = threading.Thread(target=watch)
watcher.start()
try:
    extract(*sys.argv[1:4], rank=24, on_plan=plans.append, **json.loads(sys.argv[4]))
finally:
    ended.set()
    watcher.join()
print(json.dumps({"peak": peak[0], "planned": plans[0].peak_memory, "workers": plans[0].workers}))
"""


@pytest.fixture
def pair(models: Models) -> tuple[Path, Path]:
    made = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        shapes = {f"layers.{i}.w.weight": (1100, 2300) for i in range(3)}
        shapes |= {"layers.0.tall.weight": (5000, 900), "norm.weight": (3_000_000,)}
        tensors = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
        made.append(models.write(tensors))
    return made[0], made[1]


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"workers": 1, "dtype": "bfloat16"}])
def test_measured_peak_stays_within_the_plan(
    options: dict[str, object], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = [*map(str, pair), str(tmp_path / "out"), json.dumps(options)]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["peak"] <= measured["planned"], measured


def test_the_budget_that_a_refusal_names_is_enough(pair: tuple[Path, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streammerge", "extract", *map(str, pair)]
    command += [str(tmp_path / "out"), "--rank", "24", "--quiet", "--memory"]
    refused = subprocess.run([*command, "200MiB"], capture_output=True, text=True, check=False)
    assert refused.returncode == 3
    named = re.search(r"--memory (\w+) or more", refused.stderr)
    assert named is not None

    done = subprocess.run([*command, named[1]], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
