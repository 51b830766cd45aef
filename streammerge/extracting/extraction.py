"""One call: two models in, an adapter out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from streammerge.adapters.combining.writing import write_adapter
from streammerge.checkpoint.bytesource import ByteSourceKind, choose_byte_source
from streammerge.checkpoint.inputs import parse_path
from streammerge.checkpoint.manifest import Manifest, digest_recipe
from streammerge.checkpoint.outputform import form_of
from streammerge.checkpoint.permitting import check_place
from streammerge.dtypes import DTYPES_BY_TORCH_NAME, DType
from streammerge.engine.accelerator.opening import AUTO, choose_devices, find_candidate
from streammerge.engine.memory import resident_memory
from streammerge.engine.progress import OnProgress, ProgressEvent
from streammerge.errors import RecipeError
from streammerge.extracting.planning import Wishes, plan_extraction
from streammerge.extracting.plans import ExtractionPlan
from streammerge.lazily import torch_version
from streammerge.limits import allow_open_files, naming_limits
from streammerge.machine import choose_device_budget, count_cores, describe_machine
from streammerge.plan.choice import DeviceChoice
from streammerge.plan.planning import Machine
from streammerge.storage.urls import refuse_store
from streammerge.version import VERSION

_OTHER_BITS = (
    "factors have other last bits there, and an estimate decides no bit; name the device to have it"
)
"""Why an extraction is the CPU's unless a device is named."""
_FACTOR_DTYPES = (DType.F32, DType.F16, DType.BF16)


@naming_limits()
def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int,
    modules: tuple[str, ...] = (),
    dtype: str = "float32",
    exact: bool = False,
    memory: int | str | None = None,
    workers: int | None = None,
    device: str = "auto",
    device_memory: int | str | None = None,
    download: bool = False,
    overwrite: bool = False,
    on_plan: Callable[[ExtractionPlan], None] = lambda _: None,
    on_progress: OnProgress = lambda _: None,
) -> Manifest:
    """Write a LoRA of the difference between two models to the directory ``out``.

    Matrices of linear layers become factors; of them the best there are of this rank if ``exact``, else
    nearly so, by random projection with a fixed seed. Embeddings, norms and heads that differ are saved
    whole. The manifest has the share of each matrix's norm that is missing, and what is left out.

    Args:
        base: The model that the other one was tuned from.
        tuned: The tuned model.
        out: The directory to make.
        rank: Of every matrix, or its smaller side if that is less.
        modules: Globs on names; only matrices that one fits are factored. Empty for all.
        dtype: What factors are stored in: ``float32``, ``float16`` or ``bfloat16``.
        exact: Whether all singular values of every matrix are found.
        memory: Most private memory, in bytes or as ``"2GiB"``; None takes a quarter of what is
            available.
        workers: Most threads; None for one per core, or three per accelerator.
        device: Where large matrices are decomposed: ``"cpu"``, ``"cuda:0"``, several as
            ``"cuda:0,cuda:1"``, or ``"auto"``, which is the CPU.
        device_memory: Most memory of each accelerator; None takes what is needed and free.
        download: Whether models named as on the hub are fetched.
        overwrite: Whether an earlier result in ``out`` may be replaced.
        on_plan: Told what is going to be done, once the models are compared.
        on_progress: Told how far it is: the activity ``compare``, then ``extract``.

    Raises:
        StreamMergeError: One of the errors that :mod:`streammerge.errors` lists; ``out`` is then as it
            was before.
    """
    place = parse_path(out, "out")
    if form_of(place).file is not None:
        raise RecipeError(
            f"{place}: is one file, and a PEFT adapter is a directory with adapter_config.json; name a "
            "directory as the output"
        )
    refuse_store(place, "an adapter is extracted to")
    if rank < 1:
        raise RecipeError(f"--rank: expected a whole number of at least 1, got {rank}")
    # Before the models are read, which may take long; and once more before anything is written.
    choose_device_budget(choose_devices(device), device_memory)
    models = parse_path(base, "base"), parse_path(tuned, "tuned")
    check_place(place, models, overwrite=overwrite)
    began = time.perf_counter()

    def compared(done: int, everything: int) -> None:
        seconds = time.perf_counter() - began
        on_progress(ProgressEvent.at("compare", done, everything, seconds))

    plan = plan_extraction(
        *models,
        Wishes(rank, modules, _parse_dtype(dtype), exact),
        machine=_describe(memory, workers, device, device_memory),
        download=download,
        on_compared=compared,
    )
    candidate = find_candidate() if device == AUTO else None
    if candidate is not None:
        plan = replace(plan, choice=DeviceChoice(candidate, taken=False, reason=_OTHER_BITS))
    on_plan(plan)
    return _run(plan, place, overwrite=overwrite, on_progress=on_progress)


def _describe(
    memory: int | str | None, workers: int | None, device: str, device_memory: int | str | None
) -> Machine:
    """Return what the extraction may use."""
    names = choose_devices(device)
    machine = describe_machine(
        memory=memory,
        workers=workers,
        devices=names,
        device_budget=choose_device_budget(names, device_memory),
    )
    # A decomposition holds no lock of the interpreter: on the CPU every core has one.
    return machine if names or workers else replace(machine, workers=count_cores())


def _parse_dtype(name: str) -> DType:
    dtype = DTYPES_BY_TORCH_NAME.get(name)
    if dtype not in _FACTOR_DTYPES:
        known = " or ".join(each.torch_name for each in _FACTOR_DTYPES)
        raise RecipeError(f"--dtype: expected {known}, got {name}")
    return dtype


def _run(plan: ExtractionPlan, out: Path, *, overwrite: bool, on_progress: OnProgress) -> Manifest:
    from streammerge.extracting.running import ExtractionJob  # noqa: PLC0415 - loads torch

    tasks = [task.pair for task in plan.factors]
    everything = sum(pair.base.nbytes + pair.tuned.nbytes for pair in tasks) + sum(
        task.entry.nbytes for task in plan.copies
    )
    written = sum(tensor.nbytes for tensor in plan.outputs)
    allow_open_files(len(plan.files) + 1)
    identity = {
        "recipe": digest_recipe(plan.recipe),
        "inputs": {
            file.origin: f"{file.nbytes} bytes of {file.mtime_ns} ns, header {file.header_digest}"
            for file in plan.files
        },
        "versions": {"streammerge": VERSION, "torch": torch_version()},
    }
    return write_adapter(
        ExtractionJob(plan),
        out,
        identity=identity,
        overwrite=overwrite,
        resume=False,
        opener=choose_byte_source(ByteSourceKind.PREAD),
        measure_memory=resident_memory,
        on_bytes=lambda done, seconds: on_progress(
            ProgressEvent.at("extract", done, everything + written, seconds)
        ),
    )
