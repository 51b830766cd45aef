"""Rows drawn by token: merging is what it is of models that were given those rows by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    BLOCK,
    Models,
    Tensors,
    assert_same_model,
    count_sources,
    load_model,
    recipe_of,
    recut,
    required,
    tight_plan,
    write_adapter,
)
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import streammerge
from streammerge.errors import CheckpointError, RecipeError, ShapeMismatchError
from streammerge.methods import discover_methods
from streammerge.methods.base import Operand
from streammerge.plan.codec import dump_plan, parse_plan

WIDTH = 4096
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
OTHERS = {"model.layers.0.q.weight": (24, WIDTH), "model.norm.weight": (WIDTH,)}
WORDS = [f"w{index}" for index in range(2 * BLOCK // WIDTH + 9)]
A = (["<unk>", "x", "y", "z", *WORDS], ["<s>"], 1)
B = (["<unk>", "y", *reversed(WORDS), "new", "x"], ["<im>"], 3)
C = (["<unk>", *WORDS[::2], "new", "q", "y"], ["<im>", "<s>"], 2)
Given = tuple[list[str], list[str], int]


def tokens_of(given: Given) -> list[str]:
    return [*given[0], *given[1]]


def write_tokenizer(directory: Path, words: Sequence[str], special: Sequence[str]) -> None:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_tokens([AddedToken(each, special=True) for each in special])
    directory.mkdir(exist_ok=True, parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))


def draw(given: Given, seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """Draw a model with a row for every token, and some of padding."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(tokens_of(given)) + given[2]
    shapes = OTHERS | dict.fromkeys(EMBEDDINGS, (rows, WIDTH))
    return {name: torch.randn(s, generator=generator).to(dtype) for name, s in shapes.items()}


def write(models: Models, given: Given, tensors: Tensors, **options: Any) -> Path:
    path = models.write(tensors, **options)
    write_tokenizer(path, given[0], given[1])
    rows = tensors[EMBEDDINGS[0]].shape[0]
    config = {"model_type": "llama", "tie_word_embeddings": "lm_head.weight" not in tensors}
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    return path


def by_hand(
    given: Sequence[Given], drawn: Sequence[Tensors], result: Sequence[str], fill: int | None
) -> list[Tensors]:
    """Return the models with one row for each of the result's tokens, found in dictionaries."""
    made = []
    for model in drawn:
        tensors = dict(model)
        for name in (each for each in EMBEDDINGS if each in model):
            rows = []
            for token in result:
                held = {
                    index: other[name][tokens_of(each).index(token)]
                    for index, (each, other) in enumerate(zip(given, drawn, strict=True))
                    if token in tokens_of(each)
                }
                own = next(index for index, other in enumerate(drawn) if other is model)
                if own in held:
                    rows.append(held[own])
                elif fill in held:
                    rows.append(held[fill])
                else:
                    mean = torch.stack([row.double() for row in held.values()]).mean(dim=0)
                    rows.append(mean.to(model[name].dtype))
            tensors[name] = torch.stack(rows)
        made.append(tensors)
    return made


def united(*given: Given) -> list[str]:
    return list(dict.fromkeys(token for each in given for token in tokens_of(each)))


ABC = (A, B, C)


def three(models: Models, **options: Any) -> tuple[list[Path], list[Tensors]]:
    drawn = [draw(given, seed) for seed, given in enumerate(ABC)]
    return [write(models, g, t, **options) for g, t in zip(ABC, drawn, strict=True)], drawn


def with_rows_by_hand(
    models: Models, drawn: Sequence[Tensors], result: Sequence[str], fill: int | None
) -> list[Path]:
    """Write them, padded as the first one."""
    made = by_hand(ABC, drawn, result, fill)
    return [models.write(each) for each in made]


