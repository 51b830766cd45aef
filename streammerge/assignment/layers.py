"""The layers of a model, found from its tensors alone, and models whose layers are put together anew.

Layers are numbered siblings: tensors whose names differ in the first number, counted from 0 without a
gap. What is numbered inside of them, as experts are, is a layer's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import translate

from streammerge.adapters.onto_base.adapted import AdaptedModel, TunedModel, changes_of
from streammerge.adapters.onto_base.changes import Change
from streammerge.assignment.types import Model
from streammerge.checkpoint.types import Checkpoint, Note, TensorEntry
from streammerge.errors import RecipeError, printable
from streammerge.recipe.resolving import Position, has_gradients, is_gradual
from streammerge.recipe.types import BASE, LayerRange, LayerSlice, Recipe

_NUMBERED = re.compile(r"(?P<stack>(?:[^./]+[./])*?)(?P<number>\d{1,6})\.")
_SHARE = 20
"""A stack with less than this part of the elements of the largest one is none: heads and small networks
are numbered too."""
_LAST = re.compile(
    r"(?P<parent>(?:[^./]+[./])*?)(?:lm_head|embed_out|output|score|classifier|pooler|cls|head|norm|norm_f|"
    r"ln_f|project_out|final_\w*norm\w*|last_\w*norm\w*)[./]"
)
"""Names of what comes behind the layers, heads and final norms; all else outside of them comes before."""
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers that follow each other."""

    prefix: str
    """What their names begin with, up to the number."""
    count: int
    """How many there are."""

    def split(self, name: str) -> tuple[int, str] | None:
        """Return the layer that a tensor is in, and the rest of its name; None outside of the stack."""
        if not name.startswith(self.prefix):
            return None
        number, dot, rest = name[len(self.prefix) :].partition(".")
        return (int(number), rest) if dot and number.isdecimal() else None

    def joined(self, layer: int, rest: str) -> str:
        """Return the name of a tensor of some layer."""
        return f"{self.prefix}{layer}.{rest}"


def find_stacks(tensors: Mapping[str, TensorEntry]) -> list[Stack]:
    """Return the stacks of layers that tensors are in, the largest first."""
    numels: dict[str, int] = {}
    rests: dict[str, dict[int, set[str]]] = {}
    for name, entry in tensors.items():
        found = _NUMBERED.match(name)
        if found is None:
            continue
        stack = found["stack"]
        numels[stack] = numels.get(stack, 0) + entry.numel
        layers = rests.setdefault(stack, {})
        layers.setdefault(int(found["number"]), set()).add(name[found.end() :])
    stacks = [
        Stack(prefix, len(layers))
        for prefix, layers in rests.items()
        if len(layers) > 1
        and layers.keys() == set(range(len(layers)))
        and set.intersection(*layers.values())
    ]
    stacks.sort(key=lambda stack: -numels[stack.prefix])
    return [each for each in stacks if numels[each.prefix] * _SHARE >= numels[stacks[0].prefix]]


def depths(stacks: Sequence[Stack]) -> Callable[[str], Position]:
    """Return where tensors stand in models that keep their layers."""

    def position_of(name: str) -> Position:
        for stack in stacks:
            found = stack.split(name)
            if found is not None:
                return Position(_depth(found[0], stack.count))
        return Position()

    return position_of


def _depth(layer: int, count: int) -> float:
    return layer / (count - 1) if count > 1 else 1.0


@dataclass(frozen=True, slots=True)
class Arranged:
    """Models by the names of the result."""

    models: list[Model]
    """The base, if any, and the sources; each with what it gives to the result, called as it is there."""
    position_of: Callable[[str], Position]
    """Where a tensor of the result stands among the layers."""
    models_of: Callable[[str], tuple[int, ...]]
    """Which models a tensor is made of, in order."""
    base_of: Callable[[str], int]
    """Which model's tensor stands in the base's place; 0 for the base itself."""
    notes: tuple[Note, ...] = ()
    """What the plan has to state."""


def arrange_layers(models: Sequence[Model], labels: Sequence[str], recipe: Recipe) -> Arranged:
    """Return the models as the recipe's layers put them together, or as they are.

    Args:
        models: The base, if any, and the sources, each with the names of the first.
        labels: How messages name them.
        recipe: Says which layers the result has.

    Raises:
        RecipeError: The models do not have these layers.
    """
    if recipe.layers:
        return _Arranging(models, labels, recipe, find_stacks(models[0].tensors)).arrange()
    # Where nothing changes from layer to layer, nobody asks where a tensor stands.
    stacks = find_stacks(models[0].tensors) if has_gradients(recipe) else []
    stacks += _stacks_of_rules(recipe, models[0].tensors, stacks)
    everyone = tuple(range(len(models)))
    return Arranged(
        list(models),
        depths(stacks),
        lambda _: everyone,
        lambda _: 0,
        _describe_depths(stacks) if has_gradients(recipe) else (),
    )


