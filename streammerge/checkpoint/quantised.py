"""Weights that are codes and need scales: recognised by what stands beside them, and refused by name.

Nobody could keep a list of all spellings of a scale. What holds for all of them: a float8 tensor has,
below the same module or the same stack, a tensor whose last name part holds ``scale`` or ``amax``.
Pure: names, dtypes and shapes only, and a time that grows with the number of tensors.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streammerge.checkpoint.dequantising import dequantising_advice
from streammerge.checkpoint.types import Checkpoint, TensorEntry
from streammerge.dtypes import DType
from streammerge.errors import QuantizedCheckpointError

_SHORT_FLOATS = frozenset(
    {DType.F8_E4M3, DType.F8_E5M2, DType.F8_E4M3FNUZ, DType.F8_E5M2FNUZ, DType.F4}
)
# No I64: indices are stored in it, weights never.
_PACKED_DTYPES = frozenset({DType.U8, DType.I8, DType.U16, DType.I16, DType.U32, DType.I32})
# U8 holds the exponents that F8_E8M0 is for, in files older than it.
_SCALE_DTYPES = frozenset({DType.F64, DType.F32, DType.F16, DType.BF16, DType.F8_E8M0, DType.U8})

_SCALE_WORDS = ("scale", "amax")
_SCALE_NAME = re.compile("|".join(_SCALE_WORDS), re.IGNORECASE)
# modelopt keeps what it knows of a weight in a module of its own: `weight_quantizer._amax`.
_QUANTIZER = re.compile(r"quantizer", re.IGNORECASE)
# Scales of what attention computes, and factors that models learn: none belongs to a weight.
_NOT_OF_WEIGHTS = re.compile(
    r"(q|k|v|kv|qk|prob\w*|softmax\w*)_scale|logit_scale|scale_shift_table|layer_?scale\w*",
    re.IGNORECASE,
)
_OF_ACTIVATIONS = re.compile(r"(^|_)(input|in|output|out|act\w*|x)(_|$)", re.IGNORECASE)
_OF_WEIGHTS = re.compile(r"weight|(^|_)w(_|$)", re.IGNORECASE)
# What torchao appends to the name of a weight whose codes a tensor holds.
_CODES_SUFFIX = "_qdata"

# Last parts of names that only packed weights have, and what packs them.
_PACKED_NAMES: dict[str, str] = {
    "qweight": "gptq or awq",
    "qzeros": "gptq or awq",
    "g_idx": "gptq",
    "absmax": "bitsandbytes",
    "nested_absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "nested_quant_map": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_packed": "compressed-tensors",
    "weight_zero_point": "compressed-tensors",
    "weight_g_idx": "compressed-tensors",
    "W_q": "hqq",
}
_BITSANDBYTES_STATE = "bitsandbytes__"


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """A tensor of codes, and what its numbers are multiplied by."""

    weight: TensorEntry
    """The codes."""
    scale: TensorEntry | None
    """What multiplies them; None where only scales of activations are there."""
    others: tuple[TensorEntry, ...]
    """Further scales below the same module: of activations, and second ones of the weight."""


def find_scales(tensors: Mapping[str, TensorEntry]) -> dict[str, ScaledWeight]:
    """Return every tensor that holds codes with scales beside them, by name.

    Codes are float8 and F4, and integer matrices where a scale bears their name or is F8_E8M0.
    Scales are found by the last part of their name, which holds ``scale`` or ``amax``:

    ==============================  ======================================
    codes                           scales
    ==============================  ======================================
    ``X.weight``                    ``X.scale``, ``X.qscale_weight``, ``X.scale_b``, ``X.weight_scale``
    ``X._weight_qdata``             ``X._weight_scale``
    ``experts.up_proj``             ``experts.up_proj_scale_inv``, ``experts.up_proj.weight_scale``
    ``X.weight``                    ``X.weight_quantizer._amax``
    ==============================  ======================================

    A scale that bears the name of another tensor of the module is that one's. Scales of keys and
    values (``self_attn.k_scale``) are no scales of weights.

    Args:
        tensors: All tensors of a checkpoint, by name.
    """
    # Nearly all models have none, and are told by one look at all names.
    every_name = "\n".join(tensors).casefold()
    if not any(word in every_name for word in _SCALE_WORDS):
        return {}
    scales: defaultdict[str, list[tuple[str, TensorEntry]]] = defaultdict(list)
    for entry in tensors.values():
        module, _, last = entry.name.rpartition(".")
        if _is_scale(last, entry):
            parent, _, part = module.rpartition(".")
            if _QUANTIZER.search(part):
                module, last = parent, f"{part}.{last}"
            scales[module].append((last, entry))
    if not scales:
        return {}
    siblings: defaultdict[str, list[tuple[str, TensorEntry]]] = defaultdict(list)
    found: dict[str, ScaledWeight] = {}
    for entry in tensors.values():
        module, _, last = entry.name.rpartition(".")
        if module in scales and not _is_scale(last, entry):
            siblings[module].append((last.removesuffix(_CODES_SUFFIX), entry))
        elif entry.name in scales and entry.dtype in _SHORT_FLOATS | _PACKED_DTYPES:
            # A stack that is a parameter itself, with scales in a namespace of its own.
            _add(found, entry, scales[entry.name], [])
    for module, entries in siblings.items():
        _find_in_module(found, entries, scales[module])
        for _, entry in entries:
            if entry.name in scales and entry.dtype in _SHORT_FLOATS | _PACKED_DTYPES:
                _add(found, entry, scales[entry.name], [])
    return found


def check_not_quantized(checkpoint: Checkpoint) -> None:
    """Return if every tensor holds the numbers it stands for, not codes that need a scale.

    Plain float8 without scales passes, and so do integer buffers such as position ids.

    Args:
        checkpoint: What :func:`~streammerge.checkpoint.reading.read_checkpoint` returned.

    Raises:
        QuantizedCheckpointError: The config, or a tensor's name, dtype or companion, says that the
            weights are quantised.
    """
    config = checkpoint.config or {}
    sections = [("", config)]
    sections += [(f"{key}.", value) for key, value in config.items() if isinstance(value, dict)]
    for prefix, section in sections:
        quantization = section.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            named = method if isinstance(method, str) else "no quant_method given"
            raise QuantizedCheckpointError(
                f"{checkpoint.directory / 'config.json'}: {prefix}quantization_config says that "
                f"the weights are quantised ({named}); {dequantising_advice(named, checkpoint.directory)} "
                "(if they are already, delete the entry)"
            )
    scaled = find_scales(checkpoint.tensors)
    if not scaled and not _may_be_packed(checkpoint.tensors):
        return
    for entry in checkpoint.tensors.values():
        reason = _quantization_of(entry, checkpoint.tensors, scaled)
        if reason is not None:
            what, method = reason
            raise QuantizedCheckpointError(
                f"{checkpoint.files[entry.file].path}: tensor {entry.name!r} {what}; "
                f"{dequantising_advice(method, checkpoint.directory)}"
            )


def _is_scale(last: str, entry: TensorEntry) -> bool:
    return entry.dtype in _SCALE_DTYPES and _SCALE_NAME.search(last) is not None


def _find_in_module(
    found: dict[str, ScaledWeight],
    siblings: Sequence[tuple[str, TensorEntry]],
    scales: Sequence[tuple[str, TensorEntry]],
) -> None:
    """Add what is scaled among the tensors of one module."""
    names = {name for name, _ in siblings}
    own: defaultdict[str | None, list[tuple[str, TensorEntry]]] = defaultdict(list)
    for local, scale in scales:
        name = _named_after(local, names)
        if name is not None or not _NOT_OF_WEIGHTS.fullmatch(local):
            own[name].append((local, scale))
    codes = [(name, entry) for name, entry in siblings if entry.dtype in _SHORT_FLOATS]
    # A bias in float8 beside a matrix: what bears no name is the matrix's.
    matrices = {name for name, entry in codes if len(entry.shape) > 1}
    for name, entry in codes:
        common = own[None] if name in matrices or not matrices else []
        _add(found, entry, own[name], common)
    for name, entry in siblings:
        if entry.dtype in _PACKED_DTYPES and len(entry.shape) > 1:
            exponents = [each for each in own[None] if each[1].dtype is DType.F8_E8M0]
            _add(found, entry, own[name], exponents)


def _named_after(local: str, names: set[str]) -> str | None:
    """Return the tensor whose name the scale's begins with; the longest, None without one."""
    for mark in reversed([*re.finditer(r"[_.]", local)]):
        if local[: mark.start()] in names:
            return local[: mark.start()]
    return None