@pytest.mark.parametrize("method", discover_methods())
def test_any_method_merges_rows_of_a_union(method: str, models: Models) -> None:
    found = discover_methods()[method]
    on_base = found.operand is not Operand.WEIGHTS
    paths, drawn = three(models)
    hands = with_rows_by_hand(models, drawn, united(*ABC), 0 if on_base else None)
    if not on_base:
        # What all three have, of as many as the method takes.
        count = count_sources(found, 3)
        given = ABC[:count]
        hands = [models.write(each) for each in by_hand(given, drawn[:count], united(*given), None)]
        recipes = [recipe_of(method, None, each[:count]) for each in (paths, hands)]
    else:
        count = count_sources(found, 2)
        hands = [
            models.write(each)
            for each in by_hand(ABC[: count + 1], drawn[: count + 1], united(*ABC[: count + 1]), 0)
        ]
        recipes = [recipe_of(method, each[0], each[1 : count + 1]) for each in (paths, hands)]
    recipes = [each | {"parameters": dict(required(found))} for each in recipes]

    got, _ = models.merge(recipes[0] | {"vocabulary": "union"})
    expected, _ = models.merge(recipes[1])

    # The padding of the first goes on behind all tokens where these are fewer than its rows.
    rows = len(expected[EMBEDDINGS[0]])
    assert len(got[EMBEDDINGS[0]]) == max(rows, len(drawn[0][EMBEDDINGS[0]]))
    for name in EMBEDDINGS:
        got[name] = got[name][:rows]
    assert_same_model(got, expected)


@pytest.mark.parametrize("fill", [None, 1, "mean"])
@pytest.mark.parametrize("source", ["base", 1])
def test_rows_are_those_of_one_models_tokens(
    source: str | int, fill: int | str | None, models: Models
) -> None:
    paths, drawn = three(models)
    owner = ABC[0] if source == "base" else ABC[2]
    filling = {None: 0, 1: 2, "mean": None}[fill]
    hands = with_rows_by_hand(models, drawn, tokens_of(owner), filling)
    vocabulary: dict[str, Any] = {"source": source}
    if fill is not None:
        vocabulary["fill"] = fill
    parameters = {"density": 0.4}

    got, _ = models.merge(
        recipe_of("ties", paths[0], paths[1:], parameters=parameters, vocabulary=vocabulary)
    )
    expected, _ = models.merge(recipe_of("ties", hands[0], hands[1:], parameters=parameters))

    rows = len(tokens_of(owner))
    assert len(got[EMBEDDINGS[0]]) == rows + owner[2]
    # Thresholds are of all rows, those of padding as well.
    if not owner[2]:
        assert_same_model(got, expected)
    plain = recipe_of("linear", None, paths, vocabulary={"source": 0, "fill": 0})
    got, _ = models.merge(plain)
    hands = with_rows_by_hand(models, drawn, tokens_of(A), 0)
    expected, _ = models.merge(recipe_of("linear", None, hands))
    for name in EMBEDDINGS:
        assert torch.equal(got[name][: len(tokens_of(A))], expected[name])


@pytest.mark.parametrize("has_base", [True, False])
def test_of_common_tokens_alone_rows_are_merged(models: Models, *, has_base: bool) -> None:
    paths, drawn = three(models)
    if has_base:
        recipe = recipe_of("task_arithmetic", paths[0], paths[1:])
    else:
        recipe = recipe_of("linear", None, paths)
    common = set.intersection(*(set(tokens_of(each)) for each in ABC))
    assert 0 < len(common) < len(tokens_of(A))

    got, _ = models.merge(recipe | {"vocabulary": "common"})

    for name in EMBEDDINGS:
        hands = by_hand(ABC, drawn, tokens_of(A), 0)
        of_first = hands[0][name]
        others = [
            torch.stack(
                [
                    each[name][row] if token in common else of_first[row]
                    for row, token in enumerate(tokens_of(A))
                ]
            )
            for each in hands
        ]
        made = [hand | {name: rows} for hand, rows in zip(hands, others, strict=True)]
        written = [models.write({name: each[name]}) for each in made]
        plain = (
            recipe_of("task_arithmetic", written[0], written[1:])
            if has_base
            else recipe_of("linear", None, written)
        )
        expected, _ = models.merge(plain)
        rows = got[name][: len(tokens_of(A))]
        assert torch.equal(rows, expected[name])
        if has_base:
            for row, token in enumerate(tokens_of(A)):
                assert token in common or torch.equal(rows[row], of_first[row])


