"""What a recipe may say of vocabularies, and that it is written down again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from streammerge.errors import RecipeError
from streammerge.methods import discover_methods
from streammerge.recipe.dumping import dump_recipe
from streammerge.recipe.json_schema import recipe_json_schema
from streammerge.recipe.parsing import parse_recipe, recipe_from_mapping
from streammerge.recipe.types import BASE, DrawnVocabulary, Recipe, TokenOrigin, VocabularyPolicy

METHODS = {name: each.parameters for name, each in discover_methods().items()}
VALIDATOR = Draft202012Validator(recipe_json_schema(METHODS))
TABLE = {
    "source": "union",
    "fill": 1,
    "tokens": {"<x>": {"source": "zero"}, "y": {"source": 0, "token": "z", "force": True}},
    "pad_to_multiple_of": 64,
}


def document(vocabulary: object) -> dict[str, Any]:
    return {
        "method": "ties",
        "base": "a",
        "sources": [{"path": "b"}, {"path": "c"}],
        "parameters": {"density": 0.5},
        "vocabulary": vocabulary,
    }


def parsed(vocabulary: object) -> Recipe:
    return recipe_from_mapping(document(vocabulary), origin="r", methods=METHODS)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("error", VocabularyPolicy.ERROR),
        ("same", VocabularyPolicy.SAME),
        ("union", DrawnVocabulary(None)),
        ("base", DrawnVocabulary(BASE)),
        (1, DrawnVocabulary(1)),
        ({"source": "there"}, DrawnVocabulary(Path("there"))),
        ({"source": "base", "fill": "mean"}, DrawnVocabulary(BASE, means=True)),
        (
            TABLE,
            DrawnVocabulary(
                None,
                {"<x>": TokenOrigin(None), "y": TokenOrigin(0, "z", force=True)},
                fill=1,
                multiple=64,
            ),
        ),
    ],
)
def test_it_is_read_and_written_down_again(value: object, expected: object) -> None:
    recipe = parsed(value)

    assert recipe.vocabulary == expected
    assert VALIDATOR.is_valid(document(value))
    assert parse_recipe(dump_recipe(recipe), origin="r", methods=METHODS) == recipe


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            "unoin",
            'got "unoin"; did you mean "union"?',
        ),
        (2, "vocabulary: expected the index of one of 2 sources, 0 to 1, got 2"),
        (True, "vocabulary: expected error or same"),
        ({}, "vocabulary: source: this key is required"),
        ({"source": "union", "fills": 1}, 'did you mean "fill"?'),
        ({"source": "union", "fill": "x"}, "vocabulary: fill: expected base, the index"),
        ({"source": "union", "fill": 4}, "vocabulary.fill: expected the index of one of 2"),
        ({"source": 1.5}, "vocabulary: source: expected union, common, base"),
        ({"source": "union", "tokens": []}, "vocabulary: tokens: expected a mapping"),
        ({"source": "union", "tokens": {"x": 1}}, "vocabulary: tokens.x: expected a mapping"),
        (
            {"source": "union", "tokens": {"x": {"source": "zero", "token": "y"}}},
            "vocabulary: tokens.x.token: zeros are no token's",
        ),
        (
            {"source": "union", "tokens": {"x": {"source": 0, "force": 1}}},
            "vocabulary: tokens.x.force: expected true or false",
        ),
        (
            {"source": "union", "tokens": {"x": {"source": 7}}},
            "vocabulary.tokens.x.source: expected the index of one of 2 sources",
        ),
        ({"source": "union", "pad_to_multiple_of": 0}, "vocabulary: pad_to_multiple_of: expected"),
    ],
)
def test_what_is_not_understood_is_refused(value: object, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parsed(value)

    assert said in str(caught.value)


def test_a_base_that_is_not_there_is_refused() -> None:
    for value in ("base", {"source": "union", "fill": "base"}):
        with pytest.raises(RecipeError, match="the recipe has no base"):
            recipe_from_mapping(
                {"method": "linear", "sources": [{"path": "b"}], "vocabulary": value},
                origin="r",
                methods=METHODS,
            )
