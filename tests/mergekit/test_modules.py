"""Modules with parameters of their own give what mergekit makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import load_model
from test_recipes import MakeModels, check_alike, merge, run_mergekit
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from streammerge.errors import RecipeError

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}


def t5() -> PreTrainedModel:
    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_decoder_layers=4,
        num_heads=4,
        vocab_size=96,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5ForConditionalGeneration(config)


def mistral3() -> PreTrainedModel:
    """Return a model that sees, whose vision tower has layers too."""
    text = SIZES | {"model_type": "mistral", "num_key_value_heads": 2, "vocab_size": 96}
    # So small that its layers are none among those of the text.
    vision = SIZES | {"model_type": "pixtral", "image_size": 28, "patch_size": 14}
    vision |= {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2}
    config = Mistral3Config(
        text_config=text | {"num_hidden_layers": 20},
        vision_config=vision | {"num_hidden_layers": 4},
    )
    return Mistral3ForConditionalGeneration(config)


def bart() -> PreTrainedModel:
    """Return a model of an architecture that mergekit has no table for."""
    sizes = {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")}
    config = BartConfig(
        vocab_size=96,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        max_position_embeddings=64,
        **sizes,
    )
    return BartForConditionalGeneration(config)


MAKERS: dict[str, Callable[[], PreTrainedModel]] = {"t5": t5, "mistral3": mistral3, "bart": bart}
MODULES = {
    "t5": ("shared", "encoder", "decoder"),
    "mistral3": ("text_decoder", "vision_tower", "multi_modal_projector"),
    "bart": ("default", "model.encoder.layers", "model.decoder.layers"),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    known: dict[str, dict[str, Path]] = {}

    def make(architecture: str) -> dict[str, Path]:
        if architecture not in known:
            directory = tmp_path_factory.mktemp(architecture)
            known[architecture] = {}
            for seed, label in enumerate("abc"):
                torch.manual_seed(seed)
                known[architecture][label] = directory / label
                MAKERS[architecture]().save_pretrained(directory / label)
        return known[architecture]

    return make


PAIR = "models: [{{model: {b}{first}}}, {{model: {c}{second}}}]"
DIVIDED = {
    "task_arithmetic, a weight for each module": (
        "merge_method: task_arithmetic\nbase_model: {a}\nmodules:\n"
        "  {m[0]}: {{models: [{{model: {b}}}, {{model: {c}}}], parameters: {{weight: 0.3}}}}\n"
        "  {m[1]}: {{models: [{{model: {b}}}, {{model: {c}}}], parameters: {{weight: 0.9}}}}\n"
        "  {m[2]}: {{models: [{{model: {b}}}, {{model: {c}}}], parameters: {{weight: 0.6}}}}\n"
    ),
    "ties, of every level": (
        "merge_method: ties\nbase_model: {a}\nparameters: {{density: 0.4, weight: 0.7}}\nmodules:\n"
        "  {m[0]}:\n    models:\n    - {{model: {a}}}\n    - {{model: {b}, parameters: {{weight: 0.2}}}}\n"
        "    - {{model: {c}, parameters: {{density: [0.3, 0.8]}}}}\n    parameters: {{lambda: 0.8}}\n"
        "  {m[1]}:\n    models:\n    - {{model: {b}}}\n    - {{model: {c}, parameters: {{weight: 0.1}}}}\n"
        "    parameters: {{density: 0.9, normalize: false}}\n"
        "  {m[2]}: {{models: [{{model: {b}}}, {{model: {c}}}]}}\n"
    ),
    "slerp, gradients and filters": (
        "merge_method: slerp\nbase_model: {a}\nparameters: {{t: 0.5}}\nmodules:\n"
        "  {m[0]}: {{models: [{{model: {a}}}, {{model: {b}}}], parameters: {{t: [0, 1]}}}}\n"
        "  {m[1]}:\n    models: [{{model: {b}}}]\n    parameters:\n"
        "      t: [{{filter: norm, value: 0.9}}, {{filter: k_proj, value: [1, 0.2, 0.4]}}]\n"
        "  {m[2]}: {{models: [{{model: {a}}}, {{model: {b}}}], parameters: {{t: [0.8, 0.1]}}}}\n"
    ),
    "linear, the base merged too": (
        "merge_method: linear\nbase_model: {a}\nparameters: {{weight: 1}}\nmodules:\n"
        "  {m[0]}: {{models: [{{model: {b}, parameters: {{weight: 3}}}}]}}\n"
        "  {m[1]}: {{models: [{{model: {b}}}, {{model: {a}, parameters: {{weight: 0}}}}]}}\n"
        "  {m[2]}: {{models: [{{model: {b}}}], parameters: {{weight: 2, normalize: false}}}}\n"
    ),
    "nuslerp, switches of two levels": (
        "merge_method: nuslerp\nparameters: {{weight: 1, nuslerp_row_wise: true}}\nmodules:\n"
        "  {m[0]}: {{models: [{{model: {b}}}, {{model: {c}}}]}}\n"
        "  {m[1]}: {{models: [{{model: {b}}}, {{model: {c}}}], parameters: {{nuslerp_flatten: false}}}}\n"
        "  {m[2]}:\n    models: [{{model: {b}}}, {{model: {c}}}]\n"
        "    parameters: {{nuslerp_flatten: false, nuslerp_row_wise: false, weight: 2}}\n"
    ),
    "slerp, one gradient for all": (
        "merge_method: slerp\nbase_model: {a}\nparameters: {{t: [0.1, 0.9]}}\nmodules:\n"
        "  {m[0]}: {{models: [{{model: {b}}}]}}\n  {m[1]}: {{models: [{{model: {b}}}]}}\n"
        "  {m[2]}: {{models: [{{model: {b}}}]}}\n"
    ),
    "all alike": (
        "merge_method: linear\nmodules:\n"
        "  {m[0]}: {{models: [{{model: {b}, parameters: {{weight: 1}}}}, {{model: {c}, parameters: {{weight: 2}}}}]}}\n"
        "  {m[1]}: {{models: [{{model: {b}, parameters: {{weight: 1}}}}, {{model: {c}, parameters: {{weight: 2}}}}]}}\n"
        "  {m[2]}: {{models: [{{model: {b}, parameters: {{weight: 1}}}}, {{model: {c}, parameters: {{weight: 2}}}}]}}\n"
    ),
}


@pytest.mark.parametrize("name", DIVIDED)
@pytest.mark.parametrize("architecture", MAKERS)
def test_modules_have_parameters_of_their_own(
    architecture: str, name: str, parts: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    text = DIVIDED[name].format(m=MODULES[architecture], **parts(architecture))

    theirs = run_mergekit(text, tmp_path / "theirs")
    ours, _ = merge(text, tmp_path)

    check_alike(ours, theirs)


WHOLE = {
    "models": (
        "merge_method: ties\nbase_model: {a}\nparameters: {{weight: 0.5, density: 0.9}}\nmodules:\n"
        "  default:\n    models: [{{model: {b}, parameters: {{weight: 0.9}}}}, {{model: {c}}}]\n"
        "    parameters: {{density: [{{filter: mlp, value: [0.2, 0.5]}}], weight: [0.1, 0.6]}}\n"
    ),
    "slices": (
        "merge_method: slerp\nbase_model: {a}\nparameters: {{t: 0.5}}\nmodules:\n  default:\n"
        "    parameters: {{t: [{{filter: mlp, value: 0.9}}]}}\n    slices:\n    - sources:\n"
        "      - {{model: {a}, layer_range: [0, 2]}}\n      - {{model: {b}, layer_range: [0, 2]}}\n"
        "    - base_model: {b}\n      sources:\n      - {{model: {b}, layer_range: [2, 4]}}\n"
        "      - {{model: {c}, layer_range: [1, 3]}}\n      parameters: {{t: {{filter: attn, value: 0.1}}}}\n"
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_the_only_module_is_the_model(name: str, made: MakeModels, tmp_path: Path) -> None:
    text = WHOLE[name].format(**made("llama"))

    theirs = run_mergekit(text, tmp_path / "theirs")
    ours, _ = merge(text, tmp_path)

    check_alike(ours, theirs)


def test_a_rule_says_the_same_in_float64(
    parts: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    paths = parts("mistral3")
    text = DIVIDED["task_arithmetic, a weight for each module"]

    merged, _ = merge(text.format(m=MODULES["mistral3"], **paths) + "dtype: float64\n", tmp_path)

    a, b, c = (load_model(paths[each]) for each in "abc")
    weights = {"vision_tower.": 0.9, "multi_modal_projector.": 0.6, "": 0.3}
    for name, tensor in merged.items():
        weight = next(each for begin, each in weights.items() if name.startswith(begin))
        base, first, second = (each[name].double() for each in (a, b, c))
        expected = base + weight * (first - base) + weight * (second - base)
        torch.testing.assert_close(tensor, expected, rtol=1e-13, atol=1e-13)


def test_a_module_that_no_tensor_is_named_after_is_refused(
    made: MakeModels, tmp_path: Path
) -> None:
    text = DIVIDED["task_arithmetic, a weight for each module"]

    with pytest.raises(
        RecipeError, match=r'modules\.multi_modal_projector: "multi_modal_projector\.\*" matches no'
    ):
        merge(text.format(m=MODULES["mistral3"], **made("llama")), tmp_path)
