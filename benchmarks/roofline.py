"""What bounds each job: the disk or the cores, and what each stage of the pipeline takes of it.

A merge cannot end before its bytes are moved, which raw I/O measures, nor before its work is done, which
is its core-seconds over the cores of the machine. The larger of the two is its roof (Williams, Waterman
and Patterson 2009, with bytes of a disk in place of those of a memory). Pure functions over the results
document.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.reporting import FLOOR, STREAMMERGE, align

STAGES = ("read", "compute", "write")
"""Stages of the pipeline as manifests name them; the others are times of waiting."""
_HEADER = ("job", "raw I/O", "cores", "bound by", "time / bound", *STAGES)


def render_roofline(results: Mapping[str, Any], *, markdown: bool = False) -> str:
    """Return the roof of every job that streammerge and raw I/O did, and its stages.

    Seconds of ``read``, ``compute`` and ``write`` are those of all threads of the stage together, waiting
    for the disk included; beside the first and the last, GB/s of one thread.

    Args:
        results: A results document with jobs under ``methods``.
        markdown: For a document; else for a terminal.
    """
    rows = [_HEADER]
    for job, result in results["methods"].items():
        contenders = result["contenders"]
        able = [contenders.get(name) for name in (STREAMMERGE, FLOOR)]
        if all(summary is not None and summary["failure"] is None for summary in able):
            rows.append(
                (f"`{job}`" if markdown else job, *_cells(result, results["machine"]["cores"]))
            )
    if not markdown:
        return "\n".join(align(rows))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(
        [lines[0], "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |", *lines[1:]]
    )


def _cells(result: Mapping[str, Any], cores: int) -> tuple[str, ...]:
    own, floor = (result["contenders"][name] for name in (STREAMMERGE, FLOOR))
    moving, working = floor["wall_seconds"], own["cpu_seconds"] / cores
    bound = max(moving, working)
    moved = {"read": result["read_nbytes"], "write": result["written_nbytes"]}
    return (
        f"{moving:.1f} s",
        f"{working:.1f} s",
        "disk" if moving >= working else "cores",
        f"{own['wall_seconds'] / bound:.2f}",
        *(_stage(own["runs"], stage, moved.get(stage)) for stage in STAGES),
    )


def _stage(runs: list[Mapping[str, Any]], stage: str, nbytes: int | None) -> str:
    seconds = statistics.median(run["seconds_by_stage"][stage] for run in runs)
    rate = f", {nbytes / 1e9 / seconds:.2f} GB/s" if nbytes and seconds else ""
    return f"{seconds:.1f} s{rate}"
