"""Arguments in, exit code out.

Exit codes: 0 done, 1 merge failed or verification found damage, 2 usage or recipe, 3 does not fit,
4 output exists, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from streammerge.cli import answering, commands, looking
from streammerge.cli.options import (
    add_command,
    add_completion,
    add_doctor,
    add_line,
    add_methods,
    add_values,
    add_words,
    read_count,
    read_engine,
    read_fraction,
    read_part,
    read_size,
)
from streammerge.cli.streams import print_result
from streammerge.cli.wording import settle_words
from streammerge.errors import StreamMergeError, printable
from streammerge.limits import check_address_space, naming_limits
from streammerge.version import VERSION

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        options = _parse(arguments)
        with naming_limits():
            check_address_space()
            return int(options.command(options))
    except StreamMergeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(f"  {note}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        notes = getattr(interrupt, "__notes__", ())
        print("; ".join(["interrupted", *notes]), file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as `| head` does, and wants to hear no more.
        return 1
    except OSError as error:
        # Whatever the system refuses where nothing more precise is known.
        where = "" if error.filename is None else f"{printable(os.fsdecode(error.filename))}: "
        print(f"{type(error).__name__}: {where}{error.strerror or error}", file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    """A parser whose help counts as printed only if it is."""

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        # The one place through which all of its text goes. Its own swallows or raises errors,
        # by the version.
        if file is sys.stdout:
            print_result(message.rstrip("\n"))
        else:
            print(message, end="", file=sys.stderr)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of a command, its words settled.

    Raises:
        RecipeError: The words are neither the name of a recipe nor one.
    """
    parser = build_parser()
    # Words that stand behind an option are left over where any number of them may stand.
    options, rest = parser.parse_known_args(arguments)
    if rest and not ("words" in options and not any(word.startswith("-") for word in rest)):
        options.parser.error(
            f"unrecognized arguments: {' '.join(rest)}{_meant(options.parser, rest)}"
        )
    if "words" in options:
        settle_words(options, [*options.words, *rest])
    return options


def _meant(parser: argparse.ArgumentParser, rest: Sequence[str]) -> str:
    """Return what options that a command has not may have been meant to be."""
    from streammerge.adapters.combining.recipes import every_method
    from streammerge.methods import discover_methods

    known = [option for action in parser._actions for option in action.option_strings]  # noqa: SLF001 - argparse tells it nowhere else
    methods = every_method({name: each.parameters for name, each in discover_methods().items()})
    parameters = {spec.name for specs in methods.values() for spec in specs}
    said = []
    for word in rest:
        option, _, value = word.partition("=")
        close = difflib.get_close_matches(option, known, n=1, cutoff=0.7)
        if option.startswith("--") and option[2:] in parameters and "-p" in known:
            said.append(
                f"{option[2:]} is a parameter of methods: -p {option[2:]}={value or 'VALUE'}"
            )
        elif option.startswith("-") and close:
            said.append(f"did you mean {close[0]}?")
    return "".join(f"; {each}" for each in said)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        prog="streammerge",
        description="Merge models larger than memory, exactly, at the speed of the disk.",
    )
    parser.add_argument("--version", action="version", version=VERSION)
    added = parser.add_subparsers(required=True, metavar="COMMAND")

    for add in (
        _add_merge,
        _add_plan,
        _add_bake,
        _add_analyze,
        _add_diff,
        _add_inspect,
        _add_verify,
        _add_status,
        _add_convert,
        _add_extract,
        add_methods,
        add_doctor,
    ):
        add(added)
    add_completion(added, build_parser)
    return parser


def _add_merge(added: Any) -> None:
    merge = add_command(
        added,
        "merge",
        "merge models as a recipe says",
        "streammerge merge recipe.yaml merged --memory 2GiB",
        usage="streammerge merge RECIPE OUT [options]\n"
        "       streammerge merge --method METHOD [--base BASE] SOURCE... -o OUT [options]",
    )
    add_words(merge)
    merge.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="directory to make, one file if it ends with .safetensors, or s3://bucket/folder; of a recipe with a grid, the "
        "directory of all its outputs",
    )
    add_line(merge)
    merge.add_argument(
        "--also",
        nargs=2,
        action="append",
        metavar=("RECIPE", "OUT"),
        help="merge another recipe from the same read of the inputs (may be repeated)",
    )
    _add_running(merge)
    merge.set_defaults(command=commands.run_merge)


def _add_bake(added: Any) -> None:
    bake = add_command(
        added,
        "bake",
        "merge adapters into the model that they were trained on",
        "streammerge bake models/base adapters/math adapters/code:0.5 baked",
    )
    bake.add_argument("base", metavar="BASE", help="the model, or org/model[@revision]")
    bake.add_argument(
        "adapters",
        metavar="ADAPTER[:WEIGHT]",
        nargs="+",
        help="an adapter, and a factor of what it changes (default: 1)",
    )
    bake.add_argument("out", metavar="OUT", help="as for merge")
    add_values(bake)
    _add_running(bake)
    bake.set_defaults(command=commands.run_bake, also=None)


