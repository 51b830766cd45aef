"""How much memory the headers of a checkpoint will take once they are parsed, told without parsing them.

A header of 69 MB may hold a million tensors, which become a gigabyte of objects. What decides is how
many tensors and values there are, and counting their marks in the raw bytes is fast.

Memory: :data:`_STEP` bytes.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

_STEP = 1 << 20
_MARK = b'"data_offsets"'
"""Stands once in the description of each tensor."""
_MAX_HEADER_BYTES = 100_000_000
_ENTRY_BYTES = 100
"""Of an entry and its place in a mapping, without what is counted below; measured: 56 + 40."""
_VALUE_BYTES = 40
"""Of a number in a shape or an offset: 32 of the number, 8 of its place."""
_PARSING_BYTES = 700
"""Of the dictionaries and lists that a tensor's description is while its file is parsed; measured: 620."""


@dataclass(frozen=True, slots=True)
class HeaderSizes:
    """What the headers of one model come to."""

    nbytes: int
    """Bytes of all headers and indices."""
    tensors: int
    """Most tensors that there can be."""
    kept_bytes: int
    """Most memory that what is parsed takes."""
    parsing_bytes: int
    """Most memory that parsing takes beside that, for the largest file."""


def foresee_headers(path: Path) -> HeaderSizes:
    """Return the sizes of all headers that reading a checkpoint or an adapter may have to parse.

    What cannot be read counts as nothing: reading it says why. Of PyTorch files, whose pickles are
    capped at 32 MiB, nothing is counted.

    Args:
        path: A directory or a file.
    """
    nbytes = tensors = kept = parsing = 0
    for file in _files(path):
        header, marks, values = _count(file)
        nbytes += header
        tensors += marks
        kept += header + _ENTRY_BYTES * marks + _VALUE_BYTES * values
        # The raw bytes and the text beside the objects.
        parsing = max(parsing, 2 * header + _PARSING_BYTES * marks + 16 * values)
    return HeaderSizes(nbytes, tensors, kept, parsing)


def _files(path: Path) -> list[Path]:
    try:
        if not path.is_dir():
            return [path]
        return sorted(
            each for each in path.iterdir() if each.name.endswith((".safetensors", ".index.json"))
        )
    except (OSError, ValueError):
        return []


def _count(path: Path) -> tuple[int, int, int]:
    """Return the bytes of a header or an index, its tensors, and its values."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return 0, 0, 0
        with path.open("rb") as stream:
            if path.suffix == ".json":
                left, marks = status.st_size, b'": "'
            else:
                left, marks = int.from_bytes(stream.read(8), "little"), _MARK
            left = min(left, status.st_size, _MAX_HEADER_BYTES)
            size = left
            tensors = values = 0
            tail = b""
            while left > 0 and (part := stream.read(min(_STEP, left))):
                left -= len(part)
                # A mark may lie across two parts, and is then counted with the second.
                tensors += (tail + part).count(marks)
                values += part.count(b",")
                tail = part[-(len(marks) - 1) :]
            return size, tensors, values
    except (OSError, ValueError):
        return 0, 0, 0
