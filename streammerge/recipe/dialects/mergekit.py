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
from streammerge.recipe.dialects.methods import METHODS, BaseRole, Foreign
from streammerge.recipe.dialects.mixtures import MixtureTranslation
from streammerge.recipe.dialects.modules import (
    Dividing,
    Part,
    list_models,
    read_parts,
    translate_tables,
)
from streammerge.recipe.dialects.parameters import Findings
from streammerge.recipe.dialects.reading import DTYPES, Reader
from streammerge.recipe.dialects.recognising import is_mixture
from streammerge.recipe.dialects.references import Reference
from streammerge.recipe.dialects.slices import Slices
from streammerge.recipe.dialects.tokenizers import Vocabulary
from streammerge.recipe.dialects.values import with_default
from streammerge.recipe.refusing import refuse_choice, shown, unknown_key
from streammerge.recipe.types import ParameterSpec

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
    own_bases: list[str] = field(default_factory=list)
    base: Reference | None = None

    @property
    def reader(self) -> Reader:
        """What reads the document's parts."""
        return Reader(self.found)

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
            # Parameters for all models are read once for every module.
            raise RecipeError("\n".join(dict.fromkeys(self.found.problems)))
        return Translated(made, self.paths, tuple(dict.fromkeys(self.found.remarks)))

    def _merge(self, method: Foreign) -> dict[str, Any]:
        """Return the document but for what concerns tokenizers."""
        base = self.reader.reference("base_model", self.document.get("base_model"))
        common = base if method.base is not BaseRole.ORDINARY else None
        forms = [
            key for key in ("models", "slices", "modules") if self.document.get(key) is not None
        ]
        made: dict[str, Any] = {"method": method.native}
        if len(forms) != 1:
            got = " and ".join(forms) or "none of them"
            self.found.say(forms[0] if forms else "models", f"expected models or slices, got {got}")
        part, rules = self._part(forms, method, (base, common))
        if part is None:
            self._parameters(method, Part("", "", {}, "", None))
            return made
        layers: list[dict[str, Any]] = []
        if part.key == "models":
            sources = self._models(method, part, (base, common))
        else:
            specs = self.methods[method.native]
            slices = Slices(self.reader, method, specs, common, self.sources, self.paths)
            layers = slices.translate(part.value, f"{part.prefix}slices")
            sources = [dict(each.source) for each in self.sources]
            common, self.own_bases = slices.base, slices.own
        if method.base is BaseRole.REQUIRED and common is None and not self.found.problems:
            self.found.say(
                "base_model", f"{method.native} needs the model that the others were tuned from"
            )
        if common is not None:
            self.base = common
            made["base"] = common.native if common.adapter is None else common.source
        made["sources"] = sources
        made["parameters"] = self._parameters(method, part)
        self._require(method, made, sources, layers)
        if layers:
            made["layers"] = layers
        if rules:
            made["rules"] = rules
        made["semantics"] = "mergekit"
        self._types(made)
        if common is None and base is not None and not self.found.problems:
            self._donor(made, base)
        return made

    def _part(
        self, forms: list[str], method: Foreign, bases: tuple[Reference | None, Reference | None]
    ) -> tuple[Part | None, list[dict[str, Any]]]:
        """Return what is merged, of a whole model or of one module, and rules for the other modules."""
        if len(forms) != 1:
            return None, []
        if forms != ["modules"]:
            return Part("", "", {}, forms[0], self.document[forms[0]]), []
        before = len(self.found.problems)
        parts = read_parts(self.reader, self.document["modules"])
        if len(self.found.problems) > before or not parts:
            return None, []
        if len(parts) == 1:
            return parts[0], []
        specs, table = self.methods[method.native], self._table()
        dividing = Dividing(self.reader, method, specs, bases, table, self.paths)
        divided = dividing.divide(parts)
        return (None, []) if divided is None else (divided.remaining, divided.rules)

    def _table(self) -> Mapping[Any, Any]:
        return self.reader.table("parameters", self.document)

    def _models(
        self, method: Foreign, part: Part, bases: tuple[Reference | None, Reference | None]
    ) -> list[dict[str, Any]]:
        """Return the sources of a recipe that lists whole models."""
        sources: list[dict[str, Any]] = []
        specs, where = self.methods[method.native], f"{part.prefix}models"
        for model in list_models(self.reader, part.value, where, method, specs, bases=bases):
            self.paths[f"sources[{len(sources)}]"] = model.path
            self.sources.append(model.reference)
            sources.append(model.reference.source | dict(model.values))
        return sources

    def _parameters(self, method: Foreign, part: Part) -> dict[str, Any]:
        """Return the parameters for all models, and say where they stand."""
        self.paths["parameters"] = "parameters"
        for name, key in method.keys.items():
            if name in part.table:
                self.paths[f"parameters.{key.native}"] = f"{part.prefix}parameters.{name}"
        specs = self.methods[method.native]
        return translate_tables(self.reader, part, self._table(), method, specs)

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
            if value not in DTYPES:
                self.found.say(key, refuse_choice(value, DTYPES))
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
        source = self.document.get("tokenizer_source")
        table = self.reader.table("tokenizer", self.document)
        wanted = source is not None or bool(table)
        key = "tokenizer" if table else "tokenizer_source"
        if source is not None and table:
            self.found.say("tokenizer", "tokenizer_source says the same; keep one of them")
        if wanted and self.own_bases:
            self.found.say(
                key,
                f"{self.own_bases[0]} is another base, whose rows would stand for tokens that models of this "
                "slice lack; name one base for all slices, or leave the tokenizers out",
            )
        if not self.found.problems and wanted:
            vocabulary = Vocabulary(self.found, self.reader.reference, self.sources, self.base)
            made["vocabulary"] = vocabulary.translate(
                source, table, base=self.document.get("base_model")
            )
            self.paths["vocabulary"] = key
            if not table:
                self.paths["vocabulary.source"] = "tokenizer_source"
            output = made.setdefault("output", {})
            if "companions" in output:
                kinds = ("config", "generation_config")
                output["companions"] = dict.fromkeys(kinds, output["companions"])
        template = self.document.get("chat_template")
        if template is not None:
            made.setdefault("output", {})["chat_template"] = template
