"""Adapters beside a base that cannot be merged are refused before any work, and leave no trace.

Every test goes through the command line, on files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import MEMORY
from safetensors.torch import load_file, save_file

import streammerge
from streammerge.checkpoint import outputfile
from streammerge.cli.arguments import main
from streammerge.errors import MemoryBudgetError, OutputExistsError
from tests.adapters.tiny import Tensors

FAILED, USAGE, DOES_NOT_FIT = 1, 2, 3
WIDTH, RANK = 32, 4
MODULES = ("layers.0.q_proj", "layers.1.q_proj")
TABLE = "embed_tokens.weight"


@dataclass(frozen=True)
class Job:
    """A base, an adapter of it and a model of its shape, all sound until a test changes them."""

    root: Path
    base: Path
    adapter: Path
    model: Path

    def recipe(self, *sources: Any, method: str = "task_arithmetic", **keys: Any) -> dict[str, Any]:
        listed = [each if isinstance(each, dict) else {"path": str(each)} for each in sources]
        return {"method": method, "base": str(self.base), "sources": listed} | keys

    def copy_of(
        self,
        name: str,
        tensors: Callable[[Tensors], Tensors] | None = None,
        **config: Any,
    ) -> Path:
        """Return a copy of the adapter with other tensors or keys of its configuration."""
        held = load_file(self.adapter / "adapter_model.safetensors")
        document = json.loads((self.adapter / "adapter_config.json").read_text())
        return write_adapter(
            self.root / name, tensors(held) if tensors else held, document | config
        )


def write_adapter(path: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def write_model(path: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    names = [f"{module}.weight" for module in MODULES]
    path.mkdir()
    save_file(
        {name: torch.randn(WIDTH, WIDTH, generator=generator) for name in names}
        | {TABLE: torch.randn(50, WIDTH, generator=generator)},
        path / "model.safetensors",
    )
    (path / "config.json").write_text('{"architectures": ["LlamaModel"], "vocab_size": 50}')
    return path


@pytest.fixture
def job(tmp_path: Path) -> Job:
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for module in MODULES:
        for side, shape in {"A": (RANK, WIDTH), "B": (WIDTH, RANK)}.items():
            name = f"base_model.model.{module}.lora_{side}.weight"
            tensors[name] = torch.randn(shape, generator=generator)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj"]}
    return Job(
        tmp_path,
        write_model(tmp_path / "base", 1),
        write_adapter(tmp_path / "adapter", tensors, config),
        write_model(tmp_path / "model", 2),
    )


@pytest.fixture
def refuse(job: Job, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Merge by the command line, and check how it is refused; return what it says."""

    def merge(recipe: dict[str, Any], code: int, error: str, *says: object) -> str:
        path = job.root / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        before = sorted(job.root.rglob("*"))

        got = main(["merge", str(path), str(job.root / "out"), "--memory", MEMORY])

        printed = capsys.readouterr().err
        assert got == code, printed
        assert printed.startswith(f"{error}: "), printed
        for words in says:
            assert str(words) in printed
        assert sorted(job.root.rglob("*")) == before
        return printed

    return merge


def with_factor(value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    """Return a change of the first factor."""

    def change(tensors: Tensors) -> Tensors:
        name = min(tensors)
        return tensors | {name: value(tensors[name].clone())}

    return change


def spoiled(tensor: torch.Tensor) -> torch.Tensor:
    tensor[2, 5] = float("nan")
    return tensor


FIRST = "base_model.model.layers.0.q_proj.lora_A.weight"


def test_a_missing_configuration_is_named(job: Job, refuse: Callable[..., str]) -> None:
    (job.adapter / "adapter_config.json").unlink()

    refuse(
        job.recipe(job.adapter),
        FAILED,
        "CheckpointError",
        job.adapter / "adapter_config.json",
        "is missing",
        "sources[0]",
    )


def test_factors_that_were_not_gathered_are_named(job: Job, refuse: Callable[..., str]) -> None:
    adapter = job.copy_of("empty", with_factor(lambda _: torch.empty(0)))

    refuse(job.recipe(adapter), FAILED, "ShapeMismatchError", FIRST, "[0]", "ZeRO-3")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
        ({"kasa_config": {"beta": 1}}, "kasa_config is set"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is set"),
        ({"peft_type": "FOURIERFT"}, "peft_type 'FOURIERFT'"),
    ],
)
def test_variants_that_no_base_can_take_are_refused(
    job: Job, refuse: Callable[..., str], config: dict[str, Any], says: str
) -> None:
    refuse(job.recipe(job.copy_of("other", **config)), FAILED, "UnsupportedAdapterError", says)


def test_a_quantised_base_is_refused(job: Job, refuse: Callable[..., str]) -> None:
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    (job.base / "config.json").write_text(json.dumps(config))

    refuse(job.recipe(job.adapter), FAILED, "QuantizedCheckpointError", job.base, "bitsandbytes")


