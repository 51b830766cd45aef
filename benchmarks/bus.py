"""The floor of a merge on an accelerator: the same bytes copied there and back, nothing computed.

    python -m benchmarks.bus --in-nbytes N --out-nbytes M [--device cuda:0]

Page-locked buffers of 8 MiB go to the device on one stream and come back on another one, at the same
time, as often as it takes. Prints the seconds and what the device is, as JSON. The device ``cpu``
stands in for one where there is none: its copies go from memory to memory, one after the other.

Memory: four buffers on the host and on the device.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.models import ROOT

BUFFER_NBYTES = 8 * 2**20
"""As large as the largest slots of a merge."""


def count_copies(nbytes: int) -> list[int]:
    """Return the sizes of the copies that ``nbytes`` take."""
    whole, rest = divmod(nbytes, BUFFER_NBYTES)
    return [BUFFER_NBYTES] * whole + ([rest] if rest else [])


def measure_bus(
    device: str, *, in_nbytes: int, out_nbytes: int, timeout_seconds: float | None = None
) -> dict[str, Any]:
    """Return what this module prints, run in a process of its own.

    Raises:
        subprocess.CalledProcessError: The device cannot be used.
        subprocess.TimeoutExpired: It took longer than it may.
    """
    command = [sys.executable, "-m", "benchmarks.bus", "--device", device]
    command += ["--in-nbytes", str(in_nbytes), "--out-nbytes", str(out_nbytes)]
    finished = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=timeout_seconds
    )
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def run_bus(device: str, *, in_nbytes: int, out_nbytes: int) -> dict[str, Any]:
    """Copy bytes to a device and back, and say what it took and where."""
    import torch

    if device == "cpu":
        return _run_in_memory(in_nbytes, out_nbytes)
    there = torch.device(device)
    host = [torch.empty(BUFFER_NBYTES, dtype=torch.uint8, pin_memory=True) for _ in range(4)]
    memory = [torch.empty(BUFFER_NBYTES, dtype=torch.uint8, device=there) for _ in range(4)]
    streams = [torch.cuda.Stream(there) for _ in range(2)]

    def copy_all() -> float:
        torch.cuda.synchronize(there)
        started = time.perf_counter()
        jobs = [(count_copies(in_nbytes), memory[:2], host[:2])]
        jobs += [(count_copies(out_nbytes), host[2:], memory[2:])]
        for stream, (sizes, targets, origins) in zip(streams, jobs, strict=True):
            with torch.cuda.stream(stream):
                for number, size in enumerate(sizes):
                    target, origin = targets[number % 2], origins[number % 2]
                    target[:size].copy_(origin[:size], non_blocking=True)
        torch.cuda.synchronize(there)
        return time.perf_counter() - started

    # The first time pays for the driver's own preparations.
    seconds = min(copy_all() for _ in range(3))
    properties = torch.cuda.get_device_properties(there)
    return {
        "seconds": seconds,
        "in_nbytes": in_nbytes,
        "out_nbytes": out_nbytes,
        "device": properties.name,
        "device_memory_nbytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def _run_in_memory(in_nbytes: int, out_nbytes: int) -> dict[str, Any]:
    import torch

    origin, target = (torch.ones(BUFFER_NBYTES, dtype=torch.uint8) for _ in range(2))
    started = time.perf_counter()
    for size in (*count_copies(in_nbytes), *count_copies(out_nbytes)):
        target[:size].copy_(origin[:size])
    return {
        "seconds": time.perf_counter() - started,
        "in_nbytes": in_nbytes,
        "out_nbytes": out_nbytes,
        "device": f"cpu {platform.machine()}",
        "device_memory_nbytes": 0,
        "torch": torch.__version__,
        "cuda": None,
    }


def main(arguments: Sequence[str]) -> int:
    """Run the floor that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--in-nbytes", type=int, required=True)
    parser.add_argument("--out-nbytes", type=int, required=True)
    parser.add_argument("--device", default="cuda:0")
    options = parser.parse_args(arguments)
    found = run_bus(options.device, in_nbytes=options.in_nbytes, out_nbytes=options.out_nbytes)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
