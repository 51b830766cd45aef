"""Scripts by which shells complete commands, options, files and methods."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

from streammerge.adapters.combining.recipes import every_method
from streammerge.errors import DependencyError
from streammerge.methods import discover_methods

_FILES = frozenset(
    {"RECIPE", "CONFIG", "PATH", "OUT", "BASE", "TUNED", "FILE", "WORD", "ADAPTER[:WEIGHT]"}
)
"""What arguments are called that a file or a directory may be."""
_DIRECTORIES = frozenset({"DIR"})
_METHODS = frozenset({"METHOD", "NAME"})


def render_completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script for a shell.

    Args:
        parser: Of all commands; what its arguments may be is noted in it.
        shell: ``bash``, ``zsh`` or ``fish``.

    Raises:
        DependencyError: The library that writes them is not installed.
    """
    try:
        shtab = importlib.import_module("shtab")
    except ImportError as error:
        raise DependencyError(
            "completion needs shtab, which is not installed: pip install 'streammerge[completion]'"
        ) from error
    names = sorted(
        every_method({name: each.parameters for name, each in discover_methods().items()})
    )
    for action in _every_action(parser):
        words = {*([action.metavar] if isinstance(action.metavar, str) else action.metavar or ())}
        if words & _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab's own way
        elif words & _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif words & _METHODS:
            action.choices = names
    return str(shtab.complete(parser, shell=shell))


def _every_action(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to list them
        yield action
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for each in action.choices.values():
                yield from _every_action(each)
