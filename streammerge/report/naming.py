"""Where a tensor belongs, told from its name alone: a layer, and a kind of module in it."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?:^|(?<=[./]))[0-9]+(?=[./]|$)")
_DIGITS = re.compile(r"([0-9]+)")
OUTSIDE = ""
"""The layer of tensors that are in none."""


def place_of(name: str) -> tuple[str, str]:
    """Return the layer and the kind of module of a tensor.

    The layer is the name up to its first number, the kind is what follows, with ``*`` for further
    numbers, so that the experts of a layer are of one kind. What has no number is in no layer.

        >>> place_of("model.layers.3.mlp.experts.7.up.weight")
        ('model.layers.3', 'mlp.experts.*.up.weight')
    """
    found = _NUMBER.search(name)
    if found is None or found.end() == len(name):
        return OUTSIDE, name
    rest = name[found.end() + 1 :]
    return name[: found.end()], _NUMBER.sub("*", rest)


def natural(name: str) -> tuple[tuple[int, str] | tuple[int, int], ...]:
    """Return a key that sorts names as people count: layer 2 before layer 10."""
    return tuple(
        (1, int(part)) if part.isdecimal() and part.isascii() else (0, part)
        for part in _DIGITS.split(name)
    )