def test_weights_of_the_wrong_length_are_refused(job: Job, refuse: Callable[..., str]) -> None:
    recipe = job.recipe(job.adapter, job.adapter, parameters={"weight": [1, 1, 1]})

    refuse(recipe, USAGE, "RecipeError", "parameters.weight: expected 2 values", "got 3")


@pytest.mark.parametrize(
    ("source", "keys", "says"),
    [
        ({}, {"output": {"dtype": "float16"}}, "keeps the base's types"),
        ({}, {"compute_dtype": "float64"}, "computes in float32"),
        ({"weight": 0.5}, {}, "weight: [0.5]"),
    ],
)
def test_rounding_peft_does_what_peft_can_do_only(
    job: Job, refuse: Callable[..., str], source: dict[str, Any], keys: dict[str, Any], says: str
) -> None:
    recipe = job.recipe({"path": str(job.adapter)} | source, **keys)

    refuse(recipe | {"parameters": {"rounding": "peft"}}, USAGE, "RecipeError", "rounding", says)


def test_rounding_peft_takes_no_model(job: Job, refuse: Callable[..., str]) -> None:
    recipe = job.recipe(job.adapter, job.model, parameters={"rounding": "peft"})

    refuse(recipe, USAGE, "RecipeError", "sources[1]", job.model, "is a model")


def test_a_rule_copies_nothing_from_an_adapter_that_lacks_it(
    job: Job, refuse: Callable[..., str]
) -> None:
    rules = [{"tensors": TABLE, "copy": 0}]

    refuse(
        job.recipe(job.adapter, rules=rules),
        USAGE,
        "RecipeError",
        TABLE,
        "sources[0]",
        "does not bring the tensor along",
    )


def test_models_and_adapters_need_a_base(job: Job, refuse: Callable[..., str]) -> None:
    recipe = job.recipe(job.adapter, job.model, method="linear")
    del recipe["base"]

    refuse(recipe, USAGE, "RecipeError", "sources[0]", "is an adapter", "add `base: PATH`")


def test_two_new_sizes_of_a_vocabulary_are_refused(job: Job, refuse: Callable[..., str]) -> None:
    def with_rows(count: int) -> Callable[[Tensors], Tensors]:
        return lambda held: held | {f"base_model.model.{TABLE}": torch.zeros(count, WIDTH)}

    one, other = job.copy_of("one", with_rows(52)), job.copy_of("other", with_rows(54))

    refuse(
        job.recipe(one, other),
        FAILED,
        "ShapeMismatchError",
        TABLE,
        "[52, 32]",
        "[50, 32]",
        "merge one adapter into the base first",
    )


