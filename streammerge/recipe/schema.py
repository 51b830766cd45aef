"""The shape of the recipe document: its keys, their types, ranges and defaults.

Only the keys that every method shares are known here. The parameters of a method stand beside them
in ``sources`` and ``rules``; the parser takes them out first and checks them against the method, so
that these models can refuse every other key.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails

from streammerge.errors import RecipeError
from streammerge.recipe.accepting import (
    MAX_PATH_CHARACTERS,
    Companions,
    Copy,
    Layers,
    OutputDType,
    PathText,
    ShardSize,
    accept_mixture,
    accept_template,
    accept_vocabulary,
    word_of,
)
from streammerge.recipe.grid import GRID_KEY
from streammerge.recipe.mixture import SCHEMA as MIXTURE_SCHEMA
from streammerge.recipe.refusing import (
    MERGEKIT_KEYS,
    key_path,
    shown,
    unknown_key,
)
from streammerge.recipe.types import (
    ComputeDType,
    DrawnVocabulary,
    MismatchPolicy,
    MissingPolicy,
    Mixture,
    NonFinitePolicy,
    QuantizationPolicy,
    RuleDType,
    Semantics,
    VocabularyPolicy,
)
from streammerge.recipe.vocabulary import SCHEMA

MAX_SEED = 2**64 - 1
"""The random generator's key has 64 bits."""


def check_frame(frame: dict[object, object], *, parameter_names: Iterable[str]) -> RecipeDocument:
    """Return the typed document, without the parameters of its method.

    Args:
        frame: The document, its method parameters taken out.
        parameter_names: The method's parameters, to say where one at the top level belongs.

    Raises:
        RecipeError: Some key is unknown, missing, of a wrong type or out of range; one line for each.
    """
    try:
        return RecipeDocument.model_validate(frame)
    except ValidationError as error:
        names = frozenset(parameter_names)
        lines = [_describe(details, names) for details in error.errors(include_url=False)]
        raise RecipeError("\n".join(lines)) from error


