"""The journal of a merge in the store that its result goes to, so that any machine can go on with it.

    .streammerge-journal/head              its first line: what is merged
    .streammerge-journal/uploads           which objects were begun, by which uploads
    .streammerge-journal/000012-5a0c91d2   the lines that came since the last such object
    .streammerge-journal/statistics        a sweep over the model under way, as it was saved last

All are marked by the token of the merge, and what they hold has checksums. What is damaged, missing or of
another merge is passed over, and made again; without a head nothing of it is used. Whatever a line claims is
in the store before the line is.

They come in rounds of one or two requests each, and a third where a sweep was saved. Between two rounds lie
:data:`_LEAST_PAUSE_SECONDS`, or :data:`_SHARE` of the time so far where that is more: some 230 rounds in the
first hour, and 35 each time that it doubles. That much, at most, is done again after a kill.

Memory: :data:`_LINES_BYTES` and a line, as much for each of :data:`_AT_ONCE` objects that are brought, and
the lines that are brought.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.checkpoint.attempts import draw_token, epoch_of, snapshot_name
from streammerge.checkpoint.bytesource import RemoteSource
from streammerge.checkpoint.journal import (
    JOURNAL_NAME,
    PieceDone,
    parse_head,
    parse_line,
    whole_lines,
)
from streammerge.checkpoint.outputfile import write_durably
from streammerge.checkpoint.ownfiles import open_own
from streammerge.checkpoint.places import MARKER_NAME, UPLOADS_NAME
from streammerge.checkpoint.snapshot import SNAPSHOT_NAME
from streammerge.checkpoint.uploading import parse_uploads, write_uploads
from streammerge.errors import ResumeError
from streammerge.storage.objects import Listed
from streammerge.storage.targets import Target
from streammerge.units import MIB

_FOLDER = ".streammerge-journal"
HEAD_NAME = f"{_FOLDER}/head"
"""Where it is, a merge can be continued."""
_UPLOADS = f"{_FOLDER}/uploads"
_STATISTICS = f"{_FOLDER}/statistics"
_LINES = re.compile(rf"{re.escape(_FOLDER)}/(\d{{6,}})-[0-9a-f]{{16}}")
_LINES_BYTES = MIB
_AT_ONCE = 8
_LEAST_PAUSE_SECONDS = 2.0
_SHARE = 1 / 50


def is_journal(name: str) -> bool:
    """Return whether an object of a name is one of these."""
    return name in {HEAD_NAME, _UPLOADS, _STATISTICS} or _LINES.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Head:
    """What an unfinished merge in a store is."""

    token: str
    """Marks whatever is of it."""
    line: bytes
    """The first line of its journal."""
    identity: dict[str, Any]
    """What that says."""


def read_stored_head(target: Target, url: str) -> Head | None:
    """Return what an unfinished merge in a store is; None where there is none that could be continued.

    Raises:
        ResumeError: What says so is damaged.
    """
    found = target.get(HEAD_NAME)
    if found is None:
        return None
    lines = list(whole_lines(found.content))
    if found.token is None or len(lines) != 1:
        raise ResumeError(
            f"{url}/{HEAD_NAME}: is damaged, or the store keeps no metadata, so that nobody knows what was merged "
            "there; give --overwrite to start anew"
        )
    return Head(found.token, lines[0], parse_head(lines[0], where=f"{url}/{HEAD_NAME}"))


def bring_uploads(target: Target, head: Head, partial: Path, own: dict[str, str]) -> None:
    """Write down on this machine what a merge has begun in the store.

    Args:
        target: The store.
        head: The merge.
        partial: Where it grows here.
        own: What is known here of it.
    """
    found = target.get(_UPLOADS)
    said = None if found is None or found.token != head.token else parse_uploads(found.content)
    uploads = own if said is None or said[0] != head.token else {**own, **said[1]}
    partial.mkdir(parents=True, exist_ok=True)
    (partial / MARKER_NAME).touch()
    write_durably(partial / UPLOADS_NAME, [write_uploads(head.token, uploads)])


class StoredJournal:
    """Keeps what lies in the store up with the journal on this machine; for one thread."""

    def __init__(self, target: Target, partial: Path, token: str) -> None:
        """Begin with nothing.

        Args:
            target: The store.
            partial: Where the journal is.
            token: Marks what is of this merge.
        """
        self._target = target
        self._partial = partial
        self._token = token
        self._attempt = draw_token()
        self._number = 0
        self._at = 0
        """Bytes of the journal that are in the store."""
        self._files: dict[str, tuple[int, int]] = {}
        """Which versions of files are there, by the names of their objects."""
        self.brought = False
        """Whether what lies there is this merge's."""
        self._began = time.monotonic()
        self._next = self._began + _LEAST_PAUSE_SECONDS

    def bring(self, head: Head, keeps: Callable[[PieceDone], bool]) -> None:
        """Put the journal on this machine together of what is in the store and what is here.

        Args:
            head: The merge that is there, which is this one.
            keeps: Whether the store has what a line claims that is not known here.
        """
        self.brought = True
        there = {each.name: each for each in self._target.list() if is_journal(each.name)}
        path = self._partial / JOURNAL_NAME
        own = list(whole_lines(path.read_bytes())) if path.is_file() else []
        known = set(own)
        brought = [
            line
            for line in self._read_lines([name for name in there if _LINES.fullmatch(name)])
            if line in known or _is_kept(line, keeps)
        ]
        stored = [head.line, *(line for line in brought if line != head.line)]
        written = set(stored)
        stored_data = b"".join(line + b"\n" for line in stored)
        left = (line + b"\n" for line in own if line not in written)
        write_durably(path, [stored_data, *left])
        self._at = len(stored_data)
        self._number = 1 + max((int(m[1]) for m in map(_LINES.fullmatch, there) if m), default=-1)
        if _STATISTICS in there and not any(self._partial.glob(f"{SNAPSHOT_NAME}*")):
            self._bring_statistics(there[_STATISTICS], epoch_of(head.identity, path))

    def _read_lines(self, names: Sequence[str]) -> list[bytes]:
        """Return the whole lines of some objects, each once."""
        lines: dict[bytes, None] = {}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for found in pool.map(self._target.get, sorted(names, key=_in_order)):
                if found is not None and found.token == self._token:
                    lines.update(dict.fromkeys(whole_lines(found.content)))
        return list(lines)

    def _bring_statistics(self, listed: Listed, epoch: str) -> None:
        if self._target.token_of(_STATISTICS) != self._token:
            return
        source = RemoteSource(listed.object)
        nbytes = listed.object.nbytes
        buffer = memoryview(bytearray(min(_LINES_BYTES, nbytes)))

        def read(offset: int) -> bytes:
            part = buffer[: nbytes - offset]
            source.read_into(offset, part)
            return bytes(part)

        path = self._partial / snapshot_name(epoch)
        write_durably(path, (read(offset) for offset in range(0, nbytes, _LINES_BYTES)))
        self._files[_STATISTICS] = _version_of(path)

    def keep_up(self) -> None:
        """Store what has come to the journal, if the last time is long enough ago.

        Raises:
            CheckpointError: The store refuses.
        """
        if time.monotonic() < self._next:
            return
        self.save()
        now = time.monotonic()
        self._next = now + max(_LEAST_PAUSE_SECONDS, (now - self._began) * _SHARE)

    def save(self, *, whatever: bool = False) -> None:
        """Store what has come to the journal.

        Args:
            whatever: Whether even that which spares a resume no work.

        Raises:
            CheckpointError: The store refuses.
        """
        sweeps = [each for each in self._partial.glob(f"{SNAPSHOT_NAME}*") if each.suffix != ".new"]
        with os.fdopen(open_own(self._partial / JOURNAL_NAME, os.O_RDONLY), "rb") as stream:
            # What comes while this stores may claim parts of uploads that it does not know.
            end = os.fstat(stream.fileno()).st_size
            if self._at == 0:
                line = stream.readline()
                if end == len(line) and not sweeps and not whatever:
                    return
                self._target.put(HEAD_NAME, line, token=self._token)
                self._at = len(line)
            self._store_file(_UPLOADS, self._partial / UPLOADS_NAME)
            while self._at < end:
                stream.seek(self._at)
                data = stream.read(min(_LINES_BYTES, end - self._at)) + stream.readline()
                data = data[: data.rfind(b"\n") + 1]
                if not data:
                    break
                name = f"{_FOLDER}/{self._number:06d}-{self._attempt}"
                self._target.put(name, data, token=self._token)
                self._number += 1
                self._at += len(data)
        for path in sweeps:
            self._store_file(_STATISTICS, path)

    def _store_file(self, name: str, path: Path) -> None:
        """Store a file in place of its last version, if it has another one."""
        try:
            version = _version_of(path)
            if self._files.get(name) != version:
                self._target.put_file(name, path, self._token)
                self._files[name] = version
        except FileNotFoundError:
            # None was begun, or its sweep has ended meanwhile.
            return


def _in_order(name: str) -> tuple[int, str]:
    """Return what names of objects with lines are sorted by: longer numbers are larger."""
    return len(name), name


def count_pieces(target: Target, names: Iterable[str]) -> int:
    """Return how many pieces of tensors a journal in a store says are there, each counted once."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(target.get, filter(_LINES.fullmatch, names)))
    lines = {line for each in found if each is not None for line in whole_lines(each.content)}
    return sum(isinstance(parse_line(line), PieceDone) for line in lines)


def remove_journal(target: Target) -> None:
    """Remove from a store whatever is of a journal, its head last."""
    there = {each.name for each in target.list() if is_journal(each.name)}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(target.delete, sorted(there - {HEAD_NAME})))
    if HEAD_NAME in there:
        target.delete(HEAD_NAME)


def _is_kept(line: bytes, keeps: Callable[[PieceDone], bool]) -> bool:
    record = parse_line(line)
    return not isinstance(record, PieceDone) or keeps(record)


def _version_of(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