def test_no_cut_of_the_work_changes_a_byte(models: Models) -> None:
    paths, _ = three(models, shards=2)
    recipe = recipe_of("ties", paths[0], paths[1:], parameters={"density": 0.3}, vocabulary="union")
    plan = streammerge.plan(recipe, memory="3GiB")
    expected, _ = models.merge(plan)
    for asked in (
        recut(plan, slots=3, workers=1, statistics_bytes=1),
        recut(plan, slots=30, slot_blocks=2, workers=3),
        tight_plan(recipe | {"output": {"max_shard_size": "100KB"}}, workers=2),
        parse_plan(dump_plan(plan)),
    ):
        assert_same_model(models.merge(asked)[0], expected)


def test_rows_of_padding_stay_in_their_places(models: Models) -> None:
    """A model that holds a token there has the padding of the first in its place."""
    paths, drawn = three(models)
    got, _ = models.merge(recipe_of("linear", None, paths, vocabulary=0))

    count = len(tokens_of(A))
    name = EMBEDDINGS[0]
    assert got[name].shape == drawn[0][name].shape
    own = drawn[0][name][count:]
    lengths = [len(each[name]) for each in drawn]
    assert lengths[1] > count
    # B's rows there stand for no token of A: they are B's own.
    theirs = [own.double(), drawn[1][name][count:].double()]
    numbers = {tokens_of(B).index(token) for token in tokens_of(A) if token in tokens_of(B)}
    for row in range(count, len(got[name])):
        second = theirs[0] if row in numbers else theirs[1]
        mean = (2 * own[row - count].double() + second[row - count]) / 3
        torch.testing.assert_close(got[name][row].double(), mean, rtol=1e-6, atol=1e-6)


def test_rows_are_padded_to_a_multiple_with_their_mean(models: Models) -> None:
    paths, _ = three(models)
    vocabulary = {"source": 0, "fill": 0, "pad_to_multiple_of": 1000}
    got, _ = models.merge(recipe_of("linear", None, paths, vocabulary=vocabulary))

    count = len(tokens_of(A))
    for name in EMBEDDINGS:
        assert len(got[name]) == -(-count // 1000) * 1000
        mean = got[name][:count].double().mean(dim=0)
        new = got[name][count:].double()
        torch.testing.assert_close(new, mean.expand(new.shape), rtol=1e-5, atol=1e-7)


def test_tokens_that_the_recipe_names_have_its_rows(models: Models) -> None:
    paths, drawn = three(models)
    tokens = {
        "q": {"source": 0, "token": "z"},
        "x": {"source": "zero", "force": True},
        "<im>": {"source": 1, "token": 5, "force": True},
        "y": {"source": "zero"},
    }
    vocabulary = {"source": "union", "tokens": tokens}

    got, _ = models.merge(recipe_of("linear", None, paths, vocabulary=vocabulary))

    numbers = {token: number for number, token in enumerate(united(*ABC))}
    for name in EMBEDDINGS:
        a, b, c = (each[name].double() for each in drawn)
        expected = {
            "q": (2 * a[3] + c[tokens_of(C).index("q")]) / 3,
            "x": torch.zeros(WIDTH, dtype=torch.float64),
            "<im>": b[5],
            "y": (a[2] + b[1] + c[tokens_of(C).index("y")]) / 3,
        }
        for token, row in expected.items():
            torch.testing.assert_close(
                got[name][numbers[token]].double(), row, rtol=1e-5, atol=1e-6
            )


def test_embeddings_that_are_tied_are_drawn_once(models: Models) -> None:
    given = (A, B)
    drawn = [draw(each, seed) for seed, each in enumerate(given)]
    for each in drawn:
        del each["lm_head.weight"]
    paths = [write(models, g, t) for g, t in zip(given, drawn, strict=True)]

    got, _ = models.merge(recipe_of("linear", None, paths, vocabulary="union"))

    hands = [models.write(each) for each in by_hand(given, drawn, united(*given), None)]
    expected, _ = models.merge(recipe_of("linear", None, hands))
    rows = len(united(*given))
    assert torch.equal(got[EMBEDDINGS[0]][:rows], expected[EMBEDDINGS[0]])
    assert "lm_head.weight" not in got


def test_a_head_of_its_own_is_drawn_for_a_model_that_is_tied(models: Models) -> None:
    given = (A, B)
    drawn = [draw(each, seed) for seed, each in enumerate(given)]
    del drawn[1]["lm_head.weight"]
    paths = [write(models, g, t) for g, t in zip(given, drawn, strict=True)]

    got, _ = models.merge(recipe_of("linear", None, paths, vocabulary="union"))

    drawn[1]["lm_head.weight"] = drawn[1]["model.embed_tokens.weight"]
    hands = [models.write(each) for each in by_hand(given, drawn, united(*given), None)]
    expected, _ = models.merge(recipe_of("linear", None, hands))
    for name in EMBEDDINGS:
        assert torch.equal(got[name][: len(expected[name])], expected[name])


def test_rows_of_another_type_are_rounded_once(models: Models) -> None:
    given = (A, B)
    drawn = [draw(A, 0, torch.bfloat16), draw(B, 1, torch.float32)]
    paths = [write(models, g, t) for g, t in zip(given, drawn, strict=True)]
    recipe = recipe_of("linear", None, paths, vocabulary="union", output={"dtype": "float32"})

    plan = streammerge.plan(recipe)
    got, _ = models.merge(plan)

    notes = [note.text for note in plan.notes if note.topic == "vocabulary"]
    assert any(note.endswith("rounded to BF16") for note in notes)
    row = tokens_of(B).index("new")
    number = united(*given).index("new")
    for name in EMBEDDINGS:
        theirs = drawn[1][name][row]
        mean = (theirs.bfloat16().double() + theirs.double()) / 2
        torch.testing.assert_close(got[name][number].double(), mean, rtol=1e-6, atol=1e-7)


def test_vocabularies_that_are_the_same_leave_all_rows_alone(models: Models) -> None:
    """Whatever kind of file they are in, and without one as well."""
    drawn = [draw(A, seed) for seed in range(3)]
    paths = [write(models, A, each) for each in drawn]
    (paths[2] / "tokenizer.json").unlink()
    plan = streammerge.plan(recipe_of("linear", None, paths, vocabulary="union"))
    assert all(entry is None or entry.rows is None for t in plan.tasks for entry in t.inputs)
    for path in paths[:2]:
        (path / "tokenizer.json").unlink()
        (path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(A[0])}))
    plan = streammerge.plan(recipe_of("linear", None, paths, vocabulary=0))
    assert all(entry is None or entry.rows is None for t in plan.tasks for entry in t.inputs)


