"""What ``config.json`` says of layers: how many there are, and what is listed for each of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from streammerge.checkpoint.types import JsonChange
from streammerge.companions.described import LISTED, Described, sections, stacks
from streammerge.errors import RecipeError

_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_single_layers", "depth"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
)
_PER_LAYER = ("layer_types", "layers_block_type", "no_rope_layers", "hybrid_layer_pattern")
_NUMBERS = ("mlp_only_layers", "cross_attention_layers", "attn_layer_indices", "full_attn_idxs")
"""Keys that list the numbers of the layers that are of some kind."""
_LEADING = ("first_k_dense_replace", "num_dense_layers")
"""Keys that count the layers at the beginning that are of another kind."""


@dataclass(frozen=True, slots=True)
class LayerOrigin:
    """Where a layer of the result comes from."""

    label: str
    """The model."""
    layer: int
    """Which of its layers."""


@dataclass(frozen=True, slots=True)
class ArrangedLayers:
    """Layers that a recipe puts together."""

    stack: str
    """What their names begin with, before the number and its dot."""
    origins: tuple[LayerOrigin, ...]
    """Where each of them comes from."""


def fit_layers(
    own: Described,
    others: Sequence[Described],
    result: Mapping[str, tuple[int, ...]],
    judged: Mapping[str, str],
) -> Iterator[JsonChange]:
    """Yield how many layers there are, where that has changed, and what is listed for each of them."""
    before, after, copied = stacks(own.shapes), stacks(result), stacks(dict.fromkeys(judged, ()))
    for stack in sorted(before.keys() & after.keys()):
        old, new = len(before[stack]), len(after[stack])
        if before[stack] == after[stack]:
            continue
        found = _layer_keys(own, stack, old)
        # Of a prediction layer behind the others, which is not counted, nothing has to be said; nor of
        # numbers that a rule drops and no key counts.
        brought = copied.get(stack, frozenset()) - before[stack]
        if not found and (_layer_keys(own, stack, new) or not brought):
            continue
        if sorted(after[stack]) != list(range(new)):
            missing = sorted(set(range(max(after[stack]) + 1)) - after[stack])
            raise RecipeError(
                f"rules: {stack} would have layers up to {max(after[stack])} without "
                f"{', '.join(map(str, missing[:LISTED]))}; copy or drop them so that none is missing"
            )
        if len(found) != 1:
            keys = ", ".join(f"{s}.{k}" if s else k for s, k in found) or "no known key"
            raise RecipeError(
                f"rules: the number of layers in {stack} changes from {old} to {new}, and {keys} of "
                f"the config of {own.label} may say it; copy no layers, or choose a model whose "
                "configuration fits with `output.companions: {config: …}`"
            )
        section, key = found[0]
        why = f"{stack} has {new} layers, {own.label} has {old}"
        yield JsonChange(section, key, json.dumps(new), why)
        yield from _per_layer(own, others, section, (old, new), why)


def fit_arranged(
    own: Described, others: Sequence[Described], arranged: ArrangedLayers
) -> Iterator[JsonChange]:
    """Yield how many layers a recipe puts together, and what each of them is."""
    origins = arranged.origins
    old, new = len(stacks(own.shapes).get(arranged.stack, ())), len(origins)
    why = f"{new} layers are put together, {own.label} has {old}"
    keys = _layer_keys(own, arranged.stack, old)
    if len(keys) != 1 and new != old:
        said = ", ".join(f"{s}.{k}" if s else k for s, k in keys) or "no known key"
        raise RecipeError(
            f"layers: the number of layers changes from {old} to {new}, and {said} of the config of "
            f"{own.label} may say it; choose a model whose configuration fits with `output.companions: "
            "{config: …}`"
        )
    for section, key in keys:
        if new != old:
            yield JsonChange(section, key, json.dumps(new), why)
    named = {each.label: each for each in (own, *others)}
    for section in dict.fromkeys(section for section, _ in keys):
        settings = dict(sections(own.config))[section]
        for key, value in settings.items():
            lists = {
                label: dict(sections(each.config)).get(section, {}).get(key)
                for label, each in named.items()
            }
            made = _arranged_value(key, value, lists, origins, old)
            if made != value:
                yield JsonChange(section, key, json.dumps(made), why)


def remark_on_depth(
    own: Described, changes: Sequence[JsonChange], result: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Return what the configuration of the result says of its layers, if that is another number than they are.

    A loader makes layers up that are missing, and leaves those out that are too many. Where several keys count
    layers, nobody knows which of them is meant.
    """
    said = {
        (section, key): value
        for section, settings in sections(own.config)
        for key in _LAYERS
        if type(value := settings.get(key)) is int
    }
    said |= {
        (each.section, each.key): json.loads(each.value)
        for each in changes
        if (each.section, each.key) in said and each.value is not None
    }
    numbered = stacks(result)
    if len(said) != 1 or not numbered:
        return None
    ((section, key), count) = said.popitem()
    stack = max(numbered, key=lambda name: len(numbered[name]))
    numbers = numbered[stack]
    if len(numbers) == count and max(numbers) == count - 1:
        return None
    where = f"{section}.{key}" if section else key
    return (
        f"{where} of {own.label} says {count}, and the result has {len(numbers)} layers, {stack}.{min(numbers)} to "
        f"{stack}.{max(numbers)}: a loader makes up what is missing, and leaves out what is too much"
    )


