"""Rows of matrices drawn from other matrices into a slot; see :class:`streammerge.checkpoint.rowmap.RowMap`.

A mean is summed in float64 in the order of its rows, divided, and rounded once; a row of another element
type is rounded once. What is read of a matrix does not depend on how it is cut.

Memory: at most :data:`~streammerge.plan.chunking.DECODING_BYTES` per reading thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.bytesource import ByteSource
from streammerge.checkpoint.rowmap import RowMap
from streammerge.floats import narrow, widen
from streammerge.plan.chunking import ReadSpan

_ROWS = 2048
"""Rows that are looked up at once: about two hundred bytes each."""
_STEP = 2**13
"""Elements of a mean that are summed at once."""


def draw_rows(
    span: ReadSpan, rows: RowMap, sources: Sequence[ByteSource], memory: NDArray[np.uint8]
) -> None:
    """Read a flat range of a matrix to its place in a slot.

    Args:
        span: The range, which begins at :attr:`ReadSpan.first`.
        rows: Where its rows come from.
        sources: Open input files, by their index in the plan.
        memory: The slot, ``[bytes]``.
    """
    drawing = _Drawing(rows, sources, memory)
    begin, end = span.first, span.first + span.nbytes // rows.dtype.itemsize
    last = -(-end // rows.columns)
    for row in range(begin // rows.columns, last, _ROWS):
        stop = min(row + _ROWS, last)
        low, high = max(begin, row * rows.columns), min(end, stop * rows.columns)
        place = span.slot_offset + (low - begin) * rows.dtype.itemsize
        drawing.draw(row, stop, low, high, place)


class _Drawing:
    """Draws some thousand rows at a time."""

    def __init__(
        self, rows: RowMap, sources: Sequence[ByteSource], memory: NDArray[np.uint8]
    ) -> None:
        self._rows = rows
        self._sources = sources
        self._memory = memory
        self._origins = rows.origin()
        self._files = np.array([place.file for place in rows.places], np.int64)
        self._offsets = np.array([place.offset for place in rows.places], np.int64)
        self._plain = np.array([place.dtype is rows.dtype for place in rows.places], np.bool_)
        self._known: tuple[int, int, int, int] | None = None
        self._known_at = 0

    def draw(self, row: int, stop: int, low: int, high: int, place: int) -> None:
        """Read the elements from ``low`` to ``high``, which lie in these rows, to ``place``."""
        columns, itemsize = self._rows.columns, self._rows.dtype.itemsize
        begins, ends = self._rows.spans(row, stop)
        numbers = np.arange(row, stop, dtype=np.int64)
        # The first and the last row may be cut.
        first = np.maximum(numbers * columns, low)
        count = np.minimum((numbers + 1) * columns, high) - first
        targets = place + (first - low) * itemsize
        single = ends - begins == 1
        of_single = self._origins[begins[single]]
        single[single] = self._plain[of_single[:, 0]]
        chosen = self._origins[begins[single]].astype(np.int64)
        files = self._files[chosen[:, 0]]
        inside = first[single] - numbers[single] * columns
        offsets = self._offsets[chosen[:, 0]] + (chosen[:, 1] * columns + inside) * itemsize
        nbytes = count[single] * itemsize
        for file, offset, target, length in _joined(files, offsets, targets[single], nbytes):
            self._sources[file].read_into(offset, self._memory.data[target : target + length])
        for index in np.flatnonzero(~single).tolist():
            cut = int(first[index] - numbers[index] * columns)
            self._make(
                int(begins[index]), int(ends[index]), cut, int(count[index]), int(targets[index])
            )

    def _make(self, begin: int, end: int, cut: int, count: int, target: int) -> None:
        """Write a part of the mean of some origins, or the same as before: rows of padding are one."""
        itemsize = self._rows.dtype.itemsize
        out = self._memory[target : target + count * itemsize]
        if (begin, end, cut, count) == self._known:
            out[:] = self._memory[self._known_at : self._known_at + count * itemsize]
            return
        for step in range(0, count, _STEP):
            some = min(_STEP, count - step)
            total = np.zeros(some, np.float64)
            for at, row in self._origins[begin:end].tolist():
                total += self._read(at, row * self._rows.columns + cut + step, some)
            if end - begin > 1:
                total /= end - begin
            raw = narrow(total, self._rows.dtype)
            out[step * itemsize : (step + some) * itemsize] = raw
        self._known, self._known_at = (begin, end, cut, count), target

    def _read(self, at: int, first: int, count: int) -> NDArray[np.float64]:
        """Return elements of a place."""
        place = self._rows.places[at]
        raw = np.empty(count * place.dtype.itemsize, np.uint8)
        self._sources[place.file].read_into(place.offset + first * place.dtype.itemsize, raw.data)
        return widen(raw, place.dtype)


def _joined(
    files: NDArray[np.int64],
    offsets: NDArray[np.int64],
    targets: NDArray[np.int64],
    nbytes: NDArray[np.int64],
) -> Iterator[tuple[int, int, int, int]]:
    """Yield file, offset, target and length of what to read, neighbours joined, in the files' order."""
    if not len(files):
        return
    apart = (
        (files[1:] != files[:-1])
        | (offsets[1:] != offsets[:-1] + nbytes[:-1])
        | (targets[1:] != targets[:-1] + nbytes[:-1])
    )
    starts = np.concatenate(([0], np.flatnonzero(apart) + 1))
    lengths = np.add.reduceat(nbytes, starts)
    # Disks read forwards.
    order = np.lexsort((offsets[starts], files[starts]))
    chosen = starts[order]
    yield from zip(
        files[chosen].tolist(),
        offsets[chosen].tolist(),
        targets[chosen].tolist(),
        lengths[order].tolist(),
        strict=True,
    )
