"""Which tensors of the inputs belong together, and what is to be done with each."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from types import MappingProxyType

from streammerge.adapters.onto_base.adapted import AdaptedModel, changes_of
from streammerge.adapters.onto_base.changes import Change
from streammerge.assignment.advising import (
    Mismatch,
    Present,
    check_rules_match,
    mismatch_message,
    missing_message,
    opaque_message,
)
from streammerge.assignment.common import differing_axis, part_along, region_along
from streammerge.assignment.types import Action, AssignedTensor, Assignment, Model, Setting
from streammerge.checkpoint.types import Note, TensorEntry
from streammerge.dtypes import DType, promoted
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

_MASK = re.compile(r"(^|[._])(attn_mask|attention_mask|causal_mask|masked_bias|mask|tril|triu)$")
"""Names of buffers that hold minus infinity, or a large number for it, where attention may not look."""
_MASK_ENDINGS = ("mask", "masked_bias", "tril", "triu", "\n")
"""What all such names end with, which most names do not; the pattern's end is that of a line."""
_SHOWN = 4
_RESERVED_NAME = "__metadata__"
"""PyTorch files may use this name, safetensors headers may not."""


def align_tensors(
    recipe: Recipe,
    labels: Sequence[str],
    checkpoints: Sequence[Model],
    resolve: Callable[[str], Resolved],
    *,
    method: MergeMethod,
    models_of: Callable[[str], tuple[int, ...]],
    base_of: Callable[[str], int],
    known: Collection[str] = (),
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> Assignment:
    """Decide about every tensor of every input.

    Args:
        recipe: What is asked for.
        labels: How messages name each model; the base first, if there is one.
        checkpoints: The models, in the same order.
        resolve: What the recipe says about a tensor name.
        method: What the recipe's method does with a base, and with sources that equal it.
        models_of: Which models a tensor is made of.
        base_of: Which model's tensor stands in the base's place.
        known: Names that rules may speak of besides: other names of the same tensors.
        renamed: Names that sources had, with those that rules have to use.

    Raises:
        MissingTensorError: A tensor is not in every input; all of them are listed.
        ShapeMismatchError: A tensor has two shapes.
        UnsupportedDTypeError: A tensor is a float in one input and an integer in another.
        RecipeError: A rule copies a tensor from a model that has none of that name.
    """
    aligner = _Aligner(
        recipe, labels, checkpoints, resolve, method=method, models_of=models_of, base_of=base_of
    )
    return aligner.run(known, renamed)


class _Aligner:
    """Holds the tables that the decision about one tensor consults and extends."""

    def __init__(
        self,
        recipe: Recipe,
        labels: Sequence[str],
        checkpoints: Sequence[Model],
        resolve: Callable[[str], Resolved],
        *,
        method: MergeMethod,
        models_of: Callable[[str], tuple[int, ...]],
        base_of: Callable[[str], int],
    ) -> None:
        self._recipe = recipe
        self._labels = labels
        self._checkpoints = checkpoints
        self._resolve = resolve
        self._has_base = recipe.base is not None
        self._method = method
        self._models_of = models_of
        self._base_of = base_of
        self._tables = [each.tensors for each in checkpoints]
        self._everyone = tuple(range(len(checkpoints)))
        self._changing = any(changes_of(each) for each in checkpoints)
        self._settings: dict[Setting, int] = {}
        self._numbers: dict[tuple[int, tuple[int, ...]], tuple[Resolved, int]] = {}
        self._dropped: list[str] = []
        self._copied: list[str] = []
        self._missing: dict[str, tuple[int, ...]] = {}
        self._mismatched: list[Mismatch] = []
        self._rests: list[AssignedTensor] = []
        self._notes: list[Note] = []
        self._masks: list[str] = []
        self._partless: dict[tuple[int, str], None] = {}
        self._opaque: list[tuple[str, DType]] = []
        self._uninvolved: list[str] = []
        # Where no task vectors are taken, a base only lends copies.
        merges_base = method.operand is not Operand.WEIGHTS
        self._first_merged = 1 if self._has_base and not merges_base else 0
        self._adapted = {
            index: each for index, each in enumerate(checkpoints) if isinstance(each, AdaptedModel)
        }
        self._only_adapted = len(self._adapted) == len(checkpoints) - self._has_base

    def run(self, known: Collection[str], renamed: Mapping[str, str]) -> Assignment:
        names = dict.fromkeys(chain.from_iterable(self._tables))
        check_rules_match(self._recipe, [*names, *known], renamed)
        tensors = [tensor for name in names if (tensor := self._decide(name)) is not None]
        self._refuse(names)
        self._describe(tensors)
        return Assignment(
            tuple(map(self._lent, (*tensors, *self._rests))),
            tuple(self._settings),
            tuple(self._dropped),
            tuple(self._copied),
            tuple(self._notes),
        )

    def _lent(self, tensor: AssignedTensor) -> AssignedTensor:
        """Say of a tensor whose base is another model's in which one's files that is."""
        owner = self._base_of(tensor.name)
        if not owner or tensor.entries[0] is None:
            return tensor
        return replace(tensor, base_owner=owner)

    def _describe(self, tensors: Sequence[AssignedTensor]) -> None:
        """Note what was decided about many tensors, and refuse what comes to no merge at all."""
        for index, folder in self._partless:
            text = f"{self._labels[index]} has no {folder}, which is in it as it is in the base"
            self._notes.append(Note("parts", text))
        if self._masks:
            shown = ", ".join(map(printable, self._masks[:_SHOWN]))
            text = f"{len(self._masks)} mask(s) are copied if equal everywhere, not merged: {shown}"
            self._notes.append(Note("masks", text))
        if self._uninvolved:
            shown = ", ".join(map(printable, self._uninvolved[:_SHOWN]))
            text = f"{len(self._uninvolved)} tensor(s) of models that give none of these are left out: "
            self._notes.append(Note("layers", text + shown))
        for index in range(self._has_base, len(self._checkpoints) if self._copied else 0):
            if index in self._adapted:
                continue
            label, model = self._labels[index], self._checkpoints[index]
            lacking = sum(name not in model.tensors for name in self._copied)
            if lacking and not any(tensor.entries[index] for tensor in tensors):
                raise MissingTensorError(
                    f"{label}: has {len(model.tensors)} tensors, and none takes part: the base's "
                    f"{lacking} are copied by `missing: base`, since they are called otherwise; name "
                    f"another model, or say which names are the same: sources[...].rename"
                )
            if lacking:
                text = f"{label} lacks {lacking} tensor(s) of the base, which are copied"
                self._notes.append(Note("missing", text))

    def _refuse(self, names: Collection[str]) -> None:
        """Raise about all tensors that could not be decided about, if there are any."""
        models = [
            Present(label, each.tensors)
            for label, each in zip(self._labels, self._checkpoints, strict=True)
        ]
        if self._missing:
            raise MissingTensorError(
                missing_message(self._missing, names, models, has_base=self._has_base)
            )
        if self._opaque:
            raise UnsupportedDTypeError(
                opaque_message(self._opaque, names, has_base=self._has_base)
            )
        if self._mismatched:
            kind = (
                ShapeMismatchError
                if any(each.shapes for each in self._mismatched)
                else UnsupportedDTypeError
            )
            raise kind(mismatch_message(self._mismatched, names, has_base=self._has_base))

    def _decide(self, name: str) -> AssignedTensor | None:
        resolved = self._resolve(name)
        if name == _RESERVED_NAME and not resolved.drop:
            raise UnsupportedDTypeError(
                f"a tensor is called {name}, which safetensors keeps for itself; rename it, or drop "
                f"it by a rule {{tensors: {name}, drop: true}}"
            )
        entries = [table.get(name) for table in self._tables]
        if lender := self._base_of(name):
            entries[0] = entries[lender]
        if resolved.drop:
            self._dropped.append(name)
            return None
        if resolved.copy is not None:
            return self._copy_by_rule(name, entries, resolved.copy)
        involved = self._models_of(name)
        if self._recipe.mixture is not None and involved == (0,):
            return self._taken(name, entries, 0)
        if involved != self._everyone:
            entries = [each if index in involved else None for index, each in enumerate(entries)]
        if not any(entries) and not any(name in each.changes for each in self._adapted.values()):
            self._uninvolved.append(name)
            return None
        if self._adapted:
            decided = self._decide_by_adapters(name, entries)
            if decided is not None:
                return decided
        if all(entries):
            # As nearly always: nothing is lent, and nothing is missing.
            inputs = (None, *entries[1:]) if self._first_merged else tuple(entries)
            return self._merged(name, resolved, entries, inputs)
        base = entries[0] if self._has_base else None
        # An adapter that says nothing about a tensor leaves it as it is in the base; so does a
        # pipeline that lacks the part.
        lent = {
            index
            for index in involved
            if entries[index] is None and base is not None and self._says_nothing(index, name)
        }
        for index in lent - self._adapted.keys():
            self._partless.setdefault((index, name.partition("/")[0]), None)
        first_merged = 0 if lent else self._first_merged
        merged = range(first_merged, len(entries))
        absent = tuple(
            index or self._base_of(name)
            for index in involved
            if index >= self._first_merged and entries[index] is None and index not in lent
        )
        if absent:
            if self._recipe.missing is MissingPolicy.BASE and base is not None:
                self._copied.append(name)
                return self._taken(name, entries, 0)
            self._missing[name] = absent
            return None
        inputs = tuple(entry if index in merged else None for index, entry in enumerate(entries))
        return self._merged(name, resolved, entries, inputs)

    def _says_nothing(self, index: int, name: str) -> bool:
        """Return whether a model is an adapter, or has no part of a tensor's folder."""
        model = self._checkpoints[index]
        if isinstance(model, AdaptedModel):
            return True
        folder, slash, _ = name.partition("/")
        folders = [each for each, _ in model.parts if each]
        return bool(slash and folders) and folder not in folders

    def _merged(
        self,
        name: str,
        resolved: Resolved,
        entries: Sequence[TensorEntry | None],
        inputs: tuple[TensorEntry | None, ...],
    ) -> AssignedTensor | None:
        """Merge a tensor that all inputs have; note what is in the way."""
        present = [entry for entry in inputs if entry is not None]
        opaque = [entry.dtype for entry in present if entry.dtype.is_opaque]
        if opaque:
            self._opaque.append((name, opaque[0]))
            return None
        if resolved.common and (part := self._common(name, entries, inputs)) is not None:
            return part
        first = present[0]
        one_type = all(entry.dtype is first.dtype for entry in present)
        alike = one_type and all(entry.shape == first.shape for entry in present)
        if not alike and not self._agree(name, inputs):
            return None
        changes = self._changes(name)
        # Minus infinity less itself is no number.
        is_mask = _is_mask(name) and one_type and not changes
        if is_mask and first.dtype.is_float:
            self._masks.append(name)
        if is_mask or not first.dtype.is_float:
            return AssignedTensor(name, first.shape, first.dtype, Action.COPY_IF_EQUAL, inputs, -1)
        dtype = self._merged_dtype(resolved, entries[0] or first, inputs)
        setting = self._setting(name, resolved)
        return AssignedTensor(name, first.shape, dtype, Action.MERGE, inputs, setting, changes)

    def _common(
        self,
        name: str,
        entries: Sequence[TensorEntry | None],
        inputs: Sequence[TensorEntry | None],
    ) -> AssignedTensor | None:
        """Merge the part that all inputs have, and take the rest; None where shapes do not allow it."""
        present = [entry for entry in inputs if entry is not None]
        axis = differing_axis([entry.shape for entry in present])
        plain = all(entry.dtype.is_float for entry in present) and not self._changes(name)
        if axis is None or not plain or any(inputs[index] for index in self._adapted):
            return None
        # The base first, if it is the largest; else the first source that is.
        lending = [
            index
            for index, entry in enumerate(entries)
            if entry is not None
            and differing_axis([entry.shape, present[0].shape]) in (axis, None)
            and len(entry.shape) == len(present[0].shape)
        ]
        keeper = max(lending, key=lambda index: (_size(entries[index], axis), -index))
        whole = entries[keeper]
        assert whole is not None  # noqa: S101 - only those that are there were asked
        common = min(entry.shape[axis] for entry in present)
        size = whole.shape[axis]
        parts = tuple(entry and part_along(entry, axis, 0, common) for entry in inputs)
        first = next(part for part in parts if part is not None)
        resolved = self._resolve(name)
        dtype = self._merged_dtype(resolved, entries[0] or present[0], inputs)
        rest = [
            part_along(whole, axis, common, size) if index == keeper else None
            for index in range(len(entries))
        ]
        taken = self._taken(name, rest, keeper)
        same = whole.dtype == dtype and not whole.is_coded
        self._rests.append(
            replace(
                taken,
                dtype=dtype,
                action=Action.COPY if same else Action.CONVERT,
                region=region_along(whole.shape, axis, common, size, leads=False),
            )
        )
        self._notes.append(
            Note(
                "common part",
                f"{name}: {common} of {size} along dimension {axis} merged, the rest from "
                f"{self._labels[keeper]}",
            )
        )
        region = region_along(whole.shape, axis, 0, common, leads=True)
        setting = self._setting(name, resolved)
        return AssignedTensor(name, first.shape, dtype, Action.MERGE, parts, setting, region=region)

    def _merged_dtype(
        self, resolved: Resolved, like: TensorEntry, inputs: Sequence[TensorEntry | None]
    ) -> DType:
        asked = None if resolved.keeps_dtype else self._recipe.output.dtype
        if asked is None and self._recipe.output.promotes and not resolved.keeps_dtype:
            return promoted(entry.natural_dtype for entry in inputs if entry is not None)
        return asked or like.natural_dtype

    def _changes(self, name: str) -> tuple[Change, ...]:
        if not self._changing:
            return ()
        return tuple(
            replace(change, model=index)
            for index in self._models_of(name)
            for change in changes_of(self._checkpoints[index]).get(name, ())
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
            work = self._method.work(params)
            # Its zeros count among the entries that a threshold over the model keeps a share of.
            counts = bool(work.rounds) and work.scope is Scope.MODEL
            kept = self._method.keeps_base(params) and not counts
            return self._taken(name, entries, 0) if kept else None
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
            return self._taken(name, entries, index, like=base)
        if not alone:
            return None
        dtype = self._merged_dtype(self._resolve(name), base or entry, (base, entry))
        inputs = (entry, *(None for _ in entries[1:]))
        setting = self._setting(name, self._resolve(name))
        return AssignedTensor(
            name, entry.shape, dtype, Action.MERGE, inputs, setting, changes, base_owner=index
        )

    def _taken(
        self,
        name: str,
        entries: Sequence[TensorEntry | None],
        model: int,
        *,
        like: TensorEntry | None = None,
    ) -> AssignedTensor:
        """Take a tensor from one model as it is, in the type that the output has it in.

        Args:
            name: Its name.
            entries: One per model.
            model: Which one.
            like: The tensor whose type it gets where the recipe names none; None for its own.
        """
        entry = entries[model]
        assert entry is not None  # noqa: S101 - all callers looked
        only = tuple(entry if index == model else None for index in range(len(entries)))
        dtype = entry.natural_dtype
        keeps = self._resolve(name).keeps_dtype or _is_mask(name)
        if entry.dtype.is_float and not keeps:
            dtype = self._recipe.output.dtype or (like or entry).natural_dtype
        same = dtype == entry.dtype and not entry.is_coded
        action = Action.COPY if same else Action.CONVERT
        return AssignedTensor(name, entry.shape, dtype, action, only, -1)

    def _copy_by_rule(
        self, name: str, entries: Sequence[TensorEntry | None], copy: int
    ) -> AssignedTensor:
        model = 0 if copy == BASE else copy + self._has_base
        label = self._labels[model or self._base_of(name)]
        if entries[model] is None and model in self._adapted:
            raise RecipeError(
                f"rules: {printable(name)} is to be copied from {label}, an adapter that "
                "does not bring the tensor along; merge the adapter into the base first and name "
                "the result, or copy from the base"
            )
        if entries[model] is None:
            raise RecipeError(
                f"rules: {printable(name)} is to be copied from {label}, which has no such "
                f"tensor; add a rule before it that drops or merges {printable(name)}"
            )
        if name in changes_of(self._checkpoints[model]):
            raise RecipeError(
                f"rules: {printable(name)} is to be copied from {label}, whose adapter "
                "changes it; merge the adapter into its model first and name the result, or copy from "
                "another one"
            )
        return self._taken(name, entries, model)

    def _agree(self, name: str, inputs: Sequence[TensorEntry | None]) -> bool:
        """Return whether all inputs have one shape, and are floats or of one type; else note it."""
        present = [
            (self._labels[index or self._base_of(name)], entry)
            for index, entry in enumerate(inputs)
            if entry is not None
        ]
        shapes = len({entry.shape for _, entry in present}) > 1
        floats = all(entry.dtype.is_float for _, entry in present)
        dtypes = not floats and len({entry.dtype for _, entry in present}) > 1
        if shapes or dtypes:
            brought = any(inputs[index] is not None for index in self._adapted)
            self._mismatched.append(Mismatch(name, tuple(present), shapes=shapes, brought=brought))
        return not (shapes or dtypes)

    def _setting(self, name: str, resolved: Resolved) -> int:
        models = self._models_of(name)
        # Names that are settled alike share one object, which is kept here so that its number stays its own.
        numbered = self._numbers.get((id(resolved), models))
        if numbered is None:
            has_base = self._has_base and 0 in models
            setting = Setting(resolved.values, models, has_base)
            number = self._settings.setdefault(setting, len(self._settings))
            self._numbers[id(resolved), models] = numbered = (resolved, number)
        return numbered[1]


def _is_mask(name: str) -> bool:
    return name.endswith(_MASK_ENDINGS) and _MASK.search(name) is not None


def _size(entry: TensorEntry | None, axis: int) -> int:
    return 0 if entry is None else entry.shape[axis]
