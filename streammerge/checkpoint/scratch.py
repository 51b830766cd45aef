"""The directory for what waits to be sent to a store: where a result would lie if it stayed on the disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

SCRATCH_VARIABLE = "STREAMMERGE_SCRATCH"
"""Names the directory that has one for each result."""


def scratch_of(url: str) -> Path:
    """Return the directory for what waits to be sent to an address."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = os.environ.get(SCRATCH_VARIABLE) or f"{caches}/streammerge/uploads"
    name = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    return Path(os.path.abspath(os.path.expanduser(root))) / name  # noqa: PTH100, PTH111 - no link is followed, no home is no error


def local_of(url: str, scratch: Path) -> Path:
    """Return what a result is called there."""
    return scratch / (Path(url).name or "result")
