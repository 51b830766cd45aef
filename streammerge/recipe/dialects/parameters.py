"""Mappings of mergekit's parameters, by their names here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streammerge.recipe.dialects.methods import IDLE, NUSLERP_SWITCHES, PARAMETERS, Foreign
from streammerge.recipe.dialects.values import translate_value
from streammerge.recipe.refusing import shown, unknown_key
from streammerge.recipe.types import ParameterSpec

_AXES = {
    (True, True): "tensor",
    (True, False): "tensor",
    (False, False): "rows",
    (False, True): "columns",
}
"""By ``nuslerp_flatten`` and ``nuslerp_row_wise``, whose rows are columns."""


@dataclass(slots=True)
class Findings:
    """What there is to say about a recipe."""

    problems: list[str] = field(default_factory=list)
    """Why it cannot be followed, a line for each key."""
    remarks: list[str] = field(default_factory=list)
    """What has no effect, or another one than there."""

    def say(self, path: str, problem: str) -> None:
        """Add a problem of a key."""
        self.problems.append(f"{path}: {problem}")

    def remark(self, path: str, text: str) -> None:
        """Add a remark about a key."""
        self.remarks.append(f"{path}: {text}")


def translate_parameters(
    path: str,
    table: Mapping[Any, Any],
    method: Foreign,
    specs: Sequence[ParameterSpec],
    *,
    found: Findings,
    model: bool,
) -> dict[str, Any]:
    """Return the parameters in a mapping by their names here.

    Args:
        path: Where the mapping stands.
        table: It.
        method: The merge method.
        specs: What its parameters are here.
        found: Told what is wrong, and what has no effect.
        model: Whether they are those of one model.
    """
    by_name = {spec.name: spec for spec in specs}
    has_switches = method.native == "nuslerp" and not model
    made: dict[str, Any] = {}
    for name, value in table.items():
        where = f"{path}.{name}" if isinstance(name, str) else f"{path}.{shown(name)}"
        key = method.keys.get(name)
        if name in NUSLERP_SWITCHES and has_switches:
            continue
        if name not in PARAMETERS:
            known = [*method.keys, *(NUSLERP_SWITCHES if has_switches else ())]
            found.say(where, unknown_key(name, known))
        elif name in IDLE:
            found.remark(where, "no effect, it changes no number")
        elif key is None:
            found.remark(where, f"no effect, {method.native} has no such parameter")
        elif model and not key.of_model:
            found.remark(where, "no effect, one value serves all models; move it to parameters")
        else:
            try:
                made[key.native] = translate_value(
                    value,
                    key,
                    by_name[key.native],
                    lambda text, where=where: found.remark(where, text),  # type: ignore[misc]
                )
            except ValueError as error:
                found.say(where, str(error))
    if has_switches and any(name in table for name in NUSLERP_SWITCHES):
        made["axis"] = _axis(path, table, found)
    return made


def _axis(path: str, table: Mapping[Any, Any], found: Findings) -> str:
    """Return what two switches together say."""
    flags = []
    for name, default in zip(NUSLERP_SWITCHES, (True, False), strict=True):
        value = table.get(name, default)
        if not isinstance(value, bool):
            found.say(f"{path}.{name}", f"expected true or false, got {shown(value)}")
        flags.append(value is True)
    return _AXES[flags[0], flags[1]]


def check_idle(path: str, table: Mapping[Any, Any], found: Findings) -> None:
    """Remark that parameters of a base have no effect, and refuse those that are none."""
    for name in table:
        where = f"{path}.{name}" if isinstance(name, str) else f"{path}.{shown(name)}"
        if name in PARAMETERS:
            found.remark(where, "no effect, the base is not merged itself")
        else:
            found.say(where, unknown_key(name, sorted(PARAMETERS)))
