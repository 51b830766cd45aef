"""Ray: the nodes of a cluster that runs, or workers on this machine that this process starts.

A part takes a quarter of the processors of the smallest node, as Ray counts them, and so many threads. A worker
that is lost shows at once. Of a node Ray hears by its connection, within some ten seconds, or by its
silence, within some seventy; who waits for what it did would wait for seven minutes more, so parts are
given to nodes by name, and those of one that is gone are lost.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import socket
from collections import Counter
from pathlib import Path
from typing import Any

from streammerge.errors import ClusterError, DependencyError
from streammerge.executors.seam import Outcome, Request, describe_error
from streammerge.executors.unit import run_unit
from streammerge.machine import count_cores

_PARTS_PER_NODE = 4
_CONNECT_SECONDS = 30
_STORE_BYTES = 80_000_000
"""About the least that Ray allows for the objects that it moves, of which there are none."""


class RayExecutor:
    """One cluster; see :class:`~streammerge.executors.seam.Executor`."""

    def __init__(self, address: str | None, scratch: Path) -> None:
        """Connect.

        Args:
            address: ``"HOST:PORT"`` of a head; None starts workers on this machine.
            scratch: Where files of workers on this machine go.

        Raises:
            DependencyError: The library is not installed.
            ClusterError: No head answers there, or this machine is not one of its cluster.
        """
        if address is None:
            # Of this cluster alone; Ray would keep one in the user's home directory.
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        self._ray = ray = _import()
        self._running: dict[Any, tuple[int, str]] = {}
        self._lost: list[Outcome] = []
        if address is not None:
            _knock(address)
        started = {
            "num_cpus": count_cores(),
            "include_dashboard": False,
            "object_store_memory": _STORE_BYTES,
            "_temp_dir": str(scratch),
        }
        try:
            ray.init(
                address=address or "local",
                logging_level=logging.CRITICAL,
                log_to_driver=False,
                **({} if address else started),
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise _unreachable(address, error) from error
        # What is lost is told to the driver, which counts how often.
        self._run = ray.remote(max_retries=0)(run_unit)
        self._slots, self._each = self._look()

    def _look(self) -> tuple[dict[str, int], int]:
        """Return how many parts each node does at once, by its name for Ray, and the processors of a part."""
        counts = {
            node["NodeID"]: int(node["Resources"].get("CPU", 0))
            for node in self._ray.nodes()
            if node["Alive"]
        }
        each = max(1, min(filter(None, counts.values()), default=1) // _PARTS_PER_NODE)
        return {name: count // each for name, count in counts.items()}, each

    def workers(self) -> int:
        """Return how many parts all nodes do at once."""
        self._slots, self._each = self._look()
        return sum(self._slots.values())

    def idle(self) -> int:
        """Return how many more parts may be submitted now."""
        return sum(max(0, free) for free in self._free().values())

    def _free(self) -> dict[str, int]:
        taken = Counter(node for _, node in self._running.values())
        return {node: slots - taken[node] for node, slots in self._slots.items()}

    def running(self) -> int:
        """Return how many parts were submitted and are not gathered."""
        return len(self._running) + len(self._lost)

    def submit(self, request: Request) -> None:
        """Have the node do a part that has most room."""
        free = self._free()
        if not free:
            # The last node has gone since the driver asked.
            self._lost.append(Outcome(request["part"], "the cluster", lost="there is no node"))
            return
        node = max(free, key=lambda name: free[name])
        device = str(request["device"])
        # Ray hides accelerators from whoever does not ask for them.
        gpus = len(device.split(",")) if device not in {"auto", "cpu"} else 0
        asked = {
            **request,
            "workers": request["workers"] or self._each,
            "sharing": max(1, self._slots[node]),
        }
        there = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            node, soft=False
        )
        run = self._run.options(num_cpus=self._each, num_gpus=gpus, scheduling_strategy=there)
        self._running[run.remote(asked)] = (request["part"], node)

    def gather(self, seconds: float) -> list[Outcome]:
        """Return what has ended; wait a while for the first."""
        outcomes, self._lost = self._lost, []
        running = list(self._running)
        if running and self._ray.wait(running, timeout=seconds)[0]:
            ended, running = self._ray.wait(running, num_returns=len(running), timeout=0)
            outcomes += [self._outcome(task, self._running.pop(task)[0]) for task in ended]
        for task in running:
            if self._running[task][1] not in self._slots:
                part, node = self._running.pop(task)
                self._ray.cancel(task, force=True)
                outcomes.append(Outcome(part, "the cluster", lost=f"its node {node[:8]} is gone"))
        return outcomes

    def _outcome(self, task: Any, part: int) -> Outcome:
        try:
            outcome: Outcome = self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            failure = ClusterError(
                f"a worker of Ray could not begin part {part}: {error.cause or error}; it needs the same "
                "version of streammerge"
            )
            return Outcome(part, "the cluster", error=describe_error(failure))
        except self._ray.exceptions.RayError as error:
            words = str(error).split(". ")[0].split("\n")[0]
            return Outcome(part, "the cluster", lost=f"{type(error).__name__}: {words}")
        return outcome

    def close(self) -> None:
        """Let go of the cluster, which ends what is running; end it if it was started here."""
        self._ray.shutdown()


def _knock(address: str) -> None:
    """Return if anybody listens at an address; Ray tries for minutes.

    Raises:
        ClusterError: Nobody does.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str | None, error: Exception) -> ClusterError:
    words = str(error).strip().split("\n")[0]
    if address is None:
        return ClusterError(f"--on ray: Ray does not start on this machine: {words}")
    return ClusterError(
        f"ray://{address}: no cluster of Ray answers that this machine is part of: {words}; give the address "
        "that `ray start --head` prints, on a machine where `ray start` was called"
    )


def _import() -> Any:
    # Before it is imported: it would tell its makers of each cluster that is started.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise DependencyError(
            f"--on ray: needs the library ray: {error}; install it with `pip install 'streammerge[ray]'`"
        ) from error
