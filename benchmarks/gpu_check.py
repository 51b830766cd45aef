"""Tests and measures on a machine with one CUDA device and no network, within minutes.

    scripts/gpu_check pack            where there is a network: collect what the machine lacks
    scripts/gpu_check run OUT         on the machine: install, compile, test, measure
    scripts/gpu_check show RESULTS    print the tables of results, as Markdown

``run`` writes OUT/results.json anew after every step, and OUT/log.txt. It goes on after a step that
failed, and leaves out what no longer fits into its time. Its exit code is 0 if no step failed. The
results are those of ``benchmarks/results/gpu-DEVICE-COMMIT.json``, if they are copied there.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import environment, gpu_setup, wheels
from benchmarks.bus import measure_bus
from benchmarks.gpu_setup import MEMORY_DIRECTORY, Place, room_in_memory
from benchmarks.gpu_tables import render_check
from benchmarks.models import SIZES
from benchmarks.steps import (
    Limit,
    Log,
    Outcome,
    Record,
    Step,
    carry_out,
    describe_error,
    replace_file,
)

FORMAT = 1
"""Raised when the meaning of a field of the results changes."""
MINUTES = 8.0
_MOST_MODELS = 5
"""Of the usual size, outputs included, that lie in one place at a time."""


def main(arguments: Sequence[str]) -> int:
    """Do what the command line asks for and return the exit code."""
    options = parse_arguments(arguments)
    if options.command == "pack":
        return _pack()
    if options.command == "show":
        print(render_check(json.loads(options.results.read_text(encoding="utf-8"))))
        return 0
    return _run(options)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    summary = (__doc__ or "").split("\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description=summary)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pack", help=f"collect wheels in {wheels.FOLDER.name}/")
    run = commands.add_parser("run", help="install, compile, test and measure")
    run.add_argument("out", type=Path, metavar="OUT", help="directory for results.json and log.txt")
    run.add_argument("--minutes", type=float, default=MINUTES, help="for all of it")
    run.add_argument("--device", default="cuda:0", help="cpu stands in for a device, to try this")
    run.add_argument("--size", choices=SIZES, default="1.1B", help="of the models")
    run.add_argument(
        "--large", choices=[*SIZES, "none"], default="8B", help="of a few merges at the end"
    )
    run.add_argument("--memory", default="16GiB", help="budget of the host")
    run.add_argument("--device-memory", default="8GiB", help="budget on the device")
    run.add_argument(
        "--keep-kernels", action="store_true", help="take the compiled kernels that are there"
    )
    run.add_argument("--commit", help="of these files, where git cannot tell")
    show = commands.add_parser("show", help="print tables as Markdown")
    show.add_argument("results", type=Path, metavar="RESULTS")
    return parser.parse_args(arguments)


def _pack() -> int:
    try:
        packed = wheels.pack(
            wheels.FOLDER, call=lambda command: subprocess.run(command, check=True)
        )
    except subprocess.CalledProcessError as error:
        print(f"pip could not collect them: exit code {error.returncode}", file=sys.stderr)
        return 1
    total = sum(wheel.stat().st_size for wheel in packed)
    print(f"{len(packed)} wheels, {total / 2**20:.1f} MiB, in {wheels.FOLDER.name}/")
    return 0


def _run(options: argparse.Namespace) -> int:
    limit = Limit(time.monotonic() + options.minutes * 60)
    try:
        found = measure_bus(
            options.device, in_nbytes=2**20, out_nbytes=2**20, timeout_seconds=limit.left()
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        lines = str(error.stderr or error).strip().splitlines()
        print(f"{options.device} cannot be used: {lines[-1]}", file=sys.stderr)
        if options.device != "cpu":
            print("--device cpu lets the CPU stand in for it", file=sys.stderr)
        return 2
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    results = describe_session(found, options)
    with ending_in_order(), Log(out / "log.txt") as log, make_work(options.size) as work:
        place = Place(work, log, options.device)

        def tell(record: Record) -> None:
            why = record.why and environment.hide_paths(record.why, work)
            results["steps"].append(asdict(replace(record, why=why)))
            replace_file(out / "results.json", json.dumps(results, indent=1) + "\n")
            line = f"{record.status:<9} {record.seconds:6.1f} s  {record.name}"
            line += f": {why}" if why else ""
            print(line, flush=True)
            log.write(line)

        good = carry_out(iter_steps(place, options), limit=limit, tell=tell)
    print(f"\n{render_check(results)}")
    print(f"\nto keep them: benchmarks/results/{results_name(results)}")
    return 0 if good else 1


def describe_session(device: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return the results document, complete but for the steps.

    Args:
        device: What ``benchmarks.bus`` says of it.
        options: What the command line says.
    """
    commit, dirty = environment.commit()
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": options.commit or commit,
        # What was told is believed: a copy without its history has changed in every file.
        "dirty": dirty and options.commit is None,
        "device": {name: device[name] for name in ("device", "device_memory_nbytes", "cuda")},
        "stands_in": options.device == "cpu",
        "minutes": options.minutes,
        "size": options.size,
        "large": options.large,
        "memory": options.memory,
        "device_memory": options.device_memory,
        "steps": [],
    }


def results_name(results: dict[str, Any]) -> str:
    """Return the file in ``benchmarks/results/`` that these results belong in."""
    device = results["device"]["device"].replace(" ", "-").replace("/", "-")
    return f"gpu-{device}-{results['commit']}{'-dirty' if results['dirty'] else ''}.json"


def iter_steps(place: Place, options: argparse.Namespace) -> Iterator[Step]:
    """Yield all steps in order; what is measured is looked up once it can be imported."""
    yield Step("facts", partial(gpu_setup.tell_facts, place), 30)
    yield Step("wheels", partial(gpu_setup.install, place), 60)
    kernels = gpu_setup.load_kernels if options.keep_kernels else gpu_setup.compile_kernels
    yield Step("kernels", partial(kernels, place), 90)
    yield Step("modules", partial(gpu_setup.compile_modules, place), 40)
    yield Step("tests", partial(gpu_setup.run_tests, place), 150, least_seconds=20)
    try:
        from benchmarks import gpu_steps
    except ImportError as error:
        outcome = Outcome({}, describe_error(error))
        yield Step("measuring", lambda _: outcome, 5)
        return
    session = gpu_steps.Session(
        place=place,
        size=options.size,
        large=None if options.large in ("none", options.size) else options.large,
        memory=options.memory,
        device_memory=options.device_memory,
        cores=environment.machine_facts(place.work)["cores"],
        seconds=options.minutes * 60,
    )
    yield from gpu_steps.plan_steps(session)


@contextmanager
def make_work(size: str) -> Iterator[Path]:
    """Make a directory for models and outputs, in memory if there is room, and remove it at last."""
    in_memory = room_in_memory() >= _MOST_MODELS * SIZES[size].nbytes
    parent = MEMORY_DIRECTORY if in_memory else None
    with tempfile.TemporaryDirectory(prefix="streammerge-gpu-check-", dir=parent) as work:
        yield Path(work).resolve()


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Let a request to end remove what lies in memory, which would stay there."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
