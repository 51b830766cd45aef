"""Cases that are chosen for a circumstance have all parts that any case has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from covering import choose, cover, parts_of, share, try_all_pairs

from streammerge.methods import discover_methods

LETTERS = {"one": "ab", "two": "bc", "three": "c", "four": "abcd"}


@pytest.fixture(autouse=True)
def _chosen() -> Iterator[None]:
    """Choose, whatever the run of the tests was asked for."""
    try_all_pairs(all_pairs=False)
    yield
    try_all_pairs(all_pairs=False)


def letters_of(case: str) -> frozenset[str]:
    return frozenset(LETTERS[case])


def test_every_case_meets_one_kind_and_every_part_all_kinds() -> None:
    pairs = cover(LETTERS, ["x", "y", "z"], letters_of)

    assert {case for case, _ in pairs} == set(LETTERS)
    for kind in ("x", "y", "z"):
        met = {letter for case, found in pairs if found == kind for letter in letters_of(case)}
        assert met == set("abcd"), kind


def test_all_may_be_tried_with_all() -> None:
    try_all_pairs(all_pairs=True)
    pairs = cover(LETTERS, ["x", "y"], letters_of)

    assert len(pairs) == len(set(pairs)) == 2 * len(LETTERS)
    assert choose(LETTERS, letters_of, lambda _: "m") == list(LETTERS)


def test_what_has_been_met_is_not_tried_again() -> None:
    assert cover(LETTERS, ["x", "y"], letters_of) == [
        ("one", "x"),
        ("two", "y"),
        ("three", "x"),
        ("four", "x"),
        ("four", "y"),
    ]


def test_the_share_of_a_case_is_what_it_is_paired_with() -> None:
    assert share(LETTERS, ["x", "y"], letters_of, str.upper) == {
        "ONE": ["x"],
        "TWO": ["y"],
        "THREE": ["x"],
        "FOUR": ["x", "y"],
    }


def test_the_first_of_a_method_is_chosen_and_whatever_else_brings_a_part() -> None:
    of_method = {"one": "m", "two": "m", "three": "n", "four": "m"}

    assert choose(LETTERS, letters_of, of_method.__getitem__) == ["one", "three", "four"]


def test_methods_differ_in_their_parts_and_examples_that_only_differ_in_numbers_do_not() -> None:
    parts = {
        (name, number): parts_of(name, example, has_base=True)
        for name in ("ties", "sce", "karcher", "dare_linear")
        for number, example in enumerate(discover_methods()[name].examples)
    }

    assert parts["ties", 0] != parts["sce", 0] != parts["karcher", 0]
    assert parts_of("ties", {"density": 0.2}, has_base=True) == parts_of(
        "ties", {"density": 0.7}, has_base=True
    )
    assert parts_of("ties", {"density": 0.2}, has_base=True) != parts_of(
        "ties", {"density": 0.2, "scope": "model"}, has_base=True
    )
