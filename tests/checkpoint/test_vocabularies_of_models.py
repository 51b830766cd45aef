"""Vocabularies are compared number by number, in every spelling that tokenizers are stored in."""

from __future__ import annotations

import base64
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streammerge.checkpoint import vocabularies
from streammerge.checkpoint.vocabularies import Vocabulary, find_common, read_vocabulary
from streammerge.errors import HeaderError

TOKENS = ["<s>", 'a"b', "Ġthe", "é\\", "{", "}", ",", "\n", "🙂", "id", "content", "vocab"]
ADDED = ["<|im_start|>", '{"id": 3}']


def tokenizer_json(tokens: list[str], added: list[str], *, unigram: bool = False) -> dict[str, Any]:
    vocab: Any = {token: number for number, token in enumerate(tokens)}
    if unigram:
        vocab = [[token, -0.5] for token in tokens]
    return {
        "version": "1.0",
        "truncation": {"max_length": 512},
        "added_tokens": [
            {"id": len(tokens) + place, "content": token, "special": True}
            for place, token in enumerate(added)
        ],
        "normalizer": {"type": "Replace", "content": "x", "vocab": 7},
        "model": {"type": "BPE", "unk_id": 0, "vocab": vocab, "merges": [["a", "b"]] * 3},
    }


def read(path: Path, text: str | bytes) -> Vocabulary:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_vocabulary(path)


def equal(first: Vocabulary, second: Vocabulary) -> bool:
    return first.tokens.tolist() == second.tokens.tolist()


def test_spelling_and_order_make_no_difference(tmp_path: Path) -> None:
    document = tokenizer_json(TOKENS, ADDED)
    path = tmp_path / "tokenizer.json"
    plain = read(path, json.dumps(document))
    shuffled = document | {
        "model": document["model"] | {"vocab": dict(reversed(document["model"]["vocab"].items()))}
    }

    assert plain.count == len(TOKENS) + len(ADDED)
    assert equal(read(path, json.dumps(document, indent=2, ensure_ascii=False)), plain)
    assert equal(read(path, json.dumps(shuffled)), plain)
    assert equal(read(path, json.dumps(tokenizer_json(TOKENS, ADDED, unigram=True))), plain)
    backwards = dict(reversed(document.items()))
    assert equal(read(path, json.dumps(backwards)), plain)


def test_conflicts_are_numbers_with_two_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    mine = read(path, json.dumps(tokenizer_json(TOKENS, [])))
    swapped = [*TOKENS[:3], TOKENS[4], TOKENS[3], *TOKENS[5:]]
    longer = read(path, json.dumps(tokenizer_json(TOKENS, ADDED)))

    assert mine.conflicts(read(path, json.dumps(tokenizer_json(swapped, [])))).tolist() == [3, 4]
    assert mine.conflicts(longer).tolist() == longer.conflicts(mine).tolist() == []
    assert (mine.count, longer.count) == (len(TOKENS), len(TOKENS) + len(ADDED))


def sentencepiece(tokens: list[str]) -> bytes:
    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    pieces = (field(1, token.encode()) + b"\x15\x00\x00\x80\xbf" for token in tokens)
    return b"".join(field(1, piece) for piece in pieces) + field(2, b"trainer")


PLAIN = [token for token in TOKENS if "\n" not in token]
STORED = {
    "vocab.json": lambda tokens: json.dumps({t: n for n, t in enumerate(tokens)}).encode(),
    "vocab.txt": lambda tokens: "".join(f"{token}\n" for token in tokens).encode(),
    "tokenizer.model": sentencepiece,
    "tekken.json": lambda tokens: json.dumps(
        {
            "config": {"pattern": "x"},
            "vocab": [
                {"rank": n, "token_bytes": base64.b64encode(t.encode()).decode(), "token_str": t}
                for n, t in enumerate(tokens)
            ],
        }
    ).encode(),
    "qwen.tiktoken": lambda tokens: b"".join(
        base64.b64encode(token.encode()) + b" %d\n" % n for n, token in enumerate(tokens)
    ),
}


@pytest.mark.parametrize("name", STORED)
def test_every_kind_of_file_tells_its_tokens(name: str, tmp_path: Path) -> None:
    mine = read(tmp_path / name, STORED[name](PLAIN))
    changed = read(tmp_path / name, STORED[name]([*PLAIN[:2], "other", *PLAIN[3:]]))

    assert mine.count == len(PLAIN)
    assert mine.conflicts(changed).tolist() == [2]


def test_a_real_sentencepiece_model_is_read(tmp_path: Path) -> None:
    sentencepiece_library = pytest.importorskip("sentencepiece", reason="to train a small one")
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece_library.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=30
    )

    assert read_vocabulary(tmp_path / "tokenizer.model").count == 30


@given(
    tokens=st.lists(
        st.text(st.characters(codec="utf-8"), max_size=8), min_size=1, max_size=30, unique=True
    ),
    step=st.integers(1, 40),
    ascii_only=st.booleans(),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_how_the_file_is_cut_while_reading_makes_no_difference(
    tmp_path: Path, tokens: list[str], step: int, *, ascii_only: bool
) -> None:
    path = tmp_path / "tokenizer.json"
    text = json.dumps(tokenizer_json(tokens, ADDED), ensure_ascii=ascii_only)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabularies, "_STEP", step)
        cut = read(path, text)

    assert cut.tokens.tolist() == [
        (hash(token.encode()) & (2**64 - 1)) | 1 for token in [*tokens, *ADDED]
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", '{"model": {"vocab": {"a": "b"}}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": 1'),
        ("tokenizer.json", "]"),
        ("tokenizer.json", ","),
        ("tokenizer.json", "[" * 100),
        ("tokenizer.json", '{"model": {"vocab": {"a": -1}}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": 99999999999}}}'),
        ("vocab.json", '{"a": 1, "unended'),
        ("tokenizer.model", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
        ("tokenizer.model", b"\x08\x01"),
        ("tokenizer.model", b"\x0a\x02\x0a\xff"),
        ("qwen.tiktoken", b"YQ== x\n"),
    ],
)
def test_what_is_no_vocabulary_is_refused(name: str, text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match=name.replace(".", r"\.")):
        read(tmp_path / name, text)


def test_a_file_is_compared_by_that_both_have(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory, names in ((first, ["tokenizer.json", "vocab.txt"]), (second, ["vocab.txt"])):
        directory.mkdir()
        for name in names:
            (directory / name).touch()

    assert find_common(first, second) == "vocab.txt"
    assert find_common(first, tmp_path) is None


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    document = tokenizer_json([f"token {number}" for number in range(30_000)], ADDED)
    document["model"]["merges"] = [["a" * 50, "b" * 50]] * 100_000
    path.write_text(json.dumps(document))
    assert path.stat().st_size > 11_000_000

    tracemalloc.start()
    read_vocabulary(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    # Two steps of text, and the numbers.
    assert peak < 6_000_000
