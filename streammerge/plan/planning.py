"""From a recipe and the headers of its inputs to a plan, or to the reason why there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Protocol

from streammerge.adapters.onto_base.adapted import TunedModel, stored_tensors
from streammerge.adapters.onto_base.changes import Change
from streammerge.assignment.aligning import align_tensors
from streammerge.assignment.layers import arrange_layers
from streammerge.assignment.mixtures import arrange_mixture
from streammerge.assignment.naming import match_names
from streammerge.assignment.ties import settle_ties
from streammerge.assignment.tokens import Tokens
from streammerge.assignment.types import Action, AssignedTensor, Model, Twins
from streammerge.assignment.vocabularies import Drawn, draw_rows
from streammerge.checkpoint.coded import QUANTIZATION_KEY
from streammerge.checkpoint.ties import TIE_KEY
from streammerge.checkpoint.types import Checkpoint, Note, ShardFile, TensorEntry
from streammerge.dtypes import DType
from streammerge.errors import RecipeError
from streammerge.methods.base import Operand
from streammerge.methods.programs import Programs
from streammerge.methods.surveying import survey_of
from streammerge.plan.adapting import describe_changes
from streammerge.plan.asking import (
    check_in_turn,
    check_layers,
    check_numbers,
    check_settings,
    check_sources,
    find_method,
    semantics_of,
    takes_in_turn,
)
from streammerge.plan.budgeting import choose_resources
from streammerge.plan.demanding import measure_demand
from streammerge.plan.devices import add_devices, choose_device_resources
from streammerge.plan.fusing import Earlier, fuse, note_of, reader_nbytes, shared_nbytes
from streammerge.plan.kernels import measure_baseline, why_torch
from streammerge.plan.layout import place_parts, plan_layout_like
from streammerge.plan.participants import labels_of, models_of, remark_on_participants
from streammerge.plan.rendering import PrintedPlan
from streammerge.plan.requantising import encode_as_base
from streammerge.plan.sweeps import Needs, bytes_beyond_once, programs_of_settings
from streammerge.plan.types import (
    PLAN_VERSION,
    MergePlan,
    OutputLayout,
    StoredTwins,
    TensorInput,
    TensorTask,
)
from streammerge.recipe.dumping import dump_recipe
from streammerge.recipe.resolving import build_resolver
from streammerge.recipe.types import ComputeDType, NonFinitePolicy, Recipe
from streammerge.statistics import count_blocks


class Baseline(Protocol):
    """Tells the resident memory of the process before work starts."""

    def __call__(self, *, torch: bool) -> int:
        """Return it in bytes; with torch loaded, if the work will need it."""
        ...


@dataclass(frozen=True, slots=True)
class Machine:
    """What the plan may use."""

    budget: int
    """Most private memory the process may have, in bytes."""
    baseline: Baseline
    """Resident memory of the process before work starts."""
    workers: int
    """Compute threads."""
    readers: int
    """Reading threads."""
    writers: int
    """Writing threads."""
    devices: tuple[str, ...] = ()
    """Accelerators, by name; none for the CPU."""
    device_free: int = 0
    """Free memory of the fullest of them, in bytes."""
    device_obstacle: str | None = None
    """Why no kernels can be compiled for them, as half a sentence; None where they can."""
    device_budget: int | None = None
    """Most memory that each of them gives, in bytes; None for what is useful."""
    at_once: int = 1
    """Merges that share the budget, each with so many threads."""


def plan_merge(
    recipe: Recipe,
    base: Checkpoint | None,
    sources: Sequence[Model],
    machine: Machine,
    tokens: Tokens | None = None,
    *,
    earlier: Sequence[Earlier] = (),
    survey: bool = False,
) -> MergePlan:
    """Decide everything about a merge.

    Args:
        recipe: What is asked for.
        base: The base's headers; None without one.
        sources: The sources' headers, in recipe order; adapters as they change this base.
        machine: What may be used.
        tokens: The vocabulary of the result, if rows of embeddings are drawn for one.
        earlier: Recipes whose results are sources, and are computed where they are read.
        survey: Whether what a report tells is found while tensors are merged.

    Raises:
        RecipeError: The method cannot do what the recipe asks.
        CheckpointError: The inputs do not belong together.
        MemoryBudgetError: The job does not fit.
    """
    method = find_method(recipe.method)
    semantics = semantics_of(recipe, method)
    recipe = replace(recipe, semantics=semantics)
    check_sources(recipe, method)
    check_layers(recipe, method)
    if method.operand is Operand.TASK_VECTORS and base is None:
        raise RecipeError(
            f"base: {method.name} merges task vectors and needs the model that the sources were "
            "tuned from; add `base: PATH`"
        )
    models = models_of(recipe)
    labels = labels_of(recipe)
    given = [*([base] if base is not None else []), *sources]
    matched, renamings, renamed = match_names(given, labels, recipe)
    arranged = (
        arrange_layers(matched, labels, recipe)
        if recipe.mixture is None
        else arrange_mixture(matched, labels, recipe)
    )
    resolve = build_resolver(recipe, method.parameters, arranged.position_of)
    ties = settle_ties(arranged.models, labels, resolve)
    drawn = Drawn(ties.models)
    if tokens is not None:
        drawn = draw_rows(recipe, tokens, ties.models, labels)
    checkpoints = drawn.models
    assignment = align_tensors(
        recipe,
        labels,
        checkpoints,
        resolve,
        method=method,
        models_of=arranged.models_of,
        base_of=arranged.base_of,
        known=ties.known,
        renamed=renamed,
    )
    if recipe.output.quantization is not None:
        assignment = encode_as_base(assignment, checkpoints, recipe, resolve)
    model_scope = check_settings(method, assignment)
    check_numbers(recipe, assignment)
    if takes_in_turn(recipe, method):
        check_in_turn(recipe, assignment, sources)
    layout, places = place_parts(
        assignment.tensors,
        lambda tensors: plan_layout_like(
            tensors,
            _first(checkpoints if recipe.mixture is None else given),
            recipe.output,
            grows=recipe.mixture is not None,
        ),
    )
    files, file_index = _files(checkpoints)
    files, fused = fuse(files, earlier)
    tasks = _tasks(assignment.tensors, places, file_index, model_scope=model_scope)
    programs = programs_of_settings(method, assignment.settings)
    tasks = [_with_locality(task, programs) for task in tasks]
    reason = why_torch(
        programs,
        assignment.settings,
        tasks,
        compute_dtype=_compute_dtype(recipe),
        keep_non_finite=recipe.non_finite is NonFinitePolicy.KEEP,
    )
    torch = bool(machine.devices) or reason is not None
    demand = measure_demand(
        programs,
        tasks,
        itemsize=_compute_dtype(recipe).itemsize,
        model_scope=model_scope,
        torch=torch,
        surveys=[survey_of(each) for each in programs] if survey else (),
    )
    if machine.devices:
        demand = add_devices(
            demand,
            tasks,
            programs,
            assignment.settings,
            count=len(machine.devices),
            fused=machine.device_obstacle is None,
        )
    demand = replace(demand, reader_bytes=demand.reader_bytes + reader_nbytes(fused))
    resources, memory = choose_resources(
        demand,
        budget=machine.budget,
        baseline=measure_baseline(machine.baseline, torch=torch, reason=reason)
        + sum(file.made.peak_nbytes for file in files if file.made is not None)
        + shared_nbytes(fused),
        workers=machine.workers,
        readers=machine.readers,
        writers=machine.writers,
        at_once=machine.at_once,
    )
    # The order of work is that of the files, the order of the layout that of the names.
    order = _work_order(tasks)
    plan = PrintedPlan(
        version=PLAN_VERSION,
        method=method.name,
        semantics=semantics.value,
        recipe=dump_recipe(recipe),
        seed=recipe.seed,
        keep_non_finite=recipe.non_finite is NonFinitePolicy.KEEP,
        compute_dtype=_compute_dtype(recipe),
        has_base=base is not None,
        models=models,
        files=files,
        settings=assignment.settings,
        tasks=tuple(tasks[index] for index in order),
        model_scope=model_scope,
        layout=_reordered(layout, order),
        resources=resources,
        memory=memory,
        bytes_to_read=0,
        input_nbytes=demand.input_nbytes,
        dropped=assignment.dropped,
        copied_from_base=assignment.copied_from_base,
        config=_config(checkpoints, assignment.tensors, recipe, tied=ties.tied),
        notes=(
            *(Note("mergekit", remark) for remark in recipe.remarks),
            *remark_on_participants(recipe, method, sources),
            *_notes_of_files(checkpoints, labels),
            *renamings,
            *arranged.notes,
            *ties.notes,
            *drawn.notes,
            *assignment.notes,
            *map(note_of, fused),
            *_notes_of_devices(machine),
        ),
        twins=_twins(ties.twins, labels, file_index),
        needs_torch=torch,
        fused=fused,
        survey=survey,
    )
    adapting = [
        Note("adapter", f"{labels[index]}: {sentence}")
        for index, sentence in describe_changes(plan).items()
    ]
    plan = replace(plan, notes=(*plan.notes, *adapting))
    beyond = bytes_beyond_once(plan, Needs(plan, method))
    plan = replace(plan, bytes_to_read=plan.input_nbytes + beyond)
    if not machine.devices:
        return plan
    device = choose_device_resources(
        plan,
        method,
        names=machine.devices,
        budget=machine.device_budget,
        free=machine.device_free,
        fused=machine.device_obstacle is None,
    )
    return replace(plan, device=device)


def _notes_of_devices(machine: Machine) -> list[Note]:
    if not machine.devices or machine.device_obstacle is None:
        return []
    said = (
        f"no fused kernels, for {machine.device_obstacle}: slower, and sums over whole tensors may differ "
        "from the CPU's in their last bits"
    )
    return [Note("device", said)]


def _first(checkpoints: Sequence[Model]) -> Checkpoint:
    """Return the model whose files the output's are like: adapters come with a base before them."""
    first = checkpoints[0]
    assert isinstance(first, Checkpoint)  # noqa: S101 - sources that are all adapters make an adapter
    return first


