"""Measures streammerge, other mergers and the raw I/O floor on the same merges, side by side.

    python -m benchmarks.compare --size 1.1B

Makes the models and the other mergers' environment where they are missing, then lets the contenders
take turns, round by round, with the page cache dropped before every run. Prints a table per method
and writes all of it to ``benchmarks/results/``.

What the numbers leave out favours the others: mergekit and PEFT do not wait until their output is
on the disk, streammerge and the floor do.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import environment
from benchmarks.contenders import (
    FLOOR,
    NAMES,
    STREAMMERGE,
    Contender,
    choose_contenders,
    environment_directory,
    needs_environment,
    prepare_environment,
)
from benchmarks.environment import hide_paths
from benchmarks.jobs import DENSITY, METHODS, AnyJob, Job, choose_methods
from benchmarks.measuring import Run, drop_page_cache, measure
from benchmarks.models import (
    ITEMSIZE,
    RESULTS,
    ROOT,
    SIZES,
    WORK,
    check_disk,
    prepare_models,
    tensor_nbytes,
)
from benchmarks.reporting import (
    add_ratios,
    describe_conditions,
    render_method,
    render_performance_table,
    summarize,
)
from benchmarks.roofline import render_roofline

FORMAT = 1
"""Raised when the meaning of a field of the results changes."""
OTHERS = ("mergekit", "peft")
"""Packages whose versions are printed."""
_MOST_FOR_ALL = 4
"""Sources that the others merge, too: they hold whole models."""
TMPFS = "tmpfs"
_IN_MEMORY = Path("/dev/shm/streammerge-benchmarks")  # noqa: S108 - in memory is what it is for
JobT = TypeVar("JobT", bound=AnyJob)


def main(arguments: Sequence[str]) -> int:
    """Run the comparison that the command line asks for and return the exit code."""
    options = parse_arguments(arguments)
    environment.compile_modules()
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if needs_environment(options.contenders):
        prepare_environment(work)
    if options.storage == TMPFS:
        options.work = work = in_memory(work)
    check_disk(work, options.size, options.sources)
    models = prepare_models(work, options.size, options.sources)
    results = describe_session(models.base, options, work) | {
        "sources": options.sources,
        "density": DENSITY,
    }
    if needs_environment(options.contenders):
        python = environment_directory(work) / "bin" / "python"
        results["versions"]["contenders"] = environment.versions_of(python)
    measure_jobs(
        [Job(METHODS[name], models) for name in options.methods],
        choose_contenders(options.contenders, options.memory, work),
        results,
        options,
        place=options.results or default_results_path(results),
    )
    print(f"\n{render_performance_table(results)}")
    print(f"\n{render_roofline(results)}")
    return 0


def in_memory(work: Path) -> Path:
    """Return a place in memory for models and outputs, with the environment that ``work`` has."""
    _IN_MEMORY.mkdir(exist_ok=True)
    environment_of = environment_directory(_IN_MEMORY)
    if not environment_of.is_symlink():
        environment_of.symlink_to(environment_directory(work))
    return _IN_MEMORY


def measure_jobs(
    jobs: Sequence[JobT],
    contenders: Sequence[Contender[JobT]],
    results: dict[str, Any],
    options: argparse.Namespace,
    *,
    place: Path,
) -> None:
    """Measure every job, print what came out, and write the results to ``place``."""
    work: Path = options.work.resolve()
    try:
        for job in jobs:
            results["methods"][job.name] = compare(job, contenders, results, options, work)
            print(f"{render_method(job.name, results['methods'][job.name])}\n", flush=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            # Written after every job: what was measured survives an interruption.
            place.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    finally:
        if options.clean:
            shutil.rmtree(work / "models" / options.size, ignore_errors=True)
    print(describe_conditions(results, others=OTHERS))
    print(f"written to {place}")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    summary = (__doc__ or "").split("\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=summary)
    parser.add_argument("--sources", type=int, default=2, metavar="K", help="fine-tunes to merge")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        help="default: all but what decomposes whole matrices",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=NAMES,
        help=f"default: all with up to {_MOST_FOR_ALL} sources, else streammerge and the floor",
    )
    parser.add_argument(
        "--memory",
        nargs="+",
        default=["4GiB", "512MiB"],
        help="budgets of streammerge; others are compared with the first",
    )
    parser.add_argument(
        "--storage",
        choices=("disk", TMPFS),
        default="disk",
        help=f"tmpfs: models and outputs lie in {_IN_MEMORY.parent}, in memory, and nothing is dropped, so "
        "that programs start warm: what is left is what the processor takes",
    )
    add_common_options(parser)
    options = parser.parse_args(arguments)
    if options.sources < 2 or options.rounds < 1:
        parser.error("--sources must be at least 2 and --rounds at least 1")
    if options.contenders is None:
        few = options.sources <= _MOST_FOR_ALL
        options.contenders = list(NAMES) if few else [STREAMMERGE, FLOOR]
    if options.methods is None:
        options.methods = choose_methods(options.sources)
    return options


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every comparison on models has."""
    parser.add_argument("--size", choices=SIZES, default="1.1B", help="parameters of a model")
    parser.add_argument("--rounds", type=int, default=3, help="runs per contender and method")
    parser.add_argument(
        "--cache",
        choices=("all", "inputs"),
        default="all",
        help="what is dropped before a run: all that the kernel has cached, which takes the right "
        "to do so and makes programs start cold too, or the inputs alone",
    )
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds per run")
    parser.add_argument("--work", type=Path, default=WORK, help="where models and outputs go")
    parser.add_argument("--results", type=Path, help="where the JSON goes")
    parser.add_argument("--clean", action="store_true", help="remove the models afterwards")


