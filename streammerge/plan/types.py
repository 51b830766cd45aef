"""The plan of a merge: plain frozen data, decided from headers alone."""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.adapters.onto_base.changes import Change
from streammerge.assignment.types import Action, Region, Setting
from streammerge.checkpoint.rowmap import RowMap
from streammerge.checkpoint.runs import Runs
from streammerge.checkpoint.types import (
    Companion,
    CompanionDifference,
    Encoding,
    Note,
    ShardFile,
    StoredPart,
    TensorEntry,
    coded_bits,
)
from streammerge.dtypes import DType
from streammerge.plan.choice import DeviceChoice

PLAN_VERSION = 6
"""Raised when the meaning of a field changes, so that an old plan is never run by new code."""


@dataclass(frozen=True, slots=True)
class InputModel:
    """One checkpoint that takes part: the base, or a source."""

    label: str
    """``"base"`` or ``"sources[0]"``, as messages name it."""
    path: str
    """Where it is; of a model in a store, where its headers and small files are copied to."""
    hub: str | None = None
    """``"org/model@commit"`` of a snapshot in the cache of the Hugging Face hub; None for others."""
    adapter: str | None = None
    """Where the adapter is that is merged into it while it is read; None for none."""
    address: str | None = None
    """Its address, of a model in a store; None for one on disk."""

    @property
    def origin(self) -> str:
        """Where it is: its path, or its address."""
        return self.path if self.address is None else self.address


@dataclass(frozen=True, slots=True)
class TensorInput:
    """Where one input of a tensor lies."""

    file: int
    """Index into :attr:`MergePlan.files`."""
    offset: int
    """First byte, from the start of the file."""
    dtype: DType
    """Element type; of values that are stored as codes, the one that they are read as."""
    parts: tuple[StoredPart, ...] = ()
    """The parts in flat order, where it is not one piece or not stored as numbers; their files are
    indices into :attr:`MergePlan.files` too."""
    rows: RowMap | None = None
    """Where its rows come from, of an embedding for another vocabulary than its model's; None for others."""

    def stored_nbytes(self, numel: int) -> int:
        """Return the bytes that some of its elements take in the file."""
        bits = coded_bits(self.parts) if self.parts else 0
        return numel * bits // 8 if bits else numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorTask:
    """One output tensor: what it is made of, and where it goes."""

    name: str
    """Name in the output and in every input."""
    shape: tuple[int, ...]
    """Elements per dimension."""
    numel: int
    """Elements; items of :attr:`DType.itemsize` bytes where a type packs two into one."""
    dtype: DType
    """Stored element type in the output."""
    action: Action
    """What happens to it."""
    inputs: tuple[TensorInput | None, ...]
    """One per model in :attr:`MergePlan.models`; None means that it takes no part, or that an adapter
    has nothing in the base's place."""
    setting: int
    """Index into :attr:`MergePlan.settings`; -1 for copies."""
    scope_block: int
    """First block of this tensor in its scope's count of blocks; 0 for scope ``tensor``."""
    shard: int
    """Index into :attr:`OutputLayout.shards`."""
    offset: int
    """First byte of the data, from the start of the output file."""
    region: Region | None = None
    """Which part of the output tensor it is; None for all of it. The offset is that of its first run."""
    changes: tuple[Change, ...] = ()
    """What adapters do to it, in the order in which it is done; a source that is an adapter and
    has neither an input nor a change leaves the base's values as they are."""
    encoding: Encoding | None = None
    """How its values become codes of its element type; None where they are stored as they are."""
    row: int = 0
    """Elements of a row, for methods that see whole rows together; 0 for others. What is read of a
    chunk then goes on to the ends of its first and last row."""
    whole: bool = False
    """Whether the method must see all of the tensor at once."""
    base_owner: int = 0
    """The model that the base's input is of, where it is not the base's own."""

    def surroundings(self, start: int, numel: int) -> tuple[int, int]:
        """Return how many elements before and behind a range its first and last row have."""
        if not self.row or not numel:
            return 0, 0
        return start % self.row, -(start + numel) % self.row

    @property
    def made_dtype(self) -> DType:
        """The type that stages leave values in: float32 for those that become codes afterwards."""
        return self.dtype if self.encoding is None else DType.F32

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of the output tensor that this is, or is a part of."""
        return self.shape if self.region is None else self.region.shape

    @property
    def leads(self) -> bool:
        """Whether this stands for its output tensor in headers and lists."""
        return self.region is None or self.region.leads

    @property
    def runs(self) -> Runs | None:
        """How its bytes lie in the file; None for side by side."""
        region = self.region
        if region is None or region.run >= self.numel:
            return None
        itemsize = self.dtype.itemsize
        return Runs(region.run * itemsize, region.stride * itemsize)


def find_scale_tasks(plan: MergePlan) -> dict[str, int]:
    """Return the index of every task whose values are the scales of another one, by its name."""
    return {
        task.name: index for index, task in enumerate(plan.tasks) if task.action is Action.SCALES
    }


@dataclass(frozen=True, slots=True)
class StoredTwins:
    """Two tensors of one model that are one in memory, both stored."""

    label: str
    """The model, as messages name it."""
    one: TensorEntry
    """The tensor that is taken; its file as an index into :attr:`MergePlan.files`."""
    other: TensorEntry
    """The one that must equal it."""


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One output file."""

    name: str
    """File name; of a model in several folders with the folder and ``/`` before it, as its tensors have."""
    header_nbytes: int
    """Bytes before the tensor data: the length field, the JSON and its padding."""
    data_nbytes: int
    """Bytes of tensor data."""
    tasks: tuple[int, ...]
    """Tasks stored here, in the order of their data."""
    metadata: tuple[tuple[str, str], ...] = (("format", "pt"),)
    """What the header says beside the tensors, sorted by key."""

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.header_nbytes + self.data_nbytes

    @property
    def folder(self) -> str:
        """The folder that it lies in, with ``/`` at its end; empty for the output's own directory."""
        folder, slash, _ = self.name.rpartition("/")
        return folder + slash


