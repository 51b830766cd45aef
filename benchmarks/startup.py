"""Measures how long commands and imports take to start, files in the page cache.

    python -m benchmarks.startup

Medians of several runs, taken in turns. ``inspect`` and ``plan`` look at a tiny model, so that
starting is all there is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import environment
from benchmarks.models import RESULTS, ROOT
from benchmarks.reporting import align

TINY = {"hidden": 64, "layers": 2, "intermediate": 96, "vocab": 500, "heads": 4, "kv-heads": 2}
"""Shape of the model that is looked at."""


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write what the command line asks for and return the exit code."""
    summary = (__doc__ or "").split("\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=summary)
    parser.add_argument("--runs", type=int, default=10, help="runs of every command")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the results")
    options = parser.parse_args(arguments)
    environment.compile_modules()
    with tempfile.TemporaryDirectory() as directory:
        commands = prepare_commands(Path(directory))
        seconds = time_commands(commands, runs=options.runs)
    print(render_times(seconds))
    commit, dirty = environment.commit()
    results = {
        "format": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "runs": options.runs,
        "machine": environment.machine_facts(ROOT),
        "versions": {"project": environment.own_versions()},
        "seconds": seconds,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    place = options.results / f"startup-{commit}{'-dirty' if dirty else ''}.json"
    place.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written to {place}")
    return 0


def prepare_commands(directory: Path) -> dict[str, list[str]]:
    """Make a tiny base with two fine-tunes, and return the commands to measure by name."""
    models = directory / "models"
    make = [sys.executable, str(ROOT / "scripts" / "make_checkpoint.py"), str(models)]
    make += ["--finetunes", "2"]
    for field, value in TINY.items():
        make += [f"--{field}", str(value)]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    recipe = directory / "recipe.json"
    document = {
        "method": "ties",
        "base": str(models / "base"),
        "sources": [{"path": str(models / f"tuned-{number}")} for number in range(2)],
        "parameters": {"density": 0.2},
    }
    recipe.write_text(json.dumps(document), encoding="utf-8")
    program = [sys.executable, "-m", "streammerge"]
    return {
        "python": [sys.executable, "-c", "pass"],
        "import torch": [sys.executable, "-c", "import torch"],
        "import streammerge": [sys.executable, "-c", "import streammerge"],
        "streammerge --help": [*program, "--help"],
        "streammerge inspect": [*program, "inspect", str(models / "base")],
        "streammerge plan": [*program, "plan", str(recipe), "--memory", "1GiB"],
    }


def time_commands(commands: Mapping[str, Sequence[str]], *, runs: int) -> dict[str, list[float]]:
    """Return the seconds that every run of every command took; the first, unmeasured, warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(runs + 1):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def render_times(seconds: Mapping[str, Sequence[float]]) -> str:
    """Return the table for a terminal."""
    rows = [["command", "median s", "min-max", "- import torch"]]
    torch_seconds = statistics.median(seconds["import torch"])
    for name, values in seconds.items():
        median = statistics.median(values)
        rows.append(
            [
                name,
                f"{median:.3f}",
                f"{min(values):.3f}-{max(values):.3f}",
                f"{median - torch_seconds:+.3f}",
            ]
        )
    return "\n".join(align(rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
