"""Runs the plan of a combination: inputs opened and checked, ``OUT.partial`` filled and renamed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors

from streammerge.adapters.combining.combinations import COMBINATIONS
from streammerge.adapters.combining.config import render_config
from streammerge.adapters.combining.executing import check_equal_copies, execute
from streammerge.adapters.combining.plans import CombinationPlan, CopyTask, ModuleTask
from streammerge.adapters.files.config import CONFIG_NAME
from streammerge.adapters.files.types import Naming
from streammerge.checkpoint.bytesource import (
    ByteSource,
    ByteSourceKind,
    OpenByteSource,
    check_unchanged,
)
from streammerge.checkpoint.digests import FileDigest, digest_file
from streammerge.checkpoint.hub import hub_revision
from streammerge.checkpoint.manifest import (
    MANIFEST_VERSION,
    Manifest,
    RunRecord,
    TensorRecord,
    collect_versions,
    digest_identity,
    digest_recipe,
    write_manifest,
)
from streammerge.checkpoint.modelcard import render_model_card
from streammerge.checkpoint.outputdir import OutputDirectory
from streammerge.checkpoint.outputfile import OutputFile, write_durably
from streammerge.checkpoint.outputform import OutputForm, form_of
from streammerge.errors import OutputError
from streammerge.lazily import torch_version
from streammerge.units import MIB
from streammerge.version import VERSION

_NBYTES_BESIDE = 4 * MIB
"""Free disk asked for beside the tensors: configuration, recipe, card and manifest."""
OnBytes = Callable[[int, float], None]
"""Told the bytes read and written so far, and the seconds since the work began."""


def run_combination(
    plan: CombinationPlan,
    out: Path,
    *,
    identity: Mapping[str, Any],
    overwrite: bool,
    resume: bool,
    opener: OpenByteSource,
    measure_memory: Callable[[], int],
    on_bytes: OnBytes,
) -> Manifest:
    """Write the combined adapter to ``out``, which exists when this returns and not before.

    Args:
        plan: What :func:`~streammerge.adapters.combining.planning.plan_combination` returned.
        out: The directory to make; the one file, if it is called ``.safetensors``.
        identity: What decides every byte of the result, as JSON.
        overwrite: Whether an earlier merge in ``out`` may be replaced.
        resume: Whether the command was told to continue; there is never anything to go on from,
            because nothing of an interrupted combination is kept, so it starts anew.
        opener: Opens an input file.
        measure_memory: Returns the process's resident memory, in bytes.
        on_bytes: Told how far the work is, after every module.

    Returns:
        What is also written to ``out/streammerge_manifest.json``.
    """
    form = form_of(out)
    directory = OutputDirectory(
        out,
        inputs=[adapter.path for adapter in plan.adapters],
        nbytes=plan.bytes_to_write,
        nbytes_beside=_NBYTES_BESIDE,
        names=(plan.file_name, CONFIG_NAME, form.recipe, form.card or form.recipe, form.manifest),
        identity=identity,
        overwrite=overwrite,
        resume=resume,
    )
    with ExitStack() as stack:
        sources = [stack.enter_context(opener(file.path)) for file in plan.files]
        check_unchanged(plan.files, sources)
        check_equal_copies(plan, sources)
        partial = stack.enter_context(directory).partial
        meter = _Meter(measure_memory, on_bytes)
        _write_tensors(plan, sources, partial / plan.file_name, meter, resumed=directory.continues)
        check_unchanged(plan.files, sources)
        _check_file(plan, partial / plan.file_name)
        manifest = _write_companions(
            plan,
            partial,
            meter,
            digest_identity(identity),
            form=form_of(directory.out),
            byte_source=sources[0].kind,
        )
        directory.publish()
    return manifest


class _Meter:
    """Counts bytes and watches the clock and the memory while the work goes on."""

    def __init__(self, measure_memory: Callable[[], int], on_bytes: OnBytes) -> None:
        self._measure = measure_memory
        self._on_bytes = on_bytes
        self._began = time.perf_counter()
        self.read = 0
        self.written = 0
        self.peak = measure_memory()

    def count(self, read: int, written: int) -> None:
        """Count what a task has read and written."""
        self.read += read
        self.written += written
        self.peak = max(self.peak, self._measure())
        self._on_bytes(self.read + self.written, self.seconds)

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return time.perf_counter() - self._began


def _write_tensors(
    plan: CombinationPlan,
    sources: Sequence[ByteSource],
    path: Path,
    meter: _Meter,
    *,
    resumed: bool,
) -> None:
    output = OutputFile(path, plan.bytes_to_write, resumed=resumed)
    done = False
    try:
        output.write_at(0, memoryview(plan.header))
        execute(plan, sources, output, meter.count)
        done = True
    finally:
        if not done:
            output.abandon()
    output.close()


def _check_file(plan: CombinationPlan, path: Path) -> None:
    """Open the file with the safetensors library and compare it with the plan."""
    planned = {tensor.name: (tensor.shape, tensor.dtype.value) for tensor in plan.outputs}
    try:
        with safetensors.safe_open(path, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            found = {
                name: (tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()
            }
    except (safetensors.SafetensorError, OSError) as error:
        raise OutputError(f"{path}: does not open: {error}") from error
    if found != planned:
        raise OutputError(
            f"{path}: holds {len(found)} tensors, other than the {len(planned)} planned"
        )


def _write_companions(
    plan: CombinationPlan,
    directory: Path,
    meter: _Meter,
    identity: str,
    *,
    form: OutputForm,
    byte_source: ByteSourceKind,
) -> Manifest:
    """Write everything beside the tensors; the manifest last."""
    combination = COMBINATIONS[plan.method]
    texts = {form.recipe: plan.recipe.encode()}
    if plan.config is not None:
        texts[CONFIG_NAME] = render_config(plan.config)
    is_peft = plan.adapters[0].naming is Naming.PEFT
    if form.card is not None:
        texts[form.card] = render_model_card(
            title=form.out.name,
            method=combination.name,
            summary=combination.summary,
            reference=combination.reference,
            recipe_yaml=plan.recipe,
            models=[
                *[(f"sources[{i}]", str(each.path)) for i, each in enumerate(plan.adapters)],
                *_base_rows(plan),
            ],
            library_name="peft" if is_peft else None,
            version=VERSION,
        ).encode()
    for name, content in texts.items():
        write_durably(directory / name, [content])
    files = {name: digest_file(directory / name) for name in sorted([plan.file_name, *texts])}
    manifest = _manifest(plan, meter, files, identity, byte_source=byte_source)
    write_manifest(manifest, directory / form.manifest)
    return manifest


def _base_rows(plan: CombinationPlan) -> list[tuple[str, str]]:
    base = None if plan.config is None else plan.config["base_model_name_or_path"]
    return [("base", base)] if isinstance(base, str) else []


def _manifest(
    plan: CombinationPlan,
    meter: _Meter,
    files: dict[str, FileDigest],
    identity: str,
    *,
    byte_source: ByteSourceKind,
) -> Manifest:
    return Manifest(
        version=MANIFEST_VERSION,
        method=plan.method,
        semantics=plan.semantics,
        recipe=plan.recipe,
        recipe_digest=digest_recipe(plan.recipe),
        inputs=plan.files,
        files=files,
        dropped=plan.dropped,
        copied_from_base=(),
        tensors=_tensor_records(plan),
        run=RunRecord(
            versions=collect_versions(torch_version()),
            device="cpu",
            seconds=round(meter.seconds, 3),
            seconds_by_stage={},
            bytes_by_stage={"read": meter.read, "write": meter.written},
            threads={"readers": 0, "workers": 1, "writers": 0},
            projected_memory=plan.peak_memory,
            measured_memory=meter.peak,
            memory_budget=plan.budget,
            resumed=False,
            byte_source=byte_source.value,
            identity=identity,
        ),
        revisions={
            f"sources[{index}]": revision
            for index, adapter in enumerate(plan.adapters)
            if (revision := hub_revision(adapter.path)) is not None
        },
    )


def _tensor_records(plan: CombinationPlan) -> dict[str, TensorRecord]:
    records = {}
    for task in plan.tasks:
        action = "merge"
        if isinstance(task, CopyTask):
            action = "copy" if len(task.inputs) == 1 else "copy if equal"
        elif isinstance(task, ModuleTask) and task.copies is not None:
            action = "copy"
        for tensor in task.outputs:
            records[tensor.name] = TensorRecord(
                action=action,
                dtype=tensor.dtype.value,
                numel=tensor.numel,
                density=(),
                thresholds=(),
                numbers=(),
                not_finite=0,
            )
    return dict(sorted(records.items()))