def _add_running(parser: argparse.ArgumentParser) -> None:
    """Add how a merge is run and told."""
    _add_resources(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--on",
        type=read_engine,
        metavar="ENGINE",
        help="merge in parts on workers that see the same files: dask or ray for workers on this machine, "
        "dask://HOST:PORT for those of a scheduler, ray://HOST:PORT for the nodes of a head",
    )
    where.add_argument(
        "--part",
        type=read_part,
        metavar="K/N",
        help="do only part K of N; other processes, here or where the same files are seen, do the others, "
        "and the last one puts the output in place",
    )
    _add_report(parser)
    anew = parser.add_mutually_exclusive_group()
    anew.add_argument(
        "--resume",
        action="store_true",
        help="continue where an interrupted merge stopped, if any; done if it is complete",
    )
    anew.add_argument(
        "--overwrite", action="store_true", help="replace an earlier or unfinished merge in OUT"
    )
    parser.add_argument(
        "--byte-source",
        choices=("pread", "mmap"),
        default="pread",
        help="how inputs are read; mmap needs the compiled kernels, which guard it, and is no faster",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    parser.add_argument("--json", action="store_true", help="events as JSON lines on stdout")


def _add_plan(added: Any) -> None:
    plan = add_command(
        added,
        "plan",
        "show what a merge would do, reading headers only",
        "streammerge plan recipe.yaml --memory 2GiB",
        usage="streammerge plan RECIPE [options]\n"
        "       streammerge plan --method METHOD [--base BASE] SOURCE... [options]",
    )
    add_words(plan)
    add_line(plan)
    plan.add_argument(
        "--also",
        action="append",
        metavar="RECIPE",
        help="show another recipe, merged from the same read (may be repeated)",
    )
    _add_resources(plan)
    _add_report(plan)
    plan.add_argument(
        "--estimate",
        action="store_true",
        help="also read and write for a moment, the output's disk being the current directory's, and say "
        "how long the disk will take",
    )
    plan.add_argument("--json", action="store_true", help="the whole plan as JSON")
    plan.set_defaults(command=commands.run_plan)


def _add_analyze(added: Any) -> None:
    analyze = add_command(
        added,
        "analyze",
        "tell what a merge would keep of its sources, without merging",
        "streammerge analyze recipe.yaml --json",
        usage="streammerge analyze RECIPE [options]\n"
        "       streammerge analyze --method METHOD [--base BASE] SOURCE... [options]",
    )
    add_words(analyze)
    add_line(analyze)
    _add_resources(analyze, auto=_IS_THE_CPU)
    analyze.add_argument("--quiet", action="store_true", help="no progress on standard error")
    analyze.add_argument("--json", action="store_true", help="the whole report as JSON")
    _add_page(analyze)
    analyze.set_defaults(command=looking.run_analyze, also=None)


def _add_diff(added: Any) -> None:
    diff = add_command(
        added,
        "diff",
        "tell what models or adapters differ in; exit code 1 where they do",
        "streammerge diff models/base models/math models/code",
    )
    diff.add_argument("first", metavar="A", help="a checkpoint or adapter, or org/model[@revision]")
    diff.add_argument("others", metavar="B", nargs="+", help="what is compared with it")
    diff.add_argument("--memory", type=read_size, metavar="SIZE", help="as for merge")
    diff.add_argument("--workers", type=read_count, metavar="N", help="as for merge")
    _add_download(diff)
    diff.add_argument("--quiet", action="store_true", help="no progress on standard error")
    diff.add_argument("--json", action="store_true", help="the whole comparison as JSON")
    _add_page(diff)
    diff.set_defaults(command=looking.run_diff)


def _add_inspect(added: Any) -> None:
    inspect = add_command(
        added,
        "inspect",
        "show what a checkpoint or adapter holds",
        "streammerge inspect models/base",
    )
    inspect.add_argument(
        "path",
        metavar="PATH",
        help="a checkpoint or adapter: a directory, a file, or org/model[@revision]",
    )
    _add_download(inspect)
    inspect.add_argument("--json", action="store_true", help="every tensor as JSON")
    inspect.set_defaults(command=answering.run_inspect)


def _add_verify(added: Any) -> None:
    verify = add_command(
        added,
        "verify",
        "compare a merged model with its manifest",
        "streammerge verify merged --against recipe.yaml",
    )
    verify.add_argument(
        "out", metavar="OUT", help="the merged model: a directory, a file, or s3://bucket/folder"
    )
    verify.add_argument(
        "--against",
        metavar="RECIPE",
        help="also merge a random sample again from the inputs, and compare it bit by bit",
    )
    verify.add_argument(
        "--sample",
        type=read_fraction,
        default=0.05,
        metavar="FRACTION",
        help="how much of the model --against merges again (default: 0.05)",
    )
    verify.add_argument(
        "--memory", type=read_size, metavar="SIZE", help="most memory that --against may use"
    )
    _add_device(verify, auto=_IS_THE_CPU)
    _add_download(verify)
    verify.add_argument("--quiet", action="store_true", help="no progress on standard error")
    verify.add_argument("--json", action="store_true", help="the findings as JSON")
    verify.set_defaults(command=commands.run_verify)


def _add_status(added: Any) -> None:
    status = add_command(
        added,
        "status",
        "show how far an output is, and each of its parts",
        "streammerge status merged",
    )
    status.add_argument(
        "out", metavar="OUT", help="the merged model, or where it is to be; s3://bucket/folder too"
    )
    status.add_argument("--json", action="store_true", help="the same as JSON")
    status.set_defaults(command=answering.run_status)


def _add_convert(added: Any) -> None:
    convert = add_command(
        added,
        "convert",
        "print the recipe that means the same as one of mergekit's",
        "streammerge convert mergekit.yaml > recipe.yaml",
    )
    convert.add_argument("recipe", metavar="CONFIG", help="mergekit's YAML, or any recipe")
    convert.set_defaults(command=answering.run_convert)


def _add_extract(added: Any) -> None:
    extract = add_command(
        added,
        "extract",
        "make a LoRA of the difference between two models",
        "streammerge extract models/base models/math extracted --rank 16",
    )
    extract.add_argument("base", metavar="BASE", help="the model that the other one was tuned from")
    extract.add_argument("tuned", metavar="TUNED", help="the tuned model")
    extract.add_argument("out", metavar="OUT", help="directory to make")
    extract.add_argument(
        "--rank",
        type=read_count,
        required=True,
        metavar="N",
        help="of every matrix, or its smaller side",
    )
    extract.add_argument(
        "--modules",
        action="append",
        metavar="GLOB",
        help="factor only matrices whose name fits (may be repeated; default: all of linear layers)",
    )
    extract.add_argument(
        "--dtype",
        default="float32",
        metavar="DTYPE",
        help="what factors are stored in: float32, float16 or bfloat16 (default: float32)",
    )
    extract.add_argument(
        "--exact",
        action="store_true",
        help="find all singular values, which takes many times as long",
    )
    extract.add_argument("--memory", type=read_size, metavar="SIZE", help="as for merge")
    extract.add_argument("--workers", type=read_count, metavar="N", help="as for merge")
    extract.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="where large matrices are decomposed: cpu, cuda:0, cuda:0,cuda:1, or auto, which is the cpu "
        "(default: auto)",
    )
    extract.add_argument(
        "--device-memory",
        type=read_size,
        metavar="SIZE",
        help="most memory on each accelerator (default: what is needed, of what is free)",
    )
    _add_download(extract)
    extract.add_argument(
        "--overwrite", action="store_true", help="replace an earlier result in OUT"
    )
    extract.add_argument("--quiet", action="store_true", help="nothing on standard error")
    extract.add_argument("--json", action="store_true", help="events as JSON lines on stdout")
    extract.set_defaults(command=commands.run_extract)


