"""Models in stores: what planning needs is brought here, and tensors are read where they are.

Memory: a header per thread that brings one, at most 100 MB each and :data:`_AT_ONCE` of them; reading has
none of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from streammerge.checkpoint.bytesource import RemoteSource
from streammerge.checkpoint.hubfiles import choose_files
from streammerge.errors import CheckpointError, HeaderError
from streammerge.storage.copies import find_place, make_place, remember_place, stand_for
from streammerge.storage.objects import Listed, RemoteObject
from streammerge.storage.stores import open_store
from streammerge.storage.urls import check_url

_AT_ONCE = 16
"""Requests for headers and small files at the same time."""
_FIRST_BYTES = 2**16
"""Of a file of tensors that are asked for first: most headers of shards are no longer."""
_LONGEST_HEADER = 100_000_000
_LARGEST_COPY = 128 * 2**20
"""Bytes of a file beside the tensors that is copied here: the largest tokenizers have a third of it."""
_FRESH_SECONDS = 300.0
"""How long what was brought is taken for what is there. What has changed since is refused when it is read, and
then all is looked at anew."""
_WEIGHTS = ".safetensors"
_INDEX = ".safetensors.index.json"
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt")


def bring(url: str) -> Path:
    """Return where, on this machine, headers and small files of a model in a store are.

    Args:
        url: A folder, or one file of tensors: ``s3://bucket/model``, ``hf://org/model@revision``,
            ``https://host/model``.

    Raises:
        CheckpointError: There is nothing of the kind, or the store does not give it.
        DependencyError: The library for this kind of store is not installed.
    """
    known = find_place(url, younger=_FRESH_SECONDS)
    if known is not None:
        return known
    found = open_store(check_url(url)).find(url)
    if not found:
        raise CheckpointError(f"{url}: there is nothing there; check the address")
    place = make_place(url)
    if [each.name for each in found] == [""]:
        chosen = [Listed(place.name, found[0].object)]
        folder = place.parent
    else:
        names = set(choose_files(each.name for each in found))
        chosen = [each for each in found if each.name in names]
        folder = place
    _check(url, chosen)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(copy_head, each, folder) for each in chosen]:
            done.result()
    remember_place(url, place)
    return place


def _check(url: str, chosen: Sequence[Listed]) -> None:
    """Raise if what was chosen is no model that can be read by ranges, or would lie elsewhere."""
    for each in chosen:
        if ".." in PurePosixPath(each.name).parts or each.name.startswith("/"):
            raise CheckpointError(f"{url}: {each.name!r} is no name of a file; rename the object")
    weights = [each for each in chosen if each.name.endswith(_WEIGHTS)]
    other = [each for each in chosen if each.name.endswith(_OTHER_WEIGHTS)]
    if other and not weights:
        raise CheckpointError(
            f"{other[0].object.url}: files of PyTorch are read from a disk alone; download the model, or store "
            "it as safetensors"
        )
    if not weights and not any(each.name.endswith(_INDEX) for each in chosen):
        raise CheckpointError(f"{url}: none of {len(chosen)} files holds tensors (*{_WEIGHTS})")


def copy_head(listed: Listed, folder: Path) -> None:
    """Copy a small file, or the header of one with tensors."""
    what, path = listed.object, folder / listed.name
    if not listed.name.endswith(_WEIGHTS):
        if what.nbytes <= _LARGEST_COPY:
            content = _read(what, 0, what.nbytes)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return
    head = _read(what, 0, min(_FIRST_BYTES, what.nbytes))
    end = 8 + int.from_bytes(head[:8], "little")
    if end - 8 > _LONGEST_HEADER:
        raise HeaderError(
            f"{what.url}: its first 8 bytes declare a header of {end - 8} bytes, the format allows "
            f"{_LONGEST_HEADER}; it is no safetensors file"
        )
    if len(head) < end <= what.nbytes:
        head += _read(what, len(head), end - len(head))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head[:end])
    stand_for(path, what)


def _read(what: RemoteObject, offset: int, nbytes: int) -> bytes:
    content = bytearray(nbytes)
    RemoteSource(what).read_into(offset, memoryview(content))
    return bytes(content)
