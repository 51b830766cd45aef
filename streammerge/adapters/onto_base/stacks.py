"""Stacks of matrices that were adapted as parameters of their module: PEFT's ``target_parameters``.

A mixture of experts has its matrices in one parameter in memory, ``gate_up_proj [experts, 2 f, h]``,
and on disk either so or as one tensor per expert and projection.

Follows: peft.tuners.lora.layer.ParamWrapper 0.21.2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from streammerge.adapters.files.types import LowRankModule
from streammerge.adapters.onto_base.locating import BaseNames, Shape

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj")}
"""Parameters that checkpoints with a tensor per expert have in parts, one above the other."""
_TRANSPOSED_MODELS = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})
"""Values of ``model_type`` whose experts are stored ``[experts, in, out]``, and told so to PEFT."""
_FIRST_SWAPPED = (0, 19, 1)
"""The first PEFT that takes other stacks as ``[experts, out, in]``; before, all were taken for
``[experts, in, out]``."""


@dataclass(frozen=True, slots=True)
class StackPart:
    """A tensor that holds the stack, or one expert of it, or some rows of one."""

    path: str
    """Its name as the adapter would spell it."""
    expert: int | None
    """Which expert; None for all."""
    place: int
    """How many parts of the rows come before it."""
    parts: int
    """Parts that the rows of an expert are in."""


def stack_parts(module: LowRankModule, names: BaseNames) -> tuple[StackPart, ...]:
    """Return the tensors in which a base has a stack, by the names that it uses for such tensors.

    Args:
        module: The factors; their ``parameter`` is known.
        names: The base's names.
    """
    last = module.name.rpartition(".")[2]
    if module.experts == 1 or names.endings(f"{last}.{module.parameter}"):
        return (StackPart(module.weight_name, None, 0, 1),)
    parts = _PARTS.get(module.parameter, (module.parameter,))
    return tuple(
        StackPart(f"{module.name}.{expert}.{part}.weight", expert, place, len(parts))
        for expert in range(module.experts)
        for place, part in enumerate(parts)
    )


class Orientation(StrEnum):
    """Which way round a base stores the product of two factors."""

    PLAIN = "plain"
    """``B @ A``."""
    TRANSPOSED = "transposed"
    """Its transpose."""
    EITHER = "either"
    """The product is square, so both ways fit."""


def stack_orientation(module: LowRankModule, part: StackPart, shape: Shape) -> Orientation | None:
    """Return which way round a base stores the product; None where it does not fit.

    Args:
        module: The factors.
        part: The part of the stack.
        shape: Its shape in the base.
    """
    product = module.out_features, module.in_features
    if part.expert is None:
        if len(shape) == 2 and module.experts == 1:
            return Orientation.PLAIN if shape == product else None
        if len(shape) == 3 and shape[0] == module.experts:
            shape = shape[1:]
    if len(shape) != 2:
        return None
    stored = shape[0] * part.parts, shape[1]
    if stored == product:
        return Orientation.EITHER if stored == product[::-1] else Orientation.PLAIN
    return Orientation.TRANSPOSED if stored == product[::-1] else None


def square_is_transposed(model_type: object, peft_version: str | None) -> bool | None:
    """Return how a stack of square matrices was adapted, which its shape does not tell.

    Args:
        model_type: The base's, from its ``config.json``.
        peft_version: The adapter's, from its configuration.

    Returns:
        None where it cannot be known.
    """
    if model_type in _TRANSPOSED_MODELS:
        return True
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", peft_version or "")
    if found is None:
        return None
    return tuple(map(int, found.groups())) < _FIRST_SWAPPED
