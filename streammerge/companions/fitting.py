"""What ``config.json`` has to say of a result whose tensors are not those that it was written for.

A rule that copies a head with other labels, another layer, or a first convolution with more channels
makes a model that its configuration does not describe: it does not load, or loads with tensors ignored.
The keys that are known are changed, and what no known key describes is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from streammerge.checkpoint.ties import iter_pairs
from streammerge.checkpoint.types import JsonChange
from streammerge.companions.depth import ArrangedLayers, fit_arranged, fit_layers
from streammerge.companions.described import (
    STACK,
    Config,
    Described,
    Shapes,
    listed,
    sections,
    stacks,
)
from streammerge.errors import RecipeError, printable

_KNOWN = frozenset({"model_type", "architectures", "_class_name"})
"""What a configuration has that says which model it describes."""
_NUMBER = re.compile(r"\.\d{1,9}(?=\.|$)")
_LABELLED = re.compile(
    r"(?:.*\.)?(?:score|classifier|classifier\.out_proj|classification_head\.out_proj|"
    r"sequence_summary\.summary|logits_proj)\.(?:weight|bias)"
)
_CHANNELS = (
    (re.compile(r"(?:encoder\.)?conv_in\.weight"), 1, "in_channels"),
    (re.compile(r"(?:x_embedder|pos_embed\.proj)\.weight"), 1, "in_channels"),
    (re.compile(r"conv_out\.(?:weight|bias)"), 0, "out_channels"),
    (re.compile(r".*patch_embeddings?\.projection\.weight"), 1, "num_channels"),
)
# Input and output embeddings, which may be one tensor: what is stored of them is decided elsewhere.
_EMBEDDING = re.compile(
    r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings|embed_in|shared|tok_embeddings|"
    r"lm_head|embed_out|output|proj_out|predictions\.decoder|lm_head\.decoder|vocab_projector)"
    r"\.(?:weight|bias)"
)
_BUFFER = re.compile(
    r"(?:.*\.)?(?:inv_freq|position_ids|masked_bias|attn\.bias|num_batches_tracked)"
)


def fit_config(
    own: Described,
    others: Sequence[Described],
    result: Shapes,
    judged: Mapping[str, str],
    *,
    is_first: bool,
    arranged: ArrangedLayers | None = None,
) -> tuple[JsonChange, ...]:
    """Return what a configuration has to say of other tensors than those of its own model.

    Args:
        own: The model whose configuration the output has.
        others: The other models that take part.
        result: The tensors of the output.
        judged: The tensors that the configuration has to describe, with where they come from: those
            that rules copy, or all where the configuration is taken from elsewhere.
        is_first: Whether it is the configuration of the first model, after which the output's tensors
            are called.
        arranged: Where each layer comes from, if the recipe puts them together.

    Raises:
        RecipeError: No key that is known here describes what a rule copies.
    """
    if own.shapes == result or not _KNOWN & own.config.keys():
        return ()
    brought = {name: shape for name, shape in result.items() if name in judged}
    changes = [
        *_fit_architectures(own, others, result, judged),
        *(
            fit_arranged(own, others, arranged)
            if arranged is not None
            else fit_layers(own, others, result, judged)
        ),
        *_fit_labels(own, others, result),
        *_fit_channels(own, result),
        *_fit_vocabulary(own, result),
    ]
    _check_explained(own, brought, judged)
    if not is_first:
        _check_complete(own, result)
    return tuple(changes)


def _fit_architectures(
    own: Described, others: Sequence[Described], result: Shapes, judged: Mapping[str, str]
) -> Iterator[JsonChange]:
    """Yield the class of the model that the result has the tensors of, if it is not its own."""
    made, mine = _form(result), _form(own.shapes)
    extra = {_normal(name) for name in judged} & (made - mine)
    if not extra:
        return
    for other in others:
        if _form(other.shapes) != made:
            continue
        if other.config.get("model_type") == own.config.get("model_type") and (
            "architectures" in other.config
        ):
            value = json.dumps(other.config["architectures"])
            yield JsonChange("", "architectures", value, f"the tensors are those of {other.label}")
            return
    names = [name for name in result if _normal(name) in extra]
    labels = sorted({judged[name] for name in names if name in judged})
    raise RecipeError(
        f"rules: {listed(names)} come(s) from {' and '.join(labels)}, and "
        f"{_class_of(own)} of {own.label} has no such tensor: a loader would ignore it; "
        f"{_advice(others, result, made)}"
    )


def _advice(others: Sequence[Described], result: Shapes, made: frozenset[str]) -> str:
    for other in others:
        form = _form(other.shapes)
        if form == made:
            return (
                f"take the configuration from there too, with `output.companions` of {other.label}"
            )
        surplus = [name for name in result if _normal(name) in made - form]
        if form <= made and surplus:
            rule = f'{{tensors: "{printable(surplus[0])}", drop: true}}'
            return (
                f"without {listed(surplus)} it would be a {_class_of(other)}: add "
                f"{'rules' if len(surplus) > 1 else 'a rule'} such as `{rule}`"
            )
    return "leave these tensors out of the rule, or copy the whole of what they belong to"


def _fit_labels(
    own: Described, others: Sequence[Described], result: Shapes
) -> Iterator[JsonChange]:
    """Yield the labels of a classifier whose rows are as many as another model has labels."""
    for name, shape in result.items():
        if not _LABELLED.fullmatch(name) or not shape:
            continue
        rows, before = shape[0], own.shapes.get(name)
        count = len(_labels(own.config))
        if rows == count or (before is not None and before[0] != count):
            continue
        # Of a head with one output for other reasons, a choice among several texts, labels say nothing.
        owners = [other for other in others if other.shapes.get(name) == shape]
        fitting = [_labels(other.config) for other in owners if len(_labels(other.config)) == rows]
        if owners and not fitting:
            continue
        labels = fitting[0] if fitting else [f"LABEL_{index}" for index in range(rows)]
        why = f"{name} has {rows} rows, {own.label} has {count} labels"
        by_number = {str(index): label for index, label in enumerate(labels)}
        yield JsonChange("", "id2label", json.dumps(by_number), why)
        numbers = {label: index for index, label in enumerate(labels)}
        yield JsonChange("", "label2id", json.dumps(numbers), why)
        if "num_labels" in own.config:
            yield JsonChange("", "num_labels", json.dumps(rows), why)
        return


def _labels(config: Config) -> list[str]:
    """Return the labels in a configuration; two of no name, as in transformers, where it has none."""
    given = config.get("id2label")
    if isinstance(given, dict) and all(str(key).isdecimal() for key in given):
        return [str(given[key]) for key in sorted(given, key=int)]
    count = config.get("num_labels")
    return [f"LABEL_{index}" for index in range(count if isinstance(count, int) else 2)]


def _fit_channels(own: Described, result: Shapes) -> Iterator[JsonChange]:
    changed: dict[str, int] = {}
    for name, dimension, key in _channel_names(result):
        shape, before = result[name], own.shapes.get(name)
        if before is None or before == shape or len(before) != len(shape):
            continue
        if own.config.get(key) != before[dimension]:
            continue
        channels = shape[dimension]
        if changed.setdefault(key, channels) != channels:
            raise RecipeError(f"rules: {name} has {channels} {key}, another tensor {changed[key]}")
    for key, channels in changed.items():
        why = f"the copied tensors have {channels}, {own.label} has {own.config[key]}"
        yield JsonChange("", key, json.dumps(channels), why)


def _channel_names(shapes: Shapes) -> Iterator[tuple[str, int, str]]:
    for name in shapes:
        for pattern, dimension, key in _CHANNELS:
            if pattern.fullmatch(name):
                yield name, dimension, key


def _fit_vocabulary(own: Described, result: Shapes) -> Iterator[JsonChange]:
    """Yield how many tokens there are, where all embeddings have other rows than they had."""
    rows = _vocabulary(own.config)
    mine = [
        name
        for name, shape in own.shapes.items()
        if name in result and shape[:1] == (rows,) and _EMBEDDING.fullmatch(name)
    ]
    changed = [name for name in mine if result[name][0] != rows]
    if not changed:
        return
    counts = {result[name][0] for name in mine}
    if len(counts) > 1:
        kept = [name for name in mine if result[name][0] == rows] or mine[1:]
        raise RecipeError(
            f"rules: {changed[0]} would have {result[changed[0]][0]} rows and {kept[0]} "
            f"{result[kept[0]][0]}, and one vocab_size describes both; copy them from the same "
            f'model: {{tensors: "{printable(kept[0])}", copy: …}}'
        )
    for section, settings in sections(own.config):
        if settings.get("vocab_size") == rows:
            count = result[changed[0]][0]
            why = f"{changed[0]} has {count} rows, {own.label} has {rows}"
            yield JsonChange(section, "vocab_size", json.dumps(count), why)
            return


def _check_complete(own: Described, result: Shapes) -> None:
    """Raise if the configuration describes tensors that the result lacks, or none of those it stores."""
    numbers = stacks(result)
    # What is another name of a tensor is a matter of how it is stored, which the configuration is told.
    twins = {pair.outer for pair in iter_pairs({**own.shapes, **result})}
    lacking = [
        name
        for name in own.shapes
        if name not in result
        and name not in twins
        and not _BUFFER.fullmatch(name)
        and not ((layer := STACK.match(name)) and layer["stack"] in numbers)
    ]
    beyond = [
        name
        for name in result
        if name not in own.shapes and name not in twins and _EMBEDDING.fullmatch(name)
    ]
    for names, said in (
        (lacking, "describes {}, which the result lacks"),
        (beyond, "is of a model without {}, which the result has"),
    ):
        if names:
            raise RecipeError(
                f"output.companions: the configuration of {own.label} {said.format(listed(names))}; "
                "take it from a model that stores the same tensors"
            )


def _check_explained(own: Described, brought: Shapes, judged: Mapping[str, str]) -> None:
    """Raise if a copied tensor has another shape and no key that is known says so."""
    rows = _vocabulary(own.config)
    channels = {
        name
        for name, dimension, key in _channel_names(brought)
        if name in own.shapes and own.config.get(key) == own.shapes[name][dimension]
    }
    unexplained = [
        name
        for name, shape in brought.items()
        if own.shapes.get(name, shape) != shape
        and name not in channels
        and not _LABELLED.fullmatch(name)
        and not (own.shapes[name][:1] == (rows,) and own.shapes[name][1:] == shape[1:])
    ]
    if unexplained:
        name = unexplained[0]
        raise RecipeError(
            f"rules: {listed(unexplained)} of {judged[name]}: {name} has the shape "
            f"{list(brought[name])}, {list(own.shapes[name])} in {own.label}, and no key of the config "
            "that is known here says so: the result would not load; copy it from a model of that "
            "shape, or take the configuration from there too with `output.companions`"
        )


def _vocabulary(config: Config) -> object:
    sizes = [settings.get("vocab_size") for _, settings in sections(config)]
    return next((size for size in sizes if isinstance(size, int)), None)


def _form(shapes: Shapes) -> frozenset[str]:
    """Return the names of a model's tensors without numbers, embeddings and what is only kept."""
    return frozenset(
        _normal(name)
        for name in shapes
        if not _EMBEDDING.fullmatch(name) and not _BUFFER.fullmatch(name)
    )


def _normal(name: str) -> str:
    return _NUMBER.sub(".N", name)


def _class_of(model: Described) -> str:
    named = model.config.get("architectures")
    if isinstance(named, list) and named:
        return str(named[0])
    return str(model.config.get("_class_name") or model.config.get("model_type"))
