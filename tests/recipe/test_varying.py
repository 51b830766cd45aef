"""Values that differ from tensor to tensor: gradients, cases, slices of layers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.errors import RecipeError
from streammerge.methods import discover_methods
from streammerge.recipe.dumping import dump_recipe
from streammerge.recipe.parsing import parse_recipe
from streammerge.recipe.resolving import Position, build_resolver
from streammerge.recipe.types import BASE, Case, Cases, Gradient, LayerRange, LayerSlice, Recipe
from streammerge.recipe.varying import value_at

METHODS = {name: each.parameters for name, each in discover_methods().items()}


def parsed(text: str) -> Recipe:
    return parse_recipe(text, origin="r.yaml", methods=METHODS)


def refused(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parsed(text)
    return [line.removeprefix("r.yaml: ") for line in str(caught.value).split("\n")]


SLERP = "method: slerp\nbase: a\nsources: [{path: b}]\n"
LINEAR = "method: linear\nsources: [{path: a}, {path: b}, {path: c}]\n"


@given(
    values=st.lists(st.floats(-4, 4), min_size=1, max_size=6),
    layers=st.integers(1, 40),
)
def test_gradients_are_linear_between_their_values(values: list[float], layers: int) -> None:
    gradient = Gradient(tuple(values))
    for layer in range(layers):
        depth = layer / (layers - 1) if layers > 1 else 1.0
        place = depth * (len(values) - 1)
        low, high = values[math.floor(place)], values[math.ceil(place)]
        expected = low + (high - low) * (place - math.floor(place))
        assert value_at(gradient, "", depth) == pytest.approx(expected, abs=1e-12)


def test_the_ends_of_a_gradient_are_its_values_to_the_bit() -> None:
    gradient = Gradient((0.1, 0.7, 0.3))
    assert [value_at(gradient, "", depth) for depth in (0.0, 0.5, 1.0)] == [0.1, 0.7, 0.3]


def test_words_and_switches_do_not_blend() -> None:
    assert [value_at(Gradient((True, False)), "", depth) for depth in (0.0, 0.9, 1.0)] == [
        True,
        True,
        False,
    ]
    assert value_at(Gradient(("total", "frequency", "total")), "", 0.6) == "frequency"


def test_the_first_case_that_fits_counts() -> None:
    cases = Cases((Case("*.mlp.*", 0.3), Case("*", Gradient((0.0, 1.0)))))
    assert value_at(cases, "layers.0.mlp.up", 0.25) == 0.3
    assert value_at(cases, "layers.0.attn.q", 0.25) == 0.25
    assert value_at(Cases((Case("*.mlp.*", 0.3),)), "layers.0.attn.q", 0.25) is None


def test_a_recipe_says_them_and_is_written_down_again() -> None:
    text = SLERP + (
        "parameters:\n  t: {cases: [{tensors: '*mlp*', value: {gradient: [0, 1]}}, {value: 0.5}]}\n"
    )
    recipe = parsed(text)
    assert recipe.parameters["t"] == Cases(
        (Case("*mlp*", Gradient((0.0, 1.0))), Case(None, 0.5)),
    )
    assert parsed(dump_recipe(recipe)) == recipe


def test_layers_are_read_and_written_down_again() -> None:
    recipe = parsed(
        "method: ties\nbase: a\nsources: [{path: b, density: 0.1}, {path: c}]\n"
        "parameters: {density: {gradient: [0.2, 0.8]}}\n"
        "layers:\n"
        "- sources: [{source: 1, layers: [4, 8], weight: 2}, {source: 0, layers: [0, 4]}]\n"
        "  density: 0.5\n"
        "- sources: [{source: 0, layers: [3, 9]}, {source: base, layers: [0, 6]}]\n"
    )
    assert recipe.layers == (
        LayerSlice(
            (
                LayerRange(0, 0, 4),
                LayerRange(1, 4, 8, {"weight": 2.0}),
            ),
            {"density": 0.5},
        ),
        LayerSlice((LayerRange(BASE, 0, 6), LayerRange(0, 3, 9))),
    )
    assert parsed(dump_recipe(recipe)) == recipe


def test_the_nearest_level_that_says_something_counts() -> None:
    recipe = parsed(
        "method: ties\nbase: a\nsources: [{path: b, density: 0.1}, {path: c}]\n"
        "parameters: {density: 0.9, weight: [1, 2]}\n"
        "rules: [{tensors: '*.norm', density: {cases: [{tensors: '*.3.*', value: 0.6}]}}]\n"
        "layers:\n"
        "- sources: [{source: 0, layers: [0, 4]}, {source: 1, layers: [0, 4], density: 0.4}]\n"
        "- sources: [{source: 1, layers: [2, 4]}]\n"
        "  density: {gradient: [0.2, 0.3]}\n"
    )

    def position_of(name: str) -> Position:
        layer = int(name.split(".")[1])
        return Position(0.0, 0) if layer < 4 else Position(float(layer - 4), 1)

    resolve = build_resolver(recipe, METHODS["ties"], position_of)

    def of(name: str, parameter: str) -> object:
        return dict(resolve(name).values)[parameter]

    assert of("l.0.q", "density") == (0.1, 0.4)
    assert of("l.3.norm", "density") == (0.6, 0.6)
    assert of("l.0.norm", "density") == (0.1, 0.4)
    assert of("l.4.q", "density") == (0.2,)
    assert of("l.5.q", "density") == (0.3,)
    # One value per source of the recipe, of which the slice merges the second.
    assert of("l.4.q", "weight") == (2.0,)


def test_cases_of_a_source_go_by_the_name_that_it_has() -> None:
    recipe = parsed(
        "method: linear\nsources:\n"
        "- {path: a, weight: {cases: [{tensors: 'l.7.*', value: 0.5}]}}\n"
        "- {path: b, weight: {cases: [{tensors: 'l.7.*', value: 0.5}]}}\n"
        "layers: [{sources: [{source: 0, layers: [7, 8]}, {source: 1, layers: [0, 1]}]}]\n"
    )
    resolve = build_resolver(
        recipe, METHODS["linear"], lambda _: Position(1.0, 0, ("l.7.q", "l.0.q"))
    )
    assert dict(resolve("l.0.q").values)["weight"] == (0.5, 1.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            SLERP + "parameters: {t: {gradient: [0, x]}}",
            'parameters.t.gradient[1]: expected a number, got "x"',
        ),
        (
            SLERP + "parameters: {t: {gradient: 0.5}}",
            "parameters.t.gradient: expected a list of values from the first layer to the last, got 0.5",
        ),
        (
            SLERP + "parameters: {t: {gradient: []}}",
            (
                "parameters.t.gradient: expected a list of values from the first layer to the last, got a "
                "list of 0"
            ),
        ),
        (
            SLERP + "parameters: {t: {gradient: [0, 1], cases: []}}",
            "parameters.t: expected either gradient or cases, got 2 keys",
        ),
        (
            SLERP + "parameters: {t: {cases: [{tensor: x, value: 1}, {value: 0}]}}",
            'parameters.t.cases[0].tensor: unknown key; did you mean "tensors"?',
        ),
        (
            SLERP + "parameters: {t: {cases: [{value: 1}, {tensors: x, value: 0}]}}",
            (
                "parameters.t.cases[0]: a case without tensors is about all, and the ones after it about "
                "none"
            ),
        ),
        (
            SLERP + "parameters: {t: {cases: [{tensors: x}]}}",
            "parameters.t.cases[0].value: this key is required",
        ),
        (
            (
                "method: ties\nbase: a\nsources: [{path: b}]\n"
                "parameters: {density: 0.5, scope: {gradient: [tensor, model]}}"
            ),
            "parameters.scope: one value serves the whole model, got a mapping; give a single value",
        ),
        (
            LINEAR + "layers: [{sources: [{source: 3, layers: [0, 1]}]}]",
            "layers[0].sources[0].source: expected the index of one of 3 sources, 0 to 2, got 3",
        ),
        (
            LINEAR + "layers: [{sources: [{source: base, layers: [0, 1]}]}]",
            'layers[0].sources[0].source: the recipe has no base; add the key "base"',
        ),
        (
            LINEAR + "layers: [{sources: [{source: 0, layers: [1, 1]}]}]",
            (
                "layers[0].sources[0].layers: expected [first, end], the first layer counted from 0 and the "
                "one after the last, got [1, 1]"
            ),
        ),
        (
            LINEAR
            + "layers: [{sources: [{source: 0, layers: [0, 4]}, {source: 1, layers: [0, 3]}]}]",
            "layers[0].sources: a slice takes as many layers of each model, these give 4, 3",
        ),
        (
            LINEAR
            + "layers: [{sources: [{source: 0, layers: [0, 4]}, {source: 0, layers: [4, 8]}]}]",
            (
                "layers[0].sources[1].source: 0 gives layers to this slice already; to merge layers of one "
                "model with each other, list the model twice under sources"
            ),
        ),
        (
            LINEAR + "layers: [{sources: [{source: 0, layers: [0, 4], wieght: 1}]}]",
            'layers[0].sources[0].wieght: unknown key; did you mean "weight"?',
        ),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(text: str, said: str) -> None:
    assert said in refused(text)


def test_tensors_that_no_case_is_about_are_named() -> None:
    recipe = parsed(SLERP + "parameters: {t: {cases: [{tensors: '*mlp*', value: 0.5}]}}\n")
    resolve = build_resolver(recipe, METHODS["slerp"], lambda _: Position())

    assert dict(resolve("a.mlp.w").values)["t"] == 0.5
    with pytest.raises(RecipeError, match=r"parameters\.t: no value for a\.attn\.w, .* last case"):
        resolve("a.attn.w")