def describe_session(base: Path, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Return the results document, complete but for the results and for what was compared."""
    commit, dirty = environment.commit()
    files = sorted(base.glob("*.safetensors"))
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "size": options.size,
        "parameters": tensor_nbytes(base) // ITEMSIZE,
        "rounds": options.rounds,
        "dtype": "bfloat16",
        "memory": options.memory,
        "cache_dropped": None,
        "storage": getattr(options, "storage", "disk"),
        "machine": environment.machine_facts(work),
        "disk_rates": environment.disk_rates(files, work),
        "versions": {"project": environment.own_versions(), "contenders": {}},
        "methods": {},
    }


def default_results_path(results: dict[str, Any]) -> Path:
    """Return the place in ``benchmarks/results/`` that belongs to these results."""
    storage = "tmpfs-" if results.get("storage") == TMPFS else ""
    return results_path(f"{storage}{results['size']}-{results['sources']}src", results)


def results_path(name: str, results: dict[str, Any]) -> Path:
    """Return the place in ``benchmarks/results/`` of results of that name, by their commit."""
    return RESULTS / f"{name}-{results['commit']}{'-dirty' if results['dirty'] else ''}.json"


def compare(
    job: JobT,
    contenders: Sequence[Contender[JobT]],
    results: dict[str, Any],
    options: argparse.Namespace,
    work: Path,
) -> dict[str, Any]:
    """Let all contenders do a job in turns and return what it took each of them."""
    able = [contender for contender in contenders if contender.does(job)]
    runs: dict[str, list[Run]] = {contender.name: [] for contender in able}
    stages: dict[str, list[dict[str, float] | None]] = {contender.name: [] for contender in able}
    for number in range(options.rounds):
        # Each round begins with another one: whoever comes first in a job tends to be slower.
        first = number % max(len(able), 1)
        for contender in (*able[first:], *able[:first]):
            # One that has failed would fail again; its time is better spent.
            if any(run.failure is not None for run in runs[contender.name]):
                continue
            print(f"  {job.name}, round {number + 1}: {contender.name}", file=sys.stderr)
            results["cache_dropped"] = (
                None
                if results.get("storage") == TMPFS
                else drop_page_cache(
                    [file for model in job.inputs for file in model.glob("*.safetensors")],
                    everything=options.cache == "all",
                )
            )
            run, manifest = run_once(job, contender, timeout_seconds=options.timeout, work=work)
            runs[contender.name].append(run)
            stages[contender.name].append(stages_of(manifest))
    summaries = {name: summarize(runs[name], stages[name]) for name in runs}
    for contender in able:
        summaries[contender.name]["memory"] = contender.memory
    add_ratios(summaries)
    return {
        "read_nbytes": job.nbytes_to_read,
        "written_nbytes": job.nbytes_to_write,
        "sweeps": job.sweeps,
        "contenders": summaries,
    }


def run_once(
    job: JobT, contender: Contender[JobT], *, timeout_seconds: float, work: Path
) -> tuple[Run, dict[str, Any] | None]:
    """Run a contender once; return what it took, and the manifest where it wrote one."""
    out = work / "out"
    partial = work / "out.partial"
    description = work / "job.json"
    for leftover in (out, partial):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        run = measure(
            contender.command(job, description, out),
            cwd=ROOT,
            environment=contender.environment,
            timeout_seconds=timeout_seconds,
        )
        if run.failure is not None:
            return replace(run, failure=hide_paths(run.failure, work)), None
        if contender.name == FLOOR:
            return run, None
        nbytes = tensor_nbytes(out)
        if nbytes != job.nbytes_to_write:
            wrong = f"wrote {nbytes} bytes of tensors, expected {job.nbytes_to_write}"
            return replace(run, failure=wrong), None
        return run, read_manifest(out)
    finally:
        for leftover in (out, partial):
            shutil.rmtree(leftover, ignore_errors=True)
        description.unlink(missing_ok=True)


def read_manifest(out: Path) -> dict[str, Any] | None:
    """Return the manifest beside a result; None where there is none, as with other mergers."""
    place = out / "streammerge_manifest.json"
    if not place.exists():
        return None
    manifest: dict[str, Any] = json.loads(place.read_bytes())
    return manifest


def stages_of(manifest: dict[str, Any] | None) -> dict[str, float] | None:
    """Return the seconds per stage that a manifest records; None without a manifest."""
    if manifest is None:
        return None
    stages: dict[str, float] = manifest["run"]["seconds_by_stage"]
    return stages


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
