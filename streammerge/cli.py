"""The command line: arguments in, exit code out; the work is in :mod:`streammerge.run`.

Exit codes: 0 done, 1 merge failed or verification found damage, 2 usage or recipe, 3 does not fit,
4 output exists, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.errors import RecipeError, StreamMergeError, printable
from streammerge.limits import check_address_space, naming_limits
from streammerge.signals import stopping_signals
from streammerge.streams import as_courtesy, print_result
from streammerge.units import format_size, parse_size
from streammerge.version import VERSION

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

    from streammerge.chaining import Chain
    from streammerge.checkpoint.manifest import Manifest
    from streammerge.recipe.types import Recipe

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        options = _parser().parse_args(arguments)
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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="streammerge",
        description="Merge models larger than memory, exactly, at the speed of the disk.",
    )
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    merge = commands.add_parser("merge", help="merge models as a recipe says")
    merge.add_argument(
        "recipe", metavar="RECIPE", help="a recipe in YAML or JSON, or mergekit's YAML"
    )
    merge.add_argument(
        "out", metavar="OUT", help="directory to make, or one file if it ends with .safetensors"
    )
    _add_resources(merge)
    anew = merge.add_mutually_exclusive_group()
    anew.add_argument(
        "--resume",
        action="store_true",
        help="continue where an interrupted merge stopped, if any; done if it is complete",
    )
    anew.add_argument(
        "--overwrite", action="store_true", help="replace an earlier or unfinished merge in OUT"
    )
    merge.add_argument(
        "--byte-source",
        choices=("pread", "mmap"),
        default="pread",
        help="how inputs are read; mmap needs the compiled kernels, which guard it, and is no faster",
    )
    merge.add_argument("--quiet", action="store_true", help="no progress on standard error")
    merge.add_argument("--json", action="store_true", help="events as JSON lines on stdout")
    merge.set_defaults(command=_merge)

    plan = commands.add_parser("plan", help="show what a merge would do, reading headers only")
    plan.add_argument(
        "recipe", metavar="RECIPE", help="a recipe in YAML or JSON, or mergekit's YAML"
    )
    _add_resources(plan)
    plan.add_argument("--json", action="store_true", help="the whole plan as JSON")
    plan.set_defaults(command=_plan)

    inspect = commands.add_parser("inspect", help="show what a checkpoint or adapter holds")
    inspect.add_argument(
        "path",
        metavar="PATH",
        help="a checkpoint or adapter: a directory, a file, or org/model[@revision]",
    )
    _add_download(inspect)
    inspect.add_argument("--json", action="store_true", help="every tensor as JSON")
    inspect.set_defaults(command=_inspect)

    verify = commands.add_parser("verify", help="compare a merged model with its manifest")
    verify.add_argument("out", metavar="OUT", help="the merged model: a directory or file")
    verify.add_argument(
        "--against",
        metavar="RECIPE",
        help="also merge a random sample again from the inputs, and compare it bit by bit",
    )
    verify.add_argument(
        "--sample",
        type=_fraction,
        default=0.05,
        metavar="FRACTION",
        help="how much of the model --against merges again (default: 0.05)",
    )
    verify.add_argument(
        "--memory", type=_size, metavar="SIZE", help="most memory that --against may use"
    )
    _add_device(verify)
    _add_download(verify)
    verify.add_argument("--quiet", action="store_true", help="no progress on standard error")
    verify.add_argument("--json", action="store_true", help="the findings as JSON")
    verify.set_defaults(command=_verify)

    convert = commands.add_parser(
        "convert", help="print the recipe that means the same as one of mergekit's"
    )
    convert.add_argument("recipe", metavar="CONFIG", help="mergekit's YAML, or any recipe")
    convert.set_defaults(command=_convert)

    methods = commands.add_parser("methods", help="list merge methods, or explain one")
    methods.add_argument("name", metavar="NAME", nargs="?", help="a method")
    methods.add_argument("--json", action="store_true", help="the same as JSON")
    methods.add_argument(
        "--schema", action="store_true", help="the JSON Schema of recipes, for editors"
    )
    methods.set_defaults(command=_methods)
    return parser


def _add_resources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="most private memory of the process, such as 2GiB (default: a quarter of what is free)",
    )
    parser.add_argument(
        "--workers", type=_count, metavar="N", help="compute threads (default: one per core)"
    )
    _add_device(parser)
    parser.add_argument(
        "--device-memory",
        type=_size,
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


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="where merges are computed: cpu, cuda:0, cuda:0,cuda:1, or auto, which is the cpu "
        "(default: auto)",
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _fraction(text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, got {text!r}")
    return fraction


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _merge(options: argparse.Namespace) -> int:
    from streammerge.checkpoint.bytesource import ByteSourceKind
    from streammerge.display import show_progress
    from streammerge.recipe.types import Recipe
    from streammerge.run import find_complete, merge, plan

    recipe = _recipes_of(options)
    if not isinstance(recipe, Recipe):
        return _merge_chain(options, recipe)
    planned = plan(recipe, **_resources_of(options))
    complete = find_complete(planned, options.out) if options.resume else None
    if complete is not None:
        _say_complete(options, complete)
        return 0
    with (
        stopping_signals(),
        show_progress(quiet=options.quiet, as_json=options.json) as on_progress,
    ):
        manifest = merge(
            planned,
            options.out,
            overwrite=options.overwrite,
            resume=options.resume,
            byte_source=ByteSourceKind(options.byte_source),
            on_progress=on_progress,
        )
    _say_done(options, manifest)
    return 0


def _merge_chain(options: argparse.Namespace, chain: Chain) -> int:
    """Merge several recipes of one file."""
    from streammerge.chaining import merge_chain
    from streammerge.display import show_progress

    with (
        stopping_signals(),
        show_progress(quiet=options.quiet, as_json=options.json) as on_progress,
    ):
        manifest = merge_chain(
            chain,
            Path(options.out),
            resume=options.resume,
            overwrite=options.overwrite,
            on_progress=on_progress,
            **_resources_of(options),
        )
    _say_done(options, manifest)
    return 0


def _recipes_of(options: argparse.Namespace) -> Recipe | Chain:
    from streammerge.chaining import read_recipes

    return read_recipes(Path(options.recipe), download=options.download)


def _say_complete(options: argparse.Namespace, manifest: Manifest) -> None:
    """Tell that nothing was left to do."""
    tensors = len(manifest.tensors)
    if options.json:
        event = {"event": "complete", "out": str(options.out), "tensors": tensors}
        print(json.dumps(event), file=as_courtesy(sys.stdout), flush=True)
    elif not options.quiet:
        print(
            f"{printable(options.out)}: is complete already, with {tensors} tensors",
            file=sys.stderr,
        )


def _say_done(options: argparse.Namespace, manifest: Manifest) -> None:
    """Tell what the merge took."""
    run = manifest.run
    if options.json:
        print(
            json.dumps(
                {
                    "event": "done",
                    "out": str(options.out),
                    "tensors": len(manifest.tensors),
                    "seconds": run.seconds,
                    "seconds_by_stage": run.seconds_by_stage,
                    "bytes_by_stage": run.bytes_by_stage,
                    "projected_memory": run.projected_memory,
                    "measured_memory": run.measured_memory,
                    "damaged": run.damaged,
                }
            ),
            file=as_courtesy(sys.stdout),
            flush=True,
        )
    elif not options.quiet:
        if run.damaged:
            print(
                f"{printable(options.out)}: {run.damaged} piece(s) of the unfinished merge had "
                "changed since, and were made again",
                file=sys.stderr,
            )
        print(
            f"{printable(options.out)}: {len(manifest.tensors)} tensors in {run.seconds:.1f} s, read "
            f"{format_size(run.bytes_by_stage['read'])}, wrote "
            f"{format_size(run.bytes_by_stage['write'])}, peak memory "
            f"{format_size(run.measured_memory)} of {format_size(run.memory_budget)}",
            file=sys.stderr,
        )


def _resources_of(options: argparse.Namespace) -> dict[str, Any]:
    return {
        name: getattr(options, name)
        for name in ("memory", "workers", "device", "device_memory", "download")
    }


def _plan(options: argparse.Namespace) -> int:
    from streammerge.plan.codec import dump_plan
    from streammerge.plan.types import MergePlan
    from streammerge.recipe.types import Recipe
    from streammerge.run import plan

    recipe = _recipes_of(options)
    if not isinstance(recipe, Recipe):
        return _plan_chain(options, recipe)
    planned = plan(recipe, **_resources_of(options))
    if not options.json:
        # Not by its name, which it has no more once it is removed.
        free = format_size(shutil.disk_usage(".").free)
        needed = format_size(planned.bytes_to_write)
        print_result(f"{planned}\nfree disk    {free} here, {needed} needed")
    elif isinstance(planned, MergePlan):
        print_result(dump_plan(planned))
    else:
        print_result(json.dumps(planned.as_json()))
    return 0


def _plan_chain(options: argparse.Namespace, chain: Chain) -> int:
    """Show what several recipes of one file would do."""
    from streammerge.chaining import plan_chain
    from streammerge.plan.codec import dump_plan

    plans = plan_chain(chain, **_resources_of(options))
    if options.json:
        print_result("\n".join(map(dump_plan, plans)))
        return 0
    needed = format_size(sum(planned.bytes_to_write for planned in plans))
    parts = [
        f"== {printable(stage.name)} ==\n{planned}"
        for stage, planned in zip(chain.stages, plans, strict=True)
    ]
    free = format_size(shutil.disk_usage(".").free)
    print_result("\n\n".join([*parts, f"free disk    {free} here, {needed} needed for all"]))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from streammerge.checkpoint.verifying import verify_files

    found = verify_files(Path(options.out))
    compared = None
    if options.against is not None and not found.damages:
        from streammerge.display import show_progress
        from streammerge.run import verify_against

        with show_progress(quiet=options.quiet or options.json, as_json=False) as on_progress:
            compared = verify_against(
                options.against,
                options.out,
                fraction=options.sample,
                memory=options.memory,
                device=options.device,
                download=options.download,
                on_progress=on_progress,
            )
    if options.json:
        document = asdict(found)
        if compared is not None:
            document["against"] = asdict(compared)
        print_result(json.dumps(document))
    else:
        verdict = f"{len(found.damages)} damaged" if found.damages else "all as they were written"
        lines = [f"{damage.kind}  {damage.name}: {damage.what}" for damage in found.damages]
        lines.append(f"{options.out}: {found.files} files, {format_size(found.nbytes)}: {verdict}")
        if not found.vouched:
            lines.append("its manifest is of an earlier version, and has no digest of its own")
        lines += () if compared is None else compared.lines()
        print_result("\n".join(map(printable, lines)))
    return 1 if found.damages or (compared is not None and compared.differing) else 0


def _inspect(options: argparse.Namespace) -> int:
    from streammerge.adapters.files.inspecting import describe_adapter, describe_adapter_as_json
    from streammerge.adapters.files.reading import is_adapter, read_adapter
    from streammerge.checkpoint.composite import read_model
    from streammerge.checkpoint.hub import locate_model
    from streammerge.checkpoint.inspecting import describe, describe_as_json

    path = locate_model(Path(options.path), download=options.download)
    if is_adapter(path):
        adapter = read_adapter(path)
        if options.json:
            print_result(json.dumps(describe_adapter_as_json(adapter)))
        else:
            print_result(describe_adapter(adapter))
        return 0
    checkpoint = read_model(path)
    if options.json:
        print_result(json.dumps(describe_as_json(checkpoint)))
    else:
        print_result(describe(checkpoint))
    return 0


def _convert(options: argparse.Namespace) -> int:
    from streammerge.recipe.dumping import write_out
    from streammerge.run import load_recipe

    print_result(write_out(load_recipe(options.recipe)).rstrip("\n"))
    return 0


def _methods(options: argparse.Namespace) -> int:
    from streammerge.adapters.combining.combinations import COMBINATIONS
    from streammerge.adapters.combining.describing import (
        combinations_as_json,
        describe_combination,
        list_combinations,
    )
    from streammerge.adapters.combining.recipes import every_method
    from streammerge.methods import discover_methods
    from streammerge.methods.describing import describe_method, list_methods, method_as_json
    from streammerge.plan.asking import find_method

    if options.schema:
        from streammerge.recipe.json_schema import recipe_json_schema

        methods = discover_methods()
        specs = every_method({name: method.parameters for name, method in methods.items()})
        semantics = {name: method.semantics for name, method in methods.items()}
        print_result(json.dumps(recipe_json_schema(specs, semantics), indent=2))
        return 0
    combinations = [each for name, each in COMBINATIONS.items() if options.name in (None, name)]
    if options.name is None:
        chosen: list[Any] = list(discover_methods().values())
    elif options.name in discover_methods() or not combinations:
        try:
            chosen = [find_method(options.name)]
        except RecipeError as error:
            raise RecipeError(f"methods: {error}") from error
    else:
        chosen = []
    if options.json:
        facts = [method_as_json(method) for method in chosen] + combinations_as_json(combinations)
        print_result(json.dumps(facts))
    elif options.name is None:
        print_result(f"{list_methods(chosen)}\n\n{list_combinations()}")
    else:
        parts = [describe_method(method) for method in chosen]
        print_result("\n\n".join(parts + [describe_combination(each) for each in combinations]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
