"""Which tokens a result has, and the number of each in every model: what rows of embeddings are drawn by.

The result has the vocabulary of one model, or that of one and after it the tokens that only others have.

Memory: 16 bytes for each token of each model, and the text of the tokens that one tokenizer gets of others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streammerge.assignment.types import Model
from streammerge.checkpoint.inputs import is_there
from streammerge.checkpoint.types import Checkpoint, Insertion
from streammerge.checkpoint.vocabularies import (
    KEY,
    AddedTokens,
    find_common,
    has_vocabulary,
    iter_tokens,
    key_of,
    read_added,
    read_keys,
    same_bytes,
)
from streammerge.errors import CheckpointError, RecipeError, printable
from streammerge.recipe.types import BASE, DrawnVocabulary, Recipe, TokenOrigin

TOKENIZER = "tokenizer.json"
"""The file by which tokens are told apart, and in which those are written that others bring."""
_NONE = np.zeros(1, KEY)[0]
Numbers = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of the result, and their numbers in the models."""

    origin: Path
    """The directory whose tokenizer the result has."""
    label: str
    """How messages name it."""
    owner: int | None
    """Which of the models that is; None for a directory beside them."""
    count: int
    """One more than the largest number of a token."""
    numbers: tuple[Numbers | None, ...]
    """Of each model, the number of each of the result's tokens, ``[count]``, -1 for none; None for an
    adapter, which has the base's."""
    present: NDArray[np.bool_]
    """Which of the result's numbers stand for a token, ``[count]``."""
    chosen: Mapping[int, tuple[int | None, int, bool]]
    """Of tokens that the recipe speaks of: a model, the row there, and whether all models take it."""
    added: Mapping[str, int] = field(default_factory=dict)
    """How many tokens come from which model beside the owner's."""
    insertion: Insertion | None = None
    """What the tokenizer's file gets."""


def match_tokens(recipe: Recipe, models: Sequence[Model], labels: Sequence[str]) -> Tokens | None:
    """Return which tokens the result has, and where each model has them; None if no recipe asks for it.

    Args:
        recipe: Says whose vocabulary the result has.
        models: The base, if any, and the sources.
        labels: How messages name them.

    Raises:
        RecipeError: The recipe speaks of a token that is not there.
        CheckpointError: A model has no tokenizer that can be read.
    """
    wanted = recipe.vocabulary
    if not isinstance(wanted, DrawnVocabulary):
        return None
    for model, label in zip(models, labels, strict=True):
        if isinstance(model, Checkpoint) and model.parts:
            raise RecipeError(
                f"vocabulary: {label} is a pipeline, whose parts have vocabularies of their own; merge the "
                "part that reads text by itself"
            )
    return _Matching(recipe, wanted, models, labels).match()


