"""Arrays on disk that are replaced as a whole: the state of a long sweep, saved now and then.

Memory: nothing is copied while saving; loading returns new arrays.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.errors import DiskSpaceError, OutputError

SNAPSHOT_NAME = ".streammerge-statistics"
_MAX_HEAD_BYTES = 1 << 20


def save_snapshot(path: Path, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write facts and arrays durably, in place of what was there.

    Raises:
        DiskSpaceError: The disk is full.
        OutputError: The system refuses.
    """
    new = path.with_name(path.name + ".new")
    head = json.dumps({"facts": facts, "arrays": list(arrays)}).encode()
    try:
        with new.open("wb") as stream:
            stream.write(len(head).to_bytes(8, "little") + head)
            for array in arrays.values():
                np.lib.format.write_array(stream, array, allow_pickle=False)
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
    unusable = contextlib.suppress(OSError, ValueError, KeyError, TypeError, EOFError)
    with unusable, path.open("rb") as stream:
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


def discard_snapshot(path: Path) -> None:
    """Remove a file that is of no more use, if it is there."""
    with contextlib.suppress(OSError):
        path.unlink()
