"""What a merge method is: parameters, what it asks, and what it does to every element.

A method is given a sheet (:class:`streammerge.tiles.writing.Sheet`), takes rows of aligned elements
from it, all in the compute dtype, and writes down how they become one. It knows nothing of files,
threads or devices, nor of how tensors are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from streammerge.recipe.types import ParameterKind, ParameterSpec, Semantics
from streammerge.statistics.rounds import Round, RowRound
from streammerge.statistics.topk import TiePolicy
from streammerge.tiles.writing import Row, Sheet

if TYPE_CHECKING:
    from torch import Tensor


class Operand(StrEnum):
    """What a method is given for each source."""

    WEIGHTS = "weights"
    """The source's own values."""
    TASK_VECTORS = "task vectors"
    """Source minus base; the method needs a base."""
    EITHER = "task vectors, or weights without a base"
    """Source minus base where there is a base, and else the source's own values."""


class Locality(StrEnum):
    """What must be seen together to merge one element, once the statistics are known."""

    ELEMENT = "element"
    """The same element of every model."""
    ROW = "row"
    """The row that it lies in."""
    TENSOR = "tensor"
    """The whole tensor, which must fit the memory, several times over."""


class Scope(StrEnum):
    """What a statistic covers."""

    TENSOR = "tensor"
    """Every tensor on its own."""
    MODEL = "model"
    """All merged tensors together."""


class Law(StrEnum):
    """What holds for every method unless its declaration waives it, with the reason."""

    FIXED_POINT = "fixed point"
    """Sources that all equal the base give the base, bit for bit."""
    NEGATION = "negation"
    """Negating all task vectors negates the change."""
    SCALING = "scaling"
    """Doubling all task vectors doubles the change."""
    ORDER = "order"
    """The order of the sources changes the result by rounding only."""


def _nothing_wrong(_params: Any) -> str | None:
    return None


def _as_it_is(kept: Sequence[int]) -> Sequence[int]:
    return kept


@dataclass(frozen=True, slots=True)
class Work:
    """What a method does with some parameters."""

    merge: Callable[[Sheet], Row]
    """Writes down the result: one value per element, of finite inputs."""
    rounds: tuple[Round, ...] = ()
    """What it asks before that, in order."""
    scope: Scope = Scope.TENSOR
    """What the answers cover."""
    row_rounds: tuple[RowRound, ...] = ()
    """What it asks about every row, in order, before it asks or merges anything else there. A row is
    a vector along the last dimension; a tensor of one dimension is one row."""
    row_ranks: Callable[[Sheet], Sequence[Row]] | None = None
    """The values whose magnitudes are ranked within each row: :meth:`Sheet.computed` is 0 for the
    smallest and 1 for the largest of a row, in equal steps; 1/2 in a row of one."""
    whole: Callable[[Sequence[Tensor]], Tensor] | None = None
    """What is made of a whole tensor: given the vectors of all sources (task vectors where there is a
    base), each of the tensor's shape, in the compute dtype, one of the same shape in float64. The
    merge then finds it as :meth:`Sheet.computed` of 0. It may take
    :data:`streammerge.plan.budgeting.WHOLE_BYTES` per element beside what it is given."""
    decomposes: bool = False
    """Whether ``whole`` is made of singular value decompositions and products, by operations of torch
    that work where the vectors lie: an accelerator then does them for large matrices."""
    kept: Callable[[Sequence[int]], Sequence[int]] = _as_it_is
    """From how many entries each trim, or each source's random numbers, kept, to the entries that
    each source keeps; nothing where the method does not choose entries."""

    @property
    def locality(self) -> Locality:
        """What must be seen together."""
        if self.whole is not None:
            return Locality.TENSOR
        by_rows = bool(self.row_rounds) or self.row_ranks is not None
        return Locality.ROW if by_rows else Locality.ELEMENT


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """A merge method, complete: what it is called, asks for, needs and does."""

    name: str
    """The word in the recipe."""
    summary: str
    """One sentence for the table of methods."""
    reference: str
    """The paper, with its arXiv id."""
    params: type[Any]
    """A frozen dataclass whose fields are declared with :func:`parameter`."""
    operand: Operand
    """What the method is given."""
    work: Callable[[Any], Work]
    """What it does with given parameters."""
    examples: tuple[dict[str, Any], ...]
    """Parameter sets that the tests run every law on, as a recipe spells them."""
    semantics: tuple[Semantics, ...] = (Semantics.PAPER,)
    """Whose definitions of it there are; the first is meant where a recipe says nothing."""
    sources: tuple[int, int | None] = (1, None)
    """How many sources it merges, at least and at most; None for any number."""
    refuse: Callable[[Any], str | None] = _nothing_wrong
    """Why it cannot merge with given parameters, beginning with the recipe's key; None if it can."""
    random: bool = False
    """Whether the seed matters."""
    sums: bool = False
    """Whether every entry of the result is a sum with a term of each operand, and of the base where
    operands are task vectors: NaN and infinity in any of them then reach it."""
    in_turn: Callable[[Any], bool] = lambda _: False
    """Whether these parameters take the sources one after the other, as adapters that change what
    the ones before have left."""
    keeps_base: Callable[[Any], bool] = lambda _: True
    """Whether the result is the base, but for rounding, where every source equals it."""
    takes_whole: Callable[[Any, int], bool] = lambda _, __: False
    """Whether the result is a source as it stands, given its index, where no other source differs
    from the base."""
    waived: Mapping[Law, str] = field(default_factory=dict)
    """The laws that this method cannot keep, each with the reason."""

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        """The declared parameters, in order."""
        return tuple(entry.metadata["spec"] for entry in fields(self.params))

    def bind(self, values: Iterable[tuple[str, Any]]) -> Any:
        """Return the parameter dataclass for ``(name, value)`` pairs, as a setting holds them."""
        names = {entry.metadata["spec"].name: entry.name for entry in fields(self.params)}
        return self.params(**{names[name]: value for name, value in values})


def parameter(spec: ParameterSpec) -> Any:
    """Declare a field of a parameter dataclass by its specification."""
    declared: Field[Any] = field(metadata={"spec": spec})
    return declared


WEIGHT = ParameterSpec(
    name="weight",
    kind=ParameterKind.FLOAT,
    doc="Factor of this source; any finite number, negative ones subtract.",
    default=1.0,
    per_source=True,
)
DENSITY = ParameterSpec(
    name="density",
    kind=ParameterKind.FLOAT,
    doc="Fraction of the task vector that is kept, in [0, 1].",
    default=None,
    per_source=True,
    minimum=0.0,
    maximum=1.0,
)
SCOPE = ParameterSpec(
    name="scope",
    kind=ParameterKind.CHOICE,
    doc="What one threshold covers: every tensor on its own, or the whole model.",
    default=Scope.TENSOR.value,
    per_source=False,
    choices=tuple(scope.value for scope in Scope),
    per_tensor=False,
)
TIE_POLICY = ParameterSpec(
    name="tie_policy",
    kind=ParameterKind.CHOICE,
    doc="Which elements exactly at the threshold are kept: the first until k are, all, or none.",
    default=TiePolicy.EXACT.value,
    per_source=False,
    choices=tuple(policy.value for policy in TiePolicy),
    per_tensor=False,
)
