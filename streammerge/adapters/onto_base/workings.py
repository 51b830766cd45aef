"""Factors that a change is computed from, made of the tensors that a file stores.

A file may store a factor as a product of two others, or in a shape of its own. What is made of the
stored tensors once is small like them, and is kept in memory beside them while the tensor that
changes is merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import prod

from streammerge.adapters.files.forms import Form, FormedModule
from streammerge.adapters.files.roles import Role
from streammerge.checkpoint.types import TensorEntry
from streammerge.statistics import BLOCK

LEAST_ROWS = 16
"""Rows multiplied at once, if a matrix has so many. Measured with MKL: from 8 rows on, a part of
a product has the bits of the whole."""


class Op(StrEnum):
    """How a factor is made; ``p`` are the parts, in order, each as a matrix unless it says so."""

    STORED = "stored"
    """``p0``: nothing is made."""
    TURNED = "turned"
    """``p0`` transposed: nothing is made."""
    PRODUCT = "product"
    """``p0 @ p1``."""
    CORE = "core"
    """``sum_j p0[i, j, ...] p1[j, r]`` as ``[i, r * ...]``, with ``p0`` as it is stored."""
    CORE_PRODUCT = "product with core"
    """``p2`` transposed times the core of ``p0`` and ``p1``."""
    BASE_PRODUCT = "product with the base"
    """``[W @ p0, p1]`` side by side; with a kernel, every element of it is multiplied by ``p0``. The
    number is the first row of ``p1``."""
    UNDER = "one under the other"
    """``p0``, for every element of a kernel, and ``p1`` under it."""
    INTERLEAVED = "interleaved"
    """``p0`` with the rows of every head in another order: of pairs that are turned together, which stand
    side by side, all first ones and then all second ones. The number is the rows of a head."""
    WEIGHTED = "weighted rows"
    """The first rows and columns of ``p1``, each row times its element of ``p0``."""
    MIXED = "mixed of a bank"
    """Rows of the bank, which is the last part, mixed: by the softmax of their largest logits, which
    are ``p0``, or numbered by ``p0`` with weights ``p1``. The one number is how many are mixed."""
    MIXED_TURNED = "mixed of a bank, turned"
    """The same where ``p0`` has the parts of the rows in front."""
    UNIT = "unit vectors"
    """The columns of ``p0`` with norm 1, as rows; made orthogonal one after the other if the number
    is 1."""
    REFLECTED = "reflected base"
    """What must be multiplied by those to give ``W @ (I - 2 u1 u1.T) ... - W``."""
    ROTATIONS = "rotations"
    """``[blocks * b, b]``: what each block of a row is multiplied by from the right. ``p0`` holds the
    upper triangles of skew-symmetric matrices. Numbers: terms of Neumann's series, 0 for Cayley's
    transform; the bound of the constrained variant, negative for none; 1 to transpose."""
    BUTTERFLY = "butterfly"
    """The same of a product of such matrices ``p0 [factors, blocks, b, b]``, crossed over."""

    @property
    def makes(self) -> bool:
        """Whether memory of its own is needed."""
        return self not in (Op.STORED, Op.TURNED)


@dataclass(frozen=True, slots=True)
class Working:
    """One factor that a change is computed from."""

    op: Op
    """How it is made."""
    parts: tuple[int, ...]
    """The tensors it is made of, as indices into the change's factors."""
    rows: int
    """Its rows."""
    columns: int
    """Its columns."""
    numbers: tuple[float, ...] = ()
    """What else it depends on, as :class:`Op` says."""

    @property
    def reads_base(self) -> bool:
        """Whether the tensor that changes is read for it."""
        return self.op in (Op.BASE_PRODUCT, Op.REFLECTED)


