"""What an adapter on disk is: low-rank factors and whole tensors, at byte ranges of one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from pathlib import Path

from streammerge.adapters.files.forms import FormedModule
from streammerge.checkpoint.types import ShardFile, TensorEntry


class AdapterKind(StrEnum):
    """What an adapter does to the modules it targets; the values are PEFT's ``peft_type``."""

    LORA = "LORA"
    """Adds a scaled product of two thin matrices to the weight."""
    IA3 = "IA3"
    """Multiplies inputs or outputs by a vector."""
    LOHA = "LOHA"
    """Adds the elementwise product of two low-rank products."""
    LOKR = "LOKR"
    """Adds a Kronecker product."""
    OFT = "OFT"
    """Rotates blocks of inputs."""
    BOFT = "BOFT"
    """Rotates blocks of inputs, crosses them over, and scales outputs."""
    HRA = "HRA"
    """Reflects inputs by some vectors one after the other."""
    VERA = "VERA"
    """Adds a product of two matrices that all modules share, with scales of their own."""
    VBLORA = "VBLORA"
    """Adds a product of factors that are mixed of vectors that all modules share."""


class Naming(StrEnum):
    """Whose names the tensors of the file have."""

    PEFT = "peft"
    """``base_model.model.X.lora_A.weight``, described by an ``adapter_config.json``."""
    DIFFUSERS = "diffusers"
    """``unet.X.lora_A.weight`` or ``unet.X.lora.down.weight``; no configuration file."""
    MLX = "mlx"
    """``X.lora_a`` and ``X.lora_b``, transposed; an ``adapter_config.json`` of mlx-lm."""
    TORCHTUNE = "torchtune"
    """``layers.N.attn.q_proj.lora_a.weight``; an ``adapter_config.json`` in PEFT's form."""
    KOHYA = "kohya"
    """``lora_unet_X.lora_down.weight`` with a scalar ``alpha``; dots are underscores."""


class LayerKind(StrEnum):
    """What kind of layer two factors belong to."""

    LINEAR = "linear"
    """``A [r, in]``, ``B [out, r]``."""
    EMBEDDING = "embedding"
    """``A [r, vocabulary]``, ``B [dimension, r]``; the weight is their product transposed."""
    CONVOLUTION = "convolution"
    """``A [r, in, *kernel]``, ``B [out, r, 1, ...]``."""
    EXPERTS = "experts"
    """A stack of matrices, PEFT's ``target_parameters``: ``A [experts * r, in]``,
    ``B [out, r * experts]``."""


@dataclass(frozen=True, slots=True)
class LowRankModule:
    """The factors of one module: its weight changes by ``scaling * B @ A``."""

    stem: str
    """The module's path as the file spells it, ``.base_layer`` of nested wrappers included."""
    layer: LayerKind
    """What the factors belong to."""
    down: TensorEntry
    """``A``, applied first."""
    up: TensorEntry
    """``B``, applied second."""
    bias: TensorEntry | None
    """The bias of ``B``, scaled as the product is; None without ``lora_bias``."""
    magnitude: TensorEntry | None
    """DoRA's norm per output; None without ``use_dora``."""
    rank: int
    """Rows of ``A``; of all experts together for EXPERTS."""
    alpha: float
    """``lora_alpha``, after ``alpha_pattern``."""
    scaling: float
    """Factor of the product: alpha / rank, or alpha / sqrt(rank) with ``use_rslora``."""
    parameter: str = "weight"
    """The module's parameter that changes; empty for EXPERTS where the file does not tell."""
    experts: int = 1
    """Matrices that the factors hold side by side."""
    magnitude_of_inputs: bool = False
    """Whether DoRA's norms are those of inputs, as in older files of LyCORIS."""

    @property
    def name(self) -> str:
        """The module's path in the base model."""
        return strip_wrappers(self.stem)

    @property
    def weight_name(self) -> str:
        """The name of the base's tensor that the product is added to."""
        return f"{self.name}.{self.parameter}"

    @property
    def out_features(self) -> int:
        """Rows of ``B``."""
        return self.up.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of ``A``, kernel included."""
        return prod(self.down.shape[1:])


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of an embedding that were trained on their own and replace the base's."""

    stem: str
    """The embedding's path."""
    rows: TensorEntry
    """``[n, dimension]``."""
    indices: tuple[int, ...]
    """The token that each row belongs to."""


@dataclass(frozen=True, slots=True)
class ScalingVector:
    """IA3: what a module's inputs or outputs are multiplied by."""

    stem: str
    """The module's path."""
    vector: TensorEntry
    """``[out, 1]``, or ``[1, in]`` for a feedforward module."""


