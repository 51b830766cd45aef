"""What is said about recipes of mergekit that cannot be followed, or that say what has no effect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge
from streammerge.errors import RecipeError
from streammerge.methods import discover_methods
from streammerge.recipe.parsing import parse_recipe
from streammerge.recipe.types import (
    BASE,
    Case,
    Cases,
    DrawnVocabulary,
    Gradient,
    LayerRange,
    Recipe,
    TokenOrigin,
)

METHODS = {name: each.parameters for name, each in discover_methods().items()}


def parsed(text: str) -> Recipe:
    return parse_recipe(text, origin="c.yml", methods=METHODS)


def refused(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parsed(text)
    return [line.removeprefix("c.yml: ") for line in str(caught.value).split("\n")]


LINEAR = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n"
TIES = "merge_method: ties\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1}}]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [{model: a}]", "merge_method: this key is required"),
        (
            "merge_method: tise\nmodels: [{model: a}]",
            'merge_method: unknown method "tise"; did you mean "ties"?',
        ),
        (LINEAR + "dtyp: float32", 'dtyp: unknown key; did you mean "dtype"?'),
        (
            LINEAR + "dtype: int64",
            'dtype: expected float32 or float16 or bfloat16 or float64, got "int64"',
        ),
        (
            "merge_method: linear\nmodels: [{model: a, wieght: 1}]",
            "models[0].wieght: unknown key; known: model, parameters",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, weight: 1}]",
            "models[0].weight: a parameter; move it under models[0].parameters",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {wieght: 1}}]",
            'models[0].parameters.wieght: unknown key; did you mean "weight"?',
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]",
            "models[0].parameters.weight: this key is required, here or under parameters for all",
        ),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]",
            "parameters.t: this key is required",
        ),
        (
            "merge_method: ties\nmodels: [{model: b, parameters: {weight: 1}}]",
            "base_model: ties needs the model that the others were tuned from",
        ),
        (
            TIES + "parameters: {density: 1.5}",
            "parameters.density: expected a number in [0, 1], got 1.5",
        ),
        (
            (
                "merge_method: ties\nbase_model: a\n"
                "models: [{model: a}, {model: b, parameters: {weight: 1, density: -1}}]"
            ),
            "models[1].parameters.density: expected a number in [0, 1], got -1",
        ),
        (TIES + "parameters: {density: half}", 'parameters.density: expected a number, got "half"'),
        (
            TIES + "parameters: {normalize: 2}",
            "parameters.normalize: expected true or false, got 2",
        ),
        (
            TIES + "parameters: {density: []}",
            "parameters.density: expected a value, got an empty list",
        ),
        (
            TIES + "parameters: {density: [{filtre: mlp, value: 1}]}",
            (
                "parameters.density: expected {filter, value} as entry 0 of the list, got a mapping with "
                "filtre, value"
            ),
        ),
        (
            LINEAR + "slices: [{sources: []}]",
            "models: expected models or slices, got models and slices",
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [4, 2]}]}]",
            (
                "slices[0].sources[0].layer_range: expected [first, end], the first layer counted from 0 and "
                "the one after the last, got a list of 2"
            ),
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a}]}]",
            (
                "slices[0].sources[0].layer_range: expected [first, end], the first layer counted from 0 and "
                "the one after the last, got null"
            ),
        ),
        (
            (
                "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\n"
                "slices: [{sources: [{model: b, layer_range: [0, 2]}]}]"
            ),
            (
                "slices[0].sources: the base_model, a, gives no layers to this slice; list it with the layers "
                "that the others were tuned from"
            ),
        ),
        (
            (
                "merge_method: slerp\nparameters: {t: 0.5}\nbase_model: a\n"
                "slices: [{base_model: c, sources: [{model: b, layer_range: [0, 2]}]}]"
            ),
            (
                "slices[0].sources: the slice's base_model, c, gives no layers to this slice; list it with "
                "the layers that the others were tuned from"
            ),
        ),
        (
            (
                "merge_method: slerp\nparameters: {t: 0.5}\n"
                "slices:\n- sources: [{model: b, layer_range: [0, 2]}]\n- base_model: a\n"
                "  sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]"
            ),
            (
                "slices[0].base_model: slerp needs the model that the others were tuned from, here or at the "
                "top level"
            ),
        ),
        (
            (
                "merge_method: slerp\nparameters: {t: 0.5}\n"
                "slices: [{sources: [{model: b, layer_range: [0, 2]}]}]"
            ),
            "base_model: slerp needs the model that the others were tuned from",
        ),
        (
            (
                "merge_method: multislerp\nparameters: {weight: 0.5}\n"
                "slices:\n- base_model: a\n"
                "  sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]\n"
                "- sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]"
            ),
            (
                "slices[1].base_model: multislerp would take weights in this slice, and task vectors from a "
                "in another; name a base for every slice, or for none"
            ),
        ),
        (
            (
                "merge_method: slerp\nparameters: {t: 0.5}\nslices: [{base_model: a+x, sources: "
                "[{model: a+x, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]}]"
            ),
            (
                "slices[0].base_model: a base with an adapter, x, cannot be merged while it is read; merge "
                "the adapter into it first, by a recipe of its own with `method: task_arithmetic`, and name "
                "what comes of it"
            ),
        ),
        (
            (
                "merge_method: slerp\nparameters: {t: 0.5}\nbase_model: b\ntokenizer_source: union\n"
                "slices: [{base_model: a, sources: [{model: a, layer_range: [0, 2]}, "
                "{model: b, layer_range: [0, 2]}]}]"
            ),
            (
                "tokenizer_source: slices[0].base_model is another base, whose rows would stand for tokens "
                "that models of this slice lack; name one base for all slices, or leave the tokenizers out"
            ),
        ),
        (
            (
                "merge_method: slerp\nparameters: {t: 0.5}\nbase_model: b\n"
                "slices: [{base_model: a, sources: [{model: a, layer_range: [0, 3]}, "
                "{model: b, layer_range: [0, 2]}]}]"
            ),
            "slices[0].sources[0].layer_range: the slice has 2 layers, these are 3",
        ),
        (
            (
                "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\n"
                "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]}]"
            ),
            "slices[0].sources: a slice takes as many layers of each model, these give 2, 3",
        ),
        (
            "merge_method: linear\nmodels: [{model: a+, parameters: {weight: 1}}]",
            'models[0].model: expected the name of an adapter behind the +, got "a+"',
        ),
        (
            LINEAR + "- {model: a, parameters: {weight: 2}}",
            "models[1].model: a is listed twice",
        ),
        (
            LINEAR + "tokenizer: {sources: base, tokens: {<x>: {source: elsewhere}}}",
            'tokenizer.tokens."<x>".source: "elsewhere" is none of the models; name one that is merged',
        ),
        (
            LINEAR + "chat_template: chatxml",
            (
                "chat_template: expected auto, chatml, llama3, mistral, alpaca, exaone or a text in Jinja, "
                'got "chatxml"'
            ),
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_by_its_key(text: str, said: str) -> None:
    assert said in refused(text)


A, B = (
    "models: [{model: a, parameters: {weight: 1}}]",
    "models: [{model: b, parameters: {weight: 1}}]",
)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ("[default]", "modules: expected a mapping of modules to what they are, got a list of 1"),
        ("{}", "modules: expected a mapping of modules to what they are, got an empty one"),
        ("{default: 3}", "modules.default: expected a mapping of keys to values, got 3"),
        ("{default: {}}", "modules.default: expected models or slices, got none of them"),
        (
            f"{{default: {{{A}, slices: [{{}}]}}}}",
            "modules.default: expected models or slices, got models and slices",
        ),
        (
            f"{{default: {{{A}, base_model: a}}}}",
            (
                "modules.default.base_model: a module has no base of its own; name it at the top level, for "
                "all modules"
            ),
        ),
        (
            f"{{default: {{{A}, layers: 3}}}}",
            "modules.default.layers: unknown key; known: models, parameters, slices",
        ),
        (
            "{default: {models: [{model: a}]}}",
            (
                "modules.default.models[0].parameters.weight: this key is required, here or under "
                "parameters for all"
            ),
        ),
        (
            f"{{default: {{{A}, parameters: {{wieght: 1}}}}}}",
            'modules.default.parameters.wieght: unknown key; did you mean "weight"?',
        ),
        (
            f"{{text_decoder: {{{A}}}}}",
            (
                "modules.text_decoder: the only module in the recipe, without which mergekit leaves all "
                "other tensors of the model out; list the other modules too, or write what is under it at "
                "the top level to merge all"
            ),
        ),
        (
            (
                f"{{shared: {{{A}}}, encoder: {{slices: [{{sources: [{{model: a, layer_range: [0, 2]}}]}}]}}}}"
            ),
            (
                "modules.encoder.slices: layers of one module beside others cannot be put together; list "
                "whole models, as modules.encoder.models"
            ),
        ),
        (
            f"{{shared: {{{A}}}, encoder: {{{B}}}}}",
            (
                "modules.encoder.models: b, where modules.shared has a; modules can have parameters of "
                "their own, not models: list the same ones in the same order, with a weight of 0 for what "
                'is not wanted, or write a native recipe with a rule {tensors: "encoder.*", copy: 0}'
            ),
        ),
        (
            f"{{encoder: {{{A}}}, decoder: {{{A}, parameters: {{normalize: false}}}}}}",
            (
                "modules: a module has the tensors whose names begin with its own, and one of default, "
                "text_decoder and shared has all others; the recipe lists none of these; give all modules "
                "the same parameters, or write a native recipe with rules by names of tensors"
            ),
        ),
        (
            f"{{default: {{{A}}}, shared: {{{A}, parameters: {{normalize: false}}}}}}",
            (
                "modules: a module has the tensors whose names begin with its own, and one of default, "
                "text_decoder and shared has all others; the recipe lists default, shared of these; give "
                "all modules the same parameters, or write a native recipe with rules by names of tensors"
            ),
        ),
        (
            f"{{shared: {{{A}}}, encoder: {{models: [{{model: a}}]}}}}",
            (
                "modules.encoder.parameters.weight: this key is required, here, for each model or under "
                "parameters for all"
            ),
        ),
        (
            (
                "{shared: {models: [{model: a}, {model: b}], parameters: {weight: 1}}, encoder: {models: "
                "[{model: a, parameters: {weight: [0, 1]}}, {model: b}], parameters: {weight: 1}}}"
            ),
            (
                "modules.encoder.parameters.weight: in a module the models may have numbers of their own, "
                "or all the same gradient or values by names; give each model a number, all of them the "
                "same, or the same models and parameters to all modules as `models` at the top level"
            ),
        ),
    ],
)
def test_modules_that_cannot_be_followed_are_refused(modules: str, said: str) -> None:
    assert said in refused(f"merge_method: linear\nmodules: {modules}")


def test_a_value_out_of_range_is_said_of_its_module() -> None:
    entry = "models: [{model: b, parameters: {weight: 1}}]"

    said = refused(
        "merge_method: ties\nbase_model: a\nmodules:\n"
        f"  default: {{{entry}, parameters: {{density: 2}}}}\n"
    )

    assert said == ["modules.default.parameters.density: expected a number in [0, 1], got 2"]
    both = refused(
        f"merge_method: ties\nbase_model: a\nmodules:\n  shared: {{{entry}}}\n"
        f"  encoder: {{{entry}, parameters: {{density: 2}}}}\n"
    )
    assert both == ["modules.encoder.parameters.density: expected a number in [0, 1], got 2"]


def test_modules_are_rules_for_all_tensors_but_those_of_one() -> None:
    recipe = parsed(
        "merge_method: ties\nbase_model: a\nparameters: {density: {filter: mlp, value: 0.5}}\nmodules:\n"
        "  text_decoder:\n    models: [{model: b, parameters: {weight: 1}}, {model: c}]\n"
        "    parameters: {weight: 2}\n"
        "  vision: {models: [{model: b}, {model: c}], parameters: {weight: 3}}\n"
        "  vision.pro:\n    models: [{model: b, parameters: {weight: 4}}, {model: c}, {model: a}]\n"
        "    parameters: {weight: 3, density: [{filter: attn, value: [0, 1]}]}\n"
    )

    assert [dict(each.parameters) for each in recipe.sources] == [{"weight": 1.0}, {}]
    assert recipe.parameters["weight"] == 2.0
    first, second = recipe.rules
    assert (first.tensors, second.tensors) == ("vision.pro.*", "vision.*")
    assert first.parameters == {
        "weight": (4.0, 3.0),
        "density": Cases(
            (
                Case("*attn*", Gradient((0.0, 1.0))),
                Case("*mlp*", 0.5),
                Case(None, 1.0),
            )
        ),
    }
    assert second.parameters == {"weight": 3.0}
    assert recipe.remarks == (
        "modules.vision.pro: the tensors whose names begin with vision.pro.",
        "modules.vision: the tensors whose names begin with vision.",
        (
            "modules.text_decoder: all other tensors; mergekit leaves those of modules that are not listed "
            "out"
        ),
    )


def test_a_module_like_the_others_has_a_rule_that_says_no_more_than_it_must() -> None:
    recipe = parsed(
        f"merge_method: linear\nmodules: {{shared: {{{A}}}, encoder: {{{A}}}, decoder: "
        "{models: [{model: a}], parameters: {weight: 3}}}"
    )

    assert [(each.tensors, each.parameters) for each in recipe.rules] == [
        ("encoder.*", {"weight": 1.0}),
        ("decoder.*", {"weight": 3.0}),
    ]


def test_modules_that_are_alike_are_one() -> None:
    recipe = parsed(
        f"merge_method: linear\nmodules: {{encoder: {{{A}}}, decoder: {{models: [{{model: a}}], "
        "parameters: {weight: 1}}}"
    )

    assert not recipe.rules
    assert recipe.remarks == (
        (
            "modules: all are merged alike, and so are tensors of modules that are not listed; mergekit "
            "leaves those out"
        ),
    )


def test_all_that_is_wrong_is_said_at_once() -> None:
    said = refused(
        "merge_method: ties\nbase_modle: a\n"
        "models: [{model: b, parameters: {weight: x, densty: 1}}]\nparameters: {density: 2}\n"
    )

    assert 'base_modle: unknown key; did you mean "base_model"?' in said
    assert 'models[0].parameters.weight: expected a number, got "x"' in said
    assert 'models[0].parameters.densty: unknown key; did you mean "density"?' in said


def test_what_has_no_effect_is_remarked() -> None:
    recipe = parsed(
        "merge_method: ties\nbase_model: a\ndtype: bfloat16\n"
        "models:\n- {model: a, parameters: {weight: 1}}\n"
        "- {model: b, parameters: {weight: 1, normalize: false, t: 0.5}}\n"
        "parameters: {int8_mask: true, density: [{value: 0.5}, {filter: mlp, value: 1}]}\n"
    )

    assert recipe.remarks == (
        "models[0].parameters.weight: no effect, the base is not merged itself",
        "models[1].parameters.normalize: no effect, one value serves all models; move it to parameters",
        "models[1].parameters.t: no effect, ties has no such parameter",
        "parameters.int8_mask: no effect, it changes no number",
        "parameters.density: no effect from entry 1 on: the one before is for all tensors",
        (
            "dtype: mergekit rounds the models to bfloat16 first; here they are merged as they are stored, and "
            "the result is rounded"
        ),
    )


OWN_BASES = """
merge_method: ties
parameters: {weight: 1}
slices:
- base_model: a
  sources: [{model: b, layer_range: [0, 2]}, {model: a, layer_range: [1, 3]}]
