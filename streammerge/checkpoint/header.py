"""The header of one safetensors file, parsed and checked against the file's size.

Accepts what the safetensors library accepts and refuses what it refuses: the tensors cover the data
section exactly, without overlap and without hole. Holds one header, at most 100 MB, and its parsed
form; no tensor byte is read.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import NoReturn

from streammerge.checkpoint.inputs import (
    check_name,
    count_elements,
    open_input,
    parse_json_object,
    read_exactly,
    refuse_constant,
    refuse_foreign,
)
from streammerge.checkpoint.types import ShardFile, TensorEntry
from streammerge.dtypes import UNSUPPORTED_CODES, DType
from streammerge.errors import HeaderError, TruncatedShardError, UnsupportedDTypeError, suggestion
from streammerge.storage.copies import find_object

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; the safetensors library refuses a longer header."""

_LENGTH_BYTES = 8
_BLANKS = b" \t\n\r"
_HEAD_BYTES = 64  # enough to recognise what else the file may be
_DTYPES = {str(dtype): dtype for dtype in DType}
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})

# (begin, end, name, dtype, shape), with the bytes counted from the start of the data section: the
# order of the fields makes plain sorting the order in the file.
_Extent = tuple[int, int, str, DType, tuple[int, ...]]


ParsedHeaders = dict[tuple[str, int, int], list[TensorEntry]]
"""The tensors of headers that were parsed, by the digest of the header, the size of the file, and its
number. Models that were tuned from one often have its headers, to the byte."""


def read_safetensors_header(
    path: Path, *, file_index: int, parsed: ParsedHeaders | None = None
) -> tuple[ShardFile, list[TensorEntry]]:
    """Return a safetensors file's identity and its tensors, in the order of their bytes.

    Args:
        path: The file, absolute.
        file_index: What :attr:`TensorEntry.file` will hold.
        parsed: Headers that need not be parsed again; this one is added. None where it is the only one.

    Returns:
        The file as it is now, and one entry per tensor, sorted by offset.

    Raises:
        CheckpointError: The file cannot be opened.
        HeaderError: It is not a safetensors file, or its header contradicts itself or the size of
            the file.
        TruncatedShardError: The file ends before the data that the header declares.
        UnsupportedDTypeError: A tensor has a dtype that is not known.
    """
    raw, nbytes, mtime_ns = _read_raw(path)
    digest = blake2b(raw, digest_size=16).hexdigest()
    known = (digest, nbytes, file_index)
    entries = None if parsed is None else parsed.get(known)
    if entries is None:
        entries = _parse(path, raw, nbytes=nbytes, file_index=file_index)
        if parsed is not None:
            parsed[known] = entries
    return ShardFile(path, nbytes, mtime_ns, digest, remote=find_object(path)), entries


def _parse(path: Path, raw: bytes, *, nbytes: int, file_index: int) -> list[TensorEntry]:
    """Return the tensors of a header, which agrees with itself and the size of its file."""
    header = parse_json_object(raw, where=f"{path}: header", parse_constant=refuse_constant)
    _check_metadata(path, header.pop("__metadata__", None))
    extents = sorted(_parse_extent(path, name, fields) for name, fields in header.items())
    data_start = _LENGTH_BYTES + len(raw)
    _check_coverage(path, extents, data_start=data_start, nbytes=nbytes)
    # Half a surrogate pair can only come from an escape; without one no name needs a look.
    if b"\\u" in raw:
        for name in header:
            check_name(name, path=path)
    return [
        TensorEntry(name, dtype, shape, file_index, data_start + begin)
        for begin, _, name, dtype, shape in extents
    ]


def read_raw_header(path: Path) -> bytes:
    """Return the JSON of a safetensors file's header, unparsed.

    Raises:
        CheckpointError: As for :func:`read_safetensors_header`, of what shows before it is parsed.
    """
    return _read_raw(path)[0]


def _read_raw(path: Path) -> tuple[bytes, int, int]:
    """Return the header, the size of the file and its time of modification."""
    with open_input(path) as (stream, status):
        # Of an object in a store the header is here; when it was copied is of no matter.
        what = find_object(path)
        nbytes, mtime_ns = (
            (status.st_size, status.st_mtime_ns) if what is None else (what.nbytes, 0)
        )
        head = stream.read(_HEAD_BYTES)
        header_nbytes = _header_nbytes(path, head, nbytes)
        stream.seek(_LENGTH_BYTES)
        return read_exactly(stream, header_nbytes, path=path), nbytes, mtime_ns