def _arranged_value(
    key: str,
    value: object,
    lists: Mapping[str, object],
    origins: Sequence[LayerOrigin],
    old: int,
) -> object:
    """Return what a key says of layers that are put together; its value if it says nothing of layers."""
    if key in _LEADING and type(value) is int:
        leading = [_leads(lists.get(each.label), each) for each in origins]
        if leading != sorted(leading, reverse=True):
            raise RecipeError(
                f"layers: {key} counts the layers at the beginning that are of another kind, and these come "
                "after others; take them first"
            )
        return sum(leading)
    if not isinstance(value, list):
        return value
    if key in _PER_LAYER and len(value) == old:
        return [_of_layer(lists.get(each.label), each, key) for each in origins]
    if key in _NUMBERS:
        return [
            number
            for number, each in enumerate(origins)
            if isinstance(listed := lists.get(each.label), list) and each.layer in listed
        ]
    return value


def _leads(count: object, origin: LayerOrigin) -> bool:
    return type(count) is int and origin.layer < count


def _of_layer(listed: object, origin: LayerOrigin, key: str) -> object:
    if not isinstance(listed, list) or len(listed) <= origin.layer:
        raise RecipeError(
            f"layers: {key} lists what each layer is, and the configuration of {origin.label} does not "
            f"say it of layer {origin.layer}; add it there"
        )
    return listed[origin.layer]


def _layer_keys(own: Described, stack: str, count: int) -> list[tuple[str, str]]:
    """Return the sections and keys of a configuration that may say that a stack has so many layers."""
    found = [
        (section, key)
        for section, settings in sections(own.config)
        for key in _LAYERS
        if settings.get(key) == count and type(settings[key]) is int
    ]
    words = set(stack.replace("_", ".").split("."))
    for narrowed in (
        [(s, k) for s, k in found if ("decoder" in k) == ("decoder" in words)],
        [(s, k) for s, k in found if ("single" in k) == ("single" in words)],
        [(s, k) for s, k in found if ("vision" in s) == bool({"vision", "visual"} & words)],
    ):
        if len(found) > 1 and narrowed:
            found = [each for each in found if each in narrowed]
    return found


def _per_layer(
    own: Described,
    others: Sequence[Described],
    section: str,
    counts: tuple[int, int],
    why: str,
) -> Iterator[JsonChange]:
    old, new = counts
    settings = dict(sections(own.config))[section]
    for key in _PER_LAYER:
        value = settings.get(key)
        if not isinstance(value, list) or len(value) != old:
            continue
        lists = [dict(sections(other.config)).get(section, {}).get(key) for other in others]
        fitting = [each for each in lists if isinstance(each, list) and len(each) == new]
        if new < old:
            value = value[:new]
        elif fitting and fitting[0][:old] == value:
            value = fitting[0]
        elif all(each == value[0] for each in value):
            value = value[:1] * new
        else:
            raise RecipeError(
                f"rules: {why}, and {key} lists what each layer is: nobody says it of the new ones; "
                "choose a model whose configuration fits with `output.companions: {config: …}`"
            )
        yield JsonChange(section, key, json.dumps(value), why)
