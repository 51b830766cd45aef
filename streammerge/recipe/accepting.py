"""The values that keys of the recipe document may have, and what messages say of all others."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from streammerge.dtypes import DTYPES_BY_TORCH_NAME, DType
from streammerge.recipe.mixture import MixtureError, parse_mixture
from streammerge.recipe.refusing import MAX_SHOWN_CHARACTERS, refuse_choice, shown, unknown_key
from streammerge.recipe.types import (
    BASE,
    CompanionKind,
    DrawnVocabulary,
    Mixture,
    VocabularyPolicy,
)
from streammerge.recipe.vocabulary import VocabularyError, parse_vocabulary
from streammerge.units import parse_size

_Word = TypeVar("_Word", bound=StrEnum)

CHAT_TEMPLATES = ("auto", "chatml", "llama3", "mistral", "alpaca", "exaone")
"""Names of chat templates; all else is a text."""
MAX_SHARD_BYTES = 2**63 - 1
"""The largest file offset."""


def word_of(words: type[_Word]) -> Callable[[object], _Word]:
    """Return a validator that turns a word into its member of ``words``."""

    def parse(value: object) -> _Word:
        if isinstance(value, str) and value in frozenset(words):
            return words(value)
        raise PydanticCustomError("said", "{said}", {"said": refuse_choice(value, words)})

    return parse


def _parse_dtype(value: object) -> DType | Literal["promoted"] | None:
    if value is None:
        return None
    if value == PROMOTED:
        return PROMOTED
    if isinstance(value, str) and value in OUTPUT_DTYPES:
        return OUTPUT_DTYPES[value]
    said = refuse_choice(value, [*(name for name in OUTPUT_DTYPES if name.islower()), PROMOTED])
    raise PydanticCustomError("said", "{said}", {"said": said})


def _parse_shard_size(value: object) -> int:
    said = f'expected a size such as "512MiB" or "5GB", or a number of bytes, got {shown(value)}'
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        try:
            nbytes = value if isinstance(value, int) else parse_size(value)
        except OverflowError:
            nbytes = 0
        except ValueError:
            raise PydanticCustomError("said", "{said}", {"said": said}) from None
        if 0 < nbytes <= MAX_SHARD_BYTES:
            return nbytes
        said = f"expected from 1 to {MAX_SHARD_BYTES} bytes, got {shown(value)}"
    raise PydanticCustomError("said", "{said}", {"said": said})


def _parse_copy(value: object) -> int:
    if value == "base":
        return BASE
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    said = f"expected base, or the index of a source counted from 0, got {shown(value)}"
    raise PydanticCustomError("said", "{said}", {"said": said})


def accept_template(value: object) -> str | None:
    """Return a name of a template, or its text."""
    if value is None or (isinstance(value, str) and (value in CHAT_TEMPLATES or "{" in value)):
        return value
    said = f"expected {', '.join(CHAT_TEMPLATES)} or a text in Jinja, got {shown(value)}"
    raise PydanticCustomError("said", "{said}", {"said": said})


def accept_vocabulary(value: object) -> VocabularyPolicy | DrawnVocabulary:
    """Return what the key ``vocabulary`` says."""
    try:
        return parse_vocabulary(value)
    except VocabularyError as error:
        raise PydanticCustomError("said", "{said}", {"said": str(error)}) from None


def accept_mixture(value: object) -> Mixture | None:
    """Return what the key ``mixture`` says."""
    try:
        return parse_mixture(value)
    except MixtureError as error:
        raise PydanticCustomError("said", "{said}", {"said": str(error)}) from None


def _parse_range(value: object) -> list[int]:
    """Return the first layer and the one after the last."""
    whole = isinstance(value, list) and all(type(each) is int for each in value)
    if isinstance(value, list) and whole and len(value) == 2 and 0 <= value[0] < value[1]:
        return value
    got = str(value) if whole and len(str(value)) < MAX_SHOWN_CHARACTERS else shown(value)
    said = f"expected [first, end], the first layer counted from 0 and the one after the last, got {got}"
    raise PydanticCustomError("said", "{said}", {"said": said})


def _parse_origin(value: object) -> int | str:
    if value == "base":
        return BASE
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and 0 < len(value) <= MAX_PATH_CHARACTERS and "\0" not in value:
        return value
    said = "expected base, the index of a source counted from 0, or a directory, got " + shown(
        value
    )
    raise PydanticCustomError("said", "{said}", {"said": said})


def _parse_companions(value: object) -> dict[CompanionKind, int | str]:
    """Return the origin of each kind; one for all is one for each."""
    if not isinstance(value, dict):
        return dict.fromkeys(CompanionKind, _parse_origin(value))
    kinds = [kind.value for kind in CompanionKind]
    for key in value:
        if key not in kinds:
            said = f"{shown(key)}: {unknown_key(key, kinds)}"
            raise PydanticCustomError("said", "{said}", {"said": said})
    return {CompanionKind(key): _parse_origin(origin) for key, origin in value.items()}


PROMOTED: Literal["promoted"] = "promoted"
"""The word for the narrowest type that holds the values of all inputs of a tensor."""
OUTPUT_DTYPES = {
    name: dtype
    for torch_name, dtype in DTYPES_BY_TORCH_NAME.items()
    if dtype.is_float
    for name in (torch_name, dtype.value)
}
"""Every accepted spelling of an output dtype: torch's names and the safetensors codes."""

MAX_PATH_CHARACTERS = 4095
"""Linux takes no longer ones, and others do not either, or hardly."""
# A NUL ends a path for the operating system, so such a path would name another file.
PathText = Annotated[
    str, Field(min_length=1, max_length=MAX_PATH_CHARACTERS, pattern=r"^[^\x00]+$")
]
Copy = Annotated[
    int,
    BeforeValidator(_parse_copy),
    WithJsonSchema({"anyOf": [{"const": "base"}, {"type": "integer", "minimum": 0}]}),
]
_ORIGIN_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "minLength": 1, "maxLength": MAX_PATH_CHARACTERS},
    ]
}
Companions = Annotated[
    dict[CompanionKind, int | str] | None,
    BeforeValidator(_parse_companions),
    WithJsonSchema(
        {
            "anyOf": [
                *_ORIGIN_SCHEMA["anyOf"],
                {
                    "type": "object",
                    "properties": {kind.value: _ORIGIN_SCHEMA for kind in CompanionKind},
                    "additionalProperties": False,
                },
            ]
        }
    ),
]
OutputDType = Annotated[
    DType | Literal["promoted"] | None,
    BeforeValidator(_parse_dtype),
    WithJsonSchema({"enum": [*OUTPUT_DTYPES, PROMOTED, None]}),
]
_TWO_NUMBERS = {"items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}
Layers = Annotated[
    list[int],
    BeforeValidator(_parse_range),
    WithJsonSchema({"type": "array", **_TWO_NUMBERS}),
    Field(description="The first layer, counted from 0, and the one after the last."),
]
ShardSize = Annotated[
    int | None,
    BeforeValidator(_parse_shard_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": MAX_SHARD_BYTES},
                {
                    "type": "string",
                    "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*(([KMGTkmgt][Ii]?)?[Bb])?\s*$",
                },
            ]
        }
    ),
]
