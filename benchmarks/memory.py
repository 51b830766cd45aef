"""Measures peak memory at one small budget, over model sizes and over numbers of sources.

    python -m benchmarks.memory --memory 512MiB

Two lines: all sizes with the fewest sources, and all numbers of sources at the smallest size. Both
should be flat. Prints a table and writes JSON and a picture to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.compare import run_once
from benchmarks.contenders import STREAMMERGE, choose_contenders
from benchmarks.jobs import METHODS, Job
from benchmarks.measuring import drop_page_cache
from benchmarks.models import ITEMSIZE, RESULTS, SIZES, WORK, check_disk, prepare_models
from benchmarks.plotting import draw_lines
from benchmarks.reporting import align, format_memory
from streammerge.units import parse_size


def main(arguments: Sequence[str]) -> int:
    """Measure what the command line asks for and return the exit code."""
    options = parse_arguments(arguments)
    environment.compile_modules()
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    commit, dirty = environment.commit()
    points = [
        measure_point(size, sources, options, work)
        for size, sources in plan_points(options.sizes, options.sources)
    ]
    results = {
        "format": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "method": options.method,
        "memory": options.memory,
        "machine": environment.machine_facts(work),
        "versions": {"project": environment.own_versions()},
        "points": points,
    }
    print(render_points(points, parse_size(options.memory)))
    name = f"memory-{options.memory}-{commit}{'-dirty' if dirty else ''}"
    options.results.mkdir(parents=True, exist_ok=True)
    place = options.results / f"{name}.json"
    place.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    picture = draw_lines(
        options.results / name,
        points=[
            (
                f"{point['size']}, {point['sources']} sources",
                point["peak_private_nbytes"] / 2**20,
            )
            for point in points
            if point["failure"] is None
        ],
        limit=parse_size(options.memory) / 2**20,
        title=f"Peak private memory of {options.method}, MiB",
    )
    print(f"written to {place} and {picture}")
    return int(any(point["failure"] is not None for point in points))


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    summary = (__doc__ or "").split("\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=summary)
    parser.add_argument("--memory", default="512MiB", help="budget of every merge")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.15B", "1.1B", "8B"])
    parser.add_argument("--sources", nargs="+", type=int, default=[2, 4, 8], metavar="K")
    parser.add_argument("--method", choices=METHODS, default="ties")
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds per run")
    parser.add_argument("--work", type=Path, default=WORK, help="where models and outputs go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the results")
    parser.add_argument("--clean", action="store_true", help="remove each size when it is done")
    options = parser.parse_args(arguments)
    if min(options.sources) < 2:
        parser.error("--sources must be at least 2")
    return options


def plan_points(sizes: Sequence[str], sources: Sequence[int]) -> list[tuple[str, int]]:
    """Return what is measured: more sources at the smallest size, then larger sizes."""
    ordered = sorted(set(sizes), key=list(SIZES).index)
    fewest = min(sources)
    more_sources = [(ordered[0], count) for count in sorted(set(sources))]
    return more_sources + [(size, fewest) for size in ordered[1:]]


def measure_point(
    size: str, sources: int, options: argparse.Namespace, work: Path
) -> dict[str, Any]:
    """Merge once and return what it took."""
    check_disk(work, size, sources)
    models = prepare_models(work, size, sources)
    job = Job(METHODS[options.method], models)
    (contender,) = choose_contenders([STREAMMERGE], [options.memory], work)
    print(f"  {size}, {sources} sources", file=sys.stderr)
    drop_page_cache(
        [file for model in job.inputs for file in model.glob("*.safetensors")], everything=False
    )
    run, _ = run_once(job, contender, timeout_seconds=options.timeout, work=work)
    point = {
        "size": size,
        "parameters": models.nbytes // ITEMSIZE,
        "sources": sources,
        "peak_private_nbytes": run.peak_private_nbytes,
        "peak_resident_nbytes": run.peak_resident_nbytes,
        "wall_seconds": run.wall_seconds,
        "failure": run.failure,
    }
    if options.clean:
        shutil.rmtree(models.base.parent, ignore_errors=True)
    return point


def render_points(points: Sequence[dict[str, Any]], budget: int) -> str:
    """Return the table for a terminal."""
    rows = [["size", "sources", "private", "RSS", "of budget", "wall s"]]
    failures = []
    for point in points:
        if point["failure"] is not None:
            failures.append(f"  {point['size']}, {point['sources']} sources: {point['failure']}")
            continue
        rows.append(
            [
                point["size"],
                str(point["sources"]),
                format_memory(point["peak_private_nbytes"]),
                format_memory(point["peak_resident_nbytes"]),
                f"{point['peak_private_nbytes'] / budget:.0%}",
                f"{point['wall_seconds']:.2f}",
            ]
        )
    return "\n".join([*align(rows), *failures])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
