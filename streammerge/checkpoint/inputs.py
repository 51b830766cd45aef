"""Files from outside: opened, recognised and parsed without trusting a byte of them."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

from streammerge.errors import CheckpointError, HeaderError, TruncatedShardError

MAX_NUMEL = 2**63
"""The most elements that a shape may have: sizes beyond it overflow in every reader."""

# What people most often have where weights should be. Asked only once a file has failed to parse,
# because a sound header may begin with these bytes too: they are its length.
_FOREIGN = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository",
    ),
    (
        b"GGUF",
        "is a GGUF file, which holds quantised or repacked weights; use the safetensors original",
    ),
    (
        b"PK\x03\x04",
        "is a zip archive; if torch.save wrote it, name it .bin, else unpack it first",
    ),
    (b"\x80", "is a Python pickle; load it where you trust it and save it as safetensors"),
    (b"\x89HDF", "is an HDF5 file (Keras); save the model as safetensors"),
    (b"\x1f\x8b", "is gzip-compressed; unpack it first"),
    (
        b"<",
        "is a web page, not weights; download it again, and log in first if the model asks for it",
    ),
)


@contextmanager
def open_input(path: Path) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """Open a regular file for reading and give it with its ``stat``, taken from the open file.

    Args:
        path: The file; a symbolic link is followed.

    Yields:
        The open file at byte 0, and its status.

    Raises:
        CheckpointError: There is no such file, it is not a regular file, or reading it failed.
    """
    try:
        # Asked before opening: a named pipe would block the open for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: expected a regular file; name a file with tensors")
        with path.open("rb") as stream:
            yield stream, os.fstat(stream.fileno())
    except FileNotFoundError as error:
        what = "is a link to a file that is gone" if path.is_symlink() else "is not there"
        raise CheckpointError(f"{path}: {what}; copy or download it again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_exactly(stream: BinaryIO, nbytes: int, *, path: Path) -> bytes:
    """Return the next ``nbytes`` bytes.

    Args:
        stream: The open file.
        nbytes: How many bytes to read.
        path: The file, for messages.

    Raises:
        TruncatedShardError: The file ends before.
    """
    start = stream.tell()
    raw = stream.read(nbytes)
    if len(raw) != nbytes:
        raise TruncatedShardError(
            f"{path}: expected data through byte {start + nbytes}, file ended at byte "
            f"{start + len(raw)}; copy it again"
        )
    return raw


def refuse_foreign(path: Path, head: bytes) -> None:
    """Return if the first bytes of a file that failed to parse are of no known other kind.

    Args:
        path: The file, for messages.
        head: Its first bytes, at least 32 where it has them.

    Raises:
        TruncatedShardError: The file is empty.
        HeaderError: The bytes are a Git LFS pointer, a web page, an archive, and the like.
    """
    if not head:
        raise TruncatedShardError(f"{path}: is empty (0 bytes); copy or download it again")
    for magic, advice in _FOREIGN:
        if head.startswith(magic) or (magic == b"<" and head.lstrip().startswith(b"<")):
            raise HeaderError(f"{path}: {advice}")


def parse_json_object(
    raw: bytes, *, where: str, parse_constant: Callable[[str], object]
) -> dict[str, object]:
    """Return the JSON object in ``raw``; no key may occur twice at any depth.

    Args:
        raw: UTF-8 text.
        where: The file, for messages.
        parse_constant: What to make of ``NaN`` and ``Infinity``, which are not JSON:
            :func:`refuse_constant`, or ``float`` where Python programs write them.

    Raises:
        HeaderError: The text is not UTF-8, not JSON, not an object, nested too deeply, or has a
            key twice.
    """
    try:
        value: object = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_constant=parse_constant,
        )
    except UnicodeDecodeError as error:
        raise HeaderError(
            f"{where}: expected UTF-8, got byte 0x{raw[error.start]:02x} at {error.start}; "
            "copy it again"
        ) from error
    except RecursionError as error:
        raise HeaderError(f"{where}: JSON nested too deeply; it is not a model's file") from error
    except ValueError as error:
        raise HeaderError(f"{where}: not valid JSON: {error}; copy it again") from error
    if not isinstance(value, dict):
        raise HeaderError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def refuse_constant(text: str) -> NoReturn:
    """Refuse ``NaN`` and ``Infinity``, as JSON does.

    Args:
        text: The constant.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"{text} is no JSON number")


def count_elements(shape: list[object] | tuple[object, ...]) -> int:
    """Return the number of elements of ``shape``; 1 for a scalar.

    Args:
        shape: What a file gives as a shape.

    Raises:
        ValueError: A dimension is not a whole number from 0, or the product overflows; the text
            completes "its shape".
    """
    numel = 1
    for size in shape:
        # Not isinstance: True is an int.
        if type(size) is not int or size < 0:
            raise ValueError("has a dimension that is not a whole number from 0")
        numel *= size
        if numel > MAX_NUMEL or size > MAX_NUMEL:
            raise ValueError(f"has more than {MAX_NUMEL} elements")
    return numel


def check_name(name: str, *, path: Path) -> None:
    """Return if ``name`` can be written to another file.

    Args:
        name: The name of a tensor.
        path: The file, for messages.

    Raises:
        HeaderError: The name holds half a surrogate pair, which UTF-8 cannot spell.
    """
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise HeaderError(f"{path}: tensor {name!r}: its name is not valid Unicode") from error


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} occurs twice")
            seen.add(key)
    return mapping
