"""Digests of output files that can be computed while the data streams, in any order.

A shard is not written from front to back, so its digest is a tree of two levels:

    leaf     BLAKE3 of a block of one tensor: 262,144 elements, less at the tensor's end
    file     BLAKE3 of the header's BLAKE3 and then all leaves, in the order of the bytes

Whoever reads the file can cut it in the same way, since its header says where tensors begin. Manifests
before version 3 have trees of SHA-256, of which a core makes a quarter as much in the same time. A file
without tensors (a configuration, a tokenizer) has its plain SHA-256.

Memory: one digest of 32 bytes per block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from streammerge.checkpoint.types import TensorEntry
from streammerge.statistics import BLOCK

LEAF_ELEMENTS = BLOCK
"""Elements of a leaf. Chunks are whole blocks, so no leaf is ever split between two of them."""
DIGEST_BYTES = 32
_FIRST_WITH_BLAKE3 = 3
_STEP = 1 << 20

MakeHash = Callable[[Any], Any]
"""Begins a hash with some bytes."""


def tree_hash(manifest_version: object) -> MakeHash:
    """Return the hash that digests of shards are made with in a manifest of some version."""
    with_sha = type(manifest_version) is int and manifest_version < _FIRST_WITH_BLAKE3
    return hashlib.sha256 if with_sha else blake3


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What a file must be."""

    nbytes: int
    """Its size."""
    digest: str
    """In hex: of the tree for a shard, else plain SHA-256."""
    tree: bool
    """Whether it is the digest of a tree."""


def leaf_digests(memory: memoryview, leaf_nbytes: int) -> bytes:
    """Return the digests of all leaves of a range of one tensor, joined.

    Args:
        memory: The bytes; the range begins with a leaf.
        leaf_nbytes: Bytes of a whole leaf of this tensor.
    """
    # A tensor without elements has no leaves.
    return b"".join(
        blake3(memory[begin : begin + leaf_nbytes]).digest()
        for begin in range(0, len(memory), leaf_nbytes)
    )


def tree_digest(header: bytes, leaves: Iterable[bytes], make_hash: MakeHash = blake3) -> str:
    """Return the digest of a shard.

    Args:
        header: All bytes before the data.
        leaves: Digests of leaves, joined as one likes, in the order of the data.
        make_hash: Begins a hash.
    """
    tree = make_hash(make_hash(header).digest())
    for joined in leaves:
        tree.update(joined)
    digest: str = tree.hexdigest()
    return digest


def digest_shard(
    path: Path,
    entries: Iterable[TensorEntry],
    header_nbytes: int,
    make_hash: MakeHash = blake3,
) -> str:
    """Read a shard and return its digest.

    Args:
        path: The file.
        entries: Its tensors.
        header_nbytes: Bytes before the data.
        make_hash: Begins a hash.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as stream:
        header = stream.read(header_nbytes)
        leaves = (
            make_hash(stream.read(nbytes)).digest()
            for _, nbytes in leaf_ranges(entries, header_nbytes)
        )
        return tree_digest(header, leaves, make_hash)


def leaf_ranges(entries: Iterable[TensorEntry], header_nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield first byte and number of bytes of every leaf of a shard, in the order of the data.

    Args:
        entries: Its tensors, which lie end to end.
        header_nbytes: Bytes before the data.
    """
    begin = header_nbytes
    for entry in sorted(entries, key=lambda entry: entry.offset):
        end = begin + entry.nbytes
        leaf_nbytes = LEAF_ELEMENTS * entry.dtype.itemsize
        for offset in range(begin, end, leaf_nbytes):
            yield offset, min(leaf_nbytes, end - offset)
        begin = end


def digest_file(path: Path) -> FileDigest:
    """Read a file without tensors and return its size and digest.

    Raises:
        OSError: It cannot be read.
    """
    whole = hashlib.sha256()
    nbytes = 0
    with path.open("rb") as stream:
        while part := stream.read(_STEP):
            whole.update(part)
            nbytes += len(part)
    return FileDigest(nbytes, whole.hexdigest(), tree=False)
