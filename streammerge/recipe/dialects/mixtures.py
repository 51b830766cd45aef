"""mergekit-moe's YAML as a recipe of this tool: the base, the experts, and whose vectors choose them.

Differs from mergekit: experts lie in the files under the names that all versions of their loaders read;
``cheap_embed`` sums in float64; experts that are all the same model are stated, not refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streammerge.errors import RecipeError
from streammerge.recipe.dialects.parameters import Findings
from streammerge.recipe.dialects.reading import DTYPES, Reader
from streammerge.recipe.dialects.references import Reference
from streammerge.recipe.refusing import refuse_choice, refuse_number, shown, unknown_key
from streammerge.recipe.types import GateKind, MixtureForm

_TOP = (
    *("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts"),
    "architecture",
)
_EXPERT = (
    *("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale"),
)
_GATES = {
    "random": GateKind.RANDOM,
    "uniform_random": GateKind.UNIFORM,
    "cheap_embed": GateKind.EMBEDDINGS,
}
_FORWARD = ("hidden", "hidden_avg", "hidden_last")
"""Modes that take what a forward pass makes of the prompts."""
_FORMS = {
    "mixtral": MixtureForm.MIXTRAL,
    "qwen moe": MixtureForm.QWEN2_MOE,
    "qwen3 moe": MixtureForm.QWEN3_MOE,
    "deepseek moe": MixtureForm.DEEPSEEK,
}
"""mergekit's names of what comes out, in lower case; the beginning of one is enough."""
_DOWN = "[dw][2o]*.weight"
"""A glob of the projection back: w2 or down_proj."""


