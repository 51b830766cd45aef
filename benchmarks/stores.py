"""Measures a merge from a store to a store against boto3 that copies as many bytes, on loopback.

    python -m benchmarks.stores
    python -m benchmarks.stores --rounds 5 --memory 512MiB

``linear`` of two models, 1.9 GB in and 0.9 GB out. The server is localbucket, which takes cores too and
keeps its objects in files, on the disk that everybody shares; its processor time is printed beside. boto3
downloads the models and uploads a model of the result's size, one after the other and both at once. Runs
take turns, with the page cache dropped before each. The disk needs 6 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.bucket import Bucket, serve
from benchmarks.measuring import drop_page_cache, measure
from benchmarks.models import RESULTS, ROOT, WORK, tensor_nbytes
from benchmarks.reporting import align
from benchmarks.run_boto3 import WAYS

STREAMMERGE = "streammerge"
SIZES = {
    "0.47B": {"hidden": 1024, "layers": 24, "intermediate": 4096, "vocab": 32_000, "heads": 16},
    "tiny": {"hidden": 64, "layers": 2, "intermediate": 96, "vocab": 500, "heads": 4},
}
"""Shapes of the models."""
TARGET = 1.2
"""What a merge may take, times copying."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where everything is."""

    work: Path
    """For everything; removed at the end."""
    bucket: Bucket
    """The server, with ``models`` in it."""
    memory: str
    """Budget of the merge."""

    @property
    def like(self) -> Path:
        """A model on the disk, of the size of the result."""
        return self.work / "models" / "base"

    def command(self, contender: str) -> list[str]:
        """Return the command of a contender."""
        inputs, out = ["s3://models/base", "s3://models/tuned-0"], "s3://results/merged"
        if contender != STREAMMERGE:
            way = contender.removeprefix("boto3 ")
            script = [sys.executable, "-m", "benchmarks.run_boto3", way, str(self.work / "down")]
            return [*script, out, str(self.like), *inputs]
        merge = [sys.executable, "-m", "streammerge", "merge", "--method", "linear", *inputs]
        return [*merge, "-o", out, "--memory", self.memory, "--quiet"]

    def clear(self) -> None:
        """Remove what a run has left."""
        for each in (
            self.work / "down",
            self.work / "scratch",
            self.bucket.directory / "results" / "merged",
            self.bucket.directory / ".localbucket-uploads",
        ):
            shutil.rmtree(each, ignore_errors=True)


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write what the command line asks for and return the exit code."""
    options = parse_arguments(arguments)
    environment.compile_modules()
    work: Path = options.work.resolve() / "stores"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        prepare_models(work, options.size)
        with serve(work / "served") as bucket:
            place = Place(work, bucket, options.memory)
            results = describe(options, place.like, work)
            results["contenders"] = compare(place, options, results)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(render(results))
    where: Path = options.results or RESULTS / f"stores-{results['commit']}.json"
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written to {where}")
    return 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    summary = (__doc__ or "").split("\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stores", description=summary)
    parser.add_argument("--size", choices=SIZES, default="0.47B", help="parameters of a model")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender")
    parser.add_argument("--memory", default="1GiB", help="budget of streammerge")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds per run")
    parser.add_argument("--work", type=Path, default=WORK, help="where models and outputs go")
    parser.add_argument("--results", type=Path, help="where the JSON goes")
    return parser.parse_args(arguments)


def prepare_models(work: Path, size: str) -> None:
    """Make two models, and let the server have the same files."""
    command = [sys.executable, str(ROOT / "scripts" / "make_checkpoint.py"), str(work / "models")]
    for field, value in SIZES[size].items():
        command += [f"--{field}", str(value)]
    command += ["--kv-heads", str(SIZES[size]["heads"]), "--finetunes", "1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for model in (work / "models").iterdir():
        served = work / "served" / "models" / model.name
        served.mkdir(parents=True)
        for path in model.iterdir():
            os.link(path, served / path.name)
    (work / "served" / "results").mkdir()


def describe(options: argparse.Namespace, model: Path, work: Path) -> dict[str, Any]:
    """Return the results document, complete but for the results."""
    commit, dirty = environment.commit()
    nbytes = tensor_nbytes(model)
    return {
        "format": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": f"{commit}{'-dirty' if dirty else ''}",
        "size": options.size,
        "read_nbytes": 2 * nbytes,
        "written_nbytes": nbytes,
        "memory": options.memory,
        "rounds": options.rounds,
        "cache_dropped": None,
        "machine": environment.machine_facts(work),
        "versions": {"project": environment.own_versions()},
    }


def compare(
    place: Place, options: argparse.Namespace, results: dict[str, Any]
) -> dict[str, list[dict[str, float]]]:
    """Let the contenders take turns; return what each run took.

    Raises:
        SystemExit: A run failed, or left other bytes than it should.
    """
    names = [STREAMMERGE, *(f"boto3 {way}" for way in WAYS)]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    variables = place.bucket.environment | {"STREAMMERGE_SCRATCH": str(place.work / "scratch")}
    for number in range(options.rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            place.clear()
            results["cache_dropped"] = drop_page_cache([], everything=True)
            served = place.bucket.cpu_seconds
            run = measure(
                place.command(name),
                cwd=ROOT,
                environment=variables,
                timeout_seconds=options.timeout,
            )
            if run.failure is not None:
                raise SystemExit(f"{name}: {run.failure}")
            written = tensor_nbytes(place.bucket.directory / "results" / "merged")
            if written != results["written_nbytes"]:
                raise SystemExit(f"{name}: wrote {written} bytes of tensors")
            runs[name].append(
                {
                    "wall_seconds": run.wall_seconds,
                    "cpu_seconds": run.cpu_seconds,
                    "server_cpu_seconds": place.bucket.cpu_seconds - served,
                    "peak_private_nbytes": run.peak_private_nbytes,
                }
            )
    place.clear()
    return runs


def render(results: dict[str, Any]) -> str:
    """Return the table for a terminal."""
    rows = [["", "median s", "min-max", "core-s", "server's", "MiB", "times this"]]
    medians = {
        name: statistics.median(run["wall_seconds"] for run in runs)
        for name, runs in results["contenders"].items()
    }
    for name, runs in results["contenders"].items():
        seconds = sorted(run["wall_seconds"] for run in runs)
        rows.append(
            [
                name,
                f"{medians[name]:.2f}",
                f"{seconds[0]:.2f}-{seconds[-1]:.2f}",
                f"{statistics.median(run['cpu_seconds'] for run in runs):.2f}",
                f"{statistics.median(run['server_cpu_seconds'] for run in runs):.2f}",
                f"{max(run['peak_private_nbytes'] for run in runs) / 2**20:.0f}",
                f"{medians[STREAMMERGE] / medians[name]:.2f}",
            ]
        )
    total = (results["read_nbytes"] + results["written_nbytes"]) / 1e9
    return "\n".join(
        [*align(rows), f"{total:.1f} GB through the server; wanted: {TARGET} times boto3"]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
