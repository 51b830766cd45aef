"""A rule that copies what the configuration does not describe: the result loads, or is refused.

transformers is the oracle: a result loads without a tensor that is missing, unexpected or of another shape.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapters import tiny
from models import MEMORY, recipe_of, write_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlavaConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import streammerge
from streammerge.errors import RecipeError
from streammerge.plan.types import MergePlan

BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
}


def save(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def seeded(kind: Any, config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return kind(config)


def merge(
    tmp_path: Path, base: Path, source: Path, rules: list[dict[str, Any]], **more: Any
) -> Path:
    recipe = recipe_of("task_arithmetic", base, [source], rules=rules, **more)
    streammerge.merge(recipe, tmp_path / "out", memory=MEMORY)
    return tmp_path / "out"


def plan_text(base: Path, source: Path, rules: list[dict[str, Any]]) -> str:
    planned = streammerge.plan(
        recipe_of("task_arithmetic", base, [source], rules=rules), memory=MEMORY
    )
    assert isinstance(planned, MergePlan)
    return str(planned)


def load(kind: Any, path: Path) -> Any:
    """Load a model, and fail if a tensor is missing, unexpected or of another shape."""
    model, info = kind.from_pretrained(path, output_loading_info=True)
    problems = {name: found for name, found in info.items() if found}
    assert not problems, problems
    return model.eval()


def test_labels_come_with_the_head_that_has_them(tmp_path: Path) -> None:
    names = {0: "no", 1: "maybe", 2: "yes"}
    base = seeded(BertForSequenceClassification, BertConfig(**BERT))
    source = seeded(BertForSequenceClassification, BertConfig(**BERT, id2label=names), 1)
    paths = [save(base, tmp_path / "base"), save(source, tmp_path / "source")]
    rules = [{"tensors": "classifier.*", "copy": 0}]

    assert "id2label = " in plan_text(*paths, rules)
    out = merge(tmp_path, *paths, rules)

    loaded = load(BertForSequenceClassification, out)
    assert loaded.config.num_labels == 3
    assert loaded.config.id2label == names
    assert loaded.config.label2id == {"no": 0, "maybe": 1, "yes": 2}
    torch.testing.assert_close(loaded.classifier.weight, source.classifier.weight)
    tokens = torch.arange(6)[None]
    # A weight of 1 is the source, and so is the head.
    torch.testing.assert_close(loaded(tokens).logits, source.eval()(tokens).logits)


def test_layers_are_counted(tmp_path: Path) -> None:
    base, source = tiny.llama(), tiny.llama(num_hidden_layers=3)
    paths = [save(base, tmp_path / "base"), save(source, tmp_path / "source")]
    rules = [{"tensors": "model.layers.2.*", "copy": 0}]

    out = merge(tmp_path, *paths, rules)

    loaded = load(AutoModelForCausalLM, out)
    assert loaded.config.num_hidden_layers == 3
    tokens = torch.arange(6)[None]
    torch.testing.assert_close(loaded(tokens).logits, source(tokens).logits)


def test_layers_that_a_rule_drops_are_counted_too(tmp_path: Path) -> None:
    paths = [save(tiny.llama(), tmp_path / name) for name in ("base", "source")]

    out = merge(tmp_path, *paths, [{"tensors": "model.layers.1.*", "drop": True}])

    assert load(AutoModelForCausalLM, out).config.num_hidden_layers == 1


def qwen3(layers: int, types: list[str]) -> Any:
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=types,
        use_sliding_window=True,
        sliding_window=4,
    )
    return seeded(Qwen3ForCausalLM, config)


def test_what_is_listed_for_each_layer_comes_with_it(tmp_path: Path) -> None:
    full, sliding = "full_attention", "sliding_attention"
    base = save(qwen3(2, [full, sliding]), tmp_path / "base")
    source = save(qwen3(3, [full, sliding, full]), tmp_path / "source")

    out = merge(tmp_path, base, source, [{"tensors": "model.layers.2.*", "copy": 0}])

    loaded = load(Qwen3ForCausalLM, out)
    assert loaded.config.layer_types == [full, sliding, full]


def test_a_layer_of_which_nobody_says_what_it_is_is_refused(tmp_path: Path) -> None:
    full, sliding = "full_attention", "sliding_attention"
    base = save(qwen3(2, [full, sliding]), tmp_path / "base")
    source = save(qwen3(3, [sliding, full, full]), tmp_path / "source")

    with pytest.raises(RecipeError, match="layer_types lists what each layer is"):
        merge(tmp_path, base, source, [{"tensors": "model.layers.2.*", "copy": 0}])


def test_a_layer_missing_in_between_is_refused(tmp_path: Path) -> None:
    paths = [save(tiny.llama(), tmp_path / name) for name in ("base", "source")]

    with pytest.raises(RecipeError, match=r"model\.layers would have layers up to 1 without 0"):
        merge(tmp_path, *paths, [{"tensors": "model.layers.0.*", "drop": True}])
    assert not (tmp_path / "out").exists()


def test_encoder_and_decoder_have_their_own_counts(tmp_path: Path) -> None:
    def t5(encoder: int, decoder: int) -> Any:
        config = T5Config(
            vocab_size=32,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=encoder,
            num_decoder_layers=decoder,
            num_heads=2,
        )
        return seeded(T5ForConditionalGeneration, config)

    base, source = save(t5(2, 2), tmp_path / "base"), save(t5(2, 3), tmp_path / "source")

    out = merge(tmp_path, base, source, [{"tensors": "decoder.block.2.*", "copy": 0}])

    loaded = load(T5ForConditionalGeneration, out)
    assert (loaded.config.num_layers, loaded.config.num_decoder_layers) == (2, 3)


def test_channels_follow_the_first_convolution(tmp_path: Path) -> None:
    def vit(channels: int) -> Any:
        config = ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            num_channels=channels,
        )
        return seeded(ViTForImageClassification, config)

    base, source = save(vit(3), tmp_path / "base"), save(vit(4), tmp_path / "source")

    out = merge(tmp_path, base, source, [{"tensors": "*projection.weight", "copy": 0}])

    assert load(ViTForImageClassification, out).config.num_channels == 4


def test_a_diffusers_unet_gets_the_channels_of_an_inpainting_model(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="a development extra")

    def unet(channels: int) -> Path:
        torch.manual_seed(0)
        model = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=channels,
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        )
        return save(model, tmp_path / f"unet-{channels}")

    out = merge(tmp_path, unet(4), unet(9), [{"tensors": "conv_in.weight", "copy": 0}])

    _, info = diffusers.UNet2DModel.from_pretrained(
        out, output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(info.values()), info
    assert json.loads((out / "config.json").read_text())["in_channels"] == 9


def test_a_head_that_comes_along_makes_the_model_one_of_its_kind(tmp_path: Path) -> None:
    base = save(seeded(BertForPreTraining, BertConfig(**BERT)), tmp_path / "base")
    source = seeded(BertForSequenceClassification, BertConfig(**BERT, num_labels=3), 1)
    path = save(source, tmp_path / "source")
    rules = [{"tensors": "classifier.*", "copy": 0}, {"tensors": "cls.*", "drop": True}]

    out = merge(tmp_path, base, path, rules)

    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    loaded = load(BertForSequenceClassification, out)
    assert loaded.config.num_labels == 3
    tokens = torch.arange(6)[None]
    torch.testing.assert_close(loaded(tokens).logits, source.eval()(tokens).logits)


def test_a_head_beside_another_one_is_refused_with_the_rule_that_helps(tmp_path: Path) -> None:
    base = save(seeded(BertForPreTraining, BertConfig(**BERT)), tmp_path / "base")
    path = save(seeded(BertForSequenceClassification, BertConfig(**BERT), 1), tmp_path / "source")
    rules = [{"tensors": "classifier.*", "copy": 0}]
    recipe = recipe_of("task_arithmetic", base, [path], rules=rules, missing="base")

    with pytest.raises(RecipeError) as caught:
        streammerge.plan(recipe, memory=MEMORY)

    said = str(caught.value)
    assert "classifier.bias, classifier.weight" in said or "classifier.weight" in said
    assert "BertForPreTraining of base has no such tensor" in said
    assert "cls." in said
    assert "drop: true" in said


def test_an_embedding_without_its_head_is_refused(tmp_path: Path) -> None:
    base = save(tiny.llama(tie_word_embeddings=False), tmp_path / "base")
    source = save(tiny.llama(tie_word_embeddings=False, vocab_size=70), tmp_path / "source")
    rules = [
        {"tensors": "model.embed_tokens.weight", "copy": 0},
        {"tensors": "lm_head.weight", "copy": "base"},
    ]

    with pytest.raises(RecipeError, match=r"embed_tokens\.weight would have 70 rows and lm_head"):
        merge(tmp_path, base, source, rules)

    rules[1]["copy"] = 0
    out = merge(tmp_path, base, source, rules)
    assert load(AutoModelForCausalLM, out).config.vocab_size == 70


def test_a_shape_that_no_key_describes_is_refused(tmp_path: Path) -> None:
    base = save(seeded(BertModel, BertConfig(**BERT)), tmp_path / "base")
    source = save(
        seeded(BertModel, BertConfig(**BERT, max_position_embeddings=600)), tmp_path / "source"
    )
    rules = [{"tensors": "*position_embeddings.weight", "copy": 0}]

    with pytest.raises(RecipeError, match=r"\[600, 16\], \[512, 16\] in base, and no key"):
        merge(tmp_path, base, source, rules)

    more = {"output": {"companions": {"config": 0}}}
    out = merge(tmp_path, base, source, rules, **more)
    assert load(BertModel, out).config.max_position_embeddings == 600


def test_merges_that_copy_nothing_else_change_no_key(tmp_path: Path) -> None:
    base = save(seeded(BertForMaskedLM, BertConfig(**BERT)), tmp_path / "base")
    source = save(seeded(BertForMaskedLM, BertConfig(**BERT), 1), tmp_path / "source")

    out = merge(tmp_path, base, source, [{"tensors": "*bias", "copy": 0}])

    before = json.loads((base / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == before


def test_the_layers_of_the_text_are_not_those_of_the_pictures(tmp_path: Path) -> None:
    def llava(layers: int) -> Any:
        config = LlavaConfig(
            text_config=LlamaConfig(
                vocab_size=40,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=layers,
                num_attention_heads=2,
            ).to_dict(),
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
            },
        )
        return seeded(transformers.LlavaForConditionalGeneration, config)

    base, source = save(llava(2), tmp_path / "base"), save(llava(3), tmp_path / "source")

    out = merge(tmp_path, base, source, [{"tensors": "*language_model*.layers.2.*", "copy": 0}])

    loaded = load(transformers.LlavaForConditionalGeneration, out)
    assert loaded.config.text_config.num_hidden_layers == 3
    assert loaded.config.vision_config.num_hidden_layers == 2


def test_the_class_of_a_source_is_taken_with_its_configuration(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=4,
    )
    base = save(seeded(transformers.LlamaForCausalLM, config), tmp_path / "base")
    source = save(seeded(LlamaForSequenceClassification, config, 1), tmp_path / "source")
    rules = [{"tensors": "score.weight", "copy": 0}, {"tensors": "lm_head.weight", "drop": True}]

    out = merge(tmp_path, base, source, rules)

    loaded = load(LlamaForSequenceClassification, out)
    assert loaded.config.num_labels == 4


# Configurations that are taken from a source have to describe the whole result.


def taken(tmp_path: Path, base: Any, source: Any, rules: list[dict[str, Any]]) -> Path:
    paths = [save(base, tmp_path / "base"), save(source, tmp_path / "source")]
    return merge(tmp_path, *paths, rules, output={"companions": {"config": 0}})


def test_the_vocabulary_of_a_configuration_from_elsewhere_follows_the_embedding(
    tmp_path: Path,
) -> None:
    options = {"tie_word_embeddings": False}
    rules = [
        {"tensors": "model.embed_tokens.weight", "copy": "base"},
        {"tensors": "lm_head.weight", "copy": "base"},
    ]

    out = taken(tmp_path, tiny.llama(**options), tiny.llama(vocab_size=70, **options), rules)

    assert load(AutoModelForCausalLM, out).config.vocab_size == 64


def test_layers_of_a_configuration_from_elsewhere_are_those_of_the_result(tmp_path: Path) -> None:
    rules = [{"tensors": "model.layers.2.*", "drop": True}]

    out = taken(tmp_path, tiny.llama(), tiny.llama(num_hidden_layers=3, rope_theta=77.0), rules)

    config = load(AutoModelForCausalLM, out).config
    assert (config.num_hidden_layers, config.rope_parameters["rope_theta"]) == (2, 77.0)


@pytest.mark.parametrize("base_tied", [True, False])
def test_a_configuration_that_ties_otherwise_is_told(
    base_tied: bool,  # noqa: FBT001 - a parameter of the test
    tmp_path: Path,
) -> None:
    base = tiny.llama(tie_word_embeddings=base_tied)
    source = tiny.llama(tie_word_embeddings=not base_tied)
    rules = [{"tensors": "lm_head.weight", "drop" if base_tied else "copy": base_tied or "base"}]

    out = taken(tmp_path, base, source, rules)

    assert load(AutoModelForCausalLM, out).config.tie_word_embeddings == base_tied


def test_a_configuration_of_more_tensors_is_refused(tmp_path: Path) -> None:
    base = seeded(BertModel, BertConfig(**BERT), 0)
    source = seeded(BertForSequenceClassification, BertConfig(**BERT), 1)
    paths = [save(base, tmp_path / "base"), save(source, tmp_path / "source")]
    tensors = dict(source.bert.state_dict())
    tensors |= {f"classifier.{name}": t for name, t in source.classifier.state_dict().items()}
    write_model(paths[1], tensors)
    rules = [{"tensors": "classifier.*", "drop": True}]

    with pytest.raises(RecipeError, match=r"describes classifier\..* which the result lacks"):
        merge(tmp_path, *paths, rules, output={"companions": {"config": 0}})


def test_an_adapter_that_brings_another_number_of_labels_is_described(tmp_path: Path) -> None:
    model = tiny.bert()
    base = save(model, tmp_path / "base")
    wider = seeded(
        BertForSequenceClassification, BertConfig(**model.config.to_diff_dict() | {"num_labels": 5})
    )
    adapter = tiny.make_lora(
        tmp_path / "lora",
        wider,
        seed=1,
        r=2,
        target_modules=["query"],
        modules_to_save=["classifier"],
    )

    streammerge.merge(
        recipe_of("task_arithmetic", base, [adapter]), tmp_path / "out", memory=MEMORY
    )

    assert load(BertForSequenceClassification, tmp_path / "out").config.num_labels == 5


def test_a_layer_that_the_configuration_does_not_count_may_be_dropped(tmp_path: Path) -> None:
    """DeepSeek's layer 61 predicts further tokens; num_hidden_layers is 61."""
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    tensors = {f"model.layers.{number}.weight": torch.ones(2) for number in range(3)}
    for name in ("base", "source"):
        write_model(tmp_path / name, tensors)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    rules = [{"tensors": "model.layers.2.*", "drop": True}]

    out = merge(tmp_path, tmp_path / "base", tmp_path / "source", rules)

    assert json.loads((out / "config.json").read_text()) == config


def test_layers_that_no_key_counts_are_refused_if_they_are_copied(tmp_path: Path) -> None:
    for name, count in (("base", 2), ("source", 3)):
        tensors = {f"model.steps.{number}.weight": torch.ones(2) for number in range(count)}
        write_model(tmp_path / name, tensors)
        (tmp_path / name / "config.json").write_text('{"model_type": "mine", "steps": 2}')
    rules = [{"tensors": "model.steps.2.*", "copy": 0}]

    with pytest.raises(
        RecipeError, match=r"layers in model\.steps changes from 2 to 3, and no known key"
    ):
        merge(tmp_path, tmp_path / "base", tmp_path / "source", rules)