def working_numel(working: Working, factors: tuple[TensorEntry, ...]) -> int:
    """Return how many elements making a factor takes in memory, the factor and a copy included.

    Args:
        working: The factor.
        factors: The stored tensors of the change.
    """
    if not working.op.makes:
        return 0
    numel = working.rows * working.columns
    match working.op:
        case Op.PRODUCT:
            return 2 * numel
        case Op.CORE:
            # As it is multiplied, and turned.
            return 3 * numel
        case Op.CORE_PRODUCT:
            core, right = (factors[index].shape for index in working.parts[:2])
            return 2 * numel + 2 * core[0] * right[1] * prod(core[2:])
        case Op.BASE_PRODUCT:
            # In float64 until it is rounded, with the part that is multiplied by and a block of W.
            return 4 * numel + 2 * factors[working.parts[0]].numel + 6 * BLOCK
        case Op.MIXED | Op.MIXED_TURNED:
            # The chosen rows of the bank, weighted, with the logits sorted beside them.
            return (2 * int(working.numbers[0]) + 3) * numel + 3 * factors[working.parts[0]].numel
        case Op.REFLECTED:
            vectors = factors[working.parts[0]].numel
            return 4 * numel + 8 * vectors + 6 * BLOCK
        case Op.ROTATIONS | Op.BUTTERFLY:
            # Powers, sums and LAPACK's copies in float64, and rows that are multiplied on their own.
            return 18 * numel + 2 * LEAST_ROWS * working.columns
        case _:
            return 4 * numel


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a module's change that one tensor of the base takes."""

    first_row: int
    """The first of the module's rows."""
    shape: tuple[int, ...]
    """The shape of what changes, as the base stores it."""
    transposed: bool
    """Whether it is stored ``[in, out]``."""


def form_workings(
    module: FormedModule, part: Part
) -> tuple[tuple[TensorEntry, ...], tuple[Working, ...]]:
    """Return the stored tensors of a module's change, and the factors made of them.

    Args:
        module: The module.
        part: What of it changes which part of the base.
    """
    shape = part.shape[::-1] if part.transposed else part.shape
    draft = _Draft(module)
    match module.form:
        case Form.DIFFERENCE:
            return (module.parts[Role.DIFFERENCE],), ()
        case Form.LORA:
            draft.lower()
        case Form.LOKR:
            draft.kron_factor(Role.LOKR_1, Role.LOKR_1A, Role.LOKR_1B, None)
            draft.kron_factor(Role.LOKR_2, Role.LOKR_2A, Role.LOKR_2B, Role.LOKR_T)
        case Form.LOHA:
            draft.pair(Role.LOHA_1B, Role.LOHA_1A, Role.LOHA_1T)
            draft.pair(Role.LOHA_2B, Role.LOHA_2A, Role.LOHA_2T)
        case Form.LOCON:
            draft.middle()
        case Form.GLORA:
            draft.general(part)
        case Form.VERA:
            draft.shared(shape[1])
        case Form.VBLORA:
            draft.mixed()
        case Form.HRA:
            draft.reflections(shape[0])
        case Form.OFT:
            draft.rotations()
        case Form.BOFT:
            draft.butterfly()
    return tuple(draft.factors), tuple(draft.workings)


