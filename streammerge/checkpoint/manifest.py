"""The record that lies beside a merged model: what it was made of, how, and what it came to.

Everything but the ``run`` section depends on the recipe and the inputs only.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streammerge.checkpoint.digests import FileDigest
from streammerge.checkpoint.outputfile import write_durably
from streammerge.checkpoint.types import ShardFile
from streammerge.errors import HeaderError
from streammerge.units import MIB

MANIFEST_NAME = "streammerge_manifest.json"
RECIPE_NAME = "streammerge_recipe.yaml"
MANIFEST_VERSION = 1
MAX_MANIFEST_BYTES = 512 * MIB
"""A checkpoint of a million tensors stays below it."""


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One output tensor."""

    action: str
    """``merge``, ``copy`` or ``copy if equal``."""
    dtype: str
    """Stored element type."""
    numel: int
    """Elements."""
    density: tuple[float, ...]
    """Fraction kept per source; empty for methods that neither trim nor drop."""
    thresholds: tuple[float | None, ...]
    """Top-k threshold per source; None for infinity, which no finite number passes; empty for methods
    that do not trim."""
    not_finite: int
    """Input values that were NaN or infinite and let through by ``non_finite: keep``."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What this run took; the only part that differs between equal merges."""

    versions: dict[str, str]
    """Versions of streammerge, torch, numpy, safetensors and python."""
    device: str
    """What computed."""
    seconds: float
    """Wall time of the work, in seconds."""
    seconds_by_stage: dict[str, float]
    """Thread-seconds per stage, summed over its threads."""
    bytes_by_stage: dict[str, int]
    """Bytes read and written."""
    threads: dict[str, int]
    """Readers, workers and writers."""
    projected_memory: int
    """Peak private memory that the plan stated, in bytes."""
    measured_memory: int
    """Peak private memory that was seen, in bytes."""
    memory_budget: int
    """What the user allowed, in bytes."""
    resumed: bool
    """Whether an interrupted run had begun it; seconds and bytes are then those of the last run."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole record."""

    version: int
    """:data:`MANIFEST_VERSION`."""
    method: str
    """Name of the merge method."""
    semantics: str
    """Whose definition of it."""
    recipe: str
    """The recipe in canonical YAML."""
    recipe_digest: str
    """BLAKE2b-128 of that text, in hex."""
    inputs: tuple[ShardFile, ...]
    """Every input file as it was when it was merged."""
    files: dict[str, FileDigest]
    """Every file of the output but this one, by name."""
    dropped: tuple[str, ...]
    """Input tensors that the recipe drops."""
    copied_from_base: tuple[str, ...]
    """Tensors that a source lacks and ``missing: base`` copied."""
    tensors: dict[str, TensorRecord]
    """Output tensors by name."""
    run: RunRecord
    """What this run took."""


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Write ``streammerge_manifest.json``, durably.

    Raises:
        DiskSpaceError: The disk is full.
        OutputError: The system refuses.
    """
    text = json.dumps(
        asdict(manifest), indent=1, ensure_ascii=False, allow_nan=False, default=os.fspath
    )
    write_durably(directory / MANIFEST_NAME, [text.encode(), b"\n"])


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return a directory's manifest as the document that it is, with every field that we use.

    Raises:
        HeaderError: There is none, or it is not a manifest.
    """
    path = directory / MANIFEST_NAME
    try:
        with path.open("rb") as stream:
            document = _parse(stream.read(MAX_MANIFEST_BYTES + 1))
    except OSError as error:
        raise HeaderError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HeaderError(f"{path}: not a manifest of streammerge ({error})") from error
    return document


def _parse(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ValueError(f"it has more than {MAX_MANIFEST_BYTES} bytes")
    document = json.loads(raw)
    for name, fields in document["files"].items():
        FileDigest(int(fields["nbytes"]), str(fields["digest"]), bool(fields["tree"]))
        if not is_plain_path(name):
            raise ValueError(f"{name!r} is not the name of a file below the directory")
    return {**document, "recipe_digest": str(document["recipe_digest"])}


def read_manifest_files(directory: Path) -> tuple[str, ...] | None:
    """Return the names that a directory's manifest lists; None when it has no manifest.

    Raises:
        HeaderError: There is one, but it is not a manifest.
    """
    if not (directory / MANIFEST_NAME).exists():
        return None
    return tuple(read_manifest(directory)["files"])


def is_plain_path(name: str) -> bool:
    """Return whether a name, with ``/`` between its parts, stays below the directory it is in."""
    parts = name.split("/")
    return all(part not in {"", ".", ".."} and "\\" not in part for part in parts)
