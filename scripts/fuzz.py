"""A million inputs for the parsers, each made from a number; ``scripts/fuzz`` runs this.

Inputs are read in batches, each in a process of its own with a limit of address space and of
processor time, so that a parser that asks for too much is stopped and named rather than the machine.
An input that fails is written to ``fuzz-failures/`` and its number printed; the same number makes it
again: ``scripts/fuzz --target shard --first 4711 --inputs 1``.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from random import Random
from time import perf_counter

from targets import TARGETS, Target, TooSlow, check

SHARES = {
    "shard": 25,
    "pickle": 20,
    "archive": 15,
    "index": 12,
    "manifest": 10,
    "config": 8,
    "recipe": 5,
    "plan": 5,
}
"""Percent of the inputs; recipes and plans take several times as long as the others."""
BATCH = 20_000
ADDRESS_SPACE_BYTES = 2**31
"""What a batch may map beyond what it has when it starts."""
CPU_SECONDS = 1200
"""What a batch may compute; the slowest takes 150 seconds."""
FAILURES = Path("fuzz-failures")


def main() -> int:
    """Run what the arguments say; return 1 if any input failed."""
    options = _options()
    if options.batch is not None:
        return _run_batch(TARGETS[options.batch], options.first, options.inputs, options.state)
    names = [options.target] if options.target else list(TARGETS)
    failed = 0
    for name in names:
        count = options.inputs if options.target else options.inputs * SHARES[name] // 100
        start = perf_counter()
        bad = sum(
            _start_batch(name, first, min(BATCH, options.first + count - first))
            for first in range(options.first, options.first + count, BATCH)
        )
        seconds = perf_counter() - start
        print(f"{name:<10}{count:>10,} inputs  {bad} failed  {seconds:.0f} s", flush=True)
        failed += bad
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="how many, in all")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--target", choices=TARGETS, help="one parser alone")
    parser.add_argument("--batch", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _start_batch(name: str, first: int, count: int) -> int:
    """Return how many inputs of a batch failed, having run it in a process with limits."""
    with tempfile.TemporaryDirectory() as scratch:
        state = Path(scratch, "state")
        command = [sys.executable, __file__, f"--batch={name}", f"--state={state}"]
        command += [f"--first={first}", f"--inputs={count}"]
        status = subprocess.run(command, check=False).returncode
        reached, _, failed = state.read_text().partition(" ")
    if status == 0:
        return int(failed)
    print(f"{name} {reached}: ended the process with status {status}", flush=True)
    _keep(TARGETS[name], int(reached))
    rest = first + count - int(reached) - 1
    return int(failed) + 1 + (_start_batch(name, int(reached) + 1, rest) if rest else 0)


def _run_batch(target: Target, first: int, count: int, state: Path) -> int:
    """Check the inputs; keep the number of the current one in ``state``."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS,) * 2)
    failed = 0
    with state.open("wb", buffering=0) as stream, tempfile.TemporaryDirectory() as directory:
        target.prepare(Path(directory))
        for number in range(first, first + count):
            os.pwrite(stream.fileno(), f"{number} {failed}".encode(), 0)
            try:
                check(target, target.make(_choices(number)), Path(directory))
            # Whatever it is, it is what is looked for.
            except (Exception, TooSlow):  # noqa: BLE001
                failed += 1
                print(f"{target.name} {number}:", flush=True)
                traceback.print_exc(limit=-6)
                _keep(target, number)
        os.pwrite(stream.fileno(), f"{first + count} {failed}".encode(), 0)
    return 0


def _keep(target: Target, number: int) -> None:
    FAILURES.mkdir(exist_ok=True)
    (FAILURES / f"{target.name}-{number}").write_bytes(target.make(_choices(number)))


def _choices(number: int) -> Random:
    return Random(number)  # noqa: S311 - repeatable on purpose


if __name__ == "__main__":
    sys.exit(main())
