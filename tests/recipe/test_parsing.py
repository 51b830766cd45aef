"""Recipe text becomes a recipe, or one error that names every problem."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streammerge.dtypes import DType
from streammerge.errors import RecipeError
from streammerge.recipe.dumping import dump_recipe
from streammerge.recipe.parsing import parse_recipe, recipe_from_mapping
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

FLOAT, BOOL, CHOICE = ParameterKind.FLOAT, ParameterKind.BOOL, ParameterKind.CHOICE
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
            "majority_sign_method",
            CHOICE,
            "Sign vote.",
            "total",
            per_source=False,
            choices=("total", "frequency"),
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
        ParameterSpec("decay", FLOAT, "Decay.", 0.0, per_source=False, maximum=0.0),
    ),
}

# A loaded machine is no reason to fail.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def parse(text):
    return parse_recipe(text, origin="recipe.yaml", methods=METHODS)


def problems_of(text):
    """Return the lines of the error, each without the origin that it must start with."""
    with pytest.raises(RecipeError) as caught:
        parse(text)
    lines = str(caught.value).split("\n")
    assert all(line.startswith("recipe.yaml: ") for line in lines)
    return [line.removeprefix("recipe.yaml: ") for line in lines]


def problem_of(text):
    (problem,) = problems_of(text)
    return problem


def linear(rest="", sources="[{path: a}, {path: b}]"):
    return f"method: linear\nsources: {sources}\n{rest}"


def ties(rest="parameters: {density: 0.2}", sources="[{path: a}, {path: b}]"):
    return f"method: ties\nbase: m/base\nsources: {sources}\n{rest}"


def test_a_recipe_with_every_key_is_read():
    text = """
method: ties
base: models/base                    # a comment
sources:
  - path: models/math
    weight: 2
  - path: ../models/code
    component: unet
    density: 0.3
parameters: {density: 0.2, weight: [0.5, 1e-3], majority_sign_method: frequency, scope: model}
rules:
  - {tensors: "*.mlp.*", density: [0.1, 1]}
  - {tensors: "lm_head.weight", copy: base}
  - {tensors: "norm", copy: 1}
  - {tensors: "*.bias", drop: true}
