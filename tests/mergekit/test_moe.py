"""mergekit-moe's recipes give what it makes of them, and what is asked of no model's is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import VOCABULARY, llama, qwen2_tied, write_models_of
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

import streammerge
from streammerge.errors import RecipeError

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": llama,
    "mistral": lambda layers=4: MistralConfig(
        num_hidden_layers=layers, sliding_window=None, **SIZES
    ),
    "qwen2": qwen2_tied,
    "qwen3": lambda layers=4: Qwen3Config(num_hidden_layers=layers, **SIZES),
}
FORMS = {
    ("llama", False): "mixtral",
    ("mistral", False): "mixtral",
    ("qwen3", False): "qwen3_moe",
    ("qwen2", True): "qwen2_moe",
    ("llama", True): "qwen2_moe",
}
"""What becomes of which base, without and with an expert of every token."""


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """Return a function from an architecture to models of it that have a tokenizer."""
    known: dict[str, dict[str, Path]] = {}

    def make(kind: str) -> dict[str, Path]:
        if kind not in known:
            known[kind] = write_models_of(tmp_path_factory.mktemp(kind), CONFIGS[kind])
            for path in known[kind].values():
                write_tokenizer(path)
        return known[kind]

    return make


def write_tokenizer(directory: Path) -> None:
    letters = [chr(ord("a") + index) for index in range(26)]
    tokens = ["<s>", "</s>", "<unk>", *letters]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def recipe_for(paths: dict[str, Path], *, shared: bool) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "base_model": str(paths["a"]),
        "gate_mode": "cheap_embed",
        "dtype": "float32",
        "experts": [
            {
                "source_model": str(paths["b"]),
                "positive_prompts": ["a b c", "d"],
                "negative_prompts": ["x y"],
                "residual_scale": 0.5,
            },
            {"source_model": str(paths["c"]), "positive_prompts": ["k l m n"]},
            {"source_model": str(paths["a"]), "positive_prompts": ["q"]},
        ],
    }
    if shared:
        recipe["shared_experts"] = [
            {
                "source_model": str(paths["c"]),
                "positive_prompts": ["e f"],
                "residual_scale": 0.25,
            }
        ]
    return recipe


def run_mergekit_moe(recipe: dict[str, Any], out: Path) -> None:
    """Make the mixture as ``mergekit-moe`` does."""
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.options import MergeOptions
    from mergekit.scripts.moe import build

    options = MergeOptions(quiet=True, clone_tensors=True)
    build(MoEMergeConfig.model_validate(recipe), str(out), options)


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize(("kind", "shared"), FORMS)
def test_a_mixture_is_the_one_that_mergekit_makes(
    families: Callable[[str], dict[str, Path]], tmp_path: Path, kind: str, *, shared: bool
) -> None:
    paths = families(kind)
    recipe = recipe_for(paths, shared=shared)
    if (kind, shared) == ("llama", True):
        recipe["architecture"] = "qwen"
    config = tmp_path / "moe.yml"
    config.write_text(yaml.safe_dump(recipe))

    streammerge.merge(config, tmp_path / "ours", memory="4GiB")
    run_mergekit_moe(recipe, tmp_path / "theirs")

    ours, theirs = load(tmp_path / "ours"), load(tmp_path / "theirs")
    assert ours.config.model_type == FORMS[kind, shared]
    mine, its = ours.state_dict(), theirs.state_dict()
    if (kind, shared) == ("llama", True):
        # They give zeros to the biases that this base has not; here the configuration says so.
        its = {name: tensor for name, tensor in its.items() if not name.endswith("_proj.bias")}
    assert mine.keys() == its.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], its[name], rtol=1e-5, atol=1e-6, msg=name)
    tokens = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    said, meant = (AutoConfig.from_pretrained(tmp_path / each) for each in ("ours", "theirs"))
    differing = {
        key
        for key, value in meant.to_dict().items()
        if key != "_name_or_path" and said.to_dict().get(key) != value
    }
    assert differing <= {"qkv_bias"}


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_mixture_of_one_model_says_what_that_model_says(
    families: Callable[[str], dict[str, Path]], tmp_path: Path, kind: str, mode: str
) -> None:
    """Experts are averaged with weights that add up to 1, whatever the gates are."""
    model = families(kind)["b"]
    recipe = {
        "base_model": str(model),
        "gate_mode": mode,
        "experts": [{"source_model": str(model)}] * 4,
    }

    streammerge.merge(recipe, tmp_path / "out", memory="4GiB")

    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected, found = load(model)(tokens).logits, load(tmp_path / "out")(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gate_mode": "hidden"}, "gate_mode: hidden needs a forward pass"),
        ({"gate_mode": None}, "gate_mode: expected random or uniform_random or cheap_embed"),
        ({"gate_mode": "randm"}, 'did you mean "random"'),
        ({"experts": []}, "experts: expected a list with at least one entry"),
        ({"experts_per_token": 9}, "experts_per_token: a token cannot be given to 9 of 3 experts"),
        ({"experts_per_token": 0}, "experts_per_token: expected a whole number in [1, 1024]"),
        ({"architecture": "phi"}, "architecture: expected mixtral or qwen moe"),
        ({"architecture": "qwen3"}, "architecture: qwen3_moe is made of models of the type qwen3"),
        ({"architecture": "qwen"}, "shared_experts: qwen2_moe needs an expert of every token"),
        ({"dtyp": "float32"}, 'dtyp: unknown key; did you mean "dtype"'),
        ({"dtype": "int8"}, "dtype: expected float32"),
        ({"base_model": None}, "base_model: this key is required"),
        ({"base_model": "x+y"}, "base_model: a base with an adapter, y, gives no embeddings"),
    ],
)
def test_what_cannot_be_made_is_refused_by_its_key(
    families: Callable[[str], dict[str, Path]], change: dict[str, Any], said: str
) -> None:
    recipe = recipe_for(families("llama"), shared=False) | change

    with pytest.raises(RecipeError) as raised:
        streammerge.plan(recipe, memory="4GiB")

    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"noise_scale": 0.1}, "experts[1].noise_scale: experts are copied exactly here"),
        ({"residual_scale": "x"}, "experts[1].residual_scale: expected a number"),
        ({"positive_prompts": []}, "experts[1].positive_prompts: expected a list of texts"),
        ({"negative_prompts": "x"}, "experts[1].negative_prompts: expected a list of texts"),
        ({"source_model": None}, "experts[1].source_model: this key is required"),
        ({"model": "x"}, "experts[1].model"),
    ],
)
def test_what_an_expert_cannot_have_is_refused_by_its_key(
    families: Callable[[str], dict[str, Path]], change: dict[str, Any], said: str
) -> None:
    recipe = recipe_for(families("llama"), shared=False)
    recipe["experts"][1] |= change

    with pytest.raises(RecipeError) as raised:
        streammerge.plan(recipe, memory="4GiB")

    assert said in str(raised.value)


def test_experts_with_the_same_prompts_are_refused_and_idle_prompts_are_stated(
    families: Callable[[str], dict[str, Path]],
) -> None:
    recipe = recipe_for(families("llama"), shared=False)
    for expert in recipe["experts"]:
        expert["positive_prompts"], expert["negative_prompts"] = ["a"], []
    with pytest.raises(RecipeError, match="experts: all have the same prompts"):
        streammerge.plan(recipe, memory="4GiB")

    planned = streammerge.plan(recipe | {"gate_mode": "random"}, memory="4GiB")

    assert "experts[0]: prompts have no effect on gates that are random" in str(planned)


def test_a_mixture_converts_to_a_recipe_that_means_the_same(
    families: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    recipe = recipe_for(families("qwen2"), shared=True)
    plan = partial(streammerge.plan, memory="4GiB")
    config = tmp_path / "native.yaml"
    config.write_text(plan(recipe).recipe)

    assert plan(config).tasks == plan(recipe).tasks
    assert "merge_method" not in config.read_text()
