"""What differs between the files beside the inputs: equal shapes do not make equal models.

The plan says it, with whose is taken. Only a number that stands for two different tokens is refused,
because rows of embeddings would be merged that mean different things.

Memory: one file of configuration at a time for each input, and two vocabularies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from streammerge.checkpoint.types import CompanionDifference
from streammerge.checkpoint.vocabularies import (
    Vocabulary,
    find_common,
    has_vocabulary,
    read_vocabulary,
    same_bytes,
)
from streammerge.companions.kinds import TOKENIZER_CONFIG, read_object, read_template
from streammerge.errors import CheckpointError
from streammerge.recipe.types import CompanionKind, DrawnVocabulary, VocabularyPolicy

# Where a file was, who wrote it, and what does not change what a model computes.
_UNIMPORTANT = frozenset(
    {"_name_or_path", "name_or_path", "transformers_version", "_diffusers_version", "_commit_hash"}
    | {"torch_dtype", "dtype", "use_cache", "_attn_implementation", "attn_implementation"}
    | {"_attn_implementation_autoset", "_from_model_config", "unsloth_version", "unsloth_fixed"}
    | {"torchscript", "return_dict", "output_attentions", "output_hidden_states", "pretraining_tp"}
    | {"gradient_checkpointing", "use_return_dict", "auto_map", "_experts_implementation"}
)
# transformers leaves out what has its default, and what that is depends on its version; these are always
# written, or change what a model computes where they are not.
_DECISIVE = (
    *("model_type", "architectures", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "max_position_embeddings"),
    *("rms_norm_eps", "layer_norm_eps", "norm_eps", "hidden_act", "tie_word_embeddings"),
    *("vocab_size", "sliding_window", "bos_token_id", "eos_token_id", "pad_token_id"),
)
_SPECIAL = (
    *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
    *("add_bos_token", "add_eos_token", "add_prefix_space", "tokenizer_class"),
)
_STEP = 1 << 20
_SHOWN_CONFLICTS = 3
_LONGEST_VALUE = 60


_Settings = dict[str, str]
_Read = Callable[[Path], _Settings]


@dataclass(frozen=True, slots=True)
class Participant:
    """A model whose companions are compared."""

    label: str
    """``base``, ``sources[0]``, or a path, as messages name it."""
    directory: Path
    """What its files lie in."""


def compare_companions(
    models: Sequence[Participant],
    taken: Mapping[CompanionKind, Participant],
    *,
    vocabulary: VocabularyPolicy | DrawnVocabulary,
) -> tuple[CompanionDifference, ...]:
    """Return what differs between the inputs, the most decisive first.

    Args:
        models: The inputs that are full models.
        taken: Whose files go to the output, by kind.
        vocabulary: Whether two tokens of one number are refused; where rows are drawn by token, there are none.

    Raises:
        CheckpointError: A file cannot be read, or one number stands for two tokens.
        HeaderError: A file is not what its name says.
    """
    read: dict[CompanionKind, _Read] = {
        CompanionKind.CONFIG: _config,
        CompanionKind.GENERATION_CONFIG: _generation_config,
        CompanionKind.TOKENIZER: _special,
        CompanionKind.CHAT_TEMPLATE: _templates,
    }
    found: list[CompanionDifference] = []
    for kind, read_settings in read.items():
        found += _compare(kind, models, taken[kind], read_settings)
        if kind is CompanionKind.TOKENIZER and isinstance(vocabulary, VocabularyPolicy):
            found += _compare_vocabularies(models, taken[kind], vocabulary)
    return tuple(found)


def _compare(
    kind: CompanionKind,
    models: Sequence[Participant],
    taken: Participant,
    read: _Read,
) -> Iterator[CompanionDifference]:
    """Yield the settings in which a model differs from the one whose files are taken."""
    settings = {each: read(each.directory) for each in dict.fromkeys((*models, taken))}
    # A model without such a file says nothing about it; that the output has none is told below.
    present = {each: values for each, values in settings.items() if values}
    if taken not in present:
        if present:
            owners = tuple((each.label, "has one") for each in present)
            yield CompanionDifference(kind.value, "", taken.label, ((taken.label, None), *owners))
        return
    keys = dict.fromkeys(key for values in present.values() for key in values)
    ranked = sorted(keys, key=lambda key: (_rank(key), key))
    for key in ranked:
        values = {each: said.get(key) for each, said in present.items()}
        mine = values[taken]
        others = {each: value for each, value in values.items() if value != mine}
        if others:
            shown = tuple((each.label, value) for each, value in others.items())
            yield CompanionDifference(kind.value, key, taken.label, ((taken.label, mine), *shown))


def _rank(key: str) -> int:
    last = key.rpartition(".")[2]
    return _DECISIVE.index(last) if last in _DECISIVE else len(_DECISIVE)


def _config(directory: Path) -> _Settings:
    return _settings(directory / "config.json")


def _generation_config(directory: Path) -> _Settings:
    return _settings(directory / "generation_config.json")


def _settings(path: Path) -> _Settings:
    """Return the settings of a configuration by dotted keys, in one spelling for every version."""
    return dict(_flatten(_modern(read_object(path)), ""))


def _flatten(section: Mapping[str, object], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if key in _UNIMPORTANT or value is None:
            continue
        if isinstance(value, dict) and (key.endswith("config") or "model_type" in value):
            yield from _flatten(_modern(value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _shown(value)


def _modern(section: Mapping[str, object]) -> dict[str, object]:
    """Return a section with the rotary settings where transformers had them before version 5."""
    settings = dict(section)
    rope = settings.get("rope_parameters")
    if isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()):
        del settings["rope_parameters"]
        rest = {key: value for key, value in rope.items() if key != "rope_theta"}
        if "rope_theta" in rope:
            settings["rope_theta"] = rope["rope_theta"]
        settings["rope_scaling"] = rest
    scaling = settings.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "default":
        del settings["rope_scaling"]
    return settings


def _shown(value: object) -> str:
    """Return a value as JSON; a long one with a digest, so that it still differs where it differs."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    if len(text) <= _LONGEST_VALUE:
        return text
    digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:8]
    return f"{text[: _LONGEST_VALUE - 20]}… ({len(text)} characters, {digest})"


