"""What an adapter does to one tensor of a base, as plain values.

A tensor is seen as a matrix here, ``[rows, columns]``: its first dimension by all others, or for a
stack of experts one such matrix per expert, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from math import prod

from streammerge.adapters.homes import Homes, ModuleHome, TokensHome, VectorHome
from streammerge.adapters.types import LayerKind
from streammerge.checkpoint.types import TensorEntry

DELTA_ROWS = 3
"""Blocks in the compute dtype that a worker needs to compute changes: a product with what lies
around it, and what is added."""


WHOLE_NORM_NUMEL = 2**24
"""Elements of a tensor whose norms by column are computed with all of it in memory: all layers of
the models that are stored transposed, but not the embeddings."""


class ChangeKind(StrEnum):
    """How a tensor changes; ``W`` is the base's."""

    LOW_RANK = "low rank"
    """``W + scaling * B @ A``; factors are A and B."""
    NORMED = "normed low rank"
    """DoRA: ``m * V / norm(V)`` with ``V = W + scaling * B @ A``; factors are A, B and m."""
    ADDED = "added"
    """``W + scaling * v``, element by element; the factor is v."""
    SCALED = "scaled"
    """IA3: rows or columns times v; the factor is v."""
    ROWS = "rows"
    """Some rows are replaced; the factor holds them."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one tensor."""

    kind: ChangeKind
    """How it changes."""
    factors: tuple[TensorEntry, ...]
    """The adapter's tensors that say how, in the order that :class:`ChangeKind` gives."""
    matrix: tuple[int, int]
    """Rows and columns of the tensor, or of each matrix in a stack, as they are stored."""
    model: int = -1
    """The source that makes the change, as an index into the plan's models."""
    scaling: float = 1.0
    """Factor of the product."""
    transposed: bool = False
    """Whether the product is stored the other way round: rows of the tensor are columns of A."""
    experts: int = 1
    """Matrices that the factors hold side by side."""
    expert: int | None = None
    """The one that this tensor is; None for a plain matrix or the whole stack."""
    first_row: int = 0
    """Row of the product, the way round that it is stored, that is the tensor's first."""
    along_rows: bool = True
    """SCALED and NORMED: whether row i goes with element i of the vector; else column i does."""
    indices: tuple[int, ...] = ()
    """ROWS: which rows."""
    rounds_product: bool = False
    """Whether PEFT rounds the product to the base's dtype before it adds it."""

    @property
    def is_sum(self) -> bool:
        """Whether the change is added, whatever the base's values are."""
        return self.kind in (ChangeKind.LOW_RANK, ChangeKind.ADDED)

    @property
    def rank(self) -> int:
        """Inner dimension of the product, of one expert; 0 where there is none."""
        if self.kind not in (ChangeKind.LOW_RANK, ChangeKind.NORMED):
            return 0
        return self.factors[0].shape[0] // self.experts


def list_changes(homes: Homes, base: dict[str, TensorEntry]) -> dict[str, list[Change]]:
    """Return the changes that an adapter makes to each tensor of the base, by its name.

    Args:
        homes: Where the adapter's tensors belong.
        base: The base's tensors, those included that the homes untie.
    """
    changes: dict[str, list[Change]] = {}
    for name, change in _iter_changes(homes, base):
        changes.setdefault(name, []).append(change)
    return changes


def _iter_changes(homes: Homes, base: dict[str, TensorEntry]) -> Iterator[tuple[str, Change]]:
    for home in homes.modules:
        yield home.weight, _product(home, base[home.weight])
        if home.module.bias is not None and home.bias is not None:
            matrix = (base[home.bias].numel, 1)
            scaling = home.module.scaling
            yield (
                home.bias,
                Change(ChangeKind.ADDED, (home.module.bias,), matrix, scaling=scaling),
            )
    for vector in homes.vectors:
        yield vector.weight, _scaled(vector, base[vector.weight], along_rows=vector.along_rows)
        if vector.bias is not None:
            yield vector.bias, _scaled(vector, base[vector.bias], along_rows=True)
    for tokens in homes.tokens:
        yield tokens.weight, _rows(tokens, base[tokens.weight])


def _product(home: ModuleHome, entry: TensorEntry) -> Change:
    module = home.module
    # A stack that the base stores whole has the experts in front.
    stacked = home.experts > 1 and home.expert is None
    rows, *others = entry.shape[1:] if stacked else entry.shape
    factors: tuple[TensorEntry, ...] = (module.down, module.up)
    if module.magnitude is not None:
        factors = (*factors, module.magnitude)
    return Change(
        kind=ChangeKind.LOW_RANK if module.magnitude is None else ChangeKind.NORMED,
        factors=factors,
        matrix=(rows, prod(others)),
        scaling=module.scaling,
        transposed=home.transposed,
        experts=home.experts,
        expert=home.expert,
        first_row=home.first_row,
        along_rows=not home.transposed,
        # Linear layers and convolutions add it as it is, and so does DoRA everywhere.
        rounds_product=module.magnitude is None
        and module.layer in (LayerKind.EMBEDDING, LayerKind.EXPERTS),
    )


def _scaled(home: VectorHome, entry: TensorEntry, *, along_rows: bool) -> Change:
    rows, *others = entry.shape
    return Change(
        ChangeKind.SCALED, (home.vector.vector,), (rows, prod(others)), along_rows=along_rows
    )


def _rows(home: TokensHome, entry: TensorEntry) -> Change:
    rows, *others = entry.shape
    return Change(
        ChangeKind.ROWS, (home.tokens.rows,), (rows, prod(others)), indices=home.tokens.indices
    )
