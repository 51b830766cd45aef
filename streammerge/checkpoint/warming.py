"""Lets the disk work while the interpreter is still busy importing torch.

Importing torch takes one to three seconds, as long as reading some gigabytes. The system is told that
the first part of every input will be wanted; when the readers start, it is in the page cache. This
is a hint and nothing else: whatever is wrong here is found, and said, when the recipe is parsed.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

import psutil
import yaml

from streammerge.units import MIB

_MOST_BYTES = 1024 * MIB
"""What a fast disk reads while torch is imported."""
_SHARE_OF_FREE = 8
"""At most one part in so many of the free memory, which a page cache fills anyway."""
_LARGEST_RECIPE = 1 * MIB
_REQUEST = 8 * MIB
"""Bytes per hint, so that all models advance together, as the readers will."""


def warm_inputs(recipe: Path, *, limit: int | None) -> threading.Thread | None:
    """Start reading ahead in the background; return the thread, or None where it cannot be done.

    Args:
        recipe: The recipe file, not yet checked.
        limit: Memory that this process may use, page cache included, in bytes; None without one.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    room = psutil.virtual_memory().available if limit is None else limit
    nbytes = min(_MOST_BYTES, room // _SHARE_OF_FREE)
    thread = threading.Thread(target=_warm, args=(recipe, nbytes), daemon=True)
    thread.start()
    return thread


def _warm(recipe: Path, nbytes: int) -> None:
    # A hint must not fail: every error that matters comes back when the recipe is really read.
    with contextlib.suppress(Exception):
        if recipe.stat().st_size > _LARGEST_RECIPE:
            return
        models = [_weight_files(path) for path in _model_paths(yaml.safe_load(recipe.read_text()))]
        per_model = nbytes // max(len(models), 1)
        for begin in range(0, per_model, _REQUEST):
            for files in models:
                _hint(files, begin)


def _model_paths(document: Any) -> list[Path]:
    named = [document.get("base"), *(source.get("path") for source in document["sources"])]
    return [Path(path) for path in named if path is not None]


def _weight_files(path: Path) -> list[tuple[Path, int]]:
    """Return a model's weight files with their sizes, in the order in which they are read."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return [(file, file.stat().st_size) for file in files]


def _hint(files: list[tuple[Path, int]], begin: int) -> None:
    """Ask for one request's worth at ``begin`` of the files laid end to end."""
    for path, nbytes in files:
        if begin < nbytes:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, begin, _REQUEST, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)
            return
        begin -= nbytes
