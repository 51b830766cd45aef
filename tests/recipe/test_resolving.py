"""Which value of a parameter a tensor gets."""

from __future__ import annotations

import enum
import fnmatch
import importlib
import pkgutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streammerge
from streammerge.errors import RecipeError
from streammerge.recipe.resolving import Resolved, build_resolver, resolve
from streammerge.recipe.types import (
    BASE,
    ComputeDType,
    MissingPolicy,
    NonFinitePolicy,
    OutputSpec,
    ParameterKind,
    ParameterSpec,
    Recipe,
    Rule,
    Semantics,
    Source,
)

WEIGHT = ParameterSpec("weight", ParameterKind.FLOAT, "Factor.", 1.0, per_source=True)
DENSITY = ParameterSpec("density", ParameterKind.FLOAT, "Kept.", None, per_source=True)
VOTE = ParameterSpec("vote", ParameterKind.CHOICE, "Sign vote.", "total", per_source=False)

# A loaded machine is no reason to fail.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def recipe_of(*sources, parameters=None, rules=()):
    return Recipe(
        method="ties",
        base=Path("base"),
        sources=tuple(Source(Path(f"s{i}"), own) for i, own in enumerate(sources)),
        parameters=parameters or {},
        rules=tuple(rules),
        semantics=Semantics.PEFT,
        seed=0,
        missing=MissingPolicy.ERROR,
        non_finite=NonFinitePolicy.ERROR,
        compute_dtype=ComputeDType.FLOAT32,
        output=OutputSpec(dtype=None, max_shard_bytes=5 * 10**9),
    )


def value_of(recipe, spec, tensor_name="layers.0.mlp.weight"):
    return dict(resolve(recipe, tensor_name, (spec,)).values)[spec.name]


@pytest.mark.parametrize(
    ("own", "common", "ruled", "expected"),
    [
        (None, None, None, (1.0, 1.0)),  # the default
        (None, 0.5, None, (0.5, 0.5)),  # the recipe before the default
        (None, (0.5, 0.6), None, (0.5, 0.6)),  # one value per source
        (0.7, 0.5, None, (0.7, 0.5)),  # the source before the recipe
        (0.7, (0.5, 0.6), None, (0.7, 0.6)),  # the source before its place in the list
        (0.0, 0.5, None, (0.0, 0.5)),  # zero is a value
        (0.7, 0.5, 0.1, (0.1, 0.1)),  # the rule before all others
        (0.7, 0.5, 0.0, (0.0, 0.0)),  # zero in a rule, too
        (0.7, 0.5, (0.1, 0.2), (0.1, 0.2)),  # a rule with one value per source
    ],
)
def test_the_most_specific_value_wins(own, common, ruled, expected):
    recipe = recipe_of(
        {} if own is None else {"weight": own},
        {},
        parameters={} if common is None else {"weight": common},
        rules=[] if ruled is None else [Rule("*.mlp.*", {"weight": ruled})],
    )

    assert expected == value_of(recipe, WEIGHT)


def test_a_parameter_of_all_sources_stays_a_single_value():
    recipe = recipe_of({}, {}, rules=[Rule("*.mlp.*", {"vote": "frequency"})])

    assert value_of(recipe, VOTE) == "frequency"
    assert value_of(recipe, VOTE, "lm_head.weight") == "total"


def test_false_in_a_rule_is_a_value():
    spec = ParameterSpec("normalize", ParameterKind.BOOL, "Divide.", default=True, per_source=False)
    recipe = recipe_of({}, rules=[Rule("*", {"normalize": False})])

    assert value_of(recipe, spec) is False


def test_the_first_matching_rule_wins_and_later_ones_add_nothing():
    rules = [Rule("*.mlp.*", {"density": 0.1}), Rule("*", {"density": 0.2, "weight": 9.0})]
    recipe = recipe_of({}, parameters={"density": 0.3}, rules=rules)

    assert value_of(recipe, DENSITY) == (0.1,)
    assert value_of(recipe, WEIGHT) == (1.0,)
    assert value_of(recipe, DENSITY, "lm_head.weight") == (0.2,)


@pytest.mark.parametrize(
    ("glob", "name", "matches"),
    [
        ("lm_head", "lm_head.weight", False),  # the whole name, not its start
        ("*lm_head*", "model.lm_head.weight", True),
        ("LM_HEAD.weight", "lm_head.weight", False),  # case counts on every system
        ("layers.[0-3].*", "layers.3.w", True),
        ("layers.[!0-3].*", "layers.3.w", False),
        ("layers.?.w", "layers.12.w", False),
        ("a.b", "axb", False),  # a dot is a dot
        ("*", "two\nlines", True),
    ],
)
def test_globs_match_as_fnmatchcase_does(glob, name, matches):
    recipe = recipe_of({}, rules=[Rule(glob, {}, drop=True)])

    assert matches == resolve(recipe, name, ()).drop


