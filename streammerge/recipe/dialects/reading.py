"""What mergekit's recipes list: models, layers of models, mappings of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.recipe.dialects.methods import PARAMETERS
from streammerge.recipe.dialects.parameters import Findings
from streammerge.recipe.dialects.references import Reference, parse_reference
from streammerge.recipe.refusing import shown, unknown_key

DTYPES = ("float32", "float16", "bfloat16", "float64")
"""Element types by mergekit's names."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A model as a recipe lists it."""

    reference: Reference
    """Which one."""
    path: str
    """Where it stands."""
    parameters: Mapping[Any, Any]
    """Its own parameters."""
    layers: list[int] | None = None
    """The first of its layers and the one after the last; None for the whole model."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads parts of a document that is as yet unchecked, and says what is wrong with them."""

    found: Findings
    """Told what is wrong."""

    def reference(self, path: str, value: object) -> Reference | None:
        """Return the model that a value names; None where there is none, or it is no name."""
        if value is None:
            return None
        try:
            return parse_reference(value)
        except ValueError as error:
            self.found.say(path, str(error))
            return None

    def table(self, key: str, within: Mapping[Any, Any], path: str = "") -> Mapping[Any, Any]:
        """Return a mapping that may be missing, at a key of another one at a path."""
        value = within.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.found.say(
                f"{path}{key}", f"expected a mapping of keys to values, got {shown(value)}"
            )
            return {}
        return value

    def entries(
        self, value: object, path: str, keys: Sequence[str]
    ) -> Iterator[tuple[str, dict[Any, Any]]]:
        """Yield the mappings in a list with their paths; what else is in there is a problem."""
        if not isinstance(value, list) or not value:
            self.found.say(path, f"expected a list with at least one entry, got {shown(value)}")
            return
        for index, entry in enumerate(value):
            where = f"{path}[{index}]"
            if not isinstance(entry, dict):
                self.found.say(where, f"expected a mapping of keys to values, got {shown(entry)}")
                continue
            for key in entry:
                if key in keys:
                    continue
                if key in PARAMETERS:
                    self.found.say(
                        f"{where}.{key}", f"a parameter; move it under {where}.parameters"
                    )
                else:
                    self.found.say(f"{where}.{key}", unknown_key(key, keys))
            yield where, entry

    def listed(self, value: object, path: str, keys: Sequence[str]) -> Iterator[Listed]:
        """Yield the models in a list."""
        for where, entry in self.entries(value, path, keys):
            if entry.get("model") is None:
                self.found.say(f"{where}.model", "this key is required")
                continue
            reference = self.reference(f"{where}.model", entry["model"])
            if reference is None:
                continue
            parameters = self.table("parameters", entry, f"{where}.")
            layers = entry.get("layer_range")
            if "layer_range" in keys and not _is_range(layers):
                self.found.say(
                    f"{where}.layer_range",
                    "expected [first, end], the first layer counted from 0 and the one after the last, "
                    f"got {shown(layers)}",
                )
                continue
            yield Listed(reference, where, parameters, layers)


def _is_range(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(each) is int for each in value)
        and 0 <= value[0] < value[1]
    )
