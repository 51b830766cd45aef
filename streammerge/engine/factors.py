"""The adapters' tensors that chunks in flight need, each in memory once, in the compute dtype.

A reader takes what its chunk needs before it reads; the first one to need a tensor reads it, the
others wait for it. What nobody holds stays until its room is needed.

Memory: at most the plan's ``factor_bytes``.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Never

import numpy as np
from numpy.typing import NDArray

from streammerge.adapters.onto_base.changes import Change, ChangeKind
from streammerge.adapters.onto_base.deltas import WORK_NUMEL, Delta
from streammerge.adapters.onto_base.making import make_working, view_stored
from streammerge.adapters.onto_base.products import PlainProduct, Product, Tiles
from streammerge.checkpoint.bytesource import ByteSource
from streammerge.checkpoint.types import TensorEntry
from streammerge.dtypes import DType
from streammerge.engine.buffers import allocate
from streammerge.engine.decoding import read_span
from streammerge.engine.memory import release_free_memory
from streammerge.engine.monitor import Monitor
from streammerge.engine.pieces import torch_dtype
from streammerge.engine.progress import Progress, Stage
from streammerge.errors import NonFiniteError, printable
from streammerge.floats import widen
from streammerge.lazily import torch
from streammerge.plan.chunking import plan_range
from streammerge.plan.factors import (
    FactorKey,
    NormKey,
    changed_input,
    factor_key,
    factor_needs,
    norm_key,
    working_key,
)
from streammerge.plan.types import MergePlan, TensorInput, TensorTask
from streammerge.units import MIB

if TYPE_CHECKING:
    from torch import Tensor

_READ_BYTES = 1 * MIB
"""Read and converted at once."""
_READ_NUMEL = 64 * 1024
"""Elements, where they pass through float64."""


@dataclass(slots=True, eq=False)
class _Entry:
    """A place for one tensor."""

    nbytes: int
    holders: int = 0
    filling: threading.Lock = field(default_factory=threading.Lock)
    value: Any = None
    """A tensor of torch's, or of numpy's where the plan needs no torch."""


Entries = dict[FactorKey | NormKey, _Entry]


@dataclass(frozen=True, slots=True)
class NormWork:
    """What DoRA's norms are found of, for whoever finds them elsewhere."""

    product: Product
    """What is added to the matrix."""
    dtype: DType
    """The matrix's stored type."""
    read: Callable[[int, int, NDArray[np.uint8]], None]
    """Reads elements of the matrix, as they are stored: the flat index of the first, their number, and the
    memory that they fill."""
    along_rows: bool
    """Whether each row has a norm; else each column has."""


FindNorms = Callable[["TensorTask", "Change", NormWork], "Tensor | None"]
"""Returns the norms of a change of a tensor, ``[n]``; None where they are to be found here."""