class _Matching:
    """Compares the tokens of all models."""

    def __init__(
        self,
        recipe: Recipe,
        wanted: DrawnVocabulary,
        models: Sequence[Model],
        labels: Sequence[str],
    ) -> None:
        self._wanted = wanted
        self._models = models
        self._labels = labels
        self._has_base = recipe.base is not None
        self._owner = self._find_owner()
        owner = None if self._owner is None else models[self._owner]
        self._directory = owner.directory if isinstance(owner, Checkpoint) else self._outside()

    def match(self) -> Tokens:
        """Return the tokens of the result."""
        speaks = bool(self._wanted.tokens) or self._wanted.multiple is not None
        if speaks or not all(map(self._is_like_owner, self._models)):
            return self._matched()
        # Whatever kind of file they are in: all have the same, and rows stay where they are.
        none = np.zeros(0, np.int32)
        numbers = tuple(none if isinstance(each, Checkpoint) else None for each in self._models)
        present = np.zeros(0, np.bool_)
        return Tokens(self._directory, self._label, self._owner, 0, numbers, present, {})

    @property
    def _label(self) -> str:
        return str(self._directory) if self._owner is None else self._labels[self._owner]

    def _is_like_owner(self, model: Model) -> bool:
        """Return whether a model has the owner's tokens, file by file, or says nothing of its own."""
        if not isinstance(model, Checkpoint) or not has_vocabulary(model.directory):
            return True
        name = find_common(self._directory, model.directory)
        if name is None:
            return False
        # In other files than tokenizer.json some tokens stand apart.
        names = [name] if name == TOKENIZER else [name, "added_tokens.json"]
        return all(_same(self._directory / each, model.directory / each) for each in names)

    def _file_of(self, index: int) -> Path | None:
        model = self._models[index]
        if not isinstance(model, Checkpoint):
            return None
        if not has_vocabulary(model.directory):
            return _tokenizer_of(self._directory, self._label)
        return _tokenizer_of(model.directory, self._labels[index])

    def _matched(self) -> Tokens:
        self._files = [self._file_of(index) for index in range(len(self._models))]
        path = _tokenizer_of(self._directory, self._label)
        keys = {
            file: read_keys(file)
            for file in dict.fromkeys((path, *self._files))
            if file is not None
        }
        own = keys[path]
        result, added = self._united(own, keys) if self._wanted.source is None else (own, {})
        numbers = {file: _numbers_in(each, result) for file, each in keys.items()}
        if self._wanted.common:
            numbers = self._without_uncommon(numbers, path)
        return Tokens(
            self._directory,
            self._label,
            self._owner,
            len(result),
            tuple(None if file is None else numbers[file] for file in self._files),
            result != _NONE,
            dict(self._chosen(result, keys)),
            added,
            self._insertion(path, result, len(own), keys) if added else None,
        )

    def _without_uncommon(self, numbers: Mapping[Path, Numbers], own: Path) -> dict[Path, Numbers]:
        """Return the numbers as if what one model lacks no other had but the owner."""
        files = [file for file in dict.fromkeys(self._files) if file is not None]
        common = np.logical_and.reduce([numbers[file] >= 0 for file in files])
        return {
            file: each if file == own else np.where(common, each, np.int32(-1))
            for file, each in numbers.items()
        }

    def _find_owner(self) -> int | None:
        source = self._wanted.source
        if isinstance(source, Path):
            return None
        if source is None or source == BASE:
            return 0
        index = source + self._has_base
        if not isinstance(self._models[index], Checkpoint):
            raise RecipeError(
                f"vocabulary: {self._labels[index]} is an adapter, which has the base's; name the base"
            )
        return index

    def _outside(self) -> Path:
        assert isinstance(self._wanted.source, Path)  # noqa: S101 - the caller looked
        return _tokenizer_of(self._wanted.source, "vocabulary.source").parent

    def _united(
        self, own: NDArray[np.void], keys: Mapping[Path, NDArray[np.void]]
    ) -> tuple[NDArray[np.void], dict[str, int]]:
        """Return one model's tokens and behind them those of the others, and how many are whose."""
        result = own
        added: dict[str, int] = {}
        for file, label in zip(self._files, self._labels, strict=True):
            if file is None:
                continue
            theirs = keys[file][keys[file] != _NONE]
            new = theirs[~np.isin(theirs, result)]
            # In the order of their numbers, each once.
            _, first = np.unique(new, return_index=True)
            new = new[np.sort(first)]
            if len(new):
                added[label] = len(new)
                result = np.concatenate([result, new])
        return result, added

    def _insertion(
        self,
        path: Path,
        result: NDArray[np.void],
        count: int,
        keys: Mapping[Path, NDArray[np.void]],
    ) -> Insertion:
        """Return what has to stand at the end of the list of added tokens."""
        own = read_added(path)
        texts: dict[int, bytes] = {}
        for file in keys:
            if len(texts) == len(result) - count:
                break
            places = _numbers_in(result[count:], keys[file])
            if not np.any(places >= 0):
                continue
            said = read_added(file)
            for number, text in iter_tokens(file):
                place = int(places[number])
                if place >= 0 and place not in texts:
                    texts[place] = _entry(place + count, text, said)
        entries = b",".join(texts[place] for place in sorted(texts))
        return Insertion(own.end, ((b"," if own.tokens else b"") + entries).decode("utf-8"))

    def _chosen(
        self, result: NDArray[np.void], keys: Mapping[Path, NDArray[np.void]]
    ) -> Iterator[tuple[int, tuple[int | None, int, bool]]]:
        for token, origin in self._wanted.tokens.items():
            found = np.flatnonzero(result == key_of(token.encode()))
            if not len(found):
                raise RecipeError(
                    f"vocabulary.tokens: the result has no token {printable(token)}; it has those of "
                    f"{'all models' if self._wanted.source is None else 'the vocabulary that is named'}"
                )
            yield int(found[0]), self._row_of(token, origin, keys)

    def _row_of(
        self, token: str, origin: TokenOrigin, keys: Mapping[Path, NDArray[np.void]]
    ) -> tuple[int | None, int, bool]:
        if origin.source is None:
            return None, 0, origin.force
        model = 0 if origin.source == BASE else origin.source + self._has_base
        file = self._files[model]
        if file is None:
            raise RecipeError(
                f"vocabulary.tokens: {self._labels[model]} is an adapter, which has the base's rows; name "
                "the base"
            )
        if isinstance(origin.token, int):
            return model, origin.token, origin.force
        wanted = token if origin.token is None else origin.token
        found = np.flatnonzero(keys[file] == key_of(wanted.encode()))
        if not len(found):
            raise RecipeError(
                f"vocabulary.tokens: {self._labels[model]} has no token {printable(wanted)}, whose row is "
                f"to stand for {printable(token)}"
            )
        return model, int(found[0]), origin.force


