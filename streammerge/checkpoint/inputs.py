"""Files from outside: opened, recognised and parsed without trusting a byte of them."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, NoReturn

from streammerge.checkpoint.dequantising import gguf_advice
from streammerge.errors import (
    CheckpointError,
    HeaderError,
    QuantizedCheckpointError,
    TruncatedShardError,
    printable,
)
from streammerge.limits import name_limit

MAX_NUMEL = 2**63 - 1
"""The most elements that a shape may have: sizes beyond it overflow in every reader."""
MAX_JSON_DEPTH = 64
"""Nesting of a JSON file; a model's files need six levels. Without a limit of ours it would be the
interpreter's: 1,000 levels or ten times as many, of which the next recursive function is left none."""

_MAX_NAMES_SHOWN = 10
# Blobs are named by a Git or SHA-256 digest.
_BLOB = re.compile(r"[0-9a-f]+")
_STEPS = {ord("{"): 1, ord("["): 1, ord("}"): -1, ord("]"): -1}
_NO_STRUCTURE = bytes(set(range(256)) - {*_STEPS, ord('"')})

# What people most often have where weights should be. Asked only once a file has failed to parse,
# because a sound header may begin with these bytes too: they are its length.
_FOREIGN = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository",
    ),
    (
        b"PK\x03\x04",
        "is a zip archive; if torch.save wrote it, name it .bin or .ckpt, else unpack it first",
    ),
    (b"\x80", "is a Python pickle; load it where you trust it and save it as safetensors"),
    (b"\x89HDF", "is an HDF5 file (Keras); save the model as safetensors"),
    (b"\x1f\x8b", "is gzip-compressed; unpack it first"),
    (
        b"<",
        "is a web page, not weights; download it again, and log in first if the model asks for it",
    ),
)


def parse_path(path: str | os.PathLike[str], what: str) -> Path:
    """Return the path that a caller of the library gave.

    Args:
        path: Text, or what stands for text; pathlib and open() take bytes here and there, and then
            join them with text somewhere deep inside.
        what: The caller's name of it, for messages.

    Raises:
        TypeError: It is neither.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(given := os.fspath(path), str):
        raise TypeError(
            f"{what}: expected a path as str or os.PathLike[str], got {path!r:.100}; os.fsdecode "
            "makes text of bytes"
        )
    return Path(given)


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
        raise name_limit(error) or CheckpointError(
            f"{path}: cannot be read: {error.strerror or error}"
        ) from error


def is_there(path: Path) -> bool:
    """Return whether something is at ``path``; not, where the system would not even look.

    ``Path.exists`` raises for a name that is too long or no Unicode, and in a closed directory.
    """
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def is_directory(path: Path) -> bool:
    """Return whether ``path`` is a directory, as :func:`is_there` does."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def absolute(path: Path) -> Path:
    """Return ``path`` from the root, so that no later change of the working directory matters.

    Raises:
        CheckpointError: It is relative to a working directory that has been removed.
    """
    try:
        return path.absolute()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: is relative to the working directory, which has been removed; change to "
            "another one"
        ) from error


def check_inside(path: Path, directory: Path, *, of_what: str) -> None:
    """Return if ``path``, its links followed, lies below ``directory`` or in a hub cache.

    Files of the Hugging Face cache are links to ``blobs/<digest>``, sometimes from a folder far away.

    Args:
        path: A file or folder below ``directory``, by its name.
        directory: The directory of a checkpoint; it may be reached by a link itself.
        of_what: What refers to the path, for messages.

    Raises:
        CheckpointError: It leads elsewhere, or in a circle.
    """
    try:
        real = path.resolve()
        inside = real.is_relative_to(directory.resolve())
    # A circle of links is a RuntimeError before Python 3.13.
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if inside or (real.parent.name == "blobs" and _BLOB.fullmatch(real.name)):
        return
    raise CheckpointError(
        f"{path}: {of_what} leads out of the directory, to {real}; if that file belongs to the "
        "model, put a copy of it in the place of the link"
    )


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


def read_limited(path: Path, limit: int) -> bytes:
    """Return the content of a file.

    Args:
        path: The file.
        limit: Most bytes that it may have.

    Raises:
        CheckpointError: It cannot be read.
        HeaderError: It is larger.
    """
    with open_input(path) as (stream, status):
        if status.st_size > limit:
            raise HeaderError(f"{path}: has {status.st_size} bytes, the limit is {limit}")
        return read_exactly(stream, status.st_size, path=path)


