"""How much memory the headers of a checkpoint will take once they are parsed, told without parsing them.

A header of 69 MB may hold a million tensors, which become a gigabyte of objects. What decides is how
many objects, lists and values there are. Their marks are counted in the raw bytes, which is fast; JSON
has no other way to write them, so that no header can hide any. Inside names they count as well, and the
numbers are then too high.

Memory: :data:`_STEP` bytes.
"""

from __future__ import annotations

import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_STEP = 1 << 20
_MAX_HEADER_BYTES = 100_000_000
_INDEX_SUFFIX = ".index.json"
_LISTS_OF_PARTS = ("model_index.json", "modules.json")
_ENTRY_BYTES = 100
"""Of a tensor's entry and its place in a mapping, without its numbers; measured: 56 + 40."""
_NUMBER_BYTES = 40
"""Of a number in a shape or an offset: 32 of the number, 8 of its place."""
_NAME_BYTES = 110
"""Of a text in an index, its characters apart: 49, and half of a place in a mapping."""
_WHILE_PARSING = {b"{": 240, b"[": 72, b",": 48, b'"': 30}
"""Bytes that parsing takes for each mark: of an object, a list, a value, and half a text; measured for a
usual tensor: 620 for all of its marks, which come to about 970."""


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
        size, marks = _count(file)
        nbytes += size
        if file.name.endswith(_INDEX_SUFFIX):
            # It names tensors that the headers of shards describe.
            kept += size + _NAME_BYTES * (marks[b'"'] // 2)
        else:
            # All objects but the outermost one; what a file says about itself may be one of them.
            described = max(0, marks[b"{"] - 1)
            tensors += described
            kept += size + _ENTRY_BYTES * described + _NUMBER_BYTES * marks[b","]
        # The raw bytes, the text, and a copy that is looked through for its depth.
        while_parsing = 3 * size + sum(_WHILE_PARSING[mark] * marks[mark] for mark in marks)
        parsing = max(parsing, while_parsing)
    return HeaderSizes(nbytes, tensors, kept, parsing)


def _files(path: Path) -> list[Path]:
    """Return every header and index that may be parsed, whichever of them the path names."""
    directory = path.parent if path.name.endswith(_INDEX_SUFFIX) else path
    try:
        if not directory.is_dir():
            return [path]
        entries = [*directory.iterdir()]
        if any(each.name in _LISTS_OF_PARTS for each in entries):
            # Each folder may be a part.
            folders = [each for each in entries if each.is_dir()]
            entries += [inner for folder in folders for inner in folder.iterdir()]
        return sorted(
            each for each in entries if each.name.endswith((".safetensors", _INDEX_SUFFIX))
        )
    except (OSError, ValueError):
        return []


def _count(path: Path) -> tuple[int, Counter[bytes]]:
    """Return the bytes of a header or an index, and how many of each mark it has."""
    marks: Counter[bytes] = Counter()
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return 0, marks
        with path.open("rb") as stream:
            size = status.st_size
            if path.suffix != ".json":
                size = min(int.from_bytes(stream.read(8), "little"), size)
            size = left = min(size, _MAX_HEADER_BYTES)
            while left > 0 and (part := stream.read(min(_STEP, left))):
                left -= len(part)
                marks.update({mark: part.count(mark) for mark in _WHILE_PARSING})
            return size, marks
    except (OSError, ValueError):
        return 0, marks
