"""Tensors that cannot be merged as the recipe has it: which, why, and the very rules that settle them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate

from streammerge.assignment.common import differing_axis
from streammerge.checkpoint.types import TensorEntry
from streammerge.dtypes import DType
from streammerge.errors import RecipeError, printable
from streammerge.recipe.types import Recipe

_LISTED = 10
"""Names that a message lists before it counts the rest."""
_RULES = 6
"""Rules that a message spells out before it falls back to one per name."""
_RULES_LISTED = 20
"""Rules that a message lists before it counts the rest."""
_OF_OTHER_SIZES = 8
"""Tensors that may differ in shape in models of one size: embeddings, heads, first convolutions."""
_NUMBERS = re.compile(r"(?<![A-Za-z0-9_])\d+(?![A-Za-z0-9_])")
_GLOB_SIGNS = re.compile(r"([*?\[])")


_BUFFERS = re.compile(
    r"(^|\.)(inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias|num_batches_tracked"
    r"|relative_position_index|cos_cached|sin_cached)$"
)
"""Last parts of names of buffers that models compute anew, which older programs stored."""
_AVERAGES = re.compile(r"(^|\.)(model_ema|ema|ema_model|shadow_params)\.")
_POOLERS = re.compile(r"(^|\.)pooler\.")


@dataclass(frozen=True, slots=True)
class Present:
    """A model, as messages name it, and its tensors."""

    label: str
    tensors: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A tensor that is not the same kind of thing everywhere."""

    name: str
    """Its name."""
    present: tuple[tuple[str, TensorEntry], ...]
    """Models by label, with what they have."""
    shapes: bool
    """Whether shapes differ; else types do, and are not all floats."""
    brought: bool
    """Whether an adapter brings it along."""


