"""Plan and merge: the only place that wires recipe, planner, engine and output together."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import safetensors
import torch

from streammerge.checkpoint.bytesource import (
    ByteSource,
    ByteSourceKind,
    allow_open_files,
    choose_byte_source,
)
from streammerge.checkpoint.manifest import (
    MANIFEST_VERSION,
    RECIPE_NAME,
    Manifest,
    RunRecord,
    TensorRecord,
    write_manifest,
)
from streammerge.checkpoint.modelcard import render_model_card
from streammerge.checkpoint.outputdir import OutputDirectory
from streammerge.checkpoint.outputfile import OutputFile
from streammerge.checkpoint.reading import check_not_quantized, read_checkpoint
from streammerge.checkpoint.sidecars import plan_sidecars, write_sidecars
from streammerge.checkpoint.types import Checkpoint
from streammerge.engine.memory import cgroup_limit, default_budget, resident_memory
from streammerge.engine.pipeline import RunReport, run_pipeline
from streammerge.engine.progress import OnProgress
from streammerge.errors import CheckpointError, OutputError, RecipeError
from streammerge.methods import discover_methods
from streammerge.plan.layout import render_header, render_index
from streammerge.plan.planning import Machine, find_method, plan_merge
from streammerge.plan.types import MergePlan
from streammerge.recipe.parsing import parse_recipe, recipe_from_mapping
from streammerge.recipe.types import Recipe
from streammerge.units import parse_size
from streammerge.version import VERSION

_READERS = 4
"""Four to eight concurrent requests of some MiB saturate the disks of common machines."""
_WRITERS = 2
"""One waits for the disk while the other hands over pages."""
_MOST_WORKERS = 16
"""Beyond this many compute threads the interpreter lock is the limit, not the arithmetic."""

RecipeLike = str | os.PathLike[str] | Mapping[str, Any] | Recipe
"""A recipe file, its parsed document, or a parsed recipe."""


def plan(
    recipe: RecipeLike, *, memory: int | str | None = None, workers: int | None = None
) -> MergePlan:
    """Return what a merge would do, having read headers only.

    Args:
        recipe: A recipe file, its document, or a parsed recipe.
        memory: Most private memory the process may use, in bytes or as ``"2GiB"``; None takes a
            quarter of what is available.
        workers: Compute threads; None takes one per core.

    Raises:
        RecipeError: The recipe asks for something that cannot be.
        CheckpointError: An input is not what it should be, or the inputs do not belong together.
        MemoryBudgetError: The job does not fit the budget.
    """
    parsed = load_recipe(recipe)
    # Before the files are opened: a method that does not exist is a matter of the recipe.
    find_method(parsed.method)
    base = None if parsed.base is None else _read_model(parsed.base, "base")
    sources = [
        _read_model(source.path, f"sources[{index}]") for index, source in enumerate(parsed.sources)
    ]
    machine = Machine(
        budget=_budget(memory),
        baseline=resident_memory(),
        workers=_workers(workers),
        readers=_READERS,
        writers=_WRITERS,
    )
    return plan_merge(parsed, base, sources, machine)


def merge(
    recipe: RecipeLike | MergePlan,
    out: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    byte_source: ByteSourceKind = ByteSourceKind.PREAD,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Merge into the directory ``out``, which exists when this returns and not before.

    Args:
        recipe: What :func:`plan` takes, or its result; a plan brings its own memory and workers.
        out: The directory to make.
        memory: As for :func:`plan`.
        workers: As for :func:`plan`.
        overwrite: Whether an earlier merge in ``out`` may be replaced.
        byte_source: How input files are read.
        on_progress: Told several times per second how far the work is.

    Returns:
        What is also written to ``out/streammerge_manifest.json``.

    Raises:
        StreamMergeError: One of the errors that :mod:`streammerge.errors` lists; ``out`` is then
            as it was before.
    """
    if isinstance(recipe, MergePlan):
        if memory is not None or workers is not None:
            raise ValueError("a plan already says how much memory and how many workers it takes")
        planned = recipe
    else:
        planned = plan(recipe, memory=memory, workers=workers)
    plan_sidecars(_companion_directory(planned))
    output = OutputDirectory(
        Path(out),
        inputs=[
            *(Path(model.path) for model in planned.models),
            *(file.path for file in planned.files),
        ],
        nbytes=planned.bytes_to_write,
        overwrite=overwrite,
    )
    with ExitStack() as stack:
        sources = _open_sources(planned, byte_source, stack)
        directory = stack.enter_context(output).partial
        report = _write_shards(planned, directory, sources, on_progress or (lambda _: None))
        _check_unchanged(planned, sources)
        _check_shards(planned, directory)
        manifest = _write_companions(planned, directory, report)
        output.publish()
    return manifest


