"""The published JSON Schema, and that it agrees with the parser."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from streammerge.errors import RecipeError
from streammerge.recipe.grid import expand_grid
from streammerge.recipe.json_schema import recipe_json_schema
from streammerge.recipe.parsing import recipe_from_mapping
from streammerge.recipe.types import ParameterKind, ParameterSpec, Semantics

FLOAT, BOOL, CHOICE = ParameterKind.FLOAT, ParameterKind.BOOL, ParameterKind.CHOICE
INT = ParameterKind.INT
WEIGHT = ParameterSpec("weight", FLOAT, "Factor of the source.", 1.0, per_source=True)
METHODS = {
    "linear": (
        WEIGHT,
        ParameterSpec("normalize", BOOL, "Divide by the weights.", default=True, per_source=False),
    ),
    "ties": (
        WEIGHT,
        ParameterSpec(
            "density", FLOAT, "Kept part.", None, per_source=True, minimum=0.0, maximum=1.0
        ),
        ParameterSpec(
            "scope",
            CHOICE,
            "What a threshold covers.",
            "tensor",
            per_source=False,
            choices=("tensor", "model"),
            per_tensor=False,
        ),
    ),
    "ranked": (
        ParameterSpec("rank", FLOAT, "Rank.", None, per_source=False, minimum=1.0),
        ParameterSpec("count", INT, "Count.", 0, per_source=False, minimum=0, maximum=9),
    ),
}
SCHEMA = recipe_json_schema(METHODS)
VALIDATOR = Draft202012Validator(SCHEMA)
A = {"path": "a"}

# A loaded machine is no reason to fail.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def parses(document):
    try:
        recipe_from_mapping(document, origin="r", methods=METHODS)
    except RecipeError:
        return False
    return True


def linear(**keys):
    return {"method": "linear", "sources": [A], **keys}


def ties(**keys):
    return {"method": "ties", "sources": [A], "parameters": {"density": 0.2}, **keys}


GOOD = [
    linear(),
    linear(base="b", seed=2**64 - 1, missing="base", non_finite="keep", compute_dtype="float64"),
    linear(output={"dtype": "BF16", "max_shard_size": "2.5 GiB"}),
    linear(output={"dtype": None, "max_shard_size": 1}),
    linear(output={"companions": 0}, vocabulary="ignore"),
    linear(output={"companions": "models/chat"}),
    linear(
        base="b", output={"companions": {"config": "base", "tokenizer": 0, "chat_template": "a"}}
    ),
    linear(parameters={"weight": [2], "normalize": False}),
    linear(rules=[{"tensors": "*", "copy": 0}, {"tensors": "*", "drop": True}]),
    linear(base="b", rules=[{"tensors": "*", "copy": "base"}]),
    linear(rules=[{"tensors": "*", "normalize": False, "drop": False}]),
    ties(),
    ties(parameters={"density": 1, "scope": "model"}),
    ties(parameters={}, sources=[A | {"density": 0.5}, A | {"density": 0, "weight": -1}]),
    ties(rules=[{"tensors": "*", "density": [0.5]}]),
    {"method": "ranked", "sources": [A], "parameters": {"rank": 4}},
]
BAD = [
    [],
    {},
    {"method": "linear"},
    {"sources": [A]},
    linear(method="linaer"),
    linear(sources=[]),
    linear(sources=["a"]),
    linear(sources=[{"weight": 1}]),
    linear(sources=[{"path": ""}]),
    linear(sources=[A | {"density": 1}]),  # a parameter of another method
    linear(sources=[A | {"normalize": True}]),  # one for all sources
    linear(sources=[A | {"weight": [1]}]),
    linear(sources=[A | {"weight": True}]),
    linear(sources=[A | {"weight": "0.5"}]),
    linear(normalize=True),
    linear(seed=-1),
    linear(seed=2**64),
    linear(seed=True),
    linear(semantics="pfet"),
    linear(missing="base"),  # without a base
    linear(output={"dtype": "int8"}),
    linear(output={"max_shard_size": "5 apples"}),
    linear(output={"max_shard_size": 0}),
    linear(output={"shards": 1}),
    linear(output={"companions": -1}),
    linear(output={"companions": None}),
    linear(output={"companions": ""}),
    linear(output={"companions": {"tokeniser": 0}}),
    linear(output={"companions": {"tokenizer": 0.5}}),
    linear(output={"companions": "base"}),  # without a base
    linear(output={"companions": {"config": "base"}}),  # without a base
    linear(vocabulary="other"),
    linear(parameters={"wieght": 1}),
    linear(parameters={"normalize": 1}),
    linear(rules=[{"tensors": ""}]),
    linear(rules=[{"copy": 0}]),
    linear(rules=[{"tensors": "*"}]),
    linear(rules=[{"tensors": "*", "drop": False}]),
    linear(rules=[{"tensors": "*", "copy": -1}]),
    linear(rules=[{"tensors": "*", "copy": "base"}]),  # without a base
    linear(rules=[{"tensors": "*", "copy": 0, "drop": True}]),
    linear(rules=[{"tensors": "*", "copy": 0, "weight": 1}]),
    linear(rules=[{"tensors": "*", "drop": True, "weight": 1}]),
    ties(parameters={}),
    ties(parameters={}, sources=[A | {"density": 0.5}, A]),
    ties(parameters={"density": 1.5}),
    ties(parameters={"density": [1.5]}),
    ties(parameters={"density": 0.5, "scope": "modle"}),
    ties(rules=[{"tensors": "*", "scope": "model"}]),  # one for the whole model
    {"method": "ranked", "sources": [A]},
    {"method": "ranked", "sources": [A], "parameters": {"rank": 0}},
]


def test_the_schema_is_a_schema_of_its_draft():
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(SCHEMA)


def test_the_schema_is_plain_json():
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


def test_equal_methods_give_equal_text():
    assert json.dumps(recipe_json_schema(METHODS)) == json.dumps(SCHEMA)


@pytest.mark.parametrize("document", GOOD, ids=str)
def test_schema_and_parser_accept(document):
    assert parses(document)
    assert [error.message for error in VALIDATOR.iter_errors(document)] == []


@pytest.mark.parametrize("document", BAD, ids=str)
def test_schema_and_parser_refuse(document):
    assert not parses(document)
    assert not VALIDATOR.is_valid(document)


def test_every_parameter_is_explained_with_its_range_and_default():
    properties = SCHEMA["$defs"]["ties.parameters"]["properties"]

    assert properties["density"]["description"].startswith("Kept part.")
    assert properties["density"]["anyOf"][0] == {"type": "number", "minimum": 0.0, "maximum": 1.0}
    assert properties["scope"] == {
        "description": "What a threshold covers.",
        "type": "string",
        "enum": ["tensor", "model"],
        "default": "tensor",
    }
    assert properties["weight"]["default"] == 1.0


def test_each_place_offers_only_the_parameters_that_may_stand_there():
    places = {name: set(shape.get("properties", ())) for name, shape in SCHEMA["$defs"].items()}

    assert places["ties.parameters"] == {"weight", "density", "scope"}
    assert places["ties.source"] == {
        "path",
        "adapter",
        "component",
        "rename",
        "weight",
        "density",
    }
    assert places["ties.slice"] == {"sources", "base", "weight", "density"}
    assert places["ties.range"] == {"source", "layers", "weight", "density"}
    assert places["ties.rule"] == {
        "tensors",
        "copy",
        "drop",
        "dtype",
        "mismatch",
        "weight",
        "density",
    }


def test_every_shared_key_is_explained():
    shapes = SCHEMA["$defs"]
    for name, property_ in SCHEMA["properties"].items():
        shape = shapes.get(property_.get("$ref", "").rpartition("/")[2], {})
        assert "description" in property_ or "description" in shape, name


values = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 0.5, 1.5, "", "a", "base", "model", "keep", [], [0.5], {}),
        {"gradient": [0, 0.5]},
        {"gradient": []},
        {"gradient": ["a"]},
        {"gradient": 0.5},
        {"cases": [{"tensors": "*", "value": 0.5}, {"value": {"gradient": [1, 0]}}]},
        {"cases": [{"tensors": "", "value": 0.5}]},
        {"cases": [{"tensors": "*"}]},
        {"cases": [{"value": {"cases": []}}]},
        {"cases": [], "gradient": [1]},
    ]
)
ranges = st.sampled_from([[0, 4], [2, 1], [0], "a", [0, 4, 8], [-1, 2], None])


def tables(*keys):
    return st.dictionaries(st.sampled_from(keys), values, max_size=3)


documents = st.fixed_dictionaries(
    {
        "method": st.sampled_from([*METHODS, "none"]),
        "sources": st.lists(
            tables("weight", "density", "rank").map(lambda own: A | own), min_size=1, max_size=1
        ),
    },
    optional={
        "base": values,
        "parameters": tables("weight", "density", "scope", "normalize", "rank"),
        "rules": st.lists(
            tables("copy", "drop", "dtype", "mismatch", "weight", "density", "scope", "path").map(
                lambda own: {"tensors": "*"} | own
            ),
            max_size=2,
        ),
        "layers": st.lists(
            tables("weight", "density", "scope", "rank").flatmap(
                lambda own: st.lists(
                    st.fixed_dictionaries(
                        {"source": st.sampled_from([0, "base", "a", None]), "layers": ranges},
                        optional={"weight": values, "scope": values},
                    ),
                    max_size=1,
                ).map(lambda sources: own | {"sources": sources})
            ),
            max_size=2,
        ),
        "missing": values,
        "mismatch": values,
        "non_finite": values,
        "seed": values,
        "vocabulary": values,
        "output": tables("dtype", "max_shard_size", "companions"),
    },
)


def test_a_method_offers_the_semantics_that_it_has_and_their_defaults():
    kept = ParameterSpec(
        "kept",
        CHOICE,
        "What is kept.",
        "some",
        per_source=False,
        choices=("some", "more"),
        presets=((Semantics.PAPER, "more"),),
    )
    of_both = {"linear": (WEIGHT,), "ties": (kept,)}
    schema = recipe_json_schema(of_both, {"ties": (Semantics.PAPER, Semantics.PEFT)})
    validator = Draft202012Validator(schema)

    def accepts(method, semantics):
        return validator.is_valid({"method": method, "sources": [A], "semantics": semantics})

    assert accepts("ties", "paper")
    assert accepts("ties", None)
    assert not accepts("ties", "mergekit")
    assert accepts("linear", "mergekit")
    said = schema["$defs"]["ties.parameters"]["properties"]["kept"]
    assert said["default"] == "more"
    assert said["description"].endswith('Under `semantics: peft` the default is "some".')


@unhurried
@given(documents)
def test_what_the_schema_refuses_the_parser_refuses(document):
    assert VALIDATOR.is_valid(document) or not parses(document)


@unhurried
@given(documents)
def test_what_the_parser_refuses_the_schema_refuses_but_for_indices(document):
    """One source, lists of one value at most: only indices of others are beyond a schema."""
    companions = document.get("output", {}).get("companions")
    if companions != 1 and all(rule.get("copy") != 1 for rule in document.get("rules", [])):
        assert VALIDATOR.is_valid(document) == parses(document)


@pytest.mark.parametrize(
    ("grid", "fits"),
    [
        ({"parameters.density": [0.2, 0.5]}, True),
        ({"sources.0.weight": [1], "seed": [1, 2]}, True),
        ({}, False),
        ({"parameters.density": 0.2}, False),
        ({"parameters.density": []}, False),
        ({"parameters..density": [0.2]}, False),
    ],
    ids=str,
)
def test_a_grid_is_accepted_as_it_is_expanded(grid, fits):
    document = {"method": "ties", "base": "b", "sources": [{"path": "a"}, {"path": "c"}]}
    document |= {"parameters": {}, "grid": grid}
    try:
        expanded = expand_grid(document, origin="recipe")
    except RecipeError:
        expanded = None

    assert VALIDATOR.is_valid(document) == (expanded is not None) == fits
