"""What lies on this machine of what does not: small files whole, of large ones nothing but headers.

Planning reads headers and configurations, by path. So they are copied into a directory that goes with
the process. A file of tensors ends there behind its header: whoever reads on from the copy, instead of
from the store, is told that the file is too short, and never gets zeros.
"""

from __future__ import annotations

import itertools
import math
import re
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

from streammerge.errors import rename_in_messages
from streammerge.storage.objects import RemoteObject

_lock = threading.Lock()
_objects: dict[str, RemoteObject] = {}
_places: dict[str, tuple[float, Path]] = {}
_numbers = itertools.count(1)


@cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    """Return the directory of all copies, which goes with the process."""
    made = tempfile.TemporaryDirectory(prefix="streammerge-copies-")
    rename_in_messages(name_copies)
    return made


def name_copies(text: str) -> str:
    """Return a text with addresses in the place of the paths of their copies."""
    root = _directory().name
    if root not in text:
        return text
    return re.sub(re.escape(root) + r"/\d+/(s3|hf|https?)/", r"\1://", text)


def address_of(path: Path) -> str | None:
    """Return the address of what something is a copy of; None for what is no copy."""
    named = name_copies(str(path)) if _objects else str(path)
    return None if named == str(path) else named


def origin_of(path: Path) -> str:
    """Return where something is: its path, or the address of what it is a copy of."""
    return address_of(path) or str(path)


def make_place(url: str) -> Path:
    """Return a new place on this machine for what lies at and below an address."""
    scheme, _, rest = url.partition("://")
    with _lock:
        return Path(_directory().name, str(next(_numbers)), scheme, rest)


def remember_place(url: str, place: Path) -> None:
    """Remember where copies of what lies at and below an address are, as it is now."""
    with _lock:
        _places[url] = (time.monotonic(), place)


def find_place(url: str, *, younger: float) -> Path | None:
    """Return where copies of what lies at and below an address are; None if they are older than so many seconds."""
    with _lock:
        made, place = _places.get(url, (-math.inf, None))
    return place if time.monotonic() - made < younger else None


def forget_places() -> None:
    """Look at everything anew from now on: something has changed."""
    with _lock:
        _places.clear()


def stand_for(path: Path, what: RemoteObject) -> None:
    """Remember which object a file on this machine is the header of."""
    with _lock:
        _objects[str(path)] = what


def find_object(path: Path) -> RemoteObject | None:
    """Return the object that a file on this machine is the header of; None for one of its own."""
    return _objects.get(str(path)) if _objects else None
