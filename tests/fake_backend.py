"""A device that is none: streams are queues that run as late, or as early, as a real one might.

Nothing that is enqueued runs before it must, unless its stream is *eager*, and then it runs as soon
as the waits before it allow. Missing waits therefore give wrong bytes: a lane that is filled before
it was computed, computed before it was filled, or computed into before it was copied out.

Memory that was never written holds a pattern; copies from or to memory that is not page-locked,
operations that would make the host wait, and more memory than there is are errors.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from streammerge.engine.accelerator.backend import Failure
from streammerge.engine.rows import make_relative, rank_rows
from streammerge.statistics import BLOCK
from streammerge.tiles.program import Op
from streammerge.tiles.totalling import total_rows

COPY_IN, COMPUTE, COPY_OUT = range(3)
"""Streams of a worker, in the order in which it makes them."""
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim"}
"""Operations whose result's size, or whose value, the host would have to wait for."""


_PINNED: dict[int, int] = {}
"""Page-locked memory: addresses, from and to."""


class FakeOutOfMemoryError(RuntimeError):
    """The device is full."""


class FakeLostError(RuntimeError):
    """The device is gone."""


class FakeEvent:
    """A point in the work of a stream."""

    def __init__(self, backend: FakeBackend) -> None:
        self.backend = backend
        self.stream: FakeStream | None = None
        self.recorded = 0
        self.done = 0

    def synchronize(self) -> None:
        self.backend.check_lost()
        self.backend.log.append(("synchronize", -1))
        if self.stream is not None:
            self.stream.run_until(self, self.recorded)


@dataclass
class Operation:
    """Something in a queue."""

    kind: str
    work: Callable[[], None] | None = None
    event: FakeEvent | None = None
    version: int = 0


class FakeStream:
    """A queue of operations."""

    def __init__(self, backend: FakeBackend, kind: int) -> None:
        self.backend = backend
        self.kind = kind
        self.queue: deque[Operation] = deque()

    def run(self, work: Callable[[], None]) -> None:
        self._enqueue(Operation("run", work))

    def run_waiting(self, work: Callable[[], None]) -> None:
        self.backend.check_lost()
        while self.queue:
            self.step()
        self.backend.log.append(("waiting", self.kind))
        with self.backend.computing():
            work()

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.backend.check_copy(target, source)
        if self.kind == COPY_IN:
            self.backend.brought.append(target.nbytes)
        self._enqueue(Operation("copy", lambda: target.copy_(source)))

    def record(self, event: FakeEvent) -> None:
        event.stream = self
        event.recorded += 1
        self._enqueue(Operation("record", None, event, event.recorded))

    def wait(self, event: FakeEvent) -> None:
        if (self.kind, event.stream and event.stream.kind) in self.backend.ignored_waits:
            return
        self._enqueue(Operation("wait", None, event, event.recorded))

    def _enqueue(self, operation: Operation) -> None:
        self.backend.check_lost()
        self.queue.append(operation)
        for stream in self.backend.streams_of_thread():
            while stream.kind in self.backend.eager and stream.queue and not stream.blocked:
                stream.step()

    @property
    def blocked(self) -> bool:
        first = self.queue[0]
        return first.kind == "wait" and first.event.done < first.version

    def step(self) -> None:
        """Run the first operation, and before it what it waits for."""
        operation = self.queue.popleft()
        if operation.kind == "wait":
            if operation.event.done < operation.version:
                operation.event.stream.run_until(operation.event, operation.version)
            return
        if operation.kind == "record":
            operation.event.done = operation.version
            return
        self.backend.log.append((operation.kind, self.kind))
        with self.backend.watching():
            operation.work()

    def run_until(self, event: FakeEvent, version: int) -> None:
        while event.done < version:
            assert self.queue, "waits for an event that nobody will record"
            self.step()


