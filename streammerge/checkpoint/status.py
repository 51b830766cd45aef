"""How far an output is: complete, or being made, by one process or by several in parts."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from streammerge.checkpoint.absent import results_in
from streammerge.checkpoint.attempts import Attempt, epoch_of, read_attempts
from streammerge.checkpoint.inputs import parse_path
from streammerge.checkpoint.journal import (
    JOURNAL_NAME,
    Divided,
    PieceDone,
    iter_records,
    read_journal,
)
from streammerge.checkpoint.locking import FileLock
from streammerge.checkpoint.permitting import absolute
from streammerge.checkpoint.places import MARKER_NAME, Place, choose_place
from streammerge.checkpoint.scratch import local_of, scratch_of
from streammerge.checkpoint.storedoutputs import has_result, look_at_stored
from streammerge.errors import OutputError, printable
from streammerge.storage.urls import url_of


@dataclass(frozen=True, slots=True)
class PartStatus:
    """How far one part of a merge is."""

    part: int
    """Which part, from 1."""
    state: str
    """``done``, ``running``, ``interrupted`` or ``not begun``."""
    done: float
    """What of it is safely on the disk, from 0 to 1."""
    attempts: int
    """Processes that have worked on it."""
    host: str
    """The machine of the one that finished it, or came furthest; empty before there is one."""
    pid: int
    """Its process there; 0 before there is one."""

    def __str__(self) -> str:
        where = f"process {self.pid} on {printable(self.host)}" if self.pid else ""
        return f"{self.part:>6}  {self.state:<12}{self.done:>5.0%}  {self.attempts:>8}  {where}".rstrip()


@dataclass(frozen=True, slots=True)
class Status:
    """How far an output is."""

    out: str
    """Its place."""
    complete: bool
    """Whether it is there; of an earlier merge, if another one is under way that is to replace it."""
    unfinished: bool
    """Whether a merge is under way, or was left before its end."""
    running: bool
    """Whether a process works on it now, as far as the file system knows locks."""
    pieces: int
    """Pieces of tensors that a merge by one process has safely on the disk, or in the store."""
    parts: tuple[PartStatus, ...]
    """Its parts in order; empty for a merge by one process."""

    def __str__(self) -> str:
        out = printable(self.out)
        if not self.unfinished:
            return f"{out}: is complete"
        if not self.parts:
            how = (
                "is being merged" if self.running else "an unfinished merge; --resume continues it"
            )
            where = "on the disk" if url_of(Path(self.out)) is None else "in the store"
            return f"{out}: {how}; pieces {where}: {self.pieces}"
        done = sum(part.state == "done" for part in self.parts)
        head = f"{out}: {done} of {len(self.parts)} parts are done"
        if done == len(self.parts):
            again = "any of them again, or --resume without --part, puts the output in place"
            head += "; being put in place" if self.running else f"; {again}"
        return "\n".join([head, "  part  state        done  attempts", *map(str, self.parts)])


def read_status(out: str | os.PathLike[str]) -> Status:
    """Return how far an output is; nothing is changed, and nobody is kept from working.

    Args:
        out: The directory, or the one file; or ``s3://bucket/folder``.

    Raises:
        OutputError: There is neither an output of this tool nor an unfinished one.
    """
    path = parse_path(out, "out")
    url = url_of(path)
    if url is not None:
        # Of parts only what they share tells.
        shared = _status_on_disk(choose_place(local_of(url, scratch_of(url))), url)
        if shared is not None and shared.parts:
            return replace(shared, complete=has_result(url))
        complete, unfinished, running, pieces = look_at_stored(url)
        return Status(url, complete, unfinished, running, pieces, parts=())
    status = _status_on_disk(choose_place(absolute(path)), str(out))
    if status is None:
        inside = results_in(absolute(path))
        held = f", but {len(inside)} in folders of it; name one, as {inside[0]}" if inside else ""
        raise OutputError(
            f"{out}: neither a merged model nor an unfinished merge of one is there{held}"
        )
    return status


def _status_on_disk(place: Place, out: str) -> Status | None:
    """Return how far an output is whose directory lies on a disk; None if nothing is there."""
    complete = place.form.manifest_path.is_file()
    journal = place.partial / JOURNAL_NAME
    found = read_journal(journal)
    if found is None or place.is_moved():
        if not complete:
            return None
        return Status(out, complete, unfinished=False, running=False, pieces=0, parts=())
    pieces, divided = 0, None
    for _, record in iter_records(journal):
        pieces += isinstance(record, PieceDone)
        divided = record if isinstance(record, Divided) else divided
    parts = 0 if divided is None else divided.parts
    attempts = read_attempts(place.partial, epoch_of(found.identity, journal), count=True)
    return Status(
        out,
        complete,
        unfinished=True,
        running=_is_held(place.partial / MARKER_NAME),
        pieces=pieces,
        parts=tuple(
            _part_status(
                part, [each for each in attempts if (each.part, each.parts) == (part, parts)]
            )
            for part in range(1, parts + 1)
        ),
    )


def _part_status(part: int, attempts: list[Attempt]) -> PartStatus:
    if not attempts:
        return PartStatus(part, "not begun", done=0.0, attempts=0, host="", pid=0)
    best = max(attempts, key=lambda each: (each.done is not None, each.done_numel))
    if best.done is not None:
        state, done = "done", 1.0
    else:
        state = "running" if any(each.is_alive() for each in attempts) else "interrupted"
        done = min(1.0, best.done_numel / max(best.numel, 1))
    return PartStatus(part, state, done, len(attempts), best.host, best.pid)


def _is_held(marker: Path) -> bool:
    try:
        lock = FileLock(marker)
    except (OSError, OutputError):
        return False
    try:
        # Alone, or with others in parts: a lock that cannot be had alone is held by somebody.
        return not lock.acquire()
    finally:
        lock.close()
