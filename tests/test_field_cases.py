"""Inputs that people have, where modules that are right by themselves once met wrongly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from models import MEMORY, Models, Tensors, load_model, recipe_of, write_model
from safetensors.torch import load_file
from torch import Tensor

import streammerge
from streammerge.errors import RecipeError, ShapeMismatchError

WEIGHT = 0.5


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(model: transformers.PreTrainedModel, path: Path, *, seed: int) -> Path:
    """Fill a model with random numbers, save it, and return ``path``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    model.save_pretrained(path)
    return path


def with_copies(path: Path, copies: dict[str, str]) -> Path:
    """Store tensors of a saved model under further names, and return ``path``."""
    tensors = load_model(path)
    write_model(path, tensors | {new: tensors[old].clone() for new, old in copies.items()})
    return path


def parameters(model: torch.nn.Module) -> Tensors:
    return {name: value.detach() for name, value in model.named_parameters(remove_duplicate=False)}


def merged(recipe: object, out: Path) -> Path:
    streammerge.merge(recipe, out, memory=MEMORY)
    return out


def bart() -> transformers.BartForConditionalGeneration:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(
        vocab_size=40, d_model=8, max_position_embeddings=16, **sizes, **heads
    )
    return transformers.BartForConditionalGeneration(config)


def bert() -> transformers.BertForMaskedLM:
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return transformers.BertForMaskedLM(config)


