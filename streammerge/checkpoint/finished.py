"""Whether a merge is complete already: what ``--resume`` finds after an end right after the last rename."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from streammerge.checkpoint.journal import JOURNAL_NAME
from streammerge.checkpoint.manifest import (
    MANIFEST_NAME,
    MANIFEST_VERSION,
    Manifest,
    digest_recipe,
    read_manifest,
)
from streammerge.checkpoint.outputdir import OWN_FILES
from streammerge.checkpoint.types import ShardFile
from streammerge.errors import CheckpointError
from streammerge.version import VERSION


def find_finished(
    out: Path, *, recipe: str, inputs: Sequence[ShardFile], torch_version: str
) -> Manifest | None:
    """Return the manifest of a directory that is the complete result of this very merge.

    What the merge may have left beside the model is cleared away. A directory is another merge's, or
    not complete, if recipe, inputs or versions differ, or a file that the manifest lists is missing or
    of another size; :mod:`streammerge.checkpoint.verifying` looks at their bytes.

    Args:
        out: The directory.
        recipe: The recipe in canonical YAML.
        inputs: The input files as they are now.
        torch_version: Of the torch that is installed.

    Returns:
        None if it is not, or if there is unfinished work beside it.
    """
    unfinished = out.with_name(f"{out.name}.partial") / JOURNAL_NAME
    if unfinished.exists() or not (out / MANIFEST_NAME).is_file():
        return None
    try:
        manifest = TypeAdapter(Manifest).validate_python(read_manifest(out))
    except (CheckpointError, ValidationError):
        return None
    versions = manifest.run.versions
    same = (
        manifest.version == MANIFEST_VERSION
        and manifest.recipe_digest == digest_recipe(recipe)
        and manifest.inputs == tuple(inputs)
        and (versions.get("streammerge"), versions.get("torch")) == (VERSION, torch_version)
    )
    if not same or not all(_has_size(out / n, f.nbytes) for n, f in manifest.files.items()):
        return None
    for name in OWN_FILES:
        with contextlib.suppress(OSError):
            (out / name).unlink()
    return manifest


def _has_size(path: Path, nbytes: int) -> bool:
    try:
        return path.stat().st_size == nbytes
    except OSError:
        return False