def _add(
    found: dict[str, ScaledWeight],
    weight: TensorEntry,
    own: Sequence[tuple[str, TensorEntry]],
    common: Sequence[tuple[str, TensorEntry]],
) -> None:
    """Add a weight, if any scale is there that is no larger than it."""
    ranked = []
    for is_common, scales in enumerate((own, common)):
        for local, scale in scales:
            # The scale and the bias of a layer norm, as JAX calls them, are as long as each other.
            like_bias = len(weight.shape) == 1 < weight.numel and scale.shape == weight.shape
            if scale.numel <= max(1, weight.numel) and not like_bias:
                of_activations = _OF_ACTIVATIONS.search(local) is not None
                vague = _OF_WEIGHTS.search(local) is None
                ranked.append((of_activations, is_common, vague, len(local), local, scale))
    if not ranked:
        return
    ranked.sort(key=lambda rank: rank[:-1])
    entries = [rank[-1] for rank in ranked]
    if ranked[0][0]:
        found[weight.name] = ScaledWeight(weight, None, tuple(entries))
    else:
        found[weight.name] = ScaledWeight(weight, entries[0], tuple(entries[1:]))


def _may_be_packed(tensors: Mapping[str, TensorEntry]) -> bool:
    """Return whether any name or type is one that packed weights have; False tells for certain."""
    if not _PACKED_DTYPES.isdisjoint(entry.dtype for entry in tensors.values()):
        return True
    last_parts = {name.rpartition(".")[2] for name in tensors}
    return not last_parts.isdisjoint(_PACKED_NAMES) or any(
        last.startswith(_BITSANDBYTES_STATE) for last in last_parts
    )


def _quantization_of(
    entry: TensorEntry, tensors: Mapping[str, TensorEntry], scaled: Mapping[str, ScaledWeight]
) -> tuple[str, str] | None:
    """Return how the tensor shows that it is quantised, and by what; None when it does not."""
    last = entry.name.rpartition(".")[2]
    if last in _PACKED_NAMES:
        return (
            f"has the name of a packed weight or its scales ({_PACKED_NAMES[last]})",
            _PACKED_NAMES[last],
        )
    if last.startswith(_BITSANDBYTES_STATE):
        return "is the state of a packed weight (bitsandbytes)", "bitsandbytes"
    if last.endswith("_blocks") and entry.dtype is DType.U8:
        scales = entry.name.removesuffix("_blocks") + "_scales"
        if scales in tensors:
            return f"is packed, with scales in {scales!r}", ""
    found = scaled.get(entry.name)
    if found is not None:
        scale = found.scale or found.others[0]
        return f"is {entry.dtype} scaled by {scale.name!r} ({scale.dtype} {list(scale.shape)})", ""
    if last == "weight" and entry.dtype in _PACKED_DTYPES:
        return f"is a weight of dtype {entry.dtype}", ""
    return None
