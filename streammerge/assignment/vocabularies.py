"""Rows of embeddings drawn for another vocabulary: each row of the result stands for one token in all models.

A model that lacks a token gets the row of one that the recipe names, the base if there is one, or the mean
of the rows of all that have it.

Source: mergekit's documentation of ``tokenizer``; measured against mergekit 0.1.5.

Memory: what :mod:`streammerge.checkpoint.rowmap` says for each model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from streammerge.adapters.onto_base.adapted import changes_of
from streammerge.assignment.tokens import Numbers, Tokens
from streammerge.assignment.types import Model
from streammerge.checkpoint.rowmap import RowMap, RowPlace, pack
from streammerge.checkpoint.types import Note, TensorEntry
from streammerge.dtypes import DType
from streammerge.errors import CheckpointError, RecipeError, ShapeMismatchError, printable
from streammerge.recipe.types import BASE, DrawnVocabulary, Recipe

_NUMBERED = re.compile(r"\.\d+\.")
_INPUT = re.compile(
    r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings|embed_in|shared|tok_embeddings|tokens_embed|"
    r"backbone\.embeddings|rwkv\.embeddings)\.weight"
)
_OUTPUT = re.compile(
    r"(?:.*\.)?(?:lm_head|embed_out|output|proj_out|predictions(?:\.decoder)?|lm_head\.decoder|"
    r"vocab_projector|head|score_head)\.(?:weight|bias)"
)
_FLOATS = frozenset({DType.F64, DType.F32, DType.F16, DType.BF16})
MEAN, TOKEN = -1, -2
"""What a row is that is no row of padding: the mean of all tokens' rows, or that of a token."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Models whose embeddings have the rows of the result."""

    models: tuple[Model, ...]
    """The models; as they were where nothing has to be drawn."""
    notes: tuple[Note, ...] = ()
    """What was decided."""


def draw_rows(
    recipe: Recipe, tokens: Tokens, models: Sequence[Model], labels: Sequence[str]
) -> Drawn:
    """Return the models with embeddings that have one row for each token of the result.

    Args:
        recipe: Says which vocabulary the result has.
        tokens: Which those are.
        models: The models, tied tensors settled, by the names of the result.
        labels: How messages name them.

    Raises:
        ShapeMismatchError: Rows of two models have other lengths.
        CheckpointError: A model has no embedding that is known, or one that cannot be read by rows.
    """
    wanted = recipe.vocabulary
    assert isinstance(wanted, DrawnVocabulary)  # noqa: S101 - there are tokens
    fill = wanted.fill
    if fill is None:
        fill = 0 if recipe.base is not None and not wanted.means else None
    else:
        fill = 0 if fill == BASE else fill + (recipe.base is not None)
    return _Drawing(wanted, tokens, models, labels, fill).draw()


