"""Small models of several architectures, as transformers writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

VOCABULARY = 96
"""Not a multiple of the hidden size, nor of the heads."""


def llama(layers: int = 4) -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )


def qwen2_tied(layers: int = 4) -> PretrainedConfig:
    return Qwen2Config(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )


def gpt2(layers: int = 4) -> PretrainedConfig:
    return GPT2Config(n_embd=32, n_layer=layers, n_head=4, vocab_size=VOCABULARY, n_positions=64)


def mixtral(layers: int = 4) -> PretrainedConfig:
    return MixtralConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )


def mamba(layers: int = 4) -> PretrainedConfig:
    return MambaConfig(
        hidden_size=32, num_hidden_layers=layers, vocab_size=VOCABULARY, state_size=8
    )


def bert(layers: int = 4) -> PretrainedConfig:
    return BertConfig(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )


ARCHITECTURES: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": llama,
    "qwen2": qwen2_tied,
    "gpt2": gpt2,
    "mixtral": mixtral,
    "mamba": mamba,
    "bert": bert,
}


def make_model(config: PretrainedConfig) -> PreTrainedModel:
    if isinstance(config, BertConfig):
        return BertForMaskedLM(config)
    return AutoModelForCausalLM.from_config(config)


def write_models(directory: Path, architecture: str) -> dict[str, Path]:
    """Write the models of an architecture."""
    return write_models_of(directory, ARCHITECTURES[architecture])


def write_models_of(directory: Path, make: Callable[..., PretrainedConfig]) -> dict[str, Path]:
    """Write a base ``a``, fine-tunes ``b`` and ``c`` of it, and ``deep``, with two layers more.

    What is tuned is a quarter as large as the base, and one tensor stays as it was.
    """
    torch.manual_seed(1)
    base = make_model(make())
    paths = {"a": directory / "a"}
    base.save_pretrained(paths["a"])
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    untouched = next(name for name in state if "norm" in name.lower() or "ln" in name)
    for seed, label in enumerate(("b", "c"), start=2):
        generator = torch.Generator().manual_seed(seed)
        tuned = {
            name: tensor + torch.randn(tensor.shape, generator=generator) * tensor.std() / 4
            if tensor.is_floating_point() and tensor.numel() > 1 and name != untouched
            else tensor
            for name, tensor in state.items()
        }
        model = make_model(make())
        model.load_state_dict(tuned)
        model.tie_weights()
        paths[label] = directory / label
        model.save_pretrained(paths[label])
    torch.manual_seed(9)
    paths["deep"] = directory / "deep"
    make_model(make(6)).save_pretrained(paths["deep"])
    return paths


def load_config(path: Path) -> PretrainedConfig:
    return AutoConfig.from_pretrained(path)
