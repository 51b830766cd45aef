"""Heads of attention, whose rows programs keep in different orders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from streammerge.adapters.files.forms import FormedModule
from streammerge.errors import UnsupportedAdapterError, printable

_PAIRED = frozenset({"llama", "mistral"})
"""Values of ``model_type`` for which torchtune keeps the pairs that are turned together side by side,
as Meta does, and transformers half a head apart."""
_TURNED = ("q_proj", "k_proj")


def key_value_heads(config: Mapping[str, object] | None) -> int | None:
    """Return a model's heads of keys and values; None where its configuration does not say."""
    text = _text_config(config)
    for key in ("num_key_value_heads", "num_attention_heads"):
        if type(count := text.get(key)) is int and count > 0:
            return count
    return None


def in_order_of(
    module: FormedModule, config: Mapping[str, object] | None, *, where: str
) -> FormedModule:
    """Return a module of torchtune that changes rows in the order in which transformers have them.

    Args:
        module: The module, as torchtune has it.
        config: The base's configuration.
        where: The adapter's place in the recipe and its path, for messages.

    Raises:
        UnsupportedAdapterError: The order depends on what is not known here.
    """
    if not module.name.endswith(_TURNED):
        return module
    text = _text_config(config)
    head = text.get("head_dim")
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    if head is None and type(heads) is int and type(hidden) is int and heads > 0:
        head = hidden // heads
    sound = type(head) is int and head > 0 and head % 2 == 0 and (module.outer or 0) % head == 0
    if text.get("model_type") not in _PAIRED or not sound or not isinstance(head, int):
        raise UnsupportedAdapterError(
            f"{where}: {printable(module.stem)}: in which order torchtune keeps the rows of heads is "
            f"known here for {' and '.join(sorted(_PAIRED))}, with their size in config.json; the base "
            f"is {printable(str(text.get('model_type')))} with heads of {printable(str(head))} rows: save "
            "the adapter in PEFT's form with torchtune"
        )
    return replace(module, settings={**module.settings, "head": float(head)})


def _text_config(config: Mapping[str, object] | None) -> Mapping[str, object]:
    inner = (config or {}).get("text_config")
    return inner if isinstance(inner, dict) else config or {}
