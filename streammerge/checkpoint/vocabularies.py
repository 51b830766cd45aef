"""Which token each row of an embedding stands for, read from the tokenizer's files without keeping them.

A token is remembered as 64 bits of its text at the place of its number, so that two vocabularies can be
compared number by number, or as 128 bits where rows are drawn by it. Files whose bytes are equal need not
be read at all.

Memory: 8 or 16 bytes for each token, and :data:`_STEP` bytes of text, of whatever size the file is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.inputs import is_there, open_input
from streammerge.errors import HeaderError

MAX_TOKENS = 1 << 24
"""Sixty times the largest vocabulary; a larger number is no number of a token."""
FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "qwen.tiktoken",
)
"""Where a vocabulary may lie; the first that two models both have is what they are compared by."""
_STEP = 1 << 20
_TEXT = rb'"(?:[^"\\]|\\.)*"'
# A key with a whole number and what comes after it is one lexeme: vocabularies are made of them.
_LEXEME = re.compile(
    rb"\s*(?:(?P<key>%b)\s*:\s*(?P<number>-?\d{1,20})\s*(?P<comma>,|(?=\}))"
    rb'|(?P<other>%b|[{}\[\]:,]|[^\s{}\[\]:,"]+))' % (_TEXT, _TEXT),
    flags=re.DOTALL,
)
_LONGEST = 1 << 20
"""A longer text is no token; without a limit an endless one would be kept whole."""
Token = tuple[int, bytes]
KEY = np.dtype([("high", "<u8"), ("low", "<u8")])
"""128 bits of a token's text."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of one model."""

    tokens: NDArray[np.uint64]
    """64 bits of each token's text at its number; 0 where a number has no token."""

    @property
    def count(self) -> int:
        """How many tokens there are."""
        return int(np.count_nonzero(self.tokens))

    def conflicts(self, other: Vocabulary) -> NDArray[np.intp]:
        """Return the numbers that stand for one token here and for another one there, ascending."""
        shared = min(len(self.tokens), len(other.tokens))
        mine, theirs = self.tokens[:shared], other.tokens[:shared]
        return np.flatnonzero((mine != theirs) & (mine != 0) & (theirs != 0))


def find_common(first: Path, second: Path) -> str | None:
    """Return the name of the file that two directories can be compared by; None without one."""
    return next((n for n in FILES if is_there(first / n) and is_there(second / n)), None)


def has_vocabulary(directory: Path) -> bool:
    """Return whether a directory holds a vocabulary that can be read."""
    return any(is_there(directory / name) for name in FILES)


def same_bytes(first: Path, second: Path) -> bool:
    """Return whether two files are there and hold the same.

    Raises:
        CheckpointError: One of them cannot be read.
    """
    if not (is_there(first) and is_there(second)):
        return False
    with open_input(first) as (one, status), open_input(second) as (other, other_status):
        if status.st_size != other_status.st_size:
            return False
        while part := one.read(_STEP):
            if part != other.read(_STEP):
                return False
    return True


def read_vocabulary(path: Path) -> Vocabulary:
    """Return the tokens in a file of a tokenizer.

    Args:
        path: One of :data:`FILES`.

    Raises:
        CheckpointError: It cannot be read.
        HeaderError: It is not what its name says.
    """
    tokens = np.zeros(1 << 15, np.uint64)
    for number, text in iter_tokens(path):
        if number >= len(tokens):
            tokens = np.concatenate([tokens, np.zeros(max(len(tokens), number), np.uint64)])
        # Python's own hash: good for one process, which is as long as it is needed.
        tokens[number] = (hash(text) & (2**64 - 1)) | 1
    used = np.flatnonzero(tokens)
    return Vocabulary(tokens[: int(used[-1]) + 1 if len(used) else 0].copy())


def read_keys(path: Path) -> NDArray[np.void]:
    """Return what tells tokens apart in all models: 128 bits of each one's text at its number, 0 for none.

    Args:
        path: One of :data:`FILES`.

    Raises:
        CheckpointError: It cannot be read.
        HeaderError: It is not what its name says.
    """
    keys, count = np.zeros(1 << 15, KEY), 0
    for number, text in iter_tokens(path):
        if number >= len(keys):
            keys = np.concatenate([keys, np.zeros(max(len(keys), number), KEY)])
        keys[number] = key_of(text)
        count = max(count, number + 1)
    return keys[:count].copy()


def key_of(text: bytes) -> NDArray[np.void]:
    """Return what tells a token apart, a scalar of :data:`KEY`."""
    found: NDArray[np.void] = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), KEY)[0]
    return found


