"""Whether a merged model is still, byte for byte, what was written.

Memory: one block of a tensor, and the headers.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from streammerge.checkpoint.absent import explain_no_result
from streammerge.checkpoint.digests import (
    FileDigest,
    MakeHash,
    digest_file,
    digest_shard,
    tree_hash,
)
from streammerge.checkpoint.folders import iter_empty_folders, iter_names
from streammerge.checkpoint.header import read_safetensors_header
from streammerge.checkpoint.inputs import parse_path
from streammerge.checkpoint.manifest import find_manifest, manifest_files
from streammerge.checkpoint.outputform import found_form
from streammerge.checkpoint.places import is_own
from streammerge.checkpoint.storedoutputs import verify_stored
from streammerge.checkpoint.verification import Damage, Verification
from streammerge.errors import CheckpointError
from streammerge.storage.urls import url_of

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def verify_files(
    out: str | os.PathLike[str], on_file: Callable[[str], None] = lambda _: None
) -> Verification:
    """Compare every file of a merged model with its manifest, and that with its own digest.

    Nothing but regular files is opened, and no link is followed.

    Args:
        out: The directory of the model, or its one file; or ``s3://bucket/folder``, ``hf://org/model``.
        on_file: Told the name of each file before it is read.

    Raises:
        CheckpointError: There is no manifest.
        HeaderError: It is not one.
    """
    path = parse_path(out, "out")
    url = url_of(path)
    if url is not None:
        return verify_stored(url, on_file)
    absent = explain_no_result(path)
    if absent is not None:
        raise CheckpointError(absent)
    form = found_form(path)
    directory = form.folder
    manifest = find_manifest(path)
    listed = manifest_files(manifest.document)
    damages: list[Damage] = []
    if manifest.flaw is not None:
        damages.append(Damage(form.manifest, "corrupt", manifest.flaw))
    nbytes = 0
    make_hash = tree_hash(manifest.document.get("version"))
    for name, expected in sorted(listed.items()):
        on_file(name)
        damage = _compare(directory, name, expected, make_hash)
        if damage is not None:
            damages.append(damage)
        else:
            nbytes += expected.nbytes
    if form.file is None:
        damages += _extra_files(directory, {form.manifest, *listed})
    elif form.file not in listed:
        damages.append(Damage(form.file, "extra", f"{form.manifest} does not list it"))
    return Verification(len(listed), nbytes, tuple(damages), manifest.vouched)


def _extra_files(directory: Path, known: set[str]) -> Iterator[Damage]:
    """Yield what lies in the directory of a model and does not belong there."""
    # A merge that was killed right after the last rename is complete, but not yet tidied up.
    partial = f"{Path(os.path.abspath(directory)).name}.partial"  # noqa: PTH100 - follows no link
    empty = [path.relative_to(directory).as_posix() for path in iter_empty_folders(directory)]
    for name in (*iter_names(directory), *empty):
        ours = name == partial or is_own(name.removeprefix(f"{partial}/"))
        if name not in known and not ours:
            yield Damage(name, "extra", "the manifest does not list it")


def _compare(
    directory: Path, name: str, expected: FileDigest, make_hash: MakeHash
) -> Damage | None:
    """Return what is wrong with a file; None when nothing is."""
    path = directory / name
    try:
        for folder in path.relative_to(directory).parents:
            if (directory / folder).is_symlink() and folder != Path():
                return Damage(name, "corrupt", f"{folder.as_posix()} is a link, was a folder")
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            return Damage(name, "corrupt", f"is {kind}, was written as a regular file")
        found = status.st_size
        if found != expected.nbytes:
            return Damage(name, "corrupt", f"has {found} bytes, was written with {expected.nbytes}")
        digest = _digest_tree(path, make_hash) if expected.tree else digest_file(path).digest
    except FileNotFoundError:
        return Damage(name, "missing", f"was written with {expected.nbytes} bytes")
    except OSError as error:
        return Damage(name, "unreadable", error.strerror or str(error))
    except CheckpointError as error:
        return Damage(name, "corrupt", str(error))
    if digest != expected.digest:
        return Damage(name, "corrupt", f"digest {digest}, was written with {expected.digest}")
    return None


def _digest_tree(path: Path, make_hash: MakeHash) -> str:
    _, entries = read_safetensors_header(path, file_index=0)
    with path.open("rb") as stream:
        header_nbytes = 8 + int.from_bytes(stream.read(8), "little")
    return digest_shard(path, entries, header_nbytes, make_hash)
