"""What an extraction does: plain data, once it is known which tensors differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from streammerge.adapters.combining.plans import DeviceShare, OutputTensor
from streammerge.checkpoint.types import ShardFile, TensorEntry
from streammerge.errors import printable
from streammerge.plan.choice import DeviceChoice
from streammerge.storage.urls import spelled
from streammerge.units import format_size

EXACT_BELOW = 512
"""Smaller sides of matrices that are always decomposed exactly: it takes no longer."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor in both models."""

    name: str
    """Its name in the base."""
    shape: tuple[int, ...]
    """Its shape in both."""
    base: TensorEntry
    """In the base; its file is an index into :attr:`ExtractionPlan.files`."""
    tuned: TensorEntry
    """In the tuned model, likewise."""


@dataclass(frozen=True, slots=True)
class FactorTask:
    """A matrix whose difference becomes ``B @ A``."""

    pair: Pair
    """The matrix."""
    transposed: bool
    """Whether it is stored the other way round, ``[in, out]``."""
    rank: int
    """Columns of B."""
    exact: bool
    """Whether all singular values are found first."""
    down: OutputTensor
    """``A``, ``[rank, in]``."""
    up: OutputTensor
    """``B``, ``[out, rank]``."""


@dataclass(frozen=True, slots=True)
class CopyTask:
    """A tensor of the tuned model that is saved whole."""

    entry: TensorEntry
    """The tensor; its file is an index into :attr:`ExtractionPlan.files`."""
    output: OutputTensor
    """Where it goes."""


@dataclass(frozen=True, slots=True)
class ExtractionPlan:
    """An extraction, decided and checked."""

    base: Path
    """The model that the other one was tuned from."""
    tuned: Path
    """The tuned model."""
    recipe: str
    """What was asked for, as YAML."""
    files: tuple[ShardFile, ...]
    """The files of both, as they were when their headers were read."""
    factors: tuple[FactorTask, ...]
    """The matrices."""
    copies: tuple[CopyTask, ...]
    """What is saved whole."""
    left_out: tuple[str, ...]
    """Tensors that differ and are neither."""
    equal: int
    """Tensors that do not differ."""
    header: bytes
    """The bytes of the file before the first tensor."""
    config: Mapping[str, object]
    """``adapter_config.json``."""
    workers: int
    """Threads; each decomposes a matrix."""
    peak_memory: int
    """Most resident memory of the process, in bytes."""
    budget: int
    """What the user allows, in bytes."""
    device: DeviceShare | None = None
    """Accelerators; None for the CPU."""
    choice: DeviceChoice | None = None
    """What ``--device auto`` came to; None where a device was named, or none is there."""

    @property
    def device_name(self) -> str:
        """What computes: ``cpu``, ``cuda:0``, or several with commas between."""
        return "cpu" if self.device is None else ",".join(self.device.names)

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        """Every tensor of the result."""
        of_factors = (tensor for task in self.factors for tensor in (task.down, task.up))
        return (*of_factors, *(task.output for task in self.copies))

    @property
    def bytes_to_write(self) -> int:
        """Size of the output file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.outputs)

    def __str__(self) -> str:
        """Return the plan in about ten lines."""
        ranks = Counter(task.rank for task in self.factors)
        shown = ", ".join(f"{rank} x {count}" for rank, count in sorted(ranks.items()))
        exact = sum(task.exact for task in self.factors)
        rows = [
            ("base", spelled(self.base)),
            ("tuned", spelled(self.tuned)),
            ("factors", f"{len(self.factors):,} matrices, of rank {shown}" if ranks else "none"),
            (
                "decomposed",
                f"{exact:,} exactly, {len(self.factors) - exact:,} by random projection",
            ),
            ("saved whole", f"{len(self.copies):,} tensors"),
            ("equal", f"{self.equal:,} tensors"),
            ("left out", f"{len(self.left_out):,} that differ: {', '.join(self.left_out[:4])}"),
            ("write", format_size(self.bytes_to_write)),
            ("peak memory", f"{format_size(self.peak_memory)} of {format_size(self.budget)}"),
        ]
        if self.choice is not None:
            rows.append(("device", str(self.choice)))
        if self.device is not None:
            rows.append(("device", str(self.device)))
        rows = [row for row in rows if row[0] != "left out" or self.left_out]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {printable(value)}" for name, value in rows)
