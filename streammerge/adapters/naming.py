"""Names of adapter tensors: what each is, and which module it belongs to.

Three dialects are in circulation: PEFT's, diffusers' (two generations) and kohya's. Every name is
either understood whole or handed back, so that nothing in a file is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from streammerge.adapters.types import Naming

PEFT_PREFIX = "base_model.model."


class Role(StrEnum):
    """What a tensor is for in its module."""

    DOWN = "A"
    """The factor that is applied first."""
    UP = "B"
    """The factor that is applied second."""
    EMBEDDING_DOWN = "embedding A"
    """The same for an embedding."""
    EMBEDDING_UP = "embedding B"
    """The same for an embedding."""
    UP_BIAS = "bias of B"
    """Bias of the second factor."""
    MAGNITUDE = "DoRA magnitude"
    """Norm per output."""
    ALPHA = "alpha"
    """Scalar; the scaling is alpha / rank."""
    VECTOR = "IA3 vector"
    """What IA3 multiplies by."""
    TOKENS = "token rows"
    """Rows of an embedding."""
    BASE = "base tensor"
    """A tensor of the base itself, which replaces it."""
    SAVED = "saved module"
    """A tensor of a module that was trained whole; :attr:`Parsed.stem` is its full name."""
    PLAIN = "plain"
    """Has none of the marks; the configuration tells whether it is a trained module's."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What the name of a tensor says."""

    role: Role
    """What it is for."""
    stem: str
    """The module's path; for SAVED, BASE and PLAIN the tensor's whole name in the base."""
    adapter: str | None = None
    """The adapter's name, which dumps of a model in memory leave inside."""


def recognise_naming(names: Iterable[str]) -> Naming | None:
    """Return whose names these are; None when they could be no adapter's."""
    found = None
    for name in names:
        if name.startswith(PEFT_PREFIX):
            return Naming.PEFT
        # Every name below has one of these; models of 50,000 tensors come through here.
        if "lora" not in name and ".ia3_l" not in name:
            continue
        if re.match(r"lora_(unet|te\d?|transformer)_", name) or name.endswith(_KOHYA_ENDINGS):
            return Naming.KOHYA
        if found is None and (_MARKS.search(name) or _DIFFUSERS_OLD.search(name)):
            found = Naming.DIFFUSERS
    return found


def parse_peft_name(name: str) -> Parsed:
    """Return what a tensor of PEFT's naming is; its prefix may be missing."""
    rest = _unwrapped(name.removeprefix(PEFT_PREFIX))
    for role, pattern in _PEFT_ROLES:
        if found := pattern.fullmatch(rest):
            return Parsed(role, found["stem"], found.groupdict().get("adapter"))
    if found := _PEFT_FACTOR.fullmatch(rest):
        role = Role.UP_BIAS if found["what"] == "bias" else Role(found["side"])
        if role is Role.UP_BIAS and found["side"] != "B":
            return Parsed(Role.PLAIN, rest)
        return Parsed(role, found["stem"], found["adapter"])
    if found := _PEFT_SAVED.fullmatch(rest):
        return Parsed(Role.SAVED, f"{found['module']}.{found['tensor']}", found["adapter"])
    if found := _PEFT_BASE.fullmatch(rest):
        return Parsed(Role.BASE, f"{found['stem']}.{found['what']}")
    return Parsed(Role.PLAIN, rest)


def parse_diffusers_name(name: str) -> Parsed:
    """Return what a tensor of either generation of diffusers' naming is."""
    if found := _PEFT_FACTOR.fullmatch(name):
        role = Role.UP_BIAS if found["what"] == "bias" else Role(found["side"])
        return Parsed(role, found["stem"], found["adapter"])
    if found := _MAGNITUDE.fullmatch(name):
        return Parsed(Role.MAGNITUDE, found["stem"])
    if found := _DIFFUSERS_OLD.fullmatch(name):
        role = Role.DOWN if found["side"] == "down" else Role.UP
        layer = found["layer"]
        if layer is None:
            return Parsed(role, found["stem"])
        # The processors of old attention blocks stand for these layers beside them.
        return Parsed(role, f"{found['stem']}.{'to_out.0' if layer == 'to_out' else layer}")
    if found := re.fullmatch(r"(?P<stem>.+)\.alpha", name):
        return Parsed(Role.ALPHA, found["stem"])
    return Parsed(Role.PLAIN, name)


def parse_kohya_name(name: str) -> Parsed:
    """Return what a tensor of kohya's naming is."""
    for ending, role in _KOHYA_ROLES.items():
        if name.endswith(ending):
            return Parsed(role, name.removesuffix(ending))
    return Parsed(Role.PLAIN, name)


def foreign_variant(name: str) -> str | None:
    """Return the kind of adapter that only a tensor of this name belongs to; None for none."""
    return next((kind for mark, kind in _FOREIGN if mark in name), None)


def _unwrapped(name: str) -> str:
    """Return a name without the layers that training frameworks wrap around a model."""
    return ".".join(part for part in name.split(".") if part not in _TRAINING_WRAPPERS)


_TRAINING_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PEFT_FACTOR = re.compile(
    r"(?P<stem>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<what>weight|bias)"
)
_MAGNITUDE = re.compile(
    r"(?P<stem>.+)\.lora_magnitude_vector(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?"
)
_PEFT_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<tensor>.+)")
_PEFT_BASE = re.compile(r"(?P<stem>.+)\.base_layer\.(?P<what>weight|bias)")
_PEFT_ROLES = (
    (
        Role.EMBEDDING_DOWN,
        re.compile(r"(?P<stem>.+)\.lora_embedding_A(?:\.(?P<adapter>[^.]+))?"),
    ),
    (Role.EMBEDDING_UP, re.compile(r"(?P<stem>.+)\.lora_embedding_B(?:\.(?P<adapter>[^.]+))?")),
    (Role.MAGNITUDE, _MAGNITUDE),
    (Role.VECTOR, re.compile(r"(?P<stem>.+)\.ia3_l(?:\.(?P<adapter>[^.]+))?")),
    (
        Role.TOKENS,
        re.compile(r"(?P<stem>.+)\.token_adapter\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?"),
    ),
)
_DIFFUSERS_OLD = re.compile(
    r"(?P<stem>.+?)(?:\.processor)?\.(?:(?P<layer>to_[qkv]|to_out)_lora|lora|lora_linear_layer)"
    r"\.(?P<side>down|up)\.weight"
)
_MARKS = re.compile(r"\.lora_[AB]\.|\.lora_magnitude_vector|\.lora_embedding_[AB]|\.ia3_l")
_KOHYA_ROLES = {
    ".lora_down.weight": Role.DOWN,
    ".lora_up.weight": Role.UP,
    ".alpha": Role.ALPHA,
    ".dora_scale": Role.MAGNITUDE,
}
_KOHYA_ENDINGS = (".lora_down.weight", ".lora_up.weight")
_FOREIGN = (
    (".hada_", "a LoHa adapter (Hadamard products)"),
    (".lokr_", "a LoKr adapter (Kronecker products)"),
    (".lora_mid.", "a LoCon adapter with a middle factor (Tucker decomposition)"),
    (".lora_diag", "a KaSA adapter"),
    (".lora_E", "an AdaLoRA adapter"),
    (".ranknum", "an AdaLoRA adapter"),
    (".oft_", "an OFT adapter"),
    (".vera_", "a VeRA adapter"),
    ("prompt_embeddings", "a prompt, not an adapter of weights"),
)
