"""A checkpoint on disk, found by its usual file names and read by its headers.

Accepts what transformers and diffusers write: one file, or shards with an index, as safetensors or
as PyTorch zip files. Holds headers, one index and one config; no tensor byte is read.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

from streammerge.checkpoint.header import read_safetensors_header
from streammerge.checkpoint.inputs import (
    absolute,
    check_inside,
    is_there,
    open_input,
    parse_json_object,
    parse_path,
    read_exactly,
    refuse_constant,
    refuse_foreign,
)
from streammerge.checkpoint.torchfile import read_torch_header
from streammerge.checkpoint.types import Checkpoint, ShardFile, TensorEntry
from streammerge.errors import (
    CheckpointError,
    HeaderError,
    MissingTensorError,
    printable,
)
from streammerge.limits import name_limit

MAX_INDEX_BYTES = 100_000_000
"""As long as the longest safetensors header, which names as many tensors."""
MAX_CONFIG_BYTES = 16 * 2**20
"""A thousand times a large config; beyond it the file is something else."""

_SAFETENSORS_STEMS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_TORCH_STEMS = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
_INDEX_SUFFIX = ".index.json"
# Diffusers puts the variant inside: diffusion_pytorch_model.safetensors.index.fp16.json.
_SAFETENSORS_INDEX = re.compile(r".*\.safetensors\.index(\.\w+)?\.json")
_SHARD_OF_MANY = re.compile(r".*-\d+-of-0*([2-9]|[1-9]\d+)(\.\w+)?")
_MAX_NAMES_SHOWN = 10

_Reader = Callable[[Path, int], tuple[ShardFile, list[TensorEntry]]]


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Return the checkpoint at ``path``: every tensor's place, from headers only.

    A directory may hold ``model.safetensors``, or shards and ``model.safetensors.index.json``, the
    same below diffusers' name, exactly one file ``*.safetensors``, or ``pytorch_model.bin`` with or
    without an index. Safetensors win over PyTorch files, as in transformers.

    Args:
        path: A directory, one file with tensors, or the index of a sharded checkpoint.

    Returns:
        The checkpoint; its config is the ``config.json`` in the directory of the tensors.

    Raises:
        CheckpointError: There is nothing to read at ``path``, or more than one thing.
        HeaderError: A header, the index or the config cannot be trusted, or they disagree.
        TruncatedShardError: A file ends before the data it declares.
        MissingTensorError: The index names a tensor that its shard lacks.
        UnsupportedDTypeError: A tensor has a dtype that is not known.
    """
    path = absolute(parse_path(path, "path"))
    try:
        is_directory = stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"{path}: {why}; name a directory or a file with tensors") from error
    chosen = _choose_file(path) if is_directory else path
    if chosen.suffix == ".json":
        files, entries = _read_sharded(chosen)
    else:
        shard, entries = _reader_of(chosen)(chosen, 0)
        files = [shard]
    return Checkpoint(
        path=path,
        files=tuple(files),
        tensors={entry.name: entry for entry in entries},
        config=_read_config(chosen.parent / "config.json"),
    )


def _choose_file(directory: Path) -> Path:
    """Return the one file of the directory that leads to all tensors: an index or the only file."""
    # Names rather than is_file(): a link to a file that is gone must be reported, not passed over.
    try:
        names = {entry.name for entry in directory.iterdir()}
    except OSError as error:
        raise name_limit(error) or CheckpointError(
            f"{directory}: cannot be listed: {error.strerror}"
        ) from error
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{directory}: holds an adapter (adapter_config.json), which is no model by itself; name "
            "it under `sources`, and the model that it was trained on as `base`"
        )
    for stems in (_SAFETENSORS_STEMS, _TORCH_STEMS):
        known = [name for stem in stems for name in (stem, stem + _INDEX_SUFFIX) if name in names]
        if known:
            return directory / _only(directory, known, "of the same checkpoint")
        if stems is _SAFETENSORS_STEMS:
            indexes = sorted(name for name in names if _SAFETENSORS_INDEX.fullmatch(name))
            if indexes:
                return directory / _only(directory, indexes, "with an index")
            singles = sorted(name for name in names if name.endswith(".safetensors"))
            if singles:
                return directory / _only_single(directory, singles)
    looked_for = [name for stem in _SAFETENSORS_STEMS for name in (stem, stem + _INDEX_SUFFIX)]
    looked_for += ["one file *.safetensors"]
    looked_for += [name for stem in _TORCH_STEMS for name in (stem, stem + _INDEX_SUFFIX)]
    raise CheckpointError(
        f"{directory}: no checkpoint among {len(names)} files; looked for {', '.join(looked_for)}"
    )


