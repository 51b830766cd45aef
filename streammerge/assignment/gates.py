"""Gate vectors of a mixture: drawn, in a file, or the directions of prompts.

A gate vector is compared with what a layer gets for a token; the experts with the largest products are
asked. Those from prompts are the same in every layer: the sum of the base's embeddings of all tokens of
an expert's positive prompts, less that of its negative ones, each of length 1, again of length 1.

Source: mergekit 0.1.5 ``mergekit-moe``: ``random``, ``uniform_random`` and ``cheap_embed``.
Differs from mergekit: sums are in float64; the beginning of a text is marked in front of each prompt, as
there, by the tokenizer's ``bos_token``. Gates from hidden states need the model to run, and are not made here.
Memory: a row of the embedding at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.bytesource import ByteSourceKind, choose_byte_source
from streammerge.checkpoint.hub import locate_model
from streammerge.checkpoint.inputs import parse_json, read_limited
from streammerge.checkpoint.reading import MAX_CONFIG_BYTES, read_checkpoint
from streammerge.checkpoint.types import (
    Checkpoint,
    MadeFile,
    MadeKind,
    Note,
    ShardFile,
    TensorEntry,
)
from streammerge.dtypes import DType
from streammerge.errors import CheckpointError, MissingTensorError, RecipeError, printable
from streammerge.floats import KINDS, widen
from streammerge.recipe.types import GateKind, Mixture, Prompts, Recipe

_EMBEDDING = "model.embed_tokens.weight"
_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_LEAST_LENGTH = 1e-8
"""What a vector is divided by at least."""
_NAME = "gate vectors"


@dataclass(frozen=True, slots=True)
class MatrixOfGates:
    """A tensor of gate vectors, one per row."""

    name: str
    """Its name in the result."""
    sources: tuple[int, ...]
    """Whose they are, row by row."""
    hidden: int
    """Columns."""
    dtype: DType
    """What else of the layer is stored as."""


@dataclass(frozen=True, slots=True)
class Gated:
    """Gate vectors as tensors of the base."""

    tensors: dict[str, TensorEntry]
    """By name; their files come after the base's."""
    files: tuple[ShardFile, ...]
    """Where they lie."""
    notes: tuple[Note, ...]
    """What the plan has to state."""


def add_gates(base: Checkpoint, recipe: Recipe, matrices: Sequence[MatrixOfGates]) -> Gated:
    """Return the gate vectors of a mixture.

    Args:
        base: The model whose embeddings prompts are turned into.
        recipe: Says where they come from.
        matrices: What there has to be.

    Raises:
        RecipeError: They cannot be made of what the base has.
        CheckpointError: A file of them is not what it should be.
        MissingTensorError: It lacks some.
    """
    mixture = recipe.mixture
    assert mixture is not None  # noqa: S101 - else there are no gates
    if isinstance(mixture.gates, Path):
        return _from_file(mixture.gates, matrices, after=len(base.files))
    if mixture.gates is GateKind.EMBEDDINGS:
        return _from_prompts(base, mixture, matrices)
    return _drawn(base, mixture.gates, recipe.seed, matrices)


def _from_file(path: Path, matrices: Sequence[MatrixOfGates], *, after: int) -> Gated:
    given = read_checkpoint(locate_model(path, download=False))
    tensors: dict[str, TensorEntry] = {}
    missing = [each.name for each in matrices if each.name not in given.tensors]
    if missing:
        raise MissingTensorError(
            f"mixture.gates: {path} has no {printable(missing[0])}"
            + (f" and {len(missing) - 1} others" if len(missing) > 1 else "")
            + f"; a layer's gate vectors are a tensor of [{len(matrices[0].sources)}, "
            f"{matrices[0].hidden}] of that name"
        )
    for each in matrices:
        entry, shape = given.tensors[each.name], (len(each.sources), each.hidden)
        if entry.shape != shape or not entry.dtype.is_float:
            raise CheckpointError(
                f"mixture.gates: {path}: {printable(each.name)} is {entry.dtype} of the shape "
                f"{list(entry.shape)}; expected floats of {list(shape)}, a row per expert"
            )
        tensors[each.name] = replace(entry, file=entry.file + after)
    return Gated(tensors, given.files, (Note("mixture", f"the gate vectors are those in {path}"),))


def _drawn(base: Checkpoint, kind: GateKind, seed: int, matrices: Sequence[MatrixOfGates]) -> Gated:
    made = MadeKind.NORMAL if kind is GateKind.RANDOM else MadeKind.UNIFORM
    text = (
        f"the gate vectors are drawn ({kind}, seed {seed}): which expert a token is given to means nothing "
        "until the model is trained"
    )
    drawn = MadeFile(made, (0, 0), DType.F32, (), seed)
    return _made(base, matrices, lambda _: drawn, text, ())


def _from_prompts(base: Checkpoint, mixture: Mixture, matrices: Sequence[MatrixOfGates]) -> Gated:
    vectors = _Embedding(base).directions(mixture.prompts, matrices[0].hidden)
    text = (
        "the gate vectors are the embeddings of prompts, the same in every layer; deeper layers get other "
        "things than embeddings, and may choose experts worse than a forward pass would"
    )
    close = _closest(vectors)
    notes = [Note("mixture", close)] if close else []
    given = MadeFile(MadeKind.GIVEN, (0, 0), DType.F32, ())
    return _made(
        base,
        matrices,
        lambda rows: replace(given, given=vectors[list(rows)].astype("<f4").tobytes().hex()),
        text,
        notes,
    )


