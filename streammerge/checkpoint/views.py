"""Tensors that are made of other tensors without being copied: rows of one, or several in a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod

from streammerge.checkpoint.types import StoredPart, TensorEntry


def parts_of(entry: TensorEntry) -> tuple[StoredPart, ...]:
    """Return where a tensor lies, in flat order; one part for most."""
    return entry.parts or (StoredPart(entry.file, entry.offset, entry.numel),)


def sliced(entry: TensorEntry, name: str, first: int, shape: Sequence[int]) -> TensorEntry:
    """Return a flat range of a tensor as a tensor.

    Args:
        entry: The tensor.
        name: What the range is called.
        first: Flat index of its first element.
        shape: Its shape.
    """
    parts = tuple(iter_range(parts_of(entry), first, prod(shape), entry.dtype.itemsize))
    return _made_of(name, entry, tuple(shape), parts)


def joined(name: str, shape: Sequence[int], entries: Sequence[TensorEntry]) -> TensorEntry:
    """Return tensors, one behind the other, as one tensor.

    Args:
        name: What it is called.
        shape: Its shape.
        entries: The tensors, at least one; of one element type, and all coded or none.
    """
    parts = tuple(part for entry in entries for part in parts_of(entry))
    return _made_of(name, entries[0], tuple(shape), parts)


def iter_range(
    parts: Iterable[StoredPart], first: int, numel: int, itemsize: int
) -> Iterator[StoredPart]:
    """Yield what holds a flat range of a tensor.

    Args:
        parts: The tensor's parts.
        first: Flat index of the first element.
        numel: Elements.
        itemsize: Bytes per element, where it is not coded.
    """
    end = first + numel
    begin = 0
    for part in parts:
        low, high = max(first, begin), min(end, begin + part.numel)
        if low < high:
            yield _cut(part, low - begin, high - low, itemsize)
        begin += part.numel
        if begin >= end:
            return


def _cut(part: StoredPart, first: int, numel: int, itemsize: int) -> StoredPart:
    if numel == part.numel:
        return part
    if part.coding is None:
        return replace(part, offset=part.offset + first * itemsize, numel=numel)
    # A code that shares its byte with another one is only ever cut off together with it.
    coding = replace(part.coding, first=part.coding.first + first)
    if coding.transposed_rows:
        # Its columns are rows, so that all of the matrix is looked at for any range.
        return replace(part, numel=numel, coding=coding)
    return replace(part, offset=part.offset + first * coding.bits // 8, numel=numel, coding=coding)


def _made_of(
    name: str, like: TensorEntry, shape: tuple[int, ...], parts: tuple[StoredPart, ...]
) -> TensorEntry:
    if not parts:
        return TensorEntry(name, like.dtype, shape, like.file, like.offset)
    plain = len(parts) == 1 and parts[0].coding is None
    return TensorEntry(
        name, like.dtype, shape, parts[0].file, parts[0].offset, () if plain else parts
    )
