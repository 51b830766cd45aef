"""What a recipe says of a mixture of experts that the sources become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from streammerge.recipe.refusing import key_path, refuse_choice, shown, unknown_key
from streammerge.recipe.types import GateKind, Mixture, MixtureForm, Prompts

_KEYS = ("form", "experts_per_token", "gates", "shared", "prompts")
_PROMPT_KEYS = ("positive", "negative")
_TEXTS = {"type": "array", "items": {"type": "string", "minLength": 1}}
MOST_EXPERTS = 1024
"""The most experts that a token may be given to."""
SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "form": {"enum": [*(form.value for form in MixtureForm), None]},
                "experts_per_token": {"type": "integer", "minimum": 1, "maximum": MOST_EXPERTS},
                "gates": {"type": "string", "minLength": 1},
                "shared": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]},
                "prompts": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"positive": _TEXTS | {"minItems": 1}, "negative": _TEXTS},
                        "required": ["positive"],
                        "additionalProperties": False,
                    },
                },
            },
            "required": ["gates"],
            "additionalProperties": False,
        },
        {"type": "null"},
    ]
}
"""The JSON Schema of the key."""


class MixtureError(ValueError):
    """A message about a value, which may begin with a key inside of it."""


def parse_mixture(value: object) -> Mixture | None:
    """Return what the key ``mixture`` says.

    Raises:
        MixtureError: It says nothing that is known.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise MixtureError(f"expected a mapping of keys to values, got {shown(value)}")
    for key in value:
        if key not in _KEYS:
            raise MixtureError(f"{shown(key)}: {unknown_key(key, _KEYS)}")
    form, shared, prompts = value.get("form"), value.get("shared"), value.get("prompts") or []
    if form is not None and form not in frozenset(MixtureForm):
        raise MixtureError(f"form: {refuse_choice(form, MixtureForm)}")
    if shared is not None and (type(shared) is not int or shared < 0):
        raise MixtureError(f"shared: expected the index of a source from 0, got {shown(shared)}")
    if not isinstance(prompts, list):
        raise MixtureError(
            f"prompts: expected a list with an entry per source, got {shown(prompts)}"
        )
    return Mixture(
        experts_per_token=_parse_count(value.get("experts_per_token", 2)),
        gates=_parse_gates(value.get("gates")),
        form=None if form is None else MixtureForm(form),
        shared=shared,
        prompts=tuple(_parse_prompts(each, index) for index, each in enumerate(prompts)),
    )


def plain_mixture(mixture: Mixture) -> dict[str, object]:
    """Return it as a document has it."""
    table: dict[str, object] = {} if mixture.form is None else {"form": mixture.form.value}
    table["experts_per_token"] = mixture.experts_per_token
    table["gates"] = str(mixture.gates)
    if mixture.shared is not None:
        table["shared"] = mixture.shared
    if mixture.prompts:
        table["prompts"] = [
            {"positive": list(each.positive)}
            | ({"negative": list(each.negative)} if each.negative else {})
            for each in mixture.prompts
        ]
    return table


def iter_mixture_problems(document: Mapping[str, Any], n_sources: int) -> Iterator[str]:
    """Yield what is wrong with a mixture whose keys are each fine."""
    table = document.get("mixture")
    if not isinstance(table, dict):
        return
    if document.get("method") != "passthrough":
        yield (
            'mixture: the experts of a mixture are sources as they are, which is "method: passthrough"; '
            f"got {shown(document.get('method'))}"
        )
    if document.get("base") is None:
        yield 'mixture: the recipe has no base to give all but the experts; add the key "base"'
    if document.get("layers"):
        yield "mixture: cannot be put together of layers as well; leave layers out, or merge twice"
    if isinstance(document.get("vocabulary"), int | dict) or document.get("vocabulary") in (
        "union",
        "base",
    ):
        yield (
            "mixture: its embeddings are the base's; draw the rows for another vocabulary in a recipe of "
            "its own, and name what comes of it as the base"
        )
    shared, per_token = table.get("shared"), table.get("experts_per_token", 2)
    prompts, gates = table.get("prompts") or [], table.get("gates")
    routed = n_sources - (type(shared) is int and shared < n_sources)
    if type(shared) is int and shared >= n_sources > 0:
        yield (
            f"mixture.shared: expected the index of one of {n_sources} sources, 0 to {n_sources - 1}, "
            f"got {shared}"
        )
    if type(per_token) is int and per_token > routed > 0:
        yield (
            f"mixture.experts_per_token: a token cannot be given to {per_token} of {routed} experts; list "
            "more sources, or give a smaller number"
        )
    if gates == GateKind.EMBEDDINGS and isinstance(prompts, list) and len(prompts) != n_sources:
        yield (
            f"mixture.prompts: gates from embeddings need prompts for each of {n_sources} sources, got "
            f"{len(prompts)}"
        )
    if prompts and gates != GateKind.EMBEDDINGS:
        yield (
            "mixture.prompts: no effect on gates that are "
            f"{'drawn' if gates in frozenset(GateKind) else 'in a file'}; remove them, or write "
            '"gates: embeddings"'
        )


def _parse_count(value: object) -> int:
    if type(value) is int and 1 <= value <= MOST_EXPERTS:
        return value
    raise MixtureError(
        f"experts_per_token: expected a whole number in [1, {MOST_EXPERTS}], got {shown(value)}"
    )


def _parse_gates(value: object) -> GateKind | Path:
    if value is None:
        raise MixtureError(
            f"gates: this key is required: {', '.join(GateKind)}, or a file with gate vectors"
        )
    if not isinstance(value, str) or not value or "\0" in value:
        raise MixtureError(
            f"gates: expected {', '.join(GateKind)} or the path of a file, got {shown(value)}"
        )
    return GateKind(value) if value in frozenset(GateKind) else Path(value)


def _parse_prompts(value: object, index: int) -> Prompts:
    path = key_path("prompts", index)
    if not isinstance(value, dict):
        raise MixtureError(f"{path}: expected {{positive: [...]}}, got {shown(value)}")
    for key in value:
        if key not in _PROMPT_KEYS:
            raise MixtureError(f"{path}.{key}: {unknown_key(key, _PROMPT_KEYS)}")
    texts = {}
    for key in _PROMPT_KEYS:
        given = value.get(key) or []
        if not isinstance(given, list) or not all(isinstance(each, str) and each for each in given):
            raise MixtureError(f"{path}.{key}: expected a list of texts, got {shown(given)}")
        texts[key] = tuple(given)
    if not texts["positive"]:
        raise MixtureError(f"{path}.positive: expected at least one text that the expert is for")
    return Prompts(texts["positive"], texts["negative"])