def _stacks_of_rules(
    recipe: Recipe, tensors: Mapping[str, TensorEntry], known: Sequence[Stack]
) -> list[Stack]:
    """Return what else are layers among the tensors of a rule with a gradient: a small part's own."""
    found: dict[Stack, None] = {}
    for rule in recipe.rules:
        if is_gradual(rule.parameters.values()):
            fits = re.compile(translate(rule.tensors)).match
            own = {name: entry for name, entry in tensors.items() if fits(name)}
            found |= dict.fromkeys(find_stacks(own))
    return [each for each in found if each not in known]


def _describe_depths(stacks: Sequence[Stack]) -> tuple[Note, ...]:
    if not stacks:
        text = "no numbered layers are found; every tensor has the first value of a gradient"
        return (Note("layers", text),)
    shown = ", ".join(f"{printable(each.prefix)}0 to {each.count - 1}" for each in stacks[:_SHOWN])
    text = f"gradients run over {shown}; tensors outside of layers have the first value"
    return (Note("layers", text),)


class _Arranging:
    """Gives every model's tensors the names that they have in the result."""

    def __init__(
        self,
        models: Sequence[Model],
        labels: Sequence[str],
        recipe: Recipe,
        stacks: Sequence[Stack],
    ) -> None:
        self._models = models
        self._labels = labels
        self._has_base = recipe.base is not None
        self._parts = recipe.layers
        self._stack = _the_stack(stacks, models[0])
        self._counts = [self._count(model) for model in models]
        for index, part in enumerate(self._parts):
            for place, each in enumerate(part.ranges):
                self._check(f"layers[{index}].sources[{place}].layers", each, part)
            if part.base is not None:
                self._check_base(f"layers[{index}].base", part.base, part)
        starts = [
            sum(part.count for part in self._parts[:index]) for index in range(len(self._parts))
        ]
        self._starts = starts
        self._total = sum(part.count for part in self._parts)

    def _model(self, each: LayerRange) -> int:
        return 0 if each.source == BASE else each.source + self._has_base

    def _count(self, model: Model) -> int:
        layers = (self._stack.split(name) for name in all_names(model))
        return max((layer + 1 for layer, _ in filter(None, layers)), default=0)

    def _check(self, where: str, each: LayerRange, part: LayerSlice) -> None:
        model = self._model(each)
        count = self._counts[model]
        # An adapter changes some layers of the base, which has them all.
        adapted = isinstance(self._models[model], AdaptedModel)
        count = self._counts[0] if adapted else count
        if each.end > count:
            raise RecipeError(
                f"{where}: [{each.first}, {each.end}] goes beyond the {count} layers of "
                f"{self._labels[model]}, {printable(self._stack.prefix)}0 to {count - 1}; the second "
                "number is that of the layer after the last one"
            )
        base = next((other for other in part.ranges if other.source == BASE), None)
        if adapted and part.base is not None:
            raise RecipeError(
                f"{where}: {self._labels[model]} is an adapter of the recipe's base, and the slice is compared "
                f"with {self._labels[self._model(part.base)]}; merge the adapter into its base first"
            )
        if adapted and (base is None or (base.first, base.end) != (each.first, each.end)):
            raise RecipeError(
                f"{where}: {self._labels[model]} is an adapter, whose layers are those of the base; "
                f"give the base the same layers, [{each.first}, {each.end}], or merge the adapter into "
                "it first"
            )

    def _check_base(self, where: str, base: LayerRange, part: LayerSlice) -> None:
        """Raise unless a source has the layers that a slice takes from it in the base's place."""
        model = self._model(base)
        if changes_of(self._models[model]) or isinstance(self._models[model], AdaptedModel):
            raise RecipeError(
                f"{where}.source: {self._labels[model]} is an adapter or has one, and a base cannot get one "
                "while it is read; merge the adapter into its model first, and name what comes of it"
            )
        self._check(f"{where}.layers", base, part)

    def arrange(self) -> Arranged:
        """Return everything by the names of the result."""
        arranged: list[Model] = []
        for index, model in enumerate(self._models):
            names = self._new_names(index, model)
            tensors = renamed(model.tensors, names)
            if isinstance(model, AdaptedModel | TunedModel):
                changes = by_new_names(model.changes, names)
                arranged.append(replace(model, tensors=tensors, changes=changes))
            else:
                arranged.append(replace(model, tensors=tensors))
        notes = (self._note(), *self._note_of_others())
        return Arranged(arranged, self._position_of, self._models_of, self._base_of, notes)

    def _new_names(self, index: int, model: Model) -> dict[str, list[str]]:
        """Return the names in the result of each of a model's tensors."""
        names: dict[str, list[str]] = {}
        for name in all_names(model):
            found = self._stack.split(name)
            if found is None:
                # Whoever gives it to the result: what is tied is known only where both are there.
                names[name] = [name]
                continue
            layer, rest = found
            names[name] = [
                self._stack.joined(start + layer - each.first, rest)
                for start, part in zip(self._starts, self._parts, strict=True)
                for each in part.taken
                if self._model(each) == index and each.first <= layer < each.end
            ]
        return names

    def _part_of(self, name: str) -> tuple[int, int | None]:
        """Return the slice that a tensor of the result belongs to, and its layer in there."""
        found = self._stack.split(name)
        if found is None:
            return (len(self._parts) - 1 if self._is_last(name) else 0), None
        for index in reversed(range(len(self._parts))):
            if found[0] >= self._starts[index]:
                return index, found[0] - self._starts[index]
        raise AssertionError(f"{name} is in no slice")

    def _is_last(self, name: str) -> bool:
        """Return whether a tensor comes behind the layers: beside them, or beside what they are in."""
        found = _LAST.match(name)
        return found is not None and self._stack.prefix.startswith(found["parent"])

    def _models_of(self, name: str) -> tuple[int, ...]:
        index, _ = self._part_of(name)
        part = self._parts[index]
        base = () if part.base is None else (0,)
        return (*base, *sorted(self._model(each) for each in part.ranges))

    def _base_of(self, name: str) -> int:
        base = self._parts[self._part_of(name)[0]].base
        return 0 if base is None else self._model(base)

    def _position_of(self, name: str) -> Position:
        index, layer = self._part_of(name)
        part = self._parts[index]
        if layer is None:
            return Position(0.0, index)
        split = self._stack.split(name)
        assert split is not None  # noqa: S101 - it is in a layer
        names = tuple(
            self._stack.joined(each.first + layer, split[1])
            for each in part.ranges
            if each.source != BASE
        )
        return Position(_depth(layer, part.count), index, names)

    def _name(self, each: LayerRange) -> str:
        return self._labels[self._model(each)].split()[0]

    def _note(self) -> Note:
        shown = []
        for start, part in zip(self._starts, self._parts, strict=True):
            of = " with ".join(
                f"{each.first} to {each.end - 1} of {self._name(each)}" for each in part.ranges
            )
            if (own := part.base) is not None:
                of += f" on {own.first} to {own.end - 1} of {self._name(own)} as their base"
            shown.append(f"{start} to {start + part.count - 1} are {of}")
        text = f"{printable(self._stack.prefix)}0 to {self._total - 1}: {'; '.join(shown)}"
        return Note("layers", text)

    def _note_of_others(self) -> Iterable[Note]:
        """State where what lies outside of the layers comes from, if not all from the same models."""
        ends = (self._parts[0], self._parts[-1])
        if len({(part.sources, part.base and part.base.source) for part in ends}) == 1:
            return
        names = dict.fromkeys(name for model in self._models for name in all_names(model))
        outside = [name for name in names if self._stack.split(name) is None]
        for last, where in ((False, "before"), (True, "behind")):
            some = [printable(name) for name in outside if self._is_last(name) is last]
            part = self._parts[-1 if last else 0]
            of = " and ".join(map(self._name, part.ranges))
            if part.base is not None:
                of += f" on {self._name(part.base)} as their base"
            more = f" and {len(some) - _SHOWN} more" if len(some) > _SHOWN else ""
            if some:
                yield Note("layers", f"{where} them {', '.join(some[:_SHOWN])}{more} are of {of}")


