"""Factors of parameters, whose names in a file are those of the modules that PEFT wraps around them.

A module may have several parameters that are adapted: PEFT's ``target_parameters``, stacks of
matrices above all. The factors in the file carry the name of the module, not of the parameter: a
second one wraps the first.

Follows: peft.tuners.lora.layer.ParamWrapper and peft.tuners.tuners_utils 0.21.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from streammerge.adapters.files.types import strip_wrappers

_DECLARED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""Parameters of modules with several, in the order in which the modules of transformers declare
them, which is the order in which PEFT wraps them."""


def wrapper_depths(stems: Iterable[str]) -> dict[str, list[int]]:
    """Return how many wrappers are around each wrapper of a module, by the module's path, sorted."""
    depths: dict[str, list[int]] = {}
    for stem in stems:
        depths.setdefault(strip_wrappers(stem), []).append(_depth(stem))
    return {path: sorted(found) for path, found in depths.items()}


def wrapped_parameters(stem: str, depths: Sequence[int], targets: Iterable[str]) -> list[str]:
    """Return the parameters that the factors of a wrapper could belong to; one, where it is clear.

    Args:
        stem: The wrapper's path, with ``.base_layer`` for every one around it.
        depths: Those of all wrappers of the module; see :func:`wrapper_depths`.
        targets: The configuration's ``target_parameters``.
    """
    path = strip_wrappers(stem)
    named = [target.rpartition(".") for target in targets]
    qualified = {
        parameter
        for module, _, parameter in named
        if module and (path == module or path.endswith(f".{module}"))
    }
    # A bare name stands for that parameter of any module, of which most have none such.
    candidates = qualified or {parameter for module, _, parameter in named if not module}
    if len(candidates) == len(depths) == 1:
        return list(candidates)
    if len(candidates) != len(depths) or not candidates <= set(_DECLARED):
        return sorted(candidates)
    declared = sorted(candidates, key=_DECLARED.index)
    # The first one declared is wrapped first, so it lies deepest.
    return [declared[len(depths) - 1 - depths.index(_depth(stem))]]


def _depth(stem: str) -> int:
    return stem.count(".base_layer")
