"""What two or more models differ in: which tensors are equal, changed, or only in some, and by how much.

The first model is compared with each other one, as the base of a merge with its sources: numbers are those
of a report (:mod:`streammerge.report`), found by the same plan and the same engine. Tensors that only some
have are compared among those, by a plan for each set of models that share some. Values are compared, so
that the same numbers in another type are equal; that they are stored otherwise is told.

Memory: as for a merge of these models; and two pieces of :data:`_STEP` bytes of what is no number.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from streammerge.adapters.files.reading import is_adapter, read_adapter
from streammerge.adapters.onto_base.adapted import AdaptedModel
from streammerge.analysing import AnalysisJob
from streammerge.checkpoint.bytesource import (
    ByteSource,
    ByteSourceKind,
    OpenByteSource,
    choose_byte_source,
)
from streammerge.checkpoint.inputs import parse_path
from streammerge.checkpoint.reading import read_checkpoint
from streammerge.checkpoint.types import Checkpoint, TensorEntry
from streammerge.collecting import without_collecting
from streammerge.engine.progress import OnProgress
from streammerge.engine.shelter import run_sheltered
from streammerge.errors import RecipeError
from streammerge.limits import naming_limits
from streammerge.machine import describe_machine
from streammerge.plan.planning import Machine, plan_merge
from streammerge.recipe.types import Recipe
from streammerge.report.document import Report, comparison_of, surveyed_tensors
from streammerge.report.naming import natural
from streammerge.report.tables import SurveyedTensor, Table
from streammerge.run import load_recipe
from streammerge.sources import locate_models, read_models
from streammerge.storage.urls import spelled

_METHOD = "task_arithmetic"
"""Takes any number of task vectors, and asks nothing about them."""
_STEP = 2**20
"""Bytes of tensors without arithmetic that are compared at once."""
Model = Checkpoint | AdaptedModel


@naming_limits()
def diff(
    models: Sequence[str | os.PathLike[str]],
    *,
    memory: int | str | None = None,
    workers: int | None = None,
    download: bool = False,
    on_progress: OnProgress | None = None,
) -> Report:
    """Return what models, or adapters, differ in from the first of them.

    Args:
        models: Two or more checkpoints, as recipes name them; adapters after a checkpoint are what they
            make of it; adapters alone are compared by the tensors of their files.
        memory: As for :func:`streammerge.run.plan`.
        workers: As there.
        download: As there.
        on_progress: Told several times per second how far each comparison is.

    Returns:
        A report of kind ``comparison``, whose document also has ``identical``, ``changed``, ``partial``
        (tensors that not all have), ``shapes`` and ``types`` (those in which these differ).

    Raises:
        ValueError: There are fewer than two models.
        RecipeError: The first is an adapter, and others are none.
        CheckpointError: A model is not what it should be, or holds NaN or infinity.
        MemoryBudgetError: The comparison does not fit the budget.
    """
    paths = [parse_path(each, "path") for each in models]
    if len(paths) < 2:
        raise ValueError(f"models: expected two or more to compare, got {len(paths)}")
    with without_collecting():
        recipe, read = _read(paths, download=download)
        machine = describe_machine(memory=memory, workers=workers, devices=(), device_budget=None)
        presence = _find_presence(read)
    opener = choose_byte_source(ByteSourceKind.PREAD)
    tensors: list[SurveyedTensor] = []
    histograms = None
    for sources, names in sorted(presence.groups.items()):
        job = AnalysisJob(_plan_group(recipe, read, sources, names, machine), opener)
        run = run_sheltered(job.run, on_progress or (lambda _: None))
        tensors += [
            replace(each, sources=tuple(sources[own] for own in each.sources))
            for each in surveyed_tensors(job.planned, run)
        ]
        found = np.zeros((len(read) - 1, run.histograms.shape[1]), dtype=np.int64)
        found[list(sources)] = run.histograms[1:]
        histograms = found if histograms is None else histograms + found
    raw = _compare_raw(read, presence.raw, opener)
    lists = _lists_of(read, presence, tensors, raw)
    return comparison_of(list(map(spelled, paths)), tensors, histograms, lists)


def differs(report: Report) -> bool:
    """Return whether models differ in anything that :func:`diff` looked at."""
    document = report.document
    lists = ("changed", "partial", "shapes", "types")
    return any(document[name] if name == "changed" else document[name]["name"] for name in lists)


def _read(paths: Sequence[Path], *, download: bool) -> tuple[Recipe, list[Model]]:
    """Return the recipe that compares models, and their headers."""
    document = {
        "method": _METHOD,
        "base": str(paths[0]),
        "sources": [{"path": str(path)} for path in paths[1:]],
        "vocabulary": "ignore",
    }
    recipe = locate_models(load_recipe(document, download=download), download=download)
    assert recipe.base is not None  # noqa: S101 - as it is written above
    if not is_adapter(recipe.base):
        return recipe, list(read_models(recipe, shares_ties=False).models)
    models: list[Model] = []
    for path in (recipe.base, *(source.path for source in recipe.sources)):
        if not is_adapter(path):
            raise RecipeError(
                f"{path}: is no adapter, and {recipe.base} is one; name the model first, and what adapters "
                "make of it is compared with it; or compare adapters alone"
            )
        models.append(read_checkpoint(read_adapter(path).file.path))
    return recipe, models


@dataclass(frozen=True, slots=True)
class _Presence:
    """Which models have which tensors."""

    groups: dict[tuple[int, ...], list[str]]
    """Tensors of the first model, with arithmetic, that the same others have in the same shape."""
    raw: dict[str, tuple[int, ...]]
    """Tensors without arithmetic, with those that have them in the same shape and type."""
    partial: dict[str, tuple[int, ...]]
    """Tensors that not all models have, with those that do."""
    shapes: dict[str, tuple[tuple[int, ...] | None, ...]]
    """Tensors of which some have another shape."""
    types: dict[str, tuple[str | None, ...]]
    """Tensors of which some have another element type."""


def _find_presence(models: Sequence[Model]) -> _Presence:
    found = _Presence({}, {}, {}, {}, {})
    first = models[0]
    assert isinstance(first, Checkpoint)  # noqa: S101 - adapters are read as files, or come later
    names = {
        name: None for model in models if isinstance(model, Checkpoint) for name in model.tensors
    }
    for name in names:
        entries = [_entry_of(model, first, name) for model in models]
        having = tuple(at for at, entry in enumerate(entries) if entry is not None)
        if len(having) < len(models):
            found.partial[name] = having
        shapes = [None if entry is None else entry.shape for entry in entries]
        types = [None if entry is None else entry.dtype.value for entry in entries]
        if len({shape for shape in shapes if shape is not None}) > 1:
            found.shapes[name] = tuple(shapes)
        if len({each for each in types if each is not None}) > 1:
            found.types[name] = tuple(types)
        base = entries[0]
        if base is None:
            continue
        like = tuple(at for at in having[1:] if shapes[at] == base.shape)
        if base.dtype.is_float:
            sources = tuple(at - 1 for at in like if _is_number(entries[at]))
            if sources:
                found.groups.setdefault(sources, []).append(name)
        else:
            found.raw[name] = tuple(at for at in like if types[at] == types[0])
    return found


def _is_number(entry: TensorEntry | None) -> bool:
    return entry is not None and entry.dtype.is_float


def _entry_of(model: Model, first: Checkpoint, name: str) -> TensorEntry | None:
    """Return a model's tensor; what an adapter does not bring along is the first model's."""
    if isinstance(model, AdaptedModel):
        return model.tensors.get(name, first.tensors.get(name))
    return model.tensors.get(name)


def _plan_group(
    recipe: Recipe,
    models: Sequence[Model],
    sources: Sequence[int],
    names: Sequence[str],
    machine: Machine,
) -> Any:
    """Plan the comparison of some tensors, which the first model and these sources share."""
    wanted = set(names)
    base, *others = (_with_tensors(models[at], wanted) for at in (0, *(s + 1 for s in sources)))
    assert isinstance(base, Checkpoint)  # noqa: S101 - adapters come later
    own = replace(recipe, sources=tuple(recipe.sources[source] for source in sources))
    return plan_merge(own, base, others, machine, survey=True)


def _with_tensors(model: Model, wanted: set[str]) -> Model:
    """Return a model that has no other tensors."""
    tensors = {name: entry for name, entry in model.tensors.items() if name in wanted}
    if isinstance(model, AdaptedModel):
        changes = {name: each for name, each in model.changes.items() if name in wanted}
        return replace(model, tensors=tensors, changes=changes)
    # Neither ties nor a vocabulary are of interest, and parts need not be there.
    return replace(model, tensors=tensors, config=None)


def _compare_raw(
    models: Sequence[Model], raw: Mapping[str, tuple[int, ...]], opener: OpenByteSource
) -> dict[str, bool]:
    """Return, of tensors without arithmetic, whether all that have them hold the same bytes."""
    if not raw:
        return {}
    with ExitStack() as stack:
        opened = [
            [stack.enter_context(opener(file.path)) for file in model.files]
            if isinstance(model, Checkpoint)
            else []
            for model in models
        ]
        return {
            name: all(
                _are_equal((models[0], opened[0]), (models[at], opened[at]), name) for at in having
            )
            for name, having in raw.items()
        }


def _are_equal(
    one: tuple[Model, Sequence[ByteSource]], other: tuple[Model, Sequence[ByteSource]], name: str
) -> bool:
    if isinstance(other[0], AdaptedModel) and name not in other[0].tensors:
        return True
    pieces = zip(_iter_bytes(*one, name), _iter_bytes(*other, name), strict=True)
    return all(np.array_equal(a, b) for a, b in pieces)


def _iter_bytes(model: Model, files: Sequence[ByteSource], name: str) -> Iterator[np.ndarray]:
    """Yield the bytes of a tensor that lies in one piece."""
    entry = model.tensors[name]
    for begin in range(0, entry.nbytes, _STEP):
        memory = np.empty(min(_STEP, entry.nbytes - begin), dtype=np.uint8)
        files[entry.file].read_into(entry.offset + begin, memory.data)
        yield memory


def _lists_of(
    models: Sequence[Model],
    presence: _Presence,
    tensors: Sequence[SurveyedTensor],
    raw: Mapping[str, bool],
) -> dict[str, Any]:
    """Return which tensors are equal, changed, or not everywhere the same thing."""
    equal = {
        each.name: all(
            each.row[each.layout.changed(own)] == 0 for own in range(each.layout.sources)
        )
        for each in tensors
    } | dict(raw)
    names = [f"models[{at}]" for at in range(len(models))]
    return {
        "identical": sorted((name for name, same in equal.items() if same), key=natural),
        "changed": sorted((name for name, same in equal.items() if not same), key=natural),
        "partial": _named(presence.partial, "only_in", lambda having: [names[at] for at in having]),
        "shapes": _named(
            presence.shapes,
            "shapes",
            lambda shapes: [None if shape is None else list(shape) for shape in shapes],
        ),
        "types": _named(presence.types, "types", list),
    }


def _named(found: Mapping[str, Any], head: str, shown: Any) -> Table:
    names = sorted(found, key=natural)
    return {"name": list(names), head: [shown(found[name]) for name in names]}