class _Drawing:
    """Decides about every row of every model."""

    def __init__(
        self,
        wanted: DrawnVocabulary,
        tokens: Tokens,
        models: Sequence[Model],
        labels: Sequence[str],
        fill: int | None,
    ) -> None:
        self._wanted = wanted
        self._fill = fill
        self._tokens = tokens
        self._models = models
        self._labels = labels
        self._embeddings = [
            self._find(index) if numbers is not None else {}
            for index, numbers in enumerate(tokens.numbers)
        ]
        self._rows = [
            next((entry.shape[0] for entry in each.values()), 0) for each in self._embeddings
        ]
        self._count = self._row_count()
        self._check_chosen()

    def draw(self) -> Drawn:
        """Return the models, and what has been decided."""
        begins, ends, origins = self._fill_rows()
        drawn = [
            self._drawn(index, model, begins[index], ends[index], origins)
            for index, model in enumerate(self._models)
        ]
        return Drawn(tuple(drawn), tuple(self._notes(drawn)))

    def _check_chosen(self) -> None:
        for model, number, _ in self._tokens.chosen.values():
            if model is not None and number >= self._rows[model]:
                raise RecipeError(
                    f"vocabulary.tokens: {self._labels[model]} has {self._rows[model]} rows, and row {number} is "
                    "to stand for a token; name a token that has a row"
                )

    def _find(self, index: int) -> dict[str, TensorEntry]:
        """Return a model's tensors with one row for each of its tokens, the input embedding first."""
        tensors, label = self._models[index].tensors, self._labels[index]
        inner = [
            name
            for name, entry in tensors.items()
            if _INPUT.fullmatch(name) and len(entry.shape) == 2 and not _NUMBERED.search(name)
        ]
        if not inner:
            raise CheckpointError(
                f"{label}: has no embedding of tokens that is known here, such as "
                "model.embed_tokens.weight, whose rows could be drawn; leave out the key that names a vocabulary"
            )
        rows = max(tensors[name].shape[0] for name in inner)
        outer = [
            name
            for name, entry in tensors.items()
            if _OUTPUT.fullmatch(name)
            and 1 <= len(entry.shape) <= 2
            and entry.shape[0] == rows
            and not _NUMBERED.search(name)
        ]
        found = {name: tensors[name] for name in (*inner, *outer) if tensors[name].shape[0] == rows}
        for name, entry in found.items():
            if entry.is_coded or entry.parts or entry.dtype not in _FLOATS:
                raise CheckpointError(
                    f"{label}: {printable(name)} is stored as {entry.dtype} codes or in pieces, of which no "
                    "rows can be drawn; store the model as numbers first, with `method: passthrough`"
                )
            if changes_of(self._models[index]).get(name):
                raise CheckpointError(
                    f"{label}: its adapter changes {printable(name)}, of which rows are drawn; merge the "
                    "adapter into the model first, and name what comes of it"
                )
        return found

    def _row_count(self) -> int:
        tokens = self._tokens
        if self._wanted.multiple is not None:
            return -(-tokens.count // self._wanted.multiple) * self._wanted.multiple
        own = self._rows[tokens.owner] if tokens.owner is not None else tokens.count
        # Tokens of a model for which it has no row stay without one, those of others get rows.
        return max(own, tokens.count) if tokens.added else own

    def _fill_rows(self) -> tuple[list[Numbers], list[Numbers], Numbers]:
        """Return where each model's rows come from, as :class:`RowMap` has it; places are models."""
        held = [self._held(index) for index in range(len(self._models))]
        fills = _Fills(held, self._fill)
        found = [
            fills.rows_of(index, self._tokens.chosen, self._padding(index))
            for index in range(len(held))
        ]
        return [begin for begin, _ in found], [end for _, end in found], fills.origins

    def _held(self, index: int) -> Numbers:
        """Return the row in a model of every row of the result, -1 where it has none."""
        held = np.full(self._count, -1, np.int32)
        numbers = self._tokens.numbers[index]
        if numbers is not None:
            known = min(self._count, len(numbers))
            held[:known] = np.where(numbers[:known] < self._rows[index], numbers[:known], -1)
        return held

    def _padding(self, index: int) -> NDArray[np.int32]:
        """Return the model and the row there, ``[rows, 2]``, of rows that stand for no token.

        A model keeps its own if that stands for no token either; else the owner's stands there, or the
        mean of all tokens' rows. ``[TOKEN, TOKEN]`` for rows of tokens.
        """
        kept = np.full((self._count, 2), TOKEN, np.int32)
        rows = np.arange(self._count, dtype=np.int32)
        absent = np.ones(self._count, np.bool_)
        known = min(self._count, self._tokens.count)
        absent[:known] = ~self._tokens.present[:known]
        kept[absent] = MEAN
        if self._wanted.multiple is not None:
            return kept
        for model in (self._tokens.owner, index):
            if model is not None:
                free = absent & (rows < self._rows[model]) & ~self._stands(model)
                kept[free] = np.stack([np.full(self._count, model, np.int32), rows], axis=1)[free]
        return kept

    def _stands(self, model: int) -> NDArray[np.bool_]:
        """Return, ``[rows]``, which numbers stand for a token in a model that the result has."""
        stands = np.zeros(max(self._count, self._rows[model]), np.bool_)
        numbers = self._tokens.numbers[model]
        if numbers is not None:
            stands[numbers[(numbers >= 0) & (numbers < len(stands))]] = True
        return stands[: self._count]

    def _drawn(
        self, index: int, model: Model, begins: Numbers, ends: Numbers, origins: Numbers
    ) -> Model:
        """Return a model with rows drawn, or as it is where all its rows stay."""
        embeddings = self._embeddings[index]
        stays = np.array_equal(ends - begins, np.ones(self._count, np.int32)) and np.array_equal(
            origins[begins], _identity(index, self._count)
        )
        if not embeddings or (stays and self._count == self._rows[index]):
            return model
        packed = pack(begins), pack(ends), pack(origins)
        tensors = dict(model.tensors)
        for name, entry in embeddings.items():
            tensors[name] = self._mapped(index, name, entry, packed)
        return replace(model, tensors=tensors)

    def _mapped(
        self, index: int, name: str, entry: TensorEntry, packed: tuple[bytes, bytes, bytes]
    ) -> TensorEntry:
        places = [self._place(other, index, name, entry) for other in range(len(self._models))]
        own = RowPlace(index, entry.file, entry.offset, entry.dtype)
        # Places of models without rows are never looked at.
        rows = RowMap(
            prod(entry.shape[1:]),
            entry.dtype,
            tuple(own if place is None else place for place in places),
            *packed,
        )
        first = rows.places[0]
        return TensorEntry(
            name, entry.dtype, (self._count, *entry.shape[1:]), first.file, first.offset, rows=rows
        )

    def _place(self, other: int, index: int, name: str, entry: TensorEntry) -> RowPlace | None:
        """Return where a model has the tensor, for rows of another one."""
        embeddings = self._embeddings[other]
        if not embeddings:
            return None
        theirs = embeddings.get(name)
        if theirs is None:
            raise CheckpointError(
                f"{self._labels[other]}: has no {printable(name)}, from which {self._labels[index]} takes "
                "rows of tokens that it lacks; name models that have the same embeddings"
            )
        if theirs.shape[1:] != entry.shape[1:]:
            raise ShapeMismatchError(
                f"{printable(name)}: rows have {list(theirs.shape[1:])} elements in {self._labels[other]} "
                f"and {list(entry.shape[1:])} in {self._labels[index]}; merge models of one size"
            )
        return RowPlace(other, theirs.file, theirs.offset, theirs.dtype)

    def _notes(self, drawn: Sequence[Model]) -> Iterator[Note]:
        tokens = self._tokens
        more = [f"{count:,} of {label}" for label, count in tokens.added.items()]
        text = f"that of {tokens.label}"
        if more:
            text += f", and {' and '.join(more)} behind it"
        if tokens.count:
            text += f": {tokens.count:,} numbers, {self._count:,} rows"
        else:
            text += ", which all models have: rows stay where they are"
        yield Note("vocabulary", text)
        for index, (model, label) in enumerate(zip(drawn, self._labels, strict=True)):
            if model is self._models[index]:
                continue
            held = self._held(index)
            lacking = int(np.count_nonzero((held < 0) & (self._padding(index)[:, 0] == TOKEN)))
            names = " and ".join(map(printable, self._embeddings[index]))
            said = f"{label}: rows of {names} are drawn by token"
            if lacking:
                said += f"; {lacking:,} that it lacks have {self._filler()}"
            dtypes = {entry.dtype for each in self._embeddings for entry in each.values()}
            own = {entry.dtype for entry in self._embeddings[index].values()}
            if lacking and dtypes - own:
                said += f", rounded to {' and '.join(sorted(map(str, own)))}"
            yield Note("vocabulary", said)

    def _filler(self) -> str:
        mean = "the mean row of all that have them"
        return (
            mean
            if self._fill is None
            else f"the row of {self._labels[self._fill].split()[0]}, else {mean}"
        )


class _Fills:
    """Finds rows for tokens that models lack."""

    def __init__(self, held: Sequence[Numbers], fill: int | None) -> None:
        """Look at what models have.

        Args:
            held: Of each model its row for every row of the result, ``[rows]``, -1 for none.
            fill: The model whose rows stand for tokens that others lack; None for the mean of all.
        """
        self._held = np.stack(held)
        self._count = self._held.shape[1]
        models, rows = self._held.shape
        of_models = np.repeat(np.arange(models, dtype=np.int32), rows)
        # The row of model i for row r of the result stands at i * rows + r, whether there is one or not.
        self._blocks = [np.stack([of_models, self._held.reshape(-1)], axis=1)]
        self._length = models * rows
        self._begins, self._ends = self._of_others(fill)

    @property
    def origins(self) -> Numbers:
        """All origins, ``[n, 2]``."""
        return np.concatenate(self._blocks)

    def _add(self, origins: NDArray[np.int32]) -> int:
        """Add origins; return where they begin."""
        begin: int = self._length
        self._blocks.append(np.ascontiguousarray(origins, np.int32))
        self._length += len(origins)
        return begin

    def _of_others(self, fill: int | None) -> tuple[Numbers, Numbers]:
        """Return, for every row, the origins of models that lack it."""
        there = self._held >= 0
        rows = np.arange(self._count, dtype=np.int32)
        holders = there.sum(axis=0)
        one = np.argmax(there, axis=0).astype(np.int32)
        single = holders == 1
        if fill is not None:
            one = np.where(there[fill], np.int32(fill), one)
            single |= there[fill]
        begins = np.where(single, one * np.int32(self._count) + rows, np.int32(0))
        ends = begins + single.astype(np.int32)
        several = np.flatnonzero((holders > 1) & ~single)
        place, model = np.nonzero(there[:, several].T)
        counts = np.bincount(place, minlength=len(several))
        behind = self._add(np.stack([model, self._held[model, several[place]]], axis=1))
        ends[several] = behind + np.cumsum(counts)
        begins[several] = ends[several] - counts
        return begins, ends

    def rows_of(
        self,
        index: int,
        chosen: Mapping[int, tuple[int | None, int, bool]],
        padding: NDArray[np.int32],
    ) -> tuple[Numbers, Numbers]:
        """Return where the origins of a model's rows begin and end, ``[rows]`` each.

        Args:
            index: The model.
            chosen: As :attr:`Tokens.chosen`.
            padding: What rows without a token are, ``[rows, 2]``: see :meth:`_Drawing._padding`.
        """
        rows = np.arange(self._count, dtype=np.int32)
        has = self._held[index] >= 0
        begins = np.where(has, np.int32(index * self._count) + rows, self._begins)
        ends = np.where(has, begins + 1, self._ends)
        for row, (model, number, force) in chosen.items():
            if has[row] and not force:
                continue
            begins[row] = self._length if model is not None else 0
            ends[row] = begins[row] + (model is not None)
            if model is not None:
                self._add(np.array([[model, number]]))
        kept = np.flatnonzero(padding[:, 0] >= 0)
        begins[kept] = self._add(padding[kept]) + np.arange(len(kept), dtype=np.int32)
        ends[kept] = begins[kept] + 1
        new = np.flatnonzero(padding[:, 0] == MEAN)
        if len(new):
            tokens = (ends - begins == 1) & (padding[:, 0] == TOKEN)
            mean = self.origins[begins[tokens]]
            begins[new] = self._add(mean)
            ends[new] = begins[new] + len(mean)
        return begins, ends


def _identity(index: int, count: int) -> Numbers:
    rows = np.arange(count, dtype=np.int32)
    return np.stack([np.full(count, index, np.int32), rows], axis=1)
