"""Names of adapter tensors: what each is, and which module it belongs to.

Three dialects are in circulation: PEFT's, diffusers' (two generations) and kohya's. Every name is
either understood whole or handed back, so that nothing in a file is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from streammerge.adapters.files.roles import Role
from streammerge.adapters.files.types import Naming

PEFT_PREFIX = "base_model.model."
SHARED_STEM = ""
"""Where tensors are kept that belong to no module but to all."""


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
    known = None
    for name in names:
        if name.startswith(PEFT_PREFIX):
            return Naming.PEFT
        # Every name below has one of these; models of 50,000 tensors come through here.
        if not _HINTS.search(name):
            continue
        if found := _LOWER.search(name):
            return Naming.MLX if found["what"] is None else Naming.TORCHTUNE
        if _KOHYA_PREFIX.match(name) or name.endswith(_KOHYA_ENDINGS):
            return Naming.KOHYA
        dotted = _MARKS.search(name) or _DIFFUSERS_OLD.search(name) or _COMFY_DIFFERENCE.match(name)
        if known is None and dotted:
            known = Naming.DIFFUSERS
    return known


def may_name_adapters(raw: bytes) -> bool:
    """Return whether a header may hold a name of an adapter's tensor; False tells for certain.

    Args:
        raw: The JSON of a header, unparsed.
    """
    # Only an escape could hide a name.
    return b"\\u" in raw or _RAW_HINTS.search(raw) is not None


def parse_peft_name(name: str) -> Parsed:
    """Return what a tensor of PEFT's naming is; its prefix may be missing."""
    rest = _unwrapped(name.removeprefix(PEFT_PREFIX))
    for role, pattern in _PEFT_ROLES:
        if found := pattern.fullmatch(rest):
            return Parsed(role, found["stem"], found.groupdict().get("adapter"))
    if found := _PEFT_OTHER.fullmatch(rest):
        return Parsed(_PEFT_OTHER_ROLES[found["what"]], found["stem"], found["adapter"])
    if found := _PEFT_SHARED.fullmatch(name):
        return Parsed(_PEFT_SHARED_ROLES[found["what"]], SHARED_STEM, found["adapter"])
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


def parse_lower_name(name: str) -> Parsed:
    """Return what a tensor of mlx-lm's naming is, or of torchtune's, which is a layer's inside."""
    if found := _LOWER.search(name):
        return Parsed(Role.DOWN if found["side"] == "a" else Role.UP, name[: found.start()])
    for ending in (".m", ".magnitude"):
        if name.endswith(ending) and name != ending:
            return Parsed(Role.MAGNITUDE, name.removesuffix(ending))
    return Parsed(Role.PLAIN, name)


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
    return _parse_ending(name, _KOHYA_ROLES | LYCORIS_ROLES)


def parse_kohya_name(name: str) -> Parsed:
    """Return what a tensor of kohya's naming is, or of LyCORIS' after it."""
    return _parse_ending(name, _KOHYA_ROLES | LYCORIS_ROLES)


