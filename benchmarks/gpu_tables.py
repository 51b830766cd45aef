"""The tables of a check on a machine with an accelerator, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.reporting import GIB, MERGEKIT, format_memory

DEVICE = "device"
CPU = "cpu"
_ABSENT = "-"
_OTHER = f"{MERGEKIT}, "
"""How the names of the steps begin in which it did the same."""


def render_check(results: Mapping[str, Any]) -> str:
    """Return all tables of a results document."""
    measured = [step for step in results["steps"] if step["values"].get("contenders")]
    programs = {DEVICE, CPU, MERGEKIT}
    scaling = [step for step in measured if not programs & step["values"]["contenders"].keys()]
    both = [step for step in measured if step not in scaling]
    found = {step["name"]: step["values"] for step in results["steps"]}
    foreseen = found.get("foreseen", {}).get("merges")
    parts = [
        _conditions(results),
        *([render_times(both)] if both else []),
        *([render_workers(scaling)] if scaling else []),
        *([render_foreseen(foreseen, both)] if foreseen else []),
        render_steps(results["steps"]),
    ]
    return "\n\n".join(parts)


def render_times(steps: Sequence[Mapping[str, Any]]) -> str:
    """Return what each job took on the device, on the CPU and with mergekit.

    Seconds are those of whole programs, the least of their runs. The column ``without start`` takes
    off what the step ``start`` took on the device. What mergekit took is a step of its own, and
    no row.
    """
    others = {
        step["name"].removeprefix(_OTHER): _least(step, MERGEKIT)
        for step in steps
        if step["name"].startswith(_OTHER)
    }
    steps = [step for step in steps if not step["name"].startswith(_OTHER)]
    start = next((_least(step, DEVICE) for step in steps if step["name"] == "start"), None)
    header = ["job", "device", "CPU", "mergekit", "bus", "device / bus", "without start"]
    header += ["CPU / device", "mergekit / device", "device memory", "same bytes"]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for step in steps:
        values = step["values"]
        own, cpu = (_least(step, name) for name in (DEVICE, CPU))
        other = others.get(step["name"])
        bus = values.get("bus_seconds")
        rest = None if own is None or start is None or own <= start else own - start
        peak = values["contenders"].get(DEVICE, {}).get("peak_device_nbytes")
        rows.append(
            [
                f"`{step['name']}`",
                *(_seconds(each) for each in (own, cpu, other, bus)),
                _ratio(own, bus),
                _ratio(rest, bus),
                _ratio(cpu, own),
                _ratio(other, own),
                format_memory(peak) if peak else _ABSENT,
                {True: "yes", False: "no", None: _ABSENT}[values.get("same_bytes")],
            ]
        )
    return _table(rows)


def render_workers(steps: Sequence[Mapping[str, Any]]) -> str:
    """Return what jobs took on the CPU, by the number of workers."""
    names = list(dict.fromkeys(name for step in steps for name in step["values"]["contenders"]))
    rows = [["job", *names], ["---", *["---:"] * len(names)]]
    rows += [
        [f"`{step['name']}`", *(_seconds(_least(step, name)) for name in names)] for step in steps
    ]
    return _table(rows)


def render_foreseen(
    merges: Mapping[str, Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]
) -> str:
    """Return what ``--device auto`` expects of jobs, beside what they took.

    What limits them stands behind the seconds that are foreseen, which leave out what programs take to start.
    """
    measured = {step["name"]: step for step in steps}
    header = ["job", "device", "foreseen", "CPU", "foreseen", "`--device auto` takes"]
    rows = [header, ["---", *["---:"] * 4, "---"]]
    for name, each in merges.items():
        took = [
            None if name not in measured else _least(measured[name], on) for on in (DEVICE, CPU)
        ]
        own, cpu = (_foreseen(each.get(on)) for on in (DEVICE, CPU))
        taken = {True: "the device", False: "the CPU"}.get(each.get("taken"), _ABSENT)
        row = [f"`{name}`", _seconds(took[0]), own, _seconds(took[1]), cpu]
        rows.append([*row, each.get("why_not", taken)])
    return _table(rows)


def _foreseen(seconds: Mapping[str, Any] | None) -> str:
    return _ABSENT if seconds is None else f"{seconds['total']:.2f} s ({seconds['limit']})"


def render_steps(steps: Sequence[Mapping[str, Any]]) -> str:
    """Return what became of each step."""
    rows = [["step", "result", "seconds", "why"], ["---", "---", "---:", "---"]]
    for step in steps:
        seconds = f"{step['seconds']:.1f}" if step["status"] != "left out" else _ABSENT
        # A bar would begin another column.
        why = (step["why"] or "").replace("|", "/").replace("\n", " ")
        rows.append([step["name"], step["status"], seconds, why])
    return _table(rows)


def _conditions(results: Mapping[str, Any]) -> str:
    device = results["device"]
    found = {step["name"]: step["values"] for step in results["steps"]}
    machine = found.get("facts", {}).get("machine")
    versions = found.get("facts", {}).get("versions", {})
    where = f"{device['device']}, {device['device_memory_nbytes'] / GIB:.0f} GiB"
    if results["stands_in"]:
        where = "the CPU in place of a device"
    if machine is not None:
        where += f"; {machine['cores']} cores of {machine['cpu']}"
        where += f", {machine['memory_nbytes'] / GIB:.0f} GiB; files in {machine['file_system']}"
    told = "".join(f", {name} {version}" for name, version in versions.items() if version)
    bus = found.get("bus", {}).get("bytes_per_second")
    rate = "" if bus is None else f"; bus {bus / 1e9:.1f} GB/s"
    commit = results["commit"] + (" with changes" if results["dirty"] else "")
    return f"{results['size']} parameters, 2 sources, {where}{rate}; commit {commit}{told}."


def _least(step: Mapping[str, Any], name: str) -> float | None:
    summary = step["values"]["contenders"].get(name)
    if summary is None or summary["failure"] is not None:
        return None
    seconds: float = summary["wall_seconds_least"]
    return seconds


def _seconds(seconds: float | None) -> str:
    return _ABSENT if seconds is None else f"{seconds:.2f} s"


def _ratio(above: float | None, below: float | None) -> str:
    return f"{above / below:.2f}" if above is not None and below else _ABSENT


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
