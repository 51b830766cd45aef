"""A model and what its configuration says, as far as fitting the one to the other needs it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streammerge.errors import printable

Shapes = Mapping[str, tuple[int, ...]]
Config = Mapping[str, object]

STACK = re.compile(r"(?P<stack>(?:[^.]+\.)*?[^.]+)\.(?P<number>\d{1,9})\.")
"""The list of modules that a tensor is in, and which of its members."""
LISTED = 5
"""How many names a message lists."""


@dataclass(frozen=True, slots=True)
class Described:
    """A model and what its configuration says."""

    label: str
    """As messages name it."""
    config: Config
    """Its ``config.json``."""
    shapes: Shapes
    """Its tensors."""


def sections(config: Config) -> list[tuple[str, Config]]:
    """Return what a configuration says of the whole, and of its parts by their key (``text_config``)."""
    inner = [(k, v) for k, v in config.items() if isinstance(v, dict) and k.endswith("config")]
    return [("", config), *inner]


def stacks(shapes: Shapes) -> dict[str, frozenset[int]]:
    """Return the numbers of the layers in every list of modules, by the list's name."""
    found: dict[str, set[int]] = {}
    for name in shapes:
        stack = STACK.match(name)
        if stack is not None:
            found.setdefault(stack["stack"], set()).add(int(stack["number"]))
    return {name: frozenset(numbers) for name, numbers in found.items()}


def listed(names: Sequence[str]) -> str:
    """Return the first names, as messages list them, and how many more there are."""
    more = len(names) - LISTED
    return ", ".join(map(printable, names[:LISTED])) + (f" and {more} more" if more > 0 else "")
