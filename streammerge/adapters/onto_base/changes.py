"""What an adapter does to one tensor of a base, as plain values.

A tensor is seen as a matrix here, ``[rows, columns]``: its first dimension by all others, or for a
stack of experts one such matrix per expert, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from math import prod

from streammerge.adapters.files.forms import Form, FormedModule
from streammerge.adapters.files.types import LayerKind, LowRankModule
from streammerge.adapters.onto_base.homes import Homes, ModuleHome, TokensHome, VectorHome
from streammerge.adapters.onto_base.products import ProductKind
from streammerge.adapters.onto_base.workings import Part, Working, form_workings
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
    HADAMARD = "product of products"
    """``W + scaling * (B1 @ A1) * (B2 @ A2)``, multiplied element by element; factors are A1, B1, A2
    and B2."""
    KRONECKER = "Kronecker product"
    """``W + scaling * kron(w1, w2)``; factors are w1 and w2."""
    NORMED = "normed"
    """DoRA: ``m * V / norm(V)``, where V is W with what is added; factors are those of what is added,
    and m."""
    ADDED = "added"
    """``W + scaling * v``, element by element; the factor is v."""
    SCALED = "scaled"
    """IA3: rows or columns times v; the factor is v."""
    ROTATED = "rotated"
    """Every block of a row times a matrix; factors are the matrices one under the other, ``[n b, b]``,
    and what rows are multiplied by then, if anything."""
    ROWS = "rows"
    """Some rows are replaced; the factor holds them."""


_SUMS = frozenset(
    {ChangeKind.LOW_RANK, ChangeKind.HADAMARD, ChangeKind.KRONECKER, ChangeKind.ADDED}
)
_KINDS = {
    Form.LORA: ChangeKind.LOW_RANK,
    Form.LOKR: ChangeKind.KRONECKER,
    Form.LOHA: ChangeKind.HADAMARD,
    Form.LOCON: ChangeKind.LOW_RANK,
    Form.GLORA: ChangeKind.LOW_RANK,
    Form.DIFFERENCE: ChangeKind.ADDED,
    Form.VERA: ChangeKind.LOW_RANK,
    Form.VBLORA: ChangeKind.LOW_RANK,
    Form.HRA: ChangeKind.LOW_RANK,
    Form.OFT: ChangeKind.ROTATED,
    Form.BOFT: ChangeKind.ROTATED,
}


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one tensor."""

    kind: ChangeKind
    """How it changes."""
    factors: tuple[TensorEntry, ...]
    """The adapter's tensors that say how, in the order that :class:`ChangeKind` gives; with workings
    those that they are made of, and m last."""
    matrix: tuple[int, int]
    """Rows and columns of the tensor, or of each matrix in a stack, as they are stored; with a window
    those of the window."""
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
    added: ChangeKind = ChangeKind.LOW_RANK
    """NORMED: what is added before."""
    window: tuple[int, int] | None = None
    """Flat index of the first element that changes, and past the last; None for the whole tensor."""
    workings: tuple[Working, ...] = ()
    """The factors, made of those that are stored; none where they are stored as they are needed."""

    @property
    def is_sum(self) -> bool:
        """Whether the change is added, whatever the other adapters' changes are."""
        return self.kind in _SUMS

    @property
    def sum_kind(self) -> ChangeKind:
        """What is added, before norms or without."""
        return self.added if self.kind is ChangeKind.NORMED else self.kind

    @property
    def is_plain(self) -> bool:
        """Whether it is the product of two stored matrices, for all of the tensor and nothing else."""
        return self.kind is ChangeKind.LOW_RANK and self.adds_plain_product

    @property
    def adds_plain_product(self) -> bool:
        """Whether such a product is added; DoRA's norms, of whole rows or columns, may follow."""
        rows, columns = self.matrix
        if not self.adds_product or self.is_placed or self.transposed or self.first_row:
            return False
        if self.experts != 1 or self.expert is not None:
            return False
        down, up = (factor.shape for factor in self.factors[:2])
        return len(down) == len(up) == 2 and (*up, *down) == (rows, down[0], up[1], columns)

    @property
    def adds_product(self) -> bool:
        """Whether products of two stored matrices are added, and nothing else; DoRA's norms, as above, may follow.

        The matrices may be stored the other way round, or be parts of larger ones. Where the product is placed,
        no norms follow.
        """
        if self.sum_kind is not ChangeKind.LOW_RANK or self.workings or not self._has_factors:
            return False
        if self.is_placed:
            return self.kind is ChangeKind.LOW_RANK
        # A convolution has several columns per input.
        normed = self.matrix[0] if self.along_rows else self.matrix[1]
        return all(each.numel == normed for each in self.factors[2:])

    @property
    def _has_factors(self) -> bool:
        """Whether the factors are matrices, or stacks side by side, of the product's rows and columns."""
        rows, columns = self.matrix
        down, up = (each.shape for each in self.factors[:2])
        inner, outer = prod(down[1:]), up[0]
        of_rows, of_columns = (inner, outer) if self.transposed else (outer, inner)
        # An expert's columns of B are as many as its rows of A.
        fits = prod(up[1:]) == down[0] == self.rank * self.experts
        return fits and of_columns == columns and self.first_row + rows <= of_rows

    @property
    def is_placed(self) -> bool:
        """Whether it changes some rows of the tensor, or each matrix of a stack by factors of its own."""
        return self.window is not None or self.is_stack

    @property
    def is_stack(self) -> bool:
        """Whether the tensor holds the matrices of all experts."""
        return self.experts != 1 and self.expert is None

    @property
    def product_kind(self) -> ProductKind:
        """How a product, if it is one, changes the tensor."""
        if self.is_placed:
            return ProductKind.PLACED
        if self.kind is not ChangeKind.NORMED:
            return ProductKind.ADDED
        return ProductKind.NORMED_ROWS if self.along_rows else ProductKind.NORMED_COLUMNS

    @property
    def product_numel(self) -> int:
        """Elements of the factors that a product takes, and of DoRA's vector."""
        rows, columns = self.matrix
        matrices = self.experts if self.is_stack else 1
        vector = sum(each.numel for each in self.factors[2:])
        return matrices * self.rank * (rows + columns) + vector

    @property
    def rank(self) -> int:
        """Terms of an element of a product of two factors."""
        return self.factors[0].shape[0] // self.experts

    @property
    def reads_base(self) -> bool:
        """Whether the stored tensor is read once more before it is changed."""
        made = any(working.reads_base for working in self.workings)
        return made or self.kind is ChangeKind.NORMED


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
        module = home.module
        if isinstance(module, FormedModule):
            yield home.weight, _formed(home, module, base[home.weight])
            continue
        yield home.weight, _product(home, module, base[home.weight])
        if module.bias is not None and home.bias is not None:
            yield home.bias, _bias(home, module.bias, base[home.bias])
    for vector in homes.vectors:
        yield vector.weight, _scaled(vector, base[vector.weight], along_rows=vector.along_rows)
        if vector.bias is not None:
            yield vector.bias, _scaled(vector, base[vector.bias], along_rows=True)
    for tokens in homes.tokens:
        yield tokens.weight, _rows(tokens, base[tokens.weight])


