"""The place of every tensor of an adapter in a base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from streammerge.adapters.files.forms import FormedModule
from streammerge.adapters.files.types import LowRankModule, ScalingVector, TokenRows
from streammerge.checkpoint.types import TensorEntry


@dataclass(frozen=True, slots=True)
class ModuleHome:
    """Where the product of a low-rank module, or a part of it, is added; or what another form changes."""

    module: LowRankModule | FormedModule
    """The module."""
    weight: str
    """Name of the base's tensor that the product is added to."""
    transposed: bool
    """Whether the base stores ``[in, out]``: ``fan_in_fan_out``, and embeddings
    (``[vocabulary, dimension]``)."""
    expert: int | None
    """For a stack of experts whose base stores one tensor per expert: which one. None otherwise: a
    plain module, or a base that stores the whole stack ``[experts, ...]``."""
    experts: int
    """Number of experts in the stack; 1 for a plain module."""
    first_row: int
    """Row of the product, per expert and the way round that it is stored, that is this tensor's first
    row: not 0 where gate and up projection are fused in the adapter and apart in the base."""
    bias: str | None
    """The base's tensor that ``lora_bias`` is added to; None without ``lora_bias``."""
    rows: tuple[int, int] | None = None
    """The rows of the base's tensor, first and past the last, that the product belongs to; None for all
    of them."""


@dataclass(frozen=True, slots=True)
class VectorHome:
    """What a vector of IA3 multiplies."""

    vector: ScalingVector
    """The vector."""
    weight: str
    """Name of the base's tensor."""
    along_rows: bool
    """Whether row i of the stored matrix is multiplied by element i; else column j by element j."""
    bias: str | None
    """The bias that is multiplied too: of a module that is no feedforward one, where the base has
    one."""


@dataclass(frozen=True, slots=True)
class TokensHome:
    """The embedding that rows belong to."""

    tokens: TokenRows
    """The rows."""
    weight: str
    """Name of the base's tensor."""


@dataclass(frozen=True, slots=True)
class Homes:
    """The place of every tensor of an adapter in a base."""

    modules: tuple[ModuleHome, ...]
    """Homes of modules; several of one module where the base has its matrix in parts."""
    vectors: tuple[VectorHome, ...]
    """Homes of IA3's vectors."""
    tokens: tuple[TokensHome, ...]
    """Homes of rows of embeddings."""
    replaced: Mapping[str, TensorEntry]
    """The adapter's tensor by the base's that it takes the place of: modules trained whole,
    embeddings, trained biases. Shapes may differ from the base's."""
    added: Mapping[str, TensorEntry]
    """Tensors that the base lacks and the adapter brings, such as a new head."""
    untied: Mapping[str, str]
    """The output embedding by name, with the input embedding that it equals in the base and not in the result:
    ``lm_head.weight`` with ``model.embed_tokens.weight``. The base's files may lack it."""
