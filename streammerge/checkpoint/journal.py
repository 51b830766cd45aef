r"""The journal of a merge in progress: what is durable, so that an interrupted merge can go on.

    <checksum> <JSON>\n     first the identity of the merge, then one entry per line

An entry is appended after the bytes that it claims were synced. The journal itself is synced only
when a merge stops: an entry that a power cut takes away costs the work that it recorded, no more.
The first line that is torn or whose checksum disagrees ends the journal; what follows is cut off.

Memory: one line at a time to write; to read, the entries.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.errors import DiskSpaceError, OutputError

JOURNAL_NAME = ".streammerge-journal"
_CHECKSUM_BYTES = 8
_ENCODER = json.JSONEncoder(separators=(",", ":"))
"""Kept, because json.dumps makes a new one for every line."""


@dataclass(frozen=True, slots=True)
class PieceDone:
    """A flat range of one output tensor is durable."""

    task: int
    """Index of the tensor in the plan."""
    start: int
    """First element."""
    numel: int
    """Elements."""
    leaves: str
    """The digests of its leaves, joined, in hex; see :mod:`streammerge.checkpoint.digests`."""
    kept: tuple[int, ...]
    """Entries of the range kept per source; empty where the statistics of the tensor tell."""
    not_finite: int
    """Input values of the range that were NaN or infinite and let through."""
    tensor_kept: tuple[int, ...]
    """Entries of the whole tensor kept per source, by its statistics; empty without them."""
    thresholds: tuple[float, ...]
    """Threshold per source; empty without statistics."""


@dataclass(frozen=True, slots=True)
class ScopeFound:
    """The statistics of a scope are known."""

    task: int
    """Index of the tensor; -1 for the whole model."""
    tops: tuple[tuple[float, ...], ...]
    """Per source the fields of :class:`~streammerge.reductions.topk.TopK`, in order."""


Entry = PieceDone | ScopeFound


@dataclass(frozen=True, slots=True)
class Found:
    """What a journal holds."""

    identity: dict[str, Any]
    """What the merge was; see :func:`streammerge.identity.identify`."""
    entries: tuple[Entry, ...]
    """In the order in which they were written."""
    nbytes: int
    """Where the last whole line ends."""


class Journal:
    """The journal of this merge, open for appending; thread-safe."""

    def __init__(self, path: Path, *, keep_nbytes: int = 0) -> None:
        """Open or create a journal.

        Args:
            path: The file.
            keep_nbytes: Whole lines of an earlier run; what follows them is cut off.

        Raises:
            OutputError: The system refuses.
        """
        self._path = path
        self._lock = threading.Lock()
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        try:
            self._fd = os.open(path, flags, 0o666)
            os.ftruncate(self._fd, keep_nbytes)
            os.lseek(self._fd, keep_nbytes, os.SEEK_SET)
        except OSError as error:
            raise _journal_error(path, error) from error

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Write the first line, and make it durable.

        Raises:
            DiskSpaceError: The disk is full.
            OutputError: The system refuses.
        """
        self._write(_line(dict(identity)))
        self.sync()

    def append(self, entries: Sequence[Entry]) -> None:
        """Add entries; what they claim must be durable.

        Raises:
            DiskSpaceError: The disk is full.
            OutputError: The system refuses.
        """
        if entries:
            self._write(b"".join(_line(_as_document(entry)) for entry in entries))

    def _write(self, data: bytes) -> None:
        with self._lock:
            try:
                done = 0
                while done < len(data):
                    done += os.write(self._fd, data[done:])
            except OSError as error:
                raise _journal_error(self._path, error) from error

    def sync(self) -> None:
        """Make all entries durable.

        Raises:
            OutputError: The system refuses.
        """
        try:
            getattr(os, "fdatasync", os.fsync)(self._fd)
        except OSError as error:
            raise _journal_error(self._path, error) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def read_journal(path: Path) -> Found | None:
    """Return what a journal holds, up to the first line that is not whole.

    Returns:
        None when there is no journal, or not even its first line is whole.

    Raises:
        OutputError: The system refuses to read it.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _journal_error(path, error) from error
    identity: dict[str, Any] | None = None
    entries: list[Entry] = []
    end = 0
    while (line_end := data.find(b"\n", end)) >= 0:
        document = _parse_line(data[end:line_end])
        if document is None:
            break
        if identity is None:
            identity = document
        else:
            entry = _as_entry(document)
            if entry is None:
                break
            entries.append(entry)
        end = line_end + 1
    return None if identity is None else Found(identity, tuple(entries), end)


def _line(document: dict[str, Any]) -> bytes:
    text = _ENCODER.encode(document).encode()
    return _checksum(text) + b" " + text + b"\n"


def _checksum(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=_CHECKSUM_BYTES).hexdigest().encode()


def _parse_line(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.partition(b" ")
    if checksum != _checksum(text):
        return None
    document = json.loads(text)
    return document if isinstance(document, dict) else None


def _as_document(entry: Entry) -> dict[str, Any]:
    # Not asdict, which copies deeply: there may be an entry per 16,000 elements.
    return {"entry": type(entry).__name__} | {
        name: getattr(entry, name) for name in entry.__slots__
    }


def _as_entry(document: dict[str, Any]) -> Entry | None:
    kind = document.pop("entry", None)
    values = {key: _as_tuples(value) for key, value in document.items()}
    if kind == PieceDone.__name__:
        return PieceDone(**values)
    return ScopeFound(**values) if kind == ScopeFound.__name__ else None


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(each) for each in value) if isinstance(value, list) else value


def _journal_error(path: Path, error: OSError) -> OutputError | DiskSpaceError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DiskSpaceError(
            f"{path}: the disk is full, so what is done cannot be recorded; free some space, then "
            "continue with --resume"
        )
    return OutputError(f"{path}: the journal of the merge failed: {error.strerror}")
