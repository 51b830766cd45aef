"""The record that lies beside a merged model: what it was made of, how, and what it came to.

Everything but the ``run`` section depends on the recipe and the inputs only.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streammerge.checkpoint.types import ShardFile
from streammerge.errors import HeaderError

MANIFEST_NAME = "streammerge_manifest.json"
RECIPE_NAME = "streammerge_recipe.yaml"
MANIFEST_VERSION = 1


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
    files: tuple[str, ...]
    """Every file of the output but this one, sorted."""
    dropped: tuple[str, ...]
    """Input tensors that the recipe drops."""
    copied_from_base: tuple[str, ...]
    """Tensors that a source lacks and ``missing: base`` copied."""
    tensors: dict[str, TensorRecord]
    """Output tensors by name."""
    run: RunRecord
    """What this run took."""


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Write ``streammerge_manifest.json``."""
    text = json.dumps(
        asdict(manifest), indent=1, ensure_ascii=False, allow_nan=False, default=os.fspath
    )
    (directory / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def read_manifest_files(directory: Path) -> tuple[str, ...] | None:
    """Return the names that a directory's manifest lists; None when it has no manifest.

    Raises:
        HeaderError: There is one, but it is not a manifest.
    """
    path = directory / MANIFEST_NAME
    try:
        document: Any = json.loads(path.read_bytes())
        return tuple(str(name) for name in document["files"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HeaderError(f"{path}: not a manifest of streammerge ({error})") from error
