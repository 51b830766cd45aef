"""What is allowed and mostly a slip is told: by the plan, in the manifest, and when the merge has ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import MEMORY, Models, Tensors, recipe_of, write_adapter

import streammerge
from streammerge.cli.arguments import main
from streammerge.plan.types import MergePlan


def layers(count: int, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(8, 8, generator=generator)
        for layer in range(count)
    }


@pytest.fixture
def three(models: Models) -> list[Path]:
    """A base and two models."""
    made = [models.write(layers(3, seed), f"m{seed}") for seed in range(3)]
    for path in made:
        (path / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
    return made


def remarks(recipe: Any, topic: str) -> list[str]:
    """Return what a plan remarks on a topic, all of which it prints."""
    planned = streammerge.plan(recipe, memory=MEMORY)
    assert isinstance(planned, MergePlan)
    texts = [note.text for note in planned.notes if note.topic == topic]
    for text in texts:
        assert text in str(planned)
    return texts


def test_a_usual_recipe_has_none(three: list[Path]) -> None:
    base, *sources = three
    recipe = recipe_of("ties", base, sources, parameters={"density": 0.5})

    assert [remarks(recipe, topic) for topic in ("sources", "base", "config")] == [[], [], []]


def test_a_model_that_is_named_twice(three: list[Path], tmp_path: Path) -> None:
    base, one, other = three
    (tmp_path / "link").symlink_to(one)
    recipe = recipe_of("task_arithmetic", base, [one, other, tmp_path / "link"])

    assert remarks(recipe, "sources") == [
        f"sources[2] is sources[0] once more: {tmp_path / 'link'}"
    ]


def test_a_base_that_is_a_source_and_one_that_nothing_asks_for(three: list[Path]) -> None:
    base, *sources = three

    (text,) = remarks(recipe_of("task_arithmetic", base, three), "sources")
    assert text == "sources[0] is the base: its task vector is 0 everywhere"
    (text,) = remarks(recipe_of("linear", base, sources), "base")
    assert text.startswith("linear merges the values of the sources")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"num_hidden_layers": 4}, "num_hidden_layers of base says 4"),
        ({"num_hidden_layers": 2}, "num_hidden_layers of base says 2"),
        ({"text_config": {"num_hidden_layers": 4}}, "text_config.num_hidden_layers of base says 4"),
        ({"num_hidden_layers": 3}, ""),
        # Nobody knows which of them is meant, or whether either is.
        ({"num_hidden_layers": 4, "depth": 5}, ""),
        ({"num_hidden_layers": "4"}, ""),
        ({}, ""),
    ],
)
def test_a_configuration_that_counts_other_layers(
    config: dict[str, Any], told: str, three: list[Path]
) -> None:
    base, *sources = three
    (base / "config.json").write_text(json.dumps(config))

    texts = remarks(recipe_of("task_arithmetic", base, sources), "config")

    assert len(texts) == bool(told)
    for text in texts:
        assert text.startswith(
            f"{told}, and the result has 3 layers, model.layers.0 to model.layers.2"
        )


def test_layers_that_a_recipe_puts_together_are_counted_anew(three: list[Path]) -> None:
    base, *_ = three
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 3}))
    recipe = {
        "method": "passthrough",
        "sources": [{"path": str(base)}],
        "layers": [{"sources": [{"source": 0, "layers": each}]} for each in ([0, 2], [1, 3])],
    }

    assert remarks(recipe, "config") == []


def adapter_of(path: Path, **changes: Any) -> Path:
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(2)]
    write_adapter(path, dict.fromkeys(names, (8, 8)), seed=4)
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target_modules": ["up_proj"]}, ""),
        ({"target_modules": "all-linear"}, ""),
        (
            {"target_modules": ["layers.0.mlp.up_proj"]},
            "has 1 module(s) that target_modules of its configuration does not name, model.layers.1.mlp.up_proj: they",
        ),
        ({"target_modules": r".*\.0\..*"}, "has 1 module(s)"),
        ({"base_model_name_or_path": "org/M0"}, ""),
        ({"base_model_name_or_path": "C:\\models\\other"}, "was trained on C:\\models\\other,"),
    ],
)
def test_an_adapter_that_was_made_for_something_else(
    changes: dict[str, Any], told: str, three: list[Path], tmp_path: Path
) -> None:
    base = three[0]
    adapter = adapter_of(
        tmp_path / "adapter",
        **{"target_modules": ["up_proj"], "base_model_name_or_path": None} | changes,
    )
    baked = recipe_of("task_arithmetic", base, [adapter])
    tuned = recipe_of("linear", None, three[1:])
    tuned["sources"][0] |= {"path": str(base), "adapter": str(adapter)}

    for recipe, topic, whose in ((baked, "adapter", ""), (tuned, "files", "its adapter ")):
        texts = [text.partition("): ")[2] for text in remarks(recipe, topic)]
        said = [text for text in texts if not text.startswith("changes ")]
        assert len(said) == bool(told)
        for text in said:
            assert text.startswith(whose + told)


def test_they_are_told_when_the_merge_has_ended(
    three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (three[1] / "config.json").write_text(json.dumps({"num_hidden_layers": 3, "rope_theta": 1}))
    (three[0] / "notes").mkdir()
    recipe = recipe_of("linear", None, [three[0], three[1], three[1]])
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))

    assert main(["merge", str(file), str(tmp_path / "out"), "--memory", MEMORY]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert main(["merge", str(file), str(tmp_path / "quiet"), "--memory", MEMORY, "--quiet"]) == 0

    assert capsys.readouterr().err == ""
    assert "  left behind: notes/" in lines
    assert f"  sources: sources[2] is sources[1] once more: {three[1]}" in lines
    assert any(line.startswith("  differs: config.rope_theta: ") for line in lines)


def test_of_many_the_first_are_told(
    three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {f"setting_{number:02d}": number for number in range(20)}
    (three[1] / "config.json").write_text(json.dumps({"num_hidden_layers": 3} | settings))
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_of("linear", None, three)))

    assert main(["merge", str(file), str(tmp_path / "out"), "--memory", MEMORY]) == 0

    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if line.startswith("  differs: ")]
    assert len(told) == 12
    assert f"  and 8 more; the manifest of {tmp_path / 'out'} has all" in lines


def test_what_holds_for_all_outputs_of_a_grid_is_told_once(
    three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of("linear", None, [three[0], three[0]]) | {"grid": {"seed": [1, 2, 3]}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))

    assert main(["merge", str(file), str(tmp_path / "out"), "--memory", MEMORY]) == 0

    said = capsys.readouterr().err
    assert said.count("sources[1] is sources[0] once more") == 1
    assert said.count(" tensors in ") == 3
