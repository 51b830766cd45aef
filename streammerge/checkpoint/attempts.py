"""Attempts at the parts of a merge: each is a process with a journal of its own beside the merge's.

    .streammerge-journal                                    the merge: what it is, and its epoch
    .streammerge-journal-<epoch>-<part>of<parts>-<attempt>  one attempt at one part
    .streammerge-statistics-<epoch>[-<attempt>]             a sweep over the model, saved now and then

An epoch is drawn when a merge begins anew. A process that was given up may live on, on a machine that
nobody hears of; whatever it still leaves has the epoch that it began in, which nobody looks for any more.

Memory: what all attempts said but for pieces of tensors, which are read one by one.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.checkpoint.journal import (
    JOURNAL_NAME,
    Divided,
    PartDone,
    PieceDone,
    Record,
    iter_records,
    read_head,
)
from streammerge.checkpoint.locking import FileLock
from streammerge.checkpoint.snapshot import SNAPSHOT_NAME
from streammerge.errors import OutputError, ResumeError, printable

_TOKEN = re.compile(r"[0-9a-f]{16}")
_NAME = re.compile(
    rf"{re.escape(JOURNAL_NAME)}-(?P<epoch>[0-9a-f]{{16}})-(?P<part>\d+)of(?P<parts>\d+)-[0-9a-f]{{16}}"
)
NO_EPOCH = "0" * 16
"""Of journals of versions that drew none."""


def draw_token() -> str:
    """Return what no other process draws: 64 random bits, in hex."""
    return os.urandom(8).hex()


def epoch_of(identity: Mapping[str, Any], path: Path) -> str:
    """Return the epoch that the first line of a merge's journal states.

    Raises:
        ResumeError: It is none.
    """
    epoch = identity.get("epoch", NO_EPOCH)
    if not isinstance(epoch, str) or not _TOKEN.fullmatch(epoch):
        raise ResumeError(f"{path}: its epoch cannot be {epoch!r}; give --overwrite to start anew")
    return epoch


def check_epoch(partial: Path, epoch: str) -> None:
    """Return if the merge in a directory is still the one that began there in some epoch.

    Raises:
        OutputError: Another one has begun, or it is gone.
    """
    head = read_head(partial / JOURNAL_NAME)
    if head is None or head.get("epoch", NO_EPOCH) != epoch:
        raise OutputError(
            f"{partial}: the merge that this process works on was given up, and "
            f"{'is gone' if head is None else 'another one has begun there'}; nothing is left to do"
        )


def snapshot_name(epoch: str, attempt: str | None = None) -> str:
    """Return what a saved sweep is called: the merge's own, or that of an attempt at a part."""
    return "-".join(filter(None, (SNAPSHOT_NAME, epoch, attempt)))


def sweep_name(epoch: str, question: int, what: str = "") -> str:
    """Return what a sweep that several processes do together saves: its questions, or one's answers.

    Args:
        epoch: Of the merge.
        question: Which sweep, from 1.
        what: Whose answers, as ``"2of4"``; nothing for the questions.
    """
    return "-".join(filter(None, (SNAPSHOT_NAME, f"q{epoch}", str(question), what)))


def claim_snapshot(partial: Path, epoch: str, own: Path) -> None:
    """Make the sweep that was saved last in an epoch, by whomever, that of one process.

    Who saved it may still work, and then saves the next one under its own name again.
    """
    # Another process may claim one meanwhile; it has it then.
    with contextlib.suppress(FileNotFoundError):
        saved = [
            (path.stat().st_mtime_ns, path)
            for path in partial.glob(f"{snapshot_name(epoch)}*")
            if not path.name.endswith(".new")
        ]
        if saved and max(saved)[1] != own:
            max(saved)[1].replace(own)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One process's work on one part, as its journal tells."""

    path: Path
    """The journal."""
    part: int
    """Which part, from 1; 0 for the process that has others do them."""
    parts: int
    """Of how many."""
    host: str
    """Where it ran."""
    pid: int
    """Its process there."""
    numel: int
    """Elements of all tensors of the part."""
    lines: int
    """Whole lines of its journal after the first; 0 where nobody counted."""
    records: tuple[Record, ...]
    """What it did, but for pieces of tensors."""
    done_numel: int
    """Elements of these; 0 where nobody counted."""

    def __str__(self) -> str:
        return f"part {self.part}/{self.parts}: process {self.pid} on {printable(self.host)}"

    @property
    def done(self) -> PartDone | None:
        """What the whole part took; None while it is not done."""
        return next((each for each in self.records if isinstance(each, PartDone)), None)

    def is_alive(self) -> bool:
        """Return whether its process holds its journal, where the file system knows locks."""
        return is_held(self.path)


