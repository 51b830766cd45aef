"""mergekit's recipes give what mergekit makes of them, tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from configs import EXACT
from models import Tensors, load_model
from tiny import ARCHITECTURES

import streammerge
from streammerge.methods import discover_methods
from streammerge.recipe.dumping import dump_recipe
from streammerge.recipe.parsing import parse_recipe

FARTHEST = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 2**-8}
"""Relative distance of a tensor from mergekit's, which computes in float32 too; of a rounded one, a unit in
the last place."""
FEW = 0.005
"""Share of the elements that may be chosen otherwise, where mergekit chooses by rounded scores."""
CHOSEN = ("arcee_fusion",)
ON_ALL = (
    "linear",
    "linear with a gradient",
    "slerp",
    "ties with gradients of density and weight",
    "task_arithmetic with gradients and filters",
    "layers of two models",
    "layers of models of different depth",
    "linear of slices, with gradients in each",
    "ties of slices",
    "ties of slices, each with its base",
    "slerp of slices, the first with a base of its own",
    "model_stock",
)
"""What every architecture is tried with."""

BY_ELEMENT = (
    "linear",
    "linear with a gradient",
    "layers of two models",
    "layers of models of different depth",
    "linear of slices, with gradients in each",
)
"""Those for which it does not matter what is one tensor, nor what it is called."""

MakeModels = Callable[[str], dict[str, Path]]


def run_mergekit(text: str, out: Path) -> Tensors:
    """Merge as ``mergekit-yaml`` does."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(
        copy_tokenizer=False,
        write_model_card=False,
        quiet=True,
        clone_tensors=True,
        # Where it keeps models that it has merged adapters into.
        lora_merge_cache=str(out.with_name("adapted")),
    )
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), options)
    return load_model(out)


def merge(text: str, directory: Path) -> tuple[Tensors, Path]:
    """Merge the recipe as it stands in a file."""
    recipe = directory / "config.yml"
    recipe.write_text(text)
    streammerge.merge(recipe, directory / "ours", memory="4GiB")
    return load_model(directory / "ours"), directory / "ours"


def check_alike(ours: Tensors, theirs: Tensors, *, few: float = 0.0) -> None:
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        mine, other = ours[name].double(), tensor.double()
        apart = (mine - other).abs() > FARTHEST[tensor.dtype] * other.abs().clamp(min=1e-4)
        if few and apart.any():
            assert apart.sum() <= max(1, few * apart.numel()), name
            mine = torch.where(apart, other, mine)
        distance = float(torch.dist(mine, other))
        assert distance <= FARTHEST[tensor.dtype] * float(other.norm()) + 1e-12, (name, distance)


def fused(model: Tensors) -> Tensors:
    """Return a Mixtral with experts as mergekit writes them, in stacks."""
    made: Tensors = {}
    stacks: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for name, tensor in model.items():
        head, moe, rest = name.partition("block_sparse_moe.")
        if not moe:
            made[name] = tensor
        elif rest.startswith("gate."):
            made[f"{head}mlp.{rest}"] = tensor
        else:
            _, number, kind, _ = rest.split(".")
            stacks.setdefault(head, {}).setdefault(kind, {})[int(number)] = tensor
    for head, kinds in stacks.items():
        up, down, gate = (
            torch.stack([of_kind[i] for i in sorted(of_kind)])
            for of_kind in (kinds["w3"], kinds["w2"], kinds["w1"])
        )
        made[f"{head}mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        made[f"{head}mlp.experts.down_proj"] = down
    return made


@pytest.mark.parametrize("name", EXACT)
def test_tensors_are_those_of_mergekit(name: str, made: MakeModels, tmp_path: Path) -> None:
    text = EXACT[name].format(**made("llama"))

    theirs = run_mergekit(text, tmp_path / "theirs")
    ours, _ = merge(text, tmp_path)

    check_alike(ours, theirs, few=FEW if name in CHOSEN else 0.0)


@pytest.mark.parametrize("name", ON_ALL)
@pytest.mark.parametrize("architecture", [each for each in ARCHITECTURES if each != "llama"])
def test_every_architecture_is_merged_as_mergekit_does(
    architecture: str, name: str, made: MakeModels, tmp_path: Path
) -> None:
    text = EXACT[name].format(**made(architecture))
    try:
        theirs = run_mergekit(text, tmp_path / "theirs")
    except Exception as error:  # noqa: BLE001 - whatever it fails with
        pytest.skip(f"mergekit fails: {type(error).__name__}: {error}")
    ours, _ = merge(text, tmp_path)

    if architecture == "mixtral":
        if name not in BY_ELEMENT:
            pytest.skip("mergekit merges all experts of a layer as one tensor")
        ours = fused(ours)
    check_alike(ours, theirs)


@pytest.mark.parametrize(
    "name", ["layers of two models", "layers of models of different depth", "linear"]
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_the_configuration_is_that_of_mergekit(
    architecture: str, name: str, made: MakeModels, tmp_path: Path
) -> None:
    text = EXACT[name].format(**made(architecture))
    run_mergekit(text, tmp_path / "theirs")
    _, out = merge(text, tmp_path)

    ours, theirs = (
        json.loads((path / "config.json").read_text()) for path in (out, tmp_path / "theirs")
    )
    for key in ("num_hidden_layers", "n_layer", "layer_types", "architectures", "model_type"):
        assert ours.get(key) == theirs.get(key), key


@pytest.mark.parametrize("name", EXACT)
def test_a_recipe_is_written_down_as_a_native_one_that_means_the_same(name: str) -> None:
    text = EXACT[name].format(a="a", b="b", c="c", deep="deep")

    methods = {name: each.parameters for name, each in discover_methods().items()}

    recipe = parse_recipe(text, origin="c.yml", methods=methods)

    assert parse_recipe(dump_recipe(recipe), origin="native", methods=methods) == recipe


def arc(one: torch.Tensor, other: torch.Tensor, t: float) -> torch.Tensor:
    cosine = float((one * other).sum() / (one.norm() * other.norm()))
    if not abs(cosine) <= 0.9995:
        return (1 - t) * one + t * other
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * other) / math.sin(angle)


@pytest.mark.parametrize("architecture", ["bert", "mixtral"])
def test_what_mergekit_fails_on_is_merged_tensor_by_tensor(
    architecture: str, made: MakeModels, tmp_path: Path
) -> None:
    """BERT without a pooler, and experts by themselves, against the formulas in float64."""
    paths = made(architecture)
    a, b, c = (
        {name: tensor.double() for name, tensor in load_model(paths[each]).items()}
        for each in "abc"
    )
    (tmp_path / "mean").mkdir()
    mean, _ = merge(EXACT["linear"].format(**paths), tmp_path / "mean")
    on_arc, _ = merge(EXACT["slerp"].format(**paths), tmp_path)

    for name, tensor in mean.items():
        if not tensor.is_floating_point():
            continue
        torch.testing.assert_close(
            tensor.double(), (0.6 * b[name] + 0.3 * c[name]) / 0.9, rtol=1e-6, atol=1e-7
        )
        torch.testing.assert_close(
            on_arc[name].double(), arc(a[name], b[name], 0.3), rtol=1e-5, atol=1e-7
        )
