"""What safetensors files say about themselves beside their tensors: ``__metadata__`` in the header.

Single-file models carry their configuration there, and ``modelspec.*`` with titles and licences. All of
it goes to the output, but for what a merge makes untrue: digests of the tensors.

Memory: one header, at most 100 MB, and its parsed form where the entry does not come first in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from streammerge.checkpoint.inputs import (
    open_input,
    parse_json_object,
    read_exactly,
    refuse_constant,
)

FORMAT = ("format", "pt")
"""Which library the tensors are for; transformers loads no file that does not say."""
Metadata = tuple[tuple[str, str], ...]
"""Keys and values, sorted by key."""

_KEY = "__metadata__"
_LENGTH_BYTES = 8
# modelspec.hash_sha256, sshs_model_hash, sshs_legacy_hash; what kohya's trainer wrote about the models
# that it began with (ss_sd_model_hash) stays true.
_DIGEST = re.compile(r"(?!ss_)(.*[._-])?(hash|sha\d+|md5|crc32|blake\w*|checksum|digest)([._-].*)?")
_SIZES = frozenset({"total_size", "total_parameters"})


def read_metadata(
    files: Sequence[Path], *, dequantised: bool = False
) -> tuple[Metadata, tuple[str, ...]]:
    """Return what all files of a checkpoint say about themselves, and what of it a merge makes untrue.

    Args:
        files: The files with tensors; of those that are no safetensors nothing is known.
        dequantised: Whether the result is no longer of codes, whatever the headers say of them.

    Returns:
        Keys and values for the output's header, ``format`` among them, and the sorted keys that are
        left out: digests and sizes by their names, and what the files do not agree about.

    Raises:
        CheckpointError: A file cannot be read.
        HeaderError: A header is not JSON.
    """
    said = [_read_one(path) for path in files]
    common = dict(said[0].items() & set.intersection(*({*each.items()} for each in said)))
    kept = {
        key: value
        for key, value in common.items()
        if not (_is_stale(key) or (dequantised and "quantization" in key.lower()))
    }
    left_out = {key for each in said for key in each if key not in kept}
    return tuple(sorted({FORMAT[0]: FORMAT[1], **kept}.items())), tuple(sorted(left_out))


def _is_stale(key: str) -> bool:
    return key.lower() in _SIZES or _DIGEST.fullmatch(key.lower()) is not None


def _read_one(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {}
    with open_input(path) as (stream, status):
        nbytes = int.from_bytes(read_exactly(stream, _LENGTH_BYTES, path=path), "little")
        raw = read_exactly(stream, min(nbytes, status.st_size), path=path)
    found = _find_first(raw)
    if found is None:
        if _KEY.encode() not in raw and b"\\u" not in raw:
            return {}
        header = parse_json_object(raw, where=f"{path}: header", parse_constant=refuse_constant)
        found = header.get(_KEY)
    if not isinstance(found, dict):
        return {}
    return {str(key): value for key, value in found.items() if isinstance(value, str)}


def _find_first(raw: bytes) -> object | None:
    """Return the entry where it comes first, as most programs write it; None where it does not."""
    begin = re.match(rb'\s*\{\s*"__metadata__"\s*:\s*(?=\{)', raw)
    if begin is None:
        return None
    # No longer than the first tensor's place: the entry ends before that.
    try:
        value, _ = json.JSONDecoder().raw_decode(raw[begin.end() :].decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