def is_held(path: Path) -> bool:
    """Return whether a process has the lock of a file for itself; not of one that is gone."""
    if not path.exists():
        # To ask for the lock would make it.
        return False
    try:
        lock = FileLock(path)
    except (OSError, OutputError):
        return False
    try:
        return not lock.acquire(shared=True)
    finally:
        lock.close()


def is_attempt_of(name: str, epoch: str) -> bool:
    """Return whether a file of that name is the journal of an attempt in an epoch."""
    match = _NAME.fullmatch(name)
    return match is not None and match["epoch"] == epoch


def journal_path(partial: Path, epoch: str, part: int, parts: int, attempt: str) -> Path:
    """Return where an attempt at a part keeps its journal."""
    return partial / f"{JOURNAL_NAME}-{epoch}-{part}of{parts}-{attempt}"


def describe_process(part: int, parts: int, numel: int) -> dict[str, Any]:
    """Return the first line of the journal that this process keeps of its attempt at a part."""
    return {
        "part": part,
        "parts": parts,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "numel": numel,
    }


def read_attempts(partial: Path, epoch: str, *, count: bool = False) -> list[Attempt]:
    """Return all attempts at parts of the merge of an epoch, in the order of parts.

    Args:
        partial: Where the merge is done.
        epoch: Of it.
        count: Whether lines and elements are wanted, for which pieces of tensors are read: of a model
            of a terabyte their lines are hundreds of megabytes.

    Raises:
        ResumeError: One's journal holds what this version does not write.
        OutputError: The system refuses to read one.
    """
    found = []
    try:
        names = sorted(os.listdir(partial))  # noqa: PTH208 - names are all that is looked at
    except FileNotFoundError:
        return []
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None or match["epoch"] != epoch:
            continue
        path = partial / name
        part, parts = int(match["part"]), int(match["parts"])
        head = read_head(path)
        # Before its first line is whole, nothing else is.
        if head is None:
            continue
        said = [head.get(key) for key in ("part", "parts", "pid", "numel")]
        if any(type(each) is not int for each in said) or said[:2] != [part, parts]:
            raise ResumeError(
                f"{path}: line 1: is no attempt at part {part} of {parts}; give --overwrite to start anew"
            )
        _, _, pid, numel = said
        host = str(head.get("host"))
        records: list[Record] = []
        lines = done = 0
        for _, record in iter_records(path, pieces=count):
            lines += 1
            if isinstance(record, PieceDone):
                done += record.numel
            else:
                records.append(record)
        found.append(
            Attempt(path, part, parts, host, pid or 0, numel or 0, lines, tuple(records), done)
        )
    return sorted(found, key=lambda attempt: attempt.part)


def choose(attempts: Iterable[Attempt]) -> list[Attempt]:
    """Return the attempts whose journals tell together what is done.

    The journal of one that finished its part has all of it, cut in one way; those of others at that
    part, which may have cut it otherwise, are not looked at then.
    """
    by_part: dict[int, list[Attempt]] = {}
    for attempt in attempts:
        by_part.setdefault(attempt.part, []).append(attempt)
    chosen: list[Attempt] = []
    for own in by_part.values():
        finished = [attempt for attempt in own if attempt.done is not None]
        chosen += finished[:1] or own
    return chosen


def parts_of(records: Iterable[Record]) -> int | None:
    """Return in how many parts a merge is done, as its journal says last; None for no parts."""
    found = None
    for record in records:
        if isinstance(record, Divided):
            found = record.parts
    return found


def parts_done(attempts: Iterable[Attempt], parts: int) -> set[int]:
    """Return which of so many parts are done."""
    return {each.part for each in attempts if each.parts == parts and each.done is not None}