def _compute_dtype(recipe: Recipe) -> DType:
    return DType.F64 if recipe.compute_dtype is ComputeDType.FLOAT64 else DType.F32


def _notes_of_files(models: Sequence[Model], labels: Sequence[str]) -> Iterator[Note]:
    for label, model in zip(labels, models, strict=True):
        topic = "files" if isinstance(model, Checkpoint) else "adapter"
        yield from (Note(topic, f"{label}: {text}") for text in model.notes)


def _twins(
    twins: Sequence[Twins], labels: Sequence[str], file_index: Sequence[Sequence[int]]
) -> tuple[StoredTwins, ...]:
    return tuple(
        StoredTwins(
            labels[each.model],
            *(
                replace(entry, file=file_index[each.model][entry.file])
                for entry in (each.one, each.other)
            ),
        )
        for each in twins
    )


def _config(
    models: Sequence[Model],
    tensors: Sequence[AssignedTensor],
    recipe: Recipe,
    *,
    tied: bool | None,
) -> tuple[tuple[str, bool | int | None], ...]:
    """Return the keys of the base's ``config.json`` that the result contradicts."""
    base = models[0]
    if not isinstance(base, Checkpoint):
        return ()
    settings: dict[str, bool | int | None] = {}
    if base.dequantised and recipe.output.quantization is None:
        settings[QUANTIZATION_KEY] = None
    if tied is not None:
        settings[TIE_KEY] = tied
    stored = stored_tensors(base)
    config = base.config or {}
    inner = config.get("text_config")
    vocabulary = config.get(
        "vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None
    )
    for tensor in tensors:
        before = stored.get(tensor.name)
        shape = tensor.shape if tensor.region is None else tensor.region.shape
        if before is None or before.shape == shape or len(shape) != len(before.shape):
            continue
        if before.shape[0] == vocabulary and before.shape[1:] == shape[1:]:
            settings["vocab_size"] = shape[0]
    return tuple(settings.items())