def _same(one: Path, other: Path) -> bool:
    """Return whether two files hold the same, or neither is there."""
    if not (is_there(one) and is_there(other)):
        return is_there(one) == is_there(other)
    return one == other or same_bytes(one, other)


def _tokenizer_of(directory: Path, label: str) -> Path:
    path = directory / TOKENIZER
    if not is_there(path):
        raise CheckpointError(
            f"{label}: {directory} has no {TOKENIZER}, by which rows are drawn; write it there, as "
            "save_pretrained of transformers' AutoTokenizer does, or leave the key out"
        )
    return path


def _numbers_in(keys: NDArray[np.void], result: NDArray[np.void]) -> Numbers:
    """Return the number in ``keys`` of every token of ``result``, ``[len(result)]``; -1 for none."""
    numbers = np.full(len(result), -1, np.int32)
    if not len(keys):
        return numbers
    order = np.argsort(keys, order=("high", "low"), kind="stable").astype(np.int32)
    ranked = keys[order]
    # By the first half, which all but always says it, and from there to the entry that is equal.
    place = np.searchsorted(ranked["high"], result["high"])
    open_ = np.flatnonzero(result != _NONE)
    while len(open_):
        at = place[open_]
        inside = at < len(ranked)
        open_, at = open_[inside], at[inside]
        inside = ranked["high"][at] == result["high"][open_]
        open_, at = open_[inside], at[inside]
        equal = ranked["low"][at] == result["low"][open_]
        numbers[open_[equal]] = order[at[equal]]
        open_ = open_[~equal]
        place[open_] += 1
    return numbers


def _entry(number: int, text: bytes, said: AddedTokens) -> bytes:
    """Return a token as the list of added tokens has it."""
    content = text.decode("utf-8", "surrogatepass")
    entry: dict[str, object] = {
        "id": number,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "special": False,
    }
    entry |= {key: value for key, value in said.tokens.get(text, {}).items() if key in entry}
    return json.dumps(entry | {"id": number}, ensure_ascii=True).encode()
