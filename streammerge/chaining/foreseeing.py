"""Plans of all recipes of a file, before the first one runs.

A result that is still to come is there as files of the right headers and sizes, with nothing in them.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from streammerge.chaining.stages import Chain, Stage, models_of
from streammerge.checkpoint.types import Note
from streammerge.engine.accelerator.opening import AUTO, find_candidate, named_devices
from streammerge.errors import RecipeError, printable
from streammerge.finishing import copy_companions
from streammerge.plan.fusing import Earlier, why_apart
from streammerge.plan.layout import render_header, render_indexes
from streammerge.plan.types import MergePlan
from streammerge.probing.deciding import stay
from streammerge.recipe.types import Recipe
from streammerge.run import plan


def plan_chain(chain: Chain, **options: Any) -> list[MergePlan]:
    """Return the plans of all stages, the results in between as they will be.

    Args:
        chain: The recipes.
        options: What :func:`streammerge.run.plan` takes.

    Raises:
        StreamMergeError: As for :func:`streammerge.run.plan`; the message says which stage it is about.
    """
    return foresee_chain(chain, options)[0]


def foresee_chain(
    chain: Chain, options: Mapping[str, Any], fused: Collection[str] | None = None
) -> tuple[list[MergePlan], set[str]]:
    """Return the plans of all stages, and the names of those that are fused.

    Args:
        chain: The recipes.
        options: What :func:`streammerge.run.plan` takes.
        fused: The names of those to fuse; None fuses where that moves fewer bytes.
    """
    mentions = Counter(str(each) for stage in chain.stages for each in models_of(stage.recipe))
    plans: dict[str, MergePlan] = {}
    apart: dict[str, str] = {}
    with TemporaryDirectory(prefix="streammerge-") as directory:
        folders: dict[str, Path] = {}
        for stage in chain.stages:
            earlier = [
                Earlier(name, folders[name], plans[name])
                for name in stage.uses
                if name not in apart and (fused is None or name in fused)
            ]
            planned = plan_stage(stage, folders, earlier, options)
            if earlier and fused is None and not _pays(planned, earlier):
                apart |= dict.fromkeys(
                    (each.name for each in earlier), f"{stage.name} reads it more than once"
                )
                planned = plan_stage(stage, folders, (), options)
            names = {str(folder): name for name, folder in folders.items()}
            folders[stage.name] = Path(directory) / stage.name
            foresee(planned, folders[stage.name])
            # What is foreseen is gone when this returns.
            models = tuple(
                replace(model, path=names.get(model.path, model.path)) for model in planned.models
            )
            plans[stage.name] = replace(planned, models=models)
            why = why_apart(planned)
            if mentions[stage.name] > 1:
                why = "it is a source more than once"
            if why is not None:
                apart[stage.name] = why
    together = {stage.name for planned in plans.values() for stage in planned.fused}
    for stage in chain.stages[:-1]:
        said = (
            f"the result is written before it is read: {apart.get(stage.name, 'so it was begun')}"
        )
        if stage.name in together:
            said = "the result is computed where it is read, and not written"
        noted = (*plans[stage.name].notes, Note("chain", said))
        plans[stage.name] = replace(plans[stage.name], notes=noted)
    return list(plans.values()), together


def plan_stage(
    stage: Stage,
    folders: Mapping[str, Path],
    earlier: Sequence[Earlier],
    options: Mapping[str, Any],
) -> MergePlan:
    """Return the plan of one recipe, to which the results of earlier ones are there as files."""
    # What a recipe reads may not be there yet, so that nothing could be measured of it.
    named = {**options, "device": named_devices(options.get("device"))}
    with naming(stage):
        planned = plan(_with_results(stage.recipe, folders), earlier=earlier, **named)
        if not isinstance(planned, MergePlan):
            raise RecipeError(
                "makes an adapter of adapters, which takes seconds; give it a recipe of its own "
                "and name what comes of it"
            )
    candidate = find_candidate() if options.get("device", AUTO) == AUTO else None
    if candidate is None:
        return planned
    return stay(planned, candidate, "recipes of one file are merged on the cpu")


def _pays(planned: MergePlan, earlier: Sequence[Earlier]) -> bool:
    """Return whether fusing moves no more bytes than writing what is fused and reading that."""
    sweeps = planned.bytes_to_read / max(1, planned.input_nbytes)
    together = sum(each.plan.bytes_to_read for each in earlier) * sweeps
    one_by_one = sum(
        each.plan.bytes_to_read + each.plan.layout.data_nbytes * (1 + sweeps) for each in earlier
    )
    return together <= one_by_one


def _with_results(recipe: Recipe, folders: Mapping[str, Path]) -> Recipe:
    """Return a recipe with the folders of earlier results in the place of their names."""

    def placed(path: Path) -> Path:
        return folders.get(str(path), path)

    sources = (
        replace(
            source,
            path=placed(source.path),
            adapter=None if source.adapter is None else placed(source.adapter),
        )
        for source in recipe.sources
    )
    base = None if recipe.base is None else placed(recipe.base)
    companions = {
        kind: placed(origin) if isinstance(origin, Path) else origin
        for kind, origin in recipe.output.companions.items()
    }
    output = replace(recipe.output, companions=companions)
    return replace(recipe, base=base, sources=tuple(sources), output=output)


class naming:  # noqa: N801 - a context manager, used like a function
    """Says which stage an error is about."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            error.add_note(f"in the recipe named {printable(self._stage.name)}")


def foresee(planned: MergePlan, directory: Path) -> None:
    """Make what a merge will leave, but for the values of its tensors."""
    if directory.is_dir():
        shutil.rmtree(directory)
    directory.mkdir()
    copy_companions(planned, directory)
    for index, shard in enumerate(planned.layout.shards):
        path = directory / shard.name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as stream:
            stream.write(render_header(planned, index))
            stream.truncate(shard.nbytes)
    for name, content in render_indexes(planned).items():
        (directory / name).write_bytes(content)
