"""Copies of any size between host memory of any kind and a device, through a little that is page-locked.

    host memory ─▶ page-locked stage ─▶ device ─▶ page-locked stage ─▶ host memory

All of it, and what is computed between, is one stream of work. Stages take turns: one is filled, or emptied,
while the other is copied.

Memory: so many stages of so many bytes, page-locked.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streammerge.engine.accelerator.backend import Backend, Event
from streammerge.lazily import torch

if TYPE_CHECKING:
    from torch import Tensor

Bytes = NDArray[np.uint8]
"""``[nbytes]``."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """Page-locked memory between host and device."""

    memory: Bytes
    """``[nbytes]``."""
    done: Event
    """What was copied last from or to it is there."""


class StagedCopies:
    """One stream of work on a device, and what is brought there and taken back; used by one thread at a time."""

    def __init__(self, backend: Backend, *, stages: int, nbytes: int) -> None:
        """Take page-locked memory.

        Args:
            backend: The device.
            stages: How many stages take turns, at least one.
            nbytes: Bytes of each.

        Raises:
            OutOfMemoryError: The system refuses.
        """
        self._stages = [_Stage(backend.pin(nbytes), backend.make_event()) for _ in range(stages)]
        self._turns = cycle(self._stages)
        self._nbytes = nbytes
        self.stream = backend.make_stream()

    def bring(self, source: Bytes, target: Tensor) -> None:
        """Copy host memory ``[nbytes]`` to the device, where it is uint8, too."""

        def give(begin: int, staged: Bytes) -> None:
            np.copyto(staged, source[begin : begin + len(staged)])

        self.bring_from(give, target)

    def bring_from(self, give: Callable[[int, Bytes], None], target: Tensor) -> None:
        """Copy to the device what is written to stages.

        Args:
            give: Writes all of ``[n]`` bytes, given which byte of the whole is the first of them.
            target: ``[nbytes]`` uint8 on the device.
        """
        for begin in range(0, len(target), self._nbytes):
            stage = next(self._turns)
            part = target[begin : begin + self._nbytes]
            staged = stage.memory[: len(part)]
            stage.done.synchronize()
            give(begin, staged)
            self.stream.copy(part, torch.from_numpy(staged))
            self.stream.record(stage.done)

    def fetch(self, source: Tensor, target: Bytes) -> None:
        """Copy from the device to host memory; all that was enqueued is done when this returns."""
        on_their_way: deque[tuple[_Stage, Bytes]] = deque()

        def collect() -> None:
            stage, part = on_their_way.popleft()
            stage.done.synchronize()
            np.copyto(part, stage.memory[: len(part)])

        for begin in range(0, len(target), self._nbytes):
            if len(on_their_way) == len(self._stages):
                collect()
            stage = next(self._turns)
            part = target[begin : begin + self._nbytes]
            staged = torch.from_numpy(stage.memory[: len(part)])
            self.stream.copy(staged, source[begin : begin + len(part)])
            self.stream.record(stage.done)
            on_their_way.append((stage, part))
        while on_their_way:
            collect()

    def abandon(self) -> None:
        """Wait for what is in flight, so that memory can be freed, whatever has happened."""
        stage = self._stages[0]
        # A device that is lost has nothing in flight, and says so by failing.
        with contextlib.suppress(RuntimeError):
            self.stream.record(stage.done)
            stage.done.synchronize()
