"""What becomes of tensors that are one in some models: stored once, or each by itself.

Two names stay one tensor in the result if they are one in every model and the recipe treats both
alike. Then one of them is stored, merged once, with one mask and one place in every statistic. Else
all of them are stored, a model that holds only one lends it to the other, and the configuration
says that the embeddings are apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

from streammerge.adapters.onto_base.adapted import AdaptedModel, TunedModel, changes_of
from streammerge.assignment.types import Model, Twins
from streammerge.checkpoint.ties import (
    TIE_KEY,
    Pair,
    declares_tie,
    head_pair,
    iter_pairs,
    iter_unstored_pairs,
    says_nothing,
    scales_when_tied,
)
from streammerge.checkpoint.types import Checkpoint, Note, TensorEntry
from streammerge.errors import CheckpointError, printable
from streammerge.recipe.resolving import Resolved

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class SettledTies:
    """Models without any question of which tensors are one."""

    models: tuple[Model, ...]
    """The models: what is one tensor in all of them has one name, anything else is in each of them
    under every name."""
    notes: tuple[Note, ...]
    """What was decided."""
    known: frozenset[str]
    """Names that stand for another one, so that rules may still speak of them."""
    tied: bool | None
    """What the first model's configuration must be told: that embeddings are apart, or one; None for nothing."""
    twins: tuple[Twins, ...]
    """Tensors that must hold the same values for that to be right."""


def settle_ties(
    models: Sequence[Model], labels: Sequence[str], resolve: Callable[[str], Resolved]
) -> SettledTies:
    """Return models in which every tensor stands for itself.

    Args:
        models: The base, if any, and the sources.
        labels: How messages name each of them.
        resolve: What the recipe says about a tensor name.

    Raises:
        CheckpointError: Tensors come apart in a model whose configuration cannot say so.
    """
    names = dict.fromkeys(chain.from_iterable(map(_names_of, models)))
    # Several families of models may know the same pair.
    pairs = list(dict.fromkeys(iter_pairs(names)))
    configs = _configs(models)
    views = [_View(model, config) for model, config in zip(models, configs, strict=True)]
    if not pairs:
        # No file has a head.
        tied = _has_to_say_so(views, filter(None, map(head_pair, names)))
        return SettledTies(tuple(models), (), frozenset(), tied=tied, twins=())
    joins = _joins(views, pairs)
    joined, apart = _decide(pairs, joins, resolve)
    if any(views[0].says_tied(pair) for pair in apart):
        # The one key that says so is about other pairs as well, and a loader would look for all of
        # their tensors, whether or not any file has them under those names.
        pairs += [pair for pair in iter_unstored_pairs(names) if all(v.joins(pair) for v in views)]
        joins = _joins(views, pairs)
        joined, apart = _decide(pairs, joins, resolve)
        apart += [pair for pair in joined if views[0].parts_with_the_others(pair)]
        joined = [pair for pair in joined if pair not in apart]
    kept = {
        name: next((each for each in group if each in models[0].tensors), group[0])
        for group in _groups(joined)
        for name in group
    }
    settled: list[Model] = []
    twins: list[Twins] = []
    for index, view in enumerate(views):
        groups = _groups(pair for pair, join in zip(pairs, joins[index], strict=True) if join)
        twins += [each for each in view.twins(groups, index) if not resolve(each.other.name).drop]
        settled.append(view.settled(groups, kept))
    parted = [pair for pair in apart if views[0].joins(pair) or views[0].says_tied(pair)]
    unties = [pair for pair in parted if views[0].says_tied(pair)]
    if unties and views[0].scales:
        raise _cannot_say(unties[0], labels[0])
    return SettledTies(
        tuple(settled),
        notes=_notes(kept, parted),
        known=frozenset(kept),
        tied=False if unties else _has_to_say_so(views, joined),
        twins=tuple(twins),
    )


def _has_to_say_so(views: Sequence[_View], joined: Iterable[Pair]) -> bool | None:
    """Return whether the first model leaves open what another one says, or has in its file; None if not.

    What a loader takes for granted where the key is missing depends on its version and the kind of model.
    """
    first, *others = views
    for pair in joined:
        if first.leaves_open(pair) and any(each.knows_tied(pair) for each in others):
            return True
    return None


def _joins(views: Sequence[_View], pairs: Sequence[Pair]) -> list[list[bool]]:
    """Return for every model which pairs are one tensor in it."""
    joins = [[view.joins(pair) for pair in pairs] for view in views]
    # What an adapter leaves alone is in it as it is in the base.
    return [
        [one and of_base for one, of_base in zip(each, joins[0], strict=True)]
        if isinstance(view.model, AdaptedModel)
        else each
        for view, each in zip(views, joins, strict=True)
    ]


def _names_of(model: Model) -> Iterable[str]:
    return (*model.tensors, *model.untied) if isinstance(model, AdaptedModel) else model.tensors


def _configs(models: Sequence[Model]) -> list[Mapping[str, object] | None]:
    """Return each model's configuration, or the first one there is: files alone are of its kind."""
    own = [model.config if isinstance(model, Checkpoint) else None for model in models]
    first = next((config for config in own if config is not None), None)
    return [first if config is None else config for config in own]


