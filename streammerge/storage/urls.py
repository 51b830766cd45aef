"""How a recipe names what is no path: ``s3://bucket/key``, ``hf://org/model@revision``, ``https://host/path``.

A path folds the two slashes; here they come back.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from streammerge.errors import CheckpointError, OutputError, rename_in_messages

_REMOTE = re.compile(r"(s3|hf|https?):(?:/+(.*))?", re.DOTALL)


def url_of(path: Path) -> str | None:
    """Return the address that a path was made of; None for a path."""
    match = _REMOTE.fullmatch(path.as_posix())
    return None if match is None else f"{match[1]}://{match[2] or ''}"


def spelled(path: Path) -> str:
    """Return a path, or an address, as the user wrote it."""
    return url_of(path) or str(path)


_FOLDED = re.compile(r"(?<![\w./-])(s3|hf|https?):/(?![/\s])")

# Whoever names a path in a message need not know what it was made of.
rename_in_messages(lambda text: _FOLDED.sub(r"\1://", text))


def check_url(url: str) -> str:
    """Return an address that tells no secrets, and names something.

    Raises:
        CheckpointError: It has a password or a query in it, or no bucket or host.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc and parts.scheme != "hf":
        raise CheckpointError(
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}: has a name or a password in it, "
            "which would stand in plans and manifests; leave them out"
        )
    if parts.query or parts.fragment:
        raise CheckpointError(
            f"{parts.scheme}://{parts.netloc}{parts.path}: has a query behind it, which would stand in plans and "
            "manifests, and ends with what it allows; name the object, and give credentials as the tools of "
            "the store take them"
        )
    if not parts.netloc:
        raise CheckpointError(f"{url}: expected {parts.scheme}://{_EXPECTED[parts.scheme]}")
    return url


_EXPECTED = {
    "s3": "bucket/key",
    "hf": "org/model[@revision]",
    "http": "host/path",
    "https": "host/path",
}


def refuse_store(path: Path, what: str) -> None:
    """Return if a path is of a disk.

    Args:
        path: The path.
        what: What would be done there: ``"grids are merged to"``.

    Raises:
        OutputError: It is the address of a store.
    """
    url = url_of(path)
    if url is not None:
        raise OutputError(f"{url}: {what} a directory on a disk; name one, and copy it there")
