"""What a recipe says of vocabularies: a policy for those that differ, or the one that rows are drawn for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from streammerge.recipe.refusing import key_path, refuse_choice, shown, unknown_key
from streammerge.recipe.types import BASE, DrawnVocabulary, TokenOrigin, VocabularyPolicy

_UNION = "union"
_COMMON = "common"
_ZERO = "zero"
_MEAN = "mean"
_KEYS = ("source", "fill", "tokens", "pad_to_multiple_of")
_TOKEN_KEYS = ("source", "token", "force")
MOST_PADDING = 65536
"""The largest number that rows are padded to a multiple of."""
_ORIGIN: list[dict[str, Any]] = [
    {"const": "base"},
    {"type": "integer", "minimum": 0},
]
_SOURCE = {"anyOf": [{"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}]}
SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"enum": [*(policy.value for policy in VocabularyPolicy), _UNION, _COMMON, "base"]},
        {"type": "integer", "minimum": 0},
        {
            "type": "object",
            "properties": {
                "source": _SOURCE,
                "fill": {"anyOf": [{"const": _MEAN}, *_ORIGIN]},
                "tokens": {
                    "type": "object",
                    "additionalProperties": {
                        "type": "object",
                        "properties": {
                            "source": {"anyOf": [{"const": _ZERO}, *_ORIGIN]},
                            "token": {
                                "anyOf": [{"type": "string"}, {"type": "integer", "minimum": 0}]
                            },
                            "force": {"type": "boolean"},
                        },
                        "required": ["source"],
                        "additionalProperties": False,
                    },
                },
                "pad_to_multiple_of": {
                    "anyOf": [
                        {"type": "integer", "minimum": 1, "maximum": MOST_PADDING},
                        {"type": "null"},
                    ]
                },
            },
            "required": ["source"],
            "additionalProperties": False,
        },
    ]
}
"""The JSON Schema of the key."""


class VocabularyError(ValueError):
    """A message about a value, which may begin with a key inside of it."""


def parse_vocabulary(value: object) -> VocabularyPolicy | DrawnVocabulary:
    """Return what the key ``vocabulary`` says.

    Raises:
        VocabularyError: It says nothing that is known.
    """
    if isinstance(value, str) and value in frozenset(VocabularyPolicy):
        return VocabularyPolicy(value)
    if not isinstance(value, dict):
        if value in (_UNION, _COMMON, "base") or _is_index(value):
            return DrawnVocabulary(_parse_source(value), common=value == _COMMON)
        words = (*VocabularyPolicy, _UNION, _COMMON, "base", "the index of a source")
        raise VocabularyError(refuse_choice(value, words))
    for key in value:
        if key not in _KEYS:
            raise VocabularyError(f"{shown(key)}: {unknown_key(key, _KEYS)}")
    if "source" not in value:
        raise VocabularyError(
            "source: this key is required: union, common, base, an index or a directory"
        )
    tokens = value.get("tokens", {})
    if not isinstance(tokens, dict):
        raise VocabularyError(f"tokens: expected a mapping of tokens, got {shown(tokens)}")
    fill, means = _within("fill", lambda: _parse_fill(value.get("fill")))
    return DrawnVocabulary(
        _within("source", lambda: _parse_source(value["source"])),
        common=value["source"] == _COMMON,
        tokens={
            str(token): _within(key_path("tokens", str(token)), partial(_parse_token, origin))
            for token, origin in tokens.items()
        },
        fill=fill,
        means=means,
        multiple=_within(
            "pad_to_multiple_of", lambda: _parse_multiple(value.get("pad_to_multiple_of"))
        ),
    )


def plain_vocabulary(vocabulary: VocabularyPolicy | DrawnVocabulary) -> object:
    """Return it as a document has it."""
    if isinstance(vocabulary, VocabularyPolicy):
        return vocabulary.value
    source = _COMMON if vocabulary.common else _plain_source(vocabulary.source)
    table: dict[str, object] = {"source": source}
    if vocabulary.means:
        table["fill"] = _MEAN
    elif vocabulary.fill is not None:
        table["fill"] = _plain_source(vocabulary.fill)
    if vocabulary.tokens:
        table["tokens"] = {
            token: {"source": _ZERO if each.source is None else _plain_source(each.source)}
            | ({} if each.token is None else {"token": each.token})
            | ({"force": True} if each.force else {})
            for token, each in vocabulary.tokens.items()
        }
    if vocabulary.multiple is not None:
        table["pad_to_multiple_of"] = vocabulary.multiple
    return source if len(table) == 1 and not isinstance(vocabulary.source, Path) else table


def iter_vocabulary_problems(document: Mapping[Any, Any], n_sources: int) -> Iterator[str]:
    """Yield which models it names that the recipe does not have."""
    value = document.get("vocabulary")
    table = value if isinstance(value, dict) else {"source": value}
    tokens = table.get("tokens")
    filling = table.get("fill")
    named = [
        ("vocabulary.source" if isinstance(value, dict) else "vocabulary", table.get("source"))
    ]
    named.append(("vocabulary.fill", filling))
    named += [
        (key_path("vocabulary", "tokens", str(token), "source"), each.get("source"))
        for token, each in (tokens.items() if isinstance(tokens, dict) else ())
        if isinstance(each, dict)
    ]
    for path, source in named:
        if source == "base" and document.get("base") is None:
            yield f'{path}: the recipe has no base; name a source by its index, or add the key "base"'
        if isinstance(source, int) and _is_index(source) and source >= n_sources > 0:
            yield (
                f"{path}: expected the index of one of {n_sources} sources, 0 to {n_sources - 1}, got "
                f"{shown(source)}"
            )


def _within(path: str, parse: Callable[[], Any]) -> Any:
    try:
        return parse()
    except VocabularyError as error:
        said = str(error)
        inside = said.split(":", 1)[0] in _TOKEN_KEYS
        raise VocabularyError(f"{path}.{said}" if inside else f"{path}: {said}") from None


def _parse_source(value: object) -> int | Path | None:
    if value == _UNION:
        return None
    if value in (_COMMON, "base"):
        return BASE
    if _is_index(value):
        return int(str(value))
    if isinstance(value, str) and value and "\0" not in value:
        return Path(value)
    raise VocabularyError(
        "expected union, common, base, the index of a source counted from 0, or a directory, got "
        f"{shown(value)}"
    )


def _parse_fill(value: object) -> tuple[int | None, bool]:
    """Return the model whose rows fill, and whether means do."""
    if value is None or value == _MEAN:
        return None, value == _MEAN
    if value == "base":
        return BASE, False
    if _is_index(value):
        return int(str(value)), False
    raise VocabularyError(
        f"expected base, the index of a source counted from 0, or mean, got {shown(value)}"
    )


def _parse_token(value: object) -> TokenOrigin:
    if not isinstance(value, dict):
        raise VocabularyError(f"expected a mapping with the key source, got {shown(value)}")
    for key in value:
        if key not in _TOKEN_KEYS:
            raise VocabularyError(f"{shown(key)}: {unknown_key(key, _TOKEN_KEYS)}")
    source, token, force = value.get("source"), value.get("token"), value.get("force", False)
    if not (source in (_ZERO, "base") or _is_index(source)):
        raise VocabularyError(
            f"source: expected base, the index of a source counted from 0, or zero, got {shown(source)}"
        )
    if not (token is None or _is_index(token) or (isinstance(token, str) and token)):
        raise VocabularyError(f"token: expected a token or its number, got {shown(token)}")
    if type(force) is not bool:
        raise VocabularyError(f"force: expected true or false, got {shown(force)}")
    if source == _ZERO:
        if token is not None:
            raise VocabularyError("token: zeros are no token's; leave the key out")
        return TokenOrigin(None, None, force)
    return TokenOrigin(BASE if source == "base" else int(str(source)), token, force)


def _parse_multiple(value: object) -> int | None:
    if value is None:
        return None
    if type(value) is int and 1 <= value <= MOST_PADDING:
        return value
    raise VocabularyError(f"expected a whole number in [1, {MOST_PADDING}], got {shown(value)}")


def _is_index(value: object) -> bool:
    return type(value) is int and value >= 0


def _plain_source(source: int | Path | None) -> object:
    if source is None:
        return _UNION
    if source == BASE:
        return "base"
    return source if isinstance(source, int) else str(source)
