"""Matrices whose rows are rows of other matrices: what row of a vocabulary's embedding comes from where.

Memory: eight bytes for each row, and eight for each row that it comes of.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from streammerge.dtypes import DType


def _pack(raw: bytes) -> str:
    return base64.b85encode(zlib.compress(raw, 1)).decode()


def _unpack(given: object) -> bytes:
    if isinstance(given, bytes):
        return given
    if not isinstance(given, str):
        raise TypeError("expected packed numbers")
    return zlib.decompress(base64.b85decode(given))


Packed = Annotated[
    bytes,
    PlainSerializer(_pack, when_used="json"),
    PlainValidator(_unpack),
    WithJsonSchema({"type": "string"}),
]
"""32-bit little-endian integers; in JSON as compressed text."""


@dataclass(frozen=True, slots=True)
class RowPlace:
    """A stored matrix that rows come from."""

    model: int
    """The model that has it, the base first."""
    file: int
    """Index into that model's files; in a plan, into the plan's."""
    offset: int
    """First byte, from the start of the file."""
    dtype: DType
    """Its element type."""


@dataclass(frozen=True, slots=True, repr=False)
class RowMap:
    """Where every row of a matrix comes from: the mean of some rows, of one for most, zeros of none."""

    columns: int
    """Elements of a row, in every place."""
    dtype: DType
    """The element type that rows are read as; those of places of another type are rounded to it."""
    places: tuple[RowPlace, ...]
    """The matrices."""
    begins: Packed
    """int32 ``[rows]``: the first of the origins of each row."""
    ends: Packed
    """int32 ``[rows]``: behind the last of them."""
    origins: Packed
    """int32 ``[n, 2]``: a place, and a row there."""

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.begins) // 4

    def spans(self, first: int, end: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return where the origins of some rows begin and end, ``[end - first]`` each."""
        count = end - first
        begins = np.frombuffer(self.begins, "<i4", count, 4 * first)
        return begins, np.frombuffer(self.ends, "<i4", count, 4 * first)

    def origin(self) -> NDArray[np.int32]:
        """Return all origins, ``[n, 2]``."""
        return np.frombuffer(self.origins, "<i4").reshape(-1, 2)

    def __repr__(self) -> str:
        """Return what the map is, with its numbers as a digest: plans are told apart by this."""
        numbers = hashlib.blake2b(digest_size=16)
        for packed in (self.begins, self.ends, self.origins):
            numbers.update(hashlib.blake2b(packed).digest())
        return f"RowMap({self.columns}, {self.dtype}, {self.places}, {numbers.hexdigest()})"


def pack(numbers: NDArray[np.integer]) -> bytes:
    """Return numbers as a row map has them."""
    return np.ascontiguousarray(numbers, dtype="<i4").tobytes()
