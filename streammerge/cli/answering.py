"""What commands answer from headers, recipes, methods and the machine; they merge nothing."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streammerge.cli.streams import print_result
from streammerge.errors import RecipeError


def run_inspect(options: argparse.Namespace) -> int:
    """Show what a checkpoint or an adapter holds."""
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


def run_convert(options: argparse.Namespace) -> int:
    """Print a recipe in this tool's words."""
    from streammerge.chaining.stages import dump_chain, read_recipes
    from streammerge.recipe.dumping import write_out
    from streammerge.recipe.types import Recipe
    from streammerge.together import Grid

    found = read_recipes(Path(options.recipe), download=False)
    if isinstance(found, Grid):
        raise RecipeError(
            f"{options.recipe}: grid: makes {len(found.recipes)} outputs; convert the recipe without it, "
            "and give the result a grid"
        )
    text = write_out(found) if isinstance(found, Recipe) else dump_chain(found, write_out)
    print_result(text.rstrip("\n"))
    return 0


def run_methods(options: argparse.Namespace) -> int:
    """List methods, or explain one."""
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


def run_doctor(options: argparse.Namespace) -> int:
    """Show what the machine and the installation have for merges."""
    from streammerge.cli.doctor import as_json, examine, render

    found = examine(None if options.no_probe else Path(options.directory))
    print_result(json.dumps(as_json(found)) if options.json else render(found))
    return 0


def run_completion(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print what lets a shell complete commands."""
    from streammerge.cli.completing import render_completion

    print_result(render_completion(parser, options.shell))
    return 0


def run_status(options: argparse.Namespace) -> int:
    """Show how far an output is."""
    from streammerge.checkpoint.status import read_status

    status = read_status(options.out)
    print_result(json.dumps(asdict(status)) if options.json else str(status))
    return 0
