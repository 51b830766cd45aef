"""Everything beside the tensors of a planned merge: chosen, compared, and fitted to the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from streammerge.adapters.adapted import AdaptedModel
from streammerge.assignment.types import Action
from streammerge.checkpoint.sidecars import list_left_behind
from streammerge.checkpoint.types import Checkpoint, Companion, JsonChange
from streammerge.companions.comparing import Participant, compare_companions
from streammerge.companions.fitting import Described, fit_config
from streammerge.companions.kinds import gather_companions, kind_of, read_template
from streammerge.errors import RecipeError
from streammerge.plan.types import MergePlan
from streammerge.recipe.types import BASE, CompanionKind, Recipe

_CONFIG = "config.json"
_FOLLOWED = {
    CompanionKind.GENERATION_CONFIG: CompanionKind.CONFIG,
    CompanionKind.CHAT_TEMPLATE: CompanionKind.TOKENIZER,
}
"""What comes with what where the recipe does not say otherwise."""


def accompany(
    planned: MergePlan, recipe: Recipe, models: Sequence[Checkpoint | AdaptedModel]
) -> MergePlan:
    """Return the plan with the files beside its tensors, and with what differs between the inputs.

    Args:
        planned: A plan without companions.
        recipe: What it was made from.
        models: The inputs, the base first if there is one.

    Raises:
        CheckpointError: A file cannot be read, or vocabularies contradict each other.
        HeaderError: A config is not JSON.
        RecipeError: The recipe takes files from where there are none, or copies what no configuration
            describes.
    """
    participants = [
        Participant(model.label, companion_directory(Path(model.path))) for model in planned.models
    ]
    taken = _choose_origins(recipe, participants)
    default = participants[0].directory
    companions = gather_companions({k: each.directory for k, each in taken.items()}, default)
    _check_given(recipe, taken, companions)
    full = [
        participant
        for participant, model in zip(participants, models, strict=True)
        if isinstance(model, Checkpoint)
    ]
    differences = compare_companions(full, taken, vocabulary=recipe.vocabulary)
    changes = _fit(planned, models, taken[CompanionKind.CONFIG])
    companions = tuple(
        replace(each, changes=(*each.changes, *changes)) if each.name == _CONFIG else each
        for each in companions
    )
    return replace(
        planned,
        companions=companions,
        differences=differences,
        left_behind=_left_behind(planned, models[0], default, companions),
    )


def companion_directory(path: Path) -> Path:
    """Return where the files beside the tensors of an input lie."""
    return path if path.is_dir() else path.parent


def _choose_origins(
    recipe: Recipe, participants: Sequence[Participant]
) -> dict[CompanionKind, Participant]:
    given = recipe.output.companions
    sources = participants[len(participants) - len(recipe.sources) :]
    chosen: dict[CompanionKind, Participant] = {}
    for kind in CompanionKind:
        origin = given.get(kind, given.get(_FOLLOWED.get(kind, kind)))
        if origin is None or origin == BASE:
            chosen[kind] = participants[0]
        elif isinstance(origin, int):
            chosen[kind] = sources[origin]
        else:
            known = [each for each in participants if each.directory == origin]
            chosen[kind] = known[0] if known else Participant(str(origin), origin)
    return chosen


def _check_given(
    recipe: Recipe,
    taken: Mapping[CompanionKind, Participant],
    companions: Sequence[Companion],
) -> None:
    """Raise if the recipe names a model for a kind of file that it does not have."""
    given = recipe.output.companions
    present = {kind_of(companion.name) for companion in companions}
    directory = taken[CompanionKind.CHAT_TEMPLATE].directory
    if CompanionKind.CHAT_TEMPLATE in given and read_template(directory) is not None:
        present.add(CompanionKind.CHAT_TEMPLATE)
    # One origin for all kinds asks for whatever is there.
    if len(given) == len(CompanionKind) and len(set(given.values())) == 1:
        missing = [] if present else list(given)
    else:
        missing = [kind for kind in given if kind not in present]
    if missing:
        kind = missing[0]
        raise RecipeError(
            f"output.companions.{kind}: {taken[kind].directory} has no files of this kind; name a "
            "model that has, or leave the key out"
        )


def _fit(
    planned: MergePlan, models: Sequence[Checkpoint | AdaptedModel], origin: Participant
) -> tuple[JsonChange, ...]:
    """Return what the chosen configuration has to say of the planned tensors."""
    described = [
        (
            companion_directory(Path(named.path)),
            Described(
                named.label,
                model.config or {},
                {name: entry.shape for name, entry in model.tensors.items()},
            ),
        )
        for named, model in zip(planned.models, models, strict=True)
        if isinstance(model, Checkpoint)
    ]
    own = next((each for directory, each in described if directory == origin.directory), None)
    if own is None or not own.config:
        return ()
    full = {index for index, model in enumerate(models) if isinstance(model, Checkpoint)}
    copied = {}
    for task in planned.tasks:
        present = [index for index, entry in enumerate(task.inputs) if entry is not None]
        copies = task.action in (Action.COPY, Action.CONVERT) and not task.changes
        if copies and len(present) == 1 and present[0] in full:
            copied[task.name] = planned.models[present[0]].label
    result = {task.name: task.shape for task in planned.tasks}
    others = [each for _, each in described if each is not own]
    return fit_config(own, others, result, copied)


def _left_behind(
    planned: MergePlan,
    first: Checkpoint | AdaptedModel,
    directory: Path,
    companions: Sequence[Companion],
) -> tuple[str, ...]:
    """Return what lies in the first model's directory and is not copied; beside a file lies anything."""
    if not Path(planned.models[0].path).is_dir() or not isinstance(first, Checkpoint):
        return ()
    taken = [each.name for each in companions if each.directory is None]
    taken += [file.path.relative_to(first.directory).as_posix() for file in first.files]
    taken += [] if first.index_name is None else [first.index_name]
    return list_left_behind(directory, taken)