def test_the_tokenizer_has_the_tokens_of_all(models: Models) -> None:
    paths, _ = three(models)
    config = {"vocab_size": 5, "bos_token_id": 1, "eos_token_id": 2}
    out = models.new_output()

    streammerge.merge(recipe_of("linear", None, paths, vocabulary="union"), out)

    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    assert [token for token, _ in sorted(vocabulary.items(), key=lambda item: item[1])] == united(
        *ABC
    )
    for path in paths:
        own = Tokenizer.from_file(str(path / "tokenizer.json"))
        text = " ".join(tokens_of(ABC[paths.index(path)])[1:])
        ours, theirs = tokenizer.encode(text), own.encode(text)
        assert ours.tokens == theirs.tokens
    special = {each.content: each.special for each in tokenizer.get_added_tokens_decoder().values()}
    assert special["<im>"]
    assert not special["q"]
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == len(load_model(out)[EMBEDDINGS[0]])
    assert not streammerge.verify_files(out).damages
    comparison = streammerge.verify_against(
        recipe_of("linear", None, paths, vocabulary="union"), out, fraction=1.0
    )
    assert not comparison.differing


def test_numbers_of_special_tokens_are_those_of_the_vocabulary(models: Models) -> None:
    paths, _ = three(models)
    for index, path in enumerate(paths):
        config = json.loads((path / "config.json").read_text()) | {"bos_token_id": index + 3}
        (path / "config.json").write_text(json.dumps(config))
    out = models.new_output()

    streammerge.merge(recipe_of("linear", None, paths, vocabulary=1), out)

    config = json.loads((out / "config.json").read_text())
    assert config["bos_token_id"] == 4
    assert (out / "tokenizer.json").read_bytes() == (paths[1] / "tokenizer.json").read_bytes()