def iter_tokens(path: Path) -> Iterator[Token]:
    """Yield number and text of the tokens in a file of a tokenizer, in its order.

    Raises:
        CheckpointError: It cannot be read.
        HeaderError: It is not what its name says.
    """
    with open_input(path) as (stream, _):
        try:
            for number, text in _reader_of(path.name)(stream):
                if not 0 <= number < MAX_TOKENS:
                    raise HeaderError(f"{path}: a token has the number {number}; copy it again")
                yield number, text
        except ValueError as error:
            raise HeaderError(f"{path}: is not a vocabulary: {error}; copy it again") from error


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """The list of added tokens in a ``tokenizer.json``."""

    end: int
    """Where its last bracket stands, from the start of the file."""
    tokens: Mapping[bytes, Mapping[str, object]]
    """What it says of each, by its text."""


def read_added(path: Path) -> AddedTokens:
    """Return the added tokens in a ``tokenizer.json``.

    Raises:
        CheckpointError: It cannot be read.
        HeaderError: It has no such list.
    """
    with open_input(path) as (stream, _):
        try:
            begin, end = _find_added(stream)
            stream.seek(begin)
            listed = json.loads(stream.read(end + 1 - begin))
        except ValueError as error:
            raise HeaderError(f"{path}: is not a tokenizer: {error}; copy it again") from error
    tokens = {
        str(each["content"]).encode("utf-8", "surrogatepass"): each
        for each in listed
        if isinstance(each, dict) and "content" in each
    }
    return AddedTokens(end, tokens)


def _find_added(stream: BinaryIO) -> tuple[int, int]:
    """Return where the list of added tokens begins and ends; both brackets are part of it."""
    depth, key, begin = 0, b"", None
    for base, found in _iter_lexemes(stream):
        lexeme = found["other"] or b""
        if depth == 1 and lexeme.startswith(b'"'):
            key = lexeme
        if lexeme in (b"{", b"["):
            if depth == 1 and key == b'"added_tokens"' and lexeme == b"[":
                begin = base + found.end() - 1
            depth += 1
        elif lexeme in (b"}", b"]"):
            depth -= 1
            if begin is not None and depth == 1:
                if base + found.end() - begin > _LONGEST * 64:
                    raise ValueError("the list of added tokens is too long")
                return begin, base + found.end() - 1
    raise ValueError("it has no list of added tokens")


def _reader_of(name: str) -> Callable[[BinaryIO], Iterator[Token]]:
    if name == "tokenizer.json":
        return _read_tokenizer_json
    if name == "tekken.json":
        return _read_tekken
    if name.endswith(".json"):
        return _read_vocab_json
    if name.endswith(".model"):
        return _read_sentencepiece
    return _read_tiktoken if name.endswith(".tiktoken") else _read_lines


def _read_tokenizer_json(stream: BinaryIO) -> Iterator[Token]:
    """Yield the tokens of ``model.vocab``, an object or a list, and of ``added_tokens``."""
    number: int | None = None
    content: bytes | None = None
    seen = set()
    for path, index, key, value in _iter_scalars(stream):
        if path[:1] == (b"added_tokens",):
            seen.add("added")
            if key == b"id":
                number = int(value)
            elif key == b"content":
                content = _text(value)
            if number is not None and content is not None:
                yield number, content
                number = content = None
        elif path == (b"model", b"vocab"):
            seen.add("vocab")
            # An object of numbers by token.
            yield int(value), _text(key)
        elif path[:2] == (b"model", b"vocab"):
            seen.add("vocab")
            # A list of pairs of token and score.
            if value.startswith(b'"'):
                yield index[-2], _text(value)
        elif len(seen) == 2:
            # What follows are merges, as many as tokens.
            return


def _read_vocab_json(stream: BinaryIO) -> Iterator[Token]:
    for path, _, key, value in _iter_scalars(stream):
        if path == ():
            yield int(value), _text(key)


def _read_tekken(stream: BinaryIO) -> Iterator[Token]:
    """Yield tokens by rank; special ones have numbers of their own, before the others."""
    rank: int | None = None
    for path, _, key, value in _iter_scalars(stream):
        if path[:1] == (b"vocab",):
            if key == b"rank":
                rank = int(value)
            elif key == b"token_bytes" and rank is not None:
                yield rank, _text(value)
                rank = None


def _read_lines(stream: BinaryIO) -> Iterator[Token]:
    for number, line in enumerate(iter(lambda: stream.readline(_LONGEST), b"")):
        yield number, line.rstrip(b"\r\n")


def _read_tiktoken(stream: BinaryIO) -> Iterator[Token]:
    for line in iter(lambda: stream.readline(_LONGEST), b""):
        text, _, rank = line.strip().rpartition(b" ")
        if text:
            yield int(rank), text


