"""Everything beside the tensors of a planned merge: chosen, compared, and fitted to the result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from streammerge.adapters.onto_base.adapted import AdaptedModel, stored_tensors
from streammerge.assignment.layers import find_stacks
from streammerge.assignment.tokens import Tokens
from streammerge.assignment.types import Action
from streammerge.checkpoint.coded import QUANTIZATION_KEY
from streammerge.checkpoint.composite import MODULES, list_component_folders, list_parts
from streammerge.checkpoint.sidecars import list_left_behind, plan_sidecars
from streammerge.checkpoint.types import (
    Checkpoint,
    Companion,
    CompanionDifference,
    JsonChange,
    Note,
)
from streammerge.companions.comparing import Participant, compare_companions
from streammerge.companions.depth import ArrangedLayers, LayerOrigin, remark_on_depth
from streammerge.companions.described import Described
from streammerge.companions.fitting import fit_config
from streammerge.companions.kinds import gather_companions, kind_of, read_object, read_template
from streammerge.companions.mixing import fit_mixture
from streammerge.companions.stating import state_storage
from streammerge.companions.templates import find_template
from streammerge.companions.tokenizers import state_special, with_added_tokens
from streammerge.dtypes import DType
from streammerge.errors import CheckpointError, RecipeError
from streammerge.plan.types import MergePlan
from streammerge.recipe.types import BASE, CompanionKind, Mixture, Recipe

_CONFIG = "config.json"
_FOLLOWED = {
    CompanionKind.GENERATION_CONFIG: CompanionKind.CONFIG,
    CompanionKind.CHAT_TEMPLATE: CompanionKind.TOKENIZER,
}
"""What comes with what where the recipe does not say otherwise."""


def accompany(
    planned: MergePlan,
    recipe: Recipe,
    models: Sequence[Checkpoint | AdaptedModel],
    tokens: Tokens | None = None,
) -> MergePlan:
    """Return the plan with the files beside its tensors, and with what differs between the inputs.

    Args:
        planned: A plan without companions.
        recipe: What it was made from.
        models: The inputs, the base first if there is one.
        tokens: The vocabulary of the result, if rows of embeddings are drawn for one.

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
    if tokens is not None:
        taken |= _with_tokenizer(recipe, tokens, taken, participants)
    default = participants[0].directory
    wanted = recipe.output.chat_template
    companions = gather_companions(
        {kind: each.directory for kind, each in taken.items()},
        default,
        template=wanted and find_template(wanted, [each.directory for each in participants]),
    )
    if recipe.output.companions:
        own = [path.relative_to(default).as_posix() for path in plan_sidecars(default)]
        _check_given(recipe, taken, companions, own)
    _check_modules(taken[CompanionKind.CONFIG].directory, models[0], companions)
    arranged = _arranged_layers(planned, recipe, models[0])
    changes, remarks = _fit(planned, models, taken[CompanionKind.CONFIG], arranged, recipe.mixture)
    changes[_CONFIG] = (
        *changes.get(_CONFIG, ()),
        *_storage(planned, models[0], participants[0], taken[CompanionKind.CONFIG]),
    )
    if tokens is not None:
        for name, special in state_special(tokens, taken).items():
            changes[name] = (*changes.get(name, ()), *special)
        companions = with_added_tokens(companions, tokens)
    companions = tuple(
        replace(each, changes=(*each.changes, *changes.get(each.name, ()))) for each in companions
    )
    return replace(
        planned,
        companions=companions,
        notes=(*planned.notes, *(Note("config", remark) for remark in remarks)),
        differences=tuple(_compare(recipe, participants, models, taken)),
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


def _with_tokenizer(
    recipe: Recipe,
    tokens: Tokens,
    taken: Mapping[CompanionKind, Participant],
    participants: Sequence[Participant],
) -> dict[CompanionKind, Participant]:
    """Return where a tokenizer comes from whose tokens the rows of the result stand for."""
    given = recipe.output.companions
    origin = (
        Participant(tokens.label.split()[0], tokens.origin)
        if tokens.owner is None
        else participants[tokens.owner]
    )
    if (
        CompanionKind.TOKENIZER in given
        and taken[CompanionKind.TOKENIZER].directory != origin.directory
    ):
        raise RecipeError(
            f"output.companions.tokenizer: rows are drawn for the tokens of {tokens.origin}, not for those of "
            f"{taken[CompanionKind.TOKENIZER].directory}; leave the key out, or name that vocabulary"
        )
    kinds = [CompanionKind.TOKENIZER]
    if CompanionKind.CHAT_TEMPLATE not in given:
        kinds.append(CompanionKind.CHAT_TEMPLATE)
    return dict.fromkeys(kinds, origin)


def _check_given(
    recipe: Recipe,
    taken: Mapping[CompanionKind, Participant],
    companions: Sequence[Companion],
    first_names: Sequence[str],
) -> None:
    """Raise if the recipe names a model for a kind of file that it does not have."""
    given = recipe.output.companions
    present = {kind_of(companion.name) for companion in companions}
    directory = taken[CompanionKind.CHAT_TEMPLATE].directory
    if CompanionKind.CHAT_TEMPLATE in given and read_template(directory) is not None:
        present.add(CompanionKind.CHAT_TEMPLATE)
    # One origin for all kinds asks for whatever is there, but what the first model has is not lost.
    if len(given) == len(CompanionKind) and len(set(given.values())) == 1:
        owned = {kind_of(name) for name in first_names}
        needed = owned & {CompanionKind.CONFIG, CompanionKind.TOKENIZER}
        missing = sorted(needed - present) if present else list(given)
    else:
        missing = [kind for kind in given if kind not in present]
    if missing:
        kind = missing[0]
        raise RecipeError(
            f"output.companions.{kind}: {taken[kind].directory} has no files of this kind; name a "
            "model that has, or leave the key out"
        )


def _check_modules(
    directory: Path, first: Checkpoint | AdaptedModel, companions: Sequence[Companion]
) -> None:
    """Raise if the configuration lists modules whose tensors the output lacks."""
    if not any(companion.name == MODULES for companion in companions):
        return
    held = {folder for folder, _ in first.parts} if isinstance(first, Checkpoint) else set()
    missing = [folder for folder in list_parts(directory) if folder not in held]
    if missing:
        raise CheckpointError(
            f"{directory / missing[0]}: weights of a sentence-transformers module outside the merged "
            "checkpoint, which the output would lack; name the directory of the whole model, not its "
            f"file, or leave {MODULES} out of a copy of it"
        )


def _compare(
    recipe: Recipe,
    participants: Sequence[Participant],
    models: Sequence[Checkpoint | AdaptedModel],
    taken: Mapping[CompanionKind, Participant],
) -> Iterator[CompanionDifference]:
    """Yield what differs, in the directory of the model and in the folder of each part."""
    full = [
        (participant, model)
        for participant, model in zip(participants, models, strict=True)
        if isinstance(model, Checkpoint)
    ]
    for folder in ("", *list_component_folders(participants[0].directory)):
        inside = [
            Participant(participant.label, directory)
            for participant, model in full
            if (directory := _folder_of(participant, model, folder)).is_dir()
        ]
        by_directory = {participant.directory: model for participant, model in full}
        chosen = {
            kind: Participant(
                each.label, _folder_of(each, by_directory.get(each.directory), folder)
            )
            for kind, each in taken.items()
        }
        for difference in compare_companions(inside, chosen, vocabulary=recipe.vocabulary):
            if difference.key.partition(".")[0] == QUANTIZATION_KEY:
                # Whoever has it, the output has not: what it is about was read as numbers.
                continue
            name = "/".join(filter(None, (folder, difference.key)))
            yield replace(difference, key=name)


def _folder_of(participant: Participant, model: Checkpoint | None, folder: str) -> Path:
    """Return where a model has the files of a part: a part alone has them in its own directory."""
    part = dict(model.parts).get(folder) if model is not None else None
    return participant.directory / folder if part is None else part.directory


def _arranged_layers(
    planned: MergePlan, recipe: Recipe, first: Checkpoint | AdaptedModel
) -> ArrangedLayers | None:
    """Return where each layer that a recipe puts together comes from: the base, or the first source."""
    if not recipe.layers:
        return None
    labels = [model.label for model in planned.models]
    origins = [
        LayerOrigin(labels[0 if each.source == BASE else each.source + planned.has_base], layer)
        for part in recipe.layers
        for each in part.taken[:1]
        for layer in range(each.first, each.end)
    ]
    return ArrangedLayers(find_stacks(first.tensors)[0].prefix.rstrip("."), tuple(origins))


def _fit(
    planned: MergePlan,
    models: Sequence[Checkpoint | AdaptedModel],
    origin: Participant,
    arranged: ArrangedLayers | None,
    mixture: Mixture | None,
) -> tuple[dict[str, tuple[JsonChange, ...]], list[str]]:
    """Return what the chosen configurations have to say of the planned tensors, by their file's name.

    And what they say that does not hold.
    """
    named = [
        (model.label, companion_directory(Path(model.path)), dict(each.parts) or {"": each})
        for model, each in zip(planned.models, models, strict=True)
        if isinstance(each, Checkpoint)
    ]
    folders = {folder for _, _, parts in named for folder in parts if folder}
    results: dict[str, dict[str, tuple[int, ...]]] = {}
    copied: dict[str, dict[str, str]] = {}
    merged: dict[str, set[DType]] = {}
    full = {index for index, model in enumerate(models) if isinstance(model, Checkpoint)}
    # Configurations describe the weights, not the scales of their codes.
    first = models[0]
    scales = first.quantisation if isinstance(first, Checkpoint) else {}
    for task in planned.tasks:
        if task.name in scales:
            continue
        folder, name = "", task.name
        if folders:
            head, slash, rest = task.name.partition("/")
            folder, name = (head, rest) if slash and head in folders else ("", task.name)
        results.setdefault(folder, {})[name] = task.output_shape
        if task.action is Action.MERGE:
            merged.setdefault(folder, set()).add(task.dtype)
        elif task.action in (Action.COPY, Action.CONVERT) and not task.changes:
            present = [index for index, entry in enumerate(task.inputs) if entry is not None]
            if len(present) == 1 and present[0] in full:
                copied.setdefault(folder, {})[name] = planned.models[present[0]].label
    changes: dict[str, tuple[JsonChange, ...]] = {}
    remarks: list[str] = []
    for folder, result in results.items():
        described = [
            (directory, _describe(label, parts[folder]))
            for label, directory, parts in named
            if folder in parts
        ]
        own = next((each for directory, each in described if directory == origin.directory), None)
        if own is None or not own.config:
            continue
        others = [each for _, each in described if each is not own]
        is_first = own.label == planned.models[0].label
        judged = copied.get(folder, {}) if is_first else dict.fromkeys(result, "the result")
        found = (
            fit_config(
                own,
                others,
                result,
                judged,
                is_first=is_first,
                arranged=None if folder else arranged,
            )
            if mixture is None
            else tuple(
                fit_mixture(own, mixture, len(planned.models) - 1, result, is_first=is_first)
            )
        )
        remark = remark_on_depth(own, found, result)
        remarks += [] if remark is None else [remark]
        if folder:
            found += tuple(_dtype_changes(merged.get(folder, set()), own.config))
        changes[f"{folder}/{_CONFIG}" if folder else _CONFIG] = found
    return changes, remarks


def _storage(
    planned: MergePlan,
    first: Checkpoint | AdaptedModel,
    participant: Participant,
    origin: Participant,
) -> Iterator[JsonChange]:
    """Yield what another model's configuration has to say of how the tensors are stored."""
    config = read_object(origin.directory / _CONFIG)
    if origin.directory == participant.directory or config is None:
        return
    own = first.config if isinstance(first, Checkpoint) else None
    names = dict.fromkeys(task.name for task in planned.tasks)
    yield from state_storage(config, own, names, label=origin.label)


def _describe(label: str, model: Checkpoint) -> Described:
    shapes = {name: entry.shape for name, entry in stored_tensors(model).items()}
    return Described(label, model.config or {}, shapes)


def _dtype_changes(merged: set[DType], config: Mapping[str, object]) -> Iterator[JsonChange]:
    """Yield the element type of a merged part, where its configuration says another one."""
    if len(merged) == 1:
        (dtype,) = merged
        for key in ("dtype", "torch_dtype"):
            if isinstance(config.get(key), str) and config[key] != dtype.torch_name:
                yield JsonChange("", key, json.dumps(dtype.torch_name), "the type of the output")


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
    taken += [
        f"{folder}/{part.index_name}" if folder else part.index_name
        for folder, part in (first.parts or (("", first),))
        if part.index_name is not None
    ]
    return list_left_behind(directory, taken)
