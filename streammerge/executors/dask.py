"""Dask distributed: the workers of a scheduler that runs, or of one that this process starts.

A worker that is lost shows at once by its connection, or after the scheduler's ``worker-ttl`` (five
minutes, unless it is configured otherwise) if the network is silent.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from streammerge.errors import ClusterError, DependencyError
from streammerge.executors.seam import Outcome, Request, describe_error
from streammerge.executors.unit import run_unit
from streammerge.machine import count_cores

_MOST_LOCAL = 4
"""Workers on this machine: each has a process with memory of its own."""
_CONNECT_SECONDS = 30
_POLL_SECONDS = 0.02


class DaskExecutor:
    """The workers of one scheduler; see :class:`~streammerge.executors.seam.Executor`."""

    def __init__(self, address: str | None, scratch: Path) -> None:
        """Connect.

        Args:
            address: ``"HOST:PORT"`` of a scheduler; None starts workers on this machine.
            scratch: Where files of workers on this machine go.

        Raises:
            DependencyError: The library is not installed.
            ClusterError: No scheduler answers there.
        """
        distributed = _import()
        cores = count_cores()
        count = max(1, min(cores, _MOST_LOCAL))
        self._distributed = distributed
        self._cluster = None
        self._running: dict[Any, int] = {}
        try:
            if address is None:
                # In this process: what they start are processes of their own.
                self._cluster = distributed.LocalCluster(
                    n_workers=count,
                    threads_per_worker=max(1, cores // count),
                    processes=False,
                    memory_limit=0,
                    dashboard_address=None,
                    local_directory=str(scratch),
                    silence_logs=logging.CRITICAL,
                )
            target = f"tcp://{address}" if address is not None else self._cluster
            self._client = distributed.Client(
                target, timeout=_CONNECT_SECONDS, set_as_default=False
            )
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"dask://{address}: no scheduler answers within {_CONNECT_SECONDS} s: {error}; start one with "
                "`dask scheduler`, and workers with `dask worker`"
            ) from error

    def _found(self) -> dict[str, dict[str, Any]]:
        """Return what the scheduler knows of its workers, by address."""
        if self._client.status != "running":
            return {}
        try:
            workers: dict[str, dict[str, Any]] = self._client.scheduler_info(n_workers=-1)[
                "workers"
            ]
        except (OSError, KeyError):
            return {}
        return workers

    def workers(self) -> int:
        """Return how many workers there are now."""
        return len(self._found())

    def idle(self) -> int:
        """Return how many workers have no part."""
        return max(0, self.workers() - len(self._running))

    def running(self) -> int:
        """Return how many parts were submitted and are not gathered."""
        return len(self._running)

    def submit(self, request: Request) -> None:
        """Have a worker do a part, whichever the scheduler chooses: one that has none, if there is one.

        Not a worker by name, even loosely: a part that was meant for one that is lost is not given to a
        worker that comes later.
        """
        found = self._found()
        hosts = Counter(each["host"] for each in found.values())
        sharing = {address: hosts[each["host"]] for address, each in found.items()}
        future = self._client.submit(_run_on_worker, request, sharing, pure=False)
        self._running[future] = request["part"]

    def gather(self, seconds: float) -> list[Outcome]:
        """Return what has ended; wait a while for the first."""
        deadline = time.monotonic() + seconds
        while True:
            # What a future knows is told to it by a thread of the client; its own waiting needs a client
            # that is the default one of the process.
            ended = [future for future in self._running if future.status != "pending"]
            if ended or not self._running or time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        return [self._outcome(future, self._running.pop(future)) for future in ended]

    def _outcome(self, future: Any, part: int) -> Outcome:
        if future.status == "finished":
            outcome: Outcome = future.result()
            return outcome
        if future.status in {"cancelled", "lost"}:
            return Outcome(part, "the cluster", lost="the scheduler forgot it")
        error = future.exception()
        if isinstance(error, self._distributed.KilledWorker):
            return Outcome(part, "the cluster", lost=f"workers that did it were lost: {error}")
        failure = ClusterError(
            f"a worker of Dask could not begin part {part}: {type(error).__name__}: {error}; it "
            "needs the same version of streammerge"
        )
        return Outcome(part, "the cluster", error=describe_error(failure))

    def close(self) -> None:
        """Let go of the scheduler; end it if it was started here."""
        with contextlib.suppress(OSError, TimeoutError):
            self._client.cancel(list(self._running))
            self._client.close()
        if self._cluster is not None:
            self._cluster.close()


def _run_on_worker(request: Request, sharing: dict[str, int]) -> Outcome:
    """Do a part on a worker, one after the other: its threads are the part's.

    Args:
        request: The part.
        sharing: How many workers there are on the machine of each, by address.
    """
    worker = _import().get_worker()
    # One that came later shares its machine with as many, for all that is known.
    others = sharing.get(worker.address, max(sharing.values(), default=1))
    threads = request["workers"] or worker.state.nthreads
    with _lock_of(worker.address):
        return run_unit({**request, "workers": threads, "sharing": others})


@cache
def _lock_of(_address: str) -> threading.Lock:
    return threading.Lock()


def _import() -> Any:
    try:
        return importlib.import_module("distributed")
    except ImportError as error:
        raise DependencyError(
            f"--on dask: needs the library distributed: {error}; install it with `pip install "
            "'streammerge[dask]'`"
        ) from error