def _product(home: ModuleHome, module: LowRankModule, entry: TensorEntry) -> Change:
    # A stack that the base stores whole has the experts in front, even if there is only one.
    is_stack = module.layer is LayerKind.EXPERTS and len(entry.shape) == 3
    stacked = home.expert is None and (home.experts > 1 or is_stack)
    rows, *others = entry.shape[1:] if stacked else entry.shape
    window = _window(home, entry)
    if home.rows is not None:
        rows = home.rows[1] - home.rows[0]
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
        along_rows=home.transposed is module.magnitude_of_inputs,
        # Linear layers and convolutions add it as it is, and so does DoRA everywhere.
        rounds_product=module.magnitude is None
        and module.layer in (LayerKind.EMBEDDING, LayerKind.EXPERTS),
        window=window,
    )


def _bias(home: ModuleHome, bias: TensorEntry, entry: TensorEntry) -> Change:
    rows = entry.numel if home.rows is None else home.rows[1] - home.rows[0]
    return Change(
        ChangeKind.ADDED,
        (bias,),
        (rows, 1),
        scaling=home.module.scaling,
        first_row=home.first_row,
        window=home.rows,
    )


def _window(home: ModuleHome, entry: TensorEntry) -> tuple[int, int] | None:
    """Return the flat range of the rows that a module changes; None for all of them."""
    if home.rows is None:
        return None
    columns = prod(entry.shape[1:])
    return home.rows[0] * columns, home.rows[1] * columns


def _formed(home: ModuleHome, module: FormedModule, entry: TensorEntry) -> Change:
    rows, *others = entry.shape or (1,)
    window = _window(home, entry)
    if home.rows is not None:
        rows = home.rows[1] - home.rows[0]
    shape = (rows, *others)
    part = Part(home.first_row, shape, transposed=home.transposed)
    factors, workings = form_workings(module, part)
    kind = _KINDS[module.form]
    magnitude = module.magnitude
    # What the base takes part in is made of its own rows alone.
    own = any(working.reads_base for working in workings)
    outputs = module.columns if home.transposed else module.outer
    return Change(
        kind=kind if magnitude is None else ChangeKind.NORMED,
        factors=factors if magnitude is None else (*factors, magnitude),
        matrix=(rows, prod(others)),
        scaling=module.scaling,
        transposed=home.transposed,
        first_row=0 if own else home.first_row,
        along_rows=magnitude is None or magnitude.shape[0] == outputs,
        added=kind,
        window=window,
        workings=workings,
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
