"""Files that a merge itself has made, opened again: never through a link, never one with two names.

A directory that lay there between a crash and its resume may have been changed meanwhile. A symbolic
or hard link in the place of a shard would let the merge write into another file.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from streammerge.errors import OutputError

NEW_NAME = ".streammerge-new"
"""A file that is being written, before it gets its name."""
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_FLAGS = _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""Without waiting: a named pipe would block the open for ever."""


def open_own(path: Path, flags: int) -> int:
    """Open a regular file of ours, which may have to be made, and return its descriptor.

    Args:
        path: The file.
        flags: Those of :func:`os.open`.

    Raises:
        OutputError: It is a link, has a second name, or is no regular file.
        OSError: The system refuses.
    """
    if not _NO_FOLLOW and path.is_symlink():
        raise _not_ours(path, "is a symbolic link")
    try:
        descriptor = os.open(path, flags | _FLAGS, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_ours(path, "is a symbolic link") from error
        if error.errno == errno.ENXIO:
            # What opening a pipe without a reader, or a socket, says.
            raise _not_ours(path, "is not a regular file") from error
        raise
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise _not_ours(path, "is not a regular file")
    raise _not_ours(path, f"is one file under {status.st_nlink} names (hard links)")


def create_own(path: Path) -> int:
    """Make a file that nothing else has a hold of, and return its descriptor, open for writing.

    Raises:
        OSError: The system refuses.
    """
    if os.path.lexists(path):
        path.unlink()
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o666)


def read_own(path: Path) -> bytes:
    """Return what a file of ours holds.

    Raises:
        OutputError: As for :func:`open_own`.
        OSError: The system refuses.
    """
    with os.fdopen(open_own(path, os.O_RDONLY), "rb") as stream:
        return stream.read()


def _not_ours(path: Path, what: str) -> OutputError:
    return OutputError(
        f"{path}: {what}, and a merge only touches files of its own; remove it, then continue "
        "with --resume"
    )
