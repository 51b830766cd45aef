"""What the user asks for, parsed and checked: plain values, no pydantic, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from streammerge.dtypes import DType

Scalar = float | int | bool | str
"""One parameter value."""
ParameterValue = Scalar | tuple[Scalar, ...]
"""One value for all sources, or one value per source in recipe order."""


@dataclass(frozen=True, slots=True)
class Gradient:
    """A value that changes with the layer."""

    values: tuple[Scalar, ...]
    """At least one: from the first layer to the last at equal steps, linear between them."""


@dataclass(frozen=True, slots=True)
class Case:
    """A value for some tensors."""

    tensors: str | None
    """Shell-style glob on the whole tensor name; None for all."""
    value: Scalar | Gradient
    """Their value."""


@dataclass(frozen=True, slots=True)
class Cases:
    """A value that depends on the tensor's name; the first case that fits counts."""

    cases: tuple[Case, ...]
    """Where none fits, the value is what it would be without them."""


Varying = Scalar | Gradient | Cases
"""One value for every tensor, or one that differs between them."""
Given = Varying | tuple[Scalar, ...]
"""What a recipe may say about a parameter; a tuple has one value per source."""


class ParameterKind(StrEnum):
    """The type of a parameter."""

    FLOAT = "float"
    INT = "int"
    BOOL = "bool"
    CHOICE = "choice"


class Semantics(StrEnum):
    """Whose definition of a method is meant, where references differ."""

    PEFT = "peft"
    """The functions of that name in peft.utils.merge_utils."""
    MERGEKIT = "mergekit"
    """What mergekit does, where it is deterministic."""
    PAPER = "paper"
    """What the paper, or its authors' code, does."""


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter of a merge method, as the method's file declares it."""

    name: str
    """The key in the recipe."""
    kind: ParameterKind
    """The type of a value."""
    doc: str
    """One sentence: meaning, unit, range."""
    default: Scalar | None
    """The value when the recipe gives none; None makes the parameter required."""
    per_source: bool
    """Whether each source may have its own value."""
    minimum: float | None = None
    """Smallest accepted number, inclusive."""
    maximum: float | None = None
    """Largest accepted number, inclusive."""
    choices: tuple[str, ...] = ()
    """Accepted words, for CHOICE."""
    per_tensor: bool = True
    """Whether rules may change it; False for what concerns the whole model."""
    presets: tuple[tuple[Semantics, Scalar], ...] = ()
    """The value when the recipe gives none but asks for these semantics."""

    def default_of(self, semantics: Semantics | None) -> Scalar | None:
        """Return the value when the recipe gives none."""
        return next((value for whose, value in self.presets if whose is semantics), self.default)


class MissingPolicy(StrEnum):
    """What to do with a tensor that some source lacks."""

    ERROR = "error"
    BASE = "base"


class MismatchPolicy(StrEnum):
    """What to do with a tensor whose shapes differ along one dimension."""

    ERROR = "error"
    COMMON = "common"
    """Merge what all have, and keep the rest of the base's, or of the largest source's."""


class RuleDType(StrEnum):
    """The element type that a rule gives."""

    KEEP = "keep"
    """That of the input, whatever ``output.dtype`` says."""


class NonFinitePolicy(StrEnum):
    """What to do with NaN and infinity in an input."""

    ERROR = "error"
    KEEP = "keep"


class ComputeDType(StrEnum):
    """The type that merges are computed in."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"


class VocabularyPolicy(StrEnum):
    """What to do with tokenizers that differ."""

    ERROR = "error"
    """Refuse them where one number stands for two tokens."""
    SAME = "same"
    """Refuse them unless all have the same tokens at the same numbers."""
    IGNORE = "ignore"


@dataclass(frozen=True, slots=True)
class TokenOrigin:
    """Which row stands for a token in models that lack it."""

    source: int | None
    """Index of the source that has it, or BASE; None for zeros."""
    token: str | int | None = None
    """The token there, or its number; None for the same token."""
    force: bool = False
    """Whether it also takes the place of the rows of models that have the token."""


@dataclass(frozen=True, slots=True)
class DrawnVocabulary:
    """The vocabulary of the result: rows of every model's embeddings are drawn for it, token by token."""

    source: int | Path | None
    """Whose it is: a source's index, BASE, or a directory with a tokenizer; None unites those of all
    models, the first model's tokens first."""
    tokens: Mapping[str, TokenOrigin] = field(default_factory=dict)
    """Tokens whose rows come from elsewhere."""
    fill: int | None = None
    """Whose row stands for a token that a model lacks: a source's index, or BASE. None for the base, or
    without one for :attr:`means`."""
    means: bool = False
    """Whether that is the mean of the rows of all models that have it, also where there is a base."""
    multiple: int | None = None
    """What the number of rows is made a multiple of; None keeps the padding that its model has."""
    common: bool = False
    """Whether only tokens that all models have are merged; the others keep the first model's rows, whose
    vocabulary it is."""