def test_copied_and_dropped_tensors_say_so():
    rules = [Rule("a", {}, copy=BASE), Rule("b", {}, copy=1), Rule("c", {}, drop=True)]
    resolver = build_resolver(recipe_of({}, {}, rules=rules), (WEIGHT,))

    weights = (("weight", (1.0, 1.0)),)
    assert Resolved(copy=BASE, drop=False, values=weights) == resolver("a")
    assert Resolved(copy=1, drop=False, values=weights) == resolver("b")
    assert Resolved(copy=None, drop=True, values=weights) == resolver("c")
    assert Resolved(copy=None, drop=False, values=weights) == resolver("d")


def test_values_stand_in_the_order_of_the_method():
    recipe = recipe_of({"density": 0.5})

    resolved = resolve(recipe, "a", (VOTE, WEIGHT, DENSITY))

    assert [name for name, _ in resolved.values] == ["vote", "weight", "density"]


def test_equal_settings_are_one_object():
    rules = [Rule("a", {"weight": 0.5}), Rule("b", {"weight": 0.5}), Rule("c", {"weight": 1.0})]
    resolver = build_resolver(recipe_of({}, rules=rules), (WEIGHT,))

    assert resolver("a") is resolver("b")
    assert resolver("c") is resolver("no rule")
    assert resolver("a") is not resolver("c")


def test_zeros_of_both_signs_stay_apart():
    rules = [Rule("a", {"weight": 0.0}), Rule("b", {"weight": -0.0})]
    resolver = build_resolver(recipe_of({}, rules=rules), (WEIGHT,))

    assert str(resolver("b").values) == "(('weight', (-0.0,)),)"


def test_globs_are_compiled_once(monkeypatch):
    compiled = []
    translate = fnmatch.translate
    monkeypatch.setattr(fnmatch, "translate", lambda glob: compiled.append(glob) or translate(glob))
    globs = [f"layers.{i}.*" for i in range(30)]
    resolver = build_resolver(recipe_of({}, rules=[Rule(g, {}, drop=True) for g in globs]), ())

    for i in range(1000):
        resolver(f"layers.{i}.weight")

    assert globs == compiled


def test_a_value_missing_for_one_source_is_refused_by_its_name():
    recipe = recipe_of({"density": 0.1}, {})

    with pytest.raises(RecipeError, match=r"sources\[1\]\.density: this key is required"):
        resolve(recipe, "a", (DENSITY,))


def test_a_value_missing_for_all_sources_is_refused_by_its_name():
    spec = ParameterSpec("rank", ParameterKind.FLOAT, "Rank.", None, per_source=False)

    with pytest.raises(RecipeError, match=r"parameters\.rank: this key is required"):
        resolve(recipe_of({}), "a", (spec,))


def plainly_resolved_weights(recipe, tensor_name):
    """Precedence written out for one parameter, as slow and as obvious as can be."""
    weights = [1.0] * len(recipe.sources)
    for i, source in enumerate(recipe.sources):
        common = recipe.parameters.get("weight", 1.0)
        weights[i] = common[i] if isinstance(common, tuple) else common
        weights[i] = source.parameters.get("weight", weights[i])
        for rule in recipe.rules:
            if fnmatch.fnmatchcase(tensor_name, rule.tensors):
                ruled = rule.parameters.get("weight", weights[i])
                weights[i] = ruled[i] if isinstance(ruled, tuple) else ruled
                break
    return tuple(weights)


numbers = st.floats(-2, 2, width=16)
# Two sources: a value is one number or a pair.
weights = st.one_of(numbers, st.tuples(numbers, numbers))
tables = st.one_of(st.just({}), st.fixed_dictionaries({"weight": weights}))
owns = st.one_of(st.just({}), st.fixed_dictionaries({"weight": numbers}))
rules = st.lists(st.builds(Rule, st.text("ab.*?[]!-", min_size=1), tables), max_size=5)


@unhurried
@given(st.tuples(owns, owns), tables, rules, st.lists(st.text("ab.-[", max_size=4), max_size=20))
def test_the_resolver_equals_the_plain_loop(own, common, rules, names):
    recipe = recipe_of(*own, parameters=common, rules=rules)
    resolver = build_resolver(recipe, (WEIGHT,))

    for name in names:
        assert (("weight", plainly_resolved_weights(recipe, name)),) == resolver(name).values


def test_no_enumeration_has_a_value_that_an_older_python_loses() -> None:
    """In 3.11.2, which Debian 12 has, a member whose value is `()` is a plain object."""
    for module in pkgutil.walk_packages(streammerge.__path__, "streammerge."):
        if module.name.endswith("_kernels"):
            continue
        importlib.import_module(module.name)
    pending, kinds = [enum.Enum], set()
    while pending:
        found = pending.pop().__subclasses__()
        kinds |= {each for each in found if each.__module__.startswith("streammerge")}
        pending += found

    assert len(kinds) > 20
    for kind in kinds:
        assert all(isinstance(member, kind) and member.value != () for member in kind), kind