def _parse_ending(name: str, endings: Mapping[str, Role]) -> Parsed:
    for ending, role in endings.items():
        if name.endswith(ending) and name != ending:
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
_MARKS = re.compile(
    r"\.lora_[AB]\.|\.lora_magnitude_vector|\.lora_embedding_[AB]|\.ia3_l"
    r"|\.(?:lokr_w[12](?:_[ab])?|lokr_t2|hada_w[12]_[ab]|hada_t[12])$"
)
_LOWER = re.compile(r"(?<=.)\.lora_(?P<side>[ab])(?P<what>\.weight)?$")
_HINTS = re.compile(r"lora|lycoris_|ia3_l|lokr_|hada_|\.diff|\.a1\.weight$")
_RAW_HINTS = re.compile(
    _HINTS.pattern.replace("$", '"').encode() + b"|" + re.escape(PEFT_PREFIX).encode()
)
_KOHYA_PREFIX = re.compile(r"(?:lora_(?:unet|te\d?|transformer)|lycoris)_")
# Models have parts of these names too, but not in such a place.
_COMFY_DIFFERENCE = re.compile(r"diffusion_model\..+\.(?:diff|diff_b|a1\.weight)$")
_KOHYA_ROLES = {
    ".lora_down.weight": Role.DOWN,
    ".lora_up.weight": Role.UP,
    ".alpha": Role.ALPHA,
    ".dora_scale": Role.MAGNITUDE,
}
_KOHYA_ENDINGS = (".lora_down.weight", ".lora_up.weight")
LYCORIS_ROLES = {
    ".lora_mid.weight": Role.MIDDLE,
    ".lokr_w1": Role.LOKR_1,
    ".lokr_w1_a": Role.LOKR_1A,
    ".lokr_w1_b": Role.LOKR_1B,
    ".lokr_w2": Role.LOKR_2,
    ".lokr_w2_a": Role.LOKR_2A,
    ".lokr_w2_b": Role.LOKR_2B,
    ".lokr_t2": Role.LOKR_T,
    ".hada_w1_a": Role.LOHA_1A,
    ".hada_w1_b": Role.LOHA_1B,
    ".hada_w2_a": Role.LOHA_2A,
    ".hada_w2_b": Role.LOHA_2B,
    ".hada_t1": Role.LOHA_1T,
    ".hada_t2": Role.LOHA_2T,
    ".a1.weight": Role.GLORA_A1,
    ".a2.weight": Role.GLORA_A2,
    ".b1.weight": Role.GLORA_B1,
    ".b2.weight": Role.GLORA_B2,
    ".diff": Role.DIFFERENCE,
    ".w_norm": Role.DIFFERENCE,
    ".diff_b": Role.BIAS_DIFFERENCE,
    ".b_norm": Role.BIAS_DIFFERENCE,
    ".dora_scale": Role.MAGNITUDE,
    ".alpha": Role.ALPHA,
}
"""Endings of the names of LyCORIS, which ComfyUI reads too, after a module's path in either spelling."""
_PEFT_OTHER_ROLES = {
    "lokr_w1": Role.LOKR_1,
    "lokr_w1_a": Role.LOKR_1A,
    "lokr_w1_b": Role.LOKR_1B,
    "lokr_w2": Role.LOKR_2,
    "lokr_w2_a": Role.LOKR_2A,
    "lokr_w2_b": Role.LOKR_2B,
    "lokr_t2": Role.LOKR_T,
    "hada_w1_a": Role.LOHA_1A,
    "hada_w1_b": Role.LOHA_1B,
    "hada_w2_a": Role.LOHA_2A,
    "hada_w2_b": Role.LOHA_2B,
    "hada_t1": Role.LOHA_1T,
    "hada_t2": Role.LOHA_2T,
    "oft_R": Role.ROTATION,
    "oft_embedding_R": Role.EMBEDDING_ROTATION,
    "boft_R": Role.BUTTERFLY,
    "boft_s": Role.ROW_SCALE,
    "hra_u": Role.REFLECTIONS,
    "vera_lambda_b": Role.SCALE_UP,
    "vera_lambda_d": Role.SCALE_DOWN,
    "vblora_logits_A": Role.LOGITS_DOWN,
    "vblora_logits_B": Role.LOGITS_UP,
    "vblora_logits_A_topk_indices": Role.INDICES_DOWN,
    "vblora_logits_B_topk_indices": Role.INDICES_UP,
    "vblora_logits_A_topk_weights": Role.WEIGHTS_DOWN,
    "vblora_logits_B_topk_weights": Role.WEIGHTS_UP,
}
_PEFT_SHARED_ROLES = {
    "vera_A": Role.SHARED_DOWN,
    "vera_B": Role.SHARED_UP,
    "vblora_vector_bank": Role.BANK,
}
_PEFT_OTHER = re.compile(
    rf"(?P<stem>.+)\.(?P<what>{'|'.join(_PEFT_OTHER_ROLES)})"
    r"(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?"
)
_PEFT_SHARED = re.compile(
    rf"(?:base_model\.)?(?P<what>{'|'.join(_PEFT_SHARED_ROLES)})(?:\.(?P<adapter>[^.]+))?"
)
_FOREIGN = (
    (".lora_diag", "a KaSA adapter"),
    (".adapter.linear_in.", "an adapter of NeMo, whose alpha is not in the file,"),
    (".lora_E", "an AdaLoRA adapter"),
    (".ranknum", "an AdaLoRA adapter"),
    (".oft_blocks", "an OFT adapter as LyCORIS or kohya's scripts write it"),
    (".oft_diag", "an OFT adapter as kohya's scripts write it"),
    ("prompt_embeddings", "a prompt, not an adapter of weights"),
)
