"""What adapters alone cannot come to is refused by name, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import MEMORY
from safetensors.torch import save_file

import streammerge
from streammerge.adapters.combining.plans import CombinationPlan
from streammerge.cli.arguments import main
from streammerge.errors import (
    CheckpointError,
    MemoryBudgetError,
    NonFiniteError,
    OutputExistsError,
    RecipeError,
    ShapeMismatchError,
    StreamMergeError,
    UnsupportedAdapterError,
)
from tests.adapters.tiny import bert, llama, make_ia3, make_lora, mixtral, rewrite

Q = {"target_modules": ["q_proj"], "r": 4}


def recipe_for(method: str, paths: list[Path], **document: Any) -> dict[str, Any]:
    """Return a recipe that combines adapters."""
    return {"method": method, "sources": [{"path": str(path)} for path in paths]} | document


@pytest.fixture
def refuse(tmp_path: Path) -> Callable[..., str]:
    """Merge, check that it is refused before anything is written; return the message."""

    def check(error: type[StreamMergeError], recipe: dict[str, Any], *words: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error) as caught:
            streammerge.merge(recipe, tmp_path / "out", memory=MEMORY)
        assert sorted(tmp_path.rglob("*")) == before
        for word in words:
            assert word in str(caught.value)
        return str(caught.value)

    return check


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return make_lora(tmp_path / "a", llama(), seed=1, **Q)


def test_unequal_ranks_name_the_types_that_allow_them(refuse, lora: Path, tmp_path: Path):
    other = make_lora(tmp_path / "b", llama(), seed=2, **(Q | {"r": 8}))

    for method in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"):
        parameters = {} if method == "linear" else {"density": 0.5}
        recipe = recipe_for(method, [lora, other], parameters=parameters)
        refuse(RecipeError, recipe, "sources[0] 4, sources[1] 8", "cat, svd", "ties_svd", "q_proj")


def test_adapters_of_another_base_are_told_by_their_shapes(refuse, lora: Path):
    def widen(tensors):
        return {k: torch.cat([v, v], dim=1) if "lora_A" in k else v for k, v in tensors.items()}

    other = rewrite(make_lora(lora.parent / "b", llama(), seed=2, **Q), widen)

    refuse(
        ShapeMismatchError,
        recipe_for("cat", [lora, other]),
        "[32] to 32",
        "[64] to 32",
        "different bases",
    )


@pytest.mark.parametrize(
    ("build", "config", "words"),
    [
        (llama, Q | {"use_dora": True}, ["DoRA", "magnitudes", 'the "base"']),
        (bert, {"target_modules": ["query"], "bias": "all"}, ["bias: all", "base"]),
        (llama, {"target_parameters": ["mlp.experts.down_proj"]}, ["target_parameters"]),
        (llama, Q | {"ensure_weight_tying": True}, ["ensure_weight_tying"]),
    ],
    ids=["DoRA", "bias", "target_parameters", "ensure_weight_tying"],
)
def test_what_needs_the_base_is_refused(build, config, words, refuse, tmp_path: Path):
    if "target_parameters" in config:
        build = mixtral
    path = make_lora(tmp_path / "x", build(), seed=1, **config)

    refuse(UnsupportedAdapterError, recipe_for("cat", [path, path]), "sources[0]", *words)


def test_kinds_and_namings_do_not_mix(refuse, lora: Path, tmp_path: Path):
    ia3 = make_ia3(
        tmp_path / "i", llama(), seed=1, target_modules=["k_proj"], feedforward_modules=[]
    )
    raw = tmp_path / "k.safetensors"
    tensors = {"lora_unet_q.lora_down.weight": torch.ones(2, 3)}
    save_file(tensors | {"lora_unet_q.lora_up.weight": torch.ones(3, 2)}, raw)

    refuse(RecipeError, recipe_for("linear", [lora, ia3]), "one kind", "IA3")
    refuse(RecipeError, recipe_for("linear", [lora, raw]), "one naming", "kohya")
    refuse(RecipeError, recipe_for("svd", [ia3, ia3]), "linear only")


def test_ia3_vectors_that_one_source_lacks_are_refused(refuse, tmp_path: Path):
    paths = [
        make_ia3(tmp_path / name, llama(), seed=1, target_modules=t, feedforward_modules=[])
        for name, t in (("a", ["k_proj", "v_proj"]), ("b", ["k_proj"]))
    ]

    refuse(RecipeError, recipe_for("linear", paths), "sources[1]: has no IA3 vector", "v_proj")


def test_values_that_are_not_finite_name_source_and_tensor(refuse, lora: Path, tmp_path: Path):
    other = make_lora(tmp_path / "b", llama(), seed=2, **Q)

    def spoil(tensors):
        tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"][1, 2] = torch.nan
        return tensors

    rewrite(other, spoil)
    for method in ("linear", "cat", "svd"):
        refuse(
            NonFiniteError,
            recipe_for(method, [lora, other]),
            "layers.1.self_attn.q_proj.lora_A.weight",
            "sources[1] holds nan at flat element 34",
        )


def test_results_beyond_the_output_type_are_refused(refuse, lora: Path):
    recipe = recipe_for("linear", [lora], output={"dtype": "float16"})
    recipe["sources"][0]["weight"] = 1e20

    refuse(NonFiniteError, recipe, "beyond the range of F16", "wider")


def test_heads_that_differ_have_no_combination(refuse, tmp_path: Path):
    config = {"target_modules": ["query"], "r": 4, "modules_to_save": ["classifier"]}
    paths = [make_lora(tmp_path / f"{i}", bert(), seed=i, **config) for i in range(2)]

    refuse(RecipeError, recipe_for("cat", paths), "sources[0] and sources[1]", "copy: 0")


def test_a_module_adapted_by_one_and_replaced_by_another_is_refused(refuse, tmp_path: Path):
    saved = make_lora(
        tmp_path / "s", llama(), seed=1, **(Q | {"modules_to_save": ["embed_tokens"]})
    )
    adapted = make_lora(
        tmp_path / "l", llama(), seed=2, target_modules=["q_proj", "embed_tokens"], r=4
    )
    tokens = make_lora(tmp_path / "t", llama(), seed=3, **(Q | {"trainable_token_indices": [1]}))
    name = "model.embed_tokens.weight"

    refuse(RecipeError, recipe_for("cat", [saved, adapted]), "model.embed_tokens", "copy: ...")
    refuse(RecipeError, recipe_for("cat", [tokens, adapted]), "model.embed_tokens", "copy: ...")
    for whole in (saved, tokens):
        for index, n_factors in ((0, 0), (1, 2)):
            rules = [{"tensors": name, "copy": index}]
            recipe = recipe_for("cat", [whole, adapted], rules=rules)
            plan = streammerge.plan(recipe, memory=MEMORY)
            assert isinstance(plan, CombinationPlan)
            found = [tensor.name for tensor in plan.outputs if "embed_tokens" in tensor.name]
            assert len([each for each in found if "lora" in each]) == n_factors
            assert len([each for each in found if "lora" not in each]) == 1


def test_different_tokens_have_no_combination(refuse, tmp_path: Path):
    paths = [
        make_lora(tmp_path / f"{i}", llama(), seed=i, **(Q | {"trainable_token_indices": [i]}))
        for i in (1, 2)
    ]

    refuse(RecipeError, recipe_for("cat", paths), "different tokens", "copy: 0")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"method": "svdd"}, ["unknown method", 'did you mean "svd"']),
        ({"method": "slerp"}, ["unknown method"]),
        ({"method": "svd", "parameters": {"svd_rank": -1}}, ["parameters.svd_rank", "[0, 1.0"]),
        ({"method": "svd", "parameters": {"svd_rank": 2.5}}, ["expected a whole number", "2.5"]),
        ({"method": "svd", "parameters": {"svd_rank": True}}, ["expected a whole number", "true"]),
        ({"method": "svd", "parameters": {"svd_clamp": 0.3}}, ["svd_clamp", "(0.5, 1]"]),
        ({"method": "svd", "parameters": {"svd_driver": "gesvd"}}, ["svd_driver", "CPU"]),
        ({"method": "svd", "parameters": {"svd_full_matrices": True}}, ["never", "remove"]),
        ({"method": "cat", "parameters": {"svd_rank": 4}}, ["parameters.svd_rank: unknown key"]),
        ({"method": "cat", "parameters": {"weight": [1, 2]}}, ["expected 1 values, one for each"]),
        ({"method": "ties"}, ["sources[0].density: this key is required"]),
        ({"method": "ties", "parameters": {"density": 1.5}}, ["[0, 1]"]),
        ({"method": "linear", "parameters": {"normalize": True}}, ["normalize: unknown key"]),
        ({"method": "cat", "non_finite": "keep"}, ["non_finite"]),
        ({"method": "cat", "rules": [{"tensors": "*", "drop": True}]}, ["nothing is left"]),
    ],
)
def test_recipes_are_refused_with_the_key(document, words, refuse, lora: Path):
    refuse(RecipeError, recipe_for("svd", [lora]) | document, *words)


def test_types_for_adapters_say_so_when_sources_are_models(refuse, lora: Path, tmp_path: Path):
    llama().save_pretrained(tmp_path / "model")
    model = tmp_path / "model"

    refuse(RecipeError, recipe_for("svd", [lora, model]), "sources[1]", "an adapter of adapters")
    refuse(RecipeError, recipe_for("cat", [lora], base=str(model)), "has a base")


def test_a_budget_too_small_names_one_that_is_enough(lora: Path, tmp_path: Path):
    recipe = recipe_for("ties_svd", [lora], parameters={"density": 0.5})
    with pytest.raises(MemoryBudgetError, match="never form a whole product") as caught:
        streammerge.plan(recipe, memory="1MiB")

    enough = re.search(r"--memory (\w+) or more", str(caught.value))
    assert enough is not None
    streammerge.merge(recipe, tmp_path / "out", memory=enough[1])


def test_an_adapter_that_changes_after_planning_is_refused(lora: Path, tmp_path: Path):
    plan = streammerge.plan(recipe_for("cat", [lora]), memory=MEMORY)
    rewrite(lora, lambda tensors: {k: v + 1 for k, v in tensors.items()})

    with pytest.raises(CheckpointError, match="changed since it was planned"):
        streammerge.merge(plan, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_inputs_and_foreign_outputs_are_never_overwritten(lora: Path, tmp_path: Path):
    recipe = recipe_for("cat", [lora])
    with pytest.raises(OutputExistsError):
        streammerge.merge(recipe, lora, memory=MEMORY, overwrite=True)
    streammerge.merge(recipe, tmp_path / "out", memory=MEMORY)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        streammerge.merge(recipe, tmp_path / "out", memory=MEMORY)

    streammerge.merge(recipe, tmp_path / "out", memory=MEMORY, overwrite=True)


def test_a_complete_combination_is_found_by_resume(lora: Path, tmp_path: Path):
    recipe = recipe_for("cat", [lora])
    expected = streammerge.merge(recipe, tmp_path / "out", memory=MEMORY)
    written = (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns

    assert streammerge.merge(recipe, tmp_path / "out", memory=MEMORY, resume=True) == expected
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns == written
    other = recipe_for("svd", [lora], parameters={"svd_rank": 1})
    with pytest.raises(OutputExistsError, match="--overwrite"):
        streammerge.merge(other, tmp_path / "out", memory=MEMORY, resume=True)
    # What its tensors mean, without which they are the same.
    config = json.loads((lora / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (lora / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(OutputExistsError, match="--overwrite"):
        streammerge.merge(recipe, tmp_path / "out", memory=MEMORY, resume=True)


def test_the_command_line_combines_and_plans(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_for("svd", [lora, lora], parameters={"svd_rank": 2})))

    assert main(["plan", str(path)]) == 0
    assert "2 x 2" in capsys.readouterr().out
    assert main(["plan", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["r"] == 2
    assert main(["merge", str(path), str(tmp_path / "out"), "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-1]["event"] == "done"
    manifest = json.loads((tmp_path / "out" / "streammerge_manifest.json").read_text())
    assert sorted([*manifest["files"], "streammerge_manifest.json"]) == sorted(
        each.name for each in (tmp_path / "out").iterdir()
    )
    assert main(["merge", str(path), str(tmp_path / "out")]) == 4
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out"), "--against", str(path)]) == 2
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "2 x 2" in capsys.readouterr().out
    # The recipe that lies beside the result makes it again.
    again = ["merge", str(tmp_path / "out" / "streammerge_recipe.yaml"), str(tmp_path / "again")]
    assert main(again) == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_the_budget_that_a_combination_names_is_accepted_by_a_fresh_process(tmp_path: Path) -> None:
    """A process starts with a few MiB more or less each time."""
    model = llama()
    paths = [
        make_lora(tmp_path / f"a{seed}", model, seed=seed, r=4, target_modules=["q_proj"])
        for seed in range(2)
    ]
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"method": "cat", "sources": [{"path": str(p)} for p in paths]}))

    def plan(memory: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "streammerge", "plan", str(recipe), "--memory", memory]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    refused = plan("1MiB")
    assert refused.returncode == 3
    named = re.search(r"give --memory (\S+) or more", refused.stderr)
    assert named is not None

    accepted = [plan(named[1]).returncode for _ in range(3)]

    assert accepted == [0, 0, 0]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"layers": [{"sources": [{"source": 0, "layers": [0, 1]}]}]}, "layers: adapters are"),
        ({"parameters": {"weight": {"gradient": [0, 1]}}}, "a gradient runs over the layers"),
        ({"output": {"dtype": "promoted"}}, "output.dtype: promoted is for models"),
        ({"vocabulary": "union"}, "vocabulary: is about models"),
        ({"vocabulary": "same"}, "vocabulary: is about models"),
        ({"mismatch": "common"}, "mismatch: is about models"),
        ({"semantics": "mergekit"}, "semantics: is about models"),
        ({"output": {"chat_template": "chatml"}}, "output.chat_template: is about models"),
        ({"output": {"companions": 0}}, "output.companions: is about models"),
        ({"output": {"max_shard_size": "1GB"}}, "output.max_shard_size: is about models"),
        ({"rules": [{"tensors": "*", "dtype": "keep"}]}, "rules[0].dtype: is about models"),
        ({"rules": [{"tensors": "*", "mismatch": "common"}]}, "rules[0].mismatch: is about models"),
    ],
)
def test_what_only_models_have_is_refused(document, words, refuse, lora: Path):
    refuse(RecipeError, recipe_for("linear", [lora, lora], **document), words)


def test_names_of_modules_are_never_changed(refuse, lora: Path):
    recipe = recipe_for("linear", [lora, lora])
    recipe["sources"][1]["rename"] = [{"from": "model.", "to": "net."}]

    refuse(RecipeError, recipe, "sources[1].rename: modules of adapters")