- base_model: b
  sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [3, 5]}, {model: a, layer_range: [0, 2]}]
"""


def test_a_slice_has_the_base_that_it_names() -> None:
    recipe = parsed(OWN_BASES)

    assert str(recipe.base) == "a"
    assert [str(each.path) for each in recipe.sources] == ["b", "a", "a"]
    first, second = recipe.layers
    assert first.base is None
    assert [(each.source, each.first) for each in first.ranges] == [(BASE, 1), (0, 0)]
    assert second.base == LayerRange(0, 3, 5)
    assert [(each.source, each.first) for each in second.ranges] == [(1, 2), (2, 0)]
    (remark,) = recipe.remarks
    assert remark == (
        "slices[0].base_model: configuration and tokenizer are those of a, the first base; mergekit takes "
        "those of any of the models where no base is named for all"
    )


def test_a_base_of_a_slice_is_idle_where_no_task_vectors_are_taken() -> None:
    recipe = parsed(
        "merge_method: linear\nparameters: {weight: 1}\n"
        "slices: [{base_model: c, sources: [{model: a, layer_range: [0, 2]}]}]"
    )

    assert [str(each.path) for each in recipe.sources] == ["a"]
    assert recipe.remarks == (
        "slices[0].base_model: no effect, linear takes no task vectors from it",
    )


def test_filters_are_pieces_of_names() -> None:
    recipe = parsed(
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\n"
        "parameters: {t: [{filter: 'a[0]*', value: [0, 1]}, {filter: '*', value: '0.25'}]}\n"
    )

    assert recipe.parameters["t"] == Cases(
        (Case("*a[[]0][*]*", Gradient((0.0, 1.0))), Case(None, 0.25))
    )


def test_a_density_for_some_tensors_leaves_the_others_whole() -> None:
    recipe = parsed(TIES + "parameters: {density: {filter: mlp, value: 0.1}}")

    assert recipe.parameters["density"] == Cases((Case("*mlp*", 0.1), Case(None, 1.0)))


@pytest.mark.parametrize(
    ("method", "keys", "expected"),
    [
        ("linear", "", None),
        ("linear", "base_model: a", None),
        ("linear", "base_model: b", 1),
        ("linear", "base_model: c", 2),
    ],
)
def test_files_beside_the_tensors_are_those_of_the_base(
    method: str, keys: str, expected: int | None
) -> None:
    recipe = parsed(
        f"merge_method: {method}\n{keys}\nparameters: {{weight: 1}}\nmodels: [{{model: a}}, {{model: b}}]"
    )

    assert set(recipe.output.companions.values()) == ({expected} if expected is not None else set())


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("tokenizer_source: b", DrawnVocabulary(0)),
        ("tokenizer_source: base", DrawnVocabulary(BASE)),
        ("tokenizer_source: union", DrawnVocabulary(None)),
        ("tokenizer_source: elsewhere", DrawnVocabulary(Path("elsewhere"))),
        ("tokenizer: {source: union}", DrawnVocabulary(None)),
        (
            "tokenizer: {source: base, pad_to_multiple_of: 64}",
            DrawnVocabulary(BASE, multiple=64),
        ),
        (
            (
                "tokenizer: {tokens: {<x>: {source: b}, <y>: {source: {kind: zero}, force: true}, "
                "<z>: {source: {kind: model_token, model: a, token_id: 7}}}}"
            ),
            DrawnVocabulary(
                None,
                {
                    "<x>": TokenOrigin(0),
                    "<y>": TokenOrigin(None, None, force=True),
                    "<z>": TokenOrigin(BASE, 7),
                },
            ),
        ),
    ],
)
def test_rows_are_drawn_for_the_tokenizer_that_is_named(
    keys: str, expected: DrawnVocabulary
) -> None:
    recipe = parsed(TIES + keys)
    assert recipe.vocabulary == expected
    assert not recipe.output.companions


def test_a_base_among_the_models_gives_rows_and_a_configuration() -> None:
    recipe = parsed(
        LINEAR + "- {model: c, parameters: {weight: 1}}\nbase_model: c\ntokenizer_source: union"
    )
    assert recipe.vocabulary == DrawnVocabulary(None, fill=1)
    assert {kind.value: origin for kind, origin in recipe.output.companions.items()} == {
        "config": 1,
        "generation_config": 1,
    }


def test_models_are_named_with_revisions_and_adapters() -> None:
    recipe = parsed(
        "merge_method: linear\nparameters: {weight: 1}\nmodels:\n- model: org/a@main+org/lora@v1\n"
        "- model: {model: {path: org/b, revision: v2}, lora: c}\n- model: d\n"
    )

    assert [(str(each.path), each.adapter and str(each.adapter)) for each in recipe.sources] == [
        ("org/a@main", "org/lora@v1"),
        ("org/b@v2", "c"),
        ("d", None),
    ]


def test_what_planning_refuses_is_said_of_mergekits_keys(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.w" for layer in range(4)]
    save_file({name: torch.ones(3) for name in names}, tmp_path / "a.safetensors")
    path = tmp_path / "a.safetensors"
    config = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(path), "layer_range": [2, 7]}]}],
    }

    with pytest.raises(RecipeError) as caught:
        streammerge.plan(config)

    said = str(caught.value)
    assert said.startswith("slices[0].sources[0].layer_range: [2, 7] goes beyond the 4 layers")


def test_the_factor_of_passthrough_is_that_of_its_source() -> None:
    """As for attention output of layers that stand twice in model cards: a filter below one source."""
    recipe = parsed(
        "merge_method: passthrough\nslices:\n- sources:\n  - model: a\n    layer_range: [0, 4]\n"
        "- sources:\n  - model: a\n    layer_range: [2, 6]\n    parameters:\n"
        "      scale: [{filter: o_proj, value: 0.0}, {value: 1.0}]\n"
    )

    first, second = recipe.layers
    assert not first.ranges[0].parameters
    assert second.ranges[0].parameters["scale"] == Cases((Case("*o_proj*", 0.0), Case(None, 1.0)))
