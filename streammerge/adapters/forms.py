"""Changes of weights that are no product of two thin matrices as they are stored.

Each form says what its tensors are and what shape of weight they can change. What is computed from
them is in :mod:`streammerge.adapters.workings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod

from streammerge.adapters.roles import Role
from streammerge.checkpoint.types import TensorEntry


class Form(StrEnum):
    """How a module's weight ``W`` changes; ``s`` is the module's scaling."""

    LOKR = "LoKr"
    """``W + s * kron(w1, w2)``, each factor whole or a product of its own (arXiv:2309.14859)."""
    LOHA = "LoHa"
    """``W + s * (B1 @ A1) * (B2 @ A2)``, multiplied elementwise (arXiv:2108.06098)."""
    LOCON = "LoCon"
    """``W + s * B @ M @ A`` with a middle factor over a convolution's kernel (arXiv:2309.14859)."""
    GLORA = "GLoRA"
    """``W + s * (W @ a1 @ a2 + b1 @ b2)`` (arXiv:2306.07967, as LyCORIS has it)."""
    DIFFERENCE = "difference"
    """``W + d``, element by element."""


@dataclass(frozen=True, slots=True)
class FormedModule:
    """The tensors of one module that changes by one of the forms."""

    stem: str
    """The module's path as the file spells it."""
    form: Form
    """How the weight changes."""
    parts: Mapping[Role, TensorEntry]
    """The tensors that say how, by what they are for."""
    outer: int | None
    """Rows of the change; None where the file does not tell."""
    columns: int | None
    """Columns of the change, the elements of a kernel among them; None where the file does not
    tell."""
    rank: int
    """Inner dimension of the largest product; 0 where there is none."""
    alpha: float
    """The file's alpha; equal to the rank where it has none."""
    scaling: float
    """Factor of the change."""
    magnitude: TensorEntry | None = None
    """DoRA's norm per output, ``[out, 1, ...]``, or per input, ``[1, in, 1, ...]``."""
    parameter: str = "weight"
    """The module's parameter that changes."""
    settings: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the configuration that the computation needs, by their names there."""

    @property
    def name(self) -> str:
        """The module's path in the base model."""
        return self.stem.replace(".base_layer", "")

    @property
    def weight_name(self) -> str:
        """The name of the base's tensor that changes."""
        return f"{self.name}.{self.parameter}"

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """Every tensor of the module; some may belong to other modules too."""
        own = () if self.magnitude is None else (self.magnitude,)
        return (*self.parts.values(), *own)

    @property
    def needs_base(self) -> bool:
        """Whether the change depends on the weight that it is made to."""
        return self.form is Form.GLORA or self.magnitude is not None


def form_fits(module: FormedModule, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor of this shape could be the one that a module changes."""
    if module.form is Form.DIFFERENCE:
        return shape == module.parts[Role.DIFFERENCE].shape
    if len(shape) < 2 or shape[0] != module.outer:
        return False
    columns = prod(shape[1:])
    if module.form is Form.GLORA:
        # What is multiplied from the right knows channels alone.
        return columns == module.columns and shape[1] == module.parts[Role.GLORA_A2].shape[1]
    return columns == module.columns
