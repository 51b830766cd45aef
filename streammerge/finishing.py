"""The end of a merge: what makes a complete model directory out of complete shards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import safetensors

from streammerge.assignment.types import Action
from streammerge.checkpoint.attempts import Attempt
from streammerge.checkpoint.bytesource import ByteSourceKind
from streammerge.checkpoint.digests import (
    LEAF_ELEMENTS,
    FileDigest,
    digest_file,
    leaf_digests,
    tree_digest,
)
from streammerge.checkpoint.manifest import (
    MANIFEST_VERSION,
    Manifest,
    PartRecord,
    RunRecord,
    TensorRecord,
    collect_versions,
    digest_recipe,
    write_manifest,
)
from streammerge.checkpoint.modelcard import find_library, render_model_card
from streammerge.checkpoint.outputfile import write_durably
from streammerge.checkpoint.outputform import OutputForm
from streammerge.checkpoint.sidecars import write_sidecars
from streammerge.checkpoint.types import Note
from streammerge.companions.choosing import companion_directory
from streammerge.engine.pipeline import RunReport
from streammerge.errors import OutputError
from streammerge.lazily import torch_version
from streammerge.methods import discover_methods
from streammerge.plan.asking import find_method
from streammerge.plan.kernels import kernels_serve
from streammerge.plan.layout import render_header, render_indexes
from streammerge.plan.rendering import changed_keys
from streammerge.plan.types import MergePlan, TensorTask
from streammerge.recipe.parsing import parse_recipe
from streammerge.recipe.types import Recipe
from streammerge.report.document import report_of
from streammerge.report.writing import room_for_report, write_report
from streammerge.units import MIB
from streammerge.version import VERSION


def check_shards(planned: MergePlan, directory: Path) -> None:
    """Open every shard with the safetensors library and compare it with the plan.

    Raises:
        OutputError: It does not open, or holds something else.
    """
    for shard in planned.layout.shards:
        path = directory / shard.name
        tasks = {
            planned.tasks[index].name.removeprefix(shard.folder): planned.tasks[index]
            for index in shard.tasks
        }
        try:
            with safetensors.safe_open(path, framework="numpy") as opened:
                names = set(opened.keys())
                if names != set(tasks):
                    raise OutputError(f"{path}: holds {len(names)} tensors, planned {len(tasks)}")
                for name, task in tasks.items():
                    found = opened.get_slice(name)
                    stored = (tuple(found.get_shape()), found.get_dtype())
                    planned_as = (task.output_shape, task.dtype.value)
                    if stored != planned_as:
                        raise OutputError(f"{path}: {name} is {stored}, planned {planned_as}")
        except (safetensors.SafetensorError, OSError) as error:
            raise OutputError(f"{path}: does not open: {error}") from error


def output_names(planned: MergePlan, form: OutputForm) -> tuple[str, ...]:
    """Return the name of every file that the merge writes, relative to the output's folder."""
    return (
        *(shard.name for shard in planned.layout.shards),
        *(companion.name for companion in planned.companions),
        *(*render_indexes(planned), form.recipe, form.manifest),
        *(() if form.card is None else (form.card,)),
        *(form.reports if planned.survey else ()),
    )


def room_beside(planned: MergePlan) -> int:
    """Return the most bytes of disk that everything beside the shards takes, the journal too."""
    copied = sum(companion.nbytes for companion in planned.companions)
    names = sum(len(task.name) for task in planned.tasks)
    # Of each tensor: its record, its place in the index, an entry of the journal.
    room = copied + 4 * names + 1_000 * len(planned.tasks) + planned.bytes_to_write // 500 + MIB
    return room + room_for_report(planned) if planned.survey else room


