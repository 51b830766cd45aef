"""Real schedulers and workers of Dask on loopback, started and stopped by tests.

with DaskCluster(tmp_path) as cluster:
worker = cluster.start_worker()
... cluster.on ...            # what --on is given
worker.kill()
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

ROOT = Path(__file__).resolve().parent.parent
needs_dask = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None,
    reason="needs the library distributed, of the extra dask",
)
SLOW = """
import sys
if "streammerge.executors.unit" in sys.orig_argv:
    import time
    from streammerge.checkpoint import bytesource, outputfile
    outputfile.SYNC_BYTES = 1 << 16
    def slow(self, offset, buffer, read=bytesource.PreadSource._read_some):
        time.sleep(0.05)
        return read(self, offset, buffer)
    bytesource.PreadSource._read_some = slow
"""
"""What an interpreter does first that is to be killed in the middle of a part."""
OTHER_VERSION = "import streammerge.version\nstreammerge.version.VERSION = '9.9'\n"


def wait_until(happened: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait for something to become true, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


class Server:
    """A process that runs until it is told to end."""

    def __init__(self, arguments: list[str], log: Path, first: str = "") -> None:
        """Start it.

        Args:
            arguments: Of Python.
            log: Where its output goes.
            first: What every interpreter below it does when it starts.
        """
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        if first:
            directory = log.with_suffix(".first")
            directory.mkdir()
            (directory / "sitecustomize.py").write_text(first)
            paths.insert(0, str(directory))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=stream,
                stderr=stream,
                env=environment,
                start_new_session=True,
            )

    def kill(self) -> None:
        """End it and all that it started, at once."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.wait()


class DaskCluster:
    """A scheduler, and as many workers as a test starts; all end with the block."""

    def __init__(self, directory: Path) -> None:
        """Say where logs go."""
        self._directory = directory
        self._servers: list[Server] = []

    def __enter__(self) -> Self:
        file = self._directory / "scheduler.json"
        address = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
        self._start(["scheduler", *address, "--scheduler-file", str(file)])
        found = wait_until(lambda: file.exists() and file.read_text().strip())
        address_of = json.loads(found)["address"]
        self.on = address_of.replace("tcp://", "dask://")
        """What ``--on`` is given."""
        return self

    def start_worker(self, first: str = "") -> Server:
        """Start a worker with one thread and no limit of its own; see :class:`Server`."""
        address = [
            "--host",
            "127.0.0.1",
            "--no-dashboard",
            "--local-directory",
            str(self._directory),
        ]
        limits = ["--nthreads", "1", "--memory-limit", "0", "--death-timeout", "60"]
        return self._start(
            ["worker", self.on.replace("dask://", "tcp://"), *address, *limits], first
        )

    def _start(self, arguments: list[str], first: str = "") -> Server:
        log = self._directory / f"{len(self._servers)}.log"
        self._servers.append(Server(["-m", "dask", *arguments], log, first))
        return self._servers[-1]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for server in reversed(self._servers):
            server.kill()
