"""What a combination of adapters will do: plain data, decided from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from streammerge.adapters.files.types import Adapter, LayerKind, LowRankModule
from streammerge.checkpoint.types import ShardFile, TensorEntry
from streammerge.dtypes import DType
from streammerge.errors import printable
from streammerge.recipe.types import ComputeDType, ParameterValue
from streammerge.storage.copies import origin_of
from streammerge.units import format_size


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the result and where it goes."""

    name: str
    """Its name in the output file."""
    dtype: DType
    """Stored element type."""
    shape: tuple[int, ...]
    """Elements per dimension."""
    offset: int = 0
    """First byte of the data, from the start of the file."""

    @property
    def numel(self) -> int:
        """Elements in the tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ModuleTask:
    """One module's factors, made of those of the sources that have it."""

    stem: str
    """The module's path as the files spell it."""
    layer: LayerKind
    """What the factors belong to."""
    inputs: tuple[LowRankModule | None, ...]
    """The module per source in recipe order; None where a source lacks it."""
    values: tuple[tuple[str, ParameterValue], ...]
    """Name and value of every parameter; a tuple has one value per source."""
    copies: int | None
    """Take the module from this source alone, because a rule says so; None combines."""
    rank: int
    """Rank of the result."""
    down: OutputTensor
    """``A``."""
    up: OutputTensor
    """``B``."""
    bias: OutputTensor | None
    """Bias of ``B``."""
    alpha: OutputTensor | None
    """The scalar that kohya's naming keeps; it equals the rank."""

    @property
    def weight_name(self) -> str:
        """The base's tensor that the module changes; rules and masks go by it."""
        return next(module for module in self.inputs if module is not None).weight_name

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        """Every tensor that the task writes."""
        every = (self.down, self.up, self.bias, self.alpha)
        return tuple(tensor for tensor in every if tensor is not None)


@dataclass(frozen=True, slots=True)
class VectorTask:
    """One IA3 vector: a weighted sum."""

    inputs: tuple[TensorEntry, ...]
    """The vector in each source."""
    weights: tuple[float, ...]
    """Factor per source."""
    output: OutputTensor
    """Where the sum goes."""

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        """Every tensor that the task writes."""
        return (self.output,)


@dataclass(frozen=True, slots=True)
class CopyTask:
    """A tensor that replaces the base's: copied from a source; others must hold the same bytes."""

    inputs: tuple[tuple[int, TensorEntry], ...]
    """Source index and place; the first is copied."""
    output: OutputTensor
    """Where it goes."""

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        """Every tensor that the task writes."""
        return (self.output,)


Task = ModuleTask | VectorTask | CopyTask


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """Accelerators and what decompositions take of them."""

    names: tuple[str, ...]
    """``"cuda:0"`` and so on; each has one matrix at a time."""
    matrices: int
    """Matrices that are decomposed there."""
    peak: int
    """Most bytes of each, the driver's own not included."""
    budget: int
    """What the user, or the device's free memory, allows, in bytes."""

    def __str__(self) -> str:
        """Return it in a line."""
        return (
            f"{', '.join(self.names)}: {self.matrices:,} matrices, with up to {format_size(self.peak)} "
            f"of {format_size(self.budget)} on each"
        )


@dataclass(frozen=True, slots=True)
class CombinationPlan:
    """A combination of adapters, decided and checked."""

    method: str
    """The combination type."""
    semantics: str
    """Whose definition of it."""
    recipe: str
    """The recipe in canonical YAML."""
    seed: int
    """Seed of the random masks."""
    compute_dtype: ComputeDType
    """The type that factors are combined in."""
    adapters: tuple[Adapter, ...]
    """The sources, in recipe order."""
    tasks: tuple[Task, ...]
    """The work, in the order of the output file."""
    file_name: str
    """The output's one file with tensors."""
    header: bytes
    """Its bytes before the first tensor."""
    config: Mapping[str, object] | None
    """``adapter_config.json`` of the result; None for files that have none."""
    dropped: tuple[str, ...]
    """Tensors of the base that a rule leaves unchanged."""
    incomplete: tuple[str, ...]
    """Modules that some source lacks; it takes no part in them."""
    workspace: int
    """Most memory that one task needs, in bytes."""
    peak_memory: int
    """Most resident memory of the process, in bytes."""
    budget: int
    """What the user allows, in bytes."""
    device: DeviceShare | None = None
    """Accelerators, for products that are decomposed whole; None for the CPU."""

    @property
    def device_name(self) -> str:
        """What decomposes: ``cpu``, ``cuda:0``, or several with commas between."""
        return "cpu" if self.device is None else ",".join(self.device.names)

    @property
    def files(self) -> tuple[ShardFile, ...]:
        """The input files, as they were when their headers were read."""
        return tuple(adapter.file for adapter in self.adapters)

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        """Every tensor of the result."""
        return tuple(tensor for task in self.tasks for tensor in task.outputs)

    @property
    def bytes_to_write(self) -> int:
        """Size of the output file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.outputs)

    @property
    def bytes_to_read(self) -> int:
        """Bytes of all tensors of the sources."""
        return sum(entry.nbytes for adapter in self.adapters for entry in adapter.entries)

    def __str__(self) -> str:
        """Return the plan in about ten lines."""
        kinds = Counter(type(task) for task in self.tasks)
        ranks = Counter(task.rank for task in self.tasks if isinstance(task, ModuleTask))
        shown = ", ".join(f"{rank} x {count}" for rank, count in sorted(ranks.items()))
        rows = [
            (
                "method",
                f"{self.method} ({self.semantics} semantics), computed in {self.compute_dtype}",
            ),
            *[
                (
                    f"sources[{index}]",
                    f"{origin_of(adapter.path)} ({adapter.kind}, {adapter.naming} names)",
                )
                for index, adapter in enumerate(self.adapters)
            ],
            ("modules", f"{kinds[ModuleTask] + kinds[VectorTask]:,} combined"),
            ("copied", f"{kinds[CopyTask]:,} tensors that replace the base's"),
            ("read", format_size(self.bytes_to_read)),
            ("write", f"{format_size(self.bytes_to_write)} in {self.file_name}"),
            ("peak memory", f"{format_size(self.peak_memory)} of {format_size(self.budget)}"),
        ]
        bases = {each.config.base_model for each in self.adapters if each.config.base_model}
        if len(bases) > 1:
            rows.insert(-3, ("bases", f"differ by name: {', '.join(sorted(bases))}"))
        if shown:
            rows.insert(-3, ("ranks", shown))
        if self.incomplete:
            rows.insert(-3, ("not in all sources", f"{len(self.incomplete):,} modules"))
        if self.dropped:
            rows.insert(-3, ("dropped", f"{len(self.dropped):,} modules or tensors"))
        if self.device is not None:
            rows.append(("device", str(self.device)))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {printable(value)}" for name, value in rows)

    def as_json(self) -> dict[str, Any]:
        """Return what scripts want to know of the plan."""
        return {
            "method": self.method,
            "semantics": self.semantics,
            "recipe": self.recipe,
            "inputs": [{**asdict(file), "path": file.origin} for file in self.files],
            "file": self.file_name,
            "config": self.config,
            "tensors": [asdict(tensor) for tensor in self.outputs],
            "dropped": list(self.dropped),
            "incomplete": list(self.incomplete),
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "peak_memory": self.peak_memory,
            "budget": self.budget,
            "device": None if self.device is None else asdict(self.device),
        }
