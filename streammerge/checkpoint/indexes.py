"""A sharded checkpoint: an index that says in which file each tensor is, and those files.

The index is the authority. Where it and the headers disagree, what it says is done as far as it can
be done, and a note says so: other programs load such checkpoints too, and not all in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

from streammerge.checkpoint.inputs import (
    check_inside,
    is_there,
    listed,
    parse_json_object,
    read_small,
    refuse_constant,
)
from streammerge.checkpoint.types import ShardFile, TensorEntry
from streammerge.errors import HeaderError

MAX_INDEX_BYTES = 100_000_000
"""As long as the longest safetensors header, which names as many tensors."""

ReadFile = Callable[[Path, int], tuple[ShardFile, list[TensorEntry]]]
"""Reads the header of the file at a path, whose number is the second argument."""


def read_indexed(
    index: Path, read_file: ReadFile, notes: list[str]
) -> tuple[list[ShardFile], list[TensorEntry]]:
    """Return the files and tensors of a sharded checkpoint, each tensor once.

    Args:
        index: The index file.
        read_file: Reads one shard.
        notes: Extended by a sentence for each way in which index and headers disagree.

    Returns:
        The shards that the index names, sorted by name, and the tensors that it names.

    Raises:
        HeaderError: The index cannot be trusted, a shard is not there, or none of the tensors is.
        CheckpointError: A shard cannot be read.
    """
    weight_map = _read_weight_map(index)
    names = sorted(set(weight_map.values()))
    for name in names:
        _check_shard_name(index, name)
    absent = [name for name in names if not is_there(index.parent / name)]
    if absent:
        raise HeaderError(
            f"{index}: index names {len(names)} shards, {len(absent)} are not there: "
            f"{listed(absent)}; copy them again"
        )
    files: list[ShardFile] = []
    entries: list[TensorEntry] = []
    for file_index, name in enumerate(names):
        shard, shard_entries = read_file(index.parent / name, file_index)
        files.append(shard)
        entries += shard_entries
    return files, _settle(index, weight_map, names, entries, notes)


def _said_of(value: object) -> str:
    if value is None:
        return "nothing"
    return "an empty one" if value == {} else type(value).__name__


def _read_weight_map(index: Path) -> dict[str, str]:
    """Return the file name of each tensor."""
    content = parse_json_object(
        read_small(index, MAX_INDEX_BYTES), where=str(index), parse_constant=refuse_constant
    )
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError(
            f"{index}: is no index of shards: weight_map: expected an object with at least 1 tensor, got "
            f"{_said_of(weight_map)}; name the directory, or copy the index again"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise HeaderError(
                f"{index}: weight_map: {name!r}: expected a file name, got {type(shard).__name__}"
            )
    return weight_map


def _check_shard_name(index: Path, name: str) -> None:
    """Return if the name stays in the directory, and so do the folders it goes through.

    The file itself may be a link to anywhere: the Hugging Face cache is made of such links, and large
    models lie on several disks. Nothing but tensors is ever taken from it.
    """
    # Both kinds of path, so that a drive letter or a backslash never means two different files.
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if (
        not name
        # A name with control characters, or one that is not Unicode, cannot stand in a manifest.
        or not name.isprintable()
        or "\\" in name
        or windows.drive
        or posix.is_absolute()
        or ".." in posix.parts
        or str(posix) != name
    ):
        raise HeaderError(
            f"{index}: weight_map: shard name {name!r} is not a plain path inside the directory; "
            "do not use this index"
        )
    if posix.parent != PurePosixPath():
        check_inside((index.parent / name).parent, index.parent, of_what="a folder in the index")


def _settle(
    index: Path,
    weight_map: dict[str, str],
    shards: list[str],
    entries: list[TensorEntry],
    notes: list[str],
) -> list[TensorEntry]:
    """Return the tensors that the index names, from the shard that it names where there are two."""
    chosen: dict[str, TensorEntry] = {}
    copies: dict[str, int] = {}
    unlisted: list[str] = []
    for entry in entries:
        place = weight_map.get(entry.name)
        if place is None:
            unlisted.append(entry.name)
            continue
        other = chosen.get(entry.name)
        if other is not None:
            copies[entry.name] = entry.file
        if other is None or shards[other.file] != place:
            chosen[entry.name] = entry
    absent = [name for name in weight_map if name not in chosen]
    if not chosen:
        raise HeaderError(
            f"{index}: index names {len(weight_map)} tensors, none of which is in the "
            f"{len(shards)} shards that it names: {listed(absent)}; copy the checkpoint again"
        )
    elsewhere = [
        f"{name} is in {shards[entry.file]}"
        for name, entry in chosen.items()
        if shards[entry.file] != weight_map[name]
    ]
    # transformers goes by the files, and lets the last of them win.
    otherwise = [name for name, last in copies.items() if chosen[name].file != last]
    for names, what in (
        (list(copies), "are in several shards, and read from the one that the index names"),
        (otherwise, "are read by transformers from another of their shards, the last one"),
        (elsewhere, "are not in the shard that the index names"),
        (unlisted, "are in the shards and not in the index, and left out"),
        (absent, "are in the index and in none of its shards"),
    ):
        if names:
            notes.append(f"{index.name}: {len(names)} tensor(s) {what}: {listed(names)}")
    kept = {id(entry) for entry in chosen.values()}
    return [entry for entry in entries if id(entry) in kept]
