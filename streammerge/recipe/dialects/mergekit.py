"""mergekit's YAML as a recipe of this tool: the same models, layers and numbers.

What means the same has another name here; what has no effect there is remarked; what cannot be followed
is refused by its key. Values keep mergekit's order of precedence, source, slice, whole recipe, default,
which is this tool's too, and so are its gradients: the first value for what is outside of all layers.
Differs from mergekit: unknown keys are errors; values are computed in float32 or float64 whatever
``dtype`` is, and only the result is rounded to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streammerge.errors import RecipeError, suggestion
from streammerge.recipe.dialects.methods import METHODS, PARAMETERS, BaseRole, Foreign
from streammerge.recipe.dialects.mixtures import MixtureTranslation, is_mixture
from streammerge.recipe.dialects.parameters import Findings, check_idle, translate_parameters
from streammerge.recipe.dialects.references import Reference, parse_reference
from streammerge.recipe.dialects.tokenizers import Vocabulary
from streammerge.recipe.dialects.values import with_default
from streammerge.recipe.refusing import refuse_choice, shown, unknown_key
from streammerge.recipe.types import ParameterSpec

MARKERS = frozenset({"merge_method", "models", "slices", "modules", "base_model"})
"""Top-level keys that only a recipe for mergekit has."""
_TOP = (
    *("merge_method", "models", "slices", "modules", "base_model", "dtype", "out_dtype"),
    *("parameters", "tokenizer_source", "tokenizer", "chat_template", "name"),
)
_OWN = {
    "method": "merge_method alone, or method alone",
    "base": "base_model, or method instead of merge_method",
    "sources": "models, or method instead of merge_method",
    "layers": "slices, or method instead of merge_method",
}
"""Keys of recipes of this tool, with what to write."""
_DTYPES = ("float32", "float16", "bfloat16", "float64")
Methods = Mapping[str, tuple[ParameterSpec, ...]]


@dataclass(frozen=True, slots=True)
class Translated:
    """A recipe in this tool's words."""

    document: dict[str, Any]
    """The native document."""
    paths: Mapping[str, str]
    """Where in mergekit's recipe a mapping of the document stands, by its path in the document."""
    remarks: tuple[str, ...]
    """What has no effect, and what is done otherwise."""


def is_mergekit(document: Mapping[Any, Any]) -> bool:
    """Return whether a document is a recipe for mergekit, and none of this tool."""
    return (
        is_mixture(document)
        or "merge_method" in document
        or ("method" not in document and not MARKERS.isdisjoint(document))
    )


def translate(document: Mapping[Any, Any], methods: Methods) -> Translated:
    """Return mergekit's recipe as one of this tool.

    Args:
        document: Plain values, as yet unchecked.
        methods: The parameters of every method of this tool.

    Raises:
        RecipeError: It is not mergekit's, or asks for what there is not; one line for each problem.
    """
    if is_mixture(document):
        mixture = MixtureTranslation(document)
        made = mixture.run()
        return Translated(made, mixture.paths, tuple(dict.fromkeys(mixture.found.remarks)))
    return _Translation(document, methods).run()


@dataclass(slots=True)
class _Model:
    """A model as the recipe lists it."""

    reference: Reference
    path: str
    parameters: Mapping[Any, Any]
    layers: list[int] | None = None