@dataclass
class FakeBackend:
    """One device."""

    name: str = "cuda:0"
    eager: frozenset[int] = frozenset()
    """Streams that run as soon as they may."""
    ignored_waits: frozenset[tuple[int, int]] = frozenset()
    """(who waits, for whom): waits that are left out, to see that it is noticed."""
    capacity: int = 2**40
    """Bytes of device memory, beside temporary ones."""
    lost_after: int | None = None
    """Runs before the device is lost; None for never."""
    meeting: threading.Barrier | None = None
    """Where the first run of this device waits for those of others; None for nowhere."""
    log: list[tuple[str, int]] = field(default_factory=list)
    """What has run: kind of operation, kind of stream."""
    brought: list[int] = field(default_factory=list)
    """Bytes of each copy to the device."""
    used: int = 0
    """Bytes allocated now."""
    peak: int = 0
    """Most bytes that were allocated, with temporary ones of work that may wait."""
    obstacle: str | None = None
    """Why it has no fused kernels."""
    tile: int = 2**18
    """Elements per instance of a fused kernel, which Triton's interpreter runs: the more the faster."""
    temporary: int = 0
    """Most bytes that one enqueued piece of work had beside what is allocated."""
    refusals: int = 0
    """Allocations that were refused."""
    unused: int = 0
    """Bytes that the allocator keeps for later requests, until it is told to give them back."""
    trims: int = 0
    """How often unused memory was given back."""

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._streams: dict[int, list[FakeStream]] = defaultdict(list)
        self._made: dict[int, int] = defaultdict(int)
        # Page-locked memory serves all devices, whichever it was asked of.
        self._pinned = _PINNED
        self._device: dict[int, int] = {}

    @contextmanager
    def on_thread(self) -> Iterator[None]:
        yield

    def make_stream(self) -> FakeStream:
        thread = threading.get_ident()
        stream = FakeStream(self, len(self._streams[thread]) % 3)
        self._streams[thread].append(stream)
        return stream

    def streams_of_thread(self) -> list[FakeStream]:
        return self._streams[threading.get_ident()]

    def make_event(self) -> FakeEvent:
        return FakeEvent(self)

    def allocate(self, nbytes: int) -> Tensor:
        with self._lock:
            self.check_lost()
            if self.used + self.unused + nbytes > self.capacity:
                self.refusals += 1
                raise FakeOutOfMemoryError(f"{nbytes} bytes")
            self.used += nbytes
            self.peak = max(self.peak, self.used)
        # Aligned as a device's is: where products begin within a cache line decides last bits.
        memory = torch.full((nbytes,), 0xA5, dtype=torch.uint8).numpy()
        self._register(self._device, memory, lambda: self._free(nbytes))
        return torch.from_numpy(memory)

    def _free(self, nbytes: int) -> None:
        with self._lock:
            self.used -= nbytes

    def pin(self, nbytes: int) -> np.ndarray:
        memory = np.full(nbytes, 0x5A, dtype=np.uint8)
        self._register(self._pinned, memory, lambda: None)
        return memory

    def _register(self, places: dict[int, int], memory: np.ndarray, then: Any) -> None:
        address = memory.ctypes.data
        with self._lock:
            places[address] = address + memory.nbytes

        def forget() -> None:
            with self._lock:
                places.pop(address, None)
            then()

        weakref.finalize(memory, forget)

    def check_copy(self, target: Tensor, source: Tensor) -> None:
        assert target.dtype == source.dtype == torch.uint8
        assert target.shape == source.shape
        if not target.numel():
            return
        kinds = {self._kind_of(target), self._kind_of(source)}
        assert kinds == {"pinned", "device"}, kinds

    def _kind_of(self, tensor: Tensor) -> str:
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        with self._lock:
            for kind, places in (("pinned", self._pinned), ("device", self._device)):
                if any(first <= begin and end <= last for first, last in places.items()):
                    return kind
        return "pageable"

    def check_lost(self) -> None:
        runs = (
            sum(kind in {"run", "waiting"} for kind, _ in self.log)
            if self.lost_after is not None
            else 0
        )
        if self.lost_after is not None and runs >= self.lost_after:
            raise FakeLostError("CUDA error: unspecified launch failure")

    @contextmanager
    def watching(self) -> Iterator[None]:
        meeting, self.meeting = self.meeting, None
        if meeting is not None:
            meeting.wait(timeout=60)
        # Triton's interpreter computes with numpy, which tells of infinities that stages look for.
        with Watch() as watch, np.errstate(all="ignore"):
            yield
        with self._lock:
            self.temporary = max(self.temporary, watch.peak)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """See work that may wait: it must use the device's memory, of which it counts."""
        with Watch(self) as watch:
            yield
        with self._lock:
            self.peak = max(self.peak, self.used + watch.peak)

    def check_room(self, temporary: int) -> None:
        with self._lock:
            if self.used + self.unused + temporary > self.capacity:
                self.refusals += 1
                raise FakeOutOfMemoryError(f"{temporary} bytes")

    def is_device(self, tensor: Tensor) -> bool:
        return self._kind_of(tensor) == "device"

    def free_bytes(self) -> int:
        return self.capacity - self.used

    def trim(self) -> None:
        self.unused = 0
        self.trims += 1

    def peak_bytes(self) -> int:
        return self.peak

    def classify(self, error: BaseException) -> Failure:
        if isinstance(error, FakeOutOfMemoryError):
            return Failure.OUT_OF_MEMORY
        return Failure.LOST if isinstance(error, FakeLostError) else Failure.OTHER