def _special(directory: Path) -> _Settings:
    """Return the special tokens of a tokenizer, and what it adds by itself."""
    said = read_object(directory / "special_tokens_map.json")
    said |= read_object(directory / TOKENIZER_CONFIG)
    found = {}
    for key in _SPECIAL:
        value = said.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if value is not None:
            found[key] = _shown(value)
    return found


def _templates(directory: Path) -> _Settings:
    template = read_template(directory)
    return {} if template is None else {n: _shown(text) for n, text in template.texts.items()}


def _compare_vocabularies(
    models: Sequence[Participant], taken: Participant, policy: VocabularyPolicy
) -> Iterator[CompanionDifference]:
    """Yield how vocabularies differ from the one that is taken.

    Raises:
        CheckpointError: One number stands for two tokens, and the recipe does not say that it may.
    """
    read: dict[str, Vocabulary] = {}
    for each in models:
        if each.directory == taken.directory or not has_vocabulary(each.directory):
            continue
        if not has_vocabulary(taken.directory):
            _refuse_other(policy, taken, each, "has a vocabulary, and the other has none")
            yield _vocabulary_difference(taken, None, each, "has one")
            continue
        name = find_common(taken.directory, each.directory)
        if name is None:
            _refuse_other(policy, taken, each, "has its vocabulary in a file of another kind")
            yield _vocabulary_difference(taken, "in another file", each, "cannot be compared")
            continue
        mine, theirs = taken.directory / name, each.directory / name
        if same_bytes(mine, theirs):
            continue
        if name not in read:
            read[name] = read_vocabulary(mine)
        vocabulary = read_vocabulary(theirs)
        conflicts = read[name].conflicts(vocabulary)
        if len(conflicts):
            numbers = ", ".join(str(number) for number in conflicts[:_SHOWN_CONFLICTS])
            said = f"{len(conflicts)} numbers stand for other tokens, the first are {numbers}"
            if policy is not VocabularyPolicy.IGNORE:
                raise CheckpointError(
                    f"{theirs}: {said} in {mine} ({each.label} and {taken.label}); equal rows of "
                    "their embeddings would mean different tokens; draw rows by token with `vocabulary: "
                    "base` or `union`, or, to merge them all the same, add `vocabulary: ignore`"
                )
            yield _vocabulary_difference(taken, f"{read[name].count} tokens", each, said)
        elif vocabulary.count != read[name].count:
            said = f"has {vocabulary.count} tokens, and the other {read[name].count}"
            _refuse_other(policy, taken, each, said)
            yield _vocabulary_difference(
                taken, f"{read[name].count} tokens", each, f"{vocabulary.count} tokens"
            )


def _refuse_other(
    policy: VocabularyPolicy, taken: Participant, other: Participant, said: str
) -> None:
    """Raise about a vocabulary that is another one, where the recipe asks for the same."""
    if policy is VocabularyPolicy.SAME:
        raise CheckpointError(
            f"{other.directory}: {said}, of {taken.label} ({taken.directory}); choose models that share one, "
            "or draw rows by token with `vocabulary: union`"
        )


def _vocabulary_difference(
    taken: Participant, mine: str | None, other: Participant, theirs: str
) -> CompanionDifference:
    return CompanionDifference(
        CompanionKind.TOKENIZER.value,
        "vocabulary",
        taken.label,
        ((taken.label, mine), (other.label, theirs)),
    )
