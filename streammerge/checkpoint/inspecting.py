"""A checkpoint's contents for people and for scripts."""

from __future__ import annotations

from collections import Counter
from typing import Any

from streammerge.checkpoint.hub import hub_revision
from streammerge.checkpoint.types import Checkpoint
from streammerge.errors import printable
from streammerge.storage.copies import origin_of
from streammerge.units import format_size

_LARGEST = 5


def describe(checkpoint: Checkpoint) -> str:
    """Return a summary: files, element types, parameters, the largest tensors."""
    tensors = checkpoint.tensors.values()
    by_dtype: Counter[str] = Counter()
    for entry in tensors:
        by_dtype[entry.dtype.value] += entry.nbytes
    revision = hub_revision(checkpoint.path)
    rows = [
        ("path", origin_of(checkpoint.path)),
        *([] if revision is None else [("hub", revision)]),
        (
            "files",
            f"{len(checkpoint.files)}, {format_size(sum(f.nbytes for f in checkpoint.files))}",
        ),
        ("tensors", f"{len(tensors):,}"),
        ("parameters", f"{sum(entry.numel for entry in tensors):,}"),
        *[(dtype, format_size(nbytes)) for dtype, nbytes in sorted(by_dtype.items())],
    ]
    if checkpoint.config is not None:
        names = checkpoint.config.get("architectures")
        if isinstance(names, list):
            texts = [name for name in names if isinstance(name, str)]
            rows.append(("architecture", ", ".join(texts)))
    rows += [
        ("left out", f"{', '.join(file.left_out)} of {file.path.name}")
        for file in checkpoint.files
        if file.left_out
    ]
    rows += [("note", note) for note in checkpoint.notes]
    largest = sorted(tensors, key=lambda entry: (-entry.nbytes, entry.name))[:_LARGEST]
    rows += [
        ("largest", f"{entry.name} {list(entry.shape)} {entry.dtype} {format_size(entry.nbytes)}")
        for entry in largest
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {printable(value)}" for name, value in rows)


def describe_as_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return everything: files with size and digest, tensors with place, dtype and shape."""
    return {
        "path": origin_of(checkpoint.path),
        "notes": list(checkpoint.notes),
        "files": [
            {
                "path": file.origin,
                "nbytes": file.nbytes,
                "mtime_ns": file.mtime_ns,
                "header_digest": file.header_digest,
                "left_out": list(file.left_out),
            }
            for file in checkpoint.files
        ],
        "tensors": {
            name: {
                "dtype": entry.dtype.value,
                "shape": list(entry.shape),
                "file": entry.file,
                "offset": entry.offset,
                "nbytes": entry.nbytes,
            }
            for name, entry in checkpoint.tensors.items()
        },
    }