_IS_THE_CPU = "auto, which is the cpu"
_IS_ESTIMATED = "auto: the cpu, unless an estimate says that a GPU wins"
"""What ``--device auto`` comes to, by command."""


def _add_resources(parser: argparse.ArgumentParser, *, auto: str = _IS_ESTIMATED) -> None:
    parser.add_argument(
        "--memory",
        type=read_size,
        metavar="SIZE",
        help="most private memory of the process, such as 2GiB (default: a quarter of what is free)",
    )
    parser.add_argument(
        "--workers", type=read_count, metavar="N", help="compute threads (default: one per core)"
    )
    _add_device(parser, auto=auto)
    parser.add_argument(
        "--device-memory",
        type=read_size,
        metavar="SIZE",
        help="most memory on each accelerator (default: what is useful, of what is free)",
    )
    _add_download(parser)


def _add_download(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch models named as org/model[@revision] from the Hugging Face hub, where its cache "
        "here has them not",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report",
        action="store_true",
        help="also tell what the models differ in and what the merge kept, as data and as a page",
    )


def _add_page(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--page", metavar="FILE", help="also draw it as a page, one HTML file that asks no server"
    )


def _add_device(parser: argparse.ArgumentParser, *, auto: str) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help=f"where merges are computed: cpu, cuda:0, cuda:0,cuda:1, or {auto} (default: auto)",
    )


if __name__ == "__main__":
    sys.exit(main())
