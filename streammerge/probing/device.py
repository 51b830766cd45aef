"""How fast a device is, by a moment of copies to it and within it.

Memory: :data:`_HOST_BYTES` page-locked, and :data:`ROOM_BYTES` on the device; both are given back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter

from streammerge.engine.accelerator.backend import Backend, Event, Stream
from streammerge.lazily import torch
from streammerge.plan.estimating import DeviceRates
from streammerge.units import MIB

_HOST_BYTES = 16 * MIB
"""As large as slots are: a millisecond on a common bus."""
_DEVICE_BYTES = 128 * MIB
"""Of either side; less would be in the caches of large devices."""
ROOM_BYTES = 3 * _DEVICE_BYTES
"""What has to be free there: what is copied, and what a sort takes."""
_SORTED_NUMEL = 2**20
"""Keys of 8 bytes that are sorted, in rows of :data:`_SORTED_ROW`."""
_SORTED_ROW = 4096
_COPIES = 4
"""Copies that are timed together, after one that is not."""


def measure_device(backend: Backend, *, ranks: bool = False) -> DeviceRates:
    """Return the rates of a device; takes some 50 ms.

    Args:
        backend: The device.
        ranks: Whether it will rank values within rows, which torch's sort, that ranks long ones, is taken for.

    Raises:
        OutOfMemoryError: The system has no page-locked memory.
        RuntimeError: The device has failed, or has not so much memory.
    """
    with backend.on_thread():
        stream, done = backend.make_stream(), backend.make_event()
        began = perf_counter()
        pinned = backend.pin(_HOST_BYTES)
        locking = _HOST_BYTES / _since(began)
        host = torch.from_numpy(pinned)
        there = backend.allocate(2 * _DEVICE_BYTES)
        source, target = there[:_DEVICE_BYTES], there[_DEVICE_BYTES:]

        def copy() -> None:
            target.copy_(source)

        def bring() -> None:
            stream.copy(target[:_HOST_BYTES], host)

        def move() -> None:
            stream.run(copy)

        keys = source[: 8 * _SORTED_NUMEL].view(torch.int64).view(-1, _SORTED_ROW)

        def rank() -> None:
            torch.sort(keys, dim=1)

        bus = _HOST_BYTES / _time(stream, done, bring)
        memory = 2 * _DEVICE_BYTES / _time(stream, done, move)
        sorting = _SORTED_NUMEL / _time(stream, done, rank) if ranks else math.inf
    backend.trim()
    return DeviceRates(bus, memory, locking, sorting)


def _time(stream: Stream, done: Event, work: Callable[[], None]) -> float:
    """Return the seconds that work takes once the device has done it before."""
    work()
    stream.record(done)
    done.synchronize()
    began = perf_counter()
    for _ in range(_COPIES):
        work()
    stream.record(done)
    done.synchronize()
    return _since(began) / _COPIES


def _since(began: float) -> float:
    return max(perf_counter() - began, 1e-9)
