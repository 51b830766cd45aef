"""What a merge method is: parameters, the statistics it needs, and one pure function.

A method sees flat chunks of aligned tensors, already in the compute dtype, and returns the merged
chunk. It knows nothing of files, threads or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from streammerge.lazily import torch
from streammerge.native.words import Combine, Keep
from streammerge.recipe.types import ParameterKind, ParameterSpec
from streammerge.reductions.topk import TiePolicy

if TYPE_CHECKING:
    from torch import Tensor


class Operand(StrEnum):
    """What a method is given for each source."""

    WEIGHTS = "weights"
    """The source's own values."""
    TASK_VECTORS = "task vectors"
    """Source minus base; the method needs a base."""


class Locality(StrEnum):
    """What must be seen together to merge one element, once the statistics are known."""

    ELEMENT = "element"
    """The same element of every source."""


class Scope(StrEnum):
    """What a statistic covers."""

    TENSOR = "tensor"
    """Every tensor on its own."""
    MODEL = "model"
    """All merged tensors together, one threshold per source."""


class Law(StrEnum):
    """What holds for every method unless its declaration waives it, with the reason."""

    FIXED_POINT = "fixed point"
    """Sources that all equal the base give the base, bit for bit."""
    NEGATION = "negation"
    """Negating all task vectors negates the change."""
    ORDER = "order"
    """The order of the sources changes the result by rounding only."""


@dataclass(frozen=True, slots=True)
class MagnitudeTopK:
    """A need for the exact top-k threshold of every source's task vector."""

    densities: tuple[float, ...]
    """Fraction kept per source, in [0, 1]."""
    tie_policy: TiePolicy
    """Which elements exactly at the threshold are kept."""
    scope: Scope
    """What one threshold covers."""


@dataclass(frozen=True, slots=True)
class Stack:
    """The operands of all sources, whole and row by row; both are views of the same memory."""

    whole: Tensor | None
    """``[n_sources, m]``, laid out so that torch.sum adds as it would on whole tensors; None where
    rows are added from left to right however many they are, as on accelerators, whose torch.sum
    would choose its order by the size of the chunk."""
    rows: tuple[Tensor, ...]
    """``[m]`` per source."""


class RandomMasks(Protocol):
    """Drops entries by position, the same ones on every device."""

    def drop_(self, row: Tensor, *, source: int, density: float) -> Tensor:
        """Multiply ``[m]`` of this chunk in place by the 0/1 keep mask of ``source``.

        Args:
            row: The source's values.
            source: Index in recipe order.
            density: Keep probability, in [0, 1].
        """
        ...


class Trims(Protocol):
    """Trims task vectors to what the statistics of their scope say."""

    def trim_(self, row: Tensor, *, source: int) -> Tensor:
        """Set every entry of ``[m]`` of this chunk that ``source`` does not keep to zero, in place.

        Args:
            row: The source's task vector.
            source: Index in recipe order.
        """
        ...


class Steps(Protocol):
    """Does what one source does to a model, to a model that others have changed already."""

    def step_(self, weights: Tensor, *, source: int) -> Tensor:
        """Change weights as a source changes the base, and round them to the base's type, in place.

        Args:
            weights: ``[m]``, in the compute dtype.
            source: Index in recipe order.
        """
        ...


@dataclass(frozen=True, slots=True)
class MergeChunk:
    """A flat piece of a tensor, or several small tensors end to end, in every input.

    On one device, in the compute dtype.
    """

    base: Tensor | None
    """``[m]``; read only. None for methods on weights."""
    vectors: Stack
    """Task vectors or weights. The method may overwrite them."""
    scratch: Tensor
    """``[scratch_rows, m]``, uninitialised; the method may overwrite it."""
    trims: Trims
    """The trims of this piece, for methods that need them."""
    masks: RandomMasks
    """The random masks of this piece."""
    steps: Steps
    """The sources as steps, for methods that take one after the other."""

    def base_plus(self, merged: Tensor) -> Tensor:
        """Add the merged task vector to the base, in place of the merged one."""
        if self.base is None:
            raise ValueError("a method on task vectors was run without a base")
        # base first: -0.0 + 0.0 and 0.0 + -0.0 agree, but so the formula reads as it is written.
        return torch.add(self.base, merged, out=merged)


@dataclass(frozen=True, slots=True)
class Sweep:
    """What :attr:`MergeMethod.apply` does with some parameters, for kernels that do it at once."""

    combine: Combine
    """How operands become one."""
    weights: tuple[float, ...]
    """Factor per source."""
    keep: Keep = Keep.ALL
    """What is kept of each before."""
    densities: tuple[float, ...] = ()
    """Keep probability per source, in [0, 1]; for random ones."""
    divisor: float = 1.0
    """The result is divided by it; the base, for operands that are task vectors, comes on top."""


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
    locality: Locality
    """What must be seen together."""
    reduction: Callable[[Any], MagnitudeTopK | None]
    """The statistic that these parameters need; None for none."""
    apply: Callable[[MergeChunk, Any], Tensor]
    """Merges one chunk: ``[m]`` in the compute dtype, of finite inputs."""
    scratch_rows: int
    """Rows of :attr:`MergeChunk.scratch`, beside those of the vectors."""
    examples: tuple[dict[str, Any], ...]
    """Parameter sets that the tests run every law on, as a recipe spells them."""
    random: bool = False
    """Whether the seed matters."""
    sums: bool = False
    """Whether every entry of the result is a sum with a term of each operand, and of the base where
    operands are task vectors: NaN and infinity in any of them then reach it."""
    in_turn: Callable[[Any], bool] = lambda _: False
    """Whether these parameters take the sources one after the other, by :attr:`MergeChunk.steps`;
    the vectors are then left uninitialised."""
    keeps_base: Callable[[Any], bool] = lambda _: True
    """Whether the result is the base, but for rounding, where every source equals it."""
    takes_whole: Callable[[Any, int], bool] = lambda _, __: False
    """Whether the result is a source as it stands, given its index, where no other source differs
    from the base."""
    sweep: Callable[[Any], Sweep | None] = lambda _: None
    """The same as :attr:`apply` in words that compiled kernels understand; None where they do not."""
    waived: Mapping[Law, str] = field(default_factory=dict)
    """The laws that this method cannot keep, each with the reason."""

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        """The declared parameters, in order."""
        return tuple(entry.metadata["spec"] for entry in fields(self.params))

    def bind(self, values: Iterable[tuple[str, Any]]) -> Any:
        """Return the parameter dataclass for ``(name, value)`` pairs, as a setting holds them."""
        return self.params(**dict(values))


class TrimParams(Protocol):
    """The parameters of a method that trims task vectors to their largest entries."""

    @property
    def density(self) -> tuple[float, ...]:
        """Fraction kept per source, in [0, 1]."""
        ...

    @property
    def scope(self) -> str:
        """``tensor`` or ``model``."""
        ...

    @property
    def tie_policy(self) -> str:
        """``exact``, ``inclusive`` or ``strict``."""
        ...


def top_k_of(params: TrimParams) -> MagnitudeTopK:
    """Return the statistic that a trim with these parameters needs."""
    return MagnitudeTopK(params.density, TiePolicy(params.tie_policy), Scope(params.scope))


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
