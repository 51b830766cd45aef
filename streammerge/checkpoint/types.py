"""What a checkpoint on disk is: tensors at byte ranges of files."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from streammerge.dtypes import DType


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: contiguous, row-major, little-endian."""

    name: str
    """The name, as the checkpoint spells it."""
    dtype: DType
    """The stored element type."""
    shape: tuple[int, ...]
    """Elements per dimension; ``()`` is a scalar."""
    file: int
    """Index into :attr:`Checkpoint.files`."""
    offset: int
    """First byte of the data, from the start of the file."""

    @property
    def numel(self) -> int:
        """Elements in the tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.dtype.nbytes(prod(self.shape))


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

    @property
    def directory(self) -> Path:
        """The directory that holds the shards and the files beside them."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Companion:
    """A file beside the shards that goes to the output: a configuration, a tokenizer, a licence."""

    name: str
    """Relative to the directory, with ``/`` between parts."""
    nbytes: int
    """Its size."""
    digest: str
    """SHA-256 of what it held when it was planned, in hex."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something that was decided without being asked for, or that a user should know."""

    topic: str
    """One or two words: ``"tied"``, ``"renamed"``."""
    text: str
    """What was decided, about what, and why."""