def test_nan_ends_the_merge_and_names_the_element(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values are seen during the work, so the unfinished merge stays to be resumed."""
    adapter = job.copy_of("nan", with_factor(spoiled))
    path = job.root / "recipe.yaml"
    path.write_text(yaml.safe_dump(job.recipe(adapter)))

    code = main(["merge", str(path), str(job.root / "out"), "--memory", MEMORY])

    printed = capsys.readouterr().err
    assert code == FAILED
    assert not (job.root / "out").exists()
    assert all(words in printed for words in ("NonFiniteError", FIRST, f"element {2 * WIDTH + 5}"))


def test_nan_is_let_through_on_demand(job: Job) -> None:
    adapter = job.copy_of("nan", with_factor(spoiled))
    streammerge.merge(job.recipe(adapter, non_finite="keep"), job.root / "out")

    merged = load_file(job.root / "out" / "model.safetensors")

    found = merged["layers.0.q_proj.weight"].isnan()
    assert found[:, 5].all()
    assert found.sum() == WIDTH
    assert not merged["layers.1.q_proj.weight"].isnan().any()


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {}),
        ("task_arithmetic", {"rounding": "peft"}),
        ("linear", {}),
        ("ties", {"density": 1.0}),
    ],
)
def test_the_manifest_counts_what_adapters_make_not_finite(
    job: Job, method: str, parameters: dict[str, Any]
) -> None:
    adapter = job.copy_of("nan", with_factor(spoiled))
    recipe = job.recipe(adapter, method=method, parameters=parameters, non_finite="keep")

    manifest = streammerge.merge(recipe, job.root / "out")

    counts = {name: record.not_finite for name, record in manifest.tensors.items()}
    expected = dict.fromkeys(counts, 0) | {"layers.0.q_proj.weight": WIDTH}
    assert counts == expected


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "magnitude_prune"])
def test_finite_factors_whose_product_overflows_are_told_from_bad_ones(
    job: Job, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    huge = job.copy_of("huge", lambda held: {k: v * 1e30 for k, v in held.items()})
    parameters = {"density": 0.5} if method == "magnitude_prune" else {}
    path = job.root / "recipe.yaml"
    path.write_text(yaml.safe_dump(job.recipe(huge, method=method, parameters=parameters)))

    assert main(["merge", str(path), str(job.root / "out"), "--memory", MEMORY]) == FAILED

    printed = capsys.readouterr().err
    for words in ("layers.0.q_proj.weight", "sources[0]", str(huge), "a product overflows"):
        assert words in printed
    assert not (job.root / "out").exists()


def test_a_row_for_a_token_that_the_base_lacks_is_refused(
    job: Job, refuse: Callable[..., str]
) -> None:
    """PEFT would not load it either; nothing may be left out silently."""
    name = "base_model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    adapter = job.copy_of(
        "tokens",
        lambda held: held | {name: torch.ones(2, WIDTH)},
        trainable_token_indices={"embed_tokens": [3, 50]},
    )

    refuse(
        job.recipe(adapter),
        FAILED,
        "ShapeMismatchError",
        adapter,
        "token 50",
        f"{TABLE} has 50 rows",
        "another base",
    )


def test_a_norm_of_zero_is_named_as_such(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    path = job.base / "model.safetensors"
    held = load_file(path)
    held["layers.0.q_proj.weight"][7] = 0
    save_file(held, path)

    def normed(tensors: Tensors) -> Tensors:
        for module in MODULES:
            tensors[f"base_model.model.{module}.lora_B.weight"][7] = 0
            tensors[f"base_model.model.{module}.lora_magnitude_vector"] = torch.ones(WIDTH)
        return tensors

    recipe = job.root / "recipe.yaml"
    adapter = job.copy_of("dora", normed, use_dora=True)
    for method in ("task_arithmetic", "linear"):
        recipe.write_text(yaml.safe_dump(job.recipe(adapter, method=method)))

        assert main(["merge", str(recipe), str(job.root / method), "--memory", MEMORY]) == FAILED

        printed = capsys.readouterr().err
        for words in ("layers.0.q_proj.weight", "sources[0]", "[7, 0]", "norm of zero"):
            assert words in printed


def test_the_smallest_budget_is_named_and_suffices(job: Job) -> None:
    recipe = job.recipe(job.adapter, job.model, method="ties", parameters={"density": 0.5})
    with pytest.raises(MemoryBudgetError) as refusal:
        streammerge.plan(recipe, memory=1)
    found = re.search(r"--memory (\w+) or more", str(refusal.value))
    assert found is not None

    plan = streammerge.plan(recipe, memory=found[1])

    assert plan.memory.peak <= plan.memory.budget
    assert plan.memory.factors


class Stop(Exception):  # noqa: N818 - it is no error
    """Ends a merge from outside."""


@pytest.mark.parametrize("rounding", ["once", "peft"])
def test_an_interrupted_merge_is_resumed_to_the_same_bytes(
    job: Job, monkeypatch: pytest.MonkeyPatch, rounding: str
) -> None:
    recipe = job.recipe(job.adapter, job.adapter, parameters={"rounding": rounding})
    streammerge.merge(recipe, job.root / "whole")
    expected = (job.root / "whole" / "model.safetensors").read_bytes()
    write_at = outputfile.OutputFile.write_at
    written = []

    def stop(self: outputfile.OutputFile, *arguments: Any, **keywords: Any) -> None:
        written.append(arguments)
        if len(written) == 3:
            raise Stop
        write_at(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(outputfile.OutputFile, "write_at", stop)
        with pytest.raises(streammerge.StreamMergeError, match="Stop"):
            streammerge.merge(recipe, job.root / "out")
    streammerge.merge(recipe, job.root / "out", resume=True)

    assert (job.root / "out" / "model.safetensors").read_bytes() == expected


def test_an_adapter_with_another_scaling_makes_another_merge(job: Job) -> None:
    """Its tensors do not tell; what is complete with the old one is not what is asked for now."""
    recipe, out = job.recipe(job.adapter), job.root / "out"
    manifest = streammerge.merge(recipe, out)
    assert streammerge.merge(recipe, out, resume=True) == manifest
    config = json.loads((job.adapter / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (job.adapter / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(OutputExistsError, match="--overwrite"):
        streammerge.merge(recipe, out, resume=True)


def test_a_vocabulary_that_an_adapter_resized_is_taken_and_said(job: Job) -> None:
    rows = torch.randn(53, WIDTH)
    adapter = job.copy_of("resized", lambda held: held | {f"base_model.model.{TABLE}": rows})
    streammerge.merge(job.recipe(adapter), job.root / "out")

    merged = load_file(job.root / "out" / "model.safetensors")

    assert torch.equal(merged[TABLE], rows)
    assert json.loads((job.root / "out" / "config.json").read_text())["vocab_size"] == 53