class _Draft:
    """Stored tensors and factors while they are collected."""

    def __init__(self, module: FormedModule) -> None:
        self.factors: list[TensorEntry] = []
        self.workings: list[Working] = []
        self._parts = module.parts
        self._module = module

    def kron_factor(self, whole: Role, left: Role, right: Role, core: Role | None) -> None:
        """Add a factor that is stored whole, as a product, or as one with a core."""
        if whole in self._parts:
            shape = self._parts[whole].shape
            self._add(Op.STORED, (whole,), shape[0], prod(shape[1:]))
            return
        a, b = self._parts[left].shape, self._parts[right].shape
        if core is not None and core in self._parts:
            kernel = prod(self._parts[core].shape[2:])
            self._add(Op.CORE_PRODUCT, (core, right, left), a[1], b[1] * kernel)
            return
        self._add(Op.PRODUCT, (left, right), a[0], prod(b[1:]))

    def pair(self, down: Role, up: Role, core: Role) -> None:
        """Add A and B of a product, with a core between them or without."""
        a, b = self._parts[down].shape, self._parts[up].shape
        if core in self._parts:
            t = self._parts[core].shape
            self._add(Op.CORE, (core, down), t[0], a[1] * prod(t[2:]))
            self._add(Op.TURNED, (up,), b[1], b[0])
            return
        self._add(Op.STORED, (down,), a[0], prod(a[1:]))
        self._add(Op.STORED, (up,), b[0], b[1])

    def lower(self) -> None:
        """Add A and B as mlx-lm and torchtune store them."""
        down, up = self._parts[Role.DOWN].shape, self._parts[Role.UP].shape
        settings = self._module.settings
        if settings["turned"]:
            self._add(Op.TURNED, (Role.DOWN,), down[1], down[0])
            self._add(Op.TURNED, (Role.UP,), up[1], up[0])
            return
        self._add(Op.STORED, (Role.DOWN,), down[0], down[1])
        head = settings.get("head", 0.0)
        op, numbers = (Op.INTERLEAVED, (head,)) if head else (Op.STORED, ())
        self._add(op, (Role.UP,), up[0], up[1], numbers)

    def middle(self) -> None:
        """Add A and B of a convolution with a middle factor."""
        down, up, middle = (self._parts[role].shape for role in (Role.DOWN, Role.UP, Role.MIDDLE))
        self._add(Op.CORE, (Role.MIDDLE, Role.DOWN), middle[0], down[1] * prod(middle[2:]))
        self._add(Op.STORED, (Role.UP,), up[0], up[1])

    def general(self, part: Part) -> None:
        """Add A and B of ``W @ a1 @ a2 + b1 @ b2``, which together are one product."""
        rows, _, *kernel = part.shape
        rank = self._module.rank * (prod(kernel) + 1)
        self._add(Op.UNDER, (Role.GLORA_A2, Role.GLORA_B2), rank, prod(part.shape[1:]))
        parts = (Role.GLORA_A1, Role.GLORA_B1)
        self._add(Op.BASE_PRODUCT, parts, rows, rank, (float(part.first_row),))

    def shared(self, columns: int) -> None:
        """Add A and B of VeRA, which are parts of shared matrices."""
        rank = self._module.rank
        self._add(Op.WEIGHTED, (Role.SCALE_DOWN, Role.SHARED_DOWN), rank, columns)
        rows = self._parts[Role.SCALE_UP].numel
        self._add(Op.WEIGHTED, (Role.SCALE_UP, Role.SHARED_UP), rows, rank)

    def mixed(self) -> None:
        """Add A and B of VB-LoRA."""
        rank = self._module.rank
        numbers = (self._module.settings["topk"],)
        stored = Role.INDICES_DOWN in self._parts
        down = (Role.INDICES_DOWN, Role.WEIGHTS_DOWN) if stored else (Role.LOGITS_DOWN,)
        up = (Role.INDICES_UP, Role.WEIGHTS_UP) if stored else (Role.LOGITS_UP,)
        outer, columns = self._module.outer, self._module.columns
        assert outer is not None  # noqa: S101 - its files tell
        assert columns is not None  # noqa: S101 - the same
        self._add(Op.MIXED, (*down, Role.BANK), rank, columns, numbers)
        self._add(Op.MIXED_TURNED, (*up, Role.BANK), outer, rank, numbers)

    def reflections(self, rows: int) -> None:
        """Add the vectors that inputs are reflected by, and what they are multiplied by."""
        columns, rank = self._parts[Role.REFLECTIONS].shape
        numbers = (self._module.settings["apply_GS"],)
        self._add(Op.UNIT, (Role.REFLECTIONS,), rank, columns, numbers)
        self._add(Op.REFLECTED, (Role.REFLECTIONS,), rows, rank, numbers)

    def rotations(self) -> None:
        """Add OFT's rotations: of linear layers and convolutions transposed."""
        settings = self._module.settings
        role = next(iter(self._parts))
        turned = float(role is Role.ROTATION)
        block, blocks = int(settings["block"]), int(settings["blocks"])
        numbers = (settings["terms"], settings["eps"], turned)
        self._add(Op.ROTATIONS, (role,), blocks * block, block, numbers)

    def butterfly(self) -> None:
        """Add BOFT's rotations, which together are fewer and larger ones, and its scales."""
        factors, blocks, block, _ = self._parts[Role.BUTTERFLY].shape
        self._add(Op.BUTTERFLY, (Role.BUTTERFLY,), blocks * block, block * 2 ** (factors - 1))
        self._add(Op.STORED, (Role.ROW_SCALE,), self._parts[Role.ROW_SCALE].shape[0], 1)

    def _add(
        self,
        op: Op,
        roles: tuple[Role, ...],
        rows: int,
        columns: int,
        numbers: tuple[float, ...] = (),
    ) -> None:
        parts = []
        for role in roles:
            entry = self._parts[role]
            if entry not in self.factors:
                self.factors.append(entry)
            parts.append(self.factors.index(entry))
        self.workings.append(Working(op, tuple(parts), rows, columns, numbers))
