"""Adapters that change one of two tied embeddings: the result computes what the adapter computed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import streammerge as sm
from streammerge.adapters.onto_base.tying import find_tie
from streammerge.checkpoint.reading import read_checkpoint
from streammerge.errors import UnsupportedAdapterError
from tests.adapters.onto_base.test_baking import bake_both
from tests.adapters.tiny import Tensors, gemma, llama, load_peft, make_lora

INNER, OUTER = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = torch.tensor([[1, 3, 5, 7, 9]])
Q = ["q_proj"]
PARTED: dict[str, dict[str, Any]] = {
    "input": {"target_modules": ["embed_tokens"]},
    "output": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved input": {"target_modules": Q, "modules_to_save": ["embed_tokens"]},
    "saved output": {"target_modules": Q, "modules_to_save": ["lm_head"]},
    "saved both": {"target_modules": Q, "modules_to_save": ["embed_tokens", "lm_head"]},
}
ALIKE: dict[str, dict[str, Any]] = {
    "tokens": {"target_modules": Q, "trainable_token_indices": [3, 5]},
    "ensured": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "ensured saved": {
        "target_modules": Q,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}


def tied_llama() -> PreTrainedModel:
    return llama(tie_word_embeddings=True)


def recipe(directory: Path, *sources: str, **parameters: Any) -> dict[str, Any]:
    return {
        "method": "task_arithmetic",
        "base": str(directory / "base"),
        "sources": [{"path": str(directory / name)} for name in sources],
        "parameters": parameters,
    }


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def save_base(directory: Path, make: Callable[[], PreTrainedModel] = tied_llama) -> None:
    make().save_pretrained(directory / "base")
    assert OUTER not in load_file(directory / "base" / "model.safetensors")


def merged(directory: Path) -> tuple[Tensors, bool, Tensor]:
    """Return the result's tensors, whether it says it is tied, and what it computes."""
    config = json.loads((directory / "out" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(directory / "out").eval()
    return (
        load_file(directory / "out" / "model.safetensors"),
        config["tie_word_embeddings"],
        logits(model),
    )


@pytest.mark.parametrize("case", [*PARTED, *ALIKE])
@pytest.mark.parametrize("make", [tied_llama, gemma])
def test_the_result_computes_what_the_adapter_computes(
    tmp_path: Path, make: Callable[[], PreTrainedModel], case: str
) -> None:
    save_base(tmp_path, make)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_lora(tmp_path / "a", make(), seed=1, r=2, **(PARTED | ALIKE)[case])
        expected = logits(load_peft(make(), tmp_path / "a"))
    sm.merge(recipe(tmp_path, "a"), tmp_path / "out")

    tensors, tied, got = merged(tmp_path)

    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert tied == (case in ALIKE)
    assert (OUTER in tensors) == (case in PARTED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*PARTED, *ALIKE])
def test_rounding_peft_keeps_the_tie_as_merge_and_unload_does(
    tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    options = {"r": 2} | (PARTED | ALIKE)[case]
    got, expected = bake_both(
        tmp_path, tied_llama, options, dtype=dtype, adapters=1, rounding="peft"
    )

    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("out", "expected")]
    assert configs[0]["tie_word_embeddings"] == configs[1]["tie_word_embeddings"]


def test_a_base_that_stores_both_gets_rows_of_tokens_once(tmp_path: Path) -> None:
    save_base(tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {OUTER: tensors[INNER].clone()}, path)
    make_lora(tmp_path / "a", tied_llama(), seed=1, r=2, **ALIKE["tokens"])
    sm.merge(recipe(tmp_path, "a"), tmp_path / "out")

    got, tied, _ = merged(tmp_path)

    assert OUTER not in got
    assert not torch.equal(got[INNER], tensors[INNER])
    assert tied


def test_a_model_and_an_adapter_that_unties_merge(tmp_path: Path) -> None:
    """The model's one tensor counts for both."""
    save_base(tmp_path)
    tuned = tied_llama()
    with torch.no_grad():
        tuned.model.embed_tokens.weight += 0.5
    tuned.save_pretrained(tmp_path / "tuned")
    make_lora(tmp_path / "a", tied_llama(), seed=1, r=2, **PARTED["output"])
    sm.merge(recipe(tmp_path, "a"), tmp_path / "alone")
    sm.merge(recipe(tmp_path, "a", "tuned"), tmp_path / "out")

    base = load_file(tmp_path / "base" / "model.safetensors")[INNER]
    alone = load_file(tmp_path / "alone" / "model.safetensors")
    got, _, _ = merged(tmp_path)

    torch.testing.assert_close(got[INNER], base + 0.5)
    torch.testing.assert_close(got[OUTER], alone[OUTER] + 0.5)


def test_an_adapter_that_keeps_the_tie_changes_both_where_another_unties(tmp_path: Path) -> None:
    save_base(tmp_path)
    make_lora(tmp_path / "a", tied_llama(), seed=1, r=2, **PARTED["output"])
    make_lora(tmp_path / "b", tied_llama(), seed=2, r=2, **ALIKE["tokens"])
    sm.merge(recipe(tmp_path, "a"), tmp_path / "alone")
    sm.merge(recipe(tmp_path, "a", "b"), tmp_path / "out")

    rows = load_file(tmp_path / "b" / "adapter_model.safetensors")
    (trained,) = (tensor for name, tensor in rows.items() if "token_adapter" in name)
    alone = load_file(tmp_path / "alone" / "model.safetensors")
    got, _, _ = merged(tmp_path)
    base = alone[INNER]

    torch.testing.assert_close(got[INNER][[3, 5]], trained)
    torch.testing.assert_close(got[OUTER][[3, 5]], alone[OUTER][[3, 5]] + trained - base[[3, 5]])


def test_the_plan_states_what_is_untied(tmp_path: Path) -> None:
    save_base(tmp_path)
    make_lora(tmp_path / "a", tied_llama(), seed=1, r=2, **PARTED["output"])

    text = str(sm.plan(recipe(tmp_path, "a")))

    assert f"{OUTER} (tied to {INNER} in some model, apart in the result)" in text


def test_a_tie_that_is_not_known_is_refused_when_an_embedding_changes(tmp_path: Path) -> None:
    save_base(tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"other.embed_tokens.weight": tensors[INNER].clone()}, path)
    make_lora(tmp_path / "a", tied_llama(), seed=1, r=2, **PARTED["input"])

    with pytest.raises(UnsupportedAdapterError, match="does not say tie_word_embeddings: false"):
        sm.plan(recipe(tmp_path, "a"))