class QuantizationPolicy(StrEnum):
    """How weights are stored that the base stores as codes with scales."""

    AS_BASE = "as base"
    """As codes of the same kind, with scales of their own in the same places."""


class CompanionKind(StrEnum):
    """What files beside the tensors belong to."""

    CONFIG = "config"
    GENERATION_CONFIG = "generation_config"
    TOKENIZER = "tokenizer"
    CHAT_TEMPLATE = "chat_template"


BASE = -1
"""As :attr:`Rule.copy`: copy the tensor from the base."""


@dataclass(frozen=True, slots=True)
class Rename:
    """Names in a source that are other ones in the base."""

    old: str
    """A beginning of names, or a glob with ``*`` for what stays."""
    new: str
    """What stands there in the base; with as many ``*``."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model being merged."""

    path: Path
    """Directory or file, as written in the recipe."""
    parameters: Mapping[str, Varying]
    """Parameters given for this source alone, ``weight`` among them."""
    adapter: Path | None = None
    """An adapter that is merged into the model while it is read; None for the model as it is."""
    component: str | None = None
    """The part of a pipeline whose tensors are taken from an adapter of several; None takes all."""
    rename: tuple[Rename, ...] = ()
    """Names that differ from the base's; of each name the first that fits is applied."""


@dataclass(frozen=True, slots=True)
class Rule:
    """An exception for the tensors whose name matches a glob; the first match wins."""

    tensors: str
    """Shell-style glob on the whole tensor name (``fnmatchcase``)."""
    parameters: Mapping[str, Given]
    """Parameters that replace the recipe's and the sources' for these tensors."""
    copy: int | None = None
    """Copy these tensors unchanged from this source index, or from BASE; None merges them."""
    drop: bool = False
    """Leave these tensors out of the output."""
    dtype: RuleDType | None = None
    """Which element type they are stored in; None for the output's."""
    mismatch: MismatchPolicy | None = None
    """What to do where their shapes differ; None for what the recipe says."""


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """How the result is stored."""

    dtype: DType | None
    """Element type of merged float tensors; None keeps the base's (or first source's) per tensor."""
    max_shard_bytes: int | None
    """Largest data size of one output file, in bytes; a larger tensor gets a file of its own. None keeps
    one file of the base (or first source) one file, and cuts others at 5 GB."""
    companions: Mapping[CompanionKind, int | Path] = field(default_factory=dict)
    """Where configuration and tokenizer come from: a source's index, BASE, or a directory. A kind that is
    not there comes from the base, or the first source; without their own entries a chat template comes
    with the tokenizer, and a generation config with the config."""
    quantization: QuantizationPolicy | None = None
    """How weights are stored that the base stores as float8 codes with scales; None as the numbers that
    they stand for."""
    chat_template: str | None = None
    """The chat template: ``auto``, a name, or a text in Jinja; None for that of the inputs."""
    promotes: bool = False
    """Whether, without :attr:`dtype`, a merged tensor gets the narrowest type that holds the values of
    all its inputs."""


@dataclass(frozen=True, slots=True)
class LayerRange:
    """Consecutive layers of one model."""

    source: int
    """Index of the source, or BASE."""
    first: int
    """The first layer, counted from 0."""
    end: int
    """The layer after the last one."""
    parameters: Mapping[str, Varying] = field(default_factory=dict)
    """Parameters of the source for these layers."""


