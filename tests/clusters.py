"""Real clusters of Dask and of Ray on loopback, started and stopped by tests.

with DaskCluster(tmp_path) as cluster:
worker = cluster.start_worker()
... cluster.on ...            # what --on is given
worker.kill()

with RayCluster() as cluster:
node = cluster.start_node()
...
node.kill()
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pytest
import torch
import yaml
from models import recipe_of, write_model

import streammerge
from streammerge.errors import OutputError
from streammerge.statistics import BLOCK

ROOT = Path(__file__).resolve().parent.parent
needs_dask = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None,
    reason="needs the library distributed, of the extra dask",
)
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="needs the library ray, of the extra of that name",
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
SLOWER = (
    SLOW.replace("0.05", "0.5")
    + "    from streammerge import parting\n"
    + "    parting._SECONDS_BETWEEN_CHECKS = 0.2\n"
)
"""The same, of one that notices at once that nobody waits for it any more."""
OTHER_VERSION = "import streammerge.version\nstreammerge.version.VERSION = '9.9'\n"


def wait_until(happened: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait for something to become true, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


def bytes_of(directory: Path) -> dict[str, bytes]:
    """Return the contents of all shards."""
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def work_for_parts(directory: Path) -> dict[str, Any]:
    """Return the recipe of work of a few seconds for slow workers: files and pieces, several each."""
    generator = torch.Generator().manual_seed(5)

    def draw(name: str) -> Path:
        tensors = {f"{i}": torch.randn(8 * BLOCK, generator=generator) for i in range(8)}
        return write_model(directory / name, tensors)

    base, *sources = (draw(name) for name in ("base", "one", "two"))
    return recipe_of(
        "ties",
        base,
        sources,
        parameters={"density": 0.3},
        output={"max_shard_size": "6MB", "dtype": "float32"},
    )


def start_merge(
    recipe: dict[str, Any], out: Path, *options: str, to: str | None = None
) -> subprocess.Popen[str]:
    """Start the command that merges to a directory; or to an address, with the recipe beside it."""
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return subprocess.Popen(
        [sys.executable, "-m", "streammerge", "merge", str(path), to or str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


_RUN = "STREAMMERGE_TEST_RUN"
os.environ[_RUN] = uuid.uuid4().hex
"""For all that these tests start, here or on clusters: others may run at the same time."""


def units() -> list[psutil.Process]:
    """Return the processes that do parts now."""
    found = []
    for each in psutil.process_iter(["cmdline"]):
        if "streammerge.executors.unit" in (each.info["cmdline"] or ()):
            with suppress(psutil.Error):
                if each.environ().get(_RUN) == os.environ[_RUN]:
                    found.append(each)
    return found


def has_work(out: Path) -> bool:
    """Return whether something of a part that is under way is safely on the disk."""
    try:
        status = streammerge.read_status(out)
    except OutputError:
        return False
    return any(0 < part.done < 1 for part in status.parts)


def environment(log: Path, first: str = "") -> dict[str, str]:
    """Return the variables of a process that finds this package, and does something first."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if first:
        directory = log.with_suffix(".first")
        directory.mkdir()
        (directory / "sitecustomize.py").write_text(first)
        paths.insert(0, str(directory))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


class Server:
    """A process that runs until it is told to end."""

    def __init__(self, arguments: list[str], log: Path, first: str = "") -> None:
        """Start it.

        Args:
            arguments: Of Python.
            log: Where its output goes.
            first: What every interpreter below it does when it starts.
        """
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=stream,
                stderr=stream,
                env=environment(log, first),
                start_new_session=True,
            )

    def workers(self) -> list[psutil.Process]:
        """Return the processes that do what it is asked for: of a nanny those that it looks after."""
        children = psutil.Process(self._process.pid).children()
        # Beside one that tidies up after them.
        return [each for each in children if "spawn_main" in " ".join(each.cmdline())]

    def send(self, number: int) -> None:
        """Send a signal to it alone."""
        self._process.send_signal(number)

    def kill_alone(self) -> None:
        """End it and what it looks after, at once, and leave what these have started."""
        for process in (psutil.Process(self._process.pid), *self.workers()):
            process.kill()

    def kill(self) -> None:
        """End it and all that it started, at once."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.wait()


class Wire:
    """A connection to a server that may be cut: bytes are taken, and go nowhere, and nobody hangs up."""

    def __init__(self, target: str) -> None:
        """Begin to forward connections to ``HOST:PORT``."""
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._cut = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        """What is given to who is to reach the server by it."""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if not self._cut.is_set():
                    sink.sendall(data)
            if not self._cut.is_set():
                sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Forward nothing from now on."""
        self._cut.set()

    def close(self) -> None:
        """Hang up."""
        for each in self._sockets:
            each.close()