@pytest.mark.parametrize(
    ("names", "config", "tie"),
    [
        # The usual case.
        ([INNER], {"architectures": ["LlamaForCausalLM"]}, (INNER, OUTER)),
        # The configuration counts for more than what is stored.
        ([INNER], {"tie_word_embeddings": False}, None),
        ([INNER, OUTER], {"tie_word_embeddings": True}, (INNER, OUTER)),
        # No output embedding.
        ([INNER], {"architectures": ["LlamaModel"], "tie_word_embeddings": True}, None),
        (["wte.weight"], {"architectures": ["GPT2LMHeadModel"]}, ("wte.weight", OUTER)),
        (
            ["language_model.model.embed_tokens.weight"],
            {"text_config": {"tie_word_embeddings": True}},
            ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        ),
        (
            ["model.language_model.embed_tokens.weight"],
            {},
            ("model.language_model.embed_tokens.weight", OUTER),
        ),
        (
            ["bert.embeddings.word_embeddings.weight"],
            {"architectures": ["BertForMaskedLM"]},
            ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ),
        # Nothing says that an output is missing.
        ([INNER, OUTER], None, None),
        ([INNER], None, (INNER, OUTER)),
    ],
)
def test_ties_are_known_by_configuration_and_names(
    tmp_path: Path, names: list[str], config: dict[str, Any] | None, tie: tuple[str, str] | None
) -> None:
    save_file({name: torch.zeros(4, 2) for name in names}, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))

    found = find_tie(read_checkpoint(tmp_path))

    assert (found and (found.inner, found.outer)) == tie


def test_the_configuration_of_the_text_model_is_untied_too(tmp_path: Path) -> None:
    save_base(tmp_path)
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    inner = LlamaConfig(tie_word_embeddings=True).to_dict()
    path.write_text(json.dumps(config | {"text_config": inner}))
    make_lora(tmp_path / "a", tied_llama(), seed=1, r=2, **PARTED["output"])
    sm.merge(recipe(tmp_path, "a"), tmp_path / "out")

    written = json.loads((tmp_path / "out" / "config.json").read_text())

    assert (written["tie_word_embeddings"], written["text_config"]["tie_word_embeddings"]) == (
        False,
        False,
    )