def _read_sentencepiece(stream: BinaryIO) -> Iterator[Token]:
    """Yield the pieces of a SentencePiece model: field 1 of the message, whose field 1 is the text.

    Source: sentencepiece_model.proto, ``ModelProto.pieces`` and ``SentencePiece.piece``.
    """
    number = 0
    while (tag := _varint(stream)) is not None:
        if tag & 7 != 2:
            # No other field of the outermost message holds anything but bytes.
            raise ValueError(f"field {tag >> 3} is of kind {tag & 7}, expected 2")
        nbytes = _varint(stream)
        if nbytes is None or nbytes > _LONGEST * 64:
            raise ValueError("a field has no sound length")
        field = stream.read(nbytes)
        if tag >> 3 == 1:
            if field[:1] != b"\x0a":
                raise ValueError("a piece does not begin with its text")
            length, begin = _varint_in(field, 1)
            yield number, field[begin : begin + length]
            number += 1


def _varint(stream: BinaryIO) -> int | None:
    value = shift = 0
    while byte := stream.read(1):
        value |= (byte[0] & 127) << shift
        shift += 7
        if byte[0] < 128:
            return value
        if shift > 63:
            raise ValueError("a number has more than 64 bits")
    return None


def _varint_in(field: bytes, begin: int) -> tuple[int, int]:
    value = shift = 0
    for place in range(begin, min(len(field), begin + 10)):
        value |= (field[place] & 127) << shift
        shift += 7
        if field[place] < 128:
            return value, place + 1
    raise ValueError("a piece has no sound length")


def _text(lexeme: bytes) -> bytes:
    """Return what a JSON text says, in one spelling: escapes are those of whoever wrote it."""
    if b"\\" not in lexeme:
        return lexeme[1:-1]
    return str(json.loads(lexeme)).encode("utf-8", "surrogatepass")


_Scalar = tuple[tuple[bytes, ...], tuple[int, ...], bytes, bytes]


def _iter_scalars(stream: BinaryIO) -> Iterator[_Scalar]:
    """Yield every number, text and constant of a JSON document with its place.

    Yields:
        The keys of the objects around it, without their quotes, ``b""`` for a list's; the places in
        the containers around it; its own key with quotes taken off unless it is a token's; its text.
    """
    path: tuple[bytes, ...] = ()
    kinds: list[bool] = []
    index: list[int] = []
    key = b""
    expect_key = False
    for _, found in _iter_lexemes(stream):
        pair, number, comma, lexeme = found.groups()
        if lexeme is None:
            if not kinds:
                raise ValueError("a key stands outside of every object")
            yield path, tuple(index), _own(pair, path), number
            index[-1] += len(comma)
            expect_key = bool(comma)
            continue
        first = lexeme[:1]
        if first in b"{[":
            if kinds:
                path += (key.strip(b'"') if kinds[-1] else b"",)
            kinds.append(first == b"{")
            index.append(0)
            expect_key = kinds[-1]
            if len(kinds) > 64:
                raise ValueError("nested deeper than 64 levels")
        elif first in b"}]":
            if not kinds:
                raise ValueError("a bracket closes what was not opened")
            kinds.pop()
            index.pop()
            path = path[:-1]
            expect_key = False
        elif first == b",":
            if not kinds:
                raise ValueError("a comma stands alone")
            index[-1] += 1
            expect_key = kinds[-1]
        elif first == b":":
            expect_key = False
        elif expect_key:
            key = lexeme
        else:
            yield path, tuple(index), _own(key, path), lexeme
    if kinds:
        raise ValueError("it ends in the middle")


def _own(key: bytes, path: tuple[bytes, ...]) -> bytes:
    """Return a key; one that is a token as it is spelled, others without their quotes."""
    return key if not path or path[-1] == b"vocab" else key.strip(b'"')


def _iter_lexemes(stream: BinaryIO) -> Iterator[tuple[int, re.Match[bytes]]]:
    """Yield every lexeme of a JSON document, with where in the file the buffer that it is in begins."""
    buffer, place, ended, base = b"", 0, False, 0
    while True:
        for found in _LEXEME.finditer(buffer, place):
            # What ends where the buffer ends may go on; what begins later is behind the torn end of a text.
            if found.start() != place or (found.end() == len(buffer) and not ended):
                break
            place = found.end()
            yield base, found
        if ended:
            if buffer[place:].strip():
                raise ValueError("it ends in the middle")
            return
        if len(buffer) - place > _LONGEST:
            raise ValueError(f"a text has more than {_LONGEST} bytes")
        part = stream.read(_STEP)
        ended = not part
        base += place
        buffer, place = buffer[place:] + part, 0