@dataclass(slots=True)
class _Translation:
    document: Mapping[Any, Any]
    methods: Methods
    found: Findings = field(default_factory=Findings)
    paths: dict[str, str] = field(
        default_factory=lambda: {
            "base": "base_model",
            "method": "merge_method",
            "output.chat_template": "chat_template",
        }
    )
    sources: list[Reference] = field(default_factory=list)

    def run(self) -> Translated:
        document = self.document
        for key in document:
            if key in _OWN:
                said = (
                    f"a key of this tool's own recipes, in a recipe for mergekit; write {_OWN[key]}"
                )
                self.found.say(str(key), said)
            elif key not in _TOP:
                path = str(key) if isinstance(key, str) else shown(key)
                self.found.say(path, unknown_key(key, _TOP))
        name = document.get("merge_method")
        method = METHODS.get(name) if isinstance(name, str) else None
        if method is None:
            known = suggestion(name, METHODS) if isinstance(name, str) else ""
            self.found.say(
                "merge_method",
                "this key is required" if name is None else f"unknown method {shown(name)}{known}",
            )
            raise RecipeError("\n".join(self.found.problems))
        made = self._merge(method)
        self._tokenizer(made)
        if self.found.problems:
            raise RecipeError("\n".join(self.found.problems))
        return Translated(made, self.paths, tuple(dict.fromkeys(self.found.remarks)))

    def _merge(self, method: Foreign) -> dict[str, Any]:
        """Return the document but for what concerns tokenizers."""
        base = self._reference("base_model", self.document.get("base_model"))
        if method.base is BaseRole.REQUIRED and base is None and not self.found.problems:
            self.found.say(
                "base_model", f"{method.native} needs the model that the others were tuned from"
            )
        forms = [
            key for key in ("models", "slices", "modules") if self.document.get(key) is not None
        ]
        made: dict[str, Any] = {"method": method.native}
        if len(forms) != 1:
            got = " and ".join(forms) or "none of them"
            self.found.say(forms[0] if forms else "models", f"expected models or slices, got {got}")
        elif forms[0] == "modules":
            self.found.say(
                "modules",
                "parts of a model cannot be merged by recipes of their own; merge the whole model, with "
                "`rules` of a native recipe where a part is to be copied",
            )
        apart = base if method.base is not BaseRole.ORDINARY else None
        if apart is not None and apart.adapter is not None:
            self.found.say(
                "base_model",
                f"a base with an adapter, {apart.adapter}, cannot be merged while it is read; merge the "
                "adapter into it first, by a recipe of its own with `method: task_arithmetic`, and name "
                "what comes of it",
            )
        sources: list[dict[str, Any]] = []
        layers: list[dict[str, Any]] = []
        if forms == ["models"]:
            sources = self._models(method, base, apart)
        elif forms == ["slices"]:
            layers = self._slices(method, apart)
            sources = [dict(each.source) for each in self.sources]
        if apart is not None:
            made["base"] = apart.native
        made["sources"] = sources
        made["parameters"] = self._parameters("parameters", self._table("parameters"), method)
        self.paths["parameters"] = "parameters"
        self._require(method, made, sources, layers)
        if layers:
            made["layers"] = layers
        made["semantics"] = "mergekit"
        self._types(made)
        if apart is None and base is not None and not self.found.problems:
            self._donor(made, base)
        return made

    def _reference(self, path: str, value: object) -> Reference | None:
        """Return the model that a value names; None where there is none, or it is no name."""
        if value is None:
            return None
        try:
            return parse_reference(value)
        except ValueError as error:
            self.found.say(path, str(error))
            return None

    def _table(
        self, key: str, within: Mapping[Any, Any] | None = None, path: str = ""
    ) -> Mapping[Any, Any]:
        """Return a mapping that may be missing."""
        value = (self.document if within is None else within).get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.found.say(
                f"{path}{key}", f"expected a mapping of keys to values, got {shown(value)}"
            )
            return {}
        return value

    def _entries(
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

    def _listed(self, value: object, path: str, keys: Sequence[str]) -> Iterator[_Model]:
        """Yield the models in a list."""
        for where, entry in self._entries(value, path, keys):
            if entry.get("model") is None:
                self.found.say(f"{where}.model", "this key is required")
                continue
            reference = self._reference(f"{where}.model", entry["model"])
            if reference is None:
                continue
            parameters = self._table("parameters", entry, f"{where}.")
            layers = entry.get("layer_range")
            if "layer_range" in keys and not _is_range(layers):
                self.found.say(
                    f"{where}.layer_range",
                    "expected [first, end], the first layer counted from 0 and the one after the last, "
                    f"got {shown(layers)}",
                )
                continue
            yield _Model(reference, where, parameters, layers)

    def _models(
        self, method: Foreign, base: Reference | None, apart: Reference | None
    ) -> list[dict[str, Any]]:
        """Return the sources of a recipe that lists whole models."""
        sources: list[dict[str, Any]] = []
        for model in self._listed(self.document["models"], "models", ("model", "parameters")):
            if model.reference == apart:
                check_idle(f"{model.path}.parameters", model.parameters, self.found)
                continue
            if model.reference in self.sources:
                self.found.say(f"{model.path}.model", f"{model.reference.native} is listed twice")
                continue
            self.paths[f"sources[{len(sources)}]"] = f"{model.path}.parameters"
            self.sources.append(model.reference)
            values = self._parameters(
                f"{model.path}.parameters", model.parameters, method, model=True
            )
            sources.append(model.reference.source | values)
        if apart is None and base is not None and base not in self.sources:
            # It is merged like the others, after them.
            self.paths[f"sources[{len(sources)}]"] = "base_model"
            self.sources.append(base)
            sources.append(dict(base.source))
            if method.keys.get("weight") is not None:
                self.found.remark("base_model", f"{method.native} merges it as one more model")
        return sources

    def _slices(self, method: Foreign, apart: Reference | None) -> list[dict[str, Any]]:
        """Return the layers of a recipe that puts them together."""
        layers: list[dict[str, Any]] = []
        keys = ("sources", "base_model", "parameters", "residual_weight")
        for where, entry in self._entries(self.document["slices"], "slices", keys):
            own = self._reference(f"{where}.base_model", entry.get("base_model"))
            if own is not None and own != self._reference(
                "base_model", self.document.get("base_model")
            ):
                self.found.say(
                    f"{where}.base_model",
                    "a base of its own for one slice cannot be followed; name the same base for all "
                    "slices at the top level",
                )
            if entry.get("residual_weight") is not None:
                self.found.remark(f"{where}.residual_weight", "no effect, in mergekit either")
            ranges: list[dict[str, Any]] = []
            here = f"layers[{len(layers)}]"
            for model in self._listed(
                entry.get("sources"), f"{where}.sources", ("model", "layer_range", "parameters")
            ):
                self.paths[f"{here}.sources[{len(ranges)}]"] = f"{model.path}.parameters"
                self.paths[f"{here}.sources[{len(ranges)}].layers"] = f"{model.path}.layer_range"
                self.paths[f"{here}.sources[{len(ranges)}].source"] = f"{model.path}.model"
                ranges.append(self._range(model, method, apart, ranges))
            self.paths[f"{here}.sources"] = f"{where}.sources"
            if apart is not None and ranges and all(each["source"] != "base" for each in ranges):
                self.found.say(
                    f"{where}.sources",
                    f"the base_model, {apart.native}, gives no layers to this slice; list it with the "
                    "layers that the others were tuned from",
                )
            self.paths[here] = f"{where}.parameters"
            values = self._parameters(
                f"{where}.parameters", self._table("parameters", entry, f"{where}."), method
            )
            layers.append({"sources": ranges} | values)
        return layers

    def _range(
        self,
        model: _Model,
        method: Foreign,
        apart: Reference | None,
        others: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Return which layers of a model a slice has."""
        taken = [each["source"] for each in others]
        if model.reference == apart and "base" not in taken:
            check_idle(f"{model.path}.parameters", model.parameters, self.found)
            return {"source": "base", "layers": model.layers}
        # A model that stands twice in a slice is listed twice.
        places = [i for i, each in enumerate(self.sources) if each == model.reference]
        free = [index for index in places if index not in taken]
        if not free:
            self.sources.append(model.reference)
            free = [len(self.sources) - 1]
        values = self._parameters(f"{model.path}.parameters", model.parameters, method, model=True)
        return {"source": free[0], "layers": model.layers} | values

    def _parameters(
        self, path: str, table: Mapping[Any, Any], method: Foreign, *, model: bool = False
    ) -> dict[str, Any]:
        specs = self.methods[method.native]
        return translate_parameters(path, table, method, specs, found=self.found, model=model)

    def _require(
        self,
        method: Foreign,
        made: dict[str, Any],
        sources: Sequence[Mapping[str, Any]],
        layers: Sequence[Mapping[str, Any]],
    ) -> None:
        """Fill in defaults that are mergekit's alone, and refuse what is missing."""
        common = made["parameters"]
        for name, key in method.keys.items():
            if key.default is not None:
                common[key.native] = with_default(common.get(key.native), key.default)
            if not key.required or key.native in common:
                continue
            if not key.of_model:
                in_slices = bool(layers) and all(key.native in part for part in layers)
                if not in_slices:
                    self.found.say(f"parameters.{name}", "this key is required")
                continue
            for path, table in self._lacking(key.native, sources, layers):
                where = self.paths.get(path, path)
                where = f"{where}.{name}" if where.endswith("parameters") else f"parameters.{name}"
                del table
                self.found.say(where, "this key is required, here or under parameters for all")

    def _lacking(
        self,
        native: str,
        sources: Sequence[Mapping[str, Any]],
        layers: Sequence[Mapping[str, Any]],
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if not layers:
            for index, source in enumerate(sources):
                if native not in source:
                    yield f"sources[{index}]", source
        for index, part in enumerate(layers):
            if native in part:
                continue
            for place, each in enumerate(part["sources"]):
                if each["source"] != "base" and native not in each:
                    yield f"layers[{index}].sources[{place}]", each

    def _types(self, made: dict[str, Any]) -> None:
        """Say what is computed and stored."""
        given: dict[str, str] = {}
        for key in ("dtype", "out_dtype"):
            value = self.document.get(key)
            if value is None:
                continue
            if value not in _DTYPES:
                self.found.say(key, refuse_choice(value, _DTYPES))
            else:
                given[key] = value
        if given.get("dtype") == "float64":
            made["compute_dtype"] = "float64"
        elif given.get("dtype") in {"float16", "bfloat16"}:
            self.found.remark(
                "dtype",
                f"mergekit rounds the models to {given['dtype']} first; here they are merged as they are "
                "stored, and the result is rounded",
            )
        made["output"] = {"dtype": given.get("out_dtype") or given.get("dtype") or "promoted"}

    def _donor(self, made: dict[str, Any], base: Reference) -> None:
        """Take what lies beside the tensors from a base that is one model among the others."""
        index = self.sources.index(base) if base in self.sources else None
        if index != 0:
            made["output"]["companions"] = base.native if index is None else index

    def _tokenizer(self, made: dict[str, Any]) -> None:
        """Say whose vocabulary the result has."""
        source, table = self.document.get("tokenizer_source"), self._table("tokenizer")
        if source is not None and table:
            self.found.say("tokenizer", "tokenizer_source says the same; keep one of them")
        if not self.found.problems and (source is not None or table):
            vocabulary = Vocabulary(self.found, self._reference, self.sources, made.get("base"))
            made["vocabulary"] = vocabulary.translate(
                source, table, base=self.document.get("base_model")
            )
            self.paths["vocabulary"] = "tokenizer" if table else "tokenizer_source"
            if not table:
                self.paths["vocabulary.source"] = "tokenizer_source"
            output = made.setdefault("output", {})
            if "companions" in output:
                kinds = ("config", "generation_config")
                output["companions"] = dict.fromkeys(kinds, output["companions"])
        template = self.document.get("chat_template")
        if template is not None:
            made.setdefault("output", {})["chat_template"] = template


def _is_range(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(each) is int for each in value)
        and 0 <= value[0] < value[1]
    )
