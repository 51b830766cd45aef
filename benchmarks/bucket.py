"""A server that speaks S3, of a directory of this machine: buckets are folders, objects are files.

    python -m benchmarks.bucket DIR

It is localbucket, with a port of the system's choice, which it prints.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path

import psutil

from benchmarks.models import ROOT

KEYS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
}
"""Credentials, which are not looked at."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A server that runs."""

    directory: Path
    """What it serves."""
    address: str
    """Where it listens."""
    process: psutil.Process
    """The server."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which programs find it."""
        return {"AWS_ENDPOINT_URL": self.address, **KEYS}

    @property
    def cpu_seconds(self) -> float:
        """What it has taken so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def serve(directory: Path) -> Iterator[Bucket]:
    """Serve a directory until the end.

    Raises:
        RuntimeError: localbucket is not installed, or does not start.
    """
    directory.mkdir(parents=True, exist_ok=True)
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.bucket", str(directory.resolve())],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None  # noqa: S101 - it is a pipe
        port = server.stdout.readline().strip()
        if not port:
            raise RuntimeError("localbucket does not start: pip install localbucket")
        yield Bucket(directory, f"http://127.0.0.1:{port}", psutil.Process(server.pid))
    finally:
        server.kill()
        server.communicate()


def _run(directory: Path) -> None:
    import localbucket

    handler = localbucket.S3Handler
    handler.data_root = directory
    # Answers of two writes would wait for each other's acknowledgement.
    handler.disable_nagle_algorithm = True
    handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _run(Path(sys.argv[1]))
