"""From runs to numbers to tables: pure functions over the results document."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.measuring import Run

FLOOR = "floor"
STREAMMERGE = "streammerge"
MERGEKIT = "mergekit"
PEFT = "peft"
MIB = 2**20
GIB = 2**30
_ABSENT = "-"


def summarize(runs: Sequence[Run], stages: Sequence[Mapping[str, float] | None]) -> dict[str, Any]:
    """Return the medians of a contender's runs, the noise of its time, and the runs themselves.

    Args:
        runs: One or more; when any of them failed, the contender has failed.
        stages: Seconds per stage of each run, where the contender reports them.
    """
    failure = next((run.failure for run in runs if run.failure is not None), None)
    summary: dict[str, Any] = {
        "failure": failure,
        "runs": [
            asdict(run) | ({"seconds_by_stage": dict(stage)} if stage else {})
            for run, stage in zip(runs, stages, strict=True)
        ],
    }
    if failure is not None:
        return summary
    walls = [run.wall_seconds for run in runs]
    return summary | {
        "wall_seconds": statistics.median(walls),
        "wall_seconds_least": min(walls),
        "wall_seconds_most": max(walls),
        "cpu_seconds": statistics.median(run.cpu_seconds for run in runs),
        "peak_private_nbytes": statistics.median(run.peak_private_nbytes for run in runs),
        "peak_resident_nbytes": statistics.median(run.peak_resident_nbytes for run in runs),
    }


def add_ratios(contenders: dict[str, dict[str, Any]]) -> None:
    """Give every contender that succeeded its median time divided by that of each other one."""
    times = {
        name: summary["wall_seconds"]
        for name, summary in contenders.items()
        if summary["failure"] is None
    }
    for name, seconds in times.items():
        contenders[name]["time_relative_to"] = {
            other: seconds / other_seconds
            for other, other_seconds in times.items()
            if other != name
        }


def render_method(name: str, result: Mapping[str, Any]) -> str:
    """Return one method's table for a terminal."""
    contenders: Mapping[str, Mapping[str, Any]] = result["contenders"]
    sweeps = f" in {result['sweeps']} sweeps" if result["sweeps"] > 1 else ""
    title = (
        f"{name}: {result['read_nbytes'] / 1e9:.2f} GB read{sweeps}, "
        f"{result['written_nbytes'] / 1e9:.2f} GB written"
    )
    relative = [other for other in (STREAMMERGE, MERGEKIT, FLOOR) if other in contenders]
    moved = (result["read_nbytes"] + result["written_nbytes"]) / 1e9
    header = ["contender", "wall s", "min-max", "CPU s", "CPU s/GB", "private", "RSS"]
    rows = [[*header, *(f"/ {other}" for other in relative)]]
    failures = []
    for contender, summary in contenders.items():
        if summary["failure"] is not None:
            rows.append([contender, "failed", *[""] * (len(rows[0]) - 2)])
            failures.append(f"  {contender} failed: {summary['failure']}")
            continue
        ratios = {contender: 1.0} | summary["time_relative_to"]
        rows.append(
            [
                contender,
                f"{summary['wall_seconds']:.2f}",
                f"{summary['wall_seconds_least']:.2f}-{summary['wall_seconds_most']:.2f}",
                f"{summary['cpu_seconds']:.2f}",
                f"{summary['cpu_seconds'] / moved:.2f}",
                format_memory(summary["peak_private_nbytes"]),
                format_memory(summary["peak_resident_nbytes"]),
                *(f"{ratios[other]:.2f}" if other in ratios else _ABSENT for other in relative),
            ]
        )
    return "\n".join([title, *align(rows), *failures])