@pytest.mark.parametrize(
    ("make", "head", "embedding"),
    [
        (bart, "lm_head.weight", "model.shared.weight"),
        (bert, "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ],
)
def test_what_one_key_unties_is_stored_under_all_its_names(
    tmp_path: Path, make: object, head: str, embedding: str
) -> None:
    base = saved(make(), tmp_path / "base", seed=1)
    source = saved(make(), tmp_path / "source", seed=2)
    cls = type(make())
    one, other = (parameters(cls.from_pretrained(path)) for path in (base, source))
    with_copies(source, {head: embedding})
    recipe = recipe_of(
        "task_arithmetic",
        base,
        [{"path": source, "weight": WEIGHT}],
        rules=[{"tensors": head, "copy": 0}],
    )
    out = merged(recipe, tmp_path / "out")
    model, found = cls.from_pretrained(out, output_loading_info=True)
    assert not {key: names for key, names in found.items() if names}
    expected = {name: one[name] + WEIGHT * (other[name] - one[name]) for name in one}
    expected[head] = other[head]
    for name, value in parameters(model).items():
        torch.testing.assert_close(value, expected[name])


def test_marks_of_scaled_files_go_with_the_scales(tmp_path: Path) -> None:
    codes, plain = random(8, 16, seed=1).to(torch.float8_e4m3fn), random(8, 16, seed=2)
    marks = {
        "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
        "a.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8),
    }
    scaled = {"a.weight": codes, "a.scale_weight": torch.tensor(3.0)}
    base = write_model(tmp_path / "base", scaled | marks)
    source = write_model(tmp_path / "source", {"a.weight": plain})
    for first, second in ((base, source), (source, base), (base, base)):
        recipe = recipe_of("task_arithmetic", first, [{"path": second, "weight": WEIGHT}])
        out = merged(
            recipe | {"output": {"dtype": "float32"}},
            tmp_path / f"out-{first.name}-{second.name}",
        )
        values = {base: 3.0 * codes.float(), source: plain}
        expected = values[first] + WEIGHT * (values[second] - values[first])
        assert list(load_model(out)) == ["a.weight"]
        torch.testing.assert_close(load_model(out)["a.weight"], expected)


def test_no_policy_is_recommended_that_cannot_help(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"ids": torch.arange(4), "w": random(4, seed=1)})
    source = write_model(tmp_path / "source", {"ids": torch.arange(5), "w": random(5, seed=1)})
    recipe = recipe_of("task_arithmetic", base, [source], mismatch="common")
    with pytest.raises(ShapeMismatchError, match=r'tensors: "ids", copy: base') as caught:
        streammerge.plan(recipe, memory=MEMORY)
    assert "mismatch: common" not in str(caught.value)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_checkpoint_wrapped_module"])
def test_wrappers_within_names_of_sources_are_seen_through(
    models: Models, tmp_path: Path, wrapper: str
) -> None:
    names = [f"model.layers.{layer}.{module}.weight" for layer in (0, 1) for module in ("q", "up")]
    one = {name: random(4, 4, seed=seed) for seed, name in enumerate(names)}
    other = {name: random(4, 4, seed=9 + seed) for seed, name in enumerate(names)}
    wrapped = {name.replace(".q.", f".{wrapper}.q."): value for name, value in other.items()}
    base, source = models.write(one), models.write(wrapped)
    recipe = recipe_of("task_arithmetic", base, [{"path": source, "weight": WEIGHT}])
    result, _ = models.merge(recipe)
    for name, value in result.items():
        torch.testing.assert_close(value, one[name] + WEIGHT * (other[name] - one[name]))
    assert sorted(result) == sorted(names)


def test_norms_of_old_names_in_the_base_are_those_of_new_names(models: Models) -> None:
    one = {"e.LayerNorm.gamma": random(4, seed=1), "e.LayerNorm.beta": random(4, seed=2)}
    other = {"e.LayerNorm.weight": random(4, seed=3), "e.LayerNorm.bias": random(4, seed=4)}
    recipe = recipe_of(
        "task_arithmetic", models.write(one), [{"path": models.write(other), "weight": 1.0}]
    )
    result, _ = models.merge(recipe)
    torch.testing.assert_close(result["e.LayerNorm.gamma"], other["e.LayerNorm.weight"])
    torch.testing.assert_close(result["e.LayerNorm.beta"], other["e.LayerNorm.bias"])


def llama(*, tied: bool) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


TIED, COPIED, APART = "tied", "tied, and stored twice", "apart"


@pytest.mark.parametrize("of_source", [TIED, COPIED, APART])
@pytest.mark.parametrize("of_base", [TIED, COPIED, APART])
@pytest.mark.parametrize("taken", [TIED, APART, "source"])
def test_a_configuration_from_elsewhere_is_told_how_embeddings_are_stored(
    tmp_path: Path, of_base: str, of_source: str, taken: str
) -> None:
    paths = {}
    for seed, (name, kind) in enumerate([("base", of_base), ("source", of_source)]):
        paths[name] = saved(llama(tied=kind != APART), tmp_path / name, seed=seed)
        if kind == COPIED:
            with_copies(paths[name], {"lm_head.weight": "model.embed_tokens.weight"})
    cls = transformers.LlamaForCausalLM
    one, other = (parameters(cls.from_pretrained(path)) for path in paths.values())
    if taken != "source":
        saved(llama(tied=taken == TIED), tmp_path / "other", seed=7)
    origin = 0 if taken == "source" else str(tmp_path / "other")
    recipe = recipe_of(
        "task_arithmetic",
        paths["base"],
        [{"path": paths["source"], "weight": WEIGHT}],
        output={"companions": {"config": origin}},
    )
    out = merged(recipe, tmp_path / "out")
    model, found = cls.from_pretrained(out, output_loading_info=True)
    assert not {key: names for key, names in found.items() if names}
    assert model.config.tie_word_embeddings == ("lm_head.weight" not in load_model(out))
    for name, value in parameters(model).items():
        torch.testing.assert_close(value, one[name] + WEIGHT * (other[name] - one[name]))


def test_a_configuration_from_a_source_of_codes_is_told_that_there_are_none(
    tmp_path: Path,
) -> None:
    base = saved(llama(tied=False), tmp_path / "base", seed=1)
    source = saved(llama(tied=False), tmp_path / "source", seed=2)
    tensors = load_model(source)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(1, 1)
    write_model(source, tensors)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(config))
    recipe = recipe_of("task_arithmetic", base, [source], output={"companions": {"config": 0}})
    out = merged(recipe, tmp_path / "out")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def pipeline(root: Path, value: float, *parts: str) -> Path:
    for part in parts:
        write_model(
            root / part / "diffusion_pytorch_model.safetensors", {"w": torch.full((4,), value)}
        )
        (root / part / "config.json").write_text('{"_class_name": "A"}')
    index = {"_class_name": "P", **{part: ["diffusers", "A"] for part in parts}}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def test_a_source_of_which_nothing_is_merged_is_refused(tmp_path: Path) -> None:
    """Without a base there is nothing that a part which one of them lacks could be taken from."""
    sources = [
        pipeline(tmp_path / "both", 1.0, "unet", "vae"),
        pipeline(tmp_path / "one", 3.0, "unet"),
        pipeline(tmp_path / "other", 5.0, "vae"),
    ]
    recipe = recipe_of("linear", None, sources)
    with pytest.raises(RecipeError, match=r"nothing of it would be in the result.* lacks unet"):
        streammerge.plan(recipe, memory=MEMORY)