@dataclass(slots=True)
class MixtureTranslation:
    """Makes a native document of one of mergekit-moe's."""

    document: Mapping[Any, Any]
    found: Findings = field(default_factory=Findings)
    paths: dict[str, str] = field(
        default_factory=lambda: {
            "base": "base_model",
            "mixture.form": "architecture",
            "mixture.gates": "gate_mode",
            "mixture.experts_per_token": "experts_per_token",
            "mixture.shared": "shared_experts",
            "output.dtype": "dtype",
        }
    )

    def run(self) -> dict[str, Any]:
        """Return the native document.

        Raises:
            RecipeError: It is not mergekit-moe's, or asks for what there is not.
        """
        document = self.document
        for key in document:
            if key not in _TOP:
                path = str(key) if isinstance(key, str) else shown(key)
                self.found.say(path, unknown_key(key, _TOP))
        base = self._reference("base_model", document.get("base_model"))
        if base is not None and base.adapter is not None:
            self.found.say(
                "base_model",
                f"a base with an adapter, {base.adapter}, gives no embeddings; merge the adapter into it "
                "first, and name what comes of it",
            )
        experts = self._experts("experts", required=True)
        shared = self._experts("shared_experts", required=False)
        if len(shared) > 1:
            self.found.say(
                "shared_experts", f"expected one expert of every token, got {len(shared)}"
            )
        mixture = self._mixture(experts, shared)
        dtype = document.get("dtype")
        if dtype is not None and dtype not in DTYPES:
            self.found.say("dtype", refuse_choice(dtype, DTYPES))
        if self.found.problems or base is None:
            raise RecipeError("\n".join(self.found.problems))
        return {
            "method": "passthrough",
            "base": base.native,
            "sources": [dict(each.reference.source) for each in (*experts, *shared)],
            "rules": list(self._rules(experts, shared)),
            "mixture": mixture,
            "semantics": "mergekit",
            "output": {} if dtype is None else {"dtype": dtype},
        }

    def _reference(self, path: str, value: object) -> Reference | None:
        """Return the model that a value names, and that there has to be."""
        if value is None:
            self.found.say(path, "this key is required")
        return Reader(self.found).reference(path, value)

    def _experts(self, key: str, *, required: bool) -> list[_Expert]:
        value = self.document.get(key)
        if value in (None, []) and not required:
            return []
        experts: list[_Expert] = []
        for where, entry in Reader(self.found).entries(value, key, _EXPERT):
            reference = self._reference(f"{where}.source_model", entry.get("source_model"))
            if reference is None:
                continue
            if entry.get("noise_scale") not in (None, 0, 0.0):
                self.found.say(
                    f"{where}.noise_scale",
                    "experts are copied exactly here, without noise; leave the key out, and add noise when "
                    "training begins",
                )
            scale = entry.get("residual_scale")
            said = None if scale is None else refuse_number(scale, None, None)
            if said is not None:
                self.found.say(f"{where}.residual_scale", said)
            experts.append(_Expert(reference, where, entry, scale))
        return experts

    def _mixture(self, experts: Sequence[_Expert], shared: Sequence[_Expert]) -> dict[str, Any]:
        document = self.document
        mixture: dict[str, Any] = {"experts_per_token": document.get("experts_per_token", 2)}
        form = document.get("architecture")
        if form is not None:
            known = [
                name for name in _FORMS if isinstance(form, str) and name.startswith(form.lower())
            ]
            if not known:
                self.found.say("architecture", refuse_choice(form, _FORMS))
            else:
                mixture["form"] = _FORMS[known[0]].value
        if shared:
            mixture["shared"] = len(experts)
        mode = document.get("gate_mode", "hidden")
        if mode in _FORWARD:
            self.found.say(
                "gate_mode",
                f"{mode} needs a forward pass of the base over the prompts, and this tool runs no models; "
                "write cheap_embed, random or uniform_random, or a native recipe with `mixture: {gates: "
                "FILE}` and the vectors in a file",
            )
        elif mode not in _GATES:
            self.found.say("gate_mode", refuse_choice(mode, (*_GATES, *_FORWARD)))
        else:
            mixture["gates"] = _GATES[mode].value
        if mode == "cheap_embed":
            mixture["prompts"] = [self._prompts(each) for each in (*experts, *shared)]
            if len(experts) > 1 and all(
                each == mixture["prompts"][0] for each in mixture["prompts"][: len(experts)]
            ):
                self.found.say(
                    "experts",
                    "all have the same prompts, by which no token can choose between them; give each the "
                    "prompts that it is for",
                )
        else:
            for each in (*experts, *shared):
                if each.table.get("positive_prompts") or each.table.get("negative_prompts"):
                    self.found.remark(each.path, f"prompts have no effect on gates that are {mode}")
        return mixture

    def _prompts(self, expert: _Expert) -> dict[str, Any]:
        positive = expert.table.get("positive_prompts")
        negative = expert.table.get("negative_prompts") or []
        for key, texts in (("positive_prompts", positive), ("negative_prompts", negative)):
            good = isinstance(texts, list) and all(isinstance(each, str) and each for each in texts)
            if not good or (key == "positive_prompts" and not texts):
                self.found.say(
                    f"{expert.path}.{key}", f"expected a list of texts, got {shown(texts)}"
                )
        return {"positive": positive} | ({"negative": negative} if negative else {})

    def _rules(self, experts: Sequence[_Expert], shared: Sequence[_Expert]) -> list[dict[str, Any]]:
        """Return what multiplies what experts give back."""
        rules: list[dict[str, Any]] = []
        for index, each in enumerate(experts):
            if each.residual_scale is not None:
                self.paths[f"rules[{len(rules)}].scale"] = f"{each.path}.residual_scale"
                rules.append(
                    {"tensors": f"*.experts.{index}.{_DOWN}", "scale": each.residual_scale}
                )
        for each in shared:
            if each.residual_scale is not None:
                self.paths[f"rules[{len(rules)}].scale"] = f"{each.path}.residual_scale"
                rules.append({"tensors": f"*.shared_expert*.{_DOWN}", "scale": each.residual_scale})
        return rules


@dataclass(frozen=True, slots=True)
class _Expert:
    """An expert as the recipe lists it."""

    reference: Reference
    path: str
    table: Mapping[Any, Any]
    residual_scale: float | None
