"""The output directory: built under another name, and put in place when it is complete.

Work happens in ``OUT.partial``; :mod:`streammerge.checkpoint.places` knows where that lies. Nothing is
ever called ``OUT`` before it is whole, and what was there before stays until then. That holds too where
``OUT.safetensors`` is one file, with its manifest and recipe beside it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from streammerge.checkpoint.folders import is_folder, iter_empty_folders, iter_names
from streammerge.checkpoint.journal import (
    JOURNAL_NAME,
    Entry,
    Found,
    Journal,
    parse_entries,
    read_journal,
)
from streammerge.checkpoint.locking import FileLock
from streammerge.checkpoint.manifest import read_manifest_files
from streammerge.checkpoint.outputform import OutputForm
from streammerge.checkpoint.ownfiles import NEW_NAME
from streammerge.checkpoint.places import (
    MARKER_NAME,
    OWN_FILES,
    Place,
    choose_place,
    clear_away,
    put_in_place,
    undo_moves,
)
from streammerge.checkpoint.snapshot import SNAPSHOT_NAME
from streammerge.errors import DiskSpaceError, OutputError, OutputExistsError, ResumeError
from streammerge.units import format_size

_LISTED = 5


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

        Raises:
            OutputExistsError: Something is there, or would be destroyed.
            ResumeError: The unfinished merge is another one.
            DiskSpaceError: The disk has too little room.
            OutputError: The parent directory is missing or not writable.
        """
        try:
            # resolve() would follow a link at OUT.
            self.out = Path(os.path.abspath(out))  # noqa: PTH100
        except FileNotFoundError as error:
            raise OutputError(
                f"{out}: is relative to the working directory, which has been removed; change to "
                "another one"
            ) from error
        if not self.out.name:
            raise OutputExistsError(
                f"{self.out}: is the root of the file system; choose a directory"
            )
        self._place = choose_place(self.out)
        self.partial = self._place.partial
        self.entries: tuple[Entry, ...] = ()
        self._found_entries: tuple[Entry, ...] = ()
        self._names = frozenset((*names, *OWN_FILES))
        self._identity = dict(identity)
        self._published = False
        self._continues = False
        self._lock: FileLock | None = None
        self._journal: Journal | None = None
        _check_inputs(self.out, self.partial, inputs)
        _check_partial(self.partial)
        self._found = self._find_unfinished(overwrite=overwrite, resume=resume)
        self._overwrite = overwrite or (
            self._found is not None and bool(self._found.identity.get("overwrite"))
        )
        # What is half moved is put back first, once nobody else can move it.
        if not (self._place.is_half_moved() and (resume or overwrite)):
            _check_existing(self._place, overwrite=self._overwrite)
            self._check_replaced()
        _check_room(self.partial.parent, nbytes, nbytes_beside, allocated(self.partial))

    def _find_unfinished(self, *, overwrite: bool, resume: bool) -> Found | None:
        """Return the unfinished merge that is to be continued, if there is one."""
        if overwrite:
            return None
        journal = self.partial / JOURNAL_NAME
        found = read_journal(journal)
        if found is None:
            return None
        if not resume:
            if not self._has_work(found):
                return None
            raise OutputExistsError(
                f"{self.partial}: holds an unfinished merge; give --resume to continue it, or "
                "--overwrite to start anew"
            )
        differences = list(_differences(found.identity, self._identity))
        if differences:
            raise ResumeError(
                f"{self.partial}: the unfinished merge is another one: {'; '.join(differences)}; "
                "make it as it was, or give --overwrite to start anew"
            )
        self._found_entries = parse_entries(found, journal)
        self._check_foreign()
        return found

    def _check_foreign(self) -> None:
        """Return if the unfinished merge holds nothing but what merges write."""
        foreign = sorted(
            name
            for name in iter_names(self.partial)
            if name not in self._names and name.rpartition("/")[2] != NEW_NAME
        )
        if foreign:
            raise ResumeError(
                f"{self.partial}: holds {len(foreign)} file(s) that the merge did not write "
                f"({', '.join(foreign[:_LISTED])}); move them away, then continue with --resume"
            )

    def _check_replaced(self) -> None:
        replaced = self._place.replaced
        if not os.path.lexists(replaced):
            return
        if self._found is not None and self._overwrite and not self.out.exists():
            # The merge stopped between setting the earlier one aside and taking its place.
            return
        if self._place.moves:
            raise OutputExistsError(
                f"{replaced}: holds the merge that a later one was about to replace; give "
                "--resume to finish that, or --overwrite to start anew"
            )
        if not self.out.exists():
            raise OutputExistsError(
                f"{replaced}: holds the merge that a later one was about to replace; rename "
                f"it to {self.out.name} to have it back, or remove it"
            )
        if self._overwrite:
            raise OutputExistsError(
                f"{replaced}: is in the way; the earlier merge steps aside under this name, "
                "rename or remove what is there"
            )

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
        _check_partial_contents(self.partial)
        lock = FileLock(self.partial / MARKER_NAME)
        if not lock.acquire() or not lock.still_at(self.partial / MARKER_NAME):
            lock.close()
            raise _busy(self.partial)
        self._lock = lock

    def _prepare(self) -> None:
        """Bring the directory into the state in which work can begin or go on."""
        if self._place.is_half_moved():
            undo_moves(self._place)
            _check_existing(self._place, overwrite=self._overwrite)
        journal = self.partial / JOURNAL_NAME
        # Asked again: until it was locked, another merge may have worked here.
        if self._found is not None and self._found == read_journal(journal):
            self._journal = Journal(journal, keep_nbytes=self._found.nbytes)
            self.entries = self._found_entries
            self._continues = True
            return
        _clear(self.partial)
        self._journal = Journal(journal)
        self._journal.begin({**self._identity, "overwrite": self._overwrite})

    def publish(self) -> None:
        """Give the directory its final name; the last act of a merge.

        Raises:
            OutputExistsError: Something came to lie there since the merge began.
            OutputError: The system refuses to rename; what was there before is there again.
        """
        _check_existing(self._place, overwrite=self._overwrite)
        self._check_foreign()
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
        for name in (SNAPSHOT_NAME, JOURNAL_NAME):
            (self.partial / name).unlink(missing_ok=True)

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
        return found is not None and self._has_work(found)

    def _has_work(self, found: Found) -> bool:
        """Return whether a journal, or what lies beside it, spares a later run some work."""
        return bool(found.lines) or (self.partial / SNAPSHOT_NAME).exists()


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Say what differs between two identities, key by key."""
    for key in sorted({*before, *now} - {"overwrite"}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from (f"{key} {text}" for text in _differences(old, new))
        elif old != new:
            yield f"{key} was {old}, is {new}"


def _clear(directory: Path) -> None:
    """Remove everything but the lock from a directory."""
    for path in directory.iterdir():
        if path.name == MARKER_NAME:
            continue
        if is_folder(path):
            shutil.rmtree(path)
        else:
            path.unlink()


def allocated(directory: Path) -> int:
    """Return the bytes of disk that the files of an unfinished merge have."""
    try:
        return sum(getattr(path.stat(), "st_blocks", 0) * 512 for path in directory.rglob("*"))
    except OSError:
        return 0


def _busy(partial: Path) -> OutputExistsError:
    return OutputExistsError(
        f"{partial}: another merge is writing there now; wait for it, or choose another place"
    )


def check_place(out: Path, inputs: Sequence[Path], *, overwrite: bool, look: bool = True) -> None:
    """Raise if a merge of these inputs may not write to a place, as it is now.

    Args:
        out: The place.
        inputs: What is read.
        overwrite: Whether an earlier merge there may be replaced.
        look: Whether what lies there matters.

    Raises:
        OutputExistsError: It is an input, or holds something that may not be replaced.
    """
    _check_inputs(out, out, inputs)
    if look:
        _check_existing(choose_place(out), overwrite=overwrite)


def _check_inputs(out: Path, partial: Path, inputs: Sequence[Path]) -> None:
    for given in inputs:
        path = _real(given)
        for place in (_real(out), _real(partial)):
            if place == path or place in path.parents or (path in place.parents and path.is_dir()):
                raise OutputExistsError(
                    f"{out}: overlaps the input {given}; inputs are never written to, choose "
                    "another place"
                )


def _real(path: Path) -> Path:
    # Path.resolve raises a RuntimeError for links in a circle, and these may lie anywhere.
    return Path(os.path.realpath(path))


def _check_existing(place: Place, *, overwrite: bool) -> None:
    out = place.out
    form = place.form
    if form.file is not None:
        _check_file_place(form)
    elif not os.path.lexists(out):
        return
    elif not out.is_dir() or out.is_symlink():
        raise OutputExistsError(f"{out}: is not a directory; choose another place")
    entries = list(place.iter_entries())
    if not entries:
        return
    present = [path.name for path in entries if not is_folder(path)]
    for folder in filter(is_folder, entries):
        present += [f"{folder.name}/{name}" for name in iter_names(folder)]
    present.sort()
    if not overwrite:
        raise OutputExistsError(
            f"{out}: already holds {len(present)} file(s); give --overwrite to replace an earlier "
            "merge, or choose another place"
            if form.file is None
            else f"{out}: {' and '.join(present)} already there; give --overwrite to replace an "
            "earlier merge, or choose another name"
        )
    present = [name for name in present if name not in OWN_FILES]
    written = read_manifest_files(out)
    if written is None:
        holds = f"holds {len(present)} file(s) but"
        if form.file is not None:
            holds = f"{' and '.join(present)} already there, but"
        raise OutputExistsError(
            f"{out}: {holds} no {form.manifest}, so no merge of ours made "
            "it; --overwrite only replaces earlier merges, remove it yourself"
        )
    foreign = [name for name in present if name not in {form.manifest, *written}]
    if foreign:
        raise OutputExistsError(
            f"{out}: holds {len(foreign)} file(s) that the earlier merge did not write "
            f"({', '.join(foreign[:_LISTED])}); --overwrite would lose them, move them away"
        )


def _check_file_place(form: OutputForm) -> None:
    """Return if nothing but files lies where an output of one file is to be."""
    for name in form.entries or ():
        path = form.folder / name
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise OutputExistsError(
                f"{path}: is not a file; an output called {form.file} is one file with its manifest "
                "and recipe beside it; choose another name"
            )


def _check_partial(partial: Path) -> None:
    if not os.path.lexists(partial):
        return
    _check_partial_contents(partial)
    if not (partial / MARKER_NAME).is_file():
        return
    lock = FileLock(partial / MARKER_NAME)
    try:
        if not lock.acquire():
            raise _busy(partial)
    finally:
        lock.close()


def _check_partial_contents(partial: Path) -> None:
    """Return if a directory was left by a merge, or is empty."""
    if partial.is_symlink() or not partial.is_dir():
        left_by_merge = False
    else:
        left_by_merge = (partial / MARKER_NAME).is_file() or not any(partial.iterdir())
    if not left_by_merge:
        raise OutputExistsError(
            f"{partial}: is in the way and was not left by a merge; rename or remove it"
        )


def _check_room(parent: Path, nbytes: int, nbytes_beside: int, allocated: int) -> None:
    if not parent.is_dir():
        raise OutputError(f"{parent}: no such directory; make it first")
    # Rights that the process has as it runs, which may be more than those of who started it.
    effective = os.access in os.supports_effective_ids
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=effective):
        raise OutputError(f"{parent}: not writable")
    free = shutil.disk_usage(parent).free
    if free < nbytes + nbytes_beside - allocated:
        raise DiskSpaceError(
            f"{parent}: the output takes {format_size(nbytes)}, and up to "
            f"{format_size(nbytes_beside)} for what lies beside it, but {format_size(free)} are "
            "free; free some or choose another disk"
        )
