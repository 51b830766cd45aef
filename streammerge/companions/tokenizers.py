"""A tokenizer and what configurations say of it, where the result's vocabulary is drawn from several models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from streammerge.assignment.tokens import TOKENIZER, Tokens
from streammerge.checkpoint.types import Companion, JsonChange
from streammerge.companions.comparing import Participant
from streammerge.companions.kinds import read_object
from streammerge.recipe.types import CompanionKind

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Keys that hold numbers of tokens."""


def with_added_tokens(companions: Sequence[Companion], tokens: Tokens) -> tuple[Companion, ...]:
    """Return the companions with a tokenizer that has the tokens that others bring."""
    return tuple(
        replace(each, insertion=tokens.insertion) if each.name == TOKENIZER else each
        for each in companions
    )


def state_special(
    tokens: Tokens, taken: Mapping[CompanionKind, Participant]
) -> dict[str, tuple[JsonChange, ...]]:
    """Return what configurations say of special tokens, by file, where they are another model's."""
    files = {_CONFIG: CompanionKind.CONFIG, _GENERATION: CompanionKind.GENERATION_CONFIG}
    return {
        name: tuple(_changes(tokens, name, taken[kind].directory))
        for name, kind in files.items()
        if taken[kind].directory != tokens.origin
    }


def _changes(tokens: Tokens, name: str, directory: Path) -> Iterator[JsonChange]:
    mine = read_object(directory / name)
    theirs = read_object(tokens.origin / name) or read_object(tokens.origin / _CONFIG)
    why = f"the vocabulary is that of {tokens.label.split()[0]}"
    for key in _SPECIAL:
        if key in mine and theirs.get(key, mine[key]) != mine[key]:
            yield JsonChange("", key, json.dumps(theirs[key]), why)
