"""The kinds of files beside a model, each of which may be taken from another input.

A chat template has two homes: a file of its own, or a key of ``tokenizer_config.json``. Where tokenizer
and template come from different models, the one that is not wanted is taken out of the other's home.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from streammerge.checkpoint.inputs import is_there, parse_json, read_limited
from streammerge.checkpoint.reading import MAX_CONFIG_BYTES
from streammerge.checkpoint.sidecars import read_companions
from streammerge.checkpoint.types import Companion, JsonChange
from streammerge.errors import HeaderError, RecipeError
from streammerge.recipe.types import CompanionKind

TOKENIZER_CONFIG = "tokenizer_config.json"
_TEMPLATE_KEY = "chat_template"
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_TEMPLATE_FOLDER = "additional_chat_templates/"
_TOKENIZER_NAMES = frozenset(
    {"special_tokens_map.json", "added_tokens.json", "tekken.json", "merges.txt", "bpe.codes"}
    | {"normalizer.json", "emoji.json", "byte_maps.json", "dict.txt"}
    | {"word_shape.json", "word_pronunciation.json"}
)
_TOKENIZER_PREFIXES = ("tokenizer", "tokenization_", "vocab", "target_vocab", "entity_vocab")
_TOKENIZER_SUFFIXES = ("tokenizer_config.json", ".model", ".spm", ".tiktoken", ".tokenizer")


@dataclass(frozen=True, slots=True)
class Template:
    """The chat templates of one model."""

    texts: Mapping[str, str]
    """Their texts by name; the usual one is called ``default``."""
    embedded: str | None
    """What ``tokenizer_config.json`` has for it, as JSON text; None for files of their own."""


def kind_of(name: str) -> CompanionKind:
    """Return what a file beside a model belongs to, by its name; to the configuration if to nothing else."""
    if name in _TEMPLATE_FILES or name.startswith(_TEMPLATE_FOLDER):
        return CompanionKind.CHAT_TEMPLATE
    if name == "generation_config.json" or name.startswith("custom_generate/"):
        return CompanionKind.GENERATION_CONFIG
    if (
        name in _TOKENIZER_NAMES
        or name.startswith(_TOKENIZER_PREFIXES)
        or ("/" not in name and name.endswith(_TOKENIZER_SUFFIXES))
    ):
        return CompanionKind.TOKENIZER
    return CompanionKind.CONFIG


def gather_companions(
    origins: Mapping[CompanionKind, Path], default: Path, *, template: str | None = None
) -> tuple[Companion, ...]:
    """Return the files that go to the output, each from where its kind is taken.

    Args:
        origins: The directory of each kind.
        default: The directory of the first model.
        template: The text of the chat template; None for that of the inputs.

    Raises:
        CheckpointError: A file cannot be read.
        HeaderError: A config is not JSON.
        RecipeError: A chat template has no home in the other model's tokenizer.
    """
    found: list[Companion] = []
    for directory in dict.fromkeys(origins.values()):
        named = None if directory == default else str(directory)
        found += (
            replace(each, directory=named)
            for each in read_companions(directory)
            if origins[kind_of(each.name)] == directory
        )
    found.sort(key=lambda companion: companion.name)
    if template is not None:
        return tuple(_with_text(found, template))
    if origins[CompanionKind.CHAT_TEMPLATE] != origins[CompanionKind.TOKENIZER]:
        found = _with_template(
            found, origins[CompanionKind.TOKENIZER], origins[CompanionKind.CHAT_TEMPLATE]
        )
    return tuple(found)


def read_template(directory: Path) -> Template | None:
    """Return the chat templates of a model, as transformers finds them; None if it has none.

    Raises:
        CheckpointError: A file cannot be read.
        HeaderError: A file is not JSON.
    """
    own = directory / "chat_template.jinja"
    if is_there(own):
        texts = {"default": _read_text(own)}
        folder = directory / _TEMPLATE_FOLDER
        if is_there(folder):
            texts |= {path.stem: _read_text(path) for path in sorted(folder.glob("*.jinja"))}
        return Template(texts, None)
    in_json = directory / "chat_template.json"
    if is_there(in_json):
        return Template(_texts_of(read_object(in_json).get(_TEMPLATE_KEY)), None)
    value = read_object(directory / TOKENIZER_CONFIG).get(_TEMPLATE_KEY)
    return None if value is None else Template(_texts_of(value), json.dumps(value))


def read_object(path: Path) -> dict[str, object]:
    """Return the object in a JSON file beside a model; an empty one if there is no file.

    Raises:
        CheckpointError: It cannot be read.
        HeaderError: It is not JSON, or too large to be a configuration.
    """
    if not is_there(path):
        return {}
    value = parse_json(
        _read_text(path).encode(),
        where=str(path),
        parse_constant=float,
        object_pairs_hook=dict,
    )
    return value if isinstance(value, dict) else {}


def _with_template(found: list[Companion], tokenizer: Path, template: Path) -> list[Companion]:
    """Return companions whose tokenizer has the chat template of another model."""
    wanted = read_template(template)
    value = None if wanted is None else wanted.embedded
    if value is None and _TEMPLATE_KEY not in read_object(tokenizer / TOKENIZER_CONFIG):
        return found
    why = f"the chat template is taken from {template}"
    change = JsonChange("", _TEMPLATE_KEY, value, why)
    if not any(companion.name == TOKENIZER_CONFIG for companion in found):
        raise RecipeError(
            f"output.companions: {template} keeps its chat template in {TOKENIZER_CONFIG}, which the "
            f"tokenizer of {tokenizer} does not have; take the tokenizer from there too"
        )
    return [
        replace(each, changes=(*each.changes, change)) if each.name == TOKENIZER_CONFIG else each
        for each in found
    ]


def _with_text(found: list[Companion], template: str) -> list[Companion]:
    """Return companions whose tokenizer has a chat template of its own, and no other one."""
    if not any(companion.name == TOKENIZER_CONFIG for companion in found):
        raise RecipeError(
            f"output.chat_template: is written to {TOKENIZER_CONFIG}, which no input has; leave the key out"
        )
    change = JsonChange("", _TEMPLATE_KEY, json.dumps(template), "output.chat_template")
    return [
        replace(each, changes=(*each.changes, change)) if each.name == TOKENIZER_CONFIG else each
        for each in found
        if kind_of(each.name) is not CompanionKind.CHAT_TEMPLATE
    ]


def _texts_of(value: object) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, dict):
        return {str(name): str(text) for name, text in value.items()}
    named = [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
    return {str(each.get("name")): str(each.get("template")) for each in named}


def _read_text(path: Path) -> str:
    raw = read_limited(path, MAX_CONFIG_BYTES)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HeaderError(f"{path}: expected UTF-8 at byte {error.start}; copy it again") from error
