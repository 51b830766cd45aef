"""Models of several parts in folders of their own, read as one: pipelines, and modules after a transformer.

    pipeline/model_index.json        which folders there are (diffusers)
    pipeline/unet/…  vae/…           parts with tensors
    pipeline/scheduler/…             parts without
    embedder/modules.json            which modules there are (sentence-transformers)
    embedder/model.safetensors       the transformer
    embedder/2_Dense/…               a module with tensors of its own

A tensor of a part is called after its folder, ``unet/conv_in.weight``, in plans and rules. In the output's
files, which lie in the same folders, it has its own name again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from streammerge.checkpoint.header import ParsedHeaders
from streammerge.checkpoint.inputs import (
    absolute,
    check_inside,
    is_there,
    parse_json,
    parse_path,
    read_limited,
)
from streammerge.checkpoint.reading import MAX_CONFIG_BYTES, read_sharing
from streammerge.checkpoint.types import Checkpoint, ShardFile, TensorEntry
from streammerge.errors import CheckpointError, HeaderError, RecipeError, printable, suggestion

PIPELINE_INDEX = "model_index.json"
MODULES = "modules.json"
READ_SUFFIXES = (".safetensors", ".bin")
"""Of files whose tensors are read in the folder of a part."""


def read_model(path: str | os.PathLike[str], parsed: ParsedHeaders | None = None) -> Checkpoint:
    """Return the model at ``path``, of one part or of several.

    Args:
        path: What :func:`~streammerge.checkpoint.reading.read_checkpoint` takes, or the directory of a
            pipeline of diffusers or of a model of sentence-transformers.
        parsed: Headers of other models, which are not parsed again; extended by those of this one. None
            for a model by itself.

    Returns:
        The checkpoint. Of several parts, its tensors are called after their folders, those of the
        directory itself excepted.

    Raises:
        CheckpointError: As for ``read_checkpoint``, of the model or of any part.
    """
    path = absolute(parse_path(path, "path"))
    parsed = {} if parsed is None else parsed
    folders = list_parts(path)
    if not folders:
        return read_sharing(path, parsed)
    parts = {folder: read_sharing(path / folder, parsed) for folder in folders}
    if not is_there(path / PIPELINE_INDEX) and _has_weights(path):
        # The transformer of sentence-transformers lies in the directory itself.
        parts = {"": read_sharing(path, parsed), **parts}
    return compose(path, parts)


def list_parts(path: Path) -> tuple[str, ...]:
    """Return the folders below a directory that hold tensors of the same model, sorted.

    Raises:
        CheckpointError: A folder cannot be listed, or is a link to elsewhere.
        HeaderError: The list of parts is not JSON, or names what is no folder here.
    """
    found = list_component_folders(path)
    for folder in found:
        check_inside(path / folder, path, of_what="a folder of the model")
    return tuple(folder for folder in found if _has_weights(path / folder))


def list_component_folders(path: Path) -> tuple[str, ...]:
    """Return every folder that a pipeline or a list of modules names and has, with tensors or without.

    Raises:
        HeaderError: The list of parts is not JSON, or names what is no folder here.
    """
    return tuple(each for each in _named_folders(path) if (path / each).is_dir())


def compose(path: Path, parts: Mapping[str, Checkpoint]) -> Checkpoint:
    """Return one checkpoint with the tensors of all parts.

    Args:
        path: The directory, absolute.
        parts: The parts by folder; ``""`` is the directory itself.
    """
    files: list[ShardFile] = []
    tensors: dict[str, TensorEntry] = {}
    for folder, part in parts.items():
        for entry in part.tensors.values():
            name = f"{folder}/{entry.name}" if folder else entry.name
            tensors[name] = replace(entry, name=name, file=entry.file + len(files))
        files += part.files
    root = parts.get("")
    return Checkpoint(
        path=path,
        files=tuple(files),
        tensors=tensors,
        config=None if root is None else root.config,
        index_name=None if root is None else root.index_name,
        parts=tuple(parts.items()),
    )


def fit_parts(
    model: Checkpoint, like: Checkpoint, component: str | None, *, where: str
) -> Checkpoint:
    """Return a source with the names of the first model: a part alone stands for that part of a pipeline.

    Args:
        model: The source.
        like: The base, or the first source.
        component: The folder of the part that the recipe says the source is; None for that of its
            own name.
        where: What to call the source in messages.

    Raises:
        CheckpointError: One of them is a pipeline, and the other one is no part of it that is known.
        RecipeError: There is nothing that the component could say.
    """
    folders = [folder for folder, _ in like.parts if folder]
    if folders and not model.parts:
        named = component or model.directory.name
        if named in folders:
            return compose(model.path, {named: model})
        raise CheckpointError(
            f"{where}: is one model, and the first one has the parts {', '.join(folders)}; say which "
            f"of them it is with `component`{suggestion(named, folders) if component else ''}"
        )
    parts = dict(model.parts)
    if model.parts and not like.parts:
        named = component or like.directory.name
        if named in parts:
            return parts[named]
        raise CheckpointError(
            f"{where}: has the parts {', '.join(filter(None, parts))}, and the first model is one; say "
            "which of them belongs to it with `component`, or name its folder as the path"
        )
    if component is not None:
        have = "both have the same parts" if model.parts else "neither has parts"
        raise RecipeError(
            f"{where}: component: {printable(component)}: it is a model, and so is the first one; {have}: "
            "remove the key"
        )
    return model


def _named_folders(path: Path) -> list[str]:
    """Return the folders that the list of parts in a directory names, sorted."""
    if is_there(path / PIPELINE_INDEX):
        return sorted({*_pipeline_folders(path / PIPELINE_INDEX)})
    if is_there(path / MODULES):
        return sorted({*_module_folders(path / MODULES)})
    return []


def _pipeline_folders(index: Path) -> Iterator[str]:
    document = _read_json(index)
    if not isinstance(document, dict):
        raise HeaderError(f"{index}: expected an object of parts, got {type(document).__name__}")
    for folder, value in document.items():
        # [library, class]; null for a part that the pipeline does without.
        if not folder.startswith("_") and isinstance(value, list) and value[:1] not in ([], [None]):
            yield _plain(index, folder)


def _module_folders(modules: Path) -> Iterator[str]:
    document = _read_json(modules)
    for module in document if isinstance(document, list) else ():
        folder = module.get("path") if isinstance(module, dict) else None
        if isinstance(folder, str) and folder:
            yield _plain(modules, folder)


def _plain(index: Path, folder: str) -> str:
    if folder in {".", ".."} or not folder.isprintable() or set(folder) & set("/\\:"):
        raise HeaderError(f"{index}: {folder!r} is not the name of a folder beside it")
    return folder


def _has_weights(directory: Path) -> bool:
    try:
        with os.scandir(directory) as entries:
            return any(entry.name.endswith(READ_SUFFIXES) for entry in entries)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed: {error.strerror}") from error


def _read_json(path: Path) -> object:
    raw = read_limited(path, MAX_CONFIG_BYTES)
    return parse_json(raw, where=str(path), parse_constant=float, object_pairs_hook=dict)
