"""A base that is a model with an adapter: as mergekit merges it, without a copy of the base on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from adapters import tiny
from models import load_model
from test_recipes import check_alike, run_mergekit

from streammerge.chaining.foreseeing import plan_chain
from streammerge.chaining.stages import Chain, read_recipes
from streammerge.cli.arguments import main

TASKS = "merge_method: {method}\nbase_model: {a}+{lora}\ndtype: float32\nmodels:\n"
SOURCES = (
    "- {{model: {b}, parameters: {{weight: 0.6, density: 0.5}}}}\n"
    "- {{model: {c}, parameters: {{weight: 0.3, density: 0.7}}}}\n"
)
RECIPES = {
    "task_arithmetic": TASKS.replace("{method}", "task_arithmetic")
    + SOURCES.replace(", density: 0.5", "").replace(", density: 0.7", ""),
    "ties": TASKS.replace("{method}", "ties") + SOURCES,
    "ties with the base among the models": TASKS.replace("{method}", "ties")
    + SOURCES
    + "- {{model: {a}+{lora}}}\n",
    "slerp": (
        "merge_method: slerp\nbase_model: {a}+{lora}\nparameters: {{t: 0.3}}\n"
        "models: [{{model: {a}+{lora}}}, {{model: {b}}}]\n"
    ),
}


@pytest.fixture
def paths(made: Callable[[str], dict[str, Path]], tmp_path: Path) -> dict[str, Path]:
    import transformers

    found = dict(made("llama"))
    model = transformers.AutoModelForCausalLM.from_pretrained(found["a"])
    tiny.make_lora(tmp_path / "lora", model, seed=3, r=4, target_modules=["q_proj", "down_proj"])
    return found | {"lora": tmp_path / "lora"}


@pytest.mark.parametrize("name", RECIPES)
def test_tensors_are_those_of_mergekit(name: str, paths: dict[str, Path], tmp_path: Path) -> None:
    text = RECIPES[name].format(**paths)
    recipe = tmp_path / "config.yml"
    recipe.write_text(text)

    theirs = run_mergekit(text, tmp_path / "theirs")
    assert main(["merge", str(recipe), str(tmp_path / "ours"), "--quiet"]) == 0

    check_alike(load_model(tmp_path / "ours"), theirs)
    assert not (tmp_path / "ours.stages").exists()


def test_the_base_is_computed_where_it_is_read(paths: dict[str, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "config.yml"
    recipe.write_text(RECIPES["ties"].format(**paths))

    chain = read_recipes(recipe, download=False)
    assert isinstance(chain, Chain)
    first, last = plan_chain(chain)
    assert main(["merge", str(recipe), str(tmp_path / "out"), "--quiet"]) == 0

    assert first.models[0].path == str(paths["a"])
    assert [stage.name for stage in last.fused] == ["base-of-result"]
    manifest = json.loads((tmp_path / "out" / "streammerge_manifest.json").read_text())
    notes = {note["topic"]: note["text"] for note in manifest["notes"]}
    assert notes["fused"].startswith(
        "base-of-result (task_arithmetic) is computed while it is read"
    )
