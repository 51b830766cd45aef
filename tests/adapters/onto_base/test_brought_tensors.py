"""Tensors that adapters bring along whole, and change on top: embeddings above all."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MEMORY
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import streammerge as sm
from streammerge.errors import RecipeError, ShapeMismatchError
from tests.adapters.tiny import Tensors, llama, load_peft, make_lora, rewrite

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BOTH = {"r": 4, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}
TOKENS = torch.tensor([[1, 3, 5, 69, 9]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def merge(
    base: Path, sources: Sequence[Path], method: str = "task_arithmetic", **document: Any
) -> Tensors:
    recipe = {
        "method": method,
        "base": str(base),
        "sources": [{"path": str(path)} for path in sources],
    }
    out = base.parent / "out"
    sm.merge(recipe | document, out, memory=MEMORY, overwrite=True)
    return load_file(out / "model.safetensors")


def moved(tensors: Tensors, by: float) -> Tensors:
    """Return the adapter's tensors with other values in the embeddings that it brings along."""
    return {k: v + by if "base_layer.weight" in k else v for k, v in tensors.items()}


def in_peft(paths: Sequence[Path], *, dtype: torch.dtype, vocabulary: int = 64) -> Tensors:
    model = llama(dtype)
    logging.disable(logging.WARNING)
    try:
        model.resize_token_embeddings(vocabulary)
    finally:
        logging.disable(logging.NOTSET)
    names = [f"a{index}" for index in range(len(paths))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = load_peft(model, *paths)
        return tuned.merge_and_unload(adapter_names=names).state_dict()


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "ties"])
def test_norms_are_those_of_the_embedding_that_the_adapter_brings(
    method: str, base: Path, tmp_path: Path
) -> None:
    """DoRA divides by the norms of what the product is added to, which is not the base's."""
    adapter = make_lora(tmp_path / "a", llama(), seed=1, use_dora=True, **BOTH)
    rewrite(adapter, lambda tensors: moved(tensors, 0.7))
    expected = in_peft([adapter], dtype=torch.float32)

    got = merge(base, [adapter], method, parameters={"density": 1.0} if method == "ties" else {})

    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)


def test_the_embedding_of_the_last_adapter_counts_for_all_in_turn(
    base: Path, tmp_path: Path
) -> None:
    """PEFT loads all adapters before it merges the first."""
    paths = [
        rewrite(
            make_lora(tmp_path / name, llama(), seed=seed, **BOTH),
            lambda tensors, by=seed / 3: moved(tensors, by),
        )
        for seed, name in enumerate("ab", 1)
    ]
    llama(torch.bfloat16).save_pretrained(base)
    expected = in_peft(paths, dtype=torch.bfloat16)

    got = merge(base, paths, parameters={"rounding": "peft"})

    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture
def resized(tmp_path: Path) -> Path:
    """An adapter that was trained with six more tokens."""
    return make_lora(tmp_path / "resized", llama(vocab_size=70), seed=1, **BOTH)


@pytest.mark.parametrize("rounding", ["once", "peft"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_larger_vocabulary_is_the_results_and_loads(
    rounding: str, base: Path, tmp_path: Path, *, dora: bool
) -> None:
    adapter = make_lora(tmp_path / "a", llama(vocab_size=70), seed=1, use_dora=dora, **BOTH)
    expected = in_peft([adapter], dtype=torch.float32, vocabulary=70)

    got = merge(base, [adapter], parameters={"rounding": rounding})

    for name, tensor in got.items():
        if rounding == "once":
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)
        else:
            assert torch.equal(tensor, expected[name]), name
    config = json.loads((base.parent / "out" / "config.json").read_text())
    assert config["vocab_size"] == got[EMBEDDING].shape[0] == got[HEAD].shape[0] == 70
    loaded = AutoModelForCausalLM.from_pretrained(base.parent / "out").eval()
    with torch.inference_mode():
        assert loaded(TOKENS).logits.shape == (1, 5, 70)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "ties", "dare_ties"])
def test_a_larger_embedding_is_taken_beside_adapters_that_have_none(
    method: str, base: Path, resized: Path, tmp_path: Path
) -> None:
    other = make_lora(tmp_path / "b", llama(), seed=2, r=4, target_modules=["q_proj"])
    trims = method in ("ties", "dare_ties")

    alone = merge(base, [resized])
    got = merge(base, [resized, other], method, parameters={"density": 0.5} if trims else {})

    if method == "task_arithmetic":
        assert torch.equal(got[EMBEDDING], alone[EMBEDDING])
        assert torch.equal(got[HEAD], alone[HEAD])
    assert got[EMBEDDING].shape == (70, 32)
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(got[q_proj], alone[q_proj])


def message_of(base: Path, sources: Sequence[Path], error: type[Exception], **document: Any) -> str:
    with pytest.raises(error) as caught:
        merge(base, sources, **document)
    assert not (base.parent / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_two_larger_vocabularies_of_different_sizes_are_refused(
    method: str, base: Path, resized: Path, tmp_path: Path
) -> None:
    other = make_lora(tmp_path / "b", llama(vocab_size=72), seed=2, **BOTH)

    message = message_of(base, [resized, other], ShapeMismatchError, method=method)

    assert "[70, 32]" in message
    assert str(resized) in message


def test_a_tensor_that_an_adapter_brings_and_changes_is_not_copied_without_the_change(
    base: Path, resized: Path
) -> None:
    rules = [{"tensors": HEAD, "copy": 0}]

    message = message_of(base, [resized], RecipeError, rules=rules)

    assert all(word in message for word in (HEAD, "sources[0]", str(resized), "changes it"))


def test_a_tensor_that_an_adapter_only_brings_is_copied(base: Path, tmp_path: Path) -> None:
    adapter = make_lora(
        tmp_path / "a", llama(), seed=1, r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    saved: Tensor = load_file(adapter / "adapter_model.safetensors")[
        "base_model.model.lm_head.weight"
    ]

    rules = [{"tensors": HEAD, "copy": 0}]
    got = merge(base, [adapter], "ties", parameters={"density": 0.5}, rules=rules)

    assert torch.equal(got[HEAD], saved)
