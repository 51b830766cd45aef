"""A lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import errno
import importlib
import os
from pathlib import Path

from streammerge.checkpoint.ownfiles import open_own

_UNKNOWN = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class FileLock:
    """A lock on a file; the file may stay, only a live holder counts."""

    def __init__(self, path: Path) -> None:
        """Open or create the file, without locking it.

        Raises:
            OutputError: Another file is linked there.
            OSError: The system refuses.
        """
        self._fd = open_own(path, os.O_RDWR | os.O_CREAT)
        self.known = True
        """Whether the file system seems to know locks; told by the attempt to take one."""

    def acquire(self, *, shared: bool = False) -> bool:
        """Take the lock if nobody has it; return whether it was taken.

        Some network file systems know no locks; there it always seems to be taken.

        Args:
            shared: Whether others may have it at the same time who take it like this; who has it
                alone already shares it then. Windows knows only locks that one process has alone.
        """
        try:
            if os.name == "nt":
                msvcrt = importlib.import_module("msvcrt")
                msvcrt.locking(self._fd, msvcrt.LK_NBLCK, 1)
            else:
                fcntl = importlib.import_module("fcntl")
                kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except OSError as error:
            self.known = error.errno not in _UNKNOWN
            return not self.known
        return True

    def still_at(self, path: Path) -> bool:
        """Return whether the locked file is the one of that name; it may have been replaced."""
        try:
            return os.path.samestat(os.fstat(self._fd), path.stat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Close the file, which gives the lock back."""
        os.close(self._fd)
