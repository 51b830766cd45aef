"""What files with tensors are called: the output keeps the names that the base's loader looks for.

    model.safetensors                            model-00001-of-00003.safetensors
    diffusion_pytorch_model.fp16.safetensors     diffusion_pytorch_model.fp16-00001-of-00003.safetensors

and for the shards ``model.safetensors.index.json``, or ``….safetensors.index.fp16.json`` of a variant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from streammerge.checkpoint.types import Checkpoint

_SUFFIX = ".safetensors"
# The count of shards may stand before the variant, as diffusers once wrote it.
_SHARD = re.compile(r"(?P<stem>.+?)-\d{1,9}-of-\d{1,9}(?P<variant>(\.\w+)?)")
_INDEX = re.compile(r"(?P<stem>.+)\.(safetensors|bin)\.index(?P<variant>(\.\w+)?)\.json")
_VARIANT = re.compile(r"(?P<stem>(diffusion_pytorch_)?model)(?P<variant>\.\w+)")
# Of files that are no safetensors, whose loaders look for another name once they are.
_AS_SAFETENSORS = (
    (re.compile(r"pytorch_model(.*)"), r"model\1"),
    (re.compile(r"open_clip_pytorch_model(.*)"), r"open_clip_model\1"),
    (re.compile(r"consolidated\.0+"), "consolidated"),
)


@dataclass(frozen=True, slots=True)
class WeightNames:
    """Names of the files with tensors of one model."""

    stem: str
    """What a single file is called, without ``.safetensors``; a variant is the end of it."""
    index: str
    """The index of several files."""

    @property
    def single(self) -> str:
        """The name of the only file."""
        return f"{self.stem}{_SUFFIX}"

    def shard(self, index: int, count: int) -> str:
        """Return the name of one of ``count`` files, counted from 0."""
        if count == 1:
            return self.single
        return f"{self.stem}-{index + 1:05d}-of-{count:05d}{_SUFFIX}"


MODEL_NAMES = WeightNames("model", "model.safetensors.index.json")
"""What transformers looks for."""


def name_weights(checkpoint: Checkpoint) -> WeightNames:
    """Return the names that an output has to take the place of this checkpoint.

    Args:
        checkpoint: The base, or the first source.

    Returns:
        Its own names. Those of PyTorch files become what their loaders call the same as safetensors,
        and shards whose names do not count them are called after their index.
    """
    stem = _stem_of(checkpoint)
    if checkpoint.files[0].path.suffix != _SUFFIX:
        for pattern, name in _AS_SAFETENSORS:
            if pattern.fullmatch(stem):
                stem = pattern.sub(name, stem)
    # A plan is refused if its files have names that cannot be printed.
    if not stem.isprintable() or "\\" in stem or ":" in stem:
        return MODEL_NAMES
    variant = _VARIANT.fullmatch(stem)
    if variant is None:
        return WeightNames(stem, f"{stem}{_SUFFIX}.index.json")
    return WeightNames(stem, f"{variant['stem']}{_SUFFIX}.index{variant['variant']}.json")


def name_single(name: str) -> WeightNames:
    """Return the names of a model that is one file called ``name``."""
    stem = name.removesuffix(_SUFFIX)
    return WeightNames(stem, f"{stem}{_SUFFIX}.index.json")


def _stem_of(checkpoint: Checkpoint) -> str:
    names = [Path(file.path.name).stem for file in checkpoint.files]
    counted = [_SHARD.fullmatch(name) for name in names]
    first = counted[0]
    if first is not None and all(
        each is not None and each.groups() == first.groups() for each in counted
    ):
        return f"{first['stem']}{first['variant']}"
    index = None if checkpoint.index_name is None else _INDEX.fullmatch(checkpoint.index_name)
    if index is not None:
        return f"{index['stem']}{index['variant']}"
    return names[0] if len(names) == 1 else MODEL_NAMES.stem
