"""The seam behind which stores lie: list what there is, read a range of it.

A new kind of store is one module with a class like :class:`Store`, and a line in :func:`open_store`.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

from streammerge.errors import DependencyError
from streammerge.storage.objects import Listed, RemoteObject

LARGEST_RANGE = 32 * 2**20
"""Bytes that are asked for at once."""
READ_STEP = 2**18
"""Bytes of an answer that are taken at once: libraries hold twice as many meanwhile, for each reader."""


class Store(Protocol):
    """What can be asked of a kind of store, from any number of threads."""

    def find(self, url: str) -> Sequence[Listed]:
        """Return the objects at and below an address; none where there is nothing.

        Raises:
            CheckpointError: The store cannot be reached, or refuses.
        """
        ...

    def read_into(self, what: RemoteObject, offset: int, buffer: memoryview) -> None:
        """Fill a buffer of at most :data:`LARGEST_RANGE` bytes from a byte of an object on, by one request.

        Raises:
            PassingError: It may be tried again.
            CheckpointError: The object has changed, or is gone, or the store refuses.
        """
        ...


_opening = threading.Lock()


def open_store(url: str) -> Store:
    """Return the store that an address is of; one for the whole process.

    Raises:
        DependencyError: The library that it needs is not installed.
    """
    scheme = url.partition(":")[0]
    with _opening:
        return _open("web" if scheme in {"http", "https"} else scheme)


@cache
def _open(kind: str) -> Store:
    module, name = _STORES[kind]
    made: Store = getattr(importlib.import_module(f"streammerge.storage.{module}"), name)()
    return made


_STORES = {"s3": ("s3", "S3Store"), "hf": ("hub", "HubStore"), "web": ("web", "WebStore")}


def close_stores() -> None:
    """Forget all stores: those that are opened next look for addresses and credentials anew."""
    with _opening:
        _open.cache_clear()


def import_library(name: str, extra: str, url: str) -> Any:
    """Return a library that not everybody needs.

    Raises:
        DependencyError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DependencyError(f"{url}: needs {name}: pip install 'streammerge[{extra}]'") from error
