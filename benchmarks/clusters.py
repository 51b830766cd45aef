"""Two workers of one core each, against one process of two: what an engine costs, and each of its processes.

    python -m benchmarks.clusters --work DIR [--size 1.1B] [--engine dask] [--runs 3] [--method ties]

The scheduler or head, the driver and the process that talks to the engine run where there is room. Models
come from the disk in each run, as far as this machine lets caches be dropped; runs take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.measuring import drop_page_cache
from benchmarks.models import prepare_models
from streammerge.units import format_size

_MARK = "STREAMMERGE_BENCHMARK"
_SAMPLE_SECONDS = 0.05
_ROLES = {
    "unit": "streammerge.executors.unit",
    "engine's process": "streammerge.executors.apart",
    "driver": "streammerge merge",
    "worker": "spawn_main",
    "worker of Ray": "ray::run_unit",
    "raylet": "raylet/raylet",
    "head": "gcs_server",
    "scheduler": "dask scheduler",
    "nanny": "dask worker",
}
"""What processes are called here, by what their command lines hold."""


class Watch:
    """Looks at all processes with a mark, for their most resident memory and how long parts' lived."""

    def __init__(self, mark: str) -> None:
        """Begin to look."""
        self._mark = mark
        self._end = threading.Event()
        self.peaks: dict[str, int] = {}
        self.lives: dict[int, tuple[float, float]] = {}
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._end.wait(_SAMPLE_SECONDS):
            for process in marked(self._mark):
                with contextlib.suppress(psutil.Error):
                    line = " ".join(process.cmdline())
                    role = next((name for name, part in _ROLES.items() if part in line), None)
                    if role is None:
                        continue
                    memory = process.memory_info().rss
                    self.peaks[role] = max(self.peaks.get(role, 0), memory)
                    if role == "unit":
                        self.lives[process.pid] = (process.create_time(), time.time())

    def end(self) -> None:
        """Look no more."""
        self._end.set()
        self._thread.join()


def marked(mark: str) -> set[psutil.Process]:
    """Return all processes with a mark among their variables, and what they have started."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == mark:
                found |= {process, *process.children(recursive=True)}
    return found


def start(arguments: list[str], cores: set[int], mark: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a module of this interpreter on some cores."""
    environment = {**os.environ, _MARK: mark, "RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=stream, stderr=stream, env=environment
        )
    # What it starts later inherits them.
    os.sched_setaffinity(process.pid, cores)
    return process


@contextlib.contextmanager
def engine(name: str, cores: list[int], mark: str, place: Path) -> Iterator[str]:
    """Run a scheduler and two workers of a core each; yield what ``--on`` is given."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    log = place / "engine.log"
    try:
        if name == "dask":
            address = f"127.0.0.1:{port}"
            start(
                ["dask", "scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"],
                set(cores),
                mark,
                log,
            )
            limits = ["--nthreads", "1", "--memory-limit", "0", "--no-dashboard"]
            for core in cores:
                start(["dask", "worker", f"tcp://{address}", *limits], {core}, mark, log)
        else:
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16))
            address = f"{socket.gethostbyname(socket.gethostname())}:{port}"
            common = [f"--temp-dir={place}", "--object-store-memory=80000000"]
            ray = ["ray.scripts.scripts", "start"]
            head = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
            start([*ray, *head, *common], set(cores), mark, log).wait()
            for core in cores:
                node = [f"--address={address}", "--num-cpus=1"]
                start([*ray, *node, *common], {core}, mark, log).wait()
        # Workers join within seconds; who comes later would have no part.
        time.sleep(10)
        yield f"{name}://{address}"
    finally:
        for process in marked(mark):
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)


def run(
    recipe: Path, out: Path, options: list[str], cores: list[int], mark: str
) -> tuple[float, dict[str, Any]]:
    """Merge, and return the seconds that it took and what its manifest says of the run."""
    shutil.rmtree(out, ignore_errors=True)
    log = out.with_suffix(".log")
    arguments = ["streammerge", "merge", str(recipe), str(out), "--quiet", *options]
    began = time.perf_counter()
    process = start(arguments, set(cores), mark, log)
    if process.wait():
        raise SystemExit(log.read_text())
    seconds = time.perf_counter() - began
    found: dict[str, Any] = json.loads((out / "streammerge_manifest.json").read_text())["run"]
    return seconds, found


def main() -> None:
    """Measure, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="models and results, some 20 GB")
    parser.add_argument("--size", default="1.1B")
    parser.add_argument("--method", default="ties")
    parser.add_argument("--engine", choices=["dask", "ray"], default="dask")
    parser.add_argument("--memory", default="1GiB", help="of each process")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    models = prepare_models(options.work, options.size, 2)
    recipe, out = options.work / "recipe.yaml", options.work / "clustered"
    recipe.write_text(
        yaml.safe_dump(
            {
                "method": options.method,
                "parameters": {"density": 0.2} if options.method == "ties" else {},
                "base": str(models.base),
                "sources": [{"path": str(path)} for path in models.tuned],
            }
        )
    )
    inputs = [path for each in (models.base, *models.tuned) for path in each.glob("*.safetensors")]
    cores = sorted(os.sched_getaffinity(0))[:2]
    mark = secrets.token_hex(8)
    with (
        tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as place,
        engine(options.engine, cores, mark, Path(place)) as on,
    ):
        watch = Watch(mark)
        ways: dict[str, Callable[[], tuple[float, dict[str, Any]]]] = {
            "one process of two cores": lambda: run(
                recipe, out, ["--memory", options.memory, "--workers", "2"], cores, "alone"
            ),
            f"two workers of one ({options.engine})": lambda: run(
                recipe, out, ["--memory", options.memory, "--on", on], cores, mark
            ),
        }
        took: dict[str, list[float]] = {name: [] for name in ways}
        overheads = []
        for number in range(options.runs):
            for name, way in ways.items():
                how = drop_page_cache(inputs, everything=True)
                watch.lives.clear()
                seconds, found = way()
                took[name].append(seconds)
                print(f"{number + 1}: {name}: {seconds:.2f} s; cold: {how}")
                for part in found["parts"]:
                    print(
                        f"   part {part['part']}/{part['parts']}: {part['seconds']:.2f} s, "
                        f"{format_size(part['measured_memory'])}"
                    )
                if found["parts"]:
                    lives = sum(end - began for began, end in watch.lives.values())
                    work = sum(part["seconds"] for part in found["parts"])
                    overheads.append((lives - work) / len(found["parts"]))
        watch.end()
    one, two = (statistics.median(each) for each in took.values())
    print(f"medians: {one:.2f} s and {two:.2f} s, {two / one:.2f} times")
    print(f"a process of a part beside its work: {statistics.median(overheads):.2f} s")
    for role, nbytes in sorted(watch.peaks.items()):
        print(f"most resident memory, {role}: {format_size(nbytes)}")
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
