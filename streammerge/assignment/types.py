"""What an assignment is: for every output tensor its name, its inputs and what is done with them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from streammerge.adapters.onto_base.adapted import AdaptedModel
from streammerge.adapters.onto_base.changes import Change
from streammerge.checkpoint.types import Checkpoint, Encoding, Note, TensorEntry
from streammerge.dtypes import DType

Model = Checkpoint | AdaptedModel
"""What takes part in a merge."""


class Action(StrEnum):
    """What happens to one output tensor."""

    MERGE = "merge"
    """The method is applied to all inputs."""
    COPY = "copy"
    """The bytes of the one present input are copied."""
    COPY_IF_EQUAL = "copy if equal"
    """Integers and bool: copied when every input holds the same bytes, refused otherwise."""
    CONVERT = "convert"
    """The values of the one present input are stored in another element type."""
    SCALES = "scales"
    """Scales of the codes that another tensor is stored as, found from its values; no input has them."""


@dataclass(frozen=True, slots=True)
class Region:
    """The elements of an output tensor that an assignment is about, where another one is about the rest.

    They lie in runs: element ``i`` of the part is element ``first + i // run * stride + i % run``.
    """

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    leads: bool
    """Whether the part stands for the tensor in headers and lists; one of them does."""
    first: int
    """Flat index in the whole of the first element."""
    run: int
    """Elements side by side."""
    stride: int
    """Elements of the whole from the start of one run to the next."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a set of tensors shares: which models are merged, with which parameter values."""

    values: tuple[tuple[str, float | bool | str | tuple[float | bool | str, ...]], ...]
    """(name, value); a tuple holds one value per source that is merged."""
    models: tuple[int, ...]
    """The models, as indices: the base, if there is one, then the sources in order."""
    has_base: bool
    """Whether the first of them is the base."""

    @property
    def sources(self) -> tuple[int, ...]:
        """The sources among the models."""
        return self.models[self.has_base :]


@dataclass(frozen=True, slots=True)
class AssignedTensor:
    """One output tensor before it has a place."""

    name: str
    """Its name everywhere."""
    shape: tuple[int, ...]
    """Elements per dimension, the same in every input that takes part."""
    dtype: DType
    """Element type in the output."""
    action: Action
    """What happens to it."""
    entries: tuple[TensorEntry | None, ...]
    """One per model; None takes no part."""
    setting: int
    """Index into :attr:`Assignment.settings`; -1 for copies."""
    changes: tuple[Change, ...] = ()
    """What the sources that are adapters do to it."""
    region: Region | None = None
    """Which part of the output tensor it is; None for all of it."""
    base_owner: int = 0
    """The model whose file the base's entry is in: an adapter that brings a base of another shape, or the
    source that a slice of layers has as its base; 0 for the base itself."""
    encoding: Encoding | None = None
    """How its values become codes of its element type; None where they are stored as they are."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the inputs and the recipe come to, tensor by tensor."""

    tensors: tuple[AssignedTensor, ...]
    """Output tensors, in the order of the first model's files."""
    settings: tuple[Setting, ...]
    """The distinct parameter values."""
    dropped: tuple[str, ...]
    """Names that the recipe drops."""
    copied_from_base: tuple[str, ...]
    """Names that ``missing: base`` copies."""
    notes: tuple[Note, ...] = ()
    """What was decided about single tensors."""


@dataclass(frozen=True, slots=True)
class Twins:
    """Two stored tensors of one model that must hold the same values, since they are one in memory."""

    model: int
    """Index of the model."""
    one: TensorEntry
    """The tensor that is taken."""
    other: TensorEntry
    """The one that is left aside."""
