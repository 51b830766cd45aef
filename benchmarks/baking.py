"""Merges rank-64 all-linear adapters into a base, side by side with PEFT and the raw I/O floor.

    python -m benchmarks.baking
    python -m benchmarks.baking --size 0.15B --adapters 1 --rounds 1

The base is in bfloat16, the adapters in float32, as PEFT trains them. PEFT loads the base, loads the
adapters, calls ``merge_and_unload`` and saves; unlike the others it does not wait until its output is
on the disk. Contenders take turns, with the page cache dropped before every run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.compare import add_common_options, describe_session, measure_jobs, results_path
from benchmarks.contenders import (
    PEFT,
    STREAMMERGE,
    Contender,
    floor_contender,
    merge_command,
)
from benchmarks.models import ROOT, SIZES, check_disk, prepare_models, tensor_nbytes

RANK = 64
WAYS: dict[str, dict[str, Any]] = {
    STREAMMERGE: {"method": "task_arithmetic"},
    f"{STREAMMERGE}, rounding: peft": {
        "method": "task_arithmetic",
        "parameters": {"rounding": "peft"},
    },
    f"{STREAMMERGE}, ties": {"method": "ties", "parameters": {"density": 0.2}},
}
"""What a recipe says beside its inputs, by contender. The first one bakes; the others differ from it
where there are several adapters."""


@dataclass(frozen=True, slots=True)
class Baking:
    """Some adapters, merged into a base."""

    base: Path
    """Directory of the base."""
    adapters: tuple[Path, ...]
    """Directories of the adapters."""
    max_shard_nbytes: int
    """Most bytes of tensors per file of the result."""

    @property
    def name(self) -> str:
        """How many adapters there are."""
        return f"{len(self.adapters)} adapter{'s' if len(self.adapters) > 1 else ''}"

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Base and adapters."""
        return (self.base, *self.adapters)

    @property
    def sweeps(self) -> int:
        """Every input is read once."""
        return 1

    @property
    def nbytes_to_read(self) -> int:
        """Bytes of tensors of the base and of the adapters."""
        return sum(map(tensor_nbytes, self.inputs))

    @property
    def nbytes_to_write(self) -> int:
        """Bytes of tensors in the result."""
        return tensor_nbytes(self.base)


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write what the command line asks for and return the exit code."""
    options = parse_arguments(arguments)
    environment.compile_modules()
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    check_disk(work, options.size, 0)
    models = prepare_models(work, options.size, 0)
    adapters = prepare_adapters(models.base, max(options.adapters))
    results = describe_session(models.base, options, work) | {
        "subject": f"rank-{RANK} adapters of all linear layers in float32"
    }
    measure_jobs(
        [
            Baking(models.base, adapters[:count], SIZES[options.size].max_shard_nbytes)
            for count in options.adapters
        ],
        choose_contenders(options.memory),
        results,
        options,
        place=options.results or results_path(f"baking-{options.size}", results),
    )
    return 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    summary = (__doc__ or "").split("\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baking", description=summary)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4], metavar="K")
    parser.add_argument("--memory", default="600MiB", help="budget of streammerge")
    add_common_options(parser)
    return parser.parse_args(arguments)


def prepare_adapters(
    base: Path, count: int, *, dora: bool = False, timeout_seconds: float | None = None
) -> tuple[Path, ...]:
    """Return adapters beside the base, made where they are missing, in so much time at most."""
    kind = "dora" if dora else "lora"
    directory = base.parent
    command = [sys.executable, "-m", "benchmarks.loras", str(directory), str(base)]
    command += [str(RANK), str(count), kind]
    subprocess.run(command, cwd=ROOT, check=True, timeout=timeout_seconds)
    return tuple(directory / f"{kind}-{RANK}-{seed}" for seed in range(count))


def choose_contenders(memory: str) -> list[Contender[Baking]]:
    """Return the contenders in the order of their turns."""
    return [*(_streammerge(name, memory) for name in WAYS), _peft(), floor_contender()]


def _streammerge(name: str, memory: str) -> Contender[Baking]:
    def command(job: Baking, description: Path, out: Path) -> list[str]:
        recipe = WAYS[name] | {
            "base": str(job.base),
            "sources": [{"path": str(path)} for path in job.adapters],
            "output": {"max_shard_size": job.max_shard_nbytes},
        }
        description.write_text(json.dumps(recipe), encoding="utf-8")
        return merge_command(description, out, memory=memory)

    return Contender(
        name, command, lambda job: name == STREAMMERGE or len(job.adapters) > 1, memory=memory
    )


def _peft() -> Contender[Baking]:
    def command(job: Baking, description: Path, out: Path) -> list[str]:  # noqa: ARG001 - nothing to describe
        script = [sys.executable, "-m", "benchmarks.run_peft_baking", str(out)]
        return [*script, *map(str, job.inputs)]

    return Contender(PEFT, command, lambda _: True, environment={"HF_HUB_OFFLINE": "1"})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
