"""The record that lies beside a merged model: what it was made of, how, and what it came to.

Everything but the ``run`` section depends on the recipe and the inputs only. The last line vouches for
all bytes before and after it: it holds the SHA-256 of the file with zeros in the place of that digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from streammerge.checkpoint.digests import FileDigest
from streammerge.checkpoint.inputs import (
    open_input,
    parse_json_object,
    read_exactly,
    refuse_constant,
)
from streammerge.checkpoint.outputfile import write_durably
from streammerge.checkpoint.outputform import found_form
from streammerge.checkpoint.types import CompanionDifference, Note, ShardFile
from streammerge.errors import HeaderError, printable
from streammerge.storage.copies import origin_of
from streammerge.storage.urls import spelled
from streammerge.units import MIB
from streammerge.version import VERSION

MANIFEST_VERSION = 3
_FIRST_WITH_DIGEST = 2
MAX_MANIFEST_BYTES = 256 * MIB
"""A tensor takes about 250 bytes, so this allows a million of them."""
_ZEROS = b"0" * 64
_DIGEST_LINE = re.compile(rb'\n "digest": "([0-9a-f]{64})"\n}\n\Z')


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
    """Threshold per ranked value, mostly one per source; None for infinity, which no finite number
    passes; empty for methods that rank nothing."""
    numbers: tuple[float | None, ...]
    """What else the method found, in the order of its rounds: coefficients, factors, counts; None for
    what is not finite; empty for methods that look for nothing."""
    not_finite: int
    """Input values that were NaN or infinite and let through by ``non_finite: keep``."""


@dataclass(frozen=True, slots=True)
class PartRecord:
    """What one part of a merge took, in the attempt that finished it."""

    part: int
    """Which part, from 1."""
    parts: int
    """Of how many."""
    host: str
    """The machine that it ran on."""
    attempts: int
    """Processes that worked on the part, one after the other or side by side."""
    seconds: float
    """Wall time of the work, in seconds."""
    bytes_by_stage: dict[str, int]
    """Bytes read and written."""
    measured_memory: int
    """Peak private memory of the process, in bytes."""
    memory_budget: int
    """What the user allowed it, in bytes."""
    workers: int
    """Compute threads."""
    device: str
    """What computed."""
    damaged: int
    """Pieces of earlier attempts whose bytes had changed; they were made again."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What this run took; the only part that differs between equal merges."""

    versions: dict[str, str]
    """Versions of streammerge, torch, numpy, safetensors and python."""
    device: str
    """What computed: ``cpu``, ``cuda:0``, or several with commas between."""
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
    damaged: int = 0
    """Pieces of that run whose bytes had changed when it was resumed; they were made again."""
    projected_device_memory: int = 0
    """Memory of each accelerator that the plan stated, in bytes; 0 on the CPU."""
    measured_device_memory: int = 0
    """Most memory that the process had of any one of them, in bytes; 0 on the CPU."""
    kernels: str = "plain"
    """``compiled`` if blocks on the CPU had compiled kernels at hand; they change no bit."""
    byte_source: str = "pread"
    """How input files were read: ``mmap`` only where it was asked for and could be guarded."""
    identity: str = ""
    """BLAKE2b-128 of what decided every byte: recipe, work, inputs and versions; in hex."""
    device_choice: str = ""
    """What ``--device auto`` came to and why; empty where a device was named, or none is there."""
    parts: tuple[PartRecord, ...] = ()
    """What each process did that did a part of the merge; the other fields are about the one that put
    the output in place. Empty for a merge by one process."""


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
    notes: tuple[Note, ...] = ()
    """What the plan decided without being asked for."""
    revisions: dict[str, str] = field(default_factory=dict)
    """``"org/model@commit"`` of each model that came from the Hugging Face hub, by its label."""
    left_behind: tuple[str, ...] = ()
    """What lies beside the tensors of the base, or the first source, and is not in the output."""
    differences: tuple[CompanionDifference, ...] = ()
    """Settings in which the inputs differ beside their tensors, with whose is in the output."""
    metadata_left_out: tuple[str, ...] = ()
    """What their headers say and the output's do not, because it does not hold any more."""


def digest_recipe(recipe: str) -> str:
    """Return the BLAKE2b-128 of a recipe in canonical YAML, in hex."""
    return hashlib.blake2b(recipe.encode(), digest_size=16).hexdigest()


def digest_text(text: str) -> str:
    """Return the BLAKE2b-128 of a text, in hex; names of files in it need not be Unicode."""
    raw = text.encode(errors="backslashreplace")
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def digest_identity(identity: Mapping[str, Any]) -> str:
    """Return the digest of what decides every byte of a merge's output."""
    return digest_text(json.dumps(identity, sort_keys=True))


