"""Whether a merged model is still, byte for byte, what was written.

Memory: one block of a tensor, and the headers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from streammerge.checkpoint.digests import FileDigest, digest_file, digest_shard
from streammerge.checkpoint.header import read_safetensors_header
from streammerge.checkpoint.manifest import MANIFEST_NAME, manifest_files, read_manifest
from streammerge.checkpoint.places import OWN_FILES
from streammerge.errors import CheckpointError


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


def verify_files(directory: Path, on_file: Callable[[str], None] = lambda _: None) -> Verification:
    """Compare every file of a merged model with its manifest.

    Args:
        directory: The model.
        on_file: Told the name of each file before it is read.

    Raises:
        HeaderError: The directory has no manifest, or it is not one.
    """
    listed = manifest_files(read_manifest(directory))
    damages: list[Damage] = []
    nbytes = 0
    for name, expected in sorted(listed.items()):
        on_file(name)
        damage = _compare(directory / name, name, expected)
        if damage is not None:
            damages.append(damage)
        else:
            nbytes += expected.nbytes
    damages += (
        Damage(name, "extra", "the manifest does not list it")
        for name in _iter_names(directory)
        # A merge that was killed right after the last rename is complete, but not yet tidied up.
        if name not in {MANIFEST_NAME, *listed, *OWN_FILES}
    )
    return Verification(len(listed), nbytes, tuple(damages))


def _iter_names(directory: Path) -> Iterator[str]:
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(directory).as_posix()


def _compare(path: Path, name: str, expected: FileDigest) -> Damage | None:
    """Return what is wrong with a file; None when nothing is."""
    try:
        found = path.stat().st_size
        if found != expected.nbytes:
            return Damage(name, "corrupt", f"has {found} bytes, was written with {expected.nbytes}")
        digest = _digest_tree(path) if expected.tree else digest_file(path).digest
    except FileNotFoundError:
        return Damage(name, "missing", f"was written with {expected.nbytes} bytes")
    except OSError as error:
        return Damage(name, "unreadable", error.strerror or str(error))
    except CheckpointError as error:
        return Damage(name, "corrupt", str(error))
    if digest != expected.digest:
        return Damage(name, "corrupt", f"digest {digest}, was written with {expected.digest}")
    return None


def _digest_tree(path: Path) -> str:
    _, entries = read_safetensors_header(path, file_index=0)
    with path.open("rb") as stream:
        header_nbytes = 8 + int.from_bytes(stream.read(8), "little")
    return digest_shard(path, entries, header_nbytes)
