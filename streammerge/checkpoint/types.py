"""What a checkpoint on disk is: tensors at byte ranges of files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from pathlib import Path

from streammerge.checkpoint.rowmap import RowMap
from streammerge.dtypes import DType
from streammerge.storage.objects import RemoteObject


@dataclass(frozen=True, slots=True)
class Coding:
    """How stored codes become numbers: ``value[r, c] = code[r, c] * scale[r // rows, c // columns]``.

    The codes are a matrix, or several one below the other; so are the scales.
    """

    dtype: DType
    """Element type of the codes; F4 stands for two codes in a byte, the first one in its low half."""
    columns: int
    """Columns of the matrix of codes."""
    first: int
    """Flat index in that matrix of the first element that is meant."""
    scale_file: int
    """Index of the file with the scales, as that of the codes."""
    scale_offset: int
    """First byte of the scales, from the start of the file."""
    scale_dtype: DType
    """Element type of the scales; U8 stands for exponents of two, as F8_E8M0 does."""
    scale_columns: int
    """Columns of the matrix of scales."""
    block: tuple[int, int]
    """Rows and columns of codes that share a scale."""
    transposed_rows: int = 0
    """Rows of a matrix of codes whose transpose is meant, and of which :attr:`first` is an index then; 0
    for one that is meant as it is stored."""

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 * self.dtype.itemsize // self.dtype.elements_per_item


@dataclass(frozen=True, slots=True)
class StoredPart:
    """Elements of a tensor that lie side by side in a file."""

    file: int
    """Index into the list of files."""
    offset: int
    """First byte, from the start of the file."""
    numel: int
    """Elements."""
    coding: Coding | None = None
    """How they are coded; None for numbers as they are."""


@dataclass(frozen=True, slots=True)
class CodedAs:
    """What a file holds of a weight that is read as the numbers that its codes stand for."""

    weight: TensorEntry
    """The codes, as a tensor of their own type."""
    scale: TensorEntry
    """The scales."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How the numbers of a weight become codes with scales again.

    ``code[r, c] = value[r, c] / scale[r // rows, c // columns]``, rounded to the nearest; for each of the
    matrices that lie one after the other.
    """

    scales: str
    """Name of the output tensor with the scales."""
    scale_dtype: DType
    """Their element type; U8 stands for exponents of two, as F8_E8M0 does."""
    scale_numel: int
    """How many there are."""
    rows: int
    """Rows of a matrix."""
    columns: int
    """Columns of a matrix."""
    block: tuple[int, int]
    """Rows and columns that share a scale."""
    matrix_scales: int
    """Scales of a matrix; 0 where all matrices share one."""

    @property
    def scale_columns(self) -> int:
        """Scales of a row."""
        return -(-self.columns // self.block[1])

    @property
    def nbytes(self) -> int:
        """Bytes of memory for largest magnitudes, in float32, and for scales as they are stored."""
        return self.scale_numel * (4 + self.scale_dtype.itemsize)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: contiguous, row-major, little-endian; or in parts, one after the other."""

    name: str
    """The name, as the checkpoint spells it."""
    dtype: DType
    """The element type; of tensors that are stored as codes, the one that they are read as."""
    shape: tuple[int, ...]
    """Elements per dimension; ``()`` is a scalar."""
    file: int
    """Index into :attr:`Checkpoint.files`; that of the first part."""
    offset: int
    """First byte of the data, from the start of the file; that of the first part."""
    parts: tuple[StoredPart, ...] = ()
    """The parts in flat order, of a tensor that is not in one piece or not stored as numbers."""
    coded_as: CodedAs | None = None
    """What the file holds, of a whole weight that is stored as float8 codes; None for others."""
    rows: RowMap | None = None
    """Where its rows come from, of an embedding for another vocabulary than its model's; None for others.
    File and offset are those of the first place then."""

    @property
    def numel(self) -> int:
        """Elements in the tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data, as it is stored."""
        if self.parts and self.is_coded:
            return sum(part.numel * coded_bits(self.parts) // 8 for part in self.parts)
        return self.dtype.nbytes(prod(self.shape))

    @property
    def is_coded(self) -> bool:
        """Whether the tensor is stored as codes."""
        return coded_bits(self.parts) > 0

    @property
    def natural_dtype(self) -> DType:
        """The type that a result has which says nothing else: of codes, what models are stored in."""
        return DType.BF16 if self.parts and self.is_coded else self.dtype


def coded_bits(parts: tuple[StoredPart, ...]) -> int:
    """Return the bits of a code, which all parts of a tensor share; 0 where nothing is coded."""
    return parts[0].coding.bits if parts and parts[0].coding is not None else 0


class MadeKind(StrEnum):
    """Where numbers come from that no file has."""

    NORMAL = "normal"
    """Drawn, of mean 0 and variance 1."""
    UNIFORM = "uniform"
    """Drawn evenly between plus and minus one over the root of the number of columns."""
    GIVEN = "given"
    """Written down in the plan."""


@dataclass(frozen=True, slots=True)
class MadeFile:
    """Matrices of one shape that are made when they are read, one after the other."""

    kind: MadeKind
    """How."""
    shape: tuple[int, int]
    """Rows and columns of each."""
    dtype: DType
    """Element type: bfloat16, float16, float32 or float64."""
    names: tuple[str, ...]
    """The tensors, after which their numbers are drawn; given ones share one matrix."""
    seed: int = 0
    """Seed of what is drawn."""
    given: str = ""
    """The given matrix in float32, little-endian, as hexadecimal digits."""

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        count = 1 if self.kind is MadeKind.GIVEN else len(self.names)
        return count * self.dtype.nbytes(prod(self.shape))

    @property
    def peak_nbytes(self) -> int:
        """Most memory that making them takes: all of them, and twice, and one in float64 with its draws."""
        return 2 * self.nbytes + 5 * 8 * prod(self.shape)


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One file of a checkpoint, as it was when its header was read."""

    path: Path
    """Absolute path."""
    nbytes: int
    """Size of the file, in bytes."""
    mtime_ns: int
    """Time of last modification, in nanoseconds since the epoch."""
    header_digest: str
    """BLAKE2b-128 of the header (safetensors) or of the pickle record (.bin), in hex."""
    left_out: tuple[str, ...] = ()
    """What the file holds beside the tensors that are read, a phrase for each."""
    made: MadeFile | None = None
    """What it would hold, of a file that is nowhere; None for others."""
    computed: bool = False
    """Whether it is nowhere because it is of an earlier result that is computed where it is read."""
    remote: RemoteObject | None = None
    """Which object of a store it is, of which nothing but the header is here; None for one on disk."""

    @property
    def on_disk(self) -> bool:
        """Whether there is such a file."""
        return self.made is None and self.remote is None and not self.computed

    @property
    def origin(self) -> str:
        """Where it is: its path, or its address."""
        return str(self.path) if self.remote is None else self.remote.url


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk: its files and where every tensor lies."""

    path: Path
    """What the user named: a directory or a single file. Absolute."""
    files: tuple[ShardFile, ...]
    """The files that hold tensors, sorted by name."""
    tensors: dict[str, TensorEntry]
    """Every tensor by name, in (file, offset) order."""
    config: dict[str, object] | None
    """The parsed ``config.json`` beside the shards; None without one."""
    dequantised: bool = False
    """Whether tensors are read as the numbers that stored codes stand for, so that the configuration's
    ``quantization_config`` is not theirs."""
    quantisation: Mapping[str, TensorEntry] = field(default_factory=dict)
    """What is then no tensor of the model any more, by name: scales of weights, activations and caches."""
    notes: tuple[str, ...] = ()
    """What was decided while reading that a plan has to state, a sentence for each."""
    index_name: str | None = None
    """File name of the index; None for a single file."""
    metadata: tuple[tuple[str, str], ...] = ()
    """What its headers say beside the tensors and goes to the output; read for the first model only."""
    parts: tuple[tuple[str, Checkpoint], ...] = ()
    """Of a model in several folders, each with its folder; ``""`` is the directory itself."""

    @property
    def directory(self) -> Path:
        """The directory that holds the shards and the files beside them."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())


@dataclass(frozen=True, slots=True)
class JsonChange:
    """A key of a JSON file that gets another value in the output."""

    section: str
    """The object that has the key, such as ``text_config``; empty for the outermost."""
    key: str
    """The key."""
    value: str | None
    """Its value as JSON text; None removes the key."""
    why: str
    """What in the merge makes it so, for the plan."""


@dataclass(frozen=True, slots=True)
class Insertion:
    """Text that a copied file gets."""

    offset: int
    """The byte before which it stands."""
    text: str
    """What is inserted."""


@dataclass(frozen=True, slots=True)
class CompanionDifference:
    """A setting in which inputs differ beside their tensors."""

    kind: str
    """``config``, ``generation_config``, ``tokenizer`` or ``chat_template``."""
    key: str
    """The setting; empty where a whole file is missing."""
    taken: str
    """Whose is in the output."""
    values: tuple[tuple[str, str | None], ...]
    """Label and value: of the one that is taken, then of those that differ; None where it has none."""

    def __str__(self) -> str:
        """Return it as a line for people."""
        (taken, mine), *others = self.values
        said = ", ".join(f"{label} {'none' if v is None else v}" for label, v in others)
        what = f"{self.kind}.{self.key}" if self.key else self.kind
        return f"{what}: {'none' if mine is None else mine} of {taken} is taken; {said}"


@dataclass(frozen=True, slots=True)
class Companion:
    """A file beside the shards that goes to the output: a configuration, a tokenizer, a licence."""

    name: str
    """Relative to the directory, with ``/`` between parts."""
    nbytes: int
    """Its size."""
    digest: str
    """SHA-256 of what it held when it was planned, in hex."""
    directory: str | None = None
    """Where it is taken from; None for the directory of the first model."""
    changes: tuple[JsonChange, ...] = ()
    """Keys that differ in the output, if it is a JSON object."""
    insertion: Insertion | None = None
    """What the output's has beside; None for nothing."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something that was decided without being asked for, or that a user should know."""

    topic: str
    """One or two words: ``"tied"``, ``"renamed"``."""
    text: str
    """What was decided, about what, and why."""