@dataclass(frozen=True, slots=True)
class OutputLayout:
    """Every output file, to the byte."""

    shards: tuple[OutputShard, ...]
    """The files, in name order."""
    index_name: str | None
    """Name of the index file; None for a single shard."""
    part_indexes: tuple[tuple[str, str], ...] = ()
    """Folder and name of the index of each part that has several shards."""

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def data_nbytes(self) -> int:
        """Bytes of tensor data in all shards."""
        return sum(shard.data_nbytes for shard in self.shards)


@dataclass(frozen=True, slots=True)
class Resources:
    """How the work is cut and what may run at once. It changes speed and memory, never a bit."""

    slot_bytes: int
    """Size of one input buffer; a chunk takes one per input. A multiple of a block's bytes."""
    slots: int
    """Number of input buffers."""
    output_slot_bytes: int
    """Size of one output buffer."""
    output_slots: int
    """Number of output buffers."""
    statistics_bytes: int
    """Room for the statistics of tensors in flight, in bytes."""
    readers: int
    """Threads that read."""
    workers: int
    """Threads that compute."""
    writers: int
    """Threads that write."""
    factor_bytes: int = 0
    """Room for the adapters' tensors of the tensors in flight, in bytes."""


@dataclass(frozen=True, slots=True)
class DeviceResources:
    """Accelerators and what is taken of them.

    They change speed and memory; ``docs/design/devices.md`` names the one reduction whose last bit may
    differ from the CPU's.
    """

    names: tuple[str, ...]
    """``"cuda:0"`` and so on; workers are spread over them."""
    step_numel: int
    """Elements of a chunk that are copied and computed at once; whole blocks."""
    peak: int
    """Most bytes of each device that the merge takes, the driver's own not included."""
    budget: int
    """What the user, or the device's free memory, allows, in bytes."""
    kept_pieces: int = 0
    """Inputs of chunks that stay on each device between measuring and merging, at most."""
    fused: bool = False
    """Whether a program is one kernel there, which Triton compiles, instead of operations of torch."""
    matrices: int = 0
    """Tensors that are decomposed there, one at a time on each device."""
    matrix_bytes: int = 0
    """What the largest of them takes of :attr:`peak`, in bytes."""
    norms: int = 0
    """Changes by adapters whose norms (DoRA) are found there."""
    norm_benches: int = 0
    """Readers that find them at the same time, on each device."""


@dataclass(frozen=True, slots=True)
class MemoryProjection:
    """The peak of private memory, part by part, in bytes."""

    baseline: int
    """The process before work starts: interpreter, plan, and torch if it is needed."""
    growth: int
    """Thread stacks, allocator slack and small objects that come with the work."""
    inputs: int
    """Input buffers."""
    outputs: int
    """Output buffers."""
    scratch: int
    """Per-worker blocks."""
    statistics: int
    """Statistics of tensors in flight."""
    budget: int
    """What the user allows in all."""
    factors: int = 0
    """Tensors of adapters, for the tensors in flight."""
    beside: int = 0
    """The share of the merges that run in the same process at the same time."""

    @property
    def own(self) -> int:
        """What the merge itself takes, beside the process and others in it."""
        return self.peak - self.baseline - self.beside

    @property
    def peak(self) -> int:
        """The sum of the parts; never above the budget."""
        return (
            self.baseline
            + self.growth
            + self.inputs
            + self.outputs
            + self.scratch
            + self.statistics
            + self.factors
            + self.beside
        )


