"""Arrays on disk that are replaced as a whole: the state of a long sweep, saved now and then.

    <length of the head> <head: JSON> <arrays, as numpy writes them> <SHA-256 of all that>

Memory: nothing is copied while saving; loading returns new arrays.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.ownfiles import create_own, open_own
from streammerge.errors import DiskSpaceError, OutputError

SNAPSHOT_NAME = ".streammerge-statistics"
_MAX_HEAD_BYTES = 1 << 20
_STEP = 1 << 20


def save_snapshot(path: Path, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write facts and arrays durably, in place of what was there.

    Raises:
        DiskSpaceError: The disk is full.
        OutputError: The system refuses.
    """
    new = path.with_name(path.name + ".new")
    head = json.dumps({"facts": facts, "arrays": list(arrays)}).encode()
    try:
        with os.fdopen(create_own(new), "wb") as stream:
            digesting = _Digesting(stream)
            digesting.write(len(head).to_bytes(8, "little") + head)
            for array in arrays.values():
                np.lib.format.write_array(digesting, array, allow_pickle=False)
            stream.write(digesting.digest())
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(path)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskSpaceError(
                f"{path}: the disk is full; free some space, then continue with --resume"
            ) from error
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def load_snapshot(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
    """Return the facts and arrays of a file; None when it is not there or not whole."""
    unusable = contextlib.suppress(
        OSError, OutputError, ValueError, KeyError, TypeError, EOFError, RecursionError
    )
    with unusable, os.fdopen(open_own(path, os.O_RDONLY), "rb") as stream:
        if not _is_sound(stream):
            return None
        nbytes = int.from_bytes(stream.read(8), "little")
        if nbytes > _MAX_HEAD_BYTES:
            return None
        head = json.loads(stream.read(nbytes))
        arrays = {
            str(name): np.lib.format.read_array(stream, allow_pickle=False)
            for name in head["arrays"]
        }
        return dict(head["facts"]), arrays
    return None


class _Digesting:
    """Writes to a file what numpy writes, and digests it on the way."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._stream.write(data)

    def digest(self) -> bytes:
        return self._digest.digest()


def _is_sound(stream: BinaryIO) -> bool:
    """Return whether a file ends with the digest of what comes before; leave it at its beginning."""
    digest = hashlib.sha256()
    left = os.fstat(stream.fileno()).st_size - digest.digest_size
    while left > 0 and (part := stream.read(min(left, _STEP))):
        digest.update(part)
        left -= len(part)
    sound = stream.read() == digest.digest()
    stream.seek(0)
    return sound


def discard_snapshot(path: Path) -> None:
    """Remove a file that is of no more use, if it is there."""
    with contextlib.suppress(OSError):
        path.unlink()