semantics: peft
seed: 18446744073709551615
missing: base
non_finite: keep
compute_dtype: float64
output: {dtype: bfloat16, max_shard_size: 2GiB}
"""
    expected = Recipe(
        method="ties",
        base=Path("models/base"),
        sources=(
            Source(Path("models/math"), {"weight": 2.0}),
            Source(Path("../models/code"), {"density": 0.3}, component="unet"),
        ),
        parameters={
            "density": 0.2,
            "weight": (0.5, 0.001),
            "majority_sign_method": "frequency",
            "scope": "model",
        },
        rules=(
            Rule("*.mlp.*", {"density": (0.1, 1.0)}),
            Rule("lm_head.weight", {}, copy=BASE),
            Rule("norm", {}, copy=1),
            Rule("*.bias", {}, drop=True),
        ),
        semantics=Semantics.PEFT,
        seed=2**64 - 1,
        missing=MissingPolicy.BASE,
        non_finite=NonFinitePolicy.KEEP,
        compute_dtype=ComputeDType.FLOAT64,
        output=OutputSpec(dtype=DType.BF16, max_shard_bytes=2 * 2**30),
    )

    assert expected == parse(text)


def test_a_short_recipe_gets_the_defaults_of_the_schema():
    expected = Recipe(
        method="linear",
        base=None,
        sources=(Source(Path("a"), {}),),
        parameters={},
        rules=(),
        semantics=None,
        seed=0,
        missing=MissingPolicy.ERROR,
        non_finite=NonFinitePolicy.ERROR,
        compute_dtype=ComputeDType.FLOAT32,
        output=OutputSpec(dtype=None, max_shard_bytes=None),
    )

    assert expected == parse("method: linear\nsources: [{path: a}]")


def test_integers_become_floats_where_a_number_is_meant():
    value = parse(linear("parameters: {weight: 1}")).parameters["weight"]

    assert (type(value), value) == (float, 1.0)


def test_json_is_read_and_its_escaped_pairs_become_characters():
    document = {"method": "linear", "sources": [{"path": "modèles/😀"}]}

    assert parse(json.dumps(document)).sources[0].path == Path("modèles/😀")


def test_a_mapping_is_read_like_its_text():
    document = {"method": "linear", "sources": [{"path": "a"}, {"path": "b"}], "seed": 7}

    assert parse(linear("seed: 7")) == recipe_from_mapping(document, origin="x", methods=METHODS)


def test_reading_leaves_the_mapping_alone():
    document = {"method": "linear", "sources": [{"path": "a", "weight": 1}], "parameters": {}}
    before = json.dumps(document)

    recipe_from_mapping(document, origin="x", methods=METHODS)

    assert before == json.dumps(document)


@pytest.mark.parametrize(
    ("spelled", "dtype"),
    [("float16", DType.F16), ("F16", DType.F16), ("float8_e4m3fn", DType.F8_E4M3), ("null", None)],
)
def test_output_dtypes_are_read_by_torch_name_and_by_code(spelled, dtype):
    assert dtype is parse(linear(f"output: {{dtype: {spelled}}}")).output.dtype


@pytest.mark.parametrize(("spelled", "nbytes"), [("5GB", 5 * 10**9), ("'1 KiB'", 1024), ("7", 7)])
def test_shard_sizes_are_read_as_text_and_as_bytes(spelled, nbytes):
    assert nbytes == parse(linear(f"output: {{max_shard_size: {spelled}}}")).output.max_shard_bytes


@pytest.mark.parametrize(
    ("spelled", "value"),
    [
        ("1e-3", 0.001),  # text in YAML 1.1
        ("-1E+2", -100.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("010", 10.0),  # octal in YAML 1.1
        ("0x10", 16.0),
        ("0.1", 0.1),
    ],
)
def test_numbers_are_those_of_yaml_1_2(spelled, value):
    assert parse(linear(f"parameters: {{weight: {spelled}}}")).parameters == {"weight": value}


@pytest.mark.parametrize("name", ["no", "on", "y", "2024-01-01", "1:30", "1_000", "=", "0b1"])
def test_words_that_yaml_1_1_would_convert_stay_text(name):
    assert parse(linear(sources=f"[{{path: {name}}}]")).sources[0].path == Path(name)


def test_anchors_and_merge_keys_are_allowed():
    recipe = parse(linear(sources="[&one {path: a, weight: 3}, {<<: *one, path: b}]"))

    assert recipe.sources == (
        Source(Path("a"), {"weight": 3.0}),
        Source(Path("b"), {"weight": 3.0}),
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        # Unknown keys, with what was probably meant.
        (linear("sede: 1"), 'sede: unknown key; did you mean "seed"?'),
        (linear(sources="[{path: a, wieght: 1}]"), 'sources[0].wieght: unknown key; did you mean "weight"?'),
        (linear("parameters: {normalise: true}"), 'parameters.normalise: unknown key; did you mean "normalize"?'),
        (linear("parameters: {q: 1}"), "parameters.q: unknown key; known: normalize, weight"),
        (linear("rules: [{tensor: a, tensors: b, drop: true}]"), 'rules[0].tensor: unknown key; did you mean "tensors"?'),
        (linear("rules: [{tensors: b, normalise: true}]"), 'rules[0].normalise: unknown key; did you mean "normalize"?'),
        (linear("output: {dtyp: BF16}"), 'output.dtyp: unknown key; did you mean "dtype"?'),
        (linear("'two words': 1"), '"two words": unknown key; known: base, compute_dtype, grid, layers, method, mismatch, missing, mixture, non_finite, output, parameters, rules, seed, semantics, sources, vocabulary'),
        (linear("parameters: {3: 1}"), "parameters[3]: unknown key; known: normalize, weight"),
        # Known keys in the wrong place.
        (linear("normalize: true"), 'normalize: a parameter of the method; move it under "parameters": parameters.normalize'),
        (linear("max_shard_size: 1GB"), 'max_shard_size: unknown key at the top level; move it under "output": output.max_shard_size'),
        (linear(sources="[{path: a, normalize: true}]"), 'sources[0].normalize: one value serves all sources; move it to "parameters"'),
        (ties("parameters: {density: 1}\nrules: [{tensors: a, scope: model}]"), 'rules[0].scope: one value serves the whole model; move it to "parameters"'),
        # The method.
        ("method: teis\nsources: [{path: a}]", 'method: unknown method "teis"; did you mean "ties"?'),
        ("method: xyz\nsources: [{path: a, q: 1}]", 'method: unknown method "xyz"; known: linear, ranked, ties'),
        ("method: 3\nsources: [{path: a}]", "method: expected text, got 3"),
        ("sources: [{path: a}]", "method: this key is required"),
        # Sources.
        ("method: linear", "sources: this key is required"),
        (linear(sources="[]"), "sources: expected at least 1 entry, got 0"),
        (linear(sources="{path: a}"), "sources: expected a list, got a mapping"),
        (linear(sources="[a]"), 'sources[0]: expected a mapping of keys to values, got "a"; write {path: "a"}'),
        (linear(sources="[{weight: 1}]"), "sources[0].path: this key is required"),
        (linear(sources="[{path: ''}]"), "sources[0].path: expected text, got an empty one"),
        (linear(sources="[{path: 7}]"), "sources[0].path: expected text, got 7"),
        (linear(sources='[{path: "a\\0b"}]'), 'sources[0].path: expected a path without NUL characters, got "a\\u0000b"'),
        (linear(sources='[{path: "\\ud800"}]'), "sources[0].path: expected text that UTF-8 can encode, got a lone surrogate"),
        (linear("base: [a]"), "base: expected text, got a list of 1"),
        # Numbers.
        (linear(sources="[{path: a}, {path: b}, {path: c, weight: '0,3'}]"), 'sources[2].weight: expected a number, got "0,3"'),
        (linear("parameters: {weight: '0.3'}"), 'parameters.weight: expected a number, got "0.3"'),
        (linear("parameters: {weight: true}"), "parameters.weight: expected a number, got true"),
        (linear("parameters: {weight: null}"), "parameters.weight: expected a number, got null"),
        (linear("parameters: {weight: {a: 1}}"), "parameters.weight: expected a number, got a mapping"),
        (linear("parameters: {weight: .nan}"), "parameters.weight: expected a finite number, got nan"),
        (linear("parameters: {weight: -.inf}"), "parameters.weight: expected a finite number, got -inf"),
        (linear("parameters: {weight: 1e400}"), "parameters.weight: expected a finite number, got inf"),
        (linear(f"parameters: {{weight: {10**399}}}"), "parameters.weight: expected a finite number, got an integer of 1326 bits"),
        (ties("parameters: {density: 1.5}"), "parameters.density: expected a number in [0, 1], got 1.5"),
        (ties("parameters: {density: -1}"), "parameters.density: expected a number in [0, 1], got -1"),
        ("method: ranked\nsources: [{path: a}]\nparameters: {rank: 0.5}", "parameters.rank: expected a number of at least 1, got 0.5"),
        ("method: ranked\nsources: [{path: a}]\nparameters: {rank: 1, decay: 2}", "parameters.decay: expected a number of at most 0, got 2"),
        (linear(sources="[{path: a, component: 1}]"), "sources[0].component: expected text, got 1"),
        # Lists with one value per source.
        (ties("parameters: {density: [0.1, 0.2, 0.3]}"), "parameters.density: expected 2 values, one for each source, got 3"),
        (ties("parameters: {density: [0.1, 1.2]}"), "parameters.density[1]: expected a number in [0, 1], got 1.2"),
        (ties(sources="[{path: a, density: [0.1]}, {path: b}]"), "sources[0].density: expected a number in [0, 1], got a list of 1"),
        (linear("parameters: {normalize: [true, false]}"), "parameters.normalize: expected true or false, got a list of 2"),
        (linear("rules: [{tensors: a, weight: [1]}]"), "rules[0].weight: expected 2 values, one for each source, got 1"),
        # Words.
        (linear("parameters: {normalize: yes}"), 'parameters.normalize: expected true or false, got "yes"'),
        (linear("parameters: {normalize: 1}"), "parameters.normalize: expected true or false, got 1"),
        (ties("parameters: {density: 1, majority_sign_method: frequence}"), 'parameters.majority_sign_method: expected total or frequency, got "frequence"; did you mean "frequency"?'),
        (ties("parameters: {density: 1, scope: 1}"), "parameters.scope: expected tensor or model, got 1"),
        (linear("semantics: papr"), 'semantics: expected peft or mergekit or paper, got "papr"; did you mean "paper"?'),
        (linear("missing: bse"), 'missing: expected error or base, got "bse"; did you mean "base"?'),
        (linear("non_finite: [keep]"), "non_finite: expected error or keep, got a list of 1"),
        (linear("compute_dtype: float16"), 'compute_dtype: expected float32 or float64, got "float16"; did you mean "float64"?'),
        # Seed.
        (linear("seed: -1"), "seed: expected an integer in [0, 18446744073709551615], got -1"),
        (linear("seed: 18446744073709551616"), "seed: expected an integer in [0, 18446744073709551615], got 18446744073709551616"),
        (linear("seed: 1.0"), "seed: expected an integer in [0, 18446744073709551615], got 1.0"),
        (linear("seed: true"), "seed: expected an integer in [0, 18446744073709551615], got true"),
        (linear("seed: '1'"), 'seed: expected an integer in [0, 18446744073709551615], got "1"'),
        # Output.
        (linear("output: BF16"), 'output: expected a mapping of keys to values, got "BF16"'),
        (linear("output: {dtype: bf16}"), 'output.dtype: expected float64 or float32 or float16 or bfloat16 or float8_e4m3fn or float8_e5m2 or promoted, got "bf16"; did you mean "bfloat16"?'),
        (linear("output: {dtype: int8}"), 'output.dtype: expected float64 or float32 or float16 or bfloat16 or float8_e4m3fn or float8_e5m2 or promoted, got "int8"'),
        (linear("output: {max_shard_size: big}"), 'output.max_shard_size: expected a size such as "512MiB" or "5GB", or a number of bytes, got "big"'),
        (linear("output: {max_shard_size: 1.5}"), 'output.max_shard_size: expected a size such as "512MiB" or "5GB", or a number of bytes, got 1.5'),
        (linear("output: {max_shard_size: 0}"), "output.max_shard_size: expected from 1 to 9223372036854775807 bytes, got 0"),
        (linear(f"output: {{max_shard_size: '{'9' * 400}'}}"), f'output.max_shard_size: expected from 1 to 9223372036854775807 bytes, got "{"9" * 57}..."'),
        # Rules.
        (linear("rules: {tensors: a}"), "rules: expected a list, got a mapping"),
        (linear("rules: [{tensors: '', drop: true}]"), "rules[0].tensors: expected text, got an empty one"),
        (linear("rules: [{drop: true}]"), "rules[0].tensors: this key is required"),
        (linear("rules: [{tensors: a}]"), "rules[0]: expected copy, drop, dtype, mismatch or a parameter to change, got none of them"),
        (linear("rules: [{tensors: a, drop: false}]"), "rules[0]: expected copy, drop, dtype, mismatch or a parameter to change, got none of them"),
        (linear("rules: [{tensors: a, drop: 1, weight: 1}]"), "rules[0].drop: expected true or false, got 1"),
        (linear("rules: [{tensors: a, copy: 0, drop: true}]"), "rules[0]: copy and drop exclude each other; keep one of them"),
        (linear("rules: [{tensors: a, copy: 0, weight: 1}]"), "rules[0].weight: no effect on copied tensors; remove it"),
        (linear("rules: [{tensors: a, drop: true, weight: 1}]"), "rules[0].weight: no effect on dropped tensors; remove it"),
        (linear("rules: [{tensors: a, copy: 2}]"), "rules[0].copy: expected the index of one of 2 sources, 0 to 1, got 2"),
        (linear("rules: [{tensors: a, copy: -1}]"), "rules[0].copy: expected base, or the index of a source counted from 0, got -1"),
        (linear("rules: [{tensors: a, copy: true}]"), "rules[0].copy: expected base, or the index of a source counted from 0, got true"),
        (linear("rules: [{tensors: a, copy: b}]"), 'rules[0].copy: expected base, or the index of a source counted from 0, got "b"'),
        (linear("rules: [{tensors: a, copy: base}]"), 'rules[0].copy: the recipe has no base to copy from; add the key "base"'),
        (linear("missing: base"), 'missing: the recipe has no base to take tensors from; add the key "base"'),
        # Required parameters.
        (ties("", sources="[{path: a, density: 1}, {path: m/b}]"), 'sources[1].density: this key is required, as ties has no default for it; give it here, for "m/b", or under "parameters" for all'),
        ("method: ranked\nsources: [{path: a}]", "parameters.rank: this key is required, as ranked has no default for it"),
        # The document as a whole.
        ("", "the document is empty; a recipe needs at least method and sources"),
        ("# a comment", "the document is empty; a recipe needs at least method and sources"),
        ("- a", "expected a mapping of keys to values, got a list of 1"),
        ("ties", 'expected a mapping of keys to values, got "ties"'),
        (linear("parameters: [1]"), "parameters: expected a mapping of keys to values, got a list of 1"),
    ],
    ids=lambda text: text[-50:],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_its_key(text, problem):
    assert problem == problem_of(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: 1\nbase: [a", "line 2, column 9: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("base: @a", "line 1, column 7: while scanning for the next token, found character '@' that cannot start any token"),
        ("seed: 1\nbase: a\nseed: 2", 'line 3, column 1: the key "seed" appears twice, first on line 1'),
        ('{"seed": 1, "seed": 1}', 'line 1, column 13: the key "seed" appears twice, first on line 1'),
        ("sources:\n- path: a\n  path: b", 'line 3, column 3: the key "path" appears twice, first on line 2'),
        ("a: 1\n---\nb: 1", "line 2, column 1: expected a single document in the stream, but found another document"),
        ("? [a]\n: 1", "line 1, column 3: expected text as a key"),
        ("a: *b", "line 1, column 4: found undefined alias 'b'"),
        ("a: &b [*b]", "line 1, column 8: an alias inside the value that it stands for"),
        ("<<: 1", "line 1, column 5: while constructing a mapping, expected a mapping or list of mappings for merging, but found scalar"),
        ("a: !!int b", 'line 1, column 4: expected int, got "b"'),
        ("a: !!python/object:os.system {}", "line 1, column 4: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system'"),
        ("a: !<!b%0Ac> 1", "line 1, column 4: could not determine a constructor for the tag '!b\\nc'"),
        ("a: !!timestamp b", "line 1, column 4: could not determine a constructor for the tag 'tag:yaml.org,2002:timestamp'"),
        ("a: 1\nb: \x00", "line 2: the character U+0000 cannot stand in YAML"),
        (f"seed: {'1' * 5000}", "line 1, column 7: an integer of 5000 digits"),
        ("[" * 5000, "line 1, column 65: nested deeper than 64 levels"),
        ("{a: " * 5000, "line 1, column 254: nested deeper than 64 levels"),
        ("- " * 5000, "line 1, column 129: nested deeper than 64 levels"),
        ("a" * (2**20 + 1), "the text has 1048577 bytes; a recipe may have 1048576"),
        ("é" * 2**20, "the text has 2097152 bytes; a recipe may have 1048576"),
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_what_is_not_yaml_is_refused_by_line_and_column(text, problem):
    assert problem == problem_of(text)


@pytest.mark.parametrize("swell", ["[{}, {}]", "{{<<: [{}, {}]}}"], ids=["lists", "merge keys"])
def test_aliases_that_double_at_each_level_are_refused(swell):
    levels = "\n".join(f"a{i}: &a{i} {swell.format(*[f'*a{i - 1}'] * 2)}" for i in range(1, 64))

    assert "more than 100000 values once aliases are written out" in problem_of(
        f"a0: &a0 {{b: c}}\n{levels}"
    )


def test_nothing_of_python_is_run_by_a_tag():
    problem_of("!!python/object/apply:builtins.exit [3]")


def test_all_problems_are_reported_at_once():
    problems = problems_of(
        "method: ties\nseed: -1\nsources: [{path: a, density: 2}, {weight: x}]\nrules: [{tensors: a}]"
    )

    assert {
        "seed: expected an integer in [0, 18446744073709551615], got -1",
        "sources[0].density: expected a number in [0, 1], got 2",
        "sources[1].path: this key is required",
        'sources[1].weight: expected a number, got "x"',
        "rules[0]: expected copy, drop, dtype, mismatch or a parameter to change, got none of them",
        (
            "sources[1].density: this key is required, as ties has no default for it; "
            'give it here, for null, or under "parameters" for all'
        ),
    } == set(problems)


def test_a_flood_of_problems_is_cut_and_counted():
    problems = problems_of(linear(sources=f"[{', '.join(['7'] * 250)}]"))

    assert len(problems) == 101
    assert problems[-1] == "and 150 more problems"


def test_keys_of_mergekit_are_recognised_in_a_native_recipe():
    problems = problems_of(linear("base_model: a", sources="[{model: a}]"))

    belongs = "this key belongs to mergekit's dialect; the native key"
    assert {
        f'base_model: {belongs} is "base"',
        f'sources[0].model: {belongs} is "path"',
        "sources[0].path: this key is required",
    } == set(problems)


@pytest.mark.parametrize(
    "document", [None, 3, {1}, {"method": "linear", "sources": ({"path": "a"},)}, {b"x": object()}]
)
def test_values_that_no_text_could_give_are_refused(document):
    with pytest.raises(RecipeError, match=r"^here: "):
        recipe_from_mapping(document, origin="here", methods=METHODS)


def test_a_recipe_error_is_a_value_error():
    with pytest.raises(ValueError, match="the document is empty"):
        parse("")


def test_the_dump_is_the_same_text_for_equal_recipes():
    one = parse(ties("parameters: {density: 1, weight: 0.1}"))
    other = parse(ties("parameters: {weight: 1e-1, density: 1.0}\nseed: 0"))

    assert dump_recipe(one) == dump_recipe(other)


def test_the_dump_states_every_setting():
    text = dump_recipe(
        parse(
            ties(
                'rules: [{tensors: "*.w", density: [0.1, 1]}]\nparameters: {density: 1e-7}\n'
                "semantics: peft"
            )
        )
    )

    assert text == (
        "method: ties\nbase: m/base\nsources:\n- path: a\n- path: b\n"
        "parameters:\n  density: 1.0e-07\n"
        "rules:\n- tensors: '*.w'\n  density:\n  - 0.1\n  - 1.0\n"
        "semantics: peft\nseed: 0\nmissing: error\nmismatch: error\nnon_finite: error\nvocabulary: error\ncompute_dtype: float32\n"
        "output: {}\n"
    )


paths = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
awkward_paths = st.sampled_from(
    ["no", "1e-3", "0o7", "07", "~", "<<", "=", " a ", "a: b", "\u2028"]
)
finite = st.floats(allow_nan=False, allow_infinity=False)
densities = st.floats(0, 1)


def one_or_each(values):
    return values | st.lists(values, min_size=2, max_size=2)


origins = st.sampled_from(["base", 0]) | awkward_paths
common = st.fixed_dictionaries(
    {"density": one_or_each(densities)},
    optional={
        "weight": one_or_each(finite | st.integers(-(10**20), 10**20)),
        "majority_sign_method": st.sampled_from(["total", "frequency"]),
        "scope": st.sampled_from(["tensor", "model"]),
    },
)
globs = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
source = st.fixed_dictionaries(
    {"path": paths | awkward_paths},
    optional={"weight": finite, "density": densities, "component": globs},
)
rule = st.one_of(
    st.fixed_dictionaries({"tensors": globs, "copy": st.sampled_from(["base", 0, 1])}),
    st.fixed_dictionaries({"tensors": globs, "drop": st.just(value=True)}),
    st.fixed_dictionaries({"tensors": globs, "density": one_or_each(densities)}),
)
good_documents = st.fixed_dictionaries(
    {
        "method": st.just("ties"),
        "base": paths,
        "sources": st.lists(source, min_size=2, max_size=2),
        "parameters": common,
    },
    optional={
        "rules": st.lists(rule, max_size=4),
        "seed": st.integers(0, 2**64 - 1),
        "missing": st.sampled_from(["error", "base"]),
        "non_finite": st.sampled_from(["error", "keep"]),
        "vocabulary": st.sampled_from(["error", "ignore"]),
        "compute_dtype": st.sampled_from(["float32", "float64"]),
        "output": st.fixed_dictionaries(
            {},
            optional={
                "dtype": st.sampled_from(["bfloat16", "F32", "F8_E5M2", "float64", None]),
                "max_shard_size": st.integers(1, 2**63 - 1) | st.sampled_from(["5GB", "1.5 KiB"]),
                "companions": origins
                | st.dictionaries(
                    st.sampled_from(["config", "generation_config", "tokenizer", "chat_template"]),
                    origins,
                ),
            },
        ),
    },
)


@unhurried
@given(good_documents)
def test_a_dumped_recipe_parses_back_to_itself(document):
    recipe = recipe_from_mapping(document, origin="here", methods=METHODS)
    text = dump_recipe(recipe)

    assert recipe == parse(text)
    assert text == dump_recipe(parse(text))


keys = st.sampled_from(
    [
        *("method", "base", "sources", "parameters", "rules", "seed", "semantics", "missing"),
        *("output", "dtype", "max_shard_size", "path", "weight", "density", "scope", "tensors"),
        *("copy", "drop", "models", "<<"),
    ]
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=2)
)
structures = st.recursive(
    scalars | st.sampled_from(["ties", "linear", "base", "model"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(keys | scalars.filter(lambda key: key == key), inner, max_size=4),  # noqa: PLR0124
    ),
    max_leaves=20,
)


def outcome(read):
    """Return the recipe, or None if it was refused with lines fit to print."""
    message = ""
    try:
        return read()
    except RecipeError as error:
        message = str(error)
    message.encode()
    assert all(line.startswith("here: ") for line in message.splitlines())
    return None


@unhurried
@given(structures)
def test_any_structure_gives_a_recipe_or_a_recipe_error(document):
    outcome(lambda: recipe_from_mapping(document, origin="here", methods=METHODS))


@unhurried
@given(good_documents, st.data())
def test_a_good_document_with_anything_put_into_it_gives_a_recipe_or_a_recipe_error(document, data):
    place = data.draw(st.sampled_from([document, document["sources"][0], document["parameters"]]))
    place[data.draw(keys)] = data.draw(structures)

    recipe = outcome(lambda: recipe_from_mapping(document, origin="here", methods=METHODS))

    assert recipe is None or parse(dump_recipe(recipe)) == recipe


yaml_pieces = st.lists(
    st.sampled_from([*"[]{},:?-&*!|>%@`'\"#\n\t ab01.~=<\\\ud800\x07", "\n  ", "- ", ": ", "<<: "])
    | keys
    | st.sampled_from(["&a ", "*a", "!!int ", "!!seq ", "---\n", "...", "%YAML 1.1\n", "\\u00"]),
    max_size=40,
).map("".join)


@unhurried
@given(yaml_pieces | st.text())
def test_any_text_gives_a_recipe_or_a_recipe_error(text):
    outcome(lambda: parse_recipe(text, origin="here", methods=METHODS))
