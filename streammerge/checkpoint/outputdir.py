"""The output directory: built under another name, and put in place when it is complete.

Work happens in ``OUT.partial``; :mod:`streammerge.checkpoint.places` knows where that lies. Nothing is
ever called ``OUT`` before it is whole, and what was there before stays until then. That holds too where
``OUT.safetensors`` is one file, with its manifest and recipe beside it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from streammerge.checkpoint.attempts import (
    Attempt,
    check_epoch,
    choose,
    claim_snapshot,
    draw_token,
    epoch_of,
    parts_done,
    parts_of,
    read_attempts,
    snapshot_name,
)
from streammerge.checkpoint.folders import is_folder, iter_empty_folders
from streammerge.checkpoint.journal import (
    JOURNAL_NAME,
    Entry,
    Found,
    Journal,
    iter_records,
    read_journal,
)
from streammerge.checkpoint.locking import FileLock
from streammerge.checkpoint.permitting import (
    absolute,
    allocated,
    busy,
    check_existing,
    check_foreign,
    check_inputs,
    check_partial,
    check_partial_contents,
    check_replaced,
    check_room,
    differences,
)
from streammerge.checkpoint.places import (
    MARKER_NAME,
    choose_place,
    clear_away,
    is_own,
    put_in_place,
    undo_moves,
)
from streammerge.checkpoint.recorded import Recorded
from streammerge.checkpoint.snapshot import SNAPSHOT_NAME
from streammerge.errors import OutputError, OutputExistsError, ResumeError


class OutputDirectory:
    """Builds ``OUT`` as a context manager: complete after :meth:`publish`.

    Without it, what was done stays in ``OUT.partial`` for a later run, if its journal can tell what
    that is; else the directory is gone.
    """

    def __init__(
        self,
        out: Path,
        *,
        inputs: Sequence[Path],
        nbytes: int,
        nbytes_beside: int,
        names: Sequence[str],
        identity: Mapping[str, Any],
        overwrite: bool,
        resume: bool,
        check: Callable[[Entry], None] | None = None,
    ) -> None:
        """Check that the output may be written, before anything is.

        Args:
            out: The directory to make; the one file, if it is called ``.safetensors``.
            inputs: Paths of the models being merged.
            nbytes: Bytes of all shards.
            nbytes_beside: Most bytes of all that comes beside them.
            names: Every file that the merge will write, relative to ``OUT.partial``.
            identity: What must not differ for a merge to go on where another one stopped, as JSON.
            overwrite: Whether an earlier merge in ``out``, or an unfinished one, may be replaced.
            resume: Whether an unfinished merge is to be continued, if there is one.
            check: Raises if an entry of a journal cannot be about this merge.

        Raises:
            OutputExistsError: Something is there, or would be destroyed.
            ResumeError: The unfinished merge is another one.
            DiskSpaceError: The disk has too little room.
            OutputError: The parent directory is missing or not writable.
        """
        self.out = absolute(out)
        self._place = choose_place(self.out)
        self.partial = self._place.partial
        self.recorded = Recorded(check)
        self.attempts: tuple[Attempt, ...] = ()
        self.epoch = draw_token()
        self._names = frozenset(names)
        self._identity = dict(identity)
        self._published = False
        self._continues = False
        self._lock: FileLock | None = None
        self._journal: Journal | None = None
        check_inputs(self.out, self.partial, inputs)
        check_partial(self.partial)
        self._found = self._find_unfinished(overwrite=overwrite, resume=resume)
        self._overwrite = overwrite or (
            self._found is not None and bool(self._found.identity.get("overwrite"))
        )
        # What is half moved is put back first, once nobody else can move it.
        if not (self._place.is_half_moved() and (resume or overwrite)):
            check_existing(self._place, overwrite=self._overwrite)
            check_replaced(
                self._place, overwrite=self._overwrite, continues=self._found is not None
            )
        check_room(self.partial.parent, nbytes, nbytes_beside, allocated(self.partial))

    def _find_unfinished(self, *, overwrite: bool, resume: bool) -> Found | None:
        """Return the unfinished merge that is to be continued, if there is one."""
        if overwrite:
            return None
        journal = self.partial / JOURNAL_NAME
        found = read_journal(journal)
        if found is None:
            return None
        if not resume:
            if not has_work(self.partial, found):
                return None
            raise OutputExistsError(
                f"{self.partial}: holds an unfinished merge; give --resume to continue it, or "
                "--overwrite to start anew"
            )
        check_same(self.partial, found.identity, self._identity)
        check_foreign(self.partial, self._names)
        return found

    @property
    def continues(self) -> bool:
        """Whether files of an interrupted run may be there."""
        return self._continues

    @property
    def journal(self) -> Journal:
        """Where to record what is done."""
        if self._journal is None:
            raise RuntimeError("the output directory is not open")
        return self._journal

    def __enter__(self) -> Self:
        try:
            self._take()
            self._prepare()
        except OSError as error:
            self._leave()
            raise OutputError(f"{self.partial}: cannot be made: {error.strerror}") from error
        except BaseException:
            self._leave()
            raise
        return self

    def _take(self) -> None:
        """Make the directory where it is missing, and lock it."""
        with contextlib.suppress(FileExistsError):
            self.partial.mkdir()
        check_partial_contents(self.partial)
        lock = FileLock(self.partial / MARKER_NAME)
        if not lock.acquire() or not lock.still_at(self.partial / MARKER_NAME):
            lock.close()
            raise busy(self.partial)
        self._lock = lock

    def _prepare(self) -> None:
        """Bring the directory into the state in which work can begin or go on."""
        if self._place.is_half_moved():
            undo_moves(self._place)
            check_existing(self._place, overwrite=self._overwrite)
        journal = self.partial / JOURNAL_NAME
        # Asked again: until it was locked, another merge may have worked here.
        if self._found is not None and self._found == read_journal(journal):
            self._journal = Journal(journal, keep_nbytes=self._found.nbytes)
            self.epoch = epoch_of(self._found.identity, journal)
            self.attempts = tuple(read_attempts(self.partial, self.epoch))
            parts = parts_of(record for _, record in iter_records(journal, pieces=False))
            if parts is None or len(parts_done(self.attempts, parts)) < parts:
                self.recorded.add(journal)
            # Else they have all of it, each cut in one way.
            for attempt in choose(self.attempts):
                self.recorded.add(attempt.path)
            self._continues = True
            return
        clear(self.partial)
        self._journal = Journal(journal)
        self._journal.begin({**self._identity, "overwrite": self._overwrite, "epoch": self.epoch})

    def take_snapshot(self) -> Path:
        """Return where to save a sweep over the model; what one was saved last is there, if any was.

        Raises:
            OutputError: The system refuses.
        """
        own = self.partial / snapshot_name(self.epoch)
        claim_snapshot(self.partial, self.epoch, own)
        return own

    def publish(self) -> None:
        """Give the directory its final name; the last act of a merge.

        Raises:
            OutputExistsError: Something came to lie there since the merge began.
            OutputError: The system refuses to rename; what was there before is there again.
        """
        check_existing(self._place, overwrite=self._overwrite)
        check_foreign(self.partial, self._names)
        check_epoch(self.partial, self.epoch)
        replaces = os.path.lexists(self._place.replaced) or self.out.exists()
        if not self._place.moves:
            # Some systems do not rename the directories of open files.
            self._unlock()
        # No merge has made these; what cannot be removed does no harm.
        for folder in iter_empty_folders(self.partial):
            with contextlib.suppress(OSError):
                folder.rmdir()
        try:
            put_in_place(self._place)
        except OSError as error:
            where = error.filename or self.out
            raise OutputError(f"{where}: cannot be put in place: {error.strerror}") from error
        self._published = True
        self._unlock()
        clear_away(self._place, replaced=replaces)

    def discard(self) -> None:
        """Forget what is done, which turned out to be of no use: no later run goes on from it."""
        self._close_journal()
        self._continues = False
        for path in self.partial.iterdir():
            if is_own(path.name) and path.name != MARKER_NAME:
                path.unlink(missing_ok=True)

    def _unlock(self) -> None:
        self._close_journal()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _close_journal(self) -> None:
        if self._journal is not None:
            with contextlib.suppress(OutputError):
                self._journal.sync()
            self._journal.close()
            self._journal = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Who was allowed to replace an earlier merge, and is interrupted, is still allowed to.
        interrupted = kind is not None and not issubclass(kind, Exception)
        self._leave(keep=self._overwrite and interrupted)
        if error is not None and not self._published and self.partial.exists():
            error.add_note(f"{self.partial} keeps what is done; --resume continues there")

    def _leave(self, *, keep: bool = False) -> None:
        """Let go of the directory; remove it if it is ours, new, and holds nothing of worth."""
        mine = self._lock is not None
        self._unlock()
        if mine and not (self._published or keep or self._continues or self.resumable):
            shutil.rmtree(self.partial, ignore_errors=True)

    @property
    def resumable(self) -> bool:
        """Whether ``OUT.partial`` holds work that a later run can go on from."""
        try:
            found = read_journal(self.partial / JOURNAL_NAME)
        except OutputError:
            # It is there and cannot be read now: better kept than lost.
            return True
        return found is not None and has_work(self.partial, found)


def has_work(partial: Path, found: Found) -> bool:
    """Return whether the journal of a merge, or what lies beside it, spares a later run some work."""
    return bool(found.lines) or any(
        path.name.startswith(SNAPSHOT_NAME) and not path.name.endswith(".new")
        for path in partial.iterdir()
    )


def check_same(partial: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Return if the identity of the merge in a directory is that of this merge.

    Raises:
        ResumeError: It is not; says in what.
    """
    different = list(differences(before, now))
    if different:
        raise ResumeError(
            f"{partial}: the unfinished merge is another one: {'; '.join(different)}; make it as it "
            "was, or give --overwrite to start anew"
        )


def clear(directory: Path) -> None:
    """Remove everything but the lock from a directory."""
    for path in directory.iterdir():
        if path.name == MARKER_NAME:
            continue
        if is_folder(path):
            shutil.rmtree(path)
        else:
            path.unlink()
