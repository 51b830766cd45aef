"""Runs a planned extraction: matrices side by side, each from both models to its place in the file.

Memory: what :mod:`streammerge.extracting.benches` says of a matrix, for each thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from streammerge.adapters.combining.config import render_config
from streammerge.adapters.combining.plans import OutputTensor
from streammerge.adapters.combining.writing import Meter
from streammerge.adapters.files.config import CONFIG_NAME
from streammerge.checkpoint.bytesource import ByteSource
from streammerge.checkpoint.digests import FileDigest
from streammerge.checkpoint.manifest import (
    MANIFEST_VERSION,
    Manifest,
    TensorRecord,
    digest_recipe,
)
from streammerge.checkpoint.modelcard import render_model_card
from streammerge.checkpoint.outputfile import OutputFile
from streammerge.checkpoint.outputform import OutputForm
from streammerge.checkpoint.types import Note, ShardFile
from streammerge.extracting.benches import FactorBench, open_bench
from streammerge.extracting.plans import CopyTask, ExtractionPlan, FactorTask
from streammerge.extracting.reading import STEP, read_values
from streammerge.storage.urls import spelled
from streammerge.version import VERSION


@dataclass(slots=True)
class ExtractionJob:
    """See :class:`streammerge.adapters.combining.writing.AdapterJob`."""

    plan: ExtractionPlan
    """What :func:`~streammerge.extracting.planning.plan_extraction` returned."""
    errors: dict[str, float] = field(default_factory=dict)
    """``|D - B A| / |D|`` of every matrix that is done, by its name."""
    device_peak: int = 0
    """Most memory that was had of any one accelerator, in bytes."""

    @property
    def inputs(self) -> Sequence[Path]:
        """Both models, and their files."""
        return [self.plan.base, self.plan.tuned, *(file.path for file in self.plan.files)]

    @property
    def files(self) -> Sequence[ShardFile]:
        """Their files."""
        return self.plan.files

    @property
    def file_name(self) -> str:
        """The output's one file with tensors."""
        return "adapter_model.safetensors"

    @property
    def header(self) -> bytes:
        """Its bytes before the first tensor."""
        return self.plan.header

    @property
    def outputs(self) -> Sequence[OutputTensor]:
        """Its tensors."""
        return self.plan.outputs

    def check(self, sources: Sequence[ByteSource]) -> None:
        """Return: whatever their values are, they are looked at as they are read."""

    def execute(
        self, sources: Sequence[ByteSource], output: OutputFile, on_task: Callable[[int, int], None]
    ) -> None:
        """Write every tensor.

        Raises:
            NonFiniteError: A difference, or a factor in its type, is not finite.
            DeviceLostError: A device has failed.
            MemoryBudgetError: A device's memory has run out twice.
        """
        for copied in self.plan.copies:
            on_task(_copy(sources, output, copied), copied.output.nbytes)
        names = () if self.plan.device is None else self.plan.device.names
        with open_bench(names) as bench:
            self._factor_on(bench, sources, output, on_task)
        self.device_peak = bench.device_peak

    def _factor_on(
        self,
        bench: FactorBench,
        sources: Sequence[ByteSource],
        output: OutputFile,
        on_task: Callable[[int, int], None],
    ) -> None:
        before = torch.get_num_threads()
        # One for each matrix: more would add in another order. Threads that are new ask once more.
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(
                self.plan.workers, initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                self._factor_all(pool, partial(bench.factor, sources, output), on_task)
        finally:
            torch.set_num_threads(before)

    def _factor_all(
        self,
        pool: ThreadPoolExecutor,
        factor: Callable[[FactorTask], float],
        on_task: Callable[[int, int], None],
    ) -> None:
        """Keep as many matrices under way as there are threads; the first error ends it."""
        left = list(reversed(self.plan.factors))
        running: dict[Future[float], FactorTask] = {}
        while left or running:
            while left and len(running) < self.plan.workers:
                task = left.pop()
                running[pool.submit(factor, task)] = task
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                task = running.pop(future)
                self.errors[task.pair.name] = future.result()
                read = task.pair.base.nbytes + task.pair.tuned.nbytes
                on_task(read, task.down.nbytes + task.up.nbytes)

    def texts(self, form: OutputForm) -> Mapping[str, bytes]:
        """Return what was asked for, the configuration and a card."""
        plan = self.plan
        texts = {form.recipe: plan.recipe.encode(), CONFIG_NAME: render_config(plan.config)}
        if form.card is not None:
            worst = max(self.errors.values())
            texts[form.card] = render_model_card(
                title=form.out.name,
                method="extract",
                summary=(
                    "A LoRA of the difference between two models; of the difference of each matrix, at most "
                    f"{worst:.3g} of the norm is missing."
                ),
                reference="Halko, Martinsson and Tropp 2011, arXiv:0909.4061",
                recipe_yaml=plan.recipe,
                models=[("base", spelled(plan.base)), ("tuned", spelled(plan.tuned))],
                library_name="peft",
                version=VERSION,
            ).encode()
        return texts

    def manifest(
        self, meter: Meter, files: dict[str, FileDigest], identity: str, byte_source: str
    ) -> Manifest:
        """Return the record, with the error of every matrix as a number of its ``B``."""
        plan = self.plan
        notes = [Note("left out", f"{name} differs and is not extracted") for name in plan.left_out]
        return Manifest(
            version=MANIFEST_VERSION,
            method="extract",
            semantics="",
            recipe=plan.recipe,
            recipe_digest=digest_recipe(plan.recipe),
            inputs=plan.files,
            files=files,
            dropped=(),
            copied_from_base=(),
            tensors=dict(sorted(self._records().items())),
            notes=tuple(notes),
            run=replace(
                meter.record(
                    workers=plan.workers,
                    projected=plan.peak_memory,
                    budget=plan.budget,
                    identity=identity,
                    byte_source=byte_source,
                ),
                device=plan.device_name,
                device_choice="" if plan.choice is None else str(plan.choice),
                projected_device_memory=0 if plan.device is None else plan.device.peak,
                measured_device_memory=self.device_peak,
            ),
            revisions={},
        )

    def _records(self) -> dict[str, TensorRecord]:
        numbers = {task.up.name: (self.errors[task.pair.name],) for task in self.plan.factors}
        copied = {task.output.name for task in self.plan.copies}
        return {
            tensor.name: TensorRecord(
                action="copy" if tensor.name in copied else "factor",
                dtype=tensor.dtype.value,
                numel=tensor.numel,
                density=(),
                thresholds=(),
                numbers=numbers.get(tensor.name, ()),
                not_finite=0,
            )
            for tensor in self.plan.outputs
        }


def _copy(sources: Sequence[ByteSource], output: OutputFile, task: CopyTask) -> int:
    """Write a tensor as it is stored; return the bytes read."""
    itemsize = task.entry.dtype.itemsize
    for begin in range(0, task.entry.numel, STEP):
        values = read_values(sources, task.entry, begin, min(begin + STEP, task.entry.numel))
        raw = values.view(torch.uint8).numpy()
        output.write_at(task.output.offset + begin * itemsize, raw.data)
    return task.entry.nbytes