def _only(directory: Path, names: list[str], what: str) -> str:
    if len(names) != 1:
        raise CheckpointError(
            f"{directory}: expected 1 set of weights {what}, found {len(names)}: "
            f"{_listed(names)}; name one file, or move the others away"
        )
    return names[0]


def _only_single(directory: Path, names: list[str]) -> str:
    for name in names:
        if _SHARD_OF_MANY.fullmatch(name.removesuffix(".safetensors")):
            raise CheckpointError(
                f"{directory}: {name} is one shard of several and no index "
                f"{_SAFETENSORS_STEMS[0]}{_INDEX_SUFFIX} is there; copy the index and all shards"
            )
    return _only(directory, names, "without an index")


def _reader_of(path: Path) -> _Reader:
    """Return the function that reads files of this name."""
    if path.suffix == ".safetensors":
        return _read_safetensors
    if path.suffix in {".bin", ".pt", ".pth"}:
        return _read_torch
    raise CheckpointError(
        f"{path}: unknown kind of file {path.suffix!r}; expected a directory, .safetensors, .bin, "
        ".pt or .pth"
    )


def _read_safetensors(path: Path, file_index: int) -> tuple[ShardFile, list[TensorEntry]]:
    return read_safetensors_header(path, file_index=file_index)


def _read_torch(path: Path, file_index: int) -> tuple[ShardFile, list[TensorEntry]]:
    return read_torch_header(path, file_index=file_index)


def _read_sharded(index: Path) -> tuple[list[ShardFile], list[TensorEntry]]:
    """Return the files and tensors of a sharded checkpoint, which agree with its index."""
    weight_map = _read_weight_map(index)
    names = sorted(set(weight_map.values()))
    for name in names:
        _check_shard_name(index, name)
    absent = [name for name in names if not is_there(index.parent / name)]
    if absent:
        raise HeaderError(
            f"{index}: index names {len(names)} shards, {len(absent)} are not there: "
            f"{_listed(absent)}; copy them again"
        )
    files: list[ShardFile] = []
    entries: list[TensorEntry] = []
    for file_index, name in enumerate(names):
        shard_path = index.parent / name
        shard, shard_entries = _reader_of(shard_path)(shard_path, file_index)
        files.append(shard)
        entries += shard_entries
    _check_index(index, weight_map, names, entries)
    return files, entries


def _read_weight_map(index: Path) -> dict[str, str]:
    """Return the file name of each tensor."""
    content = parse_json_object(
        _read_small(index, MAX_INDEX_BYTES), where=str(index), parse_constant=refuse_constant
    )
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError(
            f"{index}: weight_map: expected an object with at least 1 tensor, got "
            f"{'an empty one' if weight_map == {} else type(weight_map).__name__}; copy it again"
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


def _check_index(
    index: Path, weight_map: dict[str, str], shards: list[str], entries: list[TensorEntry]
) -> None:
    """Return if index and headers name the same tensors in the same shards, each once."""
    found: dict[str, str] = {}
    for entry in entries:
        shard = shards[entry.file]
        if entry.name in found:
            raise HeaderError(
                f"{index}: tensor {entry.name!r} is in 2 shards: {found[entry.name]} and {shard}; "
                "copy the checkpoint again"
            )
        found[entry.name] = shard
    missing = sorted(weight_map.keys() - found.keys())
    if missing:
        raise MissingTensorError(
            f"{index}: index names {len(weight_map)} tensors, {len(missing)} are in no shard: "
            f"{_listed(missing)}; copy the checkpoint again"
        )
    extra = sorted(found.keys() - weight_map.keys())
    if extra:
        raise HeaderError(
            f"{index}: shards hold {len(found)} tensors, {len(extra)} are not in the index: "
            f"{_listed(extra)}; copy the checkpoint again"
        )
    for name, shard in found.items():
        if shard != weight_map[name]:
            raise HeaderError(
                f"{index}: tensor {name!r} is in {shard}, the index says {weight_map[name]}; copy "
                "the checkpoint again"
            )


def _read_config(path: Path) -> dict[str, object] | None:
    if not path.is_symlink() and not is_there(path):
        return None
    # float: Python programs write Infinity here, as the time step limits of Mamba models.
    return parse_json_object(
        _read_small(path, MAX_CONFIG_BYTES), where=str(path), parse_constant=float
    )


def _read_small(path: Path, limit: int) -> bytes:
    """Return the content of a text file of at most ``limit`` bytes."""
    with open_input(path) as (stream, status):
        if status.st_size > limit:
            raise HeaderError(f"{path}: has {status.st_size} bytes, the limit is {limit}")
        raw = read_exactly(stream, status.st_size, path=path)
    refuse_foreign(path, raw[:64])
    return raw


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(printable, names[:_MAX_NAMES_SHOWN]))
    more = len(names) - _MAX_NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
