"""What a configuration that another model's tensors get has to say of how these are stored.

It may be that of a source, or of a model that takes no part: its own tensors may be codes, or tied
where those of the result are apart.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping

from streammerge.checkpoint.coded import QUANTIZATION_KEY
from streammerge.checkpoint.ties import (
    TIE_KEY,
    declares_tie,
    head_pair,
    iter_pairs,
    scales_when_tied,
)
from streammerge.checkpoint.types import JsonChange
from streammerge.errors import RecipeError

_Config = Mapping[str, object]


def state_storage(
    config: _Config, first: _Config | None, names: Collection[str], *, label: str
) -> Iterator[JsonChange]:
    """Yield what a configuration says otherwise than the tensors that it is to describe.

    Args:
        config: The ``config.json`` that the output has.
        first: That of the first model, which says what a tensor that is stored once stands for.
        names: The tensors of the output.
        label: How messages name the model that the configuration is from.

    Raises:
        RecipeError: Only tied embeddings are right, and the key that says so changes what this model
            computes besides.
    """
    sections = ["", *(k for k, v in config.items() if isinstance(v, dict) and k.endswith("config"))]
    for section in sections:
        settings = config[section] if section else config
        if isinstance(settings, dict) and QUANTIZATION_KEY in settings:
            yield JsonChange(section, QUANTIZATION_KEY, None, "all weights are stored as numbers")
    tied = _should_say(config, first, names)
    if tied is None:
        return
    if scales_when_tied(config):
        raise RecipeError(
            f"output.companions: the configuration of {label} says otherwise than the result whether "
            f"embeddings are tied, and in models of this kind {TIE_KEY} also decides about a factor "
            "before the head; take the configuration from another model"
        )
    for section in sections:
        settings = config[section] if section else config
        if not section or (isinstance(settings, dict) and TIE_KEY in settings):
            why = "embeddings are stored once" if tied else "embeddings are stored apart"
            yield JsonChange(section, TIE_KEY, json.dumps(tied), why)


def _should_say(config: _Config, first: _Config | None, names: Collection[str]) -> bool | None:
    """Return whether embeddings are tied in the result; None where the configuration is right."""
    untied = {**config, TIE_KEY: False}
    for pair in iter_pairs(names):
        said = declares_tie(config, pair)
        if said is not False and declares_tie(untied, pair) is not True:
            return False
    for name in names:
        head = head_pair(name)
        if head is not None and head.outer not in names and declares_tie(config, head) is False:
            return True if declares_tie(first, head) else None
    return None
