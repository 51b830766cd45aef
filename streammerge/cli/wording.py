"""A recipe in the words of a command line: ``--method ties --base B math:0.6,density=0.3 code:0.4``.

The words become a document, which is then a recipe like any other: it is printed, can be saved, and is
checked and refused under the same keys.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.cli.streams import as_courtesy
from streammerge.errors import OutputError, OutputExistsError, RecipeError, printable

if TYPE_CHECKING:
    from streammerge.recipe.types import Recipe

ORIGIN = "command line"
"""What messages call the recipe."""
BAKING = "task_arithmetic"
"""The method that adds adapters to a base, each times its weight."""

_SETTING = re.compile(r"[a-z_][a-z0-9_]*=[^,]*")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
_OF_A_LINE = ("base", "parameter", "dtype", "semantics", "seed", "save_recipe")
"""The options that have a meaning only where the words are the recipe."""


def settle_words(options: argparse.Namespace, words: Sequence[str]) -> None:
    """Put into the options what their words mean: ``recipe``, ``out``, and ``document`` if they are one.

    Args:
        options: Of ``merge`` or ``plan``; the latter has no ``output``.
        words: What stands in the command without an option before it.

    Raises:
        RecipeError: The words are neither a recipe's file nor a recipe.
    """
    options.document = None
    merges = "output" in options
    if options.method is None:
        given = [name for name in _OF_A_LINE if getattr(options, name) is not None]
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise RecipeError(
                f"{option}: is for a recipe in the command itself, and no --method is given; name one, or "
                f"leave {option} to the recipe's file"
            )
        needed = ["RECIPE", "OUT"] if merges and options.output is None else ["RECIPE"]
        if len(words) != len(needed):
            raise RecipeError(
                f"expected {' '.join(needed)}, got {' '.join(words)!r}; "
                "for sources in the command itself give --method"
            )
        options.recipe = words[0]
        if merges:
            options.out = words[1] if options.output is None else options.output
        return
    if merges and options.output is None:
        raise RecipeError("--output: is missing; with --method all words are sources: give -o OUT")
    options.recipe = ORIGIN
    if merges:
        options.out = options.output
    options.document = document_of(options, options.method, words)


def settle_baking(options: argparse.Namespace) -> None:
    """Put into the options of ``bake`` the recipe that they stand for."""
    options.recipe = ORIGIN
    options.document = document_of(options, BAKING, options.adapters)


def read_words(options: argparse.Namespace) -> Recipe:
    """Return the recipe that stands in a command, having shown it, and saved it where that is asked for.

    It is shown on standard error, or as an event on standard output.

    Raises:
        RecipeError: It asks for something that cannot be; or ``bake`` is given what is no adapter.
        OutputError: It cannot be saved.
    """
    from streammerge.adapters.files.reading import is_adapter
    from streammerge.checkpoint.hub import locate_model
    from streammerge.recipe.text import dump_document
    from streammerge.run import parse_document

    document = options.document
    recipe = parse_document(document, ORIGIN, download=options.download)
    for source in recipe.sources if "adapters" in options else ():
        if not is_adapter(locate_model(source.path, download=options.download)):
            raise RecipeError(
                f"{source.path}: is no adapter, and `bake` merges adapters into a model; for models there is "
                "`streammerge merge --method METHOD`"
            )
    text = dump_document(document)
    if options.save_recipe is not None:
        save_recipe(text, Path(options.save_recipe))
    if options.json:
        event = {"event": "recipe", "recipe": document}
        print(json.dumps(event), file=as_courtesy(sys.stdout), flush=True)
    elif not getattr(options, "quiet", False):
        kept = (
            f"in {options.save_recipe}"
            if options.save_recipe
            else "to be kept with --save-recipe FILE"
        )
        print(f"# the recipe of this command, {printable(kept)}\n{text}", file=sys.stderr)
    return recipe


def document_of(
    options: argparse.Namespace, method: str, sources: Sequence[str]
) -> dict[str, object]:
    """Return the recipe's document.

    Args:
        options: With ``base``, ``parameter``, ``dtype``, ``semantics`` and ``seed``.
        method: The method's name.
        sources: A word for each.
    """
    document: dict[str, object] = {"method": method}
    if options.base is not None:
        document["base"] = options.base
    document["sources"] = [parse_source(word) for word in sources]
    parameters = _settings(options.parameter or (), "--parameter")
    if parameters:
        document["parameters"] = parameters
    for key in ("semantics", "seed"):
        if getattr(options, key) is not None:
            document[key] = getattr(options, key)
    if options.dtype is not None:
        document["output"] = {"dtype": options.dtype}
    return document


def parse_source(word: str) -> dict[str, object]:
    """Return the source that ``PATH[:WEIGHT][,KEY=VALUE]...`` means.

    What stands behind the last colon is a weight if it is a number, and no file or directory has the
    whole as its name. Values are read as in YAML.

    Raises:
        RecipeError: There is no path, or a key twice.
    """
    rest = word
    settings: list[str] = []
    while "," in rest and _SETTING.fullmatch(last := rest.rsplit(",", 1)[1]):
        settings.insert(0, last)
        rest = rest.rsplit(",", 1)[0]
    path, colon, number = rest.rpartition(":")
    weighted = bool(colon) and _NUMBER.fullmatch(number) and not os.path.exists(rest)  # noqa: PTH110 - odd names are no files
    source: dict[str, object] = {"path": path if weighted else rest}
    if not source["path"]:
        raise RecipeError(f"{word!r}: names no source; expected PATH[:WEIGHT][,KEY=VALUE]...")
    if weighted:
        source["weight"] = float(number)
    for key, value in _settings(settings, repr(word)).items():
        if key in source:
            raise RecipeError(f"{word!r}: gives {key} twice; give it once")
        source[key] = value
    return source


def _settings(words: Sequence[str], where: str) -> dict[str, object]:
    from streammerge.recipe.text import load_document

    settings: dict[str, object] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key or not text.strip():
            raise RecipeError(f"{where}: expected KEY=VALUE, got {word!r}")
        if key in settings:
            raise RecipeError(f"{where}: gives {key} twice; give it once")
        settings[key] = load_document(text, origin=f"{where}: {key}")
    return settings


def save_recipe(text: str, path: Path) -> None:
    """Write a recipe to a file, which may be there only if it holds this very text.

    Raises:
        OutputExistsError: It holds something else.
        OutputError: It cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError as error:
        if not _holds(path, text):
            raise OutputExistsError(
                f"{path}: is there already, and holds another recipe; choose another name for --save-recipe, "
                "or remove it"
            ) from error
    except OSError as error:
        raise OutputError(f"{path}: the recipe cannot be written: {error.strerror}") from error


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, UnicodeDecodeError):
        return False
