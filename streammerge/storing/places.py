"""Where a result goes in a store, and the directory for what waits to be sent there.

What must outlive a process lies in that directory: of a merge by one process in the store as well. Where several
processes do a part each, it is how they know of each other, so all of them need the same one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from streammerge.checkpoint.outputform import form_of
from streammerge.checkpoint.places import choose_place
from streammerge.checkpoint.scratch import SCRATCH_VARIABLE, local_of, scratch_of
from streammerge.errors import OutputError
from streammerge.storage.targets import Target, open_target
from streammerge.storage.urls import check_url


@dataclass(frozen=True, slots=True)
class StoredPlace:
    """Where a result goes."""

    url: str
    """``s3://bucket/folder``."""
    target: Target
    """The folder."""
    scratch: Path
    """The directory for what waits; of this result alone."""

    @property
    def local(self) -> Path:
        """What the result would be if it stayed on the disk."""
        return local_of(self.url, self.scratch)

    @property
    def partial(self) -> Path:
        """Where it grows."""
        return choose_place(self.local).partial


def open_place(url: str) -> StoredPlace:
    """Return where a result goes, its directory made.

    Args:
        url: ``s3://bucket/folder``.

    Raises:
        OutputError: Nothing can be written there.
    """
    if form_of(Path(url)).file is not None:
        raise OutputError(
            f"{url}: is one file; name a folder, s3://bucket/folder, for a result in a store has its manifest "
            "beside it"
        )
    target = open_target(check_url(url))
    scratch = scratch_of(url)
    try:
        scratch.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{scratch}: cannot be made: {error.strerror}; name another directory for what waits to be sent "
            f"by {SCRATCH_VARIABLE}"
        ) from error
    return StoredPlace(url, target, scratch)