Patterns = tuple[tuple[str, float], ...]
"""Regular expressions on module names with the value for what they match; the first hit counts."""
Targets = str | tuple[str, ...] | None
"""A regular expression on module names, the names or their ends, or nothing."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What ``adapter_config.json`` says, as far as it changes what the adapter computes."""

    kind: AdapterKind
    """PEFT's ``peft_type``."""
    rank: int
    """``r``, where no pattern says otherwise; 0 for IA3."""
    alpha: float
    """``lora_alpha``, where no pattern says otherwise; 0 for IA3."""
    rank_pattern: Patterns
    """Ranks that differ."""
    alpha_pattern: Patterns
    """Alphas that differ."""
    use_rslora: bool
    """Whether the scaling divides by the square root of the rank."""
    use_dora: bool
    """Whether the columns are normed and scaled by trained magnitudes."""
    lora_bias: bool
    """Whether ``B`` has a bias."""
    fan_in_fan_out: bool
    """Whether targeted weights are stored ``[in, out]``."""
    bias: str
    """Which biases of the base were trained: ``none``, ``all`` or ``lora_only``."""
    target_modules: Targets
    """The modules that the adapter changes."""
    exclude_modules: Targets
    """Those that it leaves alone all the same."""
    layers_to_transform: bool
    """Whether the targets are restricted to some layers by number."""
    feedforward_modules: Targets
    """IA3: the targets whose inputs are scaled."""
    modules_to_save: tuple[str, ...]
    """Modules that were trained whole and replace the base's."""
    target_parameters: tuple[str, ...]
    """Stacks of matrices that were adapted as parameters of their module."""
    token_indices: Mapping[str, tuple[int, ...]]
    """Tokens trained on their own, per embedding; the name ``""`` is the input embedding."""
    ensure_weight_tying: bool
    """Whether tied embeddings are kept tied by PEFT's loader."""
    base_model: str | None
    """``base_model_name_or_path``."""
    peft_version: str | None
    """The PEFT that saved the adapter; older ones did not say."""
    task_type: str | None
    """The kind of model around the base, such as ``CAUSAL_LM``."""
    auto_mapping: Mapping[str, object] | None
    """The base's class, for models without a task type."""
    settings: Mapping[str, float] = field(default_factory=dict)
    """Numbers that the kind's computation needs, by their names in the file; flags are 0 or 1."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk: its file, and what every tensor in it is for."""

    path: Path
    """What the user named: a directory or a single file. Absolute."""
    file: ShardFile
    """The file that holds the tensors; adapters are never sharded."""
    naming: Naming
    """Whose names the tensors have."""
    config: AdapterConfig
    """The configuration; for raw files, what their tensors and metadata say instead."""
    modules: tuple[LowRankModule, ...]
    """The low-rank modules, sorted by stem."""
    formed: tuple[FormedModule, ...]
    """Modules of other forms, sorted by stem."""
    vectors: tuple[ScalingVector, ...]
    """IA3's vectors, sorted by stem."""
    saved: Mapping[str, TensorEntry]
    """Tensors of ``modules_to_save``, by their name in the base."""
    replaced: Mapping[str, TensorEntry]
    """Base tensors that the file brings along and that replace the base's, by name: resized or
    targeted embeddings."""
    biases: Mapping[str, TensorEntry]
    """Biases of the base that were trained (``bias: all`` or ``lora_only``), by name."""
    tokens: tuple[TokenRows, ...]
    """Rows of embeddings that replace the base's."""

    @property
    def kind(self) -> AdapterKind:
        """LoRA or IA3."""
        return self.config.kind

    @property
    def stems(self) -> tuple[str, ...]:
        """The paths of all modules that have factors, as the file spells them."""
        return (*(each.stem for each in self.modules), *(each.stem for each in self.formed))

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """Every tensor that the adapter holds, in file order."""
        found = [entry for module in self.modules for entry in _entries_of(module)]
        # Modules may share tensors.
        found += {entry.offset: entry for each in self.formed for entry in each.entries}.values()
        found += [vector.vector for vector in self.vectors]
        found += [tokens.rows for tokens in self.tokens]
        for table in (self.saved, self.replaced, self.biases):
            found += table.values()
        return tuple(sorted(found, key=lambda entry: entry.offset))


def strip_wrappers(path: str) -> str:
    """Return a module's path without the layers that PEFT wraps around it."""
    return path.replace(".base_layer", "")


def _entries_of(module: LowRankModule) -> list[TensorEntry]:
    every = (module.down, module.up, module.bias, module.magnitude)
    return [entry for entry in every if entry is not None]
