"""Layers of models that mergekit's key ``slices`` puts together, as the key ``layers`` does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from streammerge.recipe.dialects.methods import BaseRole, Foreign
from streammerge.recipe.dialects.parameters import check_idle, translate_parameters
from streammerge.recipe.dialects.reading import Listed, Reader
from streammerge.recipe.dialects.references import Reference
from streammerge.recipe.types import ParameterSpec

_KEYS = ("sources", "base_model", "parameters", "residual_weight")
_SOURCE_KEYS = ("model", "layer_range", "parameters")


def refuse_adapted(reader: Reader, path: str, base: Reference | None) -> None:
    """Say that a base with an adapter cannot be followed, if it has one."""
    if base is not None and base.adapter is not None:
        reader.found.say(
            path,
            f"a base with an adapter, {base.adapter}, cannot be merged while it is read; merge the "
            "adapter into it first, by a recipe of its own with `method: task_arithmetic`, and name "
            "what comes of it",
        )


@dataclass(slots=True)
class Slices:
    """Translates them; every slice may have a base of its own."""

    reader: Reader
    method: Foreign
    specs: tuple[ParameterSpec, ...]
    """The parameters of the method here."""
    common: Reference | None
    """The base of slices that name none."""
    sources: list[Reference]
    """Gets the models that are sources of the recipe."""
    paths: dict[str, str]
    """Gets where a mapping of the document stands in mergekit's recipe."""
    base: Reference | None = None
    """The base of the recipe here: the common one, or without one the first that a slice names."""
    own: list[str] = field(default_factory=list)
    """Where slices name a base that is not the common one."""

    def translate(self, value: object, path: str) -> list[dict[str, Any]]:
        """Return the value of ``layers``; it stands at a path of mergekit's recipe."""
        entries = list(self.reader.entries(value, path, _KEYS))
        bases = [self._base_of(where, entry) for where, entry in entries]
        self.base = self.common or next(filter(None, bases), None)
        if self.common is None and self.base is not None:
            where = entries[bases.index(self.base)][0]
            self.paths["base"] = f"{where}.base_model"
            self.reader.found.remark(
                f"{where}.base_model",
                f"configuration and tokenizer are those of {self.base.native}, the first base; mergekit "
                "takes those of any of the models where no base is named for all",
            )
        layers: list[dict[str, Any]] = []
        for (where, entry), base in zip(entries, bases, strict=True):
            layers.append(self._slice(f"layers[{len(layers)}]", where, entry, base))
        return layers

    def _base_of(self, where: str, entry: Mapping[Any, Any]) -> Reference | None:
        """Return the base of a slice: its own, or the common one."""
        own = self.reader.reference(f"{where}.base_model", entry.get("base_model"))
        if self.method.base is BaseRole.ORDINARY:
            if own is not None and own != self.common:
                said = f"no effect, {self.method.native} takes no task vectors from it"
                self.reader.found.remark(f"{where}.base_model", said)
            return None
        if own is None or own == self.common:
            return self.common
        refuse_adapted(self.reader, f"{where}.base_model", own)
        self.own.append(f"{where}.base_model")
        return own

    def _slice(
        self, here: str, where: str, entry: Mapping[Any, Any], base: Reference | None
    ) -> dict[str, Any]:
        """Return one slice."""
        found = self.reader.found
        if entry.get("residual_weight") is not None:
            found.remark(f"{where}.residual_weight", "no effect, in mergekit either")
        if base is None and self.base is not None:
            self._refuse_baseless(where, self.base)
        # Before the sources, so that none of them gets the place of the base among the models.
        lent = None if base is None or base == self.base else self._place(base, set())
        made: dict[str, Any] = {"sources": []}
        taken = set() if lent is None else {lent}
        has_base = False
        for model in self.reader.listed(entry.get("sources"), f"{where}.sources", _SOURCE_KEYS):
            if model.reference == base and not has_base:
                has_base = True
                self._add_base(here, model, made, lent)
            else:
                self._add_source(here, model, made, taken)
        self.paths[f"{here}.sources"] = f"{where}.sources"
        self.paths[here] = f"{where}.parameters"
        if base is not None and made["sources"] and not has_base:
            which = "base_model" if base == self.common else "slice's base_model"
            found.say(
                f"{where}.sources",
                f"the {which}, {base.native}, gives no layers to this slice; list it with the "
                "layers that the others were tuned from",
            )
        table = self.reader.table("parameters", entry, f"{where}.")
        return made | self._parameters(f"{where}.parameters", table)

    def _refuse_baseless(self, where: str, other: Reference) -> None:
        """Say that a slice lacks a base, which the method needs or other slices have."""
        name = self.method.native
        said = (
            f"{name} needs the model that the others were tuned from, here or at the top level"
            if self.method.base is BaseRole.REQUIRED
            else f"{name} would take weights in this slice, and task vectors from {other.native} in "
            "another; name a base for every slice, or for none"
        )
        self.reader.found.say(f"{where}.base_model", said)

    def _add_base(self, here: str, model: Listed, made: dict[str, Any], lent: int | None) -> None:
        check_idle(f"{model.path}.parameters", model.parameters, self.reader.found)
        if lent is not None:
            self._point(f"{here}.base", model)
            made["base"] = {"source": lent, "layers": model.layers}
            return
        self._point(f"{here}.sources[{len(made['sources'])}]", model)
        made["sources"].append({"source": "base", "layers": model.layers})

    def _add_source(self, here: str, model: Listed, made: dict[str, Any], taken: set[int]) -> None:
        self._point(f"{here}.sources[{len(made['sources'])}]", model)
        place = self._place(model.reference, taken)
        taken.add(place)
        path = f"{model.path}.parameters"
        values = self._parameters(path, model.parameters, model=True)
        made["sources"].append({"source": place, "layers": model.layers} | values)

    def _point(self, here: str, model: Listed) -> None:
        """Remember where a model of the document stands in mergekit's recipe."""
        self.paths[here] = f"{model.path}.parameters"
        self.paths[f"{here}.layers"] = f"{model.path}.layer_range"
        self.paths[f"{here}.source"] = f"{model.path}.model"

    def _place(self, reference: Reference, taken: set[int]) -> int:
        """Return which source a model is; one that stands twice in a slice is listed twice."""
        for index, each in enumerate(self.sources):
            if each == reference and index not in taken:
                return index
        self.sources.append(reference)
        return len(self.sources) - 1

    def _parameters(
        self, path: str, table: Mapping[Any, Any], *, model: bool = False
    ) -> dict[str, Any]:
        return translate_parameters(
            path, table, self.method, self.specs, found=self.reader.found, model=model
        )