class _Document(BaseModel):
    """Strict: no key beyond the declared ones, no conversion between types."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class RenameDocument(_Document):
    """Names in a source that are other ones in the base."""

    old: str = Field(
        alias="from",
        description="A beginning of names, such as transformer., or a glob such as "
        "enc.*.attn.* whose stars stand for what stays.",
    )
    new: str = Field(
        alias="to", description="What stands there in the base; with as many stars. May be empty."
    )


class SourceDocument(_Document):
    """A model being merged."""

    path: PathText = Field(
        description="Model or adapter to merge: a directory or a file, relative to the working "
        "directory, or org/model[@revision] on the Hugging Face hub."
    )
    adapter: PathText | None = Field(
        default=None,
        description="Adapter of this model, merged into it while it is read; the model is then no adapter "
        "itself.",
    )
    component: str | None = Field(
        default=None,
        min_length=1,
        description="Of an adapter of several parts of a pipeline, the part to take: unet, "
        "transformer, text_encoder, text_encoder_2. Of a model, the part of a pipeline that it is.",
    )
    rename: list[RenameDocument] = Field(
        default_factory=list,
        description="Names that differ from the base's; of each name the first that fits counts.",
    )


class RuleDocument(_Document):
    """An exception for the tensors whose name matches a glob; the first match wins."""

    tensors: str = Field(
        min_length=1, description="Shell-style glob on the whole tensor name, such as *.mlp.*"
    )
    copy_from: Copy | None = Field(
        default=None,
        alias="copy",
        description="Copy these tensors unchanged: from the base, or from the source with this "
        "index, counted from 0.",
    )
    drop: bool = Field(default=False, description="Leave these tensors out of the output.")
    dtype: Annotated[RuleDType, BeforeValidator(word_of(RuleDType))] | None = Field(
        default=None,
        description="keep: store these tensors in the type that they have, whatever output.dtype "
        "says.",
    )
    mismatch: Annotated[MismatchPolicy, BeforeValidator(word_of(MismatchPolicy))] | None = Field(
        default=None, description="As at the top level, for these tensors."
    )


class LayerRangeDocument(_Document):
    """Consecutive layers of one model."""

    source: Copy = Field(
        description="The base, or the index of the source, counted from 0; each at most once in a slice."
    )
    layers: Layers


class LayerBaseDocument(_Document):
    """Consecutive layers that those of a slice were tuned from."""

    source: int = Field(
        ge=0,
        description="The index of the source whose layers they are, counted from 0; it is not merged into "
        "the slice.",
    )
    layers: Layers


class LayerSliceDocument(_Document):
    """Consecutive layers of the result, merged of as many layers of each model."""

    sources: list[LayerRangeDocument] = Field(
        min_length=1,
        description="Which layers of which models. A base that is not listed gives those that the first "
        "of them gives.",
    )
    base: LayerBaseDocument | None = Field(
        default=None,
        description="The layers that task vectors are taken from in this slice, of another model than the "
        "recipe's base.",
    )


class OutputDocument(_Document):
    """How the result is stored."""

    dtype: OutputDType = Field(
        default=None,
        description="Element type of merged tensors; without it each keeps the base's, or the "
        "first source's; promoted: the narrowest that holds the values of all its inputs.",
    )
    max_shard_size: ShardSize = Field(
        default=None,
        description="Largest output file: bytes, or text with GB (10^9) or GiB (2^30). Without it, one "
        "file stays one file, and several are cut at 5GB.",
    )
    companions: Companions = Field(
        default=None,
        description="Where configuration and tokenizer come from: base, the index of a source "
        "counted from 0, or a directory; for all, or by kind.",
    )
    chat_template: Annotated[str, BeforeValidator(accept_template)] | None = Field(
        default=None,
        description="Chat template: auto (that of most inputs), chatml, llama3, mistral, alpaca, exaone, or "
        "a text in Jinja. Without it that of the inputs stays.",
    )
    quantization: (
        Annotated[QuantizationPolicy, BeforeValidator(word_of(QuantizationPolicy))] | None
    ) = Field(
        default=None,
        description="as base: weights that the base stores as float8 codes with scales are stored so "
        "again, with scales found anew. Without it they are stored as numbers.",
    )


_PLAIN, _TABLE = "text", "mapping"
"""The forms of a base; pydantic has them in the place of what is wrong."""


class BaseDocument(_Document):
    """A base that is another model with an adapter merged into it."""

    path: PathText = Field(
        description="The model: a directory or a file, relative to the working directory, or "
        "org/model[@revision] on the Hugging Face hub."
    )
    adapter: PathText = Field(description="The adapter, merged into it first.")


class RecipeDocument(_Document):
    """A merge recipe for streammerge."""

    method: str = Field(description="Name of the merge method.")
    base: (
        Annotated[
            Annotated[PathText, Tag(_PLAIN)] | Annotated[BaseDocument, Tag(_TABLE)],
            Discriminator(lambda value: _TABLE if isinstance(value, dict) else _PLAIN),
        ]
        | None
    ) = Field(
        default=None,
        description="Model the sources were tuned from: a directory or a file, relative to the "
        "working directory, or org/model[@revision] on the Hugging Face hub; or path and adapter of one.",
    )
    sources: list[SourceDocument] = Field(
        min_length=1, description="The models being merged, in order."
    )
    parameters: dict[str, object] = Field(
        default_factory=dict,
        description="Parameters of the method for all tensors; a source or a rule may differ.",
    )
    rules: list[RuleDocument] = Field(
        default_factory=list, description="Exceptions by tensor name; the first match wins."
    )
    layers: list[LayerSliceDocument] = Field(
        default_factory=list,
        description="The layers of the result, slice by slice, where they are not those of the inputs.",
    )
    mixture: Annotated[
        Mixture | None, PlainValidator(accept_mixture), WithJsonSchema(MIXTURE_SCHEMA)
    ] = Field(
        default=None,
        description="Make the sources the experts of a mixture, of which the base gives all else: form, "
        "experts_per_token, gates (random, uniform, embeddings or a file), shared, prompts.",
    )
    semantics: Annotated[Semantics | None, BeforeValidator(word_of(Semantics))] = Field(
        default=None, description="Whose definition of the method is meant, where they differ."
    )
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="Seed of the random masks.")
    missing: Annotated[MissingPolicy, BeforeValidator(word_of(MissingPolicy))] = Field(
        default=MissingPolicy.ERROR,
        description="A tensor that some source lacks: refuse it, or take the base's.",
    )
    mismatch: Annotated[MismatchPolicy, BeforeValidator(word_of(MismatchPolicy))] = Field(
        default=MismatchPolicy.ERROR,
        description="A tensor whose shapes differ along one dimension: refuse it, or merge what all "
        "have in common and keep the rest of the base's, or of the largest source's.",
    )
    non_finite: Annotated[NonFinitePolicy, BeforeValidator(word_of(NonFinitePolicy))] = Field(
        default=NonFinitePolicy.ERROR,
        description="NaN or infinity in an input: refuse it, or keep it.",
    )
    vocabulary: Annotated[
        VocabularyPolicy | DrawnVocabulary,
        PlainValidator(accept_vocabulary),
        WithJsonSchema(SCHEMA),
    ] = Field(
        default=VocabularyPolicy.ERROR,
        description="Tokenizers in which one number stands for two tokens: refuse them, or ignore it and "
        "merge; same refuses all that differ. union, common, base, the index of a source counted from 0, or a "
        "mapping with the key source: draw the rows of all embeddings for that vocabulary.",
    )
    compute_dtype: Annotated[ComputeDType, BeforeValidator(word_of(ComputeDType))] = Field(
        default=ComputeDType.FLOAT32, description="The type that merges are computed in."
    )
    output: OutputDocument = Field(
        default_factory=OutputDocument, description="How the result is stored."
    )


def keys_of(model: type[BaseModel]) -> tuple[str, ...]:
    """Return the keys that the document may have where ``model`` stands."""
    return tuple(field.alias or name for name, field in model.model_fields.items())


def _describe(details: ErrorDetails, parameter_names: frozenset[str]) -> str:
    """Return one line for one of pydantic's findings: the key's path, expected, and got."""
    steps = details["loc"]
    if steps[:1] == ("base",):
        steps = ("base", *steps[2:])
    context = details.get("ctx", {})
    got = shown(details["input"])
    match details["type"]:
        case "said":
            said = details["msg"]
        case "missing":
            said = "this key is required"
        case "extra_forbidden" | "invalid_key":
            said = _refuse_key(steps, parameter_names)
        case "string_type":
            said = f"expected text, got {got}"
        case "string_too_short":
            said = "expected text, got an empty one"
        case "string_too_long":
            found = len(details["input"])
            said = f"expected a path of at most {MAX_PATH_CHARACTERS} characters, got {found}"
        case "string_pattern_mismatch":
            said = f"expected a path without NUL characters, got {got}"
        case "string_unicode":
            said = "expected text that UTF-8 can encode, got a lone surrogate"
        case "bool_type":
            said = f"expected true or false, got {got}"
        case "int_type" | "greater_than_equal" | "less_than_equal":
            said = f"expected an integer in [0, {MAX_SEED}], got {got}"
        case "list_type":
            said = f"expected a list, got {got}"
        case "too_short":
            said = f"expected at least {context['min_length']} entry, got 0"
        case "dict_type" | "model_type":
            said = f"expected a mapping of keys to values, got {got}"
            if steps[:1] == ("sources",) and len(steps) == 2 and isinstance(details["input"], str):
                said += f"; write {{path: {got}}}"
        case _:
            said = f"{details['msg']}, got {got}"
    return f"{key_path(*steps)}: {said}" if steps else said


def _refuse_key(steps: tuple[int | str, ...], parameter_names: frozenset[str]) -> str:
    """Return what is wrong with the unknown key at ``steps`` of the document's frame."""
    key = steps[-1]
    if len(steps) > 1:
        # Sources and rules were stripped of unknown keys, so only "output" can have one.
        return unknown_key(key, keys_of(OutputDocument))
    if key in parameter_names:
        return f'a parameter of the method; move it under "parameters": parameters.{key}'
    if key in keys_of(OutputDocument) and key not in MERGEKIT_KEYS:
        return f'unknown key at the top level; move it under "output": output.{key}'
    return unknown_key(key, {*keys_of(RecipeDocument), GRID_KEY})
