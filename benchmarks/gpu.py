"""Measures merges on an accelerator against the CPU, mergekit --cuda, and two floors.

    python -m benchmarks.gpu --sizes 1.1B 8B

For each size, cache and method the contenders take turns. Warm: every input is read once before a
run, so that the bus is the limit, not the disk. Cold: dropped before a run. The floor of the disk
reads and writes the same bytes; that of the bus copies them to the device and back, without a
program's start. Prints a table per method and writes all of it to ``benchmarks/results/``.

Needs a CUDA device, and says so where there is none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import environment
from benchmarks.bus import measure_bus
from benchmarks.compare import run_once, stages_of
from benchmarks.contenders import (
    FLOOR,
    MERGEKIT,
    STREAMMERGE,
    Contender,
    choose_contenders,
    environment_directory,
    prepare_environment,
)
from benchmarks.jobs import DENSITY, FEW, METHODS, AnyJob, Job
from benchmarks.measuring import Run, drop_page_cache
from benchmarks.models import RESULTS, SIZES, WORK, check_disk, prepare_models
from benchmarks.reporting import add_ratios, render_method, summarize

FORMAT = 1
"""Raised when the meaning of a field of the results changes."""
CACHES = ("warm", "cold")
_READ_NBYTES = 8 * 2**20
JobT = TypeVar("JobT", bound=AnyJob)


def main(arguments: Sequence[str]) -> int:
    """Run what the command line asks for and return the exit code."""
    options = parse_arguments(arguments)
    try:
        device = measure_bus(options.device, in_nbytes=2**30, out_nbytes=2**30)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        print(f"{options.device} cannot be used: {lines[-1]}", file=sys.stderr)
        return 2
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if MERGEKIT in options.contenders:
        prepare_environment(work)
    contenders = on_device(options, work)
    results = describe_session(device, options, work)
    name = device["device"].replace(" ", "-").replace("/", "-")
    place = options.results or RESULTS / f"gpu-{name}-{results['commit']}.json"
    for size in options.sizes:
        check_disk(work, size, options.sources)
        models = prepare_models(work, size, options.sources)
        for cache in options.caches:
            for method in options.methods:
                result = take_turns(Job(METHODS[method], models), contenders, cache, options, work)
                results["jobs"].append({"size": size, "cache": cache, "method": method, **result})
                print(f"{size}, {cache}, {render_method(method, result)}")
                print(render_bus(result), flush=True)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written to {place}")
    return 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    summary = (__doc__ or "").split("\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=summary)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1.1B", "8B"])
    parser.add_argument("--sources", type=int, default=2, metavar="K", help="fine-tunes to merge")
    parser.add_argument("--rounds", type=int, default=3, help="runs per contender and job")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(FEW))
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    names = (STREAMMERGE, MERGEKIT, FLOOR)
    parser.add_argument("--contenders", nargs="+", choices=names, default=list(names))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--memory", default="4GiB", help="of the host")
    parser.add_argument("--device-memory", default="2GiB")
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds per run")
    parser.add_argument("--work", type=Path, default=WORK, help="where models and outputs go")
    parser.add_argument("--results", type=Path, help="where the JSON goes")
    return parser.parse_args(arguments)


def on_device(options: argparse.Namespace, work: Path) -> list[Contender]:
    """Return the contenders: streammerge on the device and on the CPU, mergekit, the disk's floor."""
    chosen: list[Contender] = []
    for contender in choose_contenders(options.contenders, [options.memory], work):
        if contender.name == STREAMMERGE:
            more = ["--device", options.device, "--device-memory", options.device_memory]
            chosen.append(with_options(contender, STREAMMERGE, more))
            chosen.append(with_options(contender, f"{STREAMMERGE} cpu", ["--device", "cpu"]))
        elif contender.name == MERGEKIT:
            chosen.append(with_options(contender, MERGEKIT, ["--cuda"]))
        else:
            chosen.append(contender)
    return chosen


def with_options(contender: Contender[JobT], name: str, more: Sequence[str]) -> Contender[JobT]:
    """Return a contender of another name, which has more options at the end of its command."""
    command = contender.command
    return replace(
        contender, name=name, command=lambda job, where, out: [*command(job, where, out), *more]
    )


def describe_session(
    device: dict[str, Any], options: argparse.Namespace, work: Path
) -> dict[str, Any]:
    """Return the results document, complete but for the results."""
    commit, dirty = environment.commit()
    versions = {"project": environment.own_versions(), "contenders": {}}
    if MERGEKIT in options.contenders:
        python = environment_directory(work) / "bin" / "python"
        versions["contenders"] = environment.versions_of(python)
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "device": device,
        "sources": options.sources,
        "rounds": options.rounds,
        "density": DENSITY,
        "memory": options.memory,
        "device_memory": options.device_memory,
        "machine": environment.machine_facts(work),
        "versions": versions,
        "jobs": [],
    }


def take_turns(
    job: Job, contenders: Sequence[Contender], cache: str, options: argparse.Namespace, work: Path
) -> dict[str, Any]:
    """Let all contenders do a job in turns and return what it took each of them."""
    able = [contender for contender in contenders if contender.does(job)]
    runs: dict[str, list[Run]] = {contender.name: [] for contender in able}
    stages: dict[str, list[dict[str, float] | None]] = {contender.name: [] for contender in able}
    files = [file for model in job.inputs for file in sorted(model.glob("*.safetensors"))]
    for number in range(options.rounds):
        for contender in able:
            if any(run.failure is not None for run in runs[contender.name]):
                continue
            print(f"  {job.method.name}, round {number + 1}: {contender.name}", file=sys.stderr)
            drop_page_cache(files, everything=cache == "cold")
            if cache == "warm":
                read_all(files)
            run, manifest = run_once(job, contender, timeout_seconds=options.timeout, work=work)
            runs[contender.name].append(run)
            stages[contender.name].append(stages_of(manifest))
    summaries = {name: summarize(runs[name], stages[name]) for name in runs}
    add_ratios(summaries)
    bus = measure_bus(options.device, in_nbytes=job.nbytes_to_read, out_nbytes=job.nbytes_to_write)
    return {
        "read_nbytes": job.nbytes_to_read,
        "written_nbytes": job.nbytes_to_write,
        "sweeps": job.method.sweeps,
        "contenders": summaries,
        "bus_seconds": bus["seconds"],
    }


def read_all(files: Sequence[Path]) -> int:
    """Read files into the page cache and return their bytes."""
    total = 0
    for path in files:
        with path.open("rb", buffering=0) as stream:
            while part := stream.read(_READ_NBYTES):
                total += len(part)
    return total


def render_bus(result: dict[str, Any]) -> str:
    """Return one line on how near the floor of the bus the time is, starting included."""
    own = result["contenders"].get(STREAMMERGE)
    line = f"  bus alone: {result['bus_seconds']:.2f} s"
    if own is None or own["failure"] is not None:
        return line
    return f"{line}; streammerge takes {own['wall_seconds'] / result['bus_seconds']:.2f} of it"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