def _decide(
    pairs: Sequence[Pair],
    joins: Sequence[Sequence[bool]],
    resolve: Callable[[str], Resolved],
) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs that are one tensor in the result, and those that are not."""
    joined: list[Pair] = []
    apart: list[Pair] = []
    for index, pair in enumerate(pairs):
        inner, outer = resolve(pair.inner), resolve(pair.outer)
        if inner.drop or outer.drop:
            # Of two names of a tensor, what is dropped is the name.
            continue
        one = all(each[index] for each in joins) and inner == outer
        (joined if one else apart).append(pair)
    return joined, apart


def _groups(pairs: Iterable[Pair]) -> list[list[str]]:
    """Return names that pairs connect, the name that files usually hold first."""
    group_of: dict[str, list[str]] = {}
    for pair in pairs:
        one = group_of.setdefault(pair.inner, [pair.inner])
        other = group_of.setdefault(pair.outer, [pair.outer])
        if one is other:
            continue
        # A name that stands for another one's other name comes after it.
        first, second = (other, one) if pair.inner not in (one[0], other[0]) else (one, other)
        first += second
        for name in second:
            group_of[name] = first
    return list({id(group): group for group in group_of.values()}.values())


class _View:
    """One model, and which of its tensors are one."""

    def __init__(self, model: Model, config: Mapping[str, object] | None) -> None:
        self.model = model
        self._config = config
        self._entries = model.tensors

    def joins(self, pair: Pair) -> bool:
        """Return whether the tensors of a pair are one in this model; an adapter only parts them."""
        if isinstance(self.model, AdaptedModel):
            return pair.outer not in self.model.untied
        one, other = self._entries.get(pair.inner), self._entries.get(pair.outer)
        if one is not None and other is not None and not _alike(one, other):
            return False
        if isinstance(self.model, TunedModel) and one is not None and other is not None:
            brought = self.model.replaced
            if (pair.inner in brought) != (pair.outer in brought):
                return False
        changes = changes_of(self.model)
        if (
            one is not None
            and other is not None
            and changes.get(pair.inner) != changes.get(pair.outer)
        ):
            return False
        declared = declares_tie(self._config, pair)
        # Where nothing says so, a tensor that the files lack is another one's twin.
        return declared if declared is not None else one is None or other is None

    def says_tied(self, pair: Pair) -> bool:
        """Return whether the configuration has to be changed for a pair to come apart."""
        return self._config is not None and declares_tie(self._config, pair) is not False

    def leaves_open(self, pair: Pair) -> bool:
        """Return whether the model's own configuration says nothing of a pair."""
        config = self.model.config if isinstance(self.model, Checkpoint) else None
        return config is not None and says_nothing(config, pair)

    def knows_tied(self, pair: Pair) -> bool:
        """Return whether the model says that a pair is one tensor, or has both."""
        if not isinstance(self.model, Checkpoint):
            return False
        both = pair.inner in self._entries and pair.outer in self._entries
        return both or declares_tie(self.model.config, pair) is True

    def parts_with_the_others(self, pair: Pair) -> bool:
        """Return whether a configuration that says that embeddings are apart is about a pair too."""
        untied = {**(self._config or {}), TIE_KEY: False}
        return self._config is not None and declares_tie(untied, pair) is not True

    @property
    def scales(self) -> bool:
        """Whether to say that embeddings are apart would change what the model computes."""
        return scales_when_tied(self._config)

    def twins(self, groups: Iterable[Sequence[str]], index: int) -> list[Twins]:
        """Return the tensors that the model stores more than once."""
        if isinstance(self.model, AdaptedModel):
            return []
        found = []
        for group in groups:
            stored = [self._entries[name] for name in group if name in self._entries]
            found += [Twins(index, stored[0], other) for other in stored[1:]]
        return found

    def settled(self, groups: Iterable[Sequence[str]], kept: Mapping[str, str]) -> Model:
        """Return the model with every tensor under all its names, but under one that is kept."""
        tensors = _spread(self._entries, groups, kept)
        tensors = {
            name: entry
            if entry.name == name or isinstance(self.model, AdaptedModel)
            else replace(entry, name=name)
            for name, entry in tensors.items()
        }
        if isinstance(self.model, Checkpoint) and not isinstance(self.model, TunedModel):
            return replace(self.model, tensors=tensors)
        return replace(
            self.model, tensors=tensors, changes=_spread(self.model.changes, groups, kept)
        )


def _spread(
    table: Mapping[str, _Value], groups: Iterable[Sequence[str]], kept: Mapping[str, str]
) -> dict[str, _Value]:
    """Return a table in which names of one tensor have one value, less the names not kept."""
    spread = dict(table)
    for group in groups:
        held = [name for name in group if name in table]
        for name in group if held else ():
            spread.setdefault(name, table[held[0]])
    return {name: value for name, value in spread.items() if kept.get(name, name) == name}


def _alike(one: TensorEntry, other: TensorEntry) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _notes(kept: Mapping[str, str], parted: Sequence[Pair]) -> tuple[Note, ...]:
    others: dict[str, list[str]] = {}
    for name, keeper in kept.items():
        if name != keeper:
            others.setdefault(keeper, []).append(name)
    tied = [
        Note("tied", f"{keeper} is {' and '.join(names)} too, in every model; stored once")
        for keeper, names in others.items()
    ]
    apart = [
        Note("untied", f"{pair.outer} (tied to {pair.inner} in some model, apart in the result)")
        for pair in parted
    ]
    return (*tied, *apart)


def _cannot_say(pair: Pair, label: str) -> CheckpointError:
    return CheckpointError(
        f"{printable(pair.outer)} comes apart from {printable(pair.inner)}, with which it is one "
        f"tensor in {label}: in models of this kind {TIE_KEY}: false also leaves out a factor before "
        "the head, so no configuration describes the result; merge models that are tied alike, and "
        "treat both tensors alike in `rules`"
    )