class FactorCache:
    """Holds adapters' tensors for the chunks in flight."""

    def __init__(
        self,
        plan: MergePlan,
        sources: Sequence[ByteSource],
        *,
        in_turn: bool,
        monitor: Monitor,
        progress: Progress,
        find_norms: FindNorms | None = None,
    ) -> None:
        """Start empty.

        Args:
            plan: The plan.
            sources: Open input files, by their index in the plan.
            in_turn: Whether sources are merged one after the other.
            monitor: Ends waiting when the work fails.
            progress: Counts bytes.
            find_norms: Finds DoRA's norms elsewhere, of what it takes.
        """
        self._find_norms = find_norms
        self._plan = plan
        self._sources = sources
        self._in_turn = in_turn
        self._monitor = monitor
        self._progress = progress
        self._free = plan.resources.factor_bytes
        self._entries: OrderedDict[FactorKey | NormKey, _Entry] = OrderedDict()
        self._returned = monitor.condition()

    def take(self, tasks: Iterable[int]) -> HeldFactors:
        """Wait for room for what some tensors need, and hold it.

        Raises:
            StoppedError: The work was stopped meanwhile.
        """
        changed = [index for index in tasks if self._plan.tasks[index].changes]
        needs: dict[FactorKey | NormKey, int] = {}
        for index in changed:
            needs |= factor_needs(self._plan.tasks[index], self._plan.compute_dtype.itemsize)
        held: Entries = {}
        if needs:
            with self._monitor.lock:
                self._monitor.wait(self._returned, lambda: self._make_room(needs))
                for key, nbytes in needs.items():
                    if key not in self._entries:
                        self._entries[key] = _Entry(nbytes)
                        self._free -= nbytes
                    self._entries.move_to_end(key)
                    held[key] = self._entries[key]
                    held[key].holders += 1
        return HeldFactors(self, held, {index: self._plan.tasks[index] for index in changed})

    def _make_room(self, needs: dict[FactorKey | NormKey, int]) -> bool:
        """Let go of what nobody holds, the longest unused first, until all new entries fit."""
        wanted = sum(nbytes for key, nbytes in needs.items() if key not in self._entries)
        for key in [k for k, entry in self._entries.items() if not entry.holders]:
            if wanted <= self._free:
                break
            if key not in needs:
                entry = self._entries.pop(key)
                self._free += entry.nbytes
                # Whoever had it may still refer to the entry, on a stack or in a closure.
                entry.value = None
        return wanted <= self._free

    def release(self, held: Entries) -> None:
        """Let go of what :meth:`take` gave."""
        with self._monitor.lock:
            for entry in held.values():
                entry.holders -= 1
            self._returned.notify_all()

    def fill(self, held: Entries, tasks: Iterable[TensorTask]) -> None:
        """Read what is not in memory yet.

        Raises:
            NonFiniteError: A tensor of an adapter holds NaN or infinity, and the recipe forbids it.
        """
        for task in tasks:
            for change in task.changes:
                for place, factor in enumerate(change.factors):
                    _once(held[factor_key(change, place)], partial(self._read, factor, place))
                for index, working in enumerate(change.workings):
                    if working.op.makes:
                        key = working_key(change, index)
                        _once(held[key], partial(self._made, held, change, index, task))
                if change.kind is ChangeKind.NORMED:
                    _once(held[norm_key(change)], partial(self._norms, held, change, task))

    def delta(self, held: Entries, change: Change, task: TensorTask) -> Delta | PlainProduct:
        """Return a change of a tensor with its factors, which are in memory."""
        if not self._plan.needs_torch:
            tiles, up = (_filled(held[factor_key(change, place)]) for place in range(2))
            columns = change.factors[0].shape[1]
            return PlainProduct(tiles, up, columns, change.scaling)
        norms = held[norm_key(change)].value if change.kind is ChangeKind.NORMED else None
        read = partial(self._read_part, task, change)
        return Delta(change, _values(held, change), norms, read, like_torch=self._in_turn)

    def _norms(self, held: Entries, change: Change, task: TensorTask) -> Tensor:
        """Compute DoRA's norms, for which the tensor that is changed is read once more."""
        delta = Delta(change, _values(held, change), like_torch=self._in_turn)
        product = delta.product()
        if self._find_norms is not None and product is not None:
            stored = changed_input(task, change, in_turn=self._in_turn)
            read = partial(self._read_stored, stored)
            work = NormWork(product, stored.dtype, read, along_rows=change.along_rows)
            norms = self._find_norms(task, change, work)
            if norms is not None:
                return norms
        scratch = torch.empty(WORK_NUMEL, dtype=torch_dtype(self._plan.compute_dtype))
        return delta.norms(partial(self._read_rows, task, change), scratch)

    def _made(self, held: Entries, change: Change, index: int, task: TensorTask) -> Tensor:
        """Make a factor of stored ones."""
        read_rows = partial(self._read_rows, task, change)
        made = make_working(change.workings[index], _stored_values(held, change), read_rows)
        # In memory of its own, so that what was in the way meanwhile can be given back.
        kept = torch.from_numpy(allocate(made.numel() * made.element_size()))
        kept = kept.view(made.dtype).view(made.shape).copy_(made)
        del made
        release_free_memory()
        return kept

    def _read_rows(self, task: TensorTask, change: Change, begin: int, end: int) -> Tensor:
        """Read rows of the tensor that is changed, in the compute dtype."""
        row_numel = change.matrix[1]
        return self._read_part(task, change, begin * row_numel, end * row_numel)

    def _read_part(self, task: TensorTask, change: Change, begin: int, end: int) -> Tensor:
        """Read elements of the tensor that is changed, or of its window, in the compute dtype."""
        stored = changed_input(task, change, in_turn=self._in_turn)
        above = 0 if change.window is None else change.window[0]
        rows = self._read_range(task, stored, above + begin, end - begin)
        # What an adapter brings along has the base's type once PEFT has loaded it.
        return rows.copy_(rows.to(torch_dtype(task.dtype))) if self._in_turn else rows

    def _read_range(self, task: TensorTask, stored: TensorInput, start: int, numel: int) -> Tensor:
        """Return a flat range of a tensor that is merged, in the compute dtype."""
        if not stored.parts and stored.rows is None:
            offset = stored.offset + start * stored.dtype.itemsize
            entry = TensorEntry(task.name, stored.dtype, (numel,), stored.file, offset)
            return self._read_by_torch(entry)
        memory = allocate(numel * stored.dtype.itemsize)
        self._read_stored(stored, start, numel, memory)
        values = torch.from_numpy(memory).view(torch_dtype(stored.dtype))
        return values.to(torch_dtype(self._plan.compute_dtype))

    def _read_stored(
        self, stored: TensorInput, start: int, numel: int, memory: NDArray[np.uint8]
    ) -> None:
        """Read a flat range of a tensor that is merged, as it is stored."""
        for span in plan_range(stored, start, numel):
            read_span(span, self._sources, memory)
            self._progress.count(Stage.READ, span.nbytes)

    def _read(self, stored: TensorEntry, place: int) -> Any:
        """Return a stored tensor in the compute dtype: torch's, or numpy's where torch is not needed."""
        if self._plan.needs_torch:
            return self._read_by_torch(stored)
        return self._read_tiles(stored) if place == 0 else self._read_plain(stored)

    def _read_tiles(self, stored: TensorEntry) -> NDArray[np.float32]:
        """Return a right factor as the kernels read it."""
        out = allocate(stored.numel * 4).view(np.float32)
        rank, columns = stored.shape
        tiles = Tiles(out, (rank, columns))
        for begin, part in self._read_ranges(stored, tiles.ranges(_READ_NUMEL)):
            tiles.put(begin, part)
        return out

    def _read_plain(self, stored: TensorEntry) -> NDArray[np.float32]:
        out = allocate(stored.numel * 4).view(np.float32)
        ranges = (
            (begin, min(begin + _READ_NUMEL, stored.numel))
            for begin in range(0, stored.numel, _READ_NUMEL)
        )
        for begin, part in self._read_ranges(stored, ranges):
            out[begin : begin + part.size] = part
        return out.reshape(stored.shape)

    def _read_ranges(
        self, stored: TensorEntry, ranges: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield flat ranges of a stored tensor, of at most :data:`_READ_NUMEL` elements, with their first."""
        itemsize = stored.dtype.itemsize
        raw = np.empty(min(_READ_NUMEL, stored.numel) * itemsize, dtype=np.uint8)
        for begin, end in ranges:
            own = raw[: (end - begin) * itemsize]
            self._sources[stored.file].read_into(stored.offset + begin * itemsize, own.data)
            self._progress.count(Stage.READ, own.size)
            with np.errstate(over="ignore"):
                part = widen(own, stored.dtype).astype(np.float32)
            bad = np.flatnonzero(~np.isfinite(part))
            if bad.size:
                self._refuse(stored, begin + int(bad[0]), float(part[bad[0]]))
            yield begin, part

    def _read_by_torch(self, stored: TensorEntry) -> Tensor:
        """Return a stored tensor in the compute dtype."""
        dtype = self._plan.compute_dtype
        memory = allocate(stored.numel * dtype.itemsize)
        out = torch.from_numpy(memory).view(torch_dtype(dtype))
        step = _READ_BYTES // stored.dtype.itemsize
        raw = bytearray(min(step, stored.numel) * stored.dtype.itemsize)
        for begin in range(0, stored.numel, step):
            part = out[begin : begin + step]
            view = memoryview(raw)[: part.numel() * stored.dtype.itemsize]
            self._sources[stored.file].read_into(
                stored.offset + begin * stored.dtype.itemsize, view
            )
            self._progress.count(Stage.READ, len(view))
            part.copy_(torch.frombuffer(view, dtype=torch_dtype(stored.dtype)))
            self._check_finite(part, stored, begin)
        return out.view(stored.shape)

    def _check_finite(self, part: Tensor, stored: TensorEntry, begin: int) -> None:
        if self._plan.keep_non_finite or math.isfinite(float(torch.dot(part, part))):
            return
        bad = torch.isfinite(part).logical_not_().nonzero()
        if bad.numel():
            element = int(bad[0])
            self._refuse(stored, begin + element, float(part[element]))

    def _refuse(self, stored: TensorEntry, element: int, value: float) -> Never:
        raise NonFiniteError(
            f"{self._plan.files[stored.file].path}: {printable(stored.name)} holds {value} at flat "
            f"element {element}; train or repair the adapter, or set `non_finite: keep` to let such "
            "values through"
        )


class HeldFactors:
    """What one chunk holds of the cache."""

    def __init__(
        self, factors: FactorCache, entries: Entries, tasks: dict[int, TensorTask]
    ) -> None:
        """Hold entries for some tensors."""
        self._factors = factors
        self._entries = entries
        self._tasks = tasks
        self._deltas: list[Delta | PlainProduct] = []

    def fill(self) -> None:
        """Read what is not in memory yet; see :meth:`FactorCache.fill`."""
        self._factors.fill(self._entries, self._tasks.values())

    def deltas_of(self, task: int, models: int) -> tuple[tuple[Any, ...], ...]:
        """Return the changes of a tensor per model; nothing at all for one without changes."""
        if task not in self._tasks:
            return ()
        by_model: list[list[Any]] = [[] for _ in range(models)]
        for change in self._tasks[task].changes:
            delta = self._factors.delta(self._entries, change, self._tasks[task])
            by_model[change.model].append(delta)
            self._deltas.append(delta)
        return tuple(map(tuple, by_model))

    def release(self) -> None:
        """Let go; what was made of it computes no more."""
        for delta in self._deltas:
            delta.forget()
        if self._entries:
            self._factors.release(self._entries)


def _once(entry: _Entry, make: Callable[[], Tensor]) -> None:
    with entry.filling:
        if entry.value is None:
            entry.value = make()


def _values(held: Entries, change: Change) -> list[Tensor]:
    """Return the factors that a change is computed from, and DoRA's magnitude last."""
    stored = _stored_values(held, change)
    if not change.workings:
        return stored
    values = [
        _filled(held[working_key(change, index)])
        if working.op.makes
        else view_stored(working, stored)
        for index, working in enumerate(change.workings)
    ]
    return [*values, stored[-1]] if change.kind is ChangeKind.NORMED else values


def _stored_values(held: Entries, change: Change) -> list[Tensor]:
    return [_filled(held[factor_key(change, place)]) for place in range(len(change.factors))]


def _filled(entry: _Entry) -> Any:
    assert entry.value is not None  # noqa: S101 - factors are there before they are used
    return entry.value