def collect_versions(torch_version: str) -> dict[str, str]:
    """Return the versions that a run depends on; that of torch is given, for it is not loaded here."""
    return {
        "streammerge": VERSION,
        "torch": torch_version,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write the manifest to ``path``, durably.

    Names of files that are not Unicode get the escapes that JSON has for what Python makes of them.

    Raises:
        DiskSpaceError: The disk is full.
        OutputError: The system refuses.
    """
    data = f"{_render(manifest)}\n".encode(errors="backslashreplace")
    write_durably(path, [_with_digest(data)])


def _render(manifest: Manifest) -> str:
    """Return the manifest as JSON, a line for each tensor.

    Indented JSON is made by Python code, and asdict copies all that it meets: for 50,000 tensors
    that takes seconds, during which nothing else is done.
    """
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    lines = [
        f"  {encode(name)}: {encode(_shallow(record))}" for name, record in manifest.tensors.items()
    ]
    sections = [
        f" {encode(name)}: "
        + json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=_as_plain_value)
        for name, value in _shallow(manifest).items()
        if name != "tensors"
    ]
    sections.append(' "tensors": {\n' + ",\n".join(lines) + "\n }")
    sections.append(f' "digest": "{_ZEROS.decode()}"')
    return "{\n" + ",\n".join(sections) + "\n}"


def _with_digest(data: bytes) -> bytes:
    digest = hashlib.sha256(data).hexdigest().encode()
    return digest.join(data.rsplit(_ZEROS, maxsplit=1))


def _shallow(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}


def _as_plain_value(value: Any) -> Any:
    # Of a model in a store the manifest names the address, not where its header was copied to.
    return _shallow(value) if is_dataclass(value) else spelled(Path(origin_of(value)))


@dataclass(frozen=True, slots=True)
class FoundManifest:
    """A manifest as it is found."""

    document: dict[str, object]
    """What it says; ``files`` is of sound form."""
    flaw: str | None
    """What shows that it is not what was written; None when nothing does."""
    vouched: bool
    """Whether it has a digest of itself; those before version 2 have none."""


def read_manifest(out: Path) -> dict[str, object]:
    """Return the manifest of an output as the document that it is; it is what was written.

    Raises:
        CheckpointError: There is none, or it cannot be read.
        HeaderError: It is not a manifest, or no longer what was written.
    """
    found = find_manifest(out)
    if found.flaw is not None:
        raise HeaderError(f"{found_form(out).manifest_path}: {found.flaw}")
    return found.document


def find_manifest(out: Path) -> FoundManifest:
    """Return the manifest of an output, and whether it is still what was written.

    Args:
        out: A directory, or the one file with tensors beside which the manifest lies.

    Raises:
        CheckpointError: There is none, or it cannot be read.
        HeaderError: It is not a manifest.
    """
    path = found_form(out).manifest_path
    if path.is_symlink():
        raise HeaderError(f"{path}: is a symbolic link, not the manifest itself; copy it here")
    with open_input(path) as (stream, status):
        if status.st_size > MAX_MANIFEST_BYTES:
            raise HeaderError(
                f"{path}: has {status.st_size} bytes, the limit is {MAX_MANIFEST_BYTES}; it is "
                "not a manifest of streammerge"
            )
        raw = read_exactly(stream, status.st_size, path=path)
    where = f"{path}: not a manifest of streammerge"
    document = parse_json_object(raw, where=where, parse_constant=refuse_constant)
    files = document.get("files")
    if not isinstance(files, dict):
        raise HeaderError(f"{where}: files: expected an object; move it away")
    for name, fields in files.items():
        _check_file(name, fields, where=where)
    flaw, vouched = _judge(raw, document)
    return FoundManifest(document, flaw, vouched)


def _judge(raw: bytes, document: Mapping[str, object]) -> tuple[str | None, bool]:
    """Return what shows that a manifest was changed, if anything does, and whether it would show."""
    version = document.get("version")
    if type(version) is int and version < _FIRST_WITH_DIGEST and "digest" not in document:
        return None, False
    line = _DIGEST_LINE.search(raw)
    if line is None:
        return "does not end with its own digest; it was changed after it was written", True
    digest = hashlib.sha256(raw[: line.start(1)] + _ZEROS + raw[line.end(1) :]).hexdigest()
    said = line.group(1).decode()
    if digest == said:
        return None, True
    return f"was changed after it was written: says that its digest is {said}, is {digest}", True


def _check_file(name: str, fields: object, *, where: str) -> None:
    """Return if a manifest's entry about a file has what :class:`FileDigest` needs, no more."""
    if not is_plain_path(name):
        raise HeaderError(f"{where}: files: {printable(name)} does not stay in the directory")
    if not name.isprintable():
        raise HeaderError(f"{where}: files: {printable(name)} holds what cannot be printed")
    kinds = {"nbytes": int, "digest": str, "tree": bool}
    found = {key: type(value) for key, value in fields.items()} if type(fields) is dict else None
    if found != kinds:
        raise HeaderError(
            f"{where}: files: {printable(name)}: expected nbytes, digest and tree; move it away"
        )


def manifest_files(document: dict[str, object]) -> dict[str, FileDigest]:
    """Return the files that a manifest lists."""
    files = document["files"]
    assert isinstance(files, dict)  # noqa: S101 - read_manifest looked
    return {name: FileDigest(**fields) for name, fields in files.items()}


def read_manifest_files(out: Path) -> tuple[str, ...] | None:
    """Return the names that the manifest of an output lists; None when it has no manifest.

    Raises:
        CheckpointError: There is one, but it cannot be read.
        HeaderError: There is one, but it is not a manifest.
    """
    if not os.path.lexists(found_form(out).manifest_path):
        return None
    return tuple(manifest_files(read_manifest(out)))


def is_plain_path(name: str) -> bool:
    """Return whether a name, with ``/`` between its parts, stays below the directory it is in."""
    parts = name.split("/")
    return all(part not in {"", ".", ".."} and "\\" not in part for part in parts)