def _made(
    base: Checkpoint,
    matrices: Sequence[MatrixOfGates],
    make: Callable[[tuple[int, ...]], MadeFile],
    text: str,
    notes: Sequence[Note],
) -> Gated:
    """Return tensors in files that are nowhere: one for all matrices of the same shape and type."""
    alike: dict[tuple[tuple[int, ...], int, DType], list[MatrixOfGates]] = {}
    for each in matrices:
        dtype = each.dtype if each.dtype in KINDS or each.dtype is DType.BF16 else DType.F32
        alike.setdefault((each.sources, each.hidden, dtype), []).append(each)
    files: list[ShardFile] = []
    tensors: dict[str, TensorEntry] = {}
    for (sources, hidden, dtype), some in alike.items():
        shape = (len(sources), hidden)
        made = replace(
            make(sources), shape=shape, dtype=dtype, names=tuple(each.name for each in some)
        )
        digest = hashlib.blake2b(repr(made).encode(), digest_size=16).hexdigest()
        path = base.path / f"{_NAME} {len(files)}"
        number = len(base.files) + len(files)
        files.append(ShardFile(path, made.nbytes, 0, digest, made=made))
        step = 0 if made.kind is MadeKind.GIVEN else dtype.nbytes(shape[0] * hidden)
        for index, each in enumerate(some):
            tensors[each.name] = TensorEntry(each.name, dtype, shape, number, index * step)
    return Gated(tensors, tuple(files), (Note("mixture", text), *notes))


def _closest(vectors: NDArray[np.float64]) -> str | None:
    """Return a sentence about two experts that hardly differ, if there are any."""
    products = vectors @ vectors.T
    np.fill_diagonal(products, -1.0)
    one, other = divmod(int(products.argmax()), len(vectors))
    if len(vectors) < 2 or products[one, other] < 0.99:
        return None
    return (
        f"the prompts of sources[{one}] and sources[{other}] point almost the same way (cosine "
        f"{products[one, other]:.4f}): tokens will hardly tell these experts apart"
    )


class _Embedding:
    """The rows of a model's input embedding, by the tokens of texts."""

    def __init__(self, base: Checkpoint) -> None:
        entry = base.tensors.get(_EMBEDDING)
        plain = entry is not None and not entry.parts and entry.rows is None
        if (
            entry is None
            or not plain
            or (entry.dtype not in KINDS and entry.dtype is not DType.BF16)
        ):
            raise RecipeError(
                f"mixture.gates: embeddings are taken of {_EMBEDDING}, which {base.path} "
                f"{'has not' if entry is None else 'stores as codes'}; choose other gates"
            )
        self._entry, self._file = entry, base.files[entry.file]
        self._tokenizer = _open_tokenizer(base.directory)
        self._begin = _begin_of_text(base.directory)
        if self._begin and self._tokenizer.token_to_id(self._begin) is not None:
            # Whole, where the tokenizer's file leaves it to the configuration.
            self._tokenizer.add_special_tokens([self._begin])

    def directions(self, prompts: Sequence[Prompts], hidden: int) -> NDArray[np.float64]:
        """Return ``[prompts, hidden]`` vectors of length 1."""
        vectors = np.zeros((len(prompts), hidden))
        with choose_byte_source(ByteSourceKind.PREAD)(self._file.path) as source:
            row = bytearray(self._entry.dtype.nbytes(hidden))
            for index, each in enumerate(prompts):
                for sign, texts in ((1.0, each.positive), (-1.0, each.negative)):
                    total = np.zeros(hidden)
                    for token in self._tokens(texts):
                        source.read_into(self._entry.offset + token * len(row), memoryview(row))
                        total += widen(np.frombuffer(row, dtype=np.uint8), self._entry.dtype)
                    vectors[index] += sign * _unit(total)
                vectors[index] = _unit(vectors[index])
        return vectors

    def _tokens(self, texts: Sequence[str]) -> list[int]:
        tokens: list[int] = []
        rows = self._entry.shape[0]
        for text in texts:
            tokens += self._tokenizer.encode(self._begin + text, add_special_tokens=False).ids
        beyond = next((token for token in tokens if token >= rows), None)
        if beyond is not None:
            raise RecipeError(
                f"mixture.prompts: the tokenizer of the base gives token {beyond}, and {_EMBEDDING} has "
                f"{rows} rows; tokenizer and model do not belong together"
            )
        return tokens


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    return vector / max(float(np.linalg.norm(vector)), _LEAST_LENGTH)


def _open_tokenizer(directory: Path) -> Any:
    path = directory / _TOKENIZER
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415 - needed for prompts alone
    except ImportError as error:
        raise RecipeError(
            "mixture.gates: prompts are split into tokens by the package tokenizers, which is not "
            'installed: pip install "streammerge[prompts]"'
        ) from error
    if not path.is_file():
        raise RecipeError(
            f"mixture.gates: prompts need {_TOKENIZER} beside the base's tensors, and {directory} has none"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise CheckpointError(f"{path}: is no tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _begin_of_text(directory: Path) -> str:
    path = directory / _TOKENIZER_CONFIG
    if not path.is_file():
        return ""
    document = parse_json(
        read_limited(path, MAX_CONFIG_BYTES),
        where=str(path),
        parse_constant=float,
        object_pairs_hook=dict,
    )
    token = document.get("bos_token") if isinstance(document, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
