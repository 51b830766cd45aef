"""Small models and adapters for tests, made with PEFT and transformers, offline.

make_lora(tmp_path / "a", llama(), seed=1, r=4, target_modules=["q_proj"])
model = load_peft(llama(), tmp_path / "a")
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

Tensors = dict[str, Tensor]


_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """Return a two-layer Llama with the same weights every time."""
    torch.manual_seed(0)
    options = _SMALL | {"intermediate_size": 48, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**options | changes)).to(dtype).eval()


def gemma() -> Gemma3ForCausalLM:
    """Return a Gemma, whose configuration takes tied embeddings for granted."""
    torch.manual_seed(0)
    options = _SMALL | {"intermediate_size": 48, "head_dim": 8, "initializer_range": 0.2}
    return Gemma3ForCausalLM(Gemma3TextConfig(**options)).eval()


def gpt2() -> GPT2LMHeadModel:
    """Return a GPT-2, whose linear layers are stored transposed."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config).eval()


def bert() -> BertForSequenceClassification:
    """Return a BERT with a classification head and biases everywhere."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def mixtral(**changes: Any) -> MixtralForCausalLM:
    """Return a Mixtral, whose experts are stacked parameters and are stored one by one."""
    torch.manual_seed(0)
    options = _SMALL | {"intermediate_size": 48, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**options | changes)).eval()


def qwen_moe(**changes: Any) -> Qwen3MoeForCausalLM:
    """Return a Qwen3 with experts, which are stored one by one under today's names."""
    torch.manual_seed(0)
    options = _SMALL | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**options | changes)).eval()


def gpt_oss(**changes: Any) -> GptOssForCausalLM:
    """Return a gpt-oss, whose experts are stacked, transposed, and square in one projection."""
    torch.manual_seed(0)
    options = _SMALL | {"intermediate_size": 32, "num_local_experts": 4, "head_dim": 8}
    model = GptOssForCausalLM(GptOssConfig(**options | changes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


class ConvNet(nn.Module):
    """Convolutions of one and two dimensions, 1x1 and larger, an embedding and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 6)
        self.conv1d = nn.Conv1d(6, 8, 3, padding=1)
        self.conv2d = nn.Conv2d(8, 10, 3, padding=1)
        self.point = nn.Conv2d(10, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.conv1d(self.embed(tokens).transpose(1, 2))
        plane = self.point(torch.relu(self.conv2d(rows.unsqueeze(-1))))
        return self.head(plane.mean(dim=(2, 3)))


def convnet() -> ConvNet:
    """Return the net with the same weights every time."""
    torch.manual_seed(0)
    return ConvNet().eval()


def make_lora(path: Path, model: nn.Module, *, seed: int, **config: Any) -> Path:
    """Save a LoRA with random factors for the model, and return ``path``."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, LoraConfig(**{"init_lora_weights": False} | config))
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                nn.init.normal_(parameter, std=0.3)
            if "lora_B" in name and name.endswith("bias"):
                nn.init.normal_(parameter)
        tuned.save_pretrained(path)
    return path


def make_ia3(path: Path, model: nn.Module, *, seed: int, **config: Any) -> Path:
    """Save an IA3 adapter with random vectors, and return ``path``."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, IA3Config(**config))
        for name, parameter in tuned.named_parameters():
            if "ia3_l" in name:
                nn.init.normal_(parameter, mean=1.0, std=0.3)
        tuned.save_pretrained(path)
    return path


def load_peft(model: nn.Module, *paths: Path) -> PeftModel:
    """Load adapters as ``a0``, ``a1``, … onto the model; missing or unexpected keys are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing.*keys.*")
        tuned = PeftModel.from_pretrained(model, paths[0], adapter_name="a0")
        for index, path in enumerate(paths[1:], 1):
            result = tuned.load_adapter(path, adapter_name=f"a{index}")
            assert not result.unexpected_keys
    return tuned.eval()


def combine_in_peft(
    build: Callable[[], nn.Module],
    paths: Sequence[Path],
    weights: Sequence[float],
    combination_type: str,
    **options: Any,
) -> PeftModel:
    """Return a model whose active adapter ``merged`` PEFT combined."""
    tuned = load_peft(build(), *paths)
    names = [f"a{index}" for index in range(len(paths))]
    tuned.add_weighted_adapter(
        names, list(weights), "merged", combination_type=combination_type, **options
    )
    tuned.set_adapter("merged")
    return tuned


def read_tensors(path: Path) -> Tensors:
    """Return the tensors of a PEFT directory."""
    return load_file(path / "adapter_model.safetensors")


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a PEFT directory."""
    return json.loads((path / "adapter_config.json").read_text())


def rewrite(
    path: Path,
    tensors: Callable[[Tensors], Mapping[str, Tensor]] | None = None,
    **config: Any,
) -> Path:
    """Change tensors and keys of the configuration of an adapter in place, and return ``path``."""
    if tensors is not None:
        changed = {k: v.clone().contiguous() for k, v in tensors(read_tensors(path)).items()}
        save_file(changed, path / "adapter_model.safetensors", {"format": "pt"})
    document = read_config(path) | config
    (path / "adapter_config.json").write_text(json.dumps(document))
    return path


def deltas(model: PeftModel, adapter: str) -> Tensors:
    """Return what an adapter adds to each weight, as PEFT computes it."""
    found = {}
    for name, module in model.named_modules():
        held = getattr(module, "lora_A", {}), getattr(module, "lora_embedding_A", {})
        if any(adapter in table for table in held):
            found[name.removeprefix("base_model.model.")] = module.get_delta_weight(
                adapter
            ).detach()
    return found