def test_a_tokenizer_beside_the_models_is_followed(models: Models, tmp_path: Path) -> None:
    paths, drawn = three(models)
    tokens = ["q", "<unk>", "x", "<new>"]
    write_tokenizer(tmp_path / "other", tokens, [])
    vocabulary = {"source": str(tmp_path / "other")}

    got, _ = models.merge(recipe_of("linear", None, paths, vocabulary=vocabulary))

    for name in EMBEDDINGS:
        rows = [
            drawn[2][name][tokens_of(C).index("q")].double(),
            sum(each[name][0].double() for each in drawn) / 3,
            (drawn[0][name][1].double() + drawn[1][name][tokens_of(B).index("x")].double()) / 2,
            torch.zeros(WIDTH, dtype=torch.float64),
        ]
        torch.testing.assert_close(got[name].double(), torch.stack(rows), rtol=1e-5, atol=1e-6)


def test_adapters_on_the_base_follow_its_rows(models: Models, tmp_path: Path) -> None:
    """Of a base whose vocabulary another model's takes the place of, with an adapter on its layers."""
    paths, drawn = three(models)
    adapter = write_adapter(tmp_path / "lora", {"model.layers.0.q.weight": (24, WIDTH)}, seed=1)
    recipe = recipe_of(
        "task_arithmetic",
        paths[0],
        [paths[1], adapter],
        vocabulary="union",
        parameters={"weight": [0.5, 1.0]},
    )

    got, _ = models.merge(recipe)

    hands = [models.write(each) for each in by_hand(ABC[:2], drawn[:2], united(A, B), 0)]
    expected, _ = models.merge(
        recipe_of(
            "task_arithmetic", hands[0], [hands[1], adapter], parameters={"weight": [0.5, 1.0]}
        )
    )
    rows = len(expected[EMBEDDINGS[0]])
    assert_same_model(got | {n: got[n][:rows] for n in EMBEDDINGS}, expected)


def refused(recipe: Mapping[str, Any], kind: type[Exception] = RecipeError) -> str:
    with pytest.raises(kind) as caught:
        streammerge.plan(recipe)
    return str(caught.value)


def test_what_cannot_be_drawn_is_refused(models: Models, tmp_path: Path) -> None:
    paths, drawn = three(models)
    plain = models.write(draw(A, 5))
    (plain / "vocab.json").write_text('{"a": 0}')

    said = refused(recipe_of("linear", None, [*paths, plain], vocabulary="union"), CheckpointError)
    assert "has no tokenizer.json, by which rows are drawn" in said
    said = refused(
        recipe_of(
            "linear",
            None,
            paths,
            vocabulary={"source": "union", "tokens": {"<none>": {"source": 0}}},
        )
    )
    assert "the result has no token <none>" in said
    tokens = {"x": {"source": 2, "token": "absent"}}
    said = refused(
        recipe_of("linear", None, paths, vocabulary={"source": "union", "tokens": tokens})
    )
    assert "has no token absent, whose row is to stand for x" in said
    tokens = {"x": {"source": 2, "token": 10**6}}
    said = refused(
        recipe_of("linear", None, paths, vocabulary={"source": "union", "tokens": tokens})
    )
    assert "row 1000000 is to stand for a token" in said
    said = refused(
        recipe_of("linear", None, paths, vocabulary=0, output={"companions": {"tokenizer": 1}})
    )
    assert said.startswith("output.companions.tokenizer: rows are drawn for the tokens of")
    narrow = {n: t[:, : WIDTH // 2] if n in EMBEDDINGS else t for n, t in drawn[1].items()}
    said = refused(
        recipe_of("linear", None, [paths[0], write(models, B, narrow)], vocabulary="union"),
        ShapeMismatchError,
    )
    assert f"rows have [{WIDTH // 2}] elements" in said
    torn = paths[1] / "tokenizer.json"
    torn.write_text(torn.read_text()[:-200])
    said = refused(recipe_of("linear", None, paths, vocabulary="union"), CheckpointError)
    assert str(torn) in said


def test_refusals_speak_of_mergekits_keys(models: Models, tmp_path: Path) -> None:
    paths, _ = three(models)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(path), "parameters": {"weight": 1}} for path in paths],
    }
    origin = {"kind": "model_token", "model": str(paths[0]), "token": "absent"}
    tokens = {"x": {"source": origin}}

    said = refused(recipe | {"tokenizer": {"source": "union", "tokens": tokens}})
    assert said.startswith("tokenizer.tokens: sources[0]")
    said = refused(recipe | {"tokenizer_source": str(tmp_path)}, CheckpointError)
    assert said.startswith(f"tokenizer_source: {tmp_path} has no tokenizer.json")
    assert "vocabulary" not in said
