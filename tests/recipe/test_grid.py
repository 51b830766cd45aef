"""A grid becomes one document per combination of its values, with a name for each."""

from __future__ import annotations

from typing import Any

import pytest

from streammerge.errors import RecipeError
from streammerge.recipe.grid import expand_grid

PLAIN: dict[str, Any] = {
    "method": "ties",
    "sources": [{"path": "a", "weight": 0.5}, {"path": "b"}],
    "parameters": {"density": 0.1},
}


def expand(grid: object) -> list[tuple[str, dict[str, Any]]]:
    expanded = expand_grid({**PLAIN, "grid": grid}, origin="recipe")
    assert expanded is not None
    return expanded


def test_a_document_without_a_grid_is_none() -> None:
    assert expand_grid(PLAIN, origin="recipe") is None
    assert expand_grid(["no", "mapping"], origin="recipe") is None


def test_every_combination_is_a_document() -> None:
    expanded = expand({"parameters.density": [0.2, 0.5], "parameters.lambda": [1, 2]})

    assert [name for name, _ in expanded] == [
        "density=0.2,lambda=1",
        "density=0.2,lambda=2",
        "density=0.5,lambda=1",
        "density=0.5,lambda=2",
    ]
    assert expanded[2][1] == {**PLAIN, "parameters": {"density": 0.5, "lambda": 1}}
    assert PLAIN["parameters"] == {"density": 0.1}


def test_places_in_lists_are_counted_from_0_and_tell_names_apart() -> None:
    expanded = expand({"sources.0.weight": [0.5], "sources.1.weight": [0.7]})

    assert expanded[0][0] == "sources.0.weight=0.5,sources.1.weight=0.7"
    assert [each["weight"] for each in expanded[0][1]["sources"]] == [0.5, 0.7]
    assert expand({"sources.1": [{"path": "c"}]})[0][1]["sources"][1] == {"path": "c"}


def test_mappings_on_the_way_are_made() -> None:
    assert expand({"output.dtype": ["float16"]})[0][1]["output"] == {"dtype": "float16"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([0.3, 0.7], "0.3+0.7"),
        (True, "true"),
        (None, "none"),
        ("../../etc/passwd", ".._.._etc_passwd"),
        ("", "_"),
        (-1e-5, "-1e-05"),
    ],
)
def test_a_name_is_that_of_one_directory(value: object, text: str) -> None:
    assert expand({"parameters.weight": [value]})[0][0] == f"weight={text}"


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({}, "expected a mapping of keys such as parameters.density"),
        ([1], "expected a mapping of keys such as parameters.density"),
        ({3: [1]}, "expected keys such as parameters.density or sources.0.weight, got 3"),
        ({"a..b": [1]}, "expected keys such as parameters.density"),
        ({"seed": 3}, "grid.seed: expected a list of values, got 3"),
        ({"seed": []}, "grid.seed: expected a list of values"),
        ({"sources.2.weight": [1]}, "expected a place in a list of 2, counted from 0, got"),
        ({"sources.one.weight": [1]}, "expected a place in a list of 2"),
        ({"method.name": ["ties"]}, "name would be inside of"),
        (
            {"seed": list(range(11)), "parameters.k": list(range(10))},
            "makes 110 outputs, of at most",
        ),
        ({"seed": [1, 1]}, "two outputs would be called"),
        ({"seed": ["a/b", "a_b"]}, "two outputs would be called"),
    ],
)
def test_what_is_no_grid_is_refused(grid: object, said: str) -> None:
    with pytest.raises(RecipeError, match="recipe: grid") as caught:
        expand(grid)

    assert said in str(caught.value)