def render_performance_table(results: Mapping[str, Any]) -> str:
    """Return the table of a results document, as Markdown, with what it was measured on."""
    lines = [
        "| method | streammerge | mergekit | faster by | time / raw I/O | peak memory | mergekit's |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, result in results["methods"].items():
        contenders = result["contenders"]
        own, other = _succeeded(contenders, STREAMMERGE), _succeeded(contenders, MERGEKIT)
        lines.append(_row(f"`{method}`", own, other, _succeeded(contenders, FLOOR)))
    return "\n".join([*lines, "", describe_conditions(results, others=(MERGEKIT,))])


def render_baking_table(results: Mapping[str, Any]) -> str:
    """Return the table of merging adapters into a base."""
    lines = [
        "| job | streammerge | PEFT | faster by | time / raw I/O | peak memory | PEFT's |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for job, result in results["methods"].items():
        contenders = result["contenders"]
        for name in contenders:
            if not name.startswith(STREAMMERGE):
                continue
            way = name.removeprefix(STREAMMERGE).removeprefix(", ")
            # PEFT only adds adapters to a base.
            other = None if way == "ties" else _succeeded(contenders, PEFT)
            label = f"{job}, `{way}`" if way else job
            own, floor = _succeeded(contenders, name), _succeeded(contenders, FLOOR)
            lines.append(_row(label, own, other, floor))
    return "\n".join([*lines, "", describe_conditions(results, others=(PEFT, "transformers"))])


def render_measures(summary: Mapping[str, Any] | None) -> str:
    """Return a contender's time and peak memory for a cell of a table; nothing if it has none."""
    return "" if summary is None else f"{_seconds(summary)}, {_memory(summary)}"


def _row(
    label: str,
    own: Mapping[str, Any] | None,
    other: Mapping[str, Any] | None,
    floor: Mapping[str, Any] | None,
) -> str:
    cells = [
        label,
        _seconds(own),
        _seconds(other),
        _ratio(other, own, "{:.1f}x"),
        _ratio(own, floor, "{:.2f}"),
        _memory(own),
        _memory(other),
    ]
    return f"| {' | '.join(cells)} |"


def describe_conditions(results: Mapping[str, Any], *, others: Sequence[str]) -> str:
    """Return one sentence on what was measured, where, and at which commit.

    Args:
        results: The results document.
        others: Packages of other contenders whose versions are told.
    """
    machine = results["machine"]
    rates = results["disk_rates"]
    commit = results["commit"] + (" with changes" if results["dirty"] else "")
    # Contenders without an environment of their own run in the project's.
    versions = results["versions"]["contenders"] or results["versions"]["project"]
    told = "".join(f", {name} {versions[name]}" for name in others if name in versions)
    subject = results.get("subject") or f"{results['sources']} sources"
    rounds = results["rounds"]
    where = "in memory" if results.get("storage") == "tmpfs" else "cold page cache"
    return (
        f"{results['size']} parameters in {results['dtype']}, {subject}, {where}, "
        f"{f'medians of {rounds} rounds' if rounds > 1 else 'one round'}; "
        f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_nbytes'] / GIB:.0f} GiB, "
        f"disk {rates['read_bytes_per_second'] / 1e9:.2f} GB/s reading and "
        f"{rates['write_bytes_per_second'] / 1e9:.2f} GB/s writing; commit {commit}{told}."
    )


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines of even columns: the first to the left, others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def format_memory(nbytes: float) -> str:
    """Return bytes as a table shows them: ``"312 MiB"``, ``"5.46 GiB"``."""
    return f"{nbytes / MIB:.0f} MiB" if nbytes < GIB else f"{nbytes / GIB:.2f} GiB"


def _succeeded(contenders: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    summary = contenders.get(name)
    return summary if summary is not None and summary["failure"] is None else None


def _seconds(summary: Mapping[str, Any] | None) -> str:
    return _ABSENT if summary is None else f"{summary['wall_seconds']:.1f} s"


def _memory(summary: Mapping[str, Any] | None) -> str:
    return _ABSENT if summary is None else format_memory(summary["peak_private_nbytes"])


def _ratio(above: Mapping[str, Any] | None, below: Mapping[str, Any] | None, form: str) -> str:
    if above is None or below is None:
        return _ABSENT
    return form.format(above["wall_seconds"] / below["wall_seconds"])
