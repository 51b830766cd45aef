"""Whether a merge is complete already: what ``--resume`` finds when the end came after the last rename."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter

from streammerge.checkpoint.journal import JOURNAL_NAME, read_journal
from streammerge.checkpoint.manifest import MANIFEST_VERSION, Manifest, read_manifest
from streammerge.checkpoint.places import choose_place, clear_away
from streammerge.checkpoint.types import ShardFile
from streammerge.errors import CheckpointError, OutputError


def find_finished(
    out: Path,
    *,
    identity: str,
    shards: Mapping[str, int],
    inputs: Sequence[ShardFile],
) -> Manifest | None:
    """Return the manifest of a directory that is the complete result of this very merge.

    It is, if the manifest has the identity of this merge, which speaks of the files that it copies too,
    no input has changed since, and every file is there with its size. :mod:`streammerge.checkpoint.verifying`
    looks at their bytes. What the merge has left is then cleared away.

    Args:
        out: The directory, or the one file.
        identity: Digest of what decides every byte of the result.
        shards: Sizes of the files with tensors, by name.
        inputs: The input files as they were planned.

    Returns:
        None if it is not, if that cannot be told, or if there is unfinished work beside it.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link at OUT
    if not out.name:
        return None
    place = choose_place(out)
    folder, manifest_path = place.folder, place.form.manifest_path
    unfinished = (place.partial / JOURNAL_NAME).exists() and not place.is_moved()
    try:
        if out.is_symlink() or unfinished or not manifest_path.is_file():
            return None
        manifest = TypeAdapter(Manifest).validate_python(read_manifest(out))
        if manifest.version != MANIFEST_VERSION or manifest.run.identity != identity:
            return None
        if _has_changed(inputs) or not _is_whole(folder, manifest, shards):
            return None
        journal = read_journal(place.leftovers / JOURNAL_NAME)
    except (CheckpointError, OutputError, OSError, ValueError):
        # Names in a manifest may be no names of files, and then Python raises a ValueError.
        return None
    replaced = journal is not None and bool(journal.identity.get("overwrite"))
    clear_away(place, replaced=replaced)
    return manifest


def _has_changed(inputs: Sequence[ShardFile]) -> bool:
    statuses = [(file, file.path.stat()) for file in inputs if file.on_disk]
    return any((s.st_size, s.st_mtime_ns) != (file.nbytes, file.mtime_ns) for file, s in statuses)


def _is_whole(folder: Path, manifest: Manifest, shards: Mapping[str, int]) -> bool:
    listed = {name: file.nbytes for name, file in manifest.files.items()}
    return shards.items() <= listed.items() and all(
        (folder / name).stat().st_size == nbytes for name, nbytes in listed.items()
    )