def missing_message(
    missing: Mapping[str, tuple[int, ...]],
    names: Collection[str],
    models: Sequence[Present],
    *,
    has_base: bool,
) -> str:
    """Return which tensors some models lack, and what to do about each kind of them.

    Args:
        missing: The models that lack a tensor, by its name; at least one.
        names: The names of all tensors of all inputs.
        models: The base, if any, and the sources.
        has_base: Whether the first model is the base.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, absent in missing.items():
        groups.setdefault(absent, []).append(name)
    lines = [f"{len(missing)} tensor(s) are not in every input:"]
    rules: list[str] = []
    for absent, lacking in groups.items():
        where = " and ".join(models[index].label for index in absent)
        lines.append(f"  not in {where}: {len(lacking)}")
        lines += [f"    {printable(name)}{_kind_of(name)}" for name in lacking[:_LISTED]]
        if len(lacking) > _LISTED:
            lines.append(f"    and {len(lacking) - _LISTED} more")
        rules += _rules_for(lacking, absent, names, has_base=has_base)
    other_names = _other_names(models)
    if other_names:
        return "\n".join([*lines, *other_names])
    in_base = has_base and any(0 not in absent for absent in groups)
    if in_base:
        lines.append("`missing: base` copies from the base what sources lack and the base has")
    lines += ["rules that settle them one by one, to keep or to change:", "rules:", *rules]
    return "\n".join(lines)


def _kind_of(name: str) -> str:
    """Return what kind of tensor a name is known for, as a remark."""
    if _BUFFERS.search(name):
        return " (a buffer that models compute anew; usually dropped)"
    if _AVERAGES.search(name):
        return " (an average of weights during training; usually dropped)"
    if _POOLERS.search(name):
        return " (a pooler, which models for other tasks lack)"
    return ""


def _rules_for(
    lacking: Sequence[str], absent: tuple[int, ...], names: Collection[str], *, has_base: bool
) -> list[str]:
    """Return rules that copy what the first model has and drop what it lacks.

    The first model's configuration goes to the output, and describes no tensor that it lacks.
    """
    dropped = [
        name for name in lacking if 0 in absent or _BUFFERS.search(name) or _AVERAGES.search(name)
    ]
    without = set(dropped)
    copied = [name for name in lacking if name not in without]
    source = "base" if has_base else "0"
    rules = [f"  - {{tensors: {glob}, drop: true}}" for glob in _quoted_globs(dropped, names)]
    rules += [f"  - {{tensors: {glob}, copy: {source}}}" for glob in _quoted_globs(copied, names)]
    if len(rules) > _RULES_LISTED:
        rules[_RULES_LISTED:] = [f"  # and {len(rules) - _RULES_LISTED} more of this kind"]
    return rules


def _other_names(models: Sequence[Present]) -> list[str]:
    """Return what to say of a model that has hardly a name in common with the first one."""
    first = models[0]
    lines = []
    for model in models[1:]:
        shared = len(first.tensors.keys() & model.tensors.keys())
        if model.tensors and 2 * shared < min(len(first.tensors), len(model.tensors)):
            example = next(iter(model.tensors.keys() - first.tensors.keys()))
            other = next(iter(first.tensors.keys() - model.tensors.keys()), "none")
            lines.append(
                f"{model.label} has {len(model.tensors)} tensors, {shared} of which have a name that "
                f"{first.label} has too: it is another kind of model, or spells its names otherwise: "
                f'"{printable(example)}" there, "{printable(other)}" in {first.label}; if they are the '
                f"same tensors, say so: sources[...].rename: [{{from: ..., to: ...}}]"
            )
    return lines


def mismatch_message(
    mismatched: Sequence[Mismatch], names: Collection[str], *, has_base: bool
) -> str:
    """Return which tensors have several shapes, or are integers of several types, and what to do.

    Args:
        mismatched: The tensors, at least one.
        names: The names of all tensors of all inputs.
        has_base: Whether there is a base to copy from.
    """
    lines = [f"{len(mismatched)} tensor(s) are not the same in every input:"]
    for each in mismatched[:_LISTED]:
        seen = [
            f"{list(entry.shape) if each.shapes else entry.dtype} in {label}"
            for label, entry in each.present
        ]
        lines.append(
            f"  {printable(each.name)}: {'shape ' if each.shapes else ''}{', '.join(seen)}"
        )
    if len(mismatched) > _LISTED:
        lines.append(f"  and {len(mismatched) - _LISTED} more")
    if any(each.shapes for each in mismatched):
        lines.append("only equal shapes merge")
    if any(not each.shapes for each in mismatched):
        lines.append("integers are only copied, and only where all are of one type")
    if any(each.brought for each in mismatched):
        # A rule could not copy what an adapter brings along and changes as well.
        lines.append("merge one adapter into the base first, the other one into the result")
        return "\n".join(lines)
    differing = sum(each.shapes for each in mismatched)
    if differing > _OF_OTHER_SIZES and 2 * differing > len(names):
        lines.append(
            "so many differ that these are models of other sizes, which have no parameters in common; "
            "name models of one architecture and size"
        )
        return "\n".join(lines)
    common = [each.name for each in mismatched if each.shapes and _have_common(each)]
    settled = set(common)
    others = [each.name for each in mismatched if each.name not in settled]
    source = "base" if has_base else "0"
    rules = [f"  - {{tensors: {glob}, mismatch: common}}" for glob in _quoted_globs(common, names)]
    rules += [f"  - {{tensors: {glob}, copy: {source}}}" for glob in _quoted_globs(others, names)]
    if common:
        lines.append("`mismatch: common` merges what all have, and keeps the rest of the largest")
    return "\n".join([*lines, "rules that settle them, to keep or to change:", "rules:", *rules])


def _have_common(mismatch: Mismatch) -> bool:
    """Return whether `mismatch: common` would merge the tensor: only numbers are ever merged."""
    shapes = [entry.shape for _, entry in mismatch.present]
    return all(entry.dtype.is_float for _, entry in mismatch.present) and (
        differing_axis(shapes) is not None
    )


def opaque_message(
    opaque: Sequence[tuple[str, DType]], names: Collection[str], *, has_base: bool
) -> str:
    """Return what is wrong with tensors of types without arithmetic, and what to do.

    Args:
        opaque: Name and type of each of them, at least one.
        names: The names of all tensors of all inputs, which no glob may catch by accident.
        has_base: Whether there is a base to copy from.
    """
    listed = "".join(f"\n  {printable(name)}: {dtype}" for name, dtype in opaque[:_LISTED])
    more = len(opaque) - _LISTED
    listed += f"\n  and {more} more" if more > 0 else ""
    source = "base" if has_base else "0"
    quoted = _quoted_globs([name for name, _ in opaque], names)
    # What is F8_E8M0 is a scale of something, and nothing is what it was without its scales.
    scales = any(dtype is DType.F8_E8M0 for _, dtype in opaque)
    otherwise = "" if scales else ", here as copies (or `drop: true`)"
    rules = "".join(f"\n  - {{tensors: {glob}, copy: {source}}}" for glob in quoted)
    return (
        f"{len(opaque)} tensor(s) are of a type that has no merge arithmetic and is only ever "
        f"copied:{listed}\nsay what becomes of them{otherwise}:\nrules:{rules}"
    )


def _quoted_globs(chosen: Sequence[str], names: Collection[str]) -> list[str]:
    # A JSON string is a YAML string, whatever the name holds.
    return [
        printable(json.dumps(glob, ensure_ascii=False))
        for glob in (choose_globs(chosen, names) if chosen else ())
    ]


def choose_globs(chosen: Sequence[str], names: Collection[str]) -> list[str]:
    """Return globs that match the chosen names and no other one.

    Numbers between dots become ``*``, so that one glob serves every layer; where that leaves many,
    one glob serves a whole part of the model. Where such globs would catch other names as well, the
    names stand for themselves.

    Args:
        chosen: The names that are to match, at least one.
        names: All names there are.
    """
    wanted = set(chosen)
    numbers = {_NUMBERS.sub("*", _escaped(name)): None for name in chosen}
    for globs in (numbers, _modules(wanted, names)):
        if globs and len(globs) <= _RULES:
            matches = [re.compile(translate(glob)).match for glob in globs]
            if not any(match(name) for name in names if name not in wanted for match in matches):
                return list(globs)
    return [_escaped(name) for name in chosen]


def _modules(wanted: set[str], names: Iterable[str]) -> dict[str, None]:
    """Return globs for modules all of whose tensors are wanted; empty where a name is in none."""
    taken = Counter(prefix for name in names if name not in wanted for prefix in _prefixes(name))
    globs: dict[str, None] = {}
    for name in sorted(wanted):
        prefix = next((each for each in _prefixes(name) if each not in taken), None)
        if prefix is None:
            return {}
        globs[f"{_escaped(prefix)}.*"] = None
    return globs


def _prefixes(name: str) -> list[str]:
    """Return the modules that a tensor is in, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _escaped(name: str) -> str:
    return _GLOB_SIGNS.sub(r"[\1]", name)


def check_rules_match(recipe: Recipe, names: Iterable[str], renamed: Mapping[str, str]) -> None:
    """Raise if a rule is about no tensor at all: its glob is misspelt, or meant for another model.

    Args:
        recipe: What is asked for.
        names: All names that rules may speak of.
        renamed: Names that sources had, with those that rules have to use.

    Raises:
        RecipeError: A glob fits no name.
    """
    for index, rule in enumerate(recipe.rules):
        if any(fnmatchcase(name, rule.tensors) for name in names):
            continue
        where = f'rules[{index}].tensors: "{printable(rule.tensors)}"'
        old = next((name for name in renamed if fnmatchcase(name, rule.tensors)), None)
        if old is not None:
            raise RecipeError(
                f'{where} matches names of a source alone: what is called "{printable(old)}" there is '
                f'"{printable(renamed[old])}" in the result, by which rules speak of it; write it so'
            )
        example = printable(next(iter(names), "none"))
        to_do = "correct the glob or remove the rule"
        if f"rules[{index}].tensors" in recipe.keys:
            to_do += ", in the recipe that `streammerge convert` prints"
        raise RecipeError(
            f'{where} matches no tensor of any input; the names look like "{example}", {to_do}'
        )
