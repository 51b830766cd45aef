"""Whether a result may go to a place in a store, and which objects there it replaces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import TypeAdapter

from streammerge.checkpoint.manifest import MANIFEST_VERSION, Manifest, read_manifest
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.errors import CheckpointError, OutputExistsError
from streammerge.storage.targets import Target
from streammerge.storing.places import StoredPlace


def manifest_at(target: Target) -> Manifest | None:
    """Return the manifest in a store; None without one that this version can read."""
    found = target.get(MANIFEST_NAME)
    if found is None:
        return None
    with TemporaryDirectory(prefix="streammerge-") as directory:
        (Path(directory) / MANIFEST_NAME).write_bytes(found.content)
        try:
            manifest = TypeAdapter(Manifest).validate_python(read_manifest(Path(directory)))
        except (CheckpointError, ValueError):
            return None
    return manifest if manifest.version == MANIFEST_VERSION else None


def check_objects(
    place: StoredPlace, there: Sequence[str], own: set[str | None], *, replaces: bool
) -> list[str]:
    """Return the objects at a place that are of the result which is replaced, or made again.

    Args:
        place: The place.
        there: The objects, but for the sign of a merge at work and the journal of one.
        own: Tokens of the merge that asks.
        replaces: Whether results of other merges may be replaced.

    Raises:
        OutputExistsError: One is of nobody known, or of another merge that may not be replaced.
    """
    if MANIFEST_NAME in there and not replaces:
        raise OutputExistsError(
            f"{place.url}: already holds a result; give --overwrite to replace it, or choose another place"
        )
    ours = {MANIFEST_NAME}
    if MANIFEST_NAME in there:
        manifest = manifest_at(place.target)
        ours |= set() if manifest is None else manifest.files.keys()
    tokens = {name: place.target.token_of(name) for name in there if name not in ours}
    foreign = [name for name, token in tokens.items() if token is None]
    if foreign:
        raise OutputExistsError(
            f"{place.url}: holds {len(foreign)} object(s) that no merge lists ({', '.join(foreign[:3])}); "
            "they would be mixed with the result, move them away or choose another place"
        )
    if any(token not in own for token in tokens.values()) and not replaces:
        raise OutputExistsError(
            f"{place.url}: holds {len(tokens)} object(s) of a merge that did not end, and of which neither this "
            "machine nor the store has a journal; give --overwrite to replace them"
        )
    ours |= tokens.keys()
    return [name for name in there if name in ours]
