"""What ``--device auto`` would foresee of merges, on the CPU and on a device, and by which rates.

    python -m benchmarks.foreseeing --device cuda:0 --memory 16GiB RECIPE...

Prints seconds by stage for both, whatever the answer is, for each recipe by the name of its file, as JSON.
Beside what merges take, they show which of its estimates is wrong. The device ``cpu`` has nothing to foresee but
the CPU.

Memory: what the planner's own look at the machine takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import streammerge
from streammerge.engine.accelerator import opening
from streammerge.plan.asking import find_method
from streammerge.plan.choice import Seconds
from streammerge.plan.estimating import (
    DeviceRates,
    Rates,
    estimate_on_cpu,
    estimate_on_device,
    why_not,
    why_not_there,
    wins,
)
from streammerge.plan.types import MergePlan
from streammerge.probing.device import measure_device
from streammerge.probing.host import measure_host

CPU = "cpu"


def main(arguments: Sequence[str]) -> int:
    """Foresee what the command line names and return the exit code."""
    options = parse_arguments(arguments)
    rates = None
    if options.device != CPU:
        (backend,) = opening.open_devices([options.device])
        rates = measure_device(backend, ranks=True)
    found = {path.stem: look_at(path, rates, options) for path in options.recipes}
    print(json.dumps({"device_rates": rates and asdict(rates), "merges": found}, indent=1))
    return 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    summary = (__doc__ or "").split("\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.foreseeing", description=summary)
    parser.add_argument("recipes", type=Path, nargs="+", metavar="RECIPE")
    parser.add_argument("--device", default="cuda:0", help="cpu for the CPU alone")
    parser.add_argument("--memory", default="16GiB", help="budget of the host")
    parser.add_argument("--device-memory", default="8GiB", help="budget on the device")
    return parser.parse_args(arguments)


def look_at(path: Path, device: DeviceRates | None, options: argparse.Namespace) -> dict[str, Any]:
    """Return what is foreseen of one merge.

    Args:
        path: Its recipe.
        device: The rates of the device; None without one.
        options: What the command line says.
    """
    planned = _plan(path, memory=options.memory, device=CPU)
    method = find_method(planned.method)
    why = why_not(planned, method)
    rates = why or measure_host(planned, method)
    if isinstance(rates, str):
        return {"why_not": rates}
    on_cpu = estimate_on_cpu(planned, method, rates)
    found: dict[str, Any] = {"rates": asdict(rates), CPU: told(on_cpu)}
    if device is None:
        return found
    there = _plan(
        path, memory=options.memory, device=options.device, device_memory=options.device_memory
    )
    return found | foresee_there(there, on_cpu, rates, device)


def foresee_there(
    plan: MergePlan, on_cpu: Seconds, rates: Rates, device: DeviceRates
) -> dict[str, Any]:
    """Return what is foreseen of a merge on a device, and whether that would be taken.

    Args:
        plan: The plan for the device.
        on_cpu: The estimate without it.
        rates: The machine's.
        device: The device's.
    """
    method = find_method(plan.method)
    why = why_not_there(plan, method)
    if why is not None:
        return {"why_not": why}
    seconds = estimate_on_device(plan, method, rates, device)
    return {"device": told(seconds), "taken": wins(seconds, on_cpu)}


def told(seconds: Seconds) -> dict[str, Any]:
    """Return the stages of an estimate, what limits it, and all of it."""
    return asdict(seconds) | {"limit": seconds.limit, "total": seconds.total}


def _plan(path: Path, **options: Any) -> MergePlan:
    planned = streammerge.plan(path, **options)
    if not isinstance(planned, MergePlan):
        raise SystemExit(f"{path} is more than one merge")
    return planned


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
