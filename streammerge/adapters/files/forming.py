"""Modules of the forms of LyCORIS put together from their tensors, each checked for contradictions.

Follows: lycoris-lora 4.1 (``functional``, ``modules``) and ComfyUI (``comfy/weight_adapter``), which
scale alike: alpha / rank, where the rank is that of the inner factor of LoKr if it is a product, else
that of the outer one; without a product, or without alpha, the scaling is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from streammerge.adapters.files.forms import Form, FormedModule
from streammerge.adapters.files.roles import Role
from streammerge.checkpoint.types import TensorEntry
from streammerge.errors import (
    HeaderError,
    MissingTensorError,
    ShapeMismatchError,
    UnsupportedAdapterError,
)

Parts = dict[Role, TensorEntry]
_Shape = tuple[int, ...]
_LOKR = (
    Role.LOKR_1,
    Role.LOKR_1A,
    Role.LOKR_1B,
    Role.LOKR_2,
    Role.LOKR_2A,
    Role.LOKR_2B,
    Role.LOKR_T,
)
_LOHA = (Role.LOHA_1A, Role.LOHA_1B, Role.LOHA_2A, Role.LOHA_2B, Role.LOHA_1T, Role.LOHA_2T)
_GLORA = (Role.GLORA_A1, Role.GLORA_A2, Role.GLORA_B1, Role.GLORA_B2)
_DIFFERENCES = (Role.DIFFERENCE, Role.BIAS_DIFFERENCE)
FORM_ROLES = frozenset({*_LOKR, *_LOHA, *_GLORA, *_DIFFERENCES, Role.MIDDLE})
"""What only the forms have."""


class FormBuilder:
    """Makes one module of a form from its tensors."""

    def __init__(self, stem: str, parts: Parts, *, alpha: float | None, where: str) -> None:
        """Prepare to build.

        Args:
            stem: The module's path in the file.
            parts: Its tensors; what is used is taken out.
            alpha: The file's alpha; None for none.
            where: The file, for messages.
        """
        self._stem = stem
        self._parts = parts
        self._alpha = alpha
        self._where = where

    def build(self) -> Iterator[FormedModule]:
        """Yield the module's changes: of its weight, and of its bias.

        Raises:
            HeaderError: The tensors belong to several forms at once.
            MissingTensorError: A factor is not there.
            ShapeMismatchError: Shapes contradict each other.
            UnsupportedAdapterError: Such a module has no merge.
        """
        for entry in self._parts.values():
            self._check_entry(entry)
        if Role.BIAS_DIFFERENCE in self._parts:
            yield self._difference(self._parts.pop(Role.BIAS_DIFFERENCE), "bias")
        forms = {
            build
            for roles, build in (
                (_LOKR, self._lokr),
                (_LOHA, self._loha),
                (_GLORA, self._glora),
                ((Role.MIDDLE,), self._locon),
                ((Role.DIFFERENCE,), self._weight_difference),
            )
            if self._parts.keys() & {*roles}
        }
        if len(forms) > 1:
            raise HeaderError(
                f"{self._where}: {self._stem} has tensors of {len(forms)} kinds of adapters at once: "
                f"{self._names()}; keep those of one"
            )
        for build in forms:
            yield build()

    def _lokr(self) -> FormedModule:
        parts = self._take(_LOKR)
        first, _ = self._factor(parts, Role.LOKR_1, Role.LOKR_1A, Role.LOKR_1B)
        core = parts.get(Role.LOKR_T)
        second, inner_rank = self._factor(parts, Role.LOKR_2, Role.LOKR_2A, Role.LOKR_2B, core)
        if inner_rank == 0 and Role.LOKR_1B in parts:
            inner_rank = parts[Role.LOKR_1B].shape[0]
        return self._module(
            Form.LOKR,
            parts,
            outer=first[0] * second[0],
            columns=first[1] * second[1],
            rank=inner_rank,
        )

    def _loha(self) -> FormedModule:
        parts = self._take(_LOHA)
        shapes = [
            self._factor(parts, None, down, up, parts.get(core))[0]
            for down, up, core in (
                (Role.LOHA_1A, Role.LOHA_1B, Role.LOHA_1T),
                (Role.LOHA_2A, Role.LOHA_2B, Role.LOHA_2T),
            )
        ]
        if shapes[0] != shapes[1]:
            raise self._wrong(
                parts, f"its two products are {list(shapes[0])} and {list(shapes[1])}"
            )
        (outer, columns), rank = shapes[0], parts[Role.LOHA_1B].shape[0]
        return self._module(Form.LOHA, parts, outer=outer, columns=columns, rank=rank)

    def _locon(self) -> FormedModule:
        parts = self._take((Role.UP, Role.DOWN, Role.MIDDLE))
        self._demand(parts, (Role.UP, Role.DOWN, Role.MIDDLE))
        up, down, middle = (parts[role].shape for role in (Role.UP, Role.DOWN, Role.MIDDLE))
        fits = (
            len(middle) > 2
            and prod(up[2:]) == prod(down[2:]) == 1
            and middle[:2] == (up[1], down[0])
        )
        if not fits:
            raise self._wrong(parts, "the middle factor does not fit between A and B")
        columns = down[1] * prod(middle[2:])
        return self._module(Form.LOCON, parts, outer=up[0], columns=columns, rank=down[0])

    def _glora(self) -> FormedModule:
        parts = self._take(_GLORA)
        self._demand(parts, _GLORA)
        new = _glora_shape(*(parts[role].shape for role in _GLORA))
        # Files of LyCORIS before 2.0 have the factors of each product the other way round.
        turned = {
            Role.GLORA_A1: parts[Role.GLORA_A2],
            Role.GLORA_A2: parts[Role.GLORA_A1],
            Role.GLORA_B1: parts[Role.GLORA_B2],
            Role.GLORA_B2: parts[Role.GLORA_B1],
        }
        old = _glora_shape(*(turned[role].shape for role in _GLORA))
        if new is not None and old is not None:
            # Of a square layer both fit; a rank is smaller than what it is the rank of.
            new, old = (each if each[2] < each[1] else None for each in (new, old))
            if new is None and old is None:
                raise UnsupportedAdapterError(
                    f"{self._where}: {self._stem}: all four factors of GLoRA are square, so nothing "
                    "tells in which order they are multiplied; merge it with the program that "
                    "trained it"
                )
        found = new or old
        if found is None:
            raise self._wrong(parts, "they multiply to no W @ a1 @ a2 + b1 @ b2")
        if Role.MAGNITUDE in self._parts:
            raise UnsupportedAdapterError(
                f"{self._where}: {self._stem} is a GLoRA with a {Role.MAGNITUDE}, which no program "
                "trains; remove dora_scale, or merge it with the program that made it"
            )
        outer, columns, rank = found
        chosen = parts if new is not None else turned
        return self._module(Form.GLORA, chosen, outer=outer, columns=columns, rank=rank)

    def _weight_difference(self) -> FormedModule:
        return self._difference(self._parts.pop(Role.DIFFERENCE), "weight")

    def _difference(self, entry: TensorEntry, parameter: str) -> FormedModule:
        # Neither program scales it by alpha.
        return FormedModule(
            stem=self._stem,
            form=Form.DIFFERENCE,
            parts={Role.DIFFERENCE: entry},
            outer=entry.shape[0] if entry.shape else 1,
            columns=prod(entry.shape[1:]),
            rank=0,
            alpha=0.0,
            scaling=1.0,
            parameter=parameter,
        )

    def _module(
        self, form: Form, parts: Parts, *, outer: int, columns: int, rank: int
    ) -> FormedModule:
        alpha = float(rank) if self._alpha is None else self._alpha
        magnitude = self._parts.pop(Role.MAGNITUDE, None)
        if magnitude is not None:
            self._check_magnitude(magnitude, outer, columns)
        return FormedModule(
            stem=self._stem,
            form=form,
            parts=parts,
            outer=outer,
            columns=columns,
            rank=rank,
            alpha=alpha,
            scaling=alpha / rank if rank else 1.0,
            magnitude=magnitude,
        )

    def _factor(
        self,
        parts: Parts,
        whole: Role | None,
        left: Role,
        right: Role,
        core: TensorEntry | None = None,
    ) -> tuple[tuple[int, int], int]:
        """Return the shape of a factor as a matrix, and its rank; 0 for one that is stored whole."""
        given = None if whole is None else parts.get(whole)
        if given is not None:
            if core is not None or left in parts or right in parts:
                raise self._wrong(parts, f"{whole} is there both whole and as a product")
            if len(given.shape) < 2:
                raise self._wrong(parts, f"{whole} is no matrix")
            return (given.shape[0], prod(given.shape[1:])), 0
        self._demand(parts, (left, right))
        a, b = parts[left].shape, parts[right].shape
        if len(a) != 2 or len(b) < 2:
            raise self._wrong(parts, f"{left} and {right} are no matrices")
        if core is None:
            if a[1] != b[0]:
                raise self._wrong(parts, f"the ranks {a[1]} of {left} and {b[0]} of {right} differ")
            return (a[0], prod(b[1:])), b[0]
        if len(core.shape) < 3 or core.shape[:2] != (a[0], b[0]) or len(b) != 2:
            raise self._wrong(parts, f"the core does not fit between {left} and {right}")
        return (a[1], b[1] * prod(core.shape[2:])), b[0]

    def _check_magnitude(self, magnitude: TensorEntry, outer: int, columns: int) -> None:
        shape = magnitude.shape
        per_output = magnitude.numel == outer and shape[0] == outer
        per_input = len(shape) > 1 and shape[0] == 1 and columns % magnitude.numel == 0
        if not per_output and not (per_input and shape[1] == magnitude.numel):
            raise ShapeMismatchError(
                f"{self._where}: {magnitude.name!r} is {list(shape)}, expected [{outer}, 1] (norms "
                f"per output) or [1, inputs] (per input) for a change of {[outer, columns]}; copy "
                "or save the file again"
            )

    def _check_entry(self, entry: TensorEntry) -> None:
        if entry.numel == 0:
            raise ShapeMismatchError(
                f"{self._where}: {entry.name!r} has shape {list(entry.shape)}; the file is "
                "incomplete, save it again"
            )
        if not entry.dtype.is_float:
            raise UnsupportedAdapterError(
                f"{self._where}: {entry.name!r} is of dtype {entry.dtype}: the adapter is quantised; "
                "dequantise it first"
            )

    def _take(self, roles: tuple[Role, ...]) -> Parts:
        return {role: self._parts.pop(role) for role in roles if role in self._parts}

    def _demand(self, parts: Parts, roles: tuple[Role, ...]) -> None:
        missing = [role for role in roles if role not in parts]
        if missing:
            raise MissingTensorError(
                f"{self._where}: module {self._stem} lacks {' and '.join(missing)}, it has "
                f"{_shapes(parts)}; the file is incomplete, save it again"
            )

    def _wrong(self, parts: Parts, reason: str) -> ShapeMismatchError:
        return ShapeMismatchError(
            f"{self._where}: the factors of {self._stem} do not fit: {reason}; they are "
            f"{_shapes(parts)}; copy or save the file again"
        )

    def _names(self) -> str:
        return ", ".join(sorted(repr(entry.name) for entry in self._parts.values()))


def _glora_shape(a1: _Shape, a2: _Shape, b1: _Shape, b2: _Shape) -> tuple[int, int, int] | None:
    """Return rows, columns and rank of ``W @ a1 @ a2 + b1 @ b2``; None where they do not multiply."""
    shapes = (a1, a2, b1, b2)
    if any(len(shape) < 2 for shape in shapes) or any(
        prod(shape[2:]) != 1 for shape in (a1, a2, b1)
    ):
        return None
    inner, rank = a1[:2]
    if a2[:2] != (rank, inner) or b1[1] != rank or b2[:2] != (rank, inner):
        return None
    return b1[0], inner * prod(b2[2:]), rank


def _shapes(parts: Parts) -> str:
    return ", ".join(f"{entry.name!r} {list(entry.shape)}" for entry in parts.values())
