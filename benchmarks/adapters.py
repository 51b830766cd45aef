"""Combines two rank-64 all-linear adapters of an 8B-shaped model, side by side with PEFT.

    python -m benchmarks.adapters
    python -m benchmarks.adapters --layers 2 --methods linear,cat --rounds 3

PEFT needs the base model in memory, 16 GB for 8B parameters, and its ``svd`` decomposes every weight
as it is; so both combine the first ``--layers`` layers, and streammerge alone all 32 besides. The
base has a tiny vocabulary, in PEFT's favour. ``svd`` is compared on the attention's layers alone: on
the others PEFT takes minutes each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.contenders import merge_command
from benchmarks.loras import make_lora
from benchmarks.measuring import Run, drop_page_cache, measure
from benchmarks.models import RESULTS, ROOT
from benchmarks.reporting import align

HIDDEN, KEY_VALUE, INTERMEDIATE, ALL_LAYERS = 4096, 1024, 14336, 32
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
"""Out and in of every linear layer of an 8B Llama."""
RANK = 64
WEIGHTS = (0.6, 0.4)
DENSITY = 0.5
METHODS = ("linear", "cat", "ties", "svd")
_TIMEOUT_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Job:
    """One combination."""

    method: str
    """The combination type."""
    layers: int
    """Layers that the adapters cover."""
    modules: tuple[str, ...]
    """Modules of each layer."""

    @property
    def name(self) -> str:
        """What the job is called in the table."""
        part = "all-linear" if len(self.modules) == len(SHAPES) else "attention"
        return f"{self.method}, {part}, {self.layers} layer(s)"

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Out and in of every module, by its name in the model."""
        return {
            f"model.layers.{layer}.{module}": SHAPES[module]
            for layer in range(self.layers)
            for module in self.modules
        }


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write what the command line asks for and return the exit code."""
    options = _parse(arguments)
    environment.compile_modules()
    summaries: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=options.work) as directory:
        for job, with_peft in _jobs(options.methods.split(","), options.layers):
            summaries[job.name] = _compare(
                job, Path(directory), rounds=options.rounds, with_peft=with_peft
            )
            print("\n".join(render(summaries)), flush=True)
    commit, dirty = environment.commit()
    results = {
        "format": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "rounds": options.rounds,
        "rank": RANK,
        "machine": environment.machine_facts(options.work),
        "versions": {"project": environment.own_versions()},
        "jobs": summaries,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    place = options.results / f"adapters-{commit}{'-dirty' if dirty else ''}.json"
    place.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written to {place}")
    return 0


def render(summaries: dict[str, dict[str, Any]]) -> list[str]:
    """Return the table: seconds and memory of both, and their ratio."""
    rows = [["job", "streammerge s", "private MiB", "peft s", "private MiB", "peft / streammerge"]]
    for name, summary in summaries.items():
        ours, theirs = summary["streammerge"], summary.get("peft")
        row = [name, f"{ours['median_seconds']:.1f}", f"{ours['peak_private_nbytes'] >> 20}"]
        if theirs is None:
            row += ["-", "-", "-"]
        else:
            ratio = theirs["median_seconds"] / ours["median_seconds"]
            row += [
                f"{theirs['median_seconds']:.1f}",
                f"{theirs['peak_private_nbytes'] >> 20}",
                f"{ratio:.1f}",
            ]
        rows.append(row)
    return align(rows)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    summary = (__doc__ or "").split("\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=summary)
    parser.add_argument("--layers", type=int, default=1, help="layers that both combine")
    parser.add_argument("--methods", default=",".join(METHODS), help="combination types")
    parser.add_argument("--rounds", type=int, default=1, help="runs of every job")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the results")
    return parser.parse_args(arguments)


def _jobs(methods: Sequence[str], layers: int) -> list[tuple[Job, bool]]:
    """Return the jobs, and whether PEFT takes part."""
    every, attention = tuple(SHAPES), tuple(list(SHAPES)[:4])
    jobs = []
    for method in methods:
        modules = attention if method == "svd" else every
        jobs.append((Job(method, layers, modules), True))
        jobs.append((Job(method, ALL_LAYERS, every), False))
    return jobs


def _compare(job: Job, work: Path, *, rounds: int, with_peft: bool) -> dict[str, Any]:
    place = work / f"{job.method}-{job.layers}-{with_peft}"
    adapters = [
        make_lora(place / f"a{seed}", job.shapes, rank=RANK, seed=seed)
        for seed in range(len(WEIGHTS))
    ]
    recipe = {
        "method": job.method,
        "sources": [
            {"path": str(path), "weight": weight}
            for path, weight in zip(adapters, WEIGHTS, strict=True)
        ],
        "parameters": {"density": DENSITY} if job.method == "ties" else {},
    }
    (place / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    inputs = [path / "adapter_model.safetensors" for path in adapters]
    runs: dict[str, list[Run]] = {"streammerge": []} | ({"peft": []} if with_peft else {})
    for index in range(rounds):
        for name, taken in runs.items():
            out = place / f"{name}{index}"
            drop_page_cache(inputs, everything=False)
            taken.append(measure(_command(name, job, place, out), **_SETTINGS))
    return {name: _summary(taken) for name, taken in runs.items()}


def _command(contender: str, job: Job, place: Path, out: Path) -> list[str]:
    if contender == "streammerge":
        return merge_command(place / "recipe.json", out, memory="2GiB")
    return [
        *(sys.executable, "-m", "benchmarks.run_peft_adapters", str(place / "recipe.json")),
        *(str(out), str(job.layers)),
    ]


_SETTINGS: dict[str, Any] = {
    "cwd": ROOT,
    "environment": {},
    "timeout_seconds": _TIMEOUT_SECONDS,
}


def _summary(runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "median_seconds": statistics.median(run.wall_seconds for run in runs),
        "peak_private_nbytes": max(run.peak_private_nbytes for run in runs),
        "failure": next((run.failure for run in runs if run.failure), None),
        "runs": [asdict(run) for run in runs],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