@dataclass(frozen=True, slots=True)
class LayerSlice:
    """Consecutive layers of the result, and which layers of which models are merged to them."""

    ranges: tuple[LayerRange, ...]
    """As many layers of each model; sources in recipe order, each at most once."""
    parameters: Mapping[str, Given] = field(default_factory=dict)
    """Parameters for these layers."""
    base: LayerRange | None = None
    """The layers of a source that the others were tuned from; None for those of the recipe's base."""

    @property
    def count(self) -> int:
        """How many layers of the result these are."""
        return self.ranges[0].end - self.ranges[0].first

    @property
    def sources(self) -> tuple[int, ...]:
        """The sources that are merged, without the base."""
        return tuple(each.source for each in self.ranges if each.source != BASE)

    @property
    def taken(self) -> tuple[LayerRange, ...]:
        """All that it takes of any model, a base of its own first."""
        return self.ranges if self.base is None else (self.base, *self.ranges)


class MixtureForm(StrEnum):
    """Whose tensors and configuration a mixture of experts has."""

    MIXTRAL = "mixtral"
    QWEN2_MOE = "qwen2_moe"
    QWEN3_MOE = "qwen3_moe"
    DEEPSEEK = "deepseek"


class GateKind(StrEnum):
    """Where gate vectors come from that no file has."""

    RANDOM = "random"
    """Drawn from the normal distribution of mean 0 and variance 1."""
    UNIFORM = "uniform"
    """Drawn evenly between plus and minus one over the root of the hidden size, as layers begin."""
    EMBEDDINGS = "embeddings"
    """The direction of the sum of the base's embeddings of an expert's prompts."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Texts that an expert is for, and that it is not for."""

    positive: tuple[str, ...]
    """At least one."""
    negative: tuple[str, ...] = ()
    """Their embeddings are subtracted."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture of experts: the sources' feed-forward layers side by side, all else from the base."""

    experts_per_token: int
    """Experts that a token is given to; at least 1."""
    gates: GateKind | Path
    """Where the vectors come from that say which: a kind, or a file of them."""
    form: MixtureForm | None = None
    """None for the first one that can be made of the base."""
    shared: int | None = None
    """The source that is the expert of every token; None for none."""
    prompts: tuple[Prompts, ...] = ()
    """One per source, for gates from embeddings."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge, as the user asked for it."""

    method: str
    """Name of the merge method."""
    base: Path | None
    """The model that the sources were tuned from."""
    sources: tuple[Source, ...]
    """The models being merged, in recipe order; at least one."""
    parameters: Mapping[str, Given]
    """Parameters for all tensors, as given; defaults are not filled in."""
    rules: tuple[Rule, ...]
    """Exceptions by tensor name; the first match wins."""
    semantics: Semantics | None
    """Whose definition of the method; None for the one that the method has first."""
    seed: int
    """Seed of the random masks, in [0, 2^64)."""
    missing: MissingPolicy
    """What to do with a tensor that some source lacks."""
    non_finite: NonFinitePolicy
    """What to do with NaN and infinity."""
    compute_dtype: ComputeDType
    """The type that merges are computed in."""
    output: OutputSpec
    """How the result is stored."""
    mismatch: MismatchPolicy = MismatchPolicy.ERROR
    """What to do with a tensor that has several shapes."""
    vocabulary: VocabularyPolicy | DrawnVocabulary = VocabularyPolicy.ERROR
    """What to do with tokenizers that differ, or the vocabulary that rows are drawn for."""
    layers: tuple[LayerSlice, ...] = ()
    """The layers of the result, slice by slice; empty for those of the inputs, each with its like."""
    mixture: Mixture | None = None
    """How the sources become experts; None where they are merged."""
    base_adapter: Path | None = None
    """The adapter that is merged into the base first; None for none."""
    remarks: tuple[str, ...] = field(default=(), compare=False)
    """What a recipe of another tool says without effect, or means otherwise."""
    keys: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Where a recipe of another tool says what, by the path of the key here."""

    def in_its_words(self, line: str) -> str:
        """Return a message that begins with a key as one about the recipe that was given."""
        return with_keys(line, self.keys)


def with_keys(line: str, keys: Mapping[str, str]) -> str:
    """Return a message with another path of a key, if it begins with one that has another."""
    fitting = (
        key for key in keys if line.startswith(key) and line[len(key) : len(key) + 1] in ".[:"
    )
    best = max(fitting, key=len, default=None)
    return line if best is None else keys[best] + line[len(best) :]
