"""What messages say of keys and values in a recipe."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable

from streammerge.errors import suggestion

MAX_SHOWN_CHARACTERS = 60
"""How much of a wrong value a message repeats."""
MERGEKIT_KEYS = {
    "merge_method": 'the native key is "method"',
    "models": 'the native key is "sources", a list of {path, weight, ...}',
    "slices": 'the native key is "layers"',
    "modules": 'there is no native key; "sources" merges whole models',
    "base_model": 'the native key is "base"',
    "dtype": 'the native keys are "compute_dtype" and "output.dtype"',
    "out_dtype": 'the native key is "output.dtype"',
    "tokenizer": 'the native key is "vocabulary"',
    "tokenizer_source": 'the native key is "vocabulary"',
    "chat_template": 'the native key is "output.chat_template"',
    "model": 'the native key is "path"',
}
"""Keys of mergekit's recipes, with what streammerge's own recipes say instead."""


def shown(value: object) -> str:
    """Return ``value`` as a message repeats it: on one line, short, and as YAML would spell it."""
    match value:
        case None | bool():
            return json.dumps(value)
        case str():
            short = value if len(value) <= MAX_SHOWN_CHARACTERS else f"{value[:57]}..."
            # Escaping what is not printable keeps a message on one line and fit for any terminal.
            return json.dumps(short, ensure_ascii=not short.isprintable())
        case int() if value.bit_length() > 256:
            return f"an integer of {value.bit_length()} bits"
        case int() | float():
            return str(value)
        case list() | tuple():
            return f"a list of {len(value)}"
        case dict():
            return "a mapping"
        case _:
            return f"a {type(value).__name__}"


def key_path(*steps: object) -> str:
    """Return the path of a key as messages write it: ``sources[2].weight``."""
    path = ""
    for step in steps:
        if isinstance(step, int) and not isinstance(step, bool):
            path += f"[{step}]"
        else:
            plain = isinstance(step, str) and re.fullmatch(r"[\w.-]{1,60}", step)
            path += ("." if path else "") + (str(step) if plain else shown(step))
    return path


def refuse_choice(value: object, words: Iterable[str]) -> str:
    """Return what is wrong with a ``value`` that is none of the ``words``."""
    known = tuple(words)
    guess = suggestion(value, known) if isinstance(value, str) else ""
    # The known words stand in the message already; only a near miss adds something.
    guess = guess if "did you mean" in guess else ""
    return f"expected {' or '.join(known)}, got {shown(value)}{guess}"


def unknown_key(key: object, known: Iterable[str]) -> str:
    """Return what is wrong with a ``key`` that is none of the ``known`` ones."""
    if isinstance(key, str) and key in MERGEKIT_KEYS:
        return mergekit_key(key)
    return f"unknown key{suggestion(key if isinstance(key, str) else shown(key), known)}"


def mergekit_key(key: str) -> str:
    """Return what to write instead of a ``key`` of mergekit's recipes."""
    return f"this key belongs to mergekit's dialect; {MERGEKIT_KEYS[key]}"


def refuse_number(value: object, minimum: float | None, maximum: float | None) -> str | None:
    """Return what is wrong with ``value`` as a finite number in a range, or None if nothing is."""
    expected = "a number"
    if minimum is not None and maximum is not None:
        expected = f"a number in [{minimum:g}, {maximum:g}]"
    elif minimum is not None:
        expected = f"a number of at least {minimum:g}"
    elif maximum is not None:
        expected = f"a number of at most {maximum:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"expected {expected}, got {shown(value)}"
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        return f"expected {expected.replace('a number', 'a finite number', 1)}, got {shown(value)}"
    below = minimum is not None and number < minimum
    above = maximum is not None and number > maximum
    return f"expected {expected}, got {shown(value)}" if below or above else None


def refuse_integer(value: object, minimum: float | None, maximum: float | None) -> str | None:
    """Return what is wrong with ``value`` as a whole number in a range, or None if nothing is."""
    said = refuse_number(value, minimum, maximum)
    if said is None and type(value) is not int:
        said = f"expected a number, got {shown(value)}"
    return None if said is None else said.replace("a number", "a whole number", 1)