def test_parts_are_merged_with_the_sources_that_have_them(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", 1.0, "unet", "vae")
    both = pipeline(tmp_path / "both", 3.0, "unet", "vae")
    unet = pipeline(tmp_path / "unet", 5.0, "unet")
    sources = [{"path": both, "weight": WEIGHT}, {"path": unet, "weight": WEIGHT}]
    out = merged(recipe_of("task_arithmetic", base, sources), tmp_path / "out")
    assert float(load_file(out / "unet" / "diffusion_pytorch_model.safetensors")["w"][0]) == 4.0
    assert float(load_file(out / "vae" / "diffusion_pytorch_model.safetensors")["w"][0]) == 2.0


def test_the_vocabulary_of_another_part_of_a_model_stays(tmp_path: Path) -> None:
    config = {
        "model_type": "x",
        "text_config": {"vocab_size": 4},
        "audio_config": {"vocab_size": 9},
    }
    paths = []
    for name, rows in (("base", 4), ("source", 6)):
        tensors = {
            "model.embed_tokens.weight": random(rows, 2, seed=rows),
            "lm_head.weight": random(rows, 2, seed=rows + 1),
        }
        paths.append(write_model(tmp_path / name, tensors))
        (paths[-1] / "config.json").write_text(json.dumps(config))
    out = merged(
        recipe_of("task_arithmetic", paths[0], paths[1:], mismatch="common"), tmp_path / "out"
    )
    written = json.loads((out / "config.json").read_text())
    assert written["text_config"]["vocab_size"] == 6
    assert written["audio_config"]["vocab_size"] == 9


def test_scales_per_row_of_stacks_are_read(tmp_path: Path) -> None:
    codes = random(3, 8, 16, seed=1).to(torch.float8_e4m3fn)
    scales = random(3, 8, seed=2).abs()
    stack = {"x.experts.gate_up_proj": codes, "x.experts.gate_up_proj_scale": scales}
    base = write_model(tmp_path / "base", {"x.experts.gate_up_proj": torch.zeros(3, 8, 16)})
    source = write_model(tmp_path / "source", stack)
    out = merged(recipe_of("task_arithmetic", base, [source]), tmp_path / "out")
    expected = codes.float() * scales[:, :, None]
    torch.testing.assert_close(load_model(out)["x.experts.gate_up_proj"], expected)


def test_a_rule_by_the_names_of_a_source_is_explained(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"model.a.weight": random(4, 4, seed=1)})
    source = write_model(tmp_path / "source", {"module.model.a.weight": random(4, 4, seed=2)})
    recipe = recipe_of(
        "task_arithmetic", base, [source], rules=[{"tensors": "module.*", "copy": "base"}]
    )
    with pytest.raises(RecipeError, match=r"model\.a\.weight") as caught:
        streammerge.plan(recipe, memory=MEMORY)
    assert "no tensor of any input" not in str(caught.value)


def test_the_plan_says_what_changes_in_the_configuration(tmp_path: Path) -> None:
    codes = {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(1)}
    quantization = {"quantization_config": {"quant_method": "fp8"}}
    base = write_model(tmp_path / "base", codes)
    source = write_model(tmp_path / "source", {"a.weight": torch.ones(4, 4)})
    for path, more in ((base, quantization), (source, {})):
        (path / "config.json").write_text(json.dumps({"model_type": "x"} | more))
    text = str(streammerge.plan(recipe_of("task_arithmetic", base, [source]), memory=MEMORY))
    assert "config.json: quantization_config left out" in text
    recipe = recipe_of("task_arithmetic", base, [source])
    manifest = streammerge.merge(recipe, tmp_path / "out", memory=MEMORY)
    assert "config.json: quantization_config left out" in [note.text for note in manifest.notes]
    assert "is taken" not in text