def _files(
    checkpoints: Sequence[Model],
) -> tuple[tuple[ShardFile, ...], list[list[int]]]:
    """Number all files; a file that two models share is one file."""
    numbers: dict[Path, int] = {}
    files: list[ShardFile] = []
    index = []
    for checkpoint in checkpoints:
        row = []
        for file in _files_of(checkpoint):
            if file.path not in numbers:
                numbers[file.path] = len(files)
                files.append(file)
            row.append(numbers[file.path])
        index.append(row)
    return tuple(files), index


def _files_of(model: Model) -> tuple[ShardFile, ...]:
    return (*model.files, *(model.adapter_files if isinstance(model, TunedModel) else ()))


def _tasks(
    tensors: Sequence[AssignedTensor],
    places: Sequence[tuple[int, int]],
    file_index: Sequence[Sequence[int]],
    *,
    model_scope: bool,
) -> list[TensorTask]:
    scope_blocks = _scope_blocks(tensors) if model_scope else {}
    tasks: list[TensorTask] = []
    inputs: list[TensorInput | None]
    for tensor, (shard, offset) in zip(tensors, places, strict=True):
        inputs = []
        for model, entry in enumerate(tensor.entries):
            files = file_index[model or tensor.base_owner]
            if entry is None:
                inputs.append(None)
            elif entry.parts or entry.rows is not None:
                inputs.append(_composed_input(entry, files, file_index))
            else:
                inputs.append(TensorInput(files[entry.file], entry.offset, entry.dtype))
        present = tensor.entries[0] or next(filter(None, tensor.entries), None)
        numel = prod(tensor.shape) if present is None else present.numel
        tasks.append(
            TensorTask(
                name=tensor.name,
                shape=tensor.shape,
                numel=numel // tensor.dtype.elements_per_item,
                dtype=tensor.dtype,
                action=tensor.action,
                inputs=tuple(inputs),
                setting=tensor.setting,
                scope_block=scope_blocks.get(tensor.name, 0),
                shard=shard,
                offset=offset,
                region=tensor.region,
                changes=tuple(_in_files(change, file_index) for change in tensor.changes),
                encoding=tensor.encoding,
                base_owner=tensor.base_owner,
            )
        )
    return tasks


