"""Changes of weights that are no product of two thin matrices as they are stored.

Each form says what its tensors are. What shape of weight they can change, and what is computed from
them, is in :mod:`streammerge.adapters.onto_base`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from streammerge.adapters.files.roles import Role
from streammerge.checkpoint.types import TensorEntry


class Form(StrEnum):
    """How a module's weight ``W`` changes; ``s`` is the module's scaling."""

    LORA = "LoRA"
    """``W + s * B @ A`` with factors that are stored transposed, or with rows in another order."""
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
    OFT = "OFT"
    """``W @ R.T`` with R of rotations along the diagonal, of an embedding ``W @ R``
    (arXiv:2306.07280)."""
    BOFT = "BOFT"
    """``diag(s) @ W @ R.T`` with R a product of such matrices, crossed over (arXiv:2311.06243)."""
    HRA = "HRA"
    """``W @ (I - 2 u1 u1.T) @ (I - 2 u2 u2.T) ...`` (arXiv:2405.17484)."""
    VERA = "VeRA"
    """``W + diag(b) @ B @ diag(d) @ A`` with A and B parts of shared matrices (arXiv:2310.11454)."""
    VBLORA = "VB-LoRA"
    """``W + B @ A`` with factors mixed of the vectors of a bank (arXiv:2405.15179)."""


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
