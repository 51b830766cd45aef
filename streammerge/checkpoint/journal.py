r"""The journal of a merge in progress: what is durable, so that an interrupted merge can go on.

    <checksum> <JSON>\n     first the identity of the merge, then one entry per line

An entry is appended after the bytes that it claims were synced. The journal itself is synced only
when a merge stops: an entry that a power cut takes away costs the work that it recorded, no more.
The first line that is torn or whose checksum disagrees ends the journal; what follows is cut off.

Memory: one line at a time; what lines say is up to who reads them (:mod:`streammerge.checkpoint.recorded`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from streammerge.checkpoint.digests import DIGEST_BYTES
from streammerge.checkpoint.ownfiles import open_own
from streammerge.errors import DiskSpaceError, OutputError, ResumeError
from streammerge.statistics.topk import TopK
from streammerge.units import MIB

JOURNAL_NAME = ".streammerge-journal"
_CHECKSUM_BYTES = 8
_MARGIN_BYTES = 2 * _CHECKSUM_BYTES + 2
"""Of a line, beside its text."""
_LONGEST_LINE = 64 * MIB
"""The first one names all inputs; no other has a thousandth of that."""
_TOP_FIELDS = len(fields(TopK))
_ENCODER = json.JSONEncoder(separators=(",", ":"))
"""Kept, because json.dumps makes a new one for every line."""
_PIECE = b'{"entry":"PieceDone"'
"""How the text of a line about a piece begins."""


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
    """Threshold per ranked value; empty without statistics."""
    numbers: tuple[float, ...]
    """What else its statistics came to; empty where that is nothing."""
    survey: tuple[tuple[Any, ...], ...] = ()
    """What a report knows of the range: the fields of :class:`~streammerge.statistics.surveying.Surveyed`;
    empty without a report."""


@dataclass(frozen=True, slots=True)
class ScopeFound:
    """The statistics of a scope are known."""

    task: int
    """Index of the tensor; -1 for the whole model."""
    tops: tuple[tuple[float, ...], ...]
    """Per ranked value the fields of :class:`~streammerge.statistics.topk.TopK`, in order."""
    numbers: tuple[float, ...]
    """What the method settled on."""


@dataclass(frozen=True, slots=True)
class Divided:
    """The merge is done in parts, by several processes."""

    parts: int
    """How many."""


@dataclass(frozen=True, slots=True)
class PartDone:
    """Everything of a part is durable; what that took."""

    seconds: float
    """Wall time of the work."""
    read: int
    """Bytes of inputs that were read."""
    written: int
    """Bytes of tensors that were written."""
    measured_memory: int
    """Peak private memory of the process, in bytes."""
    memory_budget: int
    """What the user allowed, in bytes."""
    workers: int
    """Compute threads."""
    device: str
    """What computed: ``cpu``, or names of accelerators."""
    damaged: int
    """Pieces of earlier attempts whose bytes had changed."""


Entry = PieceDone | ScopeFound
"""What is done of tensors."""
Record = Entry | Divided | PartDone
"""What a line after the first may hold."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a journal holds; :func:`iter_records` reads its entries."""

    identity: dict[str, Any]
    """What the merge was; see :func:`streammerge.identity.identify`."""
    lines: int
    """Whole lines after the first."""
    nbytes: int
    """Where the last of them ends."""
    checksum: int
    """Of their texts."""


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
        try:
            self._fd = open_own(path, os.O_RDWR | os.O_CREAT)
            os.ftruncate(self._fd, keep_nbytes)
            os.lseek(self._fd, keep_nbytes, os.SEEK_SET)
        except OSError as error:
            raise _journal_error(path, error) from error

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Write the first line, and make it durable.

        Raises:
            DiskSpaceError: The disk is full.
            OutputError: The system refuses.
        """
        self._write(_line(dict(identity)))
        self.sync()

    def append(self, entries: Sequence[Record]) -> None:
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
    """Return what a journal holds, up to the first line that is not whole; its entries are not looked at.

    Returns:
        None when there is no journal, or not even its first line is whole.

    Raises:
        ResumeError: Its first line is whole, but no identity.
        OutputError: The system refuses to read it, or another file is linked there.
    """
    identity: dict[str, Any] | None = None
    lines = nbytes = checksum = 0
    for begin, text in _iter_whole(path):
        if identity is None:
            identity = _parse(text, where=f"{path}: line 1")
        else:
            lines += 1
        checksum = zlib.crc32(text, checksum)
        nbytes = begin + _MARGIN_BYTES + len(text)
    return None if identity is None else Found(identity, lines, nbytes, checksum)


def whole_lines(data: bytes) -> Iterator[bytes]:
    """Yield the lines of a journal, without their ends, up to the first one that is not whole."""
    begin = 0
    while (end := data.find(b"\n", begin)) >= 0:
        line = data[begin:end]
        if _checked(line) is None:
            return
        yield line
        begin = end + 1


def parse_head(line: bytes, *, where: str) -> dict[str, Any]:
    """Return what the first line of a journal says, which is whole.

    Raises:
        ResumeError: It is no identity.
    """
    return _parse(_text_of(line), where=where)


def read_head(path: Path) -> dict[str, Any] | None:
    """Return what the first line of a journal says; None when it is not there, or not whole.

    Raises:
        ResumeError: It is whole, but no identity.
        OutputError: The system refuses to read it, or another file is linked there.
    """
    with contextlib.closing(_iter_whole(path)) as lines:
        for _, text in lines:
            return _parse(text, where=f"{path}: line 1")
    return None


def iter_records(path: Path, *, pieces: bool = True) -> Iterator[tuple[int, Record]]:
    """Yield where each entry of a journal begins, and the entry, as far as its lines are whole.

    Only of a journal whose identity was found to be that of this merge: another version may write
    entries of other kinds.

    Args:
        path: The journal.
        pieces: Whether pieces of tensors are wanted; their lines are nearly all of it, and are passed
            over unread if they are not.

    Raises:
        ResumeError: A line is whole, and no entry of this version.
        OutputError: The system refuses to read it, or another file is linked there.
    """
    for number, (begin, text) in enumerate(_iter_whole(path), 1):
        if number > 1 and (pieces or not text.startswith(_PIECE)):
            where = f"{path}: line {number}"
            yield begin, _as_entry(_parse(text, where=where), where=where)


def _iter_whole(path: Path) -> Generator[tuple[int, bytes]]:
    """Yield where each line of a journal begins, and its text, up to the first that is not whole."""
    try:
        with os.fdopen(open_own(path, os.O_RDONLY), "rb") as stream:
            begin = 0
            while line := stream.readline(_LONGEST_LINE):
                text = _checked(line[:-1]) if line.endswith(b"\n") else None
                if text is None:
                    return
                yield begin, text
                begin += len(line)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _journal_error(path, error) from error


def parse_line(line: bytes) -> Record | None:
    """Return what a whole line holds; None for the first one of a journal, and for a torn one.

    Raises:
        ResumeError: It is an entry of no known kind.
    """
    text = _checked(line)
    if text is None:
        return None
    document = _parse(text, where="a journal")
    return _as_entry(document, where="a journal") if "entry" in document else None


def _line(document: dict[str, Any]) -> bytes:
    text = _ENCODER.encode(document).encode()
    return _checksum(text) + b" " + text + b"\n"


def _checksum(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=_CHECKSUM_BYTES).hexdigest().encode()


def _checked(line: bytes) -> bytes | None:
    """Return the text of a line if its checksum agrees."""
    checksum, _, text = line.partition(b" ")
    return text if checksum == _checksum(text) else None


def _text_of(line: bytes) -> bytes:
    return line.partition(b" ")[2]


def _parse(text: bytes, *, where: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _odd_line(where, f"is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise _odd_line(where, f"is {type(document).__name__}, not an object")
    return document


def _as_document(entry: Record) -> dict[str, Any]:
    # Not asdict, which copies deeply: there may be an entry per 16,000 elements.
    return {"entry": type(entry).__name__} | {
        name: getattr(entry, name) for name in entry.__slots__
    }


def _as_entry(document: dict[str, Any], *, where: str) -> Record:
    """Return the entry that a line holds, every field of its type."""
    kind = _KINDS.get(str(document.pop("entry", None)))
    if kind is None:
        raise _odd_line(where, "is an entry of no known kind")
    if document.keys() != set(kind.__slots__):
        raise _odd_line(where, f"has the fields {', '.join(sorted(document))}")
    values = {name: _as_tuples(value) for name, value in document.items()}
    for name, value in values.items():
        if not _CHECKS[name](value):
            raise _odd_line(where, f"{name} cannot be {value!r}")
    return kind(**values)


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(each) for each in value) if isinstance(value, list) else value


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_count(value: Any) -> bool:
    # Not isinstance: True is an int.
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in {int, float}


def _is_index(value: Any) -> bool:
    """Return whether it is a whole number from -1, which stands for none, or all."""
    return type(value) is int and value >= -1


def _are(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is tuple and all(map(check, value))


def _are_leaves(value: Any) -> bool:
    return (
        type(value) is str
        and len(value) % (2 * DIGEST_BYTES) == 0
        and not value.strip("0123456789abcdef")
    )


def _is_top(value: Any) -> bool:
    """Return whether these are the fields of one source's statistics."""
    return (
        type(value) is tuple
        and len(value) == _TOP_FIELDS
        and _is_number(value[0])
        and all(map(_is_index, value[1:]))
    )


