"""What journals say is done of a merge: where each record stands, and the record when it is needed.

    journal of the merge ┐                  task  start  numel  journal  place
    journal of attempt 1 ┼─ read once ─▶     0      0    4 MiB     1      812     ─ read ─▶ PieceDone
    journal of attempt 2 ┘                   0    4 MiB  4 MiB     2     1103

Records of pieces are up to some KiB each, and there is one for each block of a tensor where memory is short:
of terabytes they would take more than everything else that a merge holds.

Memory: :data:`PIECE_BYTES` per piece, twice that for a moment while they are sorted.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.journal import (
    Entry,
    PieceDone,
    ScopeFound,
    iter_records,
    parse_line,
)
from streammerge.checkpoint.ownfiles import open_own
from streammerge.errors import OutputError, ResumeError

_ROW = np.dtype(
    [("task", "<i4"), ("start", "<i8"), ("numel", "<i8"), ("journal", "<i4"), ("place", "<i8")]
)
PIECE_BYTES = _ROW.itemsize
"""Memory of what is known of a piece."""
_LEAST_SORTED = 1 << 16
_OPEN_FILES = 8
_AT_ONCE = 4096


class Recorded:
    """What some journals hold; of several records about one place the last that was read counts."""

    def __init__(self, check: Callable[[Entry], None] | None = None) -> None:
        """Begin with nothing.

        Args:
            check: Raises if an entry cannot be about the merge; asked of each that is of interest, also
                if a later one takes its place.
        """
        self._check = check
        self.scopes: dict[int, ScopeFound] = {}
        """Statistics that are known, by the tensor's index; -1 for those of the whole model."""
        self._journals: list[Path] = []
        self._rows = np.empty(0, dtype=_ROW)
        self._new = array("q")

    def add(
        self, journal: Path, wanted: Callable[[Entry], bool] | None = None, *, pieces: bool = True
    ) -> None:
        """Take in what a journal holds.

        Args:
            journal: The file; it must stay, and may grow.
            wanted: Which of its entries are of interest; None for all.
            pieces: Whether pieces are, too.

        Raises:
            ResumeError: A line is whole, and no entry of this version.
            OutputError: The system refuses to read it.
        """
        number = len(self._journals)
        self._journals.append(journal)
        for place, entry in iter_records(journal, pieces=pieces):
            if not isinstance(entry, PieceDone | ScopeFound) or (wanted and not wanted(entry)):
                continue
            if self._check is not None:
                self._check(entry)
            if isinstance(entry, ScopeFound):
                self.scopes[entry.task] = entry
                continue
            if max(entry.task >> 31, (entry.start + entry.numel) >> 62):
                raise ResumeError(
                    f"{journal}: speaks of tensor {entry.task} from element {entry.start} on, which no merge "
                    "has; give --overwrite to start anew"
                )
            self._new.extend((entry.task, entry.start, entry.numel, number, place))
            if len(self._new) >= 5 * max(_LEAST_SORTED, len(self._rows) // 4):
                self._sort()
        self._sort()

    def _sort(self) -> None:
        """Put all rows in the order of their places, each place once."""
        new = np.empty(len(self._new) // 5, dtype=_ROW)
        values = np.frombuffer(self._new, dtype=np.int64).reshape(-1, 5)
        for column, name in enumerate(_ROW.names or ()):
            new[name] = values[:, column]
        del values
        self._new = array("q")
        rows = np.concatenate([self._rows, new])
        # Stable: of equal places the one that was read last comes last.
        order = np.lexsort((rows["start"], rows["task"]))
        rows = rows[order]
        del order, new
        last = np.ones(len(rows), dtype=bool)
        last[:-1] = (rows["task"][1:] != rows["task"][:-1]) | (
            rows["start"][1:] != rows["start"][:-1]
        )
        self._rows = rows if last.all() else rows[last]

    def __len__(self) -> int:
        """Return how many pieces there are."""
        return len(self._rows)

    def __bool__(self) -> bool:
        """Return whether there is anything."""
        return bool(len(self._rows) or self.scopes)

    @property
    def tasks(self) -> NDArray[np.int32]:
        """The tensor of each piece, by index; ascending."""
        return self._rows["task"]

    @property
    def starts(self) -> NDArray[np.int64]:
        """The first element of each; ascending within a tensor."""
        return self._rows["start"]

    @property
    def numels(self) -> NDArray[np.int64]:
        """The elements of each."""
        return self._rows["numel"]

    def places(self) -> Iterator[tuple[int, int, int]]:
        """Yield tensor, first element and elements of each piece, in their order."""
        for begin in range(0, len(self._rows), _AT_ONCE):
            rows = self._rows[["task", "start", "numel"]][begin : begin + _AT_ONCE]
            yield from rows.tolist()

    def only(self, kept: NDArray[np.bool_]) -> Recorded:
        """Return some of the pieces, and all statistics."""
        chosen = Recorded()
        chosen.scopes = self.scopes
        chosen._journals = self._journals
        chosen._rows = self._rows[kept]
        return chosen

    def read(self, which: NDArray[np.int64] | None = None) -> Iterator[PieceDone]:
        """Yield the records of some pieces, one after the other.

        Args:
            which: Their numbers; None for all, in their order.

        Raises:
            ResumeError: A journal is not what it was.
            OutputError: The system refuses to read it.
        """
        count = len(self._rows) if which is None else len(which)
        with contextlib.closing(_Journals(self._journals)) as journals:
            for begin in range(0, count, _AT_ONCE):
                some = slice(begin, begin + _AT_ONCE)
                rows = self._rows[some if which is None else which[some]]
                for task, start, numel, journal, place in rows.tolist():
                    record = journals.read(journal, place)
                    found = isinstance(record, PieceDone) and (
                        record.task,
                        record.start,
                        record.numel,
                    )
                    if not isinstance(record, PieceDone) or found != (task, start, numel):
                        raise ResumeError(
                            f"{self._journals[journal]}: at byte {place}: is not what it was a moment ago; give "
                            "--overwrite to start anew"
                        )
                    yield record


class _Journals:
    """Journals that are open for reading here and there, a few at a time."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._open: OrderedDict[int, IO[bytes]] = OrderedDict()

    def read(self, journal: int, place: int) -> Any:
        """Return the entry at a place; None where no whole line begins."""
        path = self._paths[journal]
        try:
            stream = self._stream(journal)
            stream.seek(place)
            line = stream.readline()
        except OSError as error:
            raise OutputError(f"{path}: cannot be read: {error.strerror}") from error
        return parse_line(line[:-1]) if line.endswith(b"\n") else None

    def _stream(self, journal: int) -> IO[bytes]:
        stream = self._open.pop(journal, None)
        if stream is None:
            if len(self._open) == _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            stream = os.fdopen(open_own(self._paths[journal], os.O_RDONLY), "rb")
        self._open[journal] = stream
        return stream

    def close(self) -> None:
        """Close them."""
        while self._open:
            self._open.popitem()[1].close()
