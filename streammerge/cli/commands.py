"""What each command does: options in, exit code out; the work is in :mod:`streammerge.run` and beside it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.cli.signals import stopping_signals
from streammerge.cli.streams import print_result
from streammerge.cli.telling import tell_complete, tell_done, tell_part, time_of
from streammerge.cli.wording import read_words, settle_baking
from streammerge.errors import RecipeError, printable
from streammerge.units import format_size

if TYPE_CHECKING:
    from streammerge.adapters.combining.plans import CombinationPlan
    from streammerge.chaining.stages import Chain
    from streammerge.checkpoint.manifest import Manifest
    from streammerge.engine.progress import OnProgress
    from streammerge.extracting.plans import ExtractionPlan
    from streammerge.plan.types import MergePlan
    from streammerge.recipe.types import Recipe
    from streammerge.together import Grid


def run_merge(options: argparse.Namespace) -> int:
    """Merge as a recipe says, or as several do."""
    from streammerge.checkpoint.bytesource import ByteSourceKind
    from streammerge.recipe.types import Recipe
    from streammerge.run import find_complete, merge, plan
    from streammerge.storage.targets import load_target
    from streammerge.together import Grid

    recipe = _recipes_of(options)
    if options.part is not None:
        return _merge_part(options, _one_recipe(options, recipe, "--part"))
    if options.on is not None:
        return _merge_on(options, _one_recipe(options, recipe, "--on"))
    if options.also or isinstance(recipe, Grid):
        return _merge_together(options, recipe)
    if not isinstance(recipe, Recipe):
        return _merge_chain(options, recipe)
    load_target(Path(options.out))
    planned = plan(recipe, **resources_of(options))
    complete = find_complete(planned, options.out) if options.resume else None
    if complete is not None:
        tell_complete(options, complete)
        return 0
    with _at_work(options) as on_progress:
        manifest = merge(
            planned,
            options.out,
            overwrite=options.overwrite,
            resume=options.resume,
            byte_source=ByteSourceKind(options.byte_source),
            on_progress=on_progress,
        )
    tell_done(options, manifest)
    return 0


@contextmanager
def _at_work(options: argparse.Namespace) -> Iterator[OnProgress]:
    """Show how far work is, and let signals stop it in good order."""
    from streammerge.cli.display import show_progress

    with (
        stopping_signals(),
        show_progress(quiet=options.quiet, as_json=options.json) as on_progress,
    ):
        yield on_progress


def _one_recipe(options: argparse.Namespace, recipe: Recipe | Chain | Grid, option: str) -> Recipe:
    """Return what several processes can merge together: the recipe of one output."""
    from streammerge.recipe.types import Recipe

    if options.also or not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{option}: one output of one recipe is done by several processes; grids, bases with adapters, several recipes "
            "in a file and --also are merged by one, without it"
        )
    return recipe


def _merge_on(options: argparse.Namespace, recipe: Recipe) -> int:
    """Merge on the workers of an engine."""
    from streammerge.executors.driving import merge_on

    resources = resources_of(options)
    if resources.pop("report"):
        raise RecipeError(
            "--report: is made by one process, or by parts (--part); leave out --on, or --report and see "
            "`streammerge analyze`"
        )
    before = time_of(options.out)
    with _at_work(options) as on_progress:
        manifest = merge_on(
            recipe,
            options.out,
            on=options.on,
            overwrite=options.overwrite,
            resume=options.resume,
            byte_source=options.byte_source,
            on_progress=on_progress,
            **resources,
        )
    say = tell_complete if before is not None and before == time_of(options.out) else tell_done
    say(options, manifest)
    return 0


def _merge_part(options: argparse.Namespace, recipe: Recipe) -> int:
    """Do one part of a merge."""
    from streammerge.parting import merge_part

    part, parts = options.part
    before = time_of(options.out)
    with _at_work(options) as on_progress:
        manifest = merge_part(
            recipe,
            options.out,
            part=part,
            parts=parts,
            overwrite=options.overwrite,
            resume=options.resume,
            byte_source=options.byte_source,
            on_progress=on_progress,
            **resources_of(options),
        )
    if manifest is not None:
        say = tell_complete if before is not None and before == time_of(options.out) else tell_done
        say(options, manifest)
        return 0
    tell_part(options, part, parts)
    return 0


def run_bake(options: argparse.Namespace) -> int:
    """Merge adapters into their model."""
    settle_baking(options)
    return run_merge(options)


def _merge_chain(options: argparse.Namespace, chain: Chain) -> int:
    """Merge several recipes of one file."""
    from streammerge.chaining.running import merge_chain

    with _at_work(options) as on_progress:
        manifest = merge_chain(
            chain,
            Path(options.out),
            resume=options.resume,
            overwrite=options.overwrite,
            byte_source=options.byte_source,
            on_progress=on_progress,
            **resources_of(options),
        )
    tell_done(options, manifest)
    return 0


def _merge_together(options: argparse.Namespace, first: Recipe | Chain | Grid) -> int:
    """Merge several recipes, or all of a grid, from one read."""
    from streammerge.together import merge_together

    merges = _named(first, options.recipe, options.out)
    for recipe, out in options.also or ():
        merges += _named(_read_recipes(recipe, options), recipe, out)
    before = [time_of(out) for out, _ in merges]
    with _at_work(options) as on_progress:
        manifests = merge_together(
            [(recipe, out) for out, recipe in merges],
            overwrite=options.overwrite,
            resume=options.resume,
            byte_source=options.byte_source,
            on_progress=on_progress,
            **resources_of(options),
        )
    told: list[Manifest] = []
    for (out, _), manifest, time in zip(merges, manifests, before, strict=True):
        if time is not None and time == time_of(out):
            # A resume leaves those alone that are complete.
            tell_complete(options, manifest, out)
            continue
        tell_done(options, manifest, out, told)
        told.append(manifest)
    return 0


def _named(found: Recipe | Chain | Grid, origin: str, out: str) -> list[tuple[str, Recipe]]:
    """Return the outputs that a file's recipes make, and the recipe of each."""
    from streammerge.chaining.stages import Chain
    from streammerge.checkpoint.outputform import form_of
    from streammerge.together import Grid

    if isinstance(found, Chain):
        raise RecipeError(
            f"{origin}: has {len(found.stages)} recipes, of which later ones merge results of earlier "
            "ones; they are merged one after the other, by a command of their own"
        )
    if isinstance(found, Grid):
        if form_of(Path(out)).file is not None:
            raise RecipeError(
                f"{out}: {origin} makes {len(found.recipes)} outputs, each in a directory of its own inside "
                "OUT, and this is called like one file; name a directory"
            )
        return [(os.path.join(out, name), recipe) for name, recipe in found.recipes]  # noqa: PTH118
    return [(out, found)]


