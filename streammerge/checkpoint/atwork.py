"""The object that says that a merge is at work on a result in a store.

Memory: none to speak of.
"""

from __future__ import annotations

import json
import os
import platform

import psutil

from streammerge.storage.targets import Small

LOCK_NAME = ".streammerge-at-work"
"""What it is called."""
STALE_SECONDS = 300.0
"""After so long without a sign of life a merge is taken to be over."""
signs: set[str] = set()
"""Of the merges of this process that are at work."""


def sign_of_life(sign: str, *, of_process: bool = True) -> bytes:
    """Return what the object holds: who is at work.

    Args:
        sign: Of the merge.
        of_process: Whether it ends with this process; else only time tells that it is over.
    """
    said: dict[str, object] = {"host": platform.node(), "sign": sign}
    if of_process:
        said["process"] = os.getpid()
    return json.dumps(said).encode()


def sign_in(content: bytes) -> str | None:
    """Return the sign that the object holds; None of what says something else."""
    try:
        sign = json.loads(content)["sign"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return sign if isinstance(sign, str) else None


def is_busy(found: Small | None) -> bool:
    """Return whether the merge that wrote the object, if there is one, is to be taken for alive."""
    return found is not None and found.age < STALE_SECONDS and not _is_over(found.content)


def _is_over(content: bytes) -> bool:
    """Return whether the merge that gave a sign is known to have ended: one of this machine that is gone."""
    try:
        said = json.loads(content)
        host, process, sign = said["host"], int(said["process"]), said["sign"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    if host != platform.node():
        return False
    return sign not in signs if process == os.getpid() else not psutil.pid_exists(process)