def copy_companions(planned: MergePlan, directory: Path) -> dict[str, FileDigest]:
    """Copy what lies beside the shards of the base, as it was planned, and return what was written.

    Raises:
        CheckpointError: A file is gone, or holds something else than it did.
        DiskSpaceError: The disk is full.
        OutputError: A file cannot be written.
    """
    output = recipe_of(planned).output
    dtype = output.dtype
    if output.promotes:
        merged = {task.dtype for task in planned.tasks if task.action is Action.MERGE}
        dtype = merged.pop() if len(merged) == 1 else None
    return write_sidecars(
        companion_directory(Path(planned.models[0].path)),
        planned.companions,
        directory,
        dtype=None if dtype is None else dtype.torch_name,
        settings=planned.config,
    )


def write_companions(
    planned: MergePlan,
    directory: Path,
    report: RunReport,
    *,
    form: OutputForm,
    copied: dict[str, FileDigest],
    identity: str,
    resumed: bool,
    attempts: Sequence[Attempt] = (),
    damaged: int,
    byte_source: ByteSourceKind,
) -> Manifest:
    """Write what was not copied beside the shards; the manifest last.

    Args:
        planned: The plan.
        directory: Where the shards are.
        report: What running the plan came to.
        form: What the files are called.
        copied: What :func:`copy_companions` wrote.
        identity: Digest of what decided every byte.
        resumed: Whether an interrupted run had begun it.
        attempts: What other processes did that did parts of it.
        damaged: Pieces of that run that had changed meanwhile.
        byte_source: How input files were read.

    Raises:
        DiskSpaceError: The disk is full.
        OutputError: A file cannot be written, or is no longer what was copied.
    """
    method = find_method(planned.method)
    for name, digest in copied.items():
        _check_copy(directory / name, digest)
    texts = {form.recipe: planned.document.encode()}
    texts |= render_indexes(planned)
    if form.card is not None:
        texts[form.card] = render_model_card(
            title=form.out.name,
            method=method.name,
            summary=method.summary,
            reference=method.reference,
            recipe_yaml=planned.document,
            models=[
                row
                for model in planned.models
                for row in (
                    (model.label, model.origin),
                    *([(f"{model.label}.adapter", model.adapter)] if model.adapter else []),
                )
            ],
            library_name=find_library(directory),
            version=VERSION,
        ).encode()
    for name, content in texts.items():
        write_durably(directory / name, [content])
    files = copied | {name: digest_file(directory / name) for name in texts}
    files |= _digest_shards(planned, report, directory)
    run = record_run(
        planned,
        report,
        identity=identity,
        resumed=resumed,
        attempts=attempts,
        damaged=damaged,
        byte_source=byte_source,
    )
    if planned.survey:
        made = report_of(planned, report, recipe_of(planned), kind="merge", record=run)
        files |= write_report(made, directory, form.reports)
    manifest = _manifest(planned, report, dict(sorted(files.items())), run)
    write_manifest(manifest, directory / form.manifest)
    return manifest


def recipe_of(planned: MergePlan) -> Recipe:
    """Return the recipe that a plan was made from."""
    methods = {name: each.parameters for name, each in discover_methods().items()}
    return parse_recipe(planned.recipe, origin="recipe", methods=methods)


