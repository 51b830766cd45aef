"""Module names against the patterns of an adapter's configuration, by PEFT's rules.

The patterns are regular expressions from a file that nobody vouches for. Python's engine may take
exponential time on some, so those that could are refused before they are used.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from streammerge.adapters.files.types import AdapterConfig, Patterns, Targets
from streammerge.errors import HeaderError

MAX_PATTERN_CHARACTERS = 4096
"""PEFT joins the names of all targets into one expression; longer ones have never been seen."""
MAX_PATTERNS = 100_000
"""One for every module of the largest mixture of experts."""
_MAX_REPEATS = 2
"""Unbounded repetitions in a sequence: matching takes at most (characters of a name)^3 steps."""
_MAX_NAME_CHARACTERS = 400

Lookup = Callable[[str], float]
"""From a module's path to its rank or alpha."""


def compile_pattern(text: str, *, where: str) -> re.Pattern[str]:
    """Return a regular expression that matches in bounded time.

    Args:
        text: The expression, as Python's ``re`` has it.
        where: File and key, for messages.

    Raises:
        HeaderError: It is no expression, or one that may take very long.
    """
    if len(text) > MAX_PATTERN_CHARACTERS:
        raise HeaderError(
            f"{where}: a pattern of {len(text)} characters, the limit is {MAX_PATTERN_CHARACTERS}"
        )
    # Outside of escapes and character classes, every * + { after a group, and every lookaround or
    # back reference, is where the time goes.
    bare = re.sub(r"\\[^\d]|\[[^\]]*\]", "x", text)
    repeats = max(len(re.findall(r"[*+{]", part)) for part in bare.split("|"))
    if (
        re.search(r"\)[*+{?]*[*+{]|\\\d|\(\?(?!:)", bare)
        or repeats > _MAX_REPEATS
        or ("(" in bare and len(re.findall(r"[*+{]", bare)) > 4 * _MAX_REPEATS)
    ):
        raise HeaderError(
            f"{where}: the pattern {text[:80]!r} repeats more than {_MAX_REPEATS} times or repeats "
            "a group, which may take very long to match; spell the module names out"
        )
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise HeaderError(f"{where}: {text[:80]!r} is no pattern: {error}") from error


def build_lookup(patterns: Patterns, default: float, *, where: str) -> Lookup:
    """Return PEFT's lookup: the first pattern that ends a path at a dot decides.

    Follows: peft.utils.other.get_pattern_key 0.21.2.

    Args:
        patterns: Expressions and values, in the file's order.
        default: The value for everything else.
        where: File and key, for messages.
    """
    compiled = []
    for text, value in patterns:
        compile_pattern(text, where=where)
        # Most patterns are plain names. The part after their last dot tells at once that they do
        # not match, which saves trying a thousand patterns on a thousand modules.
        plain = re.fullmatch(r"(?:[\w-]|\\?\.)*?([\w-]+)", text)
        ending = plain[1] if plain else ""
        compiled.append((ending, re.compile(rf"(.*\.)?({text})$").match, value))

    def look_up(path: str) -> float:
        check_path(path, where=where)
        for ending, matches, value in compiled:
            if path.endswith(ending) and matches(path):
                return value
        return default

    return look_up


def check_path(path: str, *, where: str) -> None:
    """Raise if a module's path is too long to match patterns against."""
    if len(path) > _MAX_NAME_CHARACTERS:
        raise HeaderError(
            f"{where}: a module path of {len(path)} characters, {path[:60]!r}...; the limit is "
            f"{_MAX_NAME_CHARACTERS}"
        )


def matches_targets(targets: Targets, path: str, *, where: str) -> bool:
    """Return whether ``target_modules`` or ``exclude_modules`` names the module.

    Follows: peft.tuners.tuners_utils.check_target_module_exists 0.21.2, without layer numbers.
    """
    if targets is None:
        return False
    if isinstance(targets, str):
        return compile_pattern(targets, where=where).fullmatch(path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def is_saved_module(config: AdapterConfig, path: str) -> bool:
    """Return whether ``modules_to_save`` names the module at ``path`` or one around it.

    PEFT compares the ends of paths; a module inside belongs to the one that was saved.
    """
    parts = path.split(".")
    around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(parent.endswith(name) for parent in around for name in config.modules_to_save)


def blocks_targets(modules_to_save: tuple[str, ...], path: str) -> str | None:
    """Return the entry of ``modules_to_save`` that makes PEFT leave a target at ``path`` alone."""
    dotted = f".{path}."
    return next((name for name in modules_to_save if f".{name}." in dotted), None)
