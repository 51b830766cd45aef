"""Which tensors of the inputs belong together, and what is to be done with each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from streammerge.adapters.adapted import AdaptedModel
from streammerge.adapters.changes import Change
from streammerge.assignment.advising import opaque_message
from streammerge.assignment.types import Action, AssignedTensor, Assignment, Model, Setting
from streammerge.checkpoint.types import TensorEntry
from streammerge.dtypes import DType
from streammerge.errors import (
    MissingTensorError,
    RecipeError,
    ShapeMismatchError,
    UnsupportedDTypeError,
    printable,
)
from streammerge.methods.base import MergeMethod, Operand, Scope
from streammerge.recipe.resolving import Resolved
from streammerge.recipe.types import BASE, MissingPolicy, Recipe

_RESERVED_NAME = "__metadata__"
"""PyTorch files may use this name, safetensors headers may not."""
_LISTED = 10
"""Names that a message lists before it counts the rest."""


def align_tensors(
    recipe: Recipe,
    labels: Sequence[str],
    checkpoints: Sequence[Model],
    resolve: Callable[[str], Resolved],
    *,
    method: MergeMethod,
    known: Collection[str] = (),
) -> Assignment:
    """Decide about every tensor of every input.

    Args:
        recipe: What is asked for.
        labels: How messages name each model; the base first, if there is one.
        checkpoints: The models, in the same order.
        resolve: What the recipe says about a tensor name.
        method: What the recipe's method does with a base, and with sources that equal it.
        known: Names that rules may speak of besides: other names of the same tensors.

    Raises:
        MissingTensorError: A tensor is not in every input; all of them are listed.
        ShapeMismatchError: A tensor has two shapes.
        UnsupportedDTypeError: A tensor is a float in one input and an integer in another.
        RecipeError: A rule copies a tensor from a model that has none of that name.
    """
    return _Aligner(recipe, labels, checkpoints, resolve, method).run(known)


class _Aligner:
    """Holds the tables that the decision about one tensor consults and extends."""

    def __init__(
        self,
        recipe: Recipe,
        labels: Sequence[str],
        checkpoints: Sequence[Model],
        resolve: Callable[[str], Resolved],
        method: MergeMethod,
    ) -> None:
        self._recipe = recipe
        self._labels = labels
        self._checkpoints = checkpoints
        self._resolve = resolve
        self._has_base = recipe.base is not None
        self._method = method
        self._setting_index: dict[tuple[object, ...], int] = {}
        self._settings: list[Setting] = []
        self._dropped: list[str] = []
        self._copied: list[str] = []
        self._missing: list[str] = []
        self._opaque: list[tuple[str, DType]] = []
        # Where no task vectors are taken, a base only lends copies.
        merges_base = method.operand is Operand.TASK_VECTORS
        self._first_merged = 1 if self._has_base and not merges_base else 0
        self._adapted = {
            index: each for index, each in enumerate(checkpoints) if isinstance(each, AdaptedModel)
        }
        self._only_adapted = len(self._adapted) == len(checkpoints) - self._has_base

    def run(self, known: Collection[str]) -> Assignment:
        names = dict.fromkeys(name for each in self._checkpoints for name in each.tensors)
        _check_rules_match(self._recipe, [*names, *known])
        tensors = [tensor for name in names if (tensor := self._decide(name)) is not None]
        if self._missing:
            raise MissingTensorError(_missing_message(self._missing, has_base=self._has_base))
        if self._opaque:
            raise UnsupportedDTypeError(
                opaque_message(self._opaque, names, has_base=self._has_base)
            )
        return Assignment(
            tuple(tensors), tuple(self._settings), tuple(self._dropped), tuple(self._copied)
        )

    def _decide(self, name: str) -> AssignedTensor | None:
        if name == _RESERVED_NAME and not self._resolve(name).drop:
            raise UnsupportedDTypeError(
                f"a tensor is called {name}, which safetensors keeps for itself; rename it, or drop "
                f"it by a rule {{tensors: {name}, drop: true}}"
            )
        resolved = self._resolve(name)
        entries = [each.tensors.get(name) for each in self._checkpoints]
        if resolved.drop:
            self._dropped.append(name)
            return None
        if resolved.copy is not None:
            return self._copy_by_rule(name, entries, resolved.copy)
        if self._adapted:
            decided = self._decide_by_adapters(name, entries)
            if decided is not None:
                return decided
        base = entries[0] if self._has_base else None
        # An adapter that says nothing about a tensor leaves it as it is in the base.
        lent = {index for index in self._adapted if entries[index] is None and base is not None}
        first_merged = 0 if lent else self._first_merged
        merged = range(first_merged, len(entries))
        absent = [
            self._labels[index]
            for index in range(self._first_merged, len(entries))
            if entries[index] is None and index not in lent
        ]
        if absent:
            if self._recipe.missing is MissingPolicy.BASE and base is not None:
                self._copied.append(name)
                return self._copied_tensor(name, entries, 0)
            self._missing.append(f"{printable(name)} is not in {', '.join(absent)}")
            return None
        inputs = tuple(entry if index in merged else None for index, entry in enumerate(entries))
        opaque = [entry.dtype for entry in inputs if entry is not None and entry.dtype.is_opaque]
        if opaque:
            self._opaque.append((name, opaque[0]))
            return None
        first = self._check_shapes(name, inputs)
        if not all(entry.dtype.is_float for entry in inputs if entry is not None):
            return self._integers(name, first, inputs)
        dtype = self._recipe.output.dtype or (entries[0] or first).dtype
        setting = self._setting(resolved)
        changes = self._changes(name)
        return AssignedTensor(name, first.shape, dtype, Action.MERGE, inputs, setting, changes)

    def _changes(self, name: str) -> tuple[Change, ...]:
        return tuple(
            replace(change, model=index)
            for index, model in self._adapted.items()
            for change in model.changes.get(name, ())
        )

    def _decide_by_adapters(
        self, name: str, entries: Sequence[TensorEntry | None]
    ) -> AssignedTensor | None:
        """Decide about a tensor that no method can merge, since at most one adapter has it its way.

        Returns None for tensors that are merged like those of models.
        """
        base = entries[0] if self._has_base else None
        touching = [
            index
            for index, model in self._adapted.items()
            if entries[index] is not None or name in model.changes
        ]
        params = self._method.bind(self._resolve(name).values)
        if base is not None and self._only_adapted and not touching:
            need = self._method.reduction(params)
            # Its zeros count among the entries that a threshold over the model keeps a share of.
            counts = need is not None and need.scope is Scope.MODEL
            kept = self._method.keeps_base(params) and not counts
            return self._stored(name, entries, 0) if kept else None
        full = [i for i in range(1, len(entries)) if i not in self._adapted and entries[i]]
        if len(touching) != 1 or full:
            return None
        (index,) = touching
        entry = entries[index]
        if entry is None:
            return None
        changes = self._changes(name)
        # A head that the base lacks, or an embedding for more tokens: there is nothing to merge
        # it with, so it is taken as it is.
        alone = base is None or base.shape != entry.shape
        if not changes and (alone or self._method.takes_whole(params, index - 1)):
            return self._stored(name, entries, index)
        if not alone:
            return None
        dtype = self._recipe.output.dtype or (base or entry).dtype
        inputs = (entry, *(None for _ in entries[1:]))
        setting = self._setting(self._resolve(name))
        return AssignedTensor(
            name, entry.shape, dtype, Action.MERGE, inputs, setting, changes, base_owner=index
        )

    def _stored(
        self, name: str, entries: Sequence[TensorEntry | None], model: int
    ) -> AssignedTensor:
        """Take a tensor from one model, in the type that the output has it in."""
        copied = self._copied_tensor(name, entries, model)
        base = entries[0] if self._has_base else None
        dtype = self._recipe.output.dtype or (base or copied).dtype
        if copied.dtype == dtype or not copied.dtype.is_float:
            return copied
        return replace(copied, dtype=dtype, action=Action.CONVERT)

    def _copy_by_rule(
        self, name: str, entries: Sequence[TensorEntry | None], copy: int
    ) -> AssignedTensor:
        model = 0 if copy == BASE else copy + self._has_base
        if entries[model] is None and model in self._adapted:
            raise RecipeError(
                f"rules: {printable(name)} is to be copied from {self._labels[model]}, an adapter that "
                "does not bring the tensor along; merge the adapter into the base first and name "
                "the result, or copy from the base"
            )
        if entries[model] is None:
            raise RecipeError(
                f"rules: {printable(name)} is to be copied from {self._labels[model]}, which has no such "
                f"tensor; add a rule before it that drops or merges {printable(name)}"
            )
        if model in self._adapted and name in self._adapted[model].changes:
            raise RecipeError(
                f"rules: {printable(name)} is to be copied from {self._labels[model]}, an adapter that "
                "brings the tensor along and changes it; merge the adapter into the base first and "
                "name the result, or copy from the base"
            )
        return self._copied_tensor(name, entries, model)

    def _copied_tensor(
        self, name: str, entries: Sequence[TensorEntry | None], model: int
    ) -> AssignedTensor:
        entry = entries[model]
        assert entry is not None  # noqa: S101 - both callers looked
        only = tuple(entry if index == model else None for index in range(len(entries)))
        return AssignedTensor(name, entry.shape, entry.dtype, Action.COPY, only, -1)

    def _check_shapes(self, name: str, inputs: Sequence[TensorEntry | None]) -> TensorEntry:
        """Return the first input, after checking that all others have its shape."""
        (first_label, first), *others = self._labelled(inputs)
        for label, entry in others:
            if entry.shape != first.shape:
                advice = f"add a rule {{tensors: {name!r}, copy: ...}} to take it from one model"
                if any(inputs[index] is not None for index in self._adapted):
                    # A rule could not copy what an adapter brings along and changes as well.
                    advice = "merge one adapter into the base first, the other one into the result"
                raise ShapeMismatchError(
                    f"{printable(name)}: shape {list(first.shape)} in {first_label}, "
                    f"{list(entry.shape)} in {label}; only equal shapes merge, {advice}"
                )
        return first

    def _integers(
        self, name: str, first: TensorEntry, inputs: tuple[TensorEntry | None, ...]
    ) -> AssignedTensor:
        (first_label, _), *others = self._labelled(inputs)
        for label, entry in others:
            if entry.dtype != first.dtype:
                raise UnsupportedDTypeError(
                    f"{printable(name)}: {first.dtype} in {first_label}, {entry.dtype} in {label}; "
                    f"integers are only copied, add a rule {{tensors: {name!r}, copy: ...}}"
                )
        return AssignedTensor(name, first.shape, first.dtype, Action.COPY_IF_EQUAL, inputs, -1)

    def _labelled(self, inputs: Sequence[TensorEntry | None]) -> list[tuple[str, TensorEntry]]:
        pairs = zip(self._labels, inputs, strict=True)
        return [(label, entry) for label, entry in pairs if entry is not None]

    def _setting(self, resolved: Resolved) -> int:
        index = self._setting_index.get(resolved.values)
        if index is None:
            index = self._setting_index[resolved.values] = len(self._settings)
            self._settings.append(Setting(resolved.values))
        return index


def _check_rules_match(recipe: Recipe, names: Iterable[str]) -> None:
    """Raise if a rule is about no tensor at all: its glob is misspelt, or meant for another model."""
    for index, rule in enumerate(recipe.rules):
        if not any(fnmatchcase(name, rule.tensors) for name in names):
            example = printable(next(iter(names), "none"))
            raise RecipeError(
                f'rules[{index}].tensors: no tensor of any input matches "{printable(rule.tensors)}"; the names '
                f'look like "{example}", correct the glob or remove the rule'
            )


def _missing_message(missing: list[str], *, has_base: bool) -> str:
    listed = "".join(f"\n  {line}" for line in missing[:_LISTED])
    more = f"\n  and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
    remedy = "set `missing: base` to copy such tensors from the base, or " if has_base else ""
    return (
        f"{len(missing)} tensor(s) are not in every input:{listed}{more}\n"
        f"{remedy}add rules that copy or drop them"
    )
