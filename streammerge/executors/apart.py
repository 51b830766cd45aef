"""An engine in a process of its own, which the driver of a merge talks to in lines.

    driver                                      process: python -m streammerge.executors.apart ENGINE …
      ── a line for each part: Request ───────▶   submits it
      ◀── lines: workers, idle, what ended ────   twice a second, and when something has ended
      (standard input ends) ──────────────────▶   lets go of the engine

Because an engine's library has memory and handlers of signals of its own, ends its process when it finds
that right (Ray does so a minute after its head is gone), and waits without end for a scheduler that is
frozen. Here that is an error, in a time that is known, and the merge can go on later.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from streammerge.errors import ClusterError, StreamMergeError
from streammerge.executors.seam import Executor, Outcome, Request, describe_error, restore_error

ENGINES = {
    "dask": ("streammerge.executors.dask", "DaskExecutor"),
    "ray": ("streammerge.executors.ray", "RayExecutor"),
}
"""Module and class of each engine: ``Class(address, scratch)``, with ``"HOST:PORT"`` or None for workers
on this machine, and a directory for files that last as long as the engine is used."""
SILENT_SECONDS = 120.0
"""How long an engine may say nothing."""
_BEGIN_SECONDS = 120.0
"""How long it may take to connect; libraries give up earlier, and say why."""
_CLOSE_SECONDS = 20.0
"""How long it may take to let go."""
_WORDS_SECONDS = 2.0
"""Until the last lines of a process that has gone are waited for no more."""
_TICK_SECONDS = 0.5
_LOOK_SECONDS = 0.1
_LINES = 50


def connect(on: str, scratch: Path) -> Executor:
    """Connect to the engine that a text names, in this process; see :data:`ENGINES`.

    Raises:
        DependencyError: Its library is not installed.
        ClusterError: It cannot be reached.
    """
    name, _, address = on.partition("://")
    module, kind = ENGINES[name]
    executor: Executor = getattr(importlib.import_module(module), kind)(address or None, scratch)
    return executor


class ExecutorApart:
    """An engine behind pipes; see :class:`~streammerge.executors.seam.Executor`."""

    def __init__(self, on: str) -> None:
        """Start the process, which connects meanwhile: whatever is asked first waits for it.

        What is asked then may raise a DependencyError, where the engine's library is not installed, or a
        ClusterError, where it cannot be reached.
        """
        self._on = on
        # Names of sockets may have a hundred characters, of which Ray takes sixty.
        short = "/tmp" if os.path.isdir("/tmp") else None  # noqa: S108, PTH112 - as said
        self._scratch = Path(tempfile.mkdtemp(prefix="streammerge-", dir=short))
        self._changed = threading.Condition()
        self._said: dict[str, Any] | None = None
        self._said_at = time.monotonic()
        self._ended: list[Outcome] = []
        self._failure: dict[str, Any] | None = None
        self._gone = False
        self._submitted = 0
        self._running = 0
        self._complaints: list[str] = []
        # Signals that a terminal sends to all are for the driver, which tells this process.
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, and a text that was checked
            [sys.executable, "-m", "streammerge.executors.apart", on, str(self._scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            text=True,
            start_new_session=True,
        )
        self._listeners = [
            threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True),
            threading.Thread(
                target=hear, args=(self._process.stderr, self._complaints), daemon=True
            ),
        ]
        try:
            for thread in self._listeners:
                thread.start()
        except BaseException:
            self.close()
            raise

    def _wait_until_connected(self) -> None:
        deadline = time.monotonic() + _BEGIN_SECONDS
        with self._changed:
            while self._said is None:
                if self._failure is not None or self._gone:
                    raise self._as_error()
                if time.monotonic() > deadline:
                    raise self._silent(_BEGIN_SECONDS)
                self._changed.wait(_TICK_SECONDS)

    def _listen(self, stream: IO[str]) -> None:
        """Take in what the process says, until it has gone."""
        for line in stream:
            try:
                said = json.loads(line)
            except ValueError:
                continue
            with self._changed:
                self._said_at = time.monotonic()
                if "failure" in said:
                    self._failure = said["failure"]
                else:
                    self._said = said
                    self._ended += [Outcome(**each) for each in said["ended"]]
                self._changed.notify_all()
        with self._changed:
            self._gone = True
            self._changed.notify_all()

    def _check(self) -> dict[str, Any]:
        """Return what was said last.

        Raises:
            ClusterError: The process failed, has gone, or is silent.
        """
        if self._said is None:
            self._wait_until_connected()
        if self._failure is not None or self._gone:
            raise self._as_error()
        if time.monotonic() - self._said_at > SILENT_SECONDS:
            raise self._silent(SILENT_SECONDS)
        assert self._said is not None  # noqa: S101 - as was waited for
        return self._said

    def _as_error(self) -> StreamMergeError:
        if self._failure is not None:
            return restore_error(self._failure)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_TICK_SECONDS)
        # Its last words may be on their way still; what it has started may keep the stream open.
        self._listeners[1].join(_WORDS_SECONDS)
        return ClusterError(
            f"{self._on}: the process that talks to the engine ended with code {self._process.poll()}"
            f"{self._complaint()}; look after the engine, then give the same command again"
        )

    def _silent(self, seconds: float) -> ClusterError:
        return ClusterError(
            f"{self._on}: the engine has not answered for {seconds:.0f} s{self._complaint()}; look after it, "
            "then give the same command again, which goes on with what is done"
        )

    def _complaint(self) -> str:
        said = [line.strip() for line in self._complaints if line.strip()]
        return f" and said: {said[-1]}" if said else ""

    def workers(self) -> int:
        """Return how many workers there were half a second ago."""
        with self._changed:
            return int(self._check()["workers"])

    def idle(self) -> int:
        """Return how many workers have no part."""
        with self._changed:
            said = self._check()
            return max(0, int(said["idle"]) - (self._submitted - int(said["seen"])))

    def running(self) -> int:
        """Return how many parts were submitted and are not gathered."""
        return self._running

    def submit(self, request: Request) -> None:
        """Have a worker do a part."""
        assert self._process.stdin is not None  # noqa: S101 - a pipe
        self._submitted += 1
        self._running += 1
        # If it has gone, what is asked next says so.
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def gather(self, seconds: float) -> Sequence[Outcome]:
        """Return what has ended; wait a while for the first."""
        with self._changed:
            if not self._ended and self._running:
                self._check()
                self._changed.wait(seconds)
            if not self._ended:
                self._check()
            ended, self._ended = self._ended, []
            self._running -= len(ended)
            return ended

    def close(self) -> None:
        """Have the process let go of the engine, and end it."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None  # noqa: S101 - a pipe
            self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            # With what it has started on this machine, which is in its session.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for thread in self._listeners:
            thread.join()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


