"""Parts of a pipeline that one raw file adapts: the denoiser and the text encoders.

diffusers puts the part before every name, ``text_encoder_2.X``; kohya's scripts a mark of their own,
``lora_te2_X``. A base is one part, or a single file that holds them all.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from streammerge.adapters.files.reading import read_adapter
from streammerge.adapters.files.types import Adapter, Naming
from streammerge.errors import RecipeError, naming_source, printable, suggestion
from streammerge.recipe.types import Source

_KOHYA = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
# ComfyUI's, and LyCORIS' for whatever model it is used on by itself.
_MARKS = {
    "diffusion_model.": "transformer",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
    "lycoris_": "",
}
_DIFFUSERS = frozenset({"unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"})


def split_component(stem: str, naming: Naming) -> tuple[str, str]:
    """Return the part that a module belongs to, and its path there; the part may be empty."""
    if naming is not Naming.PEFT:
        for mark, component in _MARKS.items():
            if stem.startswith(mark):
                return component, stem.removeprefix(mark)
    if naming is Naming.KOHYA:
        for mark, component in _KOHYA.items():
            if stem.startswith(mark):
                return component, stem.removeprefix(mark)
    if naming is Naming.DIFFUSERS:
        component, _, path = stem.partition(".")
        if component in _DIFFUSERS:
            return component, path
    return "", stem


def read_named(source: Source, label: str) -> Adapter:
    """Return the adapter that a recipe names, or the part of it that the recipe asks for.

    Args:
        source: The source.
        label: Its place in the recipe, for messages.

    Raises:
        RecipeError: It has no such part.
        CheckpointError: It is not what an adapter should be.
    """
    with naming_source(label):
        adapter = read_adapter(source.path)
        return _choose_component(adapter, source.component, where=f"{label} ({source.path})")


def _choose_component(adapter: Adapter, component: str | None, *, where: str) -> Adapter:
    """Return an adapter with the modules of one part only; None keeps everything."""
    if component is None:
        return adapter
    parts = Counter(split_component(stem, adapter.naming)[0] for stem in adapter.stems)
    if component not in parts:
        known = sorted(filter(None, parts))
        has = f"has {', '.join(known)}" if known else "has no parts, it adapts one model"
        raise RecipeError(
            f"{where}: component: {printable(component)}: the adapter {has}"
            f"{suggestion(component, known) if known else '; remove the key'}"
        )

    def is_kept(stem: str) -> bool:
        return split_component(stem, adapter.naming)[0] == component

    return replace(
        adapter,
        modules=tuple(each for each in adapter.modules if is_kept(each.stem)),
        formed=tuple(each for each in adapter.formed if is_kept(each.stem)),
    )
