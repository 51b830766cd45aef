"""Files that no library would write for a test: any dtype, any bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

RawTensor = tuple[str, Sequence[int], bytes]
"""Dtype by its safetensors name, shape, and data."""


def write_shard(path: Path, tensors: Mapping[str, RawTensor]) -> Path:
    """Write one safetensors file, byte for byte as given, and return ``path``."""
    header: dict[str, object] = {}
    cursor = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [cursor, cursor + len(data)],
        }
        cursor += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path
