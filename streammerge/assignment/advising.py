"""Tensors that no method can merge, and the rules that say what becomes of them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from fnmatch import translate

from streammerge.dtypes import DType
from streammerge.errors import printable

_LISTED = 10
"""Names that a message lists before it counts the rest."""
_RULES = 6
"""Rules that a message spells out before it falls back to one per name."""
_NUMBERS = re.compile(r"(?<![A-Za-z0-9_])\d+(?![A-Za-z0-9_])")
_GLOB_SIGNS = re.compile(r"([*?\[])")


def opaque_message(
    opaque: Sequence[tuple[str, DType]], names: Collection[str], *, has_base: bool
) -> str:
    """Return what is wrong with tensors of types without arithmetic, and what to do.

    Args:
        opaque: Name and type of each of them, at least one.
        names: The names of all tensors of all inputs, which no glob may catch by accident.
        has_base: Whether there is a base to copy from.
    """
    listed = "".join(f"\n  {printable(name)}: {dtype}" for name, dtype in opaque[:_LISTED])
    more = len(opaque) - _LISTED
    listed += f"\n  and {more} more" if more > 0 else ""
    source = "base" if has_base else "0"
    globs = choose_globs([name for name, _ in opaque], names)
    # A JSON string is a YAML string, whatever the name holds.
    # What is F8_E8M0 is a scale of something, and nothing is what it was without its scales.
    scales = any(dtype is DType.F8_E8M0 for _, dtype in opaque)
    otherwise = "" if scales else ", here as copies (or `drop: true`)"
    quoted = [printable(json.dumps(glob, ensure_ascii=False)) for glob in globs]
    rules = "".join(f"\n  - {{tensors: {glob}, copy: {source}}}" for glob in quoted)
    return (
        f"{len(opaque)} tensor(s) are of a type that has no merge arithmetic and is only ever "
        f"copied:{listed}\nsay what becomes of them{otherwise}:\nrules:{rules}"
    )


def choose_globs(chosen: Sequence[str], names: Collection[str]) -> list[str]:
    """Return globs that match the chosen names and no other one.

    Numbers between dots become ``*``, so that one glob serves every layer. Where such a glob would
    catch other names as well, the names stand for themselves.

    Args:
        chosen: The names that are to match, at least one.
        names: All names there are.
    """
    wanted = set(chosen)
    numbers = {_NUMBERS.sub("*", _GLOB_SIGNS.sub(r"[\1]", name)): None for name in chosen}
    if len(numbers) <= _RULES:
        matches = [re.compile(translate(glob)).match for glob in numbers]
        if not any(match(name) for name in names if name not in wanted for match in matches):
            return list(numbers)
    return [_GLOB_SIGNS.sub(r"[\1]", name) for name in chosen]
