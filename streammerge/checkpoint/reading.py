"""A checkpoint on disk, found by its usual file names and read by its headers.

Accepts what transformers and diffusers write: one file, or shards with an index, as safetensors or
as PyTorch zip files. Holds headers, one index and one config; no tensor byte is read.
"""

from __future__ import annotations

import os
import re
import stat
from functools import partial
from pathlib import Path

from streammerge.checkpoint.dequantising import gguf_advice
from streammerge.checkpoint.header import ParsedHeaders, read_safetensors_header
from streammerge.checkpoint.indexes import read_indexed
from streammerge.checkpoint.inputs import (
    absolute,
    is_there,
    listed,
    parse_config,
    parse_path,
    read_small,
)
from streammerge.checkpoint.misplaced import explain_absence
from streammerge.checkpoint.torchfile import read_torch_header
from streammerge.checkpoint.types import Checkpoint, ShardFile, TensorEntry
from streammerge.errors import CheckpointError, QuantizedCheckpointError
from streammerge.limits import name_limit

MAX_CONFIG_BYTES = 16 * 2**20
"""A thousand times a large config; beyond it the file is something else."""

_SAFETENSORS_STEMS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_TORCH_STEMS = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
_INDEX_SUFFIX = ".index.json"
TORCH_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt"})
"""What people call the files of torch.save; all are the same zip."""
# Diffusers puts the variant inside: diffusion_pytorch_model.safetensors.index.fp16.json.
_SAFETENSORS_INDEX = re.compile(r".*\.safetensors\.index(\.\w+)?\.json")
_SHARD_OF_MANY = re.compile(r".*-\d+-of-0*([2-9]|[1-9]\d+)(\.\w+)?")


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
        QuantizedCheckpointError: It is a GGUF file.
        UnsupportedDTypeError: A tensor has a dtype that is not known.
    """
    return read_sharing(path, {})


def read_sharing(path: str | os.PathLike[str], parsed: ParsedHeaders) -> Checkpoint:
    """Return the checkpoint at ``path`` as :func:`read_checkpoint` does.

    Args:
        path: As there.
        parsed: Headers of other models, which are not parsed again; extended by those of this one.
    """
    path = absolute(parse_path(path, "path"))
    try:
        is_directory = stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"{path}: {why}; name a directory or a file with tensors") from error
    chosen = _choose_file(path) if is_directory else path
    notes: list[str] = []
    if chosen.suffix == ".json":
        files, entries = read_indexed(chosen, partial(read_file, parsed=parsed), notes)
    else:
        shard, entries = read_file(chosen, 0, parsed=parsed)
        files = [shard]
    config = _read_config(chosen.parent / "config.json", notes)
    return Checkpoint(
        path=path,
        files=tuple(files),
        tensors={entry.name: entry for entry in entries},
        config=config,
        notes=tuple(notes),
        index_name=chosen.name if chosen.suffix == ".json" else None,
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
    raise CheckpointError(explain_absence(directory, names))


def _only(directory: Path, names: list[str], what: str) -> str:
    if len(names) != 1:
        raise CheckpointError(
            f"{directory}: expected 1 set of weights {what}, found {len(names)}: "
            f"{listed(names)}; name one file, or move the others away"
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


def read_file(
    path: Path, file_index: int, *, parsed: ParsedHeaders
) -> tuple[ShardFile, list[TensorEntry]]:
    """Return one file's identity and its tensors, read as its name says.

    Args:
        path: The file, absolute.
        file_index: What :attr:`TensorEntry.file` will hold.
        parsed: As for :func:`read_sharing`.

    Raises:
        CheckpointError: Files of this name are not read, or this one cannot be; as
            :func:`read_checkpoint`.
    """
    if path.suffix == ".safetensors":
        return read_safetensors_header(path, file_index=file_index, parsed=parsed)
    if path.suffix in TORCH_SUFFIXES:
        return read_torch_header(path, file_index=file_index)
    if path.suffix == ".gguf":
        raise QuantizedCheckpointError(f"{path}: {gguf_advice(path)}")
    raise CheckpointError(
        f"{path}: unknown kind of file {path.suffix!r}; expected a directory, .safetensors, .bin, "
        ".pt, .pth or .ckpt"
    )


def check_whole(checkpoint: Checkpoint) -> None:
    """Return if the checkpoint is all of a model, and not the one file of several that was named.

    Raises:
        CheckpointError: The file is called like a shard of many.
    """
    path = checkpoint.path
    if (
        len(checkpoint.files) == 1
        and checkpoint.files[0].path == path
        and _SHARD_OF_MANY.fullmatch(path.stem)
    ):
        raise CheckpointError(
            f"{path}: is one shard of several by its name, and the others' tensors would be missing in the "
            f"result; name the directory, {path.parent}, or the index in it; a file that is complete by itself "
            "can be given another name"
        )


def check_gathered(checkpoint: Checkpoint) -> None:
    """Return if the weights are whole, and not what is left of them on one of many devices.

    Raises:
        CheckpointError: Weights have the shape [0]. A model has no such weight.
    """
    empty = [
        name
        for name, entry in checkpoint.tensors.items()
        if entry.shape == (0,) and name.rpartition(".")[2] in {"weight", "bias"}
    ]
    if empty:
        raise CheckpointError(
            f"{checkpoint.path}: {len(empty)} weights have shape [0]: {listed(empty)}. That is what "
            "a save under DeepSpeed ZeRO-3 leaves when the shards were not gathered; run the "
            "`zero_to_fp32.py` that lies in the training's checkpoint (python zero_to_fp32.py . OUT "
            "--safe_serialization), or save again with "
            "`stage3_gather_16bit_weights_on_model_save: true`"
        )


def _read_config(path: Path, notes: list[str]) -> dict[str, object] | None:
    if not path.is_symlink() and not is_there(path):
        return None
    config, twice = parse_config(read_small(path, MAX_CONFIG_BYTES), where=str(path))
    if twice:
        notes.append(f"{path.name}: of equal keys the last one is taken: {listed(list(twice))}")
    return config
