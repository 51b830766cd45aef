"""The directory of an unfinished merge as one of several processes has it that do a part each.

All of them share the lock of ``OUT.partial``, so that no merge begins there anew while one lives; the first
one, which has it alone, writes the journal that says what the merge is. Each keeps a journal of its own.
Which lock a process still has, on a machine that nobody reaches, cannot be relied on: before it touches
a file that it has opened, it asks whether the merge is still of the epoch that it began in.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from streammerge.checkpoint.attempts import (
    Attempt,
    check_epoch,
    choose,
    claim_snapshot,
    describe_process,
    draw_token,
    epoch_of,
    journal_path,
    parts_done,
    parts_of,
    read_attempts,
    snapshot_name,
)
from streammerge.checkpoint.journal import (
    JOURNAL_NAME,
    Divided,
    Entry,
    Found,
    Journal,
    PartDone,
    iter_records,
    read_journal,
)
from streammerge.checkpoint.locking import FileLock
from streammerge.checkpoint.outputdir import check_same, clear, has_work
from streammerge.checkpoint.permitting import (
    absolute,
    allocated,
    busy,
    check_existing,
    check_foreign,
    check_inputs,
    check_partial_contents,
    check_replaced,
    check_room,
    differences,
)
from streammerge.checkpoint.places import MARKER_NAME, choose_place, undo_moves
from streammerge.checkpoint.recorded import Recorded
from streammerge.checkpoint.snapshot import SNAPSHOT_NAME
from streammerge.errors import BusyError, OutputError, OutputExistsError, ResumeError

_JOIN_SECONDS = 20.0
"""How long to wait while another process has the directory alone: it begins a merge, or ends one."""
_RETRY_SECONDS = 0.1
_SEEN_SECONDS = 60.0
"""How long a merge that another machine has begun may take to be seen."""


class PartDirectory:
    """Takes part in building ``OUT``, as a context manager; somebody publishes it when all is done."""

    def __init__(
        self,
        out: Path,
        *,
        part: int,
        parts: int,
        inputs: Sequence[Path],
        nbytes: int,
        nbytes_beside: int,
        names: Sequence[str],
        identity: Mapping[str, Any],
        overwrite: bool,
        resume: bool,
        wanted: frozenset[int],
        numel: int,
        check: Callable[[Entry], None],
        epoch: str | None = None,
    ) -> None:
        """Say what is to be done; nothing is touched yet.

        Args:
            out: As for :class:`~streammerge.checkpoint.outputdir.OutputDirectory`.
            part: Which part, from 1; 0 for the process that has others do them.
            parts: Of how many.
            inputs: As there.
            nbytes: As there.
            nbytes_beside: As there.
            names: As there.
            identity: As there.
            overwrite: Whether an earlier merge in ``out`` may be replaced, and an unfinished one of
                something else that nobody works on.
            resume: Whether what a merge by one process has left is to be continued in parts. What
                parts of this very merge have left always is.
            wanted: The tensors of the part, by index.
            numel: Their elements.
            check: Raises if an entry of a journal cannot be about this merge.
            epoch: That of the merge that another process has begun there; None to begin one where there
                is none.

        Raises:
            OutputExistsError: Something is there, or would be destroyed.
            DiskSpaceError: The disk has too little room.
            OutputError: The parent directory is missing or not writable, or this system has no locks
                that processes share.
        """
        if os.name == "nt":
            raise OutputError(
                f"{out}: parts need locks that processes share, which Windows has not; merge without --part"
            )
        self.out = absolute(out)
        self.part, self.parts = part, parts
        self._check = check
        self.recorded = Recorded(check)
        self.epoch = ""
        self._place = choose_place(self.out)
        self.partial = self._place.partial
        self._names = frozenset(names)
        self._identity = dict(identity)
        self._overwrite, self._resume = overwrite, resume
        self._wanted, self._numel = wanted, numel
        self._expected = epoch
        self._token = draw_token()
        self._others: list[str] = []
        self._marker: FileLock | None = None
        self._journal: Journal | None = None
        self._journal_lock: FileLock | None = None
        check_inputs(self.out, self.partial, inputs)
        check_room(self.partial.parent, nbytes, nbytes_beside, allocated(self.partial))

    @property
    def overwrite(self) -> bool:
        """Whether an earlier merge in ``out`` may be replaced."""
        return self._overwrite

    @property
    def attempt(self) -> str:
        """What tells this process from others at the same part."""
        return self._token

    @property
    def journal(self) -> Journal:
        """Where this attempt records what is done."""
        if self._journal is None:
            raise RuntimeError("the output directory is not open")
        return self._journal

    def __enter__(self) -> Self:
        try:
            self._join()
            self._begin_attempt()
        except OSError as error:
            self._leave()
            raise OutputError(f"{self.partial}: cannot be made: {error.strerror}") from error
        except BaseException:
            self._leave()
            raise
        return self

    def _join(self) -> None:
        """Share the lock of a directory in which this very merge has begun, in as many parts."""
        self._await_merge()
        deadline = time.monotonic() + _JOIN_SECONDS
        while True:
            with contextlib.suppress(FileNotFoundError):
                # It may be renamed at any moment: then the merge is complete.
                if self._try_to_join():
                    return
            if time.monotonic() > deadline:
                raise busy(self.partial, self._others)
            time.sleep(_RETRY_SECONDS)

    def _await_merge(self) -> None:
        """Wait until the merge that another process has begun is seen here, too.

        Clients of network file systems may not look at a directory again for half a minute.
        """
        if self._expected is None:
            return
        deadline = time.monotonic() + _SEEN_SECONDS
        while True:
            try:
                check_epoch(self.partial, self._expected)
            except OutputError as error:
                if time.monotonic() > deadline:
                    raise OutputError(
                        f"{self.partial}: this process ({socket.gethostname()}) does not see the merge that is "
                        "begun there; all need the same files under the same paths, or the merge was given up"
                    ) from error
            else:
                return
            time.sleep(_RETRY_SECONDS)

    def _try_to_join(self) -> bool:
        if not self._place.is_half_moved():
            check_existing(self._place, overwrite=self._overwrite or self._may_replace())
        with contextlib.suppress(FileExistsError):
            self.partial.mkdir()
        marker_path = self.partial / MARKER_NAME
        check_partial_contents(self.partial)
        marker: FileLock | None = FileLock(marker_path)
        assert marker is not None  # noqa: S101 - it becomes None where it is kept
        try:
            alone = marker.acquire()
            if not marker.known:
                raise OutputError(
                    f"{self.partial}: the file system knows no locks, by which processes see each other; "
                    "mount it with them, or merge without --part"
                )
            if alone and marker.still_at(marker_path) and self._expected is None:
                self._settle()
            if marker.acquire(shared=True) and marker.still_at(marker_path) and self._finds_merge():
                self._marker, marker = marker, None
                return True
        finally:
            if marker is not None:
                marker.close()
        return False

    def _may_replace(self) -> bool:
        """Return whether the merge that is under way was allowed to replace an earlier one."""
        found = read_journal(self.partial / JOURNAL_NAME)
        return (
            found is not None
            and bool(found.identity.get("overwrite"))
            and not any(differences(found.identity, self._identity))
        )

    def _settle(self) -> None:
        """Bring the directory, which nobody else has, into the state in which parts can be done."""
        if self._place.is_half_moved():
            undo_moves(self._place)
            check_existing(self._place, overwrite=self._overwrite or self._may_replace())
        path = self.partial / JOURNAL_NAME
        found = read_journal(path)
        continues = found is not None and self._continues(found)
        check_replaced(self._place, overwrite=self._overwrite, continues=continues)
        if found is not None and continues:
            if _parts_in(path) is None:
                self._record(Journal(path, keep_nbytes=found.nbytes))
            return
        clear(self.partial)
        journal = Journal(path)
        journal.begin({**self._identity, "overwrite": self._overwrite, "epoch": draw_token()})
        self._record(journal)

    def _record(self, journal: Journal) -> None:
        journal.append([Divided(self.parts)])
        journal.sync()
        journal.close()

    def _continues(self, found: Found) -> bool:
        """Return whether an unfinished merge that nobody works on is to be continued."""
        path = self.partial / JOURNAL_NAME
        same = not any(differences(found.identity, self._identity))
        parts = _parts_in(path) if same else None
        if same and parts == self.parts:
            return True
        if self._overwrite or not has_work(self.partial, found):
            return False
        check_same(self.partial, found.identity, self._identity)
        if parts is not None:
            raise self._other_division(parts)
        if not self._resume:
            raise OutputExistsError(
                f"{self.partial}: holds an unfinished merge; give --resume to continue it, or "
                "--overwrite to start anew"
            )
        return True

    def _finds_merge(self) -> bool:
        """Return whether this very merge, in as many parts, has begun in the directory.

        Raises:
            ResumeError: Another one has, in which others take part now.
        """
        path = self.partial / JOURNAL_NAME
        found = read_journal(path)
        if found is None:
            return False
        if self._overwrite and any(differences(found.identity, self._identity)):
            # Others work on that now; parts whose driver was ended are about to stop.
            epoch = epoch_of(found.identity, path)
            attempts = read_attempts(self.partial, epoch)
            self._others = [str(attempt) for attempt in attempts if attempt.is_alive()]
            return False
        check_same(self.partial, found.identity, self._identity)
        parts = _parts_in(path)
        if parts is None:
            return False
        if parts != self.parts:
            raise self._other_division(parts)
        check_foreign(self.partial, self._names)
        self.epoch = epoch_of(found.identity, path)
        if self._expected is not None:
            check_epoch(self.partial, self._expected)
        self._overwrite = self._overwrite or bool(found.identity.get("overwrite"))
        self.recorded = Recorded(self._check)
        # Statistics of any part serve all; so do pieces of this one alone, and what was done before.
        for attempt in choose(self.read_attempts()):
            self.recorded.add(attempt.path, self._wants, pieces=attempt.part == self.part)
        self.recorded.add(path, self._wants)
        return True

    def _wants(self, entry: Entry) -> bool:
        return entry.task in self._wanted or entry.task < 0

    def _other_division(self, parts: int) -> ResumeError:
        return ResumeError(
            f"{self.partial}: this merge is done there in {parts} parts, and {self.parts} are asked for; "
            f"give --part K/{parts}, or finish it with --resume and without --part, or give --overwrite to "
            "start anew"
        )

    def _begin_attempt(self) -> None:
        path = journal_path(self.partial, self.epoch, self.part, self.parts, self._token)
        self._journal = Journal(path)
        self._journal.begin(describe_process(self.part, self.parts, self._numel))
        self._journal_lock = FileLock(path)
        # Who asks whether this process lives has the lock for a moment.
        while not self._journal_lock.acquire():
            time.sleep(_RETRY_SECONDS)

    def read_attempts(self) -> list[Attempt]:
        """Return all attempts at parts of this merge, as they are now."""
        return read_attempts(self.partial, self.epoch)

    def is_done(self) -> bool:
        """Return whether an attempt has done all of this part."""
        return self.part in parts_done(self.read_attempts(), self.parts)

    def check_current(self) -> None:
        """Return if this merge is still the one that is done here.

        Raises:
            OutputError: It is not.
        """
        check_epoch(self.partial, self.epoch)

    def take_snapshot(self) -> Path:
        """Return where this attempt saves a sweep over the model; the last one saved is there, if any was."""
        own = self.partial / snapshot_name(self.epoch, self._token)
        claim_snapshot(self.partial, self.epoch, own)
        return own

    def finish(self, done: PartDone) -> None:
        """Record, durably, that all of the part is done.

        Raises:
            OutputError: The system refuses, or another merge has begun here.
        """
        self.check_current()
        self.journal.append([done])
        self.journal.sync()

    def discard(self) -> None:
        """Forget what is done of this part, which turned out to be of no use."""
        for attempt in self.read_attempts():
            if attempt.part == self.part:
                attempt.path.unlink(missing_ok=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()
        if error is not None and self.partial.exists() and not isinstance(error, BusyError):
            what = f" with part {self.part}/{self.parts}" if self.part else ""
            error.add_note(f"{self.partial} keeps what is done; the same command goes on{what}")

    def _leave(self) -> None:
        """Let go of the directory; remove it if nobody else is there and it holds nothing of worth."""
        if self._journal is not None:
            with contextlib.suppress(OutputError):
                self._journal.sync()
            self._journal.close()
            self._journal = None
        if self._marker is not None:
            with contextlib.suppress(OSError, OutputError):
                self._remove_if_empty(self._marker)
        for lock in (self._journal_lock, self._marker):
            if lock is not None:
                lock.close()
        self._journal_lock = self._marker = None

    def _remove_if_empty(self, marker: FileLock) -> None:
        if not marker.acquire() or not marker.still_at(self.partial / MARKER_NAME):
            return
        found = read_journal(self.partial / JOURNAL_NAME)
        if found is None or found.identity.get("epoch") != self.epoch or found.lines > 1:
            return
        if any(attempt.lines for attempt in read_attempts(self.partial, self.epoch, count=True)):
            return
        if not any(self.partial.glob(f"{SNAPSHOT_NAME}*")):
            shutil.rmtree(self.partial, ignore_errors=True)


def _parts_in(journal: Path) -> int | None:
    """Return in how many parts a merge is done, as its journal says."""
    return parts_of(record for _, record in iter_records(journal, pieces=False))


def recorded_parts(out: Path, identity: Mapping[str, Any]) -> int | None:
    """Return in how many parts this very merge is being done; None if it is not, or not in parts.

    Args:
        out: The output.
        identity: What must not differ.

    Raises:
        OutputError: What lies there cannot be read.
    """
    path = choose_place(absolute(out)).partial / JOURNAL_NAME
    found = read_journal(path)
    if found is None or any(differences(found.identity, identity)):
        return None
    return _parts_in(path)