class DaskCluster:
    """A scheduler, and as many workers as a test starts; all end with the block."""

    def __init__(self, directory: Path) -> None:
        """Say where logs go."""
        self._directory = directory
        self._servers: list[Server] = []

    @property
    def scheduler(self) -> Server:
        """The scheduler."""
        return self._servers[0]

    def __enter__(self) -> Self:
        file = self._directory / "scheduler.json"
        address = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
        self._start(["scheduler", *address, "--scheduler-file", str(file)])
        found = wait_until(lambda: file.exists() and file.read_text().strip())
        address_of = json.loads(found)["address"]
        self.on = address_of.replace("tcp://", "dask://")
        """What ``--on`` is given."""
        return self

    def start_worker(self, first: str = "", through: str | None = None) -> Server:
        """Start a worker with one thread and no limit of its own; see :class:`Server`.

        Args:
            first: As there.
            through: Where it reaches the scheduler; None for the scheduler's own address.
        """
        address = [
            "--host",
            "127.0.0.1",
            "--no-dashboard",
            "--local-directory",
            str(self._directory),
        ]
        limits = ["--nthreads", "1", "--memory-limit", "0", "--death-timeout", "60"]
        scheduler = through or self.on.removeprefix("dask://")
        return self._start(["worker", f"tcp://{scheduler}", *address, *limits], first)

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


_MARK = "STREAMMERGE_TEST_NODE"
"""A variable of all processes of a node of Ray, which come loose of the one that starts them."""


def marked(mark: str) -> list[psutil.Process]:
    """Return all processes with a mark, and what they have started."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark:
                # Those that call themselves something lose their variables.
                found |= {process, *process.children(recursive=True)}
        except psutil.Error:
            continue
    return list(found)


def send(mark: str, number: int) -> None:
    """Send a signal to all processes with a mark."""
    for process in marked(mark):
        try:
            process.send_signal(number)
        except psutil.Error:
            continue


def kill(mark: str) -> None:
    """End all processes with a mark, at once."""
    while marked(mark):
        send(mark, signal.SIGKILL)
        time.sleep(0.05)


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
        return port


@contextmanager
def ray_processes() -> Iterator[dict[str, str]]:
    """Yield variables for scripts that start nodes of Ray, which end with the block."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
    ) as directory:
        try:
            yield {
                _MARK: mark,
                "RAY_TMPDIR": directory,
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": mark,
            }
        finally:
            kill(mark)


class RayNode:
    """A node of Ray: several processes."""

    def __init__(self, arguments: list[str], log: Path, first: str = "") -> None:
        """Start it: ``ray start`` comes back once it runs."""
        self._mark = uuid.uuid4().hex
        variables = {_MARK: self._mark, "RAY_USAGE_STATS_ENABLED": "0"}
        with log.open("wb") as stream:
            started = subprocess.run(
                [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**environment(log, first), **variables},
                timeout=60,
                check=False,
            )
        assert started.returncode == 0, log.read_text()

    def workers(self) -> list[psutil.Process]:
        """Return the processes that do what it is asked for."""
        return [
            each for each in marked(self._mark) if "".join(each.cmdline()).startswith("ray::run_")
        ]

    def send(self, number: int) -> None:
        """Send a signal to all of it, parts of merges too."""
        send(self._mark, number)

    def kill(self) -> None:
        """End it at once."""
        kill(self._mark)


class RayCluster:
    """A head without processors, and as many nodes of one as a test starts; all end with the block."""

    _VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")

    def __enter__(self) -> Self:
        # Otherwise a file in the user's home directory decides, which Ray would make.
        self._before = {name: os.environ.get(name) for name in self._VARIABLES}
        os.environ.update(zip(self._VARIABLES, ("token", uuid.uuid4().hex), strict=True))
        # Names of sockets may have a hundred characters.
        self._directory = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self._nodes: list[RayNode] = []
        self.head = self._start(["--head", "--port=0", "--include-dashboard=false", "--num-cpus=0"])
        address = (self._directory / "ray_current_cluster").read_text().strip()
        self.on = f"ray://{address}"
        """What ``--on`` is given."""
        return self

    def start_node(self, first: str = "", processors: int = 1) -> RayNode:
        """Start a node; see :class:`Server`. One after the other, for Ray does not start two at once."""
        address = self.on.removeprefix("ray://")
        return self._start([f"--address={address}", f"--num-cpus={processors}"], first)

    def _start(self, arguments: list[str], first: str = "") -> RayNode:
        common = [
            f"--temp-dir={self._directory}",
            "--object-store-memory=80000000",
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--disable-usage-stats",
        ]
        log = self._directory / f"{len(self._nodes)}.log"
        self._nodes.append(RayNode([*arguments, *common], log, first))
        return self._nodes[-1]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for node in reversed(self._nodes):
            node.kill()
        shutil.rmtree(self._directory, ignore_errors=True)
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