def add_up_blocks(op: Op, a: Tensor, b: Tensor | None, column: Tensor, length: int = BLOCK) -> None:
    """Total blocks as the fused kernel does, which takes Triton's interpreter seconds for each."""
    for block, begin in enumerate(range(0, a.numel(), length)):
        rows = [each[begin : begin + length].numpy()[None] for each in (a, a if b is None else b)]
        column[block] = total_rows(op, rows[0], rows[1])[0]


def rank_rows_at_once(values: Tensor, row: int, ranks: Tensor) -> None:
    """Rank within rows as the fused kernel does, likewise."""
    found = rank_rows(values.numpy().reshape(-1, row)).copy()
    make_relative(found)
    ranks.copy_(torch.from_numpy(found.reshape(-1)))


MakeDevices = Callable[..., dict[str, FakeBackend]]
"""What the fixture ``devices`` gives: makes devices by name, from options of :class:`FakeBackend`."""


class Watch(TorchDispatchMode):
    """Sees every operation: refuses those that wait, and adds up memory that they allocate.

    With a device, operations may wait; operands must lie there, and results must find room.
    """

    def __init__(self, backend: FakeBackend | None = None) -> None:
        super().__init__()
        self.peak = 0
        self._backend = backend
        self._live: dict[int, tuple[int, int]] = {}
        """Storages by address: bytes, and tensors that hold them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if self._backend is None:
            assert name not in WAITING, f"{name} makes the host wait"
        else:
            self._check_operands(name, operands)
        given = {id(leaf) for leaf in operands}
        known = {leaf.untyped_storage().data_ptr() for leaf in operands} - set(self._live)
        result = func(*args, **(kwargs or {}))
        if self._backend is not None and not operands:
            # torch.zeros and the like, which here cannot be told from those that name the device.
            numel = max((each.numel() for each in tree_leaves(result)), default=0)
            assert numel <= 1, f"{name} makes a tensor of the host"
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor) or id(leaf) in given:
                continue
            storage = leaf.untyped_storage()
            address = storage.data_ptr()
            if address in known:
                continue
            nbytes, holders = self._live.get(address, (storage.nbytes(), 0))
            self._live[address] = (nbytes, holders + 1)
            weakref.finalize(leaf, self._let_go, address)
        now = sum(nbytes for nbytes, _ in self._live.values())
        self.peak = max(self.peak, now)
        if self._backend is not None:
            self._backend.check_room(now)
        return result

    def _check_operands(self, name: str, operands: list[Tensor]) -> None:
        assert self._backend is not None
        # Numbers are operands of no dimension, which a device takes from the host.
        for each in operands:
            there = not each.numel() or each.untyped_storage().data_ptr() in self._live
            assert not each.dim() or there or self._backend.is_device(each), (
                f"{name} of host memory"
            )

    def _let_go(self, address: int) -> None:
        nbytes, holders = self._live[address]
        if holders == 1:
            del self._live[address]
        else:
            self._live[address] = (nbytes, holders - 1)
