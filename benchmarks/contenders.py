"""Who is measured: how each contender is called, and the environment that the others run in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from benchmarks.jobs import AnyJob, Job, mergekit_config, peft_job, streammerge_recipe
from benchmarks.models import ROOT
from benchmarks.wheels import MERGEKIT_REQUIREMENT
from streammerge.checkpoint.outputfile import lies_in_memory

FLOOR = "floor"
STREAMMERGE = "streammerge"
MERGEKIT = "mergekit"
PEFT = "peft"
NAMES = (STREAMMERGE, MERGEKIT, PEFT, FLOOR)
"""What ``--contenders`` takes; streammerge runs once per memory budget."""

TORCH_REQUIREMENT = "torch==2.13.0"
REQUIREMENTS = (MERGEKIT_REQUIREMENT, "peft==0.21.2")
"""The other mergers. They never share an environment with this project: mergekit asks for
versions of its own."""

MERGEKIT_FLAGS = (
    "--lazy-unpickle",
    "--async-write",
    "--no-copy-tokenizer",
    "--no-write-model-card",
    "--quiet",
)
"""mergekit's fastest on a CPU: the models have no tokenizer to copy, and the model card would be
looked up on a hub. Its further flags concern accelerators; ``--write-threads`` has no effect."""


JobT_contra = TypeVar("JobT_contra", bound=AnyJob, contravariant=True)


@dataclass(frozen=True, slots=True)
class Contender(Generic[JobT_contra]):
    """One way to do jobs of a kind."""

    name: str
    """What tables and results call it."""
    command: Callable[[JobT_contra, Path, Path], list[str]]
    """Command for a job, a file to describe it in, and the directory to make."""
    does: Callable[[JobT_contra], bool]
    """Whether it can do a job at all."""
    memory: str | None = None
    """Its memory budget; None where it has none."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables to set."""


def choose_contenders(
    names: Sequence[str], memory: Sequence[str], work: Path
) -> list[Contender[Job]]:
    """Return the contenders in the order of their turns.

    Args:
        names: Some of :data:`NAMES`.
        memory: Budgets of streammerge; the first is the one that others are compared with.
        work: Where the environment of the others is.
    """
    python = _python_of(environment_directory(work))
    chosen: list[Contender[Job]] = []
    for name in NAMES:
        if name not in names:
            continue
        if name == STREAMMERGE:
            chosen += [
                streammerge_contender(budget, main=index == 0)
                for index, budget in enumerate(memory)
            ]
        elif name == MERGEKIT:
            chosen.append(mergekit_contender([str(python.with_name("mergekit-yaml"))]))
        elif name == PEFT:
            chosen.append(_peft(python))
        else:
            chosen.append(floor_contender())
    return chosen


def needs_environment(names: Sequence[str]) -> bool:
    """Return whether any of these contenders runs in the other mergers' environment."""
    return bool({MERGEKIT, PEFT} & set(names))


def environment_directory(work: Path) -> Path:
    """Return where the environment of the other mergers is."""
    return work / "env"


def prepare_environment(work: Path) -> None:
    """Make the environment of the other mergers, unless it is there.

    Raises:
        subprocess.CalledProcessError: It could not be installed.
    """
    directory = environment_directory(work)
    stamp = directory / "installed.json"
    wanted = json.dumps([TORCH_REQUIREMENT, *REQUIREMENTS])
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    print("making the environment of the other mergers", file=sys.stderr)
    venv.create(directory, with_pip=True, clear=True, symlinks=True)
    pip = [str(_python_of(directory)), "-m", "pip", "--quiet", "--quiet", "install"]
    # torch alone and first, with its version given: where a build for CPUs alone is offered, pip
    # then takes that one, a tenth of the size; with the others it may take any.
    subprocess.run([*pip, TORCH_REQUIREMENT], check=True)
    subprocess.run([*pip, *REQUIREMENTS], check=True)
    stamp.write_text(wanted, encoding="utf-8")


def _python_of(environment: Path) -> Path:
    return environment / "bin" / "python"


def merge_command(recipe: Path, out: Path, *, memory: str) -> list[str]:
    """Return the command that merges as a recipe says."""
    merge = [sys.executable, "-m", "streammerge", "merge", str(recipe), str(out)]
    return [*merge, "--memory", memory, "--quiet"]


def streammerge_contender(memory: str, *, main: bool = True) -> Contender[Job]:
    """Return streammerge with a budget, which is in its name unless it is the ``main`` one."""

    def command(job: Job, description: Path, out: Path) -> list[str]:
        description.write_text(streammerge_recipe(job), encoding="utf-8")
        return merge_command(description, out, memory=memory)

    name = STREAMMERGE if main else f"{STREAMMERGE} {memory}"
    return Contender(name, command, lambda _: True, memory=memory)


def mergekit_contender(program: Sequence[str]) -> Contender[Job]:
    """Return mergekit, called by these words."""

    def command(job: Job, description: Path, out: Path) -> list[str]:
        description.write_text(mergekit_config(job), encoding="utf-8")
        shard_size = ["--out-shard-size", str(job.models.max_shard_nbytes)]
        return [*program, str(description), str(out), *MERGEKIT_FLAGS, *shard_size]

    return Contender(
        MERGEKIT,
        command,
        lambda job: job.method.mergekit is not None,
        environment={"HF_HUB_OFFLINE": "1"},
    )


def _peft(python: Path) -> Contender[Job]:
    def command(job: Job, description: Path, out: Path) -> list[str]:
        description.write_text(peft_job(job), encoding="utf-8")
        script = ROOT / "benchmarks" / "run_peft.py"
        # Without the directory of the script, whose modules are called as libraries are (``kernels``).
        return [str(python), "-P", str(script), str(description), str(out)]

    return Contender(
        PEFT,
        command,
        lambda job: job.method.peft is not None,
        environment={"HF_HUB_OFFLINE": "1"},
    )


def reserves(directory: Path) -> bool:
    """Return whether files there get their room before they are written, as the merge's do."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        return not lies_in_memory(descriptor)
    finally:
        os.close(descriptor)


def floor_contender() -> Contender[AnyJob]:
    """Return the one that reads and writes as many bytes as a job does, and computes nothing."""

    def command(job: AnyJob, description: Path, out: Path) -> list[str]:  # noqa: ARG001 - nothing to describe
        models = [sorted(model.glob("*.safetensors")) for model in job.inputs]
        return [
            *[sys.executable, "-m", "benchmarks.floor", str(out)],
            *["--sweeps", str(job.sweeps)],
            *["--write-nbytes", str(job.nbytes_to_write)],
            *["--files", str(-(-job.nbytes_to_write // job.max_shard_nbytes))],
            *([] if reserves(out.parent) else ["--no-reserve"]),
            *[part for files in models for part in ("--read", *map(str, files))],
        ]

    return Contender(FLOOR, command, lambda _: True)