def hear(stream: IO[str], said: list[str]) -> None:
    """Keep the last lines of what a process says, until it ends."""
    for text in stream:
        said.append(text)
        del said[:-_LINES]


def main(on: str, scratch: Path) -> int:
    """Serve one driver, until it ends standard input or has gone."""
    # What libraries print must not come between the lines.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(document: dict[str, Any]) -> None:
        # Nobody may be there to hear it.
        with contextlib.suppress(OSError):
            answers.write(json.dumps(document) + "\n")
            answers.flush()

    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    left = threading.Event()
    threading.Thread(target=_hear_driver, args=(requests, left), daemon=True).start()
    try:
        with contextlib.closing(connect(on, scratch)) as executor:
            _serve(executor, requests, left, say)
    except StreamMergeError as error:
        say({"failure": describe_error(error)})
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


def _serve(
    executor: Executor, requests: queue.SimpleQueue[str], left: threading.Event, say: Any
) -> None:
    seen = 0
    due = 0.0
    while not left.is_set():
        before = seen
        while not requests.empty():
            executor.submit(json.loads(requests.get()))
            seen += 1
        ended: Sequence[Outcome] = ()
        if executor.running():
            ended = executor.gather(_LOOK_SECONDS)
        else:
            left.wait(_LOOK_SECONDS)
        if ended or seen > before or time.monotonic() >= due:
            say(
                {
                    "workers": executor.workers(),
                    "idle": executor.idle(),
                    "seen": seen,
                    "ended": [asdict(outcome) for outcome in ended],
                }
            )
            due = time.monotonic() + _TICK_SECONDS


def _hear_driver(requests: queue.SimpleQueue[str], left: threading.Event) -> None:
    for line in sys.stdin:
        requests.put(line)
    left.set()
    # The engine may not answer, and then the process would not end.
    time.sleep(_CLOSE_SECONDS / 2)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