def _check_copy(path: Path, expected: FileDigest) -> None:
    try:
        found = digest_file(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be read again: {error.strerror}") from error
    if found != expected:
        raise OutputError(
            f"{path}: was changed while the merge ran: its SHA-256 was {expected.digest}, is "
            f"{found.digest}; continue with --resume, which copies it again"
        )


def _digest_shards(planned: MergePlan, report: RunReport, directory: Path) -> dict[str, FileDigest]:
    """Put the digests of shards together from those of their leaves.

    Nothing is read but tensors that were made in parts, whose leaves are not the whole tensor's.
    """
    digests = {}
    for index, shard in enumerate(planned.layout.shards):
        leaves = (
            report.results[task].leaves
            if planned.tasks[task].region is None
            else _leaves_in_file(planned.tasks[task], directory / shard.name)
            for task in shard.tasks
        )
        digest = tree_digest(render_header(planned, index), leaves)
        digests[shard.name] = FileDigest(shard.nbytes, digest, tree=True)
    return digests


def _leaves_in_file(task: TensorTask, path: Path) -> bytes:
    """Return the digests of the leaves of a whole tensor, read from its file."""
    numel = prod(task.output_shape)
    itemsize = task.dtype.itemsize
    leaves = []
    with path.open("rb") as stream:
        stream.seek(task.offset)
        for begin in range(0, numel, LEAF_ELEMENTS):
            leaf = stream.read(min(LEAF_ELEMENTS, numel - begin) * itemsize)
            leaves.append(leaf_digests(memoryview(leaf), LEAF_ELEMENTS * itemsize))
    return b"".join(leaves)


def _manifest(
    planned: MergePlan, report: RunReport, files: dict[str, FileDigest], run: RunRecord
) -> Manifest:
    return Manifest(
        version=MANIFEST_VERSION,
        method=planned.method,
        semantics=planned.semantics,
        recipe=planned.document,
        recipe_digest=digest_recipe(planned.document),
        inputs=tuple(replace(file, path=Path(file.origin)) for file in planned.files),
        files=files,
        dropped=planned.dropped,
        copied_from_base=planned.copied_from_base,
        tensors=_tensor_records(planned, report),
        run=run,
        notes=(*planned.notes, *(Note("changed", text) for text in changed_keys(planned))),
        revisions={model.label: model.hub for model in planned.models if model.hub is not None},
        left_behind=planned.left_behind,
        metadata_left_out=planned.metadata_left_out,
        differences=planned.differences,
    )


def record_run(
    planned: MergePlan,
    report: RunReport,
    *,
    identity: str,
    resumed: bool,
    attempts: Sequence[Attempt],
    damaged: int,
    byte_source: ByteSourceKind,
) -> RunRecord:
    """Return what a run took, as the manifest has it; see :func:`write_companions`."""
    resources = planned.resources
    return RunRecord(
        versions=collect_versions(torch_version()),
        device="cpu" if planned.device is None else ",".join(planned.device.names),
        device_choice="" if planned.choice is None else str(planned.choice),
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
        projected_device_memory=0 if planned.device is None else planned.device.peak,
        measured_device_memory=report.device_peak_memory,
        resumed=resumed,
        damaged=damaged,
        kernels="compiled" if kernels_serve(planned) else "plain",
        byte_source=byte_source.value,
        identity=identity,
        parts=_part_records(attempts),
    )


def _part_records(attempts: Sequence[Attempt]) -> tuple[PartRecord, ...]:
    tries = Counter(attempt.part for attempt in attempts)
    return tuple(
        PartRecord(
            part=attempt.part,
            parts=attempt.parts,
            host=attempt.host,
            attempts=tries[attempt.part],
            seconds=done.seconds,
            bytes_by_stage={"read": done.read, "write": done.written},
            measured_memory=done.measured_memory,
            memory_budget=done.memory_budget,
            workers=done.workers,
            device=done.device,
            damaged=done.damaged,
        )
        for attempt in attempts
        if (done := attempt.done) is not None
    )


def _tensor_records(planned: MergePlan, report: RunReport) -> dict[str, TensorRecord]:
    records = {}
    for index, task in enumerate(planned.tasks):
        if not task.leads:
            continue
        result = report.results[index]
        records[task.name] = TensorRecord(
            action=task.action.value,
            dtype=task.dtype.value,
            numel=task.numel,
            density=tuple(count / max(task.numel, 1) for count in result.kept),
            # JSON has no infinity.
            thresholds=tuple(None if top == float("inf") else top for top in result.thresholds),
            numbers=tuple(each if math.isfinite(each) else None for each in result.numbers),
            not_finite=result.not_finite,
        )
    return dict(sorted(records.items()))