def load_recipe(recipe: RecipeLike) -> Recipe:
    """Return a parsed and checked recipe.

    Raises:
        RecipeError: The file cannot be read, or the recipe asks for something that cannot be.
    """
    if isinstance(recipe, Recipe):
        return recipe
    methods = {name: method.parameters for name, method in discover_methods().items()}
    if isinstance(recipe, Mapping):
        return recipe_from_mapping(recipe, origin="recipe", methods=methods)
    path = Path(recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text at byte {error.start}") from error
    return parse_recipe(text, origin=str(path), methods=methods)


def _read_model(path: Path, label: str) -> Checkpoint:
    try:
        checkpoint = read_checkpoint(path)
        check_not_quantized(checkpoint)
    except CheckpointError as error:
        error.add_note(f"while reading {label} of the recipe")
        raise
    return checkpoint


def _budget(memory: int | str | None) -> int:
    if memory is None:
        return default_budget()
    budget = parse_size(memory)
    limit = cgroup_limit()
    return budget if limit is None else min(budget, limit)


def _workers(workers: int | None) -> int:
    if workers is None:
        available = (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        )
        return min(available or 1, _MOST_WORKERS)
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    return workers


def _open_sources(planned: MergePlan, kind: ByteSourceKind, stack: ExitStack) -> list[ByteSource]:
    """Open every input file, and check that it is still what was planned."""
    allow_open_files(len(planned.files) + len(planned.layout.shards))
    opener = choose_byte_source(kind)
    sources = [stack.enter_context(opener(file.path)) for file in planned.files]
    _check_unchanged(planned, sources)
    return sources


def _check_unchanged(planned: MergePlan, sources: Sequence[ByteSource]) -> None:
    for file, source in zip(planned.files, sources, strict=True):
        nbytes, mtime_ns = source.fingerprint()
        if (nbytes, mtime_ns) != (file.nbytes, file.mtime_ns):
            raise CheckpointError(
                f"{file.path}: changed since it was planned: {file.nbytes} bytes then, {nbytes} "
                "now, or another modification time; plan again"
            )


def _write_shards(
    planned: MergePlan, directory: Path, sources: Sequence[ByteSource], on_progress: OnProgress
) -> RunReport:
    outputs: list[OutputFile] = []
    try:
        for index, shard in enumerate(planned.layout.shards):
            outputs.append(OutputFile(directory / shard.name, shard.nbytes))
            outputs[-1].write_at(0, memoryview(render_header(planned, index)))
        report = run_pipeline(
            planned,
            find_method(planned.method),
            sources,
            outputs,
            keep_cached=_fits_page_cache(planned),
            on_progress=on_progress,
        )
        while outputs:
            outputs.pop(0).close()
    finally:
        # Whatever is left here is left because something failed.
        for output in outputs:
            output.abandon()
    return report


def _fits_page_cache(planned: MergePlan) -> bool:
    """Return whether a second sweep would find all inputs in memory without crowding others out."""
    limit = cgroup_limit()
    available = psutil.virtual_memory().available
    room = available if limit is None else min(available, limit - planned.memory.peak)
    return planned.input_nbytes < room // 2


def _check_shards(planned: MergePlan, directory: Path) -> None:
    """Open every shard with the safetensors library and compare it with the plan."""
    for shard in planned.layout.shards:
        path = directory / shard.name
        tasks = {planned.tasks[index].name: planned.tasks[index] for index in shard.tasks}
        try:
            with safetensors.safe_open(path, framework="numpy") as opened:
                names = set(opened.keys())
                if names != set(tasks):
                    raise OutputError(f"{path}: holds {len(names)} tensors, planned {len(tasks)}")
                for name, task in tasks.items():
                    found = opened.get_slice(name)
                    stored = (tuple(found.get_shape()), found.get_dtype())
                    if stored != (task.shape, task.dtype.value):
                        raise OutputError(
                            f"{path}: {name} is {stored}, planned {(task.shape, task.dtype.value)}"
                        )
        except safetensors.SafetensorError as error:
            raise OutputError(f"{path}: does not open: {error}") from error


def _write_companions(planned: MergePlan, directory: Path, report: RunReport) -> Manifest:
    """Write everything beside the shards; the manifest last."""
    method = find_method(planned.method)
    recipe = load_recipe_text(planned.recipe)
    origin = _companion_directory(planned)
    dtype = None if recipe.output.dtype is None else recipe.output.dtype.torch_name
    names = [*write_sidecars(origin, directory, dtype=dtype)]
    names += [shard.name for shard in planned.layout.shards]
    texts = {RECIPE_NAME: planned.recipe.encode()}
    if planned.layout.index_name is not None:
        texts[planned.layout.index_name] = render_index(planned)
    texts["README.md"] = render_model_card(
        title=directory.name.removesuffix(".partial"),
        method=method.name,
        summary=method.summary,
        reference=method.reference,
        recipe_yaml=planned.recipe,
        models=[(model.label, model.path) for model in planned.models],
        library_name="transformers" if (directory / "config.json").exists() else None,
        version=VERSION,
    ).encode()
    for name, content in texts.items():
        (directory / name).write_bytes(content)
    manifest = _manifest(planned, report, sorted([*names, *texts]))
    write_manifest(manifest, directory)
    return manifest


def load_recipe_text(text: str) -> Recipe:
    """Return the recipe that a plan carries."""
    methods = {name: method.parameters for name, method in discover_methods().items()}
    return parse_recipe(text, origin="recipe", methods=methods)


def _companion_directory(planned: MergePlan) -> Path:
    """Return where configuration and tokenizer come from: the base, or the first source."""
    first = Path(planned.models[0].path)
    return first if first.is_dir() else first.parent


def _manifest(planned: MergePlan, report: RunReport, files: Sequence[str]) -> Manifest:
    resources = planned.resources
    return Manifest(
        version=MANIFEST_VERSION,
        method=planned.method,
        semantics=planned.semantics,
        recipe=planned.recipe,
        recipe_digest=hashlib.blake2b(planned.recipe.encode(), digest_size=16).hexdigest(),
        inputs=planned.files,
        files=tuple(files),
        dropped=planned.dropped,
        copied_from_base=planned.copied_from_base,
        tensors=_tensor_records(planned, report),
        run=RunRecord(
            versions={
                "streammerge": VERSION,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "safetensors": safetensors.__version__,
                "python": platform.python_version(),
            },
            device="cpu",
            seconds=round(report.seconds, 3),
            seconds_by_stage=report.seconds_by_stage,
            bytes_by_stage=report.bytes_by_stage,
            threads={
                "readers": resources.readers,
                "workers": resources.workers,
                "writers": resources.writers,
            },
            projected_memory=planned.memory.peak,
            measured_memory=report.peak_memory,
            memory_budget=planned.memory.budget,
        ),
    )


def _tensor_records(planned: MergePlan, report: RunReport) -> dict[str, TensorRecord]:
    records = {}
    for index, task in enumerate(planned.tasks):
        result = report.results.get(index)
        kept = result.kept if result else ()
        thresholds = result.thresholds if result else ()
        records[task.name] = TensorRecord(
            action=task.action.value,
            dtype=task.dtype.value,
            numel=task.numel,
            density=tuple(count / max(task.numel, 1) for count in kept),
            # JSON has no infinity.
            thresholds=tuple(None if top == float("inf") else top for top in thresholds),
            not_finite=result.not_finite if result else 0,
        )
    return dict(sorted(records.items()))
