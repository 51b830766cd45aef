"""Moves a piece through a device in steps: copied in, computed and copied out side by side.

    copy-in stream    in 0 │ in 1 │ (waits for computed 0) in 2 │ ...
    compute stream           step 0 (waits for in 0) │ step 1 │ ...
    copy-out stream                  out 0 (waits for computed 0) │ out 1 │ ...

Lanes take turns. A lane is filled again when what was in it has been computed, and computed into
again when what was in it has been copied out. The host enqueues all of a piece, then waits once.
Inputs are copied from the slots they were read into, and results into the slots they are written
from: those are page-locked, and make up the ring of host buffers. Where the device has room for the
inputs of a piece that will be asked about again (:mod:`~streammerge.engine.accelerator.keeping`), they
are copied there instead of into lanes, once.

Memory: :attr:`~streammerge.plan.devices.StepShape.device_bytes` on the device, less what is
temporary, and ``host_bytes`` page-locked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streammerge.adapters.onto_base.rows import by_rows
from streammerge.engine.accelerator.backend import Backend, Event
from streammerge.engine.accelerator.keeping import Kept
from streammerge.lazily import torch
from streammerge.plan.devices import LANES, StepShape
from streammerge.statistics.in_tensors import COUNTS, Answers
from streammerge.statistics.magnitude import BINS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """What is computed at once."""

    index: int
    """Its number in the piece."""
    begin: int
    """First element in the piece."""
    numel: int
    """Elements."""
    inputs: tuple[Tensor | None, ...]
    """``[numel]`` per model, in the stored type; None where nothing is stored."""
    out: Tensor
    """Bytes for the result."""


@dataclass(frozen=True, slots=True)
class Lane:
    """Buffers of one step."""

    inputs: tuple[Tensor, ...]
    """``[input_bytes]`` uint8 per model."""
    out: Tensor
    """``[output_bytes]`` uint8."""
    arrived: Event
    """The inputs have been copied in."""
    computed: Event
    """They have been computed; the result is there."""
    departed: Event
    """The result has been copied out."""


class Ring:
    """The buffers and streams of one worker on its device."""

    def __init__(self, backend: Backend, shape: StepShape, dtype: torch.dtype, counts: int) -> None:
        """Allocate everything.

        Args:
            backend: The device.
            shape: How much of what.
            dtype: The compute dtype.
            counts: Counters per piece, for what is kept.
        """
        self._backend = backend
        self.shape = shape
        self._copy_in = backend.make_stream()
        self._compute = backend.make_stream()
        self._copy_out = backend.make_stream()
        self._drained = backend.make_event()
        self._done = backend.make_event()
        self._lanes = tuple(self._make_lane() for _ in range(LANES))
        rows = backend.allocate(shape.rows * shape.step_numel * shape.compute_itemsize)
        self.rows = rows.view(dtype).view(shape.rows, shape.step_numel)
        self.notes = Returned(backend, shape.steps * shape.notes, dtype)
        self.counts = Returned(backend, counts, torch.int64)
        totals = max(1, shape.chunk_blocks * shape.totals)
        self.totals = Returned.of(
            backend,
            backend.allocate(8 * totals).view(torch.float64).view(-1, max(1, shape.totals)),
        )
        self.constants = Returned(backend, max(1, shape.constants), torch.int64)
        self.lasts = backend.allocate(8 * max(1, shape.ranks)).view(torch.int64)
        self.row_totals = Returned(backend, max(1, shape.row_totals), torch.float64)
        self.row_numbers = Returned(backend, max(1, shape.row_numbers), torch.float64)
        self.factors = backend.allocate(max(4, shape.factor_bytes)).view(torch.float32)
        self._staged = torch.from_numpy(backend.pin(max(4, shape.staged_bytes)))
        self.answers = self._make_answers(dtype) if shape.searches else ()
        self.values = tuple(Returned.of(backend, each.values) for each in self.answers)
        self.counted = tuple(Returned.of(backend, each.counts) for each in self.answers)
        self.histograms = tuple(Returned.of(backend, each.histogram) for each in self.answers)

    def _make_lane(self) -> Lane:
        shape, backend = self.shape, self._backend
        memory = backend.allocate(shape.models * shape.input_bytes).view(shape.models, -1)
        return Lane(
            tuple(memory.unbind()),
            backend.allocate(shape.output_bytes),
            *(backend.make_event() for _ in range(3)),
        )

    def _make_answers(self, dtype: torch.dtype) -> tuple[Answers, ...]:
        borders = self._backend.allocate(4 * (BINS + 1)).view(torch.int32)
        self.run(lambda: _count_up_(borders))
        return tuple(self._make_answer(dtype, borders) for _ in range(self.shape.searches))

    def _make_answer(self, dtype: torch.dtype, borders: Tensor) -> Answers:
        shape = self.shape
        values = self._backend.allocate((shape.collected + 1) * shape.compute_itemsize)
        counts = self._backend.allocate(8 * shape.chunk_blocks * COUNTS).view(torch.int64)
        small = self._backend.allocate(8 * (BINS + 1)).view(torch.int64)
        rows = counts.view(shape.chunk_blocks, COUNTS)
        return Answers(rows, values.view(dtype), small[BINS:], small[:BINS], borders)

    def run(self, work: Callable[[], None]) -> None:
        """Enqueue operations beside those of steps."""
        self._compute.run(work)

    def bring_constants(self, numbers: Sequence[int]) -> None:
        """Enqueue a copy of what steps read, before they do; nothing may be in flight."""
        self._bring(np.array(numbers, dtype=np.int64), self.constants)

    def bring_row_numbers(self, numbers: NDArray[np.float64]) -> None:
        """Enqueue a copy of what is known of rows, likewise."""
        self._bring(numbers.reshape(-1), self.row_numbers)

    def _bring(self, numbers: NDArray[Any], to: Returned) -> None:
        count = numbers.size
        to.host.numpy()[:count] = numbers
        if count:
            self._copy_in.copy(to.device_bytes(count), to.host_bytes(count))

    def bring_factor(self, values: Tensor, place: int) -> None:
        """Copy a factor to its place among those of a tensor, and wait; nothing may be in flight.

        It comes once for many pieces, so that little page-locked memory does.

        Args:
            values: ``[n]`` float32, or ``[rows, columns]`` with any strides.
            place: Index of its first element in ``factors``, where it lies row after row.
        """
        there = self.factors[place : place + values.numel()]
        table = values if values.dim() > 1 else values[None]
        step = self._staged.numel() // 4
        for begin in range(0, values.numel(), step):
            part = there[begin : begin + step].view(torch.uint8)
            staged = self._staged[: part.numel()]
            for own, row, column in by_rows(staged.view(torch.float32), begin, table.shape[1]):
                count, width = own.shape
                own.copy_(table[row : row + count, column : column + width])
            self._copy_in.copy(part, staged)
            self._copy_in.record(self._done)
            self._done.synchronize()

    def clear(self) -> None:
        """Set all that is added up over a piece to zero; to be run."""
        self.notes.device.zero_()
        self.counts.device.zero_()
        for answers in self.answers:
            answers.clear_()

    def stream(
        self,
        inputs: Sequence[Tensor | None],
        numel: int,
        compute: Callable[[Step], None],
        out: Tensor | None,
        kept: Kept | None = None,
        *,
        cuts: Sequence[range] | None = None,
        before: int = 0,
    ) -> None:
        """Enqueue a piece.

        Args:
            inputs: ``[numel]`` per model, page-locked; with more elements around them where a cut has.
            numel: Elements of the result.
            compute: Called once per step, with its stream current; enqueues operations.
            out: Bytes that receive the results, page-locked; None where there are none.
            kept: Where the inputs stay on the device, or are already; None to copy them step by step
                into lanes.
            cuts: What steps are computed of, as elements of the inputs; None for as many at once as there is
                room for.
            before: Elements of the inputs that come before the result's.
        """
        itemsize = 0 if out is None else out.numel() // numel
        for index, cut in enumerate(self._cuts(numel) if cuts is None else cuts):
            lane = self._lanes[index % len(self._lanes)]
            if kept is None:
                self._copy_in.wait(lane.computed)
            there = self._step_inputs(inputs, lane, slice(cut.start, cut.stop), kept)
            # What is known of each step of others has a place of its own.
            own = index if cuts is None else 0
            step = Step(own, cut.start, len(cut), there, lane.out[: len(cut) * itemsize])
            self._copy_in.record(lane.arrived)
            self._compute.wait(lane.arrived)
            self._compute.wait(lane.departed)
            self._compute.run(lambda step=step: compute(step))  # type: ignore[misc]
            self._compute.record(lane.computed)
            self._copy_out.wait(lane.computed)
            if out is not None:
                first, last = max(cut.start, before), min(cut.stop, before + numel)
                to = out[(first - before) * itemsize : (last - before) * itemsize]
                source = step.out[(first - cut.start) * itemsize : (last - cut.start) * itemsize]
                self._copy_out.copy(to, source)
                self._copy_out.record(lane.departed)

    def _cuts(self, numel: int) -> Iterator[range]:
        step = self.shape.step_numel
        return (range(begin, min(begin + step, numel)) for begin in range(0, numel, step))

    def _step_inputs(
        self, inputs: Sequence[Tensor | None], lane: Lane, elements: slice, kept: Kept | None
    ) -> tuple[Tensor | None, ...]:
        """Return a step's inputs on the device, and enqueue their copies where they are not there."""
        found: list[Tensor | None] = []
        for model, stored in enumerate(inputs):
            if stored is None:
                found.append(None)
                continue
            part = stored[elements]
            if kept is None:
                there = lane.inputs[model][: part.nbytes].view(part.dtype)
            else:
                place = kept.inputs[model]
                assert place is not None  # noqa: S101 - as many as there are inputs
                there = place[elements]
            if kept is None or not kept.is_there:
                self._copy_in.copy(there.view(torch.uint8), part.view(torch.uint8))
            found.append(there)
        return tuple(found)

    def fetch(self, *returned: tuple[Returned, int]) -> None:
        """Copy the first elements of some results to the host, and wait for all that was enqueued.

        Nothing is in flight when this returns.
        """
        self._compute.record(self._drained)
        self._copy_out.wait(self._drained)
        for each, count in returned:
            self._copy_out.copy(each.host_bytes(count), each.device_bytes(count))
        self._copy_out.record(self._done)
        self._done.synchronize()

    def abandon(self) -> None:
        """Wait for what is in flight, so that memory can be freed, whatever has happened."""
        for stream in (self._copy_in, self._compute, self._copy_out):
            # A device that is lost has nothing in flight, and says so by failing.
            with contextlib.suppress(RuntimeError):
                stream.record(self._done)
                self._done.synchronize()


def _count_up_(numbers: Tensor) -> None:
    torch.arange(numbers.numel(), out=numbers)


class Returned:
    """A result on the device, and the page-locked memory that it is copied to."""

    def __init__(self, backend: Backend, numel: int, dtype: torch.dtype) -> None:
        """Allocate both."""
        self._take(backend, backend.allocate(numel * dtype.itemsize).view(dtype))

    @classmethod
    def of(cls, backend: Backend, device: Tensor) -> Returned:
        """Give what lies on the device a place on the host."""
        made = cls.__new__(cls)
        made._take(backend, device)  # noqa: SLF001 - its own class
        return made

    def _take(self, backend: Backend, device: Tensor) -> None:
        self.device = device
        self._pinned = torch.from_numpy(backend.pin(device.nbytes))
        self.host = self._pinned.view(device.dtype).view(device.shape)

    def host_bytes(self, count: int) -> Tensor:
        """Return the first elements on the host, as bytes."""
        return self._pinned[: count * self.device.itemsize]

    def device_bytes(self, count: int) -> Tensor:
        """Return the first elements on the device, as bytes."""
        return self.device.view(-1)[:count].view(torch.uint8)
