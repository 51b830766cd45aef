"""What is read from a store: plain data, so that a plan can hold it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RemoteObject:
    """One version of one object."""

    url: str
    """Its address, as messages, plans and manifests name it."""
    nbytes: int
    """Its size."""
    version: str
    """What changes when it does: the ETag, the commit, or the time of its last change."""


@dataclass(frozen=True, slots=True)
class Listed:
    """An object, and what it is called below the address that was listed."""

    name: str
    """With ``/`` between parts; empty for the object that was named itself."""
    object: RemoteObject
    """The object."""
