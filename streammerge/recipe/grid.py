"""``grid:`` in a recipe: one recipe per combination of values, for outputs that are made together.

    grid:
      parameters.density: [0.2, 0.5]
      sources.1.weight: [0.5, 1.0]

A key is the way to a value, from key to key, places in lists counted from 0. It is put into the document
before that is checked, so what holds for the value in a recipe holds here, and other tools' recipes may
have a grid as well.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence
from typing import Any

from streammerge.errors import RecipeError
from streammerge.recipe.refusing import shown

GRID_KEY = "grid"
MOST_OUTPUTS = 100
"""More are a slip rather than a wish, and each takes the room of a model."""
_MOST_LETTERS = 100
"""Of a name that becomes that of a directory."""


def expand_grid(document: object, *, origin: str) -> list[tuple[str, dict[str, Any]]] | None:
    """Return the recipes that a document with a grid stands for, each with a name; None without one.

    Args:
        document: The recipe's unchecked values.
        origin: What to call it in messages.

    Raises:
        RecipeError: The grid is none, or leads to no place in the recipe.
    """
    if not isinstance(document, dict) or GRID_KEY not in document:
        return None
    where = f"{origin}: {GRID_KEY}"
    axes = _axes(document[GRID_KEY], where)
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > MOST_OUTPUTS:
        raise RecipeError(
            f"{where}: makes {count} outputs, of at most {MOST_OUTPUTS}; leave some values out"
        )
    plain = {key: value for key, value in document.items() if key != GRID_KEY}
    labels = _labels(list(axes))
    expanded: dict[str, dict[str, Any]] = {}
    for chosen in itertools.product(*axes.values()):
        made = copy.deepcopy(plain)
        for path, value in zip(axes, chosen, strict=True):
            _put(made, path, copy.deepcopy(value), where)
        parts = (f"{label}={_text(value)}" for label, value in zip(labels, chosen, strict=True))
        name = ",".join(parts)[:_MOST_LETTERS]
        if name in expanded:
            raise RecipeError(
                f"{where}: two outputs would be called {shown(name)}; give each value once, or their "
                "recipes one by one with --also"
            )
        expanded[name] = made
    return list(expanded.items())


def _axes(grid: object, where: str) -> dict[str, list[Any]]:
    if not isinstance(grid, dict) or not grid:
        raise RecipeError(
            f"{where}: expected a mapping of keys such as parameters.density to lists of values, got "
            f"{shown(grid)}"
        )
    for path, values in grid.items():
        if not isinstance(path, str) or not path or not all(path.split(".")):
            raise RecipeError(
                f"{where}: expected keys such as parameters.density or sources.0.weight, got "
                f"{shown(path)}"
            )
        if not isinstance(values, list) or not values:
            raise RecipeError(f"{where}.{path}: expected a list of values, got {shown(values)}")
    return grid


def _labels(paths: Sequence[str]) -> list[str]:
    """Return what the keys are called in names: as little of their ends as tells them apart."""
    for length in itertools.count(1):
        labels = [".".join(path.split(".")[-length:]) for path in paths]
        if len(set(labels)) == len(labels) and not any(label[0].isdigit() for label in labels):
            return labels
        if all(length >= len(path.split(".")) for path in paths):
            break
    return list(paths)


def _text(value: object) -> str:
    """Return a value as a part of a file's name."""
    if isinstance(value, list):
        return "+".join(map(_text, value))
    if isinstance(value, bool) or value is None:
        value = {True: "true", False: "false", None: "none"}[value]
    return re.sub(r"[^\w.+-]+", "_", str(value)).strip("_") or "_"


def _put(document: dict[str, Any], path: str, value: object, where: str) -> None:
    """Put a value to its place; mappings on the way that are not there are made."""
    *way, last = path.split(".")
    at: Any = document
    for step in way:
        if isinstance(at, dict) and at.get(step) is None:
            at[step] = {}
        at = at[_key(at, step, path, where)]
    if isinstance(at, dict):
        at[last] = value
    else:
        at[_key(at, last, path, where)] = value


def _key(at: object, step: str, path: str, where: str) -> str | int:
    """Return what a step of a path is a key of."""
    if isinstance(at, dict):
        return step
    if not isinstance(at, list):
        raise RecipeError(
            f"{where}.{path}: {step} would be inside of {shown(at)}; end the key there"
        )
    if not step.isdecimal() or int(step) >= len(at):
        raise RecipeError(
            f"{where}.{path}: expected a place in a list of {len(at)}, counted from 0, got {shown(step)}"
        )
    return int(step)
