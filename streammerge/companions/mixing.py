"""What ``config.json`` says of a mixture of experts, made from that of the model which gives all else.

Where the base's configuration leaves a key out, its class has a default, and that of the mixture may have
another one: such keys are written down.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from streammerge.checkpoint.types import JsonChange
from streammerge.companions.described import Described, Shapes
from streammerge.errors import RecipeError
from streammerge.recipe.types import Mixture, MixtureForm

_CLASSES = MappingProxyType(
    {
        MixtureForm.MIXTRAL: "MixtralForCausalLM",
        MixtureForm.QWEN2_MOE: "Qwen2MoeForCausalLM",
        MixtureForm.QWEN3_MOE: "Qwen3MoeForCausalLM",
        MixtureForm.DEEPSEEK: "DeepseekForCausalLM",
    }
)
_NORM = ("rms_norm_eps", 1e-6)
_DEFAULTS: Mapping[str, tuple[tuple[str, object], ...]] = MappingProxyType(
    {
        "llama": (_NORM, ("max_position_embeddings", 2048)),
        "mistral": (
            _NORM,
            ("max_position_embeddings", 131072),
            ("num_key_value_heads", 8),
            ("sliding_window", 4096),
        ),
        "qwen2": (_NORM, ("max_position_embeddings", 32768), ("num_key_value_heads", 32)),
        "qwen3": (
            _NORM,
            ("max_position_embeddings", 32768),
            ("num_key_value_heads", 32),
            ("head_dim", 128),
        ),
    }
)
"""Defaults of the classes of configurations in transformers that are not those of every form."""
_ROPE_THETA = 10000.0
"""That of all of them, and not that of Mixtral."""
_DEEPSEEK_CODE = MappingProxyType(
    {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    }
)
_DEEPSEEK_HOME = "deepseek-ai/deepseek-moe-16b-base"
"""Whose repository has the code of the class, which transformers has not."""


def fit_mixture(
    own: Described, mixture: Mixture, n_sources: int, result: Shapes, *, is_first: bool
) -> Iterator[JsonChange]:
    """Yield what the base's configuration has to say of the mixture.

    Args:
        own: The model whose configuration the output has.
        mixture: What it becomes; settled.
        n_sources: The experts, with that of every token.
        result: The tensors of the output.
        is_first: Whether that model is the base.

    Raises:
        RecipeError: It is another model's.
    """
    form = mixture.form
    assert form is not None  # noqa: S101 - it is settled
    if not is_first:
        raise RecipeError(
            f"output.companions: the configuration of a mixture is made from that of the base, and {own.label} "
            "is another model; leave config out"
        )
    count = n_sources - (mixture.shared is not None)
    why = f"{count} experts become {form}"
    said = {
        "architectures": [_CLASSES[form]],
        "model_type": form.value,
        "num_experts_per_tok": mixture.experts_per_token,
        **_missing(own),
        **_of_form(form, own, mixture, count, result),
    }
    for key, value in said.items():
        if key not in own.config or own.config[key] != value:
            yield JsonChange("", key, json.dumps(value), why)


def _missing(own: Described) -> dict[str, object]:
    """Return what the base's class takes for granted."""
    kind = str(own.config.get("model_type"))
    found = {key: value for key, value in _DEFAULTS[kind] if key not in own.config}
    if kind == "llama" and own.config.get("num_key_value_heads") is None:
        found["num_key_value_heads"] = own.config.get("num_attention_heads")
    if "rope_theta" not in own.config and "rope_parameters" not in own.config:
        found["rope_theta"] = _ROPE_THETA
    return found


def _of_form(
    form: MixtureForm, own: Described, mixture: Mixture, count: int, result: Shapes
) -> dict[str, object]:
    size = own.config.get("intermediate_size")
    if form is MixtureForm.MIXTRAL:
        return {"num_local_experts": count}
    if form is MixtureForm.DEEPSEEK:
        return {
            "n_routed_experts": count,
            "n_shared_experts": None if mixture.shared is None else 1,
            "first_k_dense_replace": 0,
            "moe_layer_freq": 1,
            "scoring_func": "softmax",
            "norm_topk_prob": True,
            "moe_intermediate_size": size,
            "auto_map": {key: f"{_DEEPSEEK_HOME}--{code}" for key, code in _DEEPSEEK_CODE.items()},
        }
    said: dict[str, object] = {
        "num_experts": count,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "moe_intermediate_size": size,
    }
    if form is MixtureForm.QWEN2_MOE:
        said["shared_expert_intermediate_size"] = size
        said["qkv_bias"] = any(name.endswith(".q_proj.bias") for name in result)
        if own.config.get("model_type") != "qwen2":
            said["use_sliding_window"] = False
    return said
