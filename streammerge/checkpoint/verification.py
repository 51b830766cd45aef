"""What comes of comparing a merged model with its manifest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that is not as the manifest says."""

    name: str
    """The file, relative to the directory."""
    kind: str
    """``missing``, ``extra``, ``unreadable`` or ``corrupt``."""
    what: str
    """What disagrees."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What became of looking at every file."""

    files: int
    """Files that the manifest lists."""
    nbytes: int
    """Bytes that were read."""
    damages: tuple[Damage, ...]
    """What is wrong; empty when all is well."""
    vouched: bool = True
    """Whether the manifest has a digest of itself; those before version 2 have none."""