def _is_survey(value: Any) -> bool:
    """Return whether these are the fields of a survey, or none."""
    if value == ():
        return True
    if type(value) is not tuple or len(value) != len(_SURVEY_FIELDS):
        return False
    return all(_are(check)(each) for check, each in zip(_SURVEY_FIELDS, value, strict=True))


def _is_pair(value: Any, *checks: Callable[[Any], bool]) -> bool:
    return (
        type(value) is tuple
        and len(value) == len(checks)
        and all(check(each) for check, each in zip(checks, value, strict=True))
    )


def _is_integer(value: Any) -> bool:
    return type(value) is int


_SURVEY_FIELDS: tuple[Callable[[Any], bool], ...] = (
    lambda value: _is_pair(value, _is_integer, _is_integer),
    _is_count,
    lambda value: _is_pair(value, _is_number, _is_index),
    _are(lambda value: _is_pair(value, _is_count, _is_count)),
)
"""What each entry of the fields of a survey must be: a sum, a count, a largest value, a histogram."""
_KINDS: dict[str, type[Record]] = {
    each.__name__: each for each in (PieceDone, ScopeFound, Divided, PartDone)
}
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "task": _is_index,
    "start": _is_count,
    "numel": _is_count,
    "leaves": _are_leaves,
    "kept": _are(_is_count),
    "not_finite": _is_count,
    "tensor_kept": _are(_is_count),
    "thresholds": _are(_is_number),
    "tops": _are(_is_top),
    "numbers": _are(_is_number),
    "parts": _is_count,
    "seconds": _is_number,
    "read": _is_count,
    "written": _is_count,
    "measured_memory": _is_count,
    "memory_budget": _is_count,
    "workers": _is_count,
    "device": _is_text,
    "damaged": _is_count,
    "survey": _is_survey,
}
"""What the value of a field must be."""


def _odd_line(where: str, what: str) -> ResumeError:
    return ResumeError(
        f"{where}: {what}, which this version does not write; give --overwrite to start anew"
    )


def _journal_error(path: Path, error: OSError) -> OutputError | DiskSpaceError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DiskSpaceError(
            f"{path}: the disk is full, so what is done cannot be recorded; free some space, then "
            "continue with --resume"
        )
    return OutputError(f"{path}: the journal of the merge failed: {error.strerror}")