def _header_nbytes(path: Path, head: bytes, nbytes: int) -> int:
    """Return the length of the header, which fits the file and begins as an object does."""
    header_nbytes = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if len(head) > _LENGTH_BYTES:
        # Blanks before the brace are JSON, and the safetensors library reads them.
        start = head[_LENGTH_BYTES:].lstrip(_BLANKS)[:1]
        starts_right = start in {b"{", b""} and header_nbytes >= len("{}")
        if (
            starts_right
            and header_nbytes <= MAX_HEADER_BYTES
            and _LENGTH_BYTES + header_nbytes <= nbytes
        ):
            return header_nbytes
        refuse_foreign(path, head)
        if not starts_right:
            raise HeaderError(
                f"{path}: not a safetensors file: expected 8 bytes of length and a JSON object, "
                f"got {head[:16]!r}; copy it again"
            )
        if header_nbytes > MAX_HEADER_BYTES:
            raise HeaderError(
                f"{path}: first 8 bytes declare a header of {header_nbytes} bytes, the format "
                f"allows {MAX_HEADER_BYTES}; copy it again"
            )
        raise TruncatedShardError(
            f"{path}: header reaches through byte {_LENGTH_BYTES + header_nbytes}, file has "
            f"{nbytes} bytes; copy it again"
        )
    refuse_foreign(path, head)
    raise TruncatedShardError(
        f"{path}: expected at least {_LENGTH_BYTES + 2} bytes, file has {nbytes} bytes; copy it "
        "again"
    )


def _check_metadata(path: Path, metadata: object) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise HeaderError(
            f"{path}: __metadata__: expected an object of strings, got {type(metadata).__name__}"
        )
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise HeaderError(
                f"{path}: __metadata__: {key!r}: expected a string, got {type(value).__name__}"
            )
        # Half a surrogate pair, which the safetensors library refuses too.
        if not (_is_unicode(key) and _is_unicode(value)):
            raise HeaderError(f"{path}: __metadata__: {key!r}: not valid Unicode")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parse_extent(path: Path, name: str, fields: object) -> _Extent:
    """Return one tensor of the header, which agrees with itself."""
    # type() rather than isinstance(): faster on 50,000 tensors, and True is not a size.
    # The safetensors library passes over fields that it does not know.
    if type(fields) is not dict or not fields.keys() >= _FIELDS:
        _refuse_fields(path, name, fields)
    code = fields["dtype"]
    dtype = _DTYPES.get(code) if type(code) is str else None
    if dtype is None:
        _refuse_dtype(path, name, code)
    shape = fields["shape"]
    if type(shape) is not list:
        raise HeaderError(
            f"{path}: tensor {name!r}: shape: expected a list, got {type(shape).__name__}"
        )
    try:
        expected_nbytes = dtype.nbytes(count_elements(shape))
    except ValueError as error:
        raise HeaderError(f"{path}: tensor {name!r}: its shape {error}") from error
    offsets = fields["data_offsets"]
    if (
        type(offsets) is not list
        or len(offsets) != 2
        or type(offsets[0]) is not int
        or type(offsets[1]) is not int
        or not 0 <= offsets[0] <= offsets[1]
    ):
        raise HeaderError(
            f"{path}: tensor {name!r}: data_offsets: expected [begin, end] with 0 <= begin <= end, "
            f"got {str(offsets)[:100]}"
        )
    begin, end = offsets
    if end - begin != expected_nbytes:
        raise HeaderError(
            f"{path}: tensor {name!r}: shape {shape} of {dtype} takes {expected_nbytes} bytes, "
            f"data_offsets span {end - begin} bytes; copy the file again"
        )
    return begin, end, name, dtype, tuple(shape)


def _refuse_fields(path: Path, name: str, fields: object) -> NoReturn:
    if not isinstance(fields, dict):
        raise HeaderError(
            f"{path}: tensor {name!r}: expected an object, got {type(fields).__name__}"
        )
    raise HeaderError(
        f"{path}: tensor {name!r}: expected the keys {sorted(_FIELDS)}, "
        f"got {str(sorted(fields))[:200]}"
    )


def _refuse_dtype(path: Path, name: str, code: object) -> NoReturn:
    if not isinstance(code, str):
        raise HeaderError(
            f"{path}: tensor {name!r}: dtype: expected a string, got {type(code).__name__}"
        )
    if code in UNSUPPORTED_CODES:
        raise UnsupportedDTypeError(
            f"{path}: tensor {name!r}: dtype {code} packs four elements into three bytes, and no "
            "library loads it; save the tensor unpacked"
        )
    raise UnsupportedDTypeError(
        f"{path}: tensor {name!r}: unknown dtype {code[:40]!r}{suggestion(code[:40], _DTYPES)}"
    )


def _check_coverage(path: Path, extents: list[_Extent], *, data_start: int, nbytes: int) -> None:
    """Return if the sorted tensors cover the data section: no overlap, no hole, no rest."""
    covered = 0
    previous = "the header"
    for begin, end, name, _, _ in extents:
        if begin != covered:
            fault = "overlaps" if begin < covered else "leaves a hole after"
            raise HeaderError(
                f"{path}: tensor {name!r} {fault} {previous}: it begins at data byte {begin}, "
                f"{previous} ends at {covered}; copy the file again"
            )
        covered = end
        previous = f"tensor {name!r}"
    declared = data_start + covered
    if declared > nbytes:
        raise TruncatedShardError(
            f"{path}: header declares data through byte {declared}, file has {nbytes} bytes; "
            "copy it again"
        )
    if declared < nbytes:
        raise HeaderError(
            f"{path}: header declares data through byte {declared}, file has {nbytes} bytes: "
            f"{nbytes - declared} bytes belong to no tensor; copy it again"
        )