def _recipes_of(options: argparse.Namespace) -> Recipe | Chain | Grid:
    if options.document is not None:
        return read_words(options)
    return _read_recipes(options.recipe, options)


def _read_recipes(path: str, options: argparse.Namespace) -> Recipe | Chain | Grid:
    from streammerge.chaining.stages import read_recipes

    return read_recipes(Path(path), download=options.download)


def read_one_recipe(options: argparse.Namespace) -> Recipe:
    """Return the recipe of one output that a command names.

    Raises:
        RecipeError: The file makes several.
    """
    from streammerge.recipe.types import Recipe

    found = _recipes_of(options)
    if not isinstance(found, Recipe):
        raise RecipeError(
            f"{options.recipe}: makes several outputs, one after the other or of a grid; name a recipe of one"
        )
    return found


def resources_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a command may use, as :func:`streammerge.run.plan` takes it."""
    return {
        name: getattr(options, name)
        for name in ("memory", "workers", "device", "device_memory", "download", "report")
        if hasattr(options, name)
    }


def run_plan(options: argparse.Namespace) -> int:
    """Show what a merge would do."""
    from streammerge.recipe.types import Recipe
    from streammerge.report.drawing import check_drawing
    from streammerge.run import plan
    from streammerge.together import Grid

    if options.report:
        check_drawing()
    recipe = _recipes_of(options)
    if options.also or isinstance(recipe, Grid):
        return _plan_together(options, recipe)
    if not isinstance(recipe, Recipe):
        return _plan_chain(options, recipe)
    planned = plan(recipe, **resources_of(options))
    if not options.json:
        # Not by its name, which it has no more once it is removed.
        free = format_size(shutil.disk_usage(".").free)
        needed = format_size(planned.bytes_to_write)
        print_result(f"{planned}\nfree disk    {free} here, {needed} needed")
    else:
        print_result(_as_json(planned))
    _print_estimate(options, [planned], planned.bytes_to_read)
    return 0


def _print_estimate(
    options: argparse.Namespace,
    plans: Sequence[MergePlan | CombinationPlan],
    bytes_to_read: int,
) -> None:
    """Print how long the disk will take, if that is asked for."""
    if not options.estimate:
        return
    from streammerge.cli.probing import estimate_seconds

    estimate = estimate_seconds(
        [file for planned in plans for file in planned.files if file.made is None],
        bytes_to_read=bytes_to_read,
        bytes_to_write=sum(planned.bytes_to_write for planned in plans),
        directory=Path(),
    )
    print_result(json.dumps(estimate.as_event()) if options.json else f"time         {estimate}")


def _plan_chain(options: argparse.Namespace, chain: Chain) -> int:
    """Show what several recipes of one file would do."""
    from streammerge.chaining.foreseeing import plan_chain

    plans = plan_chain(chain, **resources_of(options))
    names = [stage.name for stage in chain.stages]
    _print_plans(options, names, plans)
    written = _written(names, plans)
    _print_estimate(options, written, sum(planned.bytes_to_read for planned in written))
    return 0


def _plan_together(options: argparse.Namespace, first: Recipe | Chain | Grid) -> int:
    """Show what several recipes, or all of a grid, would do."""
    from streammerge.together import plan_together

    recipes = _named(first, options.recipe, "")
    for path in options.also or ():
        recipes += _named(_read_recipes(path, options), path, "")
    groups = plan_together([recipe for _, recipe in recipes], **resources_of(options))
    plans = [planned for group in groups for planned in group.plans]
    names = [name or recipe.method for name, recipe in recipes]
    heads = [f"{index} of {len(plans)}: {name}" for index, name in enumerate(names, 1)]
    reads = sum(group.reads for group in groups)
    how = (
        f"{len(plans)} outputs, up to {len(groups[0].plans)} at once; reads of the inputs: {reads}"
    )
    _print_plans(options, heads, plans, how)
    _print_estimate(options, plans, sum(group.bytes_to_read for group in groups))
    return 0


def _print_plans(
    options: argparse.Namespace,
    heads: Sequence[str],
    plans: Sequence[MergePlan | CombinationPlan],
    *more: str,
) -> None:
    """Print several plans, and what holds for all of them."""
    if options.json:
        print_result("\n".join(map(_as_json, plans)))
        return
    needed = format_size(sum(planned.bytes_to_write for planned in _written(heads, plans)))
    free = format_size(shutil.disk_usage(".").free)
    last = "\n".join([*more, f"free disk    {free} here, {needed} needed for all"])
    parts = (
        f"== {printable(head)} ==\n{planned}" for head, planned in zip(heads, plans, strict=True)
    )
    print_result("\n\n".join([*parts, last]))


def _written(
    heads: Sequence[str], plans: Sequence[MergePlan | CombinationPlan]
) -> list[MergePlan | CombinationPlan]:
    """Return the plans without those of results that are computed where they are read."""
    from streammerge.plan.types import MergePlan

    fused = {stage.name for each in plans if isinstance(each, MergePlan) for stage in each.fused}
    return [each for head, each in zip(heads, plans, strict=True) if head not in fused]


def _as_json(planned: MergePlan | CombinationPlan) -> str:
    from streammerge.plan.codec import dump_plan
    from streammerge.plan.types import MergePlan

    return dump_plan(planned) if isinstance(planned, MergePlan) else json.dumps(planned.as_json())


def run_verify(options: argparse.Namespace) -> int:
    """Compare a merged model with its manifest, and perhaps with a recipe."""
    from streammerge.checkpoint.verifying import verify_files

    found = verify_files(Path(options.out))
    compared = None
    if options.against is not None and not found.damages:
        from streammerge.cli.display import show_progress
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


def run_extract(options: argparse.Namespace) -> int:
    """Write a LoRA of the difference between two models."""
    from streammerge.extracting.extraction import extract

    def tell(plan: ExtractionPlan) -> None:
        if not options.quiet and not options.json:
            print(plan, file=sys.stderr)

    with _at_work(options) as on_progress:
        manifest = extract(
            options.base,
            options.tuned,
            options.out,
            rank=options.rank,
            modules=tuple(options.modules or ()),
            dtype=options.dtype,
            exact=options.exact,
            memory=options.memory,
            workers=options.workers,
            device=options.device,
            device_memory=options.device_memory,
            download=options.download,
            overwrite=options.overwrite,
            on_plan=tell,
            on_progress=on_progress,
        )
    tell_done(options, manifest)
    return 0
