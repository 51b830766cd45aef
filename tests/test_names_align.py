"""Sources whose tensors have other names than the base's: the same weights, the same result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import streammerge as sm
from streammerge.errors import MissingTensorError, RecipeError
from tests.models import tight_plan

Tensors = dict[str, Tensor]
Change = Callable[[str], str]


def language_model(seed: int, vocabulary: int = 24) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {"model.embed_tokens.weight": made(vocabulary, 8), "model.norm.weight": made(8)}
    for layer in range(2):
        outer = f"model.layers.{layer}"
        tensors |= {
            f"{outer}.self_attn.q_proj.weight": made(8, 8),
            f"{outer}.self_attn.o_proj.weight": made(8, 8),
            f"{outer}.mlp.up_proj.weight": made(16, 8),
            f"{outer}.input_layernorm.weight": made(8),
        }
    return tensors | {"lm_head.weight": made(vocabulary, 8)}


def renamed(tensors: Tensors, change: Change) -> Tensors:
    return {change(name): tensor for name, tensor in tensors.items()}


def write(path: Path, tensors: Tensors, **config: Any) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"tie_word_embeddings": False, **config}))
    return path


def recipe(base: Path, *sources: Path, rename: Any = None, **more: Any) -> dict[str, Any]:
    return {
        "method": "task_arithmetic",
        "base": str(base),
        "sources": [
            {"path": str(path), "weight": 0.5} | ({} if rename is None else {"rename": rename})
            for path in sources
        ],
        **more,
    }


def bare(name: str) -> str:
    return name.removeprefix("model.")


def inside(outer: str) -> Change:
    return lambda name: f"{outer}{name}"


def in_language_model(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1)


def in_old_language_model(name: str) -> str:
    return f"language_model.{name}"


CHANGES: dict[str, Change] = {
    "module.": inside("module."),
    "_orig_mod.": inside("_orig_mod."),
    "another beginning": inside("transformer."),
    "no beginning": bare,
    "tower, transformers 5": in_language_model,
    "tower, transformers 4": in_old_language_model,
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", CHANGES)
def test_names_that_are_known_to_be_the_same_merge(
    kind: str, tmp_path: Path, *, reverse: bool
) -> None:
    base, tuned = language_model(0), language_model(1)
    changed = renamed(base if reverse else tuned, CHANGES[kind])
    first = write(tmp_path / "base", changed if reverse else base)
    second = write(tmp_path / "tuned", tuned if reverse else changed)

    manifest = sm.merge(recipe(first, second), tmp_path / "out")

    got = load_file(tmp_path / "out" / "model.safetensors")
    plain = write(tmp_path / "plain", base), write(tmp_path / "plain tuned", tuned)
    sm.merge(recipe(*plain), tmp_path / "expected")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    if reverse:
        expected = renamed(expected, CHANGES[kind])
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    notes = [note.text for note in manifest.notes if note.topic == "renamed"]
    assert notes
    assert all(text in str(sm.plan(recipe(first, second))) for text in notes)


def test_only_the_text_tower_of_a_model_that_sees_is_merged(tmp_path: Path) -> None:
    text, tuned = language_model(0), language_model(1)
    tower = {"model.visual.blocks.0.mlp.up_proj.weight": torch.randn(16, 8)}
    base = write(tmp_path / "base", renamed(text, in_language_model) | tower)
    source = write(tmp_path / "tuned", tuned)

    manifest = sm.merge(recipe(base, source, missing="base"), tmp_path / "out")

    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in text.items():
        torch.testing.assert_close(
            got[in_language_model(name)], tensor + 0.5 * (tuned[name] - tensor)
        )
    assert manifest.copied_from_base == tuple(tower)


def test_old_names_of_norms(tmp_path: Path) -> None:
    base = {
        "bert.encoder.layer.0.output.LayerNorm.weight": torch.randn(8),
        "bert.encoder.layer.0.output.LayerNorm.bias": torch.randn(8),
        "bert.encoder.layer.0.output.dense.weight": torch.randn(8, 8),
    }
    old = renamed(base, lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma"))
    old = renamed(old, lambda name: name.replace("LayerNorm.bias", "LayerNorm.beta"))
    old = {name.removeprefix("bert."): tensor + 1 for name, tensor in old.items()}

    sm.merge(recipe(write(tmp_path / "b", base), write(tmp_path / "s", old)), tmp_path / "out")

    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == base.keys()
    for name, tensor in base.items():
        torch.testing.assert_close(got[name], tensor + 0.5)


RENAMES = [
    [{"from": "net.", "to": "model."}, {"from": "head.", "to": "lm_head."}],
    [{"from": "net.*", "to": "model.*"}, {"from": "head.weight", "to": "lm_head.weight"}],
]


@pytest.mark.parametrize("rename", RENAMES)
def test_a_recipe_says_which_names_are_the_same(
    rename: list[dict[str, str]], tmp_path: Path
) -> None:
    base, tuned = language_model(0), language_model(1)
    odd = renamed(tuned, lambda name: name.replace("model.", "net.").replace("lm_head", "head"))
    first, second = write(tmp_path / "base", base), write(tmp_path / "tuned", odd)

    sm.merge(recipe(first, second, rename=rename), tmp_path / "out")

    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in base.items():
        torch.testing.assert_close(got[name], tensor + 0.5 * (tuned[name] - tensor))


@pytest.mark.parametrize(
    ("rename", "says"),
    [
        ([{"from": "nets.", "to": "model."}], r'rename\[0\].from: no tensor of .* fits "nets."'),
        ([{"from": "a.*.b", "to": "c"}], "`from` has 1 stars and `to` has 0"),
        ([{"from": "model.layers.1.", "to": "model.layers.0."}], "two tensors would be called"),
        ([{"from": "model."}], "to: this key is required"),
    ],
)
def test_renamings_that_cannot_be(rename: Any, says: str, tmp_path: Path) -> None:
    first, second = (write(tmp_path / str(seed), language_model(seed)) for seed in (0, 1))

    with pytest.raises(RecipeError, match=says):
        sm.plan(recipe(first, second, rename=rename))


def test_a_model_of_another_kind_is_told_from_one_that_lacks_tensors(tmp_path: Path) -> None:
    first = write(tmp_path / "base", language_model(0))
    other = {f"backbone.blocks.{index}.mixer.weight": torch.zeros(3) for index in range(12)}
    second = write(tmp_path / "tuned", other)

    with pytest.raises(MissingTensorError) as caught:
        sm.plan(recipe(first, second))
    text = str(caught.value)
    assert "has 12 tensors, 0 of which have a name that base" in text
    assert "sources[...].rename" in text
    assert "missing: base" not in text


def experts(seed: int, *, old: bool) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = ("w1", "w3", "w2") if old else ("gate_proj", "up_proj", "down_proj")
    outer = "block_sparse_moe" if old else "mlp"
    shapes = {gate: (6, 8), up: (6, 8), down: (8, 6)}
    tensors = {
        f"model.layers.{layer}.{outer}.experts.{expert}.{part}.weight": torch.randn(
            shape, generator=generator
        )
        for layer in range(2)
        for expert in range(12)
        for part, shape in shapes.items()
    }
    return tensors | {"model.norm.weight": torch.randn(8, generator=generator)}


def as_stacks(ones: Tensors, *, old: bool) -> Tensors:
    gate, up, down = ("w1", "w3", "w2") if old else ("gate_proj", "up_proj", "down_proj")
    outer = "block_sparse_moe" if old else "mlp"
    stacks = {"model.norm.weight": ones["model.norm.weight"]}
    for layer in range(2):
        place = f"model.layers.{layer}.{outer}.experts"

        def all_of(part: str, place: str = place) -> Tensor:
            return torch.stack([ones[f"{place}.{expert}.{part}.weight"] for expert in range(12)])

        into = f"model.layers.{layer}.mlp.experts"
        stacks[f"{into}.gate_up_proj"] = torch.cat([all_of(gate), all_of(up)], dim=1)
        stacks[f"{into}.down_proj"] = all_of(down)
    return stacks


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear"])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("stacked_base", [False, True])
def test_experts_one_by_one_and_stacked_are_the_same(
    method: str, tmp_path: Path, *, stacked_base: bool, old: bool
) -> None:
    base, tuned = experts(0, old=old), experts(1, old=old)
    one = write(tmp_path / "base", as_stacks(base, old=old) if stacked_base else base)
    other = write(tmp_path / "tuned", tuned if stacked_base else as_stacks(tuned, old=old))
    same = write(tmp_path / "same", as_stacks(tuned, old=old) if stacked_base else tuned)
    parameters = {} if method == "task_arithmetic" else {"density": 0.4}
    asked = {"method": method, "parameters": parameters, "seed": 3}

    manifest = sm.merge(recipe(one, other) | asked, tmp_path / "out")
    sm.merge(recipe(one, same) | asked, tmp_path / "expected")

    got, expected = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "expected")
    )
    assert got == expected
    (note,) = [note for note in manifest.notes if note.topic == "experts"]
    assert "tensor(s) of experts are" in note.text


def test_stacks_are_cut_without_changing_a_bit(tmp_path: Path) -> None:
    """Parts that end inside blocks and chunks, in every budget."""
    torch.manual_seed(0)
    ones = {
        f"l.experts.{expert}.{part}.weight": torch.randn(shape)
        for expert in range(5)
        for part, shape in {
            "gate_proj": (301, 333),
            "up_proj": (301, 333),
            "down_proj": (333, 301),
        }.items()
    }
    stacks = {
        "l.experts.gate_up_proj": torch.stack(
            [
                torch.cat(
                    [ones[f"l.experts.{e}.{part}.weight"] for part in ("gate_proj", "up_proj")]
                )
                for e in range(5)
            ]
        ),
        "l.experts.down_proj": torch.stack(
            [ones[f"l.experts.{e}.down_proj.weight"] for e in range(5)]
        ),
    }
    base = write(tmp_path / "base", {name: torch.randn_like(each) for name, each in stacks.items()})
    results = []
    for source in (write(tmp_path / "ones", ones), write(tmp_path / "stacks", stacks)):
        for tight in (True, False):
            asked = recipe(base, source) | {"method": "ties", "parameters": {"density": 0.3}}
            out = tmp_path / f"{source.name}-{tight}"
            planned = tight_plan(asked) if tight else sm.plan(asked, memory="4GiB")
            sm.merge(planned, out)
            results.append((out / "model.safetensors").read_bytes())
    assert len(set(results)) == 1


def test_a_model_that_takes_no_part_at_all_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "base", language_model(0))
    other = {f"backbone.blocks.{index}.mixer.weight": torch.zeros(3) for index in range(12)}
    second = write(tmp_path / "tuned", other)
    rules = [{"tensors": "backbone.*", "drop": True}]

    with pytest.raises(MissingTensorError, match="none takes part"):
        sm.plan(recipe(first, second, missing="base", rules=rules))


def test_the_plan_says_how_much_of_the_base_a_source_lacks(tmp_path: Path) -> None:
    base = language_model(0)
    first = write(tmp_path / "base", base)
    second = write(tmp_path / "tuned", {name: base[name] for name in list(base)[:4]})

    text = str(sm.plan(recipe(first, second, missing="base")))

    assert f"lacks {len(base) - 4} tensor(s) of the base, which are copied" in text


def test_modules_that_merely_have_equal_shapes_do_not_align(tmp_path: Path) -> None:
    """A tower that sees is no tower that reads, unless the recipe says so."""

    def tower(name: str, value: float) -> Tensors:
        return {
            f"{name}.encoder.layers.{layer}.mlp.fc1.weight": torch.full((4, 4), value)
            for layer in range(3)
        }

    base = write(tmp_path / "base", tower("text_model", 1.0))
    source = write(tmp_path / "tuned", tower("vision_model", 3.0))

    with pytest.raises(MissingTensorError, match="0 of which have a name that base"):
        sm.plan(recipe(base, source))
    rename = [{"from": "vision_model.", "to": "text_model."}]
    sm.merge(recipe(base, source, rename=rename), tmp_path / "out")

    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == tower("text_model", 0.0).keys()
    assert all(torch.equal(each, torch.full((4, 4), 2.0)) for each in merged.values())