@dataclass(frozen=True, slots=True)
class FusedStage:
    """An earlier recipe whose result lies in no files: what is read of it is computed there and then."""

    name: str
    """What the recipe is called."""
    plan: MergePlan
    """How its result is made: element by element, from nothing but the elements at the same place."""
    files: tuple[int, ...]
    """Index into the :attr:`MergePlan.files` of the plan that reads it, for each file of its own plan."""
    shards: tuple[int | None, ...]
    """Likewise for each file of its result; None for one that is not read."""


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything that a merge will do, decided before any tensor byte is read.

    Plans that are handed out are :class:`~streammerge.plan.rendering.PrintedPlan`.
    """

    version: int
    """:data:`PLAN_VERSION` of the code that made it."""
    method: str
    """Name of the merge method."""
    semantics: str
    """Whose definition of it."""
    recipe: str
    """The recipe in canonical YAML."""
    seed: int
    """Seed of the random masks."""
    keep_non_finite: bool
    """Whether NaN and infinity in inputs are let through."""
    compute_dtype: DType
    """F32 or F64."""
    has_base: bool
    """Whether the first model is the base."""
    models: tuple[InputModel, ...]
    """The base, if any, then the sources."""
    files: tuple[ShardFile, ...]
    """Every file that may be read."""
    settings: tuple[Setting, ...]
    """Which models are merged together, and with which parameter values."""
    tasks: tuple[TensorTask, ...]
    """Output tensors in the order of work: that of the first model's files."""
    model_scope: bool
    """Whether statistics cover the whole model, which adds a sweep over all inputs."""
    layout: OutputLayout
    """The output files."""
    resources: Resources
    """How the work is cut."""
    memory: MemoryProjection
    """What that costs."""
    bytes_to_read: int
    """Bytes of tensor data that will be read, re-reads included."""
    input_nbytes: int
    """Bytes of all tensors that take part, each once."""
    dropped: tuple[str, ...]
    """Names of input tensors that the recipe drops."""
    copied_from_base: tuple[str, ...]
    """Tensors that some source lacks and ``missing: base`` therefore copies."""
    companions: tuple[Companion, ...] = ()
    """Files beside the shards of the base, or of the first source, that go to the output."""
    config: tuple[tuple[str, bool | int | None], ...] = ()
    """Keys of ``config.json`` that differ in the result, with their values; None for those that go."""
    notes: tuple[Note, ...] = ()
    """What was decided without being asked for: tied tensors, names."""
    twins: tuple[StoredTwins, ...] = ()
    """Tensors of one model that must hold the same values; checked before the work begins."""
    left_behind: tuple[str, ...] = ()
    """What lies beside those shards and does not go to the output."""
    differences: tuple[CompanionDifference, ...] = ()
    """Settings in which the inputs differ beside their tensors, with whose is taken."""
    metadata_left_out: tuple[str, ...] = ()
    """What the headers of the base, or the first source, say that does not hold for the result."""
    device: DeviceResources | None = None
    """Where tensors are measured and merged; None for the CPU."""
    needs_torch: bool = True
    """Whether anything is measured or merged with torch; compiled kernels do what is usual."""
    fused: tuple[FusedStage, ...] = ()
    """Earlier recipes whose results are computed where they are read, each after those that it reads."""
    survey: bool = False
    """Whether what a report tells is found while tensors are merged."""
    choice: DeviceChoice | None = None
    """What ``--device auto`` came to; None where a device was named, or none is there."""
    chain: str = ""
    """The recipes of a file of several, if this is the last of them; empty for a recipe by itself."""

    @property
    def document(self) -> str:
        """The recipe as it goes to the output: with those before it that made its sources."""
        return self.chain or self.recipe

    @property
    def asks_stores(self) -> bool:
        """Whether anything is read by requests to a store."""
        return any(file.remote is not None for file in self.files)

    @property
    def bytes_to_write(self) -> int:
        """Bytes of all output shards."""
        return self.layout.nbytes

    def label(self, model: int) -> str:
        """Return how messages name a model: ``"base (models/base)"``."""
        return f"{self.models[model].label} ({self.models[model].origin})"
