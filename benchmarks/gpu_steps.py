"""What is measured on a machine with an accelerator: the steps, in the order of what they tell.

Every merge is measured with its inputs in memory and its output in memory, if there is room: what is
left is the bus and what computes. Seconds are those of whole programs, from start to end; the step
``start`` merges a model of 10M parameters, which is hardly more than the start of each program.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import baking
from benchmarks.bus import measure_bus
from benchmarks.compare import run_once, stages_of
from benchmarks.contenders import (
    MERGEKIT,
    Contender,
    mergekit_contender,
    streammerge_contender,
)
from benchmarks.environment import hide_paths
from benchmarks.gpu import with_options
from benchmarks.gpu_setup import Place, room_at
from benchmarks.jobs import DECOMPOSING, METHODS, AnyJob, Job
from benchmarks.measuring import Run, measure
from benchmarks.models import ROOT, SIZES, Models, prepare_models
from benchmarks.reporting import summarize
from benchmarks.steps import Limit, Outcome, Step

DEVICE = "device"
CPU = "cpu"
FIRST = ("ties", "linear", "task_arithmetic", "dare_ties", "slerp")
"""Measured first, twice, and then with mergekit."""
SCALED = ("ties", "linear")
MATRICES = ("tsv_m", "iso_c")
MATRICES_SIZE = "0.15B"
WORKERS = (1, 2, 4, 8, 16)
_DORA = "DoRA"
"""What is baked, of an adapter with magnitudes."""
ADAPTERS = (1, 4)
FORESEEN = "foreseen"
FORESEEN_METHODS = (*FIRST, "della")
"""What is estimated beside adapters."""
EXTRACTED_RANK = 16
SOURCES = 2
START = "start"
START_SIZE = "0.01B"
LATER_SHARE = 0.3
"""Of all time, kept for what comes after the methods: it differs from them more than they do."""
_BUS_NBYTES = 3 * 2**30
_LEAST_SECONDS = 2.0
"""For one more run: what has less time left would only be killed."""
JobT = TypeVar("JobT", bound=AnyJob)


@dataclass(slots=True)
class Session:
    """What the steps share; each adds what later ones need."""

    place: Place
    """Where it runs, and on what."""
    size: str
    """Of the models that are merged, a key of ``SIZES``."""
    large: str | None
    """A larger size, for a few methods at the end; None for none."""
    memory: str
    """Budget of the host."""
    device_memory: str
    """Budget on the device."""
    cores: int
    """Cores that may be used."""
    seconds: float
    """That all of it may take."""
    models: dict[str, Models] = field(default_factory=dict)
    """Models by size, once they are made."""
    adapters: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    """Adapters onto the base of ``size``, by what is baked, once they are made."""
    seconds_per_byte: float | None = None
    """Of copying to the device while a third as much comes back."""


def plan_steps(session: Session) -> list[Step]:
    """Return all that is measured, the most telling first."""
    small = smaller_of(session.size, MATRICES_SIZE)
    # Those whose names are simple come first: others are variants of them.
    rest = [
        name
        for name in sorted(METHODS, key=lambda name: "-" in name)
        if name not in FIRST and name not in DECOMPOSING
    ]
    usual = partial(_method_step, session, size=session.size)
    return [
        Step("bus", partial(find_bus, session), 40),
        *(_models_step(session, size) for size in dict.fromkeys((START_SIZE, session.size, small))),
        _method_step(session, "ties", START_SIZE, name=START, limit=60, rounds=2),
        *(usual(name, limit=60, rounds=2) for name in FIRST),
        _mergekit_step(session, "ties", START_SIZE, name=START),
        *(_mergekit_step(session, name, session.size, name=name) for name in FIRST),
        *(usual(name, limit=25, keep=LATER_SHARE * session.seconds) for name in rest),
        *(_scaling_step(session, name) for name in SCALED),
        *_baking_steps(session),
        _foreseen_step(session),
        *(
            _method_step(session, name, small, limit=60, name=f"{name}, {small}")
            for name in MATRICES
        ),
        _extract_step(session),
        *_large_steps(session),
    ]


def smaller_of(*sizes: str) -> str:
    """Return the size with the fewest bytes."""
    return min(sizes, key=lambda size: SIZES[size].nbytes)


def _models_step(session: Session, size: str, **more: Any) -> Step:
    return Step(f"models of {size}", partial(make_models, session, size), 60, **more)


def _method_step(
    session: Session,
    method: str,
    size: str,
    *,
    limit: float,
    name: str | None = None,
    rounds: int = 1,
    keep: float = 0.0,
) -> Step:
    def run(given: Limit) -> Outcome:
        job = Job(METHODS[method], session.models[size])
        both = on_both(session, streammerge_contender(session.memory))
        return measure_job(session, job, both * rounds, given)

    needs = (f"models of {size}",)
    return Step(name or method, run, limit, keep_seconds=keep, needs=needs)


def _mergekit_step(session: Session, method: str, size: str, *, name: str) -> Step:
    def run(given: Limit) -> Outcome:
        job = Job(METHODS[method], session.models[size])
        return measure_job(session, job, [on_mergekit(session)], given)

    return Step(
        f"{MERGEKIT}, {name}",
        run,
        45,
        least_seconds=15,
        keep_seconds=LATER_SHARE * session.seconds,
        needs=(f"models of {size}",),
    )


def _scaling_step(session: Session, method: str) -> Step:
    def run(given: Limit) -> Outcome:
        job = Job(METHODS[method], session.models[session.size])
        plain = streammerge_contender(session.memory)
        contenders = [
            with_options(plain, str(count), ["--device", CPU, "--workers", str(count)])
            for count in WORKERS
            if count <= session.cores
        ]
        return measure_job(session, job, contenders, given)

    return Step(f"workers, {method}", run, 60, needs=(f"models of {session.size}",))


def _baking_steps(session: Session) -> list[Step]:
    def prepare(given: Limit) -> Outcome:
        base, most = session.models[session.size].base, max(ADAPTERS)
        made = baking.prepare_adapters(base, most, timeout_seconds=given.left())
        session.adapters = {f"adapters: {count}": made[:count] for count in ADAPTERS}
        dora = baking.prepare_adapters(base, 1, dora=True, timeout_seconds=given.left())
        session.adapters[_DORA] = dora
        return Outcome({"rank": baking.RANK, "count": most})

    def bake(what: str, given: Limit) -> Outcome:
        models = session.models[session.size]
        job = baking.Baking(models.base, session.adapters[what], models.max_shard_nbytes)
        plain = baking.choose_contenders(session.memory)[0]
        return measure_job(session, job, on_both(session, plain), given)

    return [
        Step("adapters", prepare, 60, needs=(f"models of {session.size}",)),
        *(
            Step(f"baking, {what}", partial(bake, what), 60, needs=("adapters",))
            for what in (*(f"adapters: {count}" for count in ADAPTERS), _DORA)
        ),
    ]


def _foreseen_step(session: Session) -> Step:
    needs = (f"models of {session.size}", "adapters")
    return Step(FORESEEN, partial(foresee_jobs, session), 60, least_seconds=15, needs=needs)


def _extract_step(session: Session) -> Step:
    return Step(
        f"extract, rank {EXTRACTED_RANK}",
        partial(measure_extract, session),
        60,
        needs=(f"models of {session.size}",),
    )


def _large_steps(session: Session) -> list[Step]:
    size = session.large
    if size is None:
        return []
    obstacle = partial(lack_of_room, session, size)
    return [
        _models_step(session, size, least_seconds=45, obstacle=obstacle),
        *(_method_step(session, name, size, limit=90, name=f"{name}, {size}") for name in SCALED),
    ]


def lack_of_room(session: Session, size: str) -> str | None:
    """Return why models of a size and an output do not fit; None if they do."""
    needed = (SOURCES + 2) * SIZES[size].nbytes
    # What was merged so far makes room first.
    freed = sum((1 + SOURCES) * SIZES[made].nbytes for made in session.models)
    free = room_at(session.place.work) + freed
    if free >= needed:
        return None
    return f"its files take {needed / 1e9:.0f} GB, there is room for {free / 1e9:.0f} GB"


def find_bus(session: Session, limit: Limit) -> Outcome:
    """Copy to the device and back, three bytes for one, as merges of two fine-tunes do."""
    found = measure_bus(
        session.place.device,
        in_nbytes=_BUS_NBYTES,
        out_nbytes=_BUS_NBYTES // 3,
        timeout_seconds=limit.left(),
    )
    session.seconds_per_byte = found["seconds"] / _BUS_NBYTES
    return Outcome(found | {"bytes_per_second": _BUS_NBYTES / found["seconds"]})


def make_models(session: Session, size: str, limit: Limit) -> Outcome:
    """Make a base and two fine-tunes; those of a larger size take the place of all others."""
    if size == session.large:
        for made in session.models.values():
            shutil.rmtree(made.base.parent)
        session.models.clear()
    models = prepare_models(session.place.work, size, SOURCES, timeout_seconds=limit.left())
    session.models[size] = models
    return Outcome({"size": size, "nbytes": models.nbytes, "sources": SOURCES})


def on_both(session: Session, plain: Contender[JobT]) -> list[Contender[JobT]]:
    """Return streammerge on the device and on the CPU; where that stands in, it is both."""
    more = ["--device", session.place.device]
    if session.place.device != CPU:
        more += ["--device-memory", session.device_memory]
    return [with_options(plain, DEVICE, more), with_options(plain, CPU, ["--device", CPU])]


def on_mergekit(session: Session) -> Contender[Job]:
    """Return mergekit on the device."""
    plain = mergekit_contender([sys.executable, "-m", "mergekit.scripts.run_yaml"])
    return with_options(plain, MERGEKIT, [] if session.place.device == CPU else ["--cuda"])


def measure_job(
    session: Session, job: JobT, turns: Sequence[Contender[JobT]], limit: Limit
) -> Outcome:
    """Let contenders do a job in turns, and return what it took each of them.

    Args:
        session: Where files go, and how fast the bus is.
        job: What is done.
        turns: Contenders in order; one that stands there twice runs twice.
        limit: Until when it has to be done; who does not get a turn has failed.
    """
    runs: dict[str, list[Run]] = {}
    manifests: dict[str, list[dict[str, Any] | None]] = {}
    for contender in turns:
        earlier = runs.setdefault(contender.name, [])
        if any(run.failure is not None for run in earlier):
            continue
        left = limit.left()
        if left < _LEAST_SECONDS:
            # A second run is welcome; without the first there is nothing to tell.
            if not earlier:
                earlier.append(_not_run("no time was left for it"))
                manifests[contender.name] = [None]
            continue
        run, manifest = run_once(job, contender, timeout_seconds=left, work=session.place.work)
        earlier.append(run)
        manifests.setdefault(contender.name, []).append(manifest)
    summaries = {name: _summarize(runs[name], manifests[name]) for name in runs}
    values = {
        "read_nbytes": job.nbytes_to_read,
        "written_nbytes": job.nbytes_to_write,
        "bus_seconds": _floor(session, job),
        "same_bytes": same_bytes([each[0] for each in manifests.values()]),
        "contenders": summaries,
    }
    return Outcome(values, _failure_of(summaries))


def _floor(session: Session, job: AnyJob) -> float | None:
    if session.seconds_per_byte is None:
        return None
    return session.seconds_per_byte * max(job.nbytes_to_read, job.nbytes_to_write)


def same_bytes(manifests: Sequence[dict[str, Any] | None]) -> bool | None:
    """Return whether merges of one job have equal digests of all shards; None if one has none."""
    digests = [
        {name: digest for name, digest in each["files"].items() if name.endswith(".safetensors")}
        for each in manifests
        if each is not None
    ]
    if len(digests) < max(2, len(manifests)):
        return None
    return all(each == digests[0] for each in digests)


def _summarize(runs: Sequence[Run], manifests: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    summary = summarize(runs, [stages_of(manifest) for manifest in manifests])
    told = [manifest["run"] for manifest in manifests if manifest is not None]
    if told:
        summary["merge_seconds_least"] = min(record["seconds"] for record in told)
        summary["peak_device_nbytes"] = max(record["measured_device_memory"] for record in told)
        summary["kernels"] = told[0]["kernels"]
    return summary


def _failure_of(summaries: dict[str, dict[str, Any]]) -> str | None:
    failed = [
        f"{name}: {summary['failure']}"
        for name, summary in summaries.items()
        if summary["failure"] is not None
    ]
    return "; ".join(failed) or None


def _not_run(why: str) -> Run:
    return Run(0.0, 0.0, 0.0, 0, 0, None, None, why)


def foresee_jobs(session: Session, limit: Limit) -> Outcome:
    """Tell what ``--device auto`` expects of jobs that are measured, by the names of their steps."""
    models = session.models[session.size]
    out = session.place.work / "out"
    folder = session.place.work / "foreseen"
    folder.mkdir(exist_ok=True)
    plain = streammerge_contender(session.memory)
    for name in FORESEEN_METHODS:
        plain.command(Job(METHODS[name], models), folder / f"{name}.json", out)
    baker = baking.choose_contenders(session.memory)[0]
    for what, adapters in session.adapters.items():
        job = baking.Baking(models.base, adapters, models.max_shard_nbytes)
        baker.command(job, folder / f"baking, {what}.json", out)
    command = [sys.executable, "-m", "benchmarks.foreseeing", *map(str, sorted(folder.iterdir()))]
    command += ["--device", session.place.device]
    command += ["--memory", session.memory, "--device-memory", session.device_memory]
    finished = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=limit.left()
    )
    shutil.rmtree(folder)
    return Outcome(json.loads(finished.stdout))


def measure_extract(session: Session, limit: Limit) -> Outcome:
    """Make an adapter of the difference between base and fine-tune, on what the command offers."""
    models = session.models[session.size]
    out = session.place.work / "extracted"
    command = [*(sys.executable, "-m", "streammerge", "extract")]
    offered = subprocess.run(
        [*command, "--help"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    takes_device = "--device" in offered.stdout
    ways: dict[str, list[str]] = {CPU: []}
    if takes_device:
        ways = {name: ["--device", on] for name, on in ((DEVICE, session.place.device), (CPU, CPU))}
    command += [str(models.base), str(models.tuned[0]), str(out), "--quiet"]
    command += ["--rank", str(EXTRACTED_RANK), "--memory", session.memory]
    summaries = {}
    for name, more in ways.items():
        run = _run_and_remove([*command, *more], out, limit)
        failure = run.failure and hide_paths(run.failure, session.place.work)
        summaries[name] = summarize([run], [None]) | {"failure": failure}
    values = {
        "takes_device": takes_device,
        "read_nbytes": 2 * models.nbytes,
        "contenders": summaries,
    }
    return Outcome(values, _failure_of(summaries))


def _run_and_remove(command: Sequence[str], out: Path, limit: Limit) -> Run:
    try:
        return measure(command, cwd=ROOT, environment={}, timeout_seconds=limit.left())
    finally:
        for leftover in (out, out.with_name(f"{out.name}.partial")):
            shutil.rmtree(leftover, ignore_errors=True)
