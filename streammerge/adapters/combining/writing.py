"""Runs whatever makes an adapter: inputs opened and checked, ``OUT.partial`` filled and renamed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import safetensors

from streammerge.adapters.combining.plans import OutputTensor
from streammerge.adapters.files.config import CONFIG_NAME
from streammerge.checkpoint.bytesource import ByteSource, OpenByteSource, check_unchanged
from streammerge.checkpoint.digests import FileDigest, digest_file
from streammerge.checkpoint.manifest import (
    Manifest,
    RunRecord,
    collect_versions,
    digest_identity,
    write_manifest,
)
from streammerge.checkpoint.outputdir import OutputDirectory
from streammerge.checkpoint.outputfile import OutputFile, write_durably
from streammerge.checkpoint.outputform import OutputForm, form_of
from streammerge.checkpoint.types import ShardFile
from streammerge.errors import OutputError
from streammerge.lazily import torch_version
from streammerge.units import MIB

_NBYTES_BESIDE = 4 * MIB
"""Free disk asked for beside the tensors: configuration, recipe, card and manifest."""
OnBytes = Callable[[int, float], None]
"""Told the bytes read and written so far, and the seconds since the work began."""


class Meter:
    """Counts bytes and watches the clock and the memory while the work goes on."""

    def __init__(self, measure_memory: Callable[[], int], on_bytes: OnBytes) -> None:
        """Start the clock."""
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

    def record(
        self, *, workers: int, projected: int, budget: int, identity: str, byte_source: str
    ) -> RunRecord:
        """Return what the run took.

        Args:
            workers: Threads that computed.
            projected: Memory that the plan stated, in bytes.
            budget: Memory that the user allowed, in bytes.
            identity: Digest of what decided every byte.
            byte_source: How inputs were read.
        """
        return RunRecord(
            versions=collect_versions(torch_version()),
            device="cpu",
            seconds=round(self.seconds, 3),
            seconds_by_stage={},
            bytes_by_stage={"read": self.read, "write": self.written},
            threads={"readers": 0, "workers": workers, "writers": 0},
            projected_memory=projected,
            measured_memory=self.peak,
            memory_budget=budget,
            resumed=False,
            byte_source=byte_source,
            identity=identity,
        )


class AdapterJob(Protocol):
    """What makes an adapter."""

    @property
    def inputs(self) -> Sequence[Path]:
        """What the output must not be, nor lie in."""

    @property
    def files(self) -> Sequence[ShardFile]:
        """The input files, as they were when their headers were read."""

    @property
    def file_name(self) -> str:
        """The output's one file with tensors."""

    @property
    def header(self) -> bytes:
        """Its bytes before the first tensor."""

    @property
    def outputs(self) -> Sequence[OutputTensor]:
        """Its tensors."""

    def check(self, sources: Sequence[ByteSource]) -> None:
        """Raise if the inputs' values forbid the work."""

    def execute(
        self, sources: Sequence[ByteSource], output: OutputFile, on_task: Callable[[int, int], None]
    ) -> None:
        """Write every tensor; tell the bytes that each task has read and written."""

    def texts(self, form: OutputForm) -> Mapping[str, bytes]:
        """Return what lies beside the tensors, by name."""

    def manifest(
        self, meter: Meter, files: dict[str, FileDigest], identity: str, byte_source: str
    ) -> Manifest:
        """Return the record of the work."""


def write_adapter(
    job: AdapterJob,
    out: Path,
    *,
    identity: Mapping[str, Any],
    overwrite: bool,
    resume: bool,
    opener: OpenByteSource,
    measure_memory: Callable[[], int],
    on_bytes: OnBytes,
) -> Manifest:
    """Write an adapter to ``out``, which exists when this returns and not before.

    Args:
        job: What makes it.
        out: The directory to make; the one file, if it is called ``.safetensors``.
        identity: What decides every byte of the result, as JSON.
        overwrite: Whether an earlier result in ``out`` may be replaced.
        resume: Whether the command was told to continue; there is never anything to go on from,
            because nothing of an interrupted run is kept, so it starts anew.
        opener: Opens an input file.
        measure_memory: Returns the process's resident memory, in bytes.
        on_bytes: Told how far the work is, after every task.

    Returns:
        What is also written to ``out/streammerge_manifest.json``.
    """
    form = form_of(out)
    nbytes = len(job.header) + sum(tensor.nbytes for tensor in job.outputs)
    directory = OutputDirectory(
        out,
        inputs=job.inputs,
        nbytes=nbytes,
        nbytes_beside=_NBYTES_BESIDE,
        names=(job.file_name, CONFIG_NAME, form.recipe, form.card or form.recipe, form.manifest),
        identity=identity,
        overwrite=overwrite,
        resume=resume,
    )
    with ExitStack() as stack:
        sources = [stack.enter_context(opener(file.path)) for file in job.files]
        check_unchanged(job.files, sources)
        job.check(sources)
        partial = stack.enter_context(directory).partial
        meter = Meter(measure_memory, on_bytes)
        path = partial / job.file_name
        _write_tensors(job, sources, OutputFile(path, nbytes, resumed=directory.continues), meter)
        check_unchanged(job.files, sources)
        _check_file(job, path)
        form = form_of(directory.out)
        texts = job.texts(form)
        for name, content in texts.items():
            write_durably(partial / name, [content])
        files = {name: digest_file(partial / name) for name in sorted([job.file_name, *texts])}
        kind = sources[0].kind.value
        manifest = job.manifest(meter, files, digest_identity(identity), kind)
        write_manifest(manifest, partial / form.manifest)
        directory.publish()
    return manifest


def _write_tensors(
    job: AdapterJob, sources: Sequence[ByteSource], output: OutputFile, meter: Meter
) -> None:
    done = False
    try:
        output.write_at(0, memoryview(job.header))
        job.execute(sources, output, meter.count)
        done = True
    finally:
        if not done:
            output.abandon()
    output.close()


def _check_file(job: AdapterJob, path: Path) -> None:
    """Open the file with the safetensors library and compare it with the plan."""
    planned = {tensor.name: (tensor.shape, tensor.dtype.value) for tensor in job.outputs}
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