def _with_locality(task: TensorTask, programs: Sequence[Programs]) -> TensorTask:
    """Return a task that says what of it the method must see together."""
    if task.action is not Action.MERGE or not task.numel:
        return task
    if programs[task.setting].work.whole is not None:
        return replace(task, whole=True)
    if not programs[task.setting].by_rows:
        return task
    return replace(task, row=task.shape[-1] if task.shape else 1)


def _composed_input(
    entry: TensorEntry, files: Sequence[int], file_index: Sequence[Sequence[int]]
) -> TensorInput:
    """Return an input that refers to the plan's files."""
    if entry.rows is not None:
        places = tuple(
            replace(place, file=file_index[place.model][place.file]) for place in entry.rows.places
        )
        rows = replace(entry.rows, places=places)
        return TensorInput(places[0].file, places[0].offset, entry.dtype, rows=rows)
    parts = tuple(
        replace(
            part,
            file=files[part.file],
            coding=part.coding and replace(part.coding, scale_file=files[part.coding.scale_file]),
        )
        for part in entry.parts
    )
    return TensorInput(files[entry.file], entry.offset, entry.dtype, parts)


def _in_files(change: Change, file_index: Sequence[Sequence[int]]) -> Change:
    """Return a change whose factors refer to the plan's files."""
    files = file_index[change.model]
    factors = tuple(replace(factor, file=files[factor.file]) for factor in change.factors)
    return replace(change, factors=factors)


def _scope_blocks(tensors: Sequence[AssignedTensor]) -> dict[str, int]:
    """Number the blocks of all merged tensors through, in the order of their sorted names."""
    merged = {tensor.name: tensor for tensor in tensors if tensor.action is Action.MERGE}
    first = {}
    cursor = 0
    for name in sorted(merged):
        first[name] = cursor
        present = next(entry for entry in merged[name].entries if entry is not None)
        cursor += count_blocks(present.numel)
    return first


def _work_order(tasks: Sequence[TensorTask]) -> list[int]:
    first_read = []
    for task in tasks:
        entry = task.inputs[0] or next(filter(None, task.inputs), None)
        # Scales come from no file; they are made when their tensors are.
        first_read.append((sys.maxsize, 0) if entry is None else (entry.file, entry.offset))
    return sorted(range(len(tasks)), key=first_read.__getitem__)


def _reordered(layout: OutputLayout, order: Sequence[int]) -> OutputLayout:
    """Let the layout refer to tasks by their place in the order of work."""
    place = {old: new for new, old in enumerate(order)}
    shards = tuple(
        replace(shard, tasks=tuple(place[index] for index in shard.tasks))
        for shard in layout.shards
    )
    return replace(layout, shards=shards)
