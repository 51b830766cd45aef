"""Tied weights of full models: what is one tensor is merged once, stored once, and stays one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import streammerge as sm
from streammerge.errors import CheckpointError
from tests.old_transformers import compute_with_old_transformers

TOKENS = torch.tensor([[1, 3, 5, 7, 9]])
INNER, OUTER = "model.embed_tokens.weight", "lm_head.weight"


def llama(**config: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, **heads, **{"tie_word_embeddings": True, **config})
    )


def t5(**config: Any) -> PreTrainedModel:
    sizes = {
        "vocab_size": 40,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
    }
    return T5ForConditionalGeneration(T5Config(**sizes, **config))


def bart() -> PreTrainedModel:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "vocab_size": 40}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32}
    return BartForConditionalGeneration(BartConfig(**layers, **heads, **sizes))


def whisper() -> PreTrainedModel:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "vocab_size": 40}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0}
    sizes = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 4}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
    lengths = {"max_source_positions": 8, "max_target_positions": 8}
    return WhisperForConditionalGeneration(
        WhisperConfig(**layers, **heads, **sizes, **tokens, **lengths)
    )


def bert() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2, vocab_size=40))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    )


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], str, tuple[str, ...]]] = {
    "llama": (llama, INNER, (OUTER,)),
    "gpt2": (gpt2, "transformer.wte.weight", (OUTER,)),
    "t5": (
        t5,
        "shared.weight",
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", OUTER),
    ),
    "bart": (
        bart,
        "model.shared.weight",
        ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", OUTER),
    ),
    "whisper": (whisper, "model.decoder.embed_tokens.weight", ("proj_out.weight",)),
    "bert": (bert, "bert.embeddings.word_embeddings.weight", ("cls.predictions.decoder.weight",)),
}


def made(build: Callable[[], PreTrainedModel], path: Path, seed: int) -> PreTrainedModel:
    """Save a model whose weights are all random, and return it."""
    torch.manual_seed(seed)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(path)
    return model


def store_twice(path: Path, inner: str, others: tuple[str, ...]) -> None:
    """Store a tied tensor under its other names too, as old files and many trainers do."""
    tensors = load_file(path / "model.safetensors")
    twins = {name: tensors[inner].clone() for name in others}
    save_file(tensors | twins, path / "model.safetensors", metadata={"format": "pt"})


def computed(path: Path) -> Tensor:
    """Return the logits of a model as a user loads it, with nothing missing or left over."""
    config = json.loads((path / "config.json").read_text())
    import transformers  # the class by its name

    model, found = getattr(transformers, config["architectures"][0]).from_pretrained(
        path, output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return logits(model)


def logits(model: PreTrainedModel) -> Tensor:
    model.eval()
    inputs: dict[str, Any] = {"input_ids": TOKENS}
    if model.config.model_type == "whisper":
        features = torch.linspace(-1, 1, 4 * 16).reshape(1, 4, 16)
        inputs = {"input_features": features, "decoder_input_ids": TOKENS}
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS
    with torch.inference_mode():
        return model(**inputs).logits


def recipe(directory: Path, method: str = "task_arithmetic", **more: Any) -> dict[str, Any]:
    return {
        "method": method,
        "base": str(directory / "base"),
        "sources": [{"path": str(directory / name)} for name in ("one", "two")],
        **more,
    }


def merged_in_memory(
    base: PreTrainedModel, sources: list[PreTrainedModel], weight: float
) -> PreTrainedModel:
    """Return task arithmetic on parameters, each of which is in memory once."""
    tuned = [dict(source.named_parameters()) for source in sources]
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.add_(weight * sum(each[name] - parameter for each in tuned))
    return base


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("redundant", [("base",), ("one",), ("base", "one", "two")])
def test_a_tied_tensor_is_merged_once_wherever_it_is_stored_twice(
    kind: str, redundant: tuple[str, ...], tmp_path: Path
) -> None:
    build, inner, others = MODELS[kind]
    base, *sources = (
        made(build, tmp_path / name, seed) for seed, name in enumerate(("base", "one", "two"))
    )
    for name in redundant:
        store_twice(tmp_path / name, inner, others)

    sm.merge(recipe(tmp_path, parameters={"weight": 0.5}, missing="base"), tmp_path / "out")

    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert not stored.keys() & {*others}
    expected = logits(merged_in_memory(base, sources, 0.5))
    torch.testing.assert_close(computed(tmp_path / "out"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("dare_linear", {"density": 0.5, "weight": 0.7}),
        ("ties", {"density": 0.4, "scope": "model"}),
        ("linear", {}),
    ],
)
def test_copies_of_a_tied_tensor_change_no_mask_and_no_threshold(
    method: str, parameters: dict[str, Any], tmp_path: Path
) -> None:
    for seed, name in enumerate(("base", "one", "two")):
        made(llama, tmp_path / name, seed)
    asked = recipe(tmp_path, method, parameters=parameters, seed=5)
    sm.merge(asked, tmp_path / "once")
    for name in ("base", "two"):
        store_twice(tmp_path / name, INNER, (OUTER,))
    manifest = sm.merge(asked, tmp_path / "twice")

    once = (tmp_path / "once" / "model.safetensors").read_bytes()
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == once
    assert [(note.topic, note.text) for note in manifest.notes if note.topic == "tied"] == [
        ("tied", f"{INNER} is {OUTER} too, in every model; stored once")
    ]
    assert f"{INNER} is {OUTER} too" in str(sm.plan(asked))


def test_a_model_that_is_not_tied_parts_the_others(tmp_path: Path) -> None:
    """A tied model's one tensor counts for both of the untied one's."""
    base = made(llama, tmp_path / "base", 0)
    one = made(lambda: llama(tie_word_embeddings=False), tmp_path / "one", 1)
    two = made(llama, tmp_path / "two", 2)
    sm.merge(recipe(tmp_path, "linear"), tmp_path / "out")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    result = llama(tie_word_embeddings=False)
    tuned = [dict(each.named_parameters(remove_duplicate=False)) for each in (one, two)]
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            parameter.copy_(sum(each[name] for each in tuned) / 2)
    torch.testing.assert_close(computed(tmp_path / "out"), logits(result), rtol=1e-4, atol=1e-5)
    text = str(sm.plan(recipe(tmp_path, "linear")))
    assert f"{OUTER} (tied to {INNER} in some model, apart in the result)" in text
    assert not torch.equal(logits(base), logits(result))


@pytest.mark.parametrize("rule", [{"copy": 0}, {"copy": "base"}, {"weight": 0.1}])
def test_a_rule_for_one_of_two_names_parts_them(rule: dict[str, Any], tmp_path: Path) -> None:
    models = [
        made(llama, tmp_path / name, seed) for seed, name in enumerate(("base", "one", "two"))
    ]
    store_twice(tmp_path / "one", INNER, (OUTER,))
    rules = [{"tensors": OUTER, **rule}]
    sm.merge(recipe(tmp_path, rules=rules, parameters={"weight": 0.5}), tmp_path / "out")

    stored = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    base, one, two = (each.get_input_embeddings().weight.detach() for each in models)
    weight = rule.get("weight")
    merged = {w: base + w * ((one - base) + (two - base)) for w in (0.5, 0.1)}
    expected = merged[weight] if weight else {0: one, "base": base}[rule["copy"]]
    torch.testing.assert_close(stored[OUTER], expected)
    torch.testing.assert_close(stored[INNER], merged[0.5])
    assert config["tie_word_embeddings"] is False


def test_the_same_rule_for_both_names_keeps_them_one(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "one", "two")):
        made(llama, tmp_path / name, seed)
    store_twice(tmp_path / "one", INNER, (OUTER,))
    rules = [{"tensors": name, "copy": "base"} for name in (INNER, OUTER)]
    sm.merge(recipe(tmp_path, rules=rules), tmp_path / "out")

    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert OUTER not in stored
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert torch.equal(stored[INNER], base[INNER])


def test_copies_that_differ_are_refused_until_the_user_says_which_counts(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "one", "two")):
        made(llama, tmp_path / name, seed)
    store_twice(tmp_path / "two", INNER, (OUTER,))
    path = tmp_path / "two" / "model.safetensors"
    tensors = load_file(path)
    tensors[OUTER].view(-1)[77] += 1
    save_file(tensors, path, metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match="differ from flat element 77 on") as refused:
        sm.merge(recipe(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    assert "sources[1]" in str(refused.value)

    # What the message says helps.
    rules = [{"tensors": OUTER, "drop": True}]
    sm.merge(recipe(tmp_path, rules=rules), tmp_path / "dropped")
    assert OUTER not in load_file(tmp_path / "dropped" / "model.safetensors")
    config = tmp_path / "two" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    sm.merge(recipe(tmp_path), tmp_path / "apart")
    assert OUTER in load_file(tmp_path / "apart" / "model.safetensors")


def test_a_model_of_the_t5_family_cannot_say_that_its_head_is_apart(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "one", "two")):
        made(t5, tmp_path / name, seed)
    store_twice(tmp_path / "one", "shared.weight", (OUTER,))

    with pytest.raises(CheckpointError, match="leaves out a factor before the head"):
        sm.plan(recipe(tmp_path, rules=[{"tensors": OUTER, "copy": 0}]))


def test_the_tables_of_an_untied_t5_stay_one(tmp_path: Path) -> None:
    _, inner, others = MODELS["t5"]
    tables, head = others[:2], others[2]
    for seed, name in enumerate(("base", "one", "two")):
        made(t5, tmp_path / name, seed)
        path = tmp_path / name / "model.safetensors"
        tensors = load_file(path)
        tensors[head] = torch.randn_like(tensors[inner])
        save_file(tensors, path, metadata={"format": "pt"})
        config = tmp_path / name / "config.json"
        config.write_text(
            json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False})
        )
    store_twice(tmp_path / "base", inner, tables)
    sm.merge(recipe(tmp_path), tmp_path / "out")

    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert head in stored
    assert not stored.keys() & {*tables}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_older_transformers_compute_the_same(
    kind: str, tmp_path: Path, old_transformers: Path
) -> None:
    build, inner, others = MODELS[kind]
    for seed, name in enumerate(("base", "one", "two")):
        made(build, tmp_path / name, seed)
    store_twice(tmp_path / "base", inner, others)
    sm.merge(recipe(tmp_path, parameters={"weight": 0.5}, missing="base"), tmp_path / "out")

    old = compute_with_old_transformers(old_transformers, tmp_path / "out")
    torch.testing.assert_close(old, computed(tmp_path / "out"), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_older_transformers_see_what_was_parted(tmp_path: Path, old_transformers: Path) -> None:
    made(llama, tmp_path / "base", 0)
    made(lambda: llama(tie_word_embeddings=False), tmp_path / "one", 1)
    made(llama, tmp_path / "two", 2)
    sm.merge(recipe(tmp_path), tmp_path / "out")

    old = compute_with_old_transformers(old_transformers, tmp_path / "out")
    torch.testing.assert_close(old, computed(tmp_path / "out"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("origin", [0, 1])
def test_the_configuration_of_a_source_says_what_is_stored(origin: int, tmp_path: Path) -> None:
    """Its own model may be tied otherwise than the result."""
    made(llama, tmp_path / "base", 0)
    made(llama, tmp_path / "one", 1)
    made(lambda: llama(tie_word_embeddings=False), tmp_path / "two", 2)
    rules = [{"tensors": OUTER, "drop": True}] if origin == 0 else []
    output = {"companions": {"config": origin}}
    sm.merge(recipe(tmp_path, rules=rules, output=output), tmp_path / "out")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert config["tie_word_embeddings"] is (OUTER not in stored)


@pytest.mark.parametrize("knows", ["says so", "has both", "nothing"])
def test_a_result_says_that_embeddings_are_one_where_its_first_model_leaves_it_open(
    knows: str, tmp_path: Path
) -> None:
    """What a missing key means depends on the version of transformers and on the kind of model."""
    for seed, name in enumerate("ab"):
        made(llama, tmp_path / name, seed)
        config = json.loads((tmp_path / name / "config.json").read_text())
        if name == "a" or knows != "says so":
            del config["tie_word_embeddings"]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    if knows == "has both":
        config["tie_word_embeddings"] = True
        (tmp_path / "b" / "config.json").write_text(json.dumps(config))
        file = tmp_path / "b" / "model.safetensors"
        tensors = load_file(file)
        save_file(tensors | {OUTER: tensors[INNER].clone()}, file, metadata={"format": "pt"})
    recipe = {"method": "linear", "sources": [{"path": str(tmp_path / name)} for name in "ab"]}

    sm.merge(recipe, tmp_path / "out", memory="4GiB")

    said = json.loads((tmp_path / "out" / "config.json").read_text()).get("tie_word_embeddings")
    assert said is (None if knows == "nothing" else True)
    assert OUTER not in load_file(tmp_path / "out" / "model.safetensors")
    if said:
        loaded, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not info["missing_keys"]
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