def read_small(path: Path, limit: int) -> bytes:
    """Return the content of a text file that describes a model.

    Args:
        path: The file.
        limit: Most bytes that it may have.

    Raises:
        CheckpointError: It cannot be read.
        HeaderError: It is larger, or something else than text.
    """
    raw = read_limited(path, limit)
    refuse_foreign(path, raw[:64])
    return raw


def listed(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    shown = ", ".join(map(printable, names[:_MAX_NAMES_SHOWN]))
    more = len(names) - _MAX_NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def refuse_foreign(path: Path, head: bytes) -> None:
    """Return if the first bytes of a file that failed to parse are of no known other kind.

    Args:
        path: The file, for messages.
        head: Its first bytes, at least 32 where it has them.

    Raises:
        TruncatedShardError: The file is empty.
        QuantizedCheckpointError: It is a GGUF file.
        HeaderError: The bytes are a Git LFS pointer, a web page, an archive, and the like.
    """
    if not head:
        raise TruncatedShardError(f"{path}: is empty (0 bytes); copy or download it again")
    if head.startswith(b"GGUF"):
        raise QuantizedCheckpointError(f"{path}: {gguf_advice(path)}")
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
        HeaderError: The text is not UTF-8, not JSON, not an object, nested deeper than
            :data:`MAX_JSON_DEPTH`, or has a key twice.
    """
    value = parse_json(
        raw,
        where=where,
        parse_constant=parse_constant,
        object_pairs_hook=_object_without_duplicates,
    )
    if not isinstance(value, dict):
        raise HeaderError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def parse_config(raw: bytes, *, where: str) -> tuple[dict[str, object], tuple[str, ...]]:
    """Return the object in a ``config.json`` as Python programs read it, and what stands in it twice.

    Of two equal keys the last one wins, and ``Infinity`` is a number: Mamba models have it.

    Args:
        raw: UTF-8 text.
        where: The file, for messages.

    Returns:
        The object, and the keys that an object at any depth has twice.

    Raises:
        HeaderError: The text is not UTF-8, not JSON, not an object, or nested deeper than
            :data:`MAX_JSON_DEPTH`.
    """
    twice: dict[str, None] = {}

    def keep_last(pairs: list[tuple[str, object]]) -> dict[str, object]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    twice[key] = None
                seen.add(key)
        return mapping

    value = parse_json(raw, where=where, parse_constant=float, object_pairs_hook=keep_last)
    if not isinstance(value, dict):
        raise HeaderError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value, tuple(twice)


def parse_json(
    raw: bytes,
    *,
    where: str,
    parse_constant: Callable[[str], object],
    object_pairs_hook: Callable[[list[tuple[str, object]]], dict[str, object]],
) -> object:
    """Return the JSON value in ``raw``.

    Args:
        raw: UTF-8 text.
        where: The file, for messages.
        parse_constant: As for :func:`parse_json_object`.
        object_pairs_hook: Makes an object of its keys and values: ``dict`` where the last of two
            equal keys may win.

    Raises:
        HeaderError: The text is not UTF-8, not JSON, or nested deeper than :data:`MAX_JSON_DEPTH`.
    """
    depth = _json_depth(raw)
    if depth > MAX_JSON_DEPTH:
        raise HeaderError(
            f"{where}: JSON nested too deeply: {depth} levels, the limit is {MAX_JSON_DEPTH}; it "
            "is not a model's file"
        )
    try:
        value: object = json.loads(
            raw.decode("utf-8"), object_pairs_hook=object_pairs_hook, parse_constant=parse_constant
        )
    except UnicodeDecodeError as error:
        raise HeaderError(
            f"{where}: expected UTF-8, got byte 0x{raw[error.start]:02x} at {error.start}; "
            "copy it again"
        ) from error
    except ValueError as error:
        raise HeaderError(f"{where}: not valid JSON: {error}; copy it again") from error
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


def _json_depth(raw: bytes) -> int:
    """Return how deep the JSON text nests, at least up to where it stops being JSON."""
    # Once escaped characters are gone, every quote left begins or ends a string; taking out quotes
    # two by two leaves each bracket inside or outside a string as it was.
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    structure = unescaped.translate(None, _NO_STRUCTURE).replace(b'""', b"")
    brackets = b"".join(structure.split(b'"')[::2])
    return max(accumulate(map(_STEPS.__getitem__, brackets), initial=0))
