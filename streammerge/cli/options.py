"""Options that several commands have, and commands that need none of these."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from streammerge.cli import answering
from streammerge.units import parse_size


def add_command(added: Any, name: str, summary: str, example: str, **more: str) -> Any:
    """Add a command whose help ends with an example, and return its parser."""
    parser = added.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **more,
    )
    parser.set_defaults(parser=parser)
    return parser


def add_words(parser: argparse.ArgumentParser) -> None:
    """Add the words: files, or sources."""
    parser.add_argument(
        "words",
        metavar="WORD",
        nargs="+",
        help="a recipe in YAML or JSON, or mergekit's YAML, and what to make; with --method, the sources: "
        "PATH[:WEIGHT][,KEY=VALUE]...",
    )


def add_line(parser: argparse.ArgumentParser) -> None:
    """Add what makes the words a recipe."""
    parser.add_argument(
        "--method", metavar="METHOD", help="merge the sources that are named here, without a recipe"
    )
    parser.add_argument("--base", metavar="BASE", help="with --method: the base")
    add_values(parser)


def add_values(parser: argparse.ArgumentParser) -> None:
    """Add the keys of a recipe that stands in the command."""
    parser.add_argument(
        "-p",
        "--parameter",
        action="append",
        metavar="NAME=VALUE",
        help="a parameter of the method for all sources, such as density=0.2 (may be repeated)",
    )
    parser.add_argument("--dtype", metavar="DTYPE", help="what is stored (default: as the base)")
    parser.add_argument(
        "--semantics", metavar="WHOSE", help="whose definition of the method: peft, mergekit, paper"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of random masks (default: 0)")
    parser.add_argument(
        "--save-recipe", metavar="FILE", help="write the recipe that the command stands for"
    )


def add_methods(added: Any) -> None:
    """Add the command that lists methods, or explains one."""
    methods = add_command(
        added,
        "methods",
        "list merge methods, or explain one",
        "streammerge methods ties",
    )
    methods.add_argument("name", metavar="NAME", nargs="?", help="a method")
    methods.add_argument("--json", action="store_true", help="the same as JSON")
    methods.add_argument(
        "--schema", action="store_true", help="the JSON Schema of recipes, for editors"
    )
    methods.set_defaults(command=answering.run_methods)


def add_doctor(added: Any) -> None:
    """Add the command that looks at the machine."""
    doctor = add_command(
        added,
        "doctor",
        "show what this machine and installation have for merges",
        "streammerge doctor",
    )
    doctor.add_argument(
        "--directory",
        default=".",
        metavar="DIR",
        help="where to try how fast the disk is, with up to 64 MiB (default: the current directory)",
    )
    doctor.add_argument("--no-probe", action="store_true", help="leave the disk alone")
    doctor.add_argument("--json", action="store_true", help="the same as JSON")
    doctor.set_defaults(command=answering.run_doctor)


def add_completion(added: Any, build: Callable[[], argparse.ArgumentParser]) -> None:
    """Add the command that prints what shells complete; ``build`` makes the parser of all commands."""
    completion = add_command(
        added,
        "completion",
        "print what lets a shell complete commands, options and methods",
        "streammerge completion bash > ~/.local/share/bash-completion/completions/streammerge",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")
    completion.set_defaults(command=lambda options: answering.run_completion(options, build()))


def read_size(text: str) -> int:
    """Return the bytes that a text says."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_fraction(text: str) -> float:
    """Return a share above 0 and up to 1."""
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, got {text!r}")
    return fraction


def read_engine(text: str) -> str:
    """Return an engine, as ``--on`` names it."""
    from streammerge.executors.driving import check_engine  # Most commands have no use for it.

    try:
        check_engine(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("on: ")) from error
    return text


def read_part(text: str) -> tuple[int, int]:
    """Return a part and of how many, as ``--part`` names them."""
    part, slash, parts = text.partition("/")
    if not slash or not part.isdecimal() or not parts.isdecimal():
        raise argparse.ArgumentTypeError(f"expected K/N, such as 2/4, got {text!r}")
    if not 1 <= int(part) <= int(parts):
        raise argparse.ArgumentTypeError(
            f"expected a part from 1 to {int(parts)} of {int(parts)}, got {text!r}"
        )
    return int(part), int(parts)


def read_count(text: str) -> int:
    """Return a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)
