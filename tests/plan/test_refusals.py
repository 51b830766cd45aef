"""What a method cannot do with a recipe is refused before a tensor is read, naming the key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MEMORY, Models, recipe_of

import streammerge
from streammerge.errors import RecipeError
from streammerge.methods import discover_methods
from streammerge.methods.base import Operand


@pytest.fixture
def paths(models: Models) -> list[Path]:
    """Return four models that are alike."""
    return [models.write({"weight": torch.ones(3, 2)}) for _ in range(4)]


def plan(paths: list[Path], method: str, count: int, **document: Any) -> None:
    """Plan a merge of so many sources, with a base where the method wants one."""
    base = None if discover_methods()[method].operand is Operand.WEIGHTS else paths[0]
    streammerge.plan(recipe_of(method, base, paths[1 : 1 + count], **document), memory=MEMORY)


# method, number of sources, parameters, what the message says
WRONG = [
    # how many sources
    ("slerp", 2, {"t": 0.5}, "sources: slerp merges exactly one beside the base, and the recipe has 2"),
    ("nearswap", 3, {"t": 0.5}, "sources: nearswap merges exactly one beside the base, .* has 3"),
    ("passthrough", 2, {}, "sources: passthrough merges exactly one, and the recipe has 2"),
    ("nuslerp", 1, {}, "sources: nuslerp merges exactly two, and the recipe has 1"),
    ("nuslerp", 3, {}, "sources: nuslerp merges exactly two, and the recipe has 3"),
    ("model_stock", 1, {}, "sources: model_stock merges two or more beside the base, .* has 1"),
    # sums of weights that divide
    ("linear", 2, {"weight": [0.5, -0.5]}, r"weight: .*\[0.5, -0.5\] sum to 0.*`normalize: false`"),
    ("multislerp", 2, {"weight": [1.0, -1.0]}, r"weight: .* sum to 0.*`normalize: false`"),
    ("task_arithmetic", 2, {"weight": [1.0, -1.0], "divisor": "weights"}, "`divisor: none`"),
    ("task_arithmetic", 1, {"weight": 0.0, "divisor": "weights"}, "weight: .* sum to 0"),
    # rounds to 2.8e-17
    ("task_arithmetic", 3, {"weight": [0.1, 0.2, -0.3], "divisor": "weights"}, "sum to 0"),
    ("dare_linear", 2, {"density": 1, "weight": [1, -1], "divisor": "weights"}, "sum to 0"),
    ("breadcrumbs", 2, {"density": 1, "weight": [1, -1], "divisor": "weights"}, "sum to 0"),
    # numbers that are divided by
    ("average", 2, {"schedule": "exponential", "decay": 0}, "decay: expected a number above 0, got 0"),
    ("karcher", 2, {"tol": 0}, "tol: expected a number above 0, got 0"),
    ("multislerp", 2, {"eps": 0}, "eps: expected a number above 0, got 0"),
    ("multislerp", 2, {"eps": -1e-8}, "eps: expected a number above 0, got -1e-08"),
    ("ramplus_tl", 2, {"epsilon": 0}, "epsilon: expected a number above 0, got 0"),
    # numbers below their range
    ("nearswap", 1, {"t": -0.1}, "parameters.t: "),
    ("ram", 2, {"epsilon": -1}, "parameters.epsilon: "),
    # probabilities that are none; mergekit refuses the same
    ("della", 2, {"density": 0.9}, r"epsilon: 0.15 around density 0.9 .* 0.75 to 1.05, .* below 0.1"),
    ("della_linear", 2, {"density": [0.5, 0.15]}, "epsilon: 0.15 around density 0.15 .* from 0 to 0.3"),
    ("della", 1, {"density": 0.5, "epsilon": 0.5}, "from 0 to 1, .* give an epsilon below 0.5"),
    # what float32 cannot hold
    ("linear", 2, {"weight": [1e-45, 1.0]}, "weight: 1e-45 is no number of float32.*compute_dtype: float64"),
    ("task_arithmetic", 2, {"weight": -1e39}, "weight: -1e\\+39 is no number of float32"),
    ("dare_linear", 2, {"density": 1e-300}, "density: 1e-300 is no number"),
    ("ties", 2, {"density": 0.5, "lambda": 1e39}, "lambda: 1e\\+39 is no number"),
    # what would do nothing
    ("dare_ties", 2, {"density": 0.5, "rescale": "l1", "rescale_by": 0.3}, "rescale_by: .*rescale: l1"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "count", "parameters", "says"), WRONG)
def test_what_a_method_cannot_do_is_refused(
    method: str, count: int, parameters: dict[str, Any], says: str, paths: list[Path]
) -> None:
    with pytest.raises(RecipeError, match=says):
        plan(paths, method, count, parameters=parameters)


# What is near to the above, and fine.
RIGHT = [
    ("linear", 2, {"weight": [0.5, -0.5], "normalize": False}),
    ("linear", 2, {"weight": [1.2e-38, 3.4e38]}),
    ("linear", 2, {"weight": [0.0, -1e38]}),
    ("della", 2, {"density": [0.85, 0.15], "epsilon": 0.149}),
    # Nothing is drawn.
    ("della", 2, {"density": [0.0, 1.0], "epsilon": 0.15}),
    # Rounds to 5.6e-17, and is what was asked for.
    ("linear", 2, {"weight": [0.1 + 0.2, -0.3]}),
    ("multislerp", 2, {"weight": [1.0, -1.0], "normalize": False}),
    ("task_arithmetic", 2, {"weight": [1.0, -1.0]}),
    ("dare_ties", 2, {"density": 1, "weight": [1.0, -1.0], "divisor": "weights"}),
    ("nuslerp", 2, {"weight": [1.0, -1.0]}),
    ("average", 2, {"decay": 0}),
    ("ram", 2, {"epsilon": 0}),
    ("nearswap", 1, {"t": 0}),
    ("dare_ties", 2, {"density": 0.5, "rescale": "density", "rescale_by": 0.3}),
]


@pytest.mark.parametrize(("method", "count", "parameters"), RIGHT)
def test_what_is_near_to_that_is_not(
    method: str, count: int, parameters: dict[str, Any], paths: list[Path]
) -> None:
    plan(paths, method, count, parameters=parameters)


def test_what_float32_cannot_hold_float64_can(paths: list[Path]) -> None:
    parameters = {"weight": [1e-300, 1e-300]}

    plan(paths, "linear", 2, parameters=parameters, compute_dtype="float64")


def test_a_recipe_that_drops_everything_is_refused(paths: list[Path]) -> None:
    with pytest.raises(RecipeError, match="all 1 tensors are dropped"):
        plan(paths, "linear", 2, rules=[{"tensors": "*", "drop": True}])


def test_weights_that_a_rule_makes_sum_to_zero_are_refused(paths: list[Path]) -> None:
    rules = [{"tensors": "w*", "weight": [1.0, -1.0]}]

    with pytest.raises(RecipeError, match="sum to 0"):
        plan(paths, "task_arithmetic", 2, parameters={"divisor": "weights"}, rules=rules)


def test_semantics_that_bring_a_parameter_to_nothing_are_refused(paths: list[Path]) -> None:
    parameters = {"density": 0.5, "rescale_by": 0.3}

    with pytest.raises(RecipeError, match="rescale_by"):
        plan(paths, "dare_linear", 1, parameters=parameters, semantics="mergekit")


def test_semantics_that_a_method_does_not_have_are_refused_with_those_it_has(
    paths: list[Path],
) -> None:
    says = "semantics: breadcrumbs is defined by mergekit, paper, not by peft; .* out for mergekit"

    with pytest.raises(RecipeError, match=says):
        plan(paths, "breadcrumbs", 1, parameters={"density": 0.5}, semantics="peft")


def test_semantics_that_nobody_has_are_refused(paths: list[Path]) -> None:
    with pytest.raises(RecipeError, match=r"semantics: .*peft"):
        plan(paths, "ties", 1, parameters={"density": 0.5}, semantics="peff")


def test_every_example_can_be_merged() -> None:
    for method in discover_methods().values():
        for example in method.examples:
            given = [len(value) for value in example.values() if isinstance(value, tuple)]
            count = given[0] if given else method.sources[0]
            values = []
            for spec in method.parameters:
                value = example.get(spec.name, spec.default)
                alone = spec.per_source and not isinstance(value, tuple)
                values.append((spec.name, (value,) * count if alone else value))
            assert method.refuse(method.bind(values)) is None, (method.name, example)


def test_a_method_without_parameters_says_so(paths: list[Path]) -> None:
    recipe = recipe_of("arcee_fusion", paths[0], paths[1:2])

    printed = str(streammerge.plan(recipe, memory=MEMORY))

    assert re.search(r"^settings +no parameters for 1 tensor\(s\)$", printed, re.MULTILINE)
