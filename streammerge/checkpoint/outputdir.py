"""The output directory: built under another name, and renamed when it is complete.

Work happens in ``OUT.partial``. Nothing is ever called ``OUT`` before it is whole, and what was
there before stays until then.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from streammerge.checkpoint.locking import FileLock
from streammerge.checkpoint.manifest import MANIFEST_NAME, read_manifest_files
from streammerge.checkpoint.outputfile import sync_directory
from streammerge.errors import DiskSpaceError, OutputError, OutputExistsError
from streammerge.units import MIB, format_size

_MARKER = ".streammerge-partial"
"""Lies in a directory that an interrupted merge may have left, and that may be thrown away."""
_SIDECAR_ROOM = 64 * MIB
"""Free disk asked for beyond the shards: tokenizer, configuration, manifest."""
_LISTED = 5


class OutputDirectory:
    """Builds ``OUT`` as a context manager: complete after :meth:`publish`, gone without it."""

    def __init__(self, out: Path, *, inputs: Sequence[Path], nbytes: int, overwrite: bool) -> None:
        """Check that the output may be written, before anything is.

        Args:
            out: The directory to make.
            inputs: Paths of the models being merged.
            nbytes: Bytes of all shards.
            overwrite: Whether an earlier merge in ``out`` may be replaced.

        Raises:
            OutputExistsError: Something is there, or would be destroyed.
            DiskSpaceError: The disk has too little room.
            OutputError: The parent directory is missing or not writable.
        """
        self.out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link at OUT
        if not self.out.name:
            raise OutputExistsError(
                f"{self.out}: is the root of the file system; choose a directory"
            )
        self.partial = self.out.with_name(self.out.name + ".partial")
        self._replaced = self.out.with_name(self.out.name + ".replaced")
        self._overwrite = overwrite
        self._published = False
        self._lock: FileLock | None = None
        _check_inputs(self.out, self.partial, inputs)
        _check_existing(self.out, overwrite=overwrite)
        _check_partial(self.partial)
        if self.out.exists() and os.path.lexists(self._replaced):
            raise OutputExistsError(
                f"{self._replaced}: is in the way; the earlier merge steps aside under this name, "
                "rename or remove what is there"
            )
        _check_room(self.out.parent, nbytes)

    def __enter__(self) -> Self:
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir()
        self._lock = FileLock(self.partial / _MARKER)
        self._lock.acquire()
        return self

    def publish(self) -> None:
        """Give the directory its final name; the last act of a merge.

        Raises:
            OutputExistsError: Something came to lie there since the merge began.
            OutputError: The system refuses to rename; what was there before is there again.
        """
        _check_existing(self.out, overwrite=self._overwrite)
        replaced = None
        self._unlock()
        try:
            # Some systems neither delete open files nor rename their directories.
            (self.partial / _MARKER).unlink()
            sync_directory(self.partial)
            if self.out.exists():
                self.out.rename(self._replaced)
                replaced = self._replaced
            self.partial.rename(self.out)
            self._published = True
            sync_directory(self.out.parent)
        except OSError as error:
            if replaced is not None and not self._published:
                replaced.rename(self.out)
            raise OutputError(f"{self.out}: cannot be put in place: {error.strerror}") from error
        if replaced is not None:
            shutil.rmtree(replaced)

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._unlock()
        if not self._published:
            shutil.rmtree(self.partial, ignore_errors=True)


def _check_inputs(out: Path, partial: Path, inputs: Sequence[Path]) -> None:
    for given in inputs:
        path = given.resolve()
        for place in (out.resolve(), partial.resolve()):
            if place == path or place in path.parents or (path in place.parents and path.is_dir()):
                raise OutputExistsError(
                    f"{out}: overlaps the input {given}; inputs are never written to, choose "
                    "another place"
                )


def _check_existing(out: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink():
        raise OutputExistsError(f"{out}: is not a directory; choose another place")
    present = sorted(
        path.relative_to(out).as_posix() for path in out.rglob("*") if not _is_plain_directory(path)
    )
    if not present and not any(out.iterdir()):
        return
    if not overwrite:
        raise OutputExistsError(
            f"{out}: already holds {len(present)} file(s); give --overwrite to replace an earlier "
            "merge, or choose another place"
        )
    written = read_manifest_files(out)
    if written is None:
        raise OutputExistsError(
            f"{out}: holds {len(present)} file(s) but no {MANIFEST_NAME}, so no merge of ours made "
            "it; --overwrite only replaces earlier merges, remove it yourself"
        )
    foreign = [name for name in present if name not in {MANIFEST_NAME, *written}]
    if foreign:
        raise OutputExistsError(
            f"{out}: holds {len(foreign)} file(s) that the earlier merge did not write "
            f"({', '.join(foreign[:_LISTED])}); --overwrite would lose them, move them away"
        )


def _is_plain_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _check_partial(partial: Path) -> None:
    if not os.path.lexists(partial):
        return
    if partial.is_symlink() or not (partial / _MARKER).is_file():
        raise OutputExistsError(
            f"{partial}: is in the way and was not left by a merge; rename or remove it"
        )
    lock = FileLock(partial / _MARKER)
    try:
        if not lock.acquire():
            raise OutputExistsError(
                f"{partial}: another merge is writing there now; wait for it, or choose another place"
            )
    finally:
        lock.close()


def _check_room(parent: Path, nbytes: int) -> None:
    if not parent.is_dir():
        raise OutputError(f"{parent}: no such directory; make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent}: not writable")
    free = shutil.disk_usage(parent).free
    if free < nbytes + _SIDECAR_ROOM:
        raise DiskSpaceError(
            f"{parent}: the output takes {format_size(nbytes)}, and {format_size(_SIDECAR_ROOM)} "
            f"for what lies beside it, but {format_size(free)} are free; free some or choose "
            "another disk"
        )
