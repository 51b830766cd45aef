"""The synthetic models: a base and its fine-tunes, made once per size and reused.

    python -m benchmarks.models DIR SIZE SOURCES

The work runs in a process of its own: whoever measures children must stay small, because a
child's peak memory, as the kernel tells it, begins with its parent's size.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "benchmarks" / ".work"
RESULTS = ROOT / "benchmarks" / "results"
ITEMSIZE = 2
"""Bytes per element: every model is stored, and written, in bfloat16."""


@dataclass(frozen=True, slots=True)
class Size:
    """A size of model."""

    preset: str
    """Its name in ``scripts/make_checkpoint.py``."""
    max_shard_nbytes: int
    """Most bytes of tensors per shard, of inputs and outputs alike."""
    nbytes: int
    """About the bytes of a model, for a look at the disk."""


SIZES = {
    "0.01B": Size("10M", 10_000_000, 30_000_000),
    "0.15B": Size("150M", 120_000_000, 400_000_000),
    "1.1B": Size("1.1B", 1_000_000_000, 2_300_000_000),
    "8B": Size("8B", 4_000_000_000, 16_500_000_000),
    "0.9B-MoE": Size("0.9B-MoE", 500_000_000, 1_800_000_000),
}
"""Sizes by the name that commands and results use."""


@dataclass(frozen=True, slots=True)
class Models:
    """A base and its fine-tunes on disk."""

    size: str
    """A key of :data:`SIZES`."""
    base: Path
    """Directory of the base."""
    tuned: tuple[Path, ...]
    """Directories of the fine-tunes."""

    @property
    def nbytes(self) -> int:
        """Bytes of tensors in each of them; they are of one shape."""
        return tensor_nbytes(self.base)

    @property
    def max_shard_nbytes(self) -> int:
        """Most bytes of tensors per shard."""
        return SIZES[self.size].max_shard_nbytes


def check_disk(work: Path, size: str, sources: int) -> None:
    """Raise unless there is room for the models that are missing and for one output.

    Raises:
        SystemExit: There is not.
    """
    directory = work / "models" / size
    names = ["base", *(f"tuned-{number}" for number in range(sources))]
    missing = sum(not (directory / name).is_dir() for name in names)
    needed = (missing + 1) * SIZES[size].nbytes
    free = shutil.disk_usage(work).free
    if needed > free:
        raise SystemExit(
            f"{missing} models of {size} and an output take {needed / 1e9:.0f} GB, "
            f"{free / 1e9:.0f} GB are free; choose a smaller size, or --work on another disk"
        )


def prepare_models(
    work: Path, size: str, sources: int, *, timeout_seconds: float | None = None
) -> Models:
    """Return the models of a size, made where they are missing.

    Args:
        work: Where they are kept.
        size: A key of :data:`SIZES`.
        sources: Number of fine-tunes.
        timeout_seconds: How long that may take; None for any time.

    Raises:
        subprocess.TimeoutExpired: It took longer.
        subprocess.CalledProcessError: They could not be made; the reason is on standard error.
    """
    directory = work / "models" / size
    command = [sys.executable, "-m", "benchmarks.models", str(directory), size, str(sources)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=timeout_seconds)
    tuned = tuple(directory / f"tuned-{number}" for number in range(sources))
    return Models(size, directory / "base", tuned)


def tensor_nbytes(directory: Path) -> int:
    """Return the bytes of tensors that the shards of a model declare.

    Raises:
        OSError: A shard cannot be read.
        ValueError: A shard's header cannot be understood, or the file ends early.
    """
    total = 0
    for shard in sorted(directory.glob("*.safetensors")):
        with shard.open("rb") as stream:
            header_nbytes = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_nbytes))
        ends = [
            entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
        ]
        data_nbytes = max(ends, default=0)
        if shard.stat().st_size != 8 + header_nbytes + data_nbytes:
            raise ValueError(f"{shard.name} is not as long as its header says")
        total += data_nbytes
    return total


def _make_missing(directory: Path, size: str, sources: int) -> None:
    wanted: list[tuple[str, int | None]] = [("base", None)]
    wanted += [(f"tuned-{number}", number) for number in range(sources)]
    missing = [(name, number) for name, number in wanted if not (directory / name).is_dir()]
    if not missing:
        return
    # torch comes with it: only the process that makes models pays for that.
    from scripts.make_checkpoint import PRESETS, write_model

    for name, number in missing:
        partial = directory / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        nbytes = write_model(
            partial,
            PRESETS[SIZES[size].preset],
            max_shard_nbytes=SIZES[size].max_shard_nbytes,
            finetune=number,
        )
        partial.rename(directory / name)
        print(f"made {size} {name}: {nbytes / 1e9:.2f} GB", file=sys.stderr)


if __name__ == "__main__":
    _make_missing(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
