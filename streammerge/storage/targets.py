"""The seam behind which results go: objects in parts, in any order, and small ones whole."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from streammerge.errors import OutputError
from streammerge.storage.objects import Listed
from streammerge.storage.stores import open_store
from streammerge.storage.urls import check_url, url_of

SMALLEST_PART = 16 * 2**20
"""Bytes of a part, but for the last one; stores want at least 5 MiB."""
MOST_PARTS = 9_000
"""Parts of an object; stores allow 10,000."""


def part_nbytes(nbytes: int) -> int:
    """Return how large the parts of an object are, in bytes; whole MiB."""
    return max(SMALLEST_PART, -(-nbytes // (MOST_PARTS * 2**20)) * 2**20)


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes of a file that are sent."""

    path: Path
    """The file."""
    offset: int
    """The first byte."""
    nbytes: int
    """How many."""


@dataclass(frozen=True, slots=True)
class SentPart:
    """A part that has come."""

    version: str
    """Which version of it."""
    nbytes: int
    """How large it is."""


@dataclass(frozen=True, slots=True)
class Small:
    """A small object."""

    content: bytes
    """What it holds."""
    version: str
    """Which version that is."""
    age: float
    """Seconds since it was written, by the store's own clock."""
    token: str | None
    """What it was marked by; None if by nothing."""


class Target(Protocol):
    """A folder in a store. Names are relative to it."""

    def list(self) -> Sequence[Listed]:
        """Return what is there."""
        ...

    def begin(self, name: str, token: str) -> str:
        """Begin an object that comes in parts, marked by a token; return what the upload is called."""
        ...

    def parts(self, name: str, upload: str) -> Mapping[int, SentPart] | None:
        """Return the parts that have come, by number from 1; None without such an upload."""
        ...

    def put_part(self, name: str, upload: str, number: int, part: Slice) -> str:
        """Send a part; return its version."""
        ...

    def complete(self, name: str, upload: str, parts: Mapping[int, str]) -> bool:
        """Make an object of its parts; return whether there was such an upload."""
        ...

    def uploads(self) -> Sequence[tuple[str, str]]:
        """Return names and uploads that were begun and never ended."""
        ...

    def abort(self, name: str, upload: str) -> None:
        """Throw the parts of an upload away; there may be none of the kind."""
        ...

    def token_of(self, name: str) -> str | None:
        """Return the token that an object was marked by; None without object or token."""
        ...

    def get(self, name: str) -> Small | None:
        """Return a small object; None if there is none."""
        ...

    def put(
        self,
        name: str,
        content: bytes,
        *,
        token: str = "",
        new: bool = False,
        instead_of: str | None = None,
    ) -> str | None:
        """Write a small object; return its version.

        Args:
            name: Its name.
            content: What it holds.
            token: Marks it; nothing does where it is empty.
            new: Whether there must be none of the name.
            instead_of: The version that must be there.

        Returns:
            None if the condition does not hold.
        """
        ...

    def put_file(self, name: str, path: Path, token: str) -> None:
        """Write an object, marked by a token, of a file that is not held in memory.

        The file may be replaced meanwhile, not written to.
        """
        ...

    def delete(self, name: str) -> None:
        """Remove an object; there may be none."""
        ...


def open_target(url: str) -> Target:
    """Return the folder at an address.

    Raises:
        OutputError: Nothing can be written to such a place.
        DependencyError: The library that it needs is not installed.
    """
    if not url.startswith("s3://"):
        raise OutputError(
            f"{url}: results go to a disk or to s3://bucket/folder; nothing is written to the hub or to web servers"
        )
    target: Target = importlib.import_module("streammerge.storage.s3target").S3Target(
        open_store(url), url
    )
    return target


def load_target(out: Path) -> str | None:
    """Return the address of the store that a result goes to, its library loaded; None for a disk.

    Whoever plans asks before: the library then counts as what is in use before the work.
    """
    url = url_of(out)
    if url is not None:
        open_target(check_url(url))
    return url
