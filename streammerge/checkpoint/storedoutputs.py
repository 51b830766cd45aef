"""Results that lie in stores: whether they are what was written, and how far they are.

Files are read by ranges where they lie; of each nothing but its header is copied.

Memory: :data:`_BATCH_BYTES` for each of :data:`_AT_ONCE` requests, the headers, and a journal's lines where one
is counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from streammerge.checkpoint.atwork import LOCK_NAME, is_busy
from streammerge.checkpoint.bytesource import RemoteSource
from streammerge.checkpoint.digests import (
    FileDigest,
    MakeHash,
    leaf_ranges,
    tree_digest,
    tree_hash,
)
from streammerge.checkpoint.header import read_safetensors_header
from streammerge.checkpoint.manifest import find_manifest, manifest_files
from streammerge.checkpoint.outputform import MANIFEST_NAME, form_of
from streammerge.checkpoint.remote import copy_head
from streammerge.checkpoint.storedjournal import HEAD_NAME, count_pieces, is_journal
from streammerge.checkpoint.verification import Damage, Verification
from streammerge.errors import (
    CheckpointError,
    HeaderError,
    OutputError,
    TruncatedShardError,
    UnsupportedDTypeError,
)
from streammerge.storage.copies import make_place
from streammerge.storage.objects import Listed, RemoteObject
from streammerge.storage.stores import open_store
from streammerge.storage.targets import open_target
from streammerge.storage.urls import check_url
from streammerge.units import MIB

_AT_ONCE = 16
_BATCH_BYTES = 8 * MIB
"""Of a file that are asked for at once; at least a leaf."""
Range = tuple[int, int]
"""First byte, and how many."""


def verify_stored(url: str, on_file: Callable[[str], None]) -> Verification:
    """Compare every file of a result in a store with its manifest; see :func:`verify_files`.

    Args:
        url: ``s3://bucket/folder`` or ``hf://org/model@revision``.
        on_file: Told the name of each file before it is read.

    Raises:
        CheckpointError: There is nothing there, or the store does not give it.
        HeaderError: There is no manifest, or it is not one.
    """
    there = {each.name: each.object for each in list_output(url)}
    place = make_place(url)
    if MANIFEST_NAME not in there:
        raise HeaderError(
            f"{url}: has no {MANIFEST_NAME}, so there is nothing to compare with; `streammerge status` "
            "tells whether a merge is under way there"
        )
    copy_head(Listed(MANIFEST_NAME, there[MANIFEST_NAME]), place)
    manifest = find_manifest(place)
    listed = manifest_files(manifest.document)
    damages: list[Damage] = []
    if manifest.flaw is not None:
        damages.append(Damage(MANIFEST_NAME, "corrupt", manifest.flaw))
    make_hash = tree_hash(manifest.document.get("version"))
    nbytes = 0
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        digests = _Digests(make_hash, place, pool)
        for name, expected in sorted(listed.items()):
            on_file(name)
            damage = _compare(there.get(name), name, expected, digests)
            if damage is None:
                nbytes += expected.nbytes
            else:
                damages.append(damage)
    damages += [
        Damage(name, "extra", "the manifest does not list it")
        for name in sorted(there.keys() - listed.keys() - {MANIFEST_NAME, LOCK_NAME})
        if not is_journal(name) and not (url.startswith("hf:") and name in _OF_THE_HUB)
    ]
    return Verification(len(listed), nbytes, tuple(damages), manifest.vouched)


_OF_THE_HUB = frozenset({".gitattributes"})
"""What the hub adds to every model."""


def list_output(url: str) -> Iterable[Listed]:
    """Return what a result in a store consists of, and whatever else lies there.

    Raises:
        OutputError: The place cannot be listed.
        CheckpointError: There is nothing there, or the store does not give it.
    """
    if url.startswith("http"):
        raise OutputError(
            f"{url}: a web server does not say what it has, so nobody would notice what was added; download "
            "the folder and verify that"
        )
    if form_of(Path(url)).file is not None:
        raise OutputError(
            f"{url}: is one file; name the folder, for a result in a store has its manifest in it"
        )
    found = open_store(check_url(url)).find(f"{url.rstrip('/')}/" if url[:3] == "s3:" else url)
    if not found:
        raise CheckpointError(f"{url}: there is nothing there; check the address")
    return found


@dataclass(frozen=True, slots=True)
class _Digests:
    """Finds digests of objects."""

    make_hash: MakeHash
    """Begins a hash."""
    place: Path
    """Where headers are copied to."""
    pool: ThreadPoolExecutor
    """Reads side by side."""

    def of_shard(self, listed: Listed) -> str:
        """Return the digest of an object with tensors."""
        copy_head(listed, self.place)
        path = self.place / listed.name
        _, entries = read_safetensors_header(path, file_index=0)
        header = path.read_bytes()
        source = RemoteSource(listed.object)

        def digest(batch: list[Range]) -> bytes:
            begin = batch[0][0]
            memory = memoryview(bytearray(sum(nbytes for _, nbytes in batch)))
            source.read_into(begin, memory)
            return b"".join(
                self.make_hash(memory[offset - begin : offset - begin + nbytes]).digest()
                for offset, nbytes in batch
            )

        leaves = self.pool.map(digest, _batches(leaf_ranges(entries, len(header))))
        return tree_digest(header, leaves, self.make_hash)


def _compare(
    what: RemoteObject | None, name: str, expected: FileDigest, digests: _Digests
) -> Damage | None:
    """Return what is wrong with an object; None when nothing is."""
    if what is None:
        return Damage(name, "missing", f"was written with {expected.nbytes} bytes")
    if what.nbytes != expected.nbytes:
        return Damage(
            name, "corrupt", f"has {what.nbytes} bytes, was written with {expected.nbytes}"
        )
    try:
        digest = digests.of_shard(Listed(name, what)) if expected.tree else _digest_whole(what)
    except (HeaderError, TruncatedShardError, UnsupportedDTypeError) as error:
        return Damage(name, "corrupt", str(error))
    except CheckpointError as error:
        return Damage(name, "unreadable", str(error))
    if digest != expected.digest:
        return Damage(name, "corrupt", f"digest {digest}, was written with {expected.digest}")
    return None


def _digest_whole(what: RemoteObject) -> str:
    """Return the digest of an object without tensors."""
    source = RemoteSource(what)
    buffer = memoryview(bytearray(min(_BATCH_BYTES, what.nbytes)))
    whole = hashlib.sha256()
    for offset in range(0, what.nbytes, _BATCH_BYTES):
        part = buffer[: what.nbytes - offset]
        source.read_into(offset, part)
        whole.update(part)
    return whole.hexdigest()


def _batches(ranges: Iterable[Range]) -> Iterator[list[Range]]:
    """Put neighbours together that are read by one request."""
    batch: list[Range] = []
    total = 0
    for offset, nbytes in ranges:
        if batch and total + nbytes > _BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append((offset, nbytes))
        total += nbytes
    if batch:
        yield batch


def look_at_stored(url: str) -> tuple[bool, bool, bool, int]:
    """Return whether a result in a store is complete, unfinished, at work on, and its pieces that are safe.

    Raises:
        OutputError: There is neither a result of this tool nor an unfinished one.
    """
    target = open_target(check_url(url))
    there: Mapping[str, object] = {each.name: each for each in target.list()}
    busy = LOCK_NAME in there and is_busy(target.get(LOCK_NAME))
    complete = MANIFEST_NAME in there
    unfinished = busy or (HEAD_NAME in there)
    if not complete and not unfinished:
        raise OutputError(f"{url}: neither a merged model nor an unfinished merge of one is there")
    return complete, unfinished, busy, count_pieces(target, there) if unfinished else 0


def has_result(url: str) -> bool:
    """Return whether a result in a store is complete."""
    return open_target(check_url(url)).get(MANIFEST_NAME) is not None
