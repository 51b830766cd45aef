"""The text of ``config.json`` with what a merge changes: types, ties, sizes, and what it makes untrue."""

from __future__ import annotations

import json
from collections.abc import Sequence

from streammerge.checkpoint.inputs import parse_config, parse_json_object
from streammerge.checkpoint.types import JsonChange
from streammerge.errors import HeaderError

_OUTERMOST = ("tie_word_embeddings",)
"""Settings that the outermost configuration takes for granted, whatever those inside say."""
_VOCABULARY = "vocab_size"
_DTYPE_KEYS = ("dtype", "torch_dtype")
# diffusers warns about every key that its class does not know; its configs hold no dtype.
_DIFFUSERS_KEYS = ("_class_name", "_diffusers_version")


def changed_config(
    text: bytes, dtype: str | None, settings: Sequence[tuple[str, object]], *, where: str
) -> bytes:
    """Return the text of a config with other settings, and one dtype for all its sub-models."""
    config, _ = parse_config(text, where=where)
    if dtype is not None:
        if not any(key in config for key in (*_DTYPE_KEYS, *_DIFFUSERS_KEYS)):
            config["dtype"] = dtype
        _set_dtype(config, dtype)
    for key, value in settings:
        if value is None:
            _remove_everywhere(config, key)
        elif key == _VOCABULARY:
            _resize_vocabulary(config, value)
        elif not _set_everywhere(config, key, value) or key in _OUTERMOST:
            config[key] = value
    return (json.dumps(config, indent=2) + "\n").encode("ascii")


def with_changes(text: bytes, changes: Sequence[JsonChange], *, where: str) -> bytes:
    """Return the text of a JSON object with other values at some of its keys."""
    if not changes:
        return text
    document = parse_json_object(text, where=where, parse_constant=float)
    for change in changes:
        section = document if not change.section else document.get(change.section)
        if not isinstance(section, dict):
            raise HeaderError(
                f"{where}: has no object {change.section}, which was planned to change"
            )
        if change.value is None:
            section.pop(change.key, None)
        else:
            section[change.key] = json.loads(change.value)
    return (json.dumps(document, indent=2) + "\n").encode("ascii")


def _set_everywhere(config: dict[str, object], key: str, value: object) -> bool:
    """Set a key wherever a model or a sub-model has it; return whether any has."""
    parts = [
        inner
        for name, inner in config.items()
        if isinstance(inner, dict) and name.endswith("config")
    ]
    found = [_set_everywhere(inner, key, value) for inner in parts]
    if key in config:
        config[key] = value
    return key in config or any(found)


def _resize_vocabulary(config: dict[str, object], size: object) -> None:
    """Set the size of the vocabulary of text wherever it stands; a part that hears has another one."""
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    before = config.get(_VOCABULARY, inner.get(_VOCABULARY))
    sections = [each for name, each in config.items() if name.endswith("config")]
    found = [
        each
        for each in (config, *sections)
        if isinstance(each, dict) and _VOCABULARY in each and each[_VOCABULARY] == before
    ]
    for each in found or [config]:
        each[_VOCABULARY] = size


def _remove_everywhere(config: dict[str, object], key: str) -> None:
    """Remove a key wherever a model or a sub-model has it."""
    config.pop(key, None)
    for name, inner in config.items():
        if isinstance(inner, dict) and name.endswith("config"):
            _remove_everywhere(inner, key)


def _set_dtype(config: dict[str, object], dtype: str) -> None:
    for key in _DTYPE_KEYS:
        # A number is something else: the token of that name in a vocabulary, as in Emu3.
        if key in config and isinstance(config[key], str | dict | None):
            config[key] = dtype
    for key, value in config.items():
        # Encoder-decoder models keep theirs under "encoder" and "decoder", with a model type.
        if isinstance(value, dict) and (key.endswith("config") or "model_type" in value):
            _set_dtype(value, dtype)
