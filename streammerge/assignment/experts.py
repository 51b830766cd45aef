"""Experts that one model stores one by one, and another one as a stack: either is seen as the other.

    experts.3.gate_proj.weight [f, h]    rows 0 to f of   experts.gate_up_proj[3]   [2 f, h]
    experts.3.up_proj.weight   [f, h]    rows f to 2 f
    experts.3.down_proj.weight [h, f]    all of           experts.down_proj[3]      [h, f]

Older models say w1, w3 and w2. A stack of that layout is its experts in a row, byte by byte, so
nothing is copied: a tensor is made of parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from streammerge.checkpoint.types import Checkpoint, Note, TensorEntry
from streammerge.checkpoint.views import joined, sliced

_ONE = re.compile(
    r"(?P<module>.+\.experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w3|w2)\.weight"
)
_STACK = re.compile(
    r"(?P<module>.+\.experts)\.(?P<stack>gate_up_proj|gate_proj|up_proj|down_proj)(?P<end>(\.weight)?)"
)
_MODERN = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_OLD = {modern: old for old, modern in _MODERN.items()}
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj")}
"""Stacks of which each matrix holds the rows of two projections, one below the other."""
_TRANSPOSED = frozenset({"gpt_oss", "aria", "aria_text", "llama4", "llama4_text"})
"""Values of ``model_type`` whose stacks hold transposed matrices, which are no experts in a row."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a model stores its experts."""

    ones: bool
    """Whether one by one."""
    stacks: bool
    """Whether in stacks."""
    old: bool
    """Whether single ones are called w1, w2 and w3."""
    end: str
    """What follows the name of a stack."""
    fused: bool
    """Whether gate and up projection are one stack."""


def match_experts(
    model: Checkpoint, first: Checkpoint, label: str
) -> tuple[Checkpoint, list[Note]]:
    """Return a model with its experts in the layout of the first one, and what was done.

    Args:
        model: A source.
        first: The model whose layout the output has.
        label: How messages name the source.
    """
    if model.tensors.keys() == first.tensors.keys():
        # Names alone tell which experts are stored one by one.
        return model, []
    own, wanted = _layout(model.tensors), _layout(first.tensors)
    kinds = {str((each.config or {}).get("model_type")) for each in (model, first)}
    if kinds & _TRANSPOSED:
        return model, []
    if own.ones and not own.stacks and wanted.stacks and not wanted.ones:
        made = dict(_stacked(model.tensors, wanted))
        what = "one by one, seen as stacks"
    elif own.stacks and not own.ones and wanted.ones and not wanted.stacks:
        made = dict(_split(model.tensors, first.tensors, wanted))
        what = "stacked, seen one by one"
    else:
        return model, []
    gone = {name for names in made.values() for name in names.used}
    tensors = {name: entry for name, entry in model.tensors.items() if name not in gone}
    tensors |= {name: each.entry for name, each in made.items()}
    note = Note("experts", f"{label}: {len(gone)} tensor(s) of experts are {what}: {len(made)}")
    return replace(model, tensors=tensors), [note] if made else []


@dataclass(frozen=True, slots=True)
class _Made:
    """A tensor that is made of others, and which."""

    entry: TensorEntry
    used: tuple[str, ...]


def _layout(tensors: Mapping[str, TensorEntry]) -> _Layout:
    ones = [found for name in tensors if (found := _ONE.fullmatch(name))]
    stacks = [
        found
        for name, entry in tensors.items()
        if len(entry.shape) == 3 and (found := _STACK.fullmatch(name))
    ]
    return _Layout(
        ones=bool(ones),
        stacks=bool(stacks),
        old=any(found["part"] in _MODERN for found in ones),
        end=stacks[0]["end"] if stacks else "",
        fused=any(found["stack"] in _PARTS for found in stacks),
    )


def _stacked(tensors: Mapping[str, TensorEntry], wanted: _Layout) -> Iterator[tuple[str, _Made]]:
    """Yield stacks of experts that are stored one by one, by name."""
    modules: dict[str, dict[str, dict[int, TensorEntry]]] = {}
    for name, entry in tensors.items():
        if (found := _ONE.fullmatch(name)) and len(entry.shape) == 2:
            part = _MODERN.get(found["part"], found["part"])
            modules.setdefault(found["module"], {}).setdefault(part, {})[int(found["expert"])] = (
                entry
            )
    for module, by_part in modules.items():
        groups = [("gate_proj", "up_proj")] if wanted.fused else [("gate_proj",), ("up_proj",)]
        for group in (*groups, ("down_proj",)):
            experts = [by_part.get(part, {}) for part in group]
            stack = _one_stack(experts)
            if stack is not None:
                last = "gate_up_proj" if len(group) == 2 else group[0]
                name = f"{module}.{last}{wanted.end}"
                yield name, _Made(replace(stack, name=name), tuple(_names(experts)))


def _one_stack(experts: list[dict[int, TensorEntry]]) -> TensorEntry | None:
    """Return the projections of all experts as one tensor; None where they are not all alike."""
    count = len(experts[0])
    if not count or any(each.keys() != {*range(count)} for each in experts):
        return None
    ordered = [each[index] for index in range(count) for each in experts]
    if len({(entry.shape, entry.dtype, entry.is_coded) for entry in ordered}) > 1:
        return None
    rows, columns = ordered[0].shape
    return joined("", (count, rows * len(experts), columns), ordered)


def _names(experts: list[dict[int, TensorEntry]]) -> Iterator[str]:
    for each in experts:
        yield from (entry.name for entry in each.values())


def _split(
    tensors: Mapping[str, TensorEntry], first: Mapping[str, TensorEntry], wanted: _Layout
) -> Iterator[tuple[str, _Made]]:
    """Yield the experts of stacks, by name."""
    heights = {
        _MODERN.get(found["part"], found["part"]): entry.shape
        for name, entry in first.items()
        if (found := _ONE.fullmatch(name))
    }
    for name, entry in tensors.items():
        found = _STACK.fullmatch(name)
        if found is None or len(entry.shape) != 3:
            continue
        parts = _PARTS.get(found["stack"], (found["stack"],))
        count, rows, columns = entry.shape
        height = rows // len(parts)
        # Another orientation, or other sizes: nothing of this stack is an expert there.
        if rows % len(parts) or any(heights.get(part) != (height, columns) for part in parts):
            continue
        for expert in range(count):
            for place, part in enumerate(parts):
                last = _OLD[part] if wanted.old else part
                one = f"{found['module']}.{expert}.{last}.weight"
                shape = (height, columns)
                start = (expert * len(parts) + place) * prod(shape)
                yield one, _Made(sliced(entry, one, start, shape), (name,))