def _the_stack(stacks: Sequence[Stack], first: Model) -> Stack:
    """Return the one stack that a recipe's layers are about."""
    if len(stacks) == 1:
        return stacks[0]
    if not stacks:
        example = printable(next(iter(first.tensors), "none"))
        raise RecipeError(
            "layers: no numbered layers are found in the first model, whose tensors look like "
            f'"{example}"; leave the key out to merge tensors of the same name'
        )
    found = ", ".join(f"{printable(each.prefix)}0 to {each.count - 1}" for each in stacks[:_SHOWN])
    raise RecipeError(
        f"layers: the first model has several stacks of layers, {found}; put together anew can be the "
        "layers of a model with one stack"
    )


def all_names(model: Model) -> Iterable[str]:
    """Return the names of all tensors that a model has or changes."""
    if isinstance(model, Checkpoint):
        return model.tensors
    return dict.fromkeys([*model.tensors, *model.changes])


def renamed(
    tensors: Mapping[str, TensorEntry], names: Mapping[str, Sequence[str]]
) -> dict[str, TensorEntry]:
    """Return tensors by their new names, of which one may have any number."""
    return {
        new: entry if new == name else replace(entry, name=new)
        for name, entry in tensors.items()
        for new in names[name]
    }


def by_new_names(
    changes: Mapping[str, tuple[Change, ...]], names: Mapping[str, Sequence[str]]
) -> dict[str, tuple[Change, ...]]:
    """Return changes by the new names of their tensors."""
    return {new: each for name, each in changes.items() for new in names[name]}
