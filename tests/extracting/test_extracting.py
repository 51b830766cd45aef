"""An extracted adapter brings its base as near to the tuned model as its rank allows, and says how near."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Models, Tensors, load_model, recipe_of, write_adapter
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    T5Config,
)

import streammerge
from streammerge.cli.arguments import main
from streammerge.errors import (
    MemoryBudgetError,
    MissingTensorError,
    NonFiniteError,
    OutputExistsError,
    RecipeError,
    ShapeMismatchError,
)
from streammerge.extracting.factoring import factor, relative_error

SHAPES = {"layers.0.q.weight": (600, 700), "layers.0.up.weight": (40, 700), "norm.weight": (600,)}


def llama() -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
    )


def gpt2() -> PretrainedConfig:
    return GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64)


def tuned_pair(
    directory: Path, config: PretrainedConfig, change: Callable[[str, torch.Tensor], torch.Tensor]
) -> tuple[Path, Path]:
    """Write a model, and what becomes of it when every tensor is changed."""
    torch.manual_seed(1)
    model = (
        AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    ).from_config(config)
    model.save_pretrained(directory / "base")
    state = {name: change(name, tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    model.save_pretrained(directory / "tuned")
    return directory / "base", directory / "tuned"


def low_rank(rank: int) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Return a change of layers and final norms that an adapter of some rank can hold."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(name))
        if tensor.ndim == 2 and any(stack in name for stack in ("layers.", ".h.", "block.")):
            left, right = (
                torch.randn(size, rank, generator=generator) / 8 for size in tensor.shape
            )
            return tensor + left @ right.T
        return tensor * 1.25 if "norm" in name or ("ln_" in name and "weight" in name) else tensor

    return change


@pytest.mark.parametrize("config", [llama, gpt2])
def test_peft_gives_the_tuned_model_back(
    config: Callable[[], PretrainedConfig], tmp_path: Path
) -> None:
    base, tuned = tuned_pair(tmp_path, config(), low_rank(4))

    manifest = streammerge.extract(base, tuned, tmp_path / "out", rank=4)

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    merged = loaded.merge_and_unload().state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tuned).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-5)
    errors = [each.numbers for each in manifest.tensors.values() if each.numbers]
    assert errors
    assert all(error[0] < 1e-4 for error in errors)
    prompt = torch.arange(6).unsqueeze(0)
    assert torch.allclose(
        loaded(prompt).logits, AutoModelForCausalLM.from_pretrained(tuned)(prompt).logits, atol=1e-3
    )


def t5() -> PretrainedConfig:
    return T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=96)


def tied_llama() -> PretrainedConfig:
    config = llama()
    config.tie_word_embeddings = True
    return config


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("config", [tied_llama, gpt2, t5])
def test_embeddings_that_are_tied_stay_so(
    config: Callable[[], PretrainedConfig], tmp_path: Path
) -> None:
    """The adapter holds all names of the tensor: PEFT would change the one and not the other."""
    shrink = low_rank(4)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        words = ("embed_tokens", "wte", "shared", "lm_head", "relative_attention_bias")
        return tensor * 1.5 if any(word in name for word in words) else shrink(name, tensor)

    base, tuned = tuned_pair(tmp_path, config(), change)
    streammerge.extract(base, tuned, tmp_path / "out", rank=4)
    model = auto_class(config)
    expected = model.from_pretrained(tuned)
    loaded = PeftModel.from_pretrained(model.from_pretrained(base), tmp_path / "out")
    prompt = {"input_ids": torch.arange(6).unsqueeze(0)}
    if config is t5:
        prompt["decoder_input_ids"] = torch.arange(4).unsqueeze(0)
    logits = expected(**prompt).logits
    torch.testing.assert_close(loaded(**prompt).logits, logits, rtol=1e-3, atol=1e-4)
    if config is t5:
        return  # A table that both sides share is refused in adapters.
    streammerge.merge(recipe_of("task_arithmetic", base, [tmp_path / "out"]), tmp_path / "merged")
    merged = model.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(**prompt).logits, logits, rtol=1e-3, atol=1e-4)
    stored = load_model(tmp_path / "merged").keys()
    assert stored == load_model(tuned).keys()


def auto_class(config: Callable[[], PretrainedConfig]) -> Any:
    return AutoModelForSeq2SeqLM if config is t5 else AutoModelForCausalLM


def draw(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }


@pytest.fixture
def pair(models: Models) -> tuple[Path, Path]:
    return models.write(draw(1), "base"), models.write(draw(2), "tuned", shards=2)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_errors_are_what_is_missing_and_next_to_the_least(
    dtype: str, exact: object, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    manifest = streammerge.extract(*pair, out, rank=16, dtype=dtype, exact=bool(exact))

    factors = load_model(out)
    base, tuned = (load_model(path) for path in pair)
    for name in ("layers.0.q", "layers.0.up"):
        up, down = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
        assert up.dtype == down.dtype == getattr(torch, dtype)
        difference = tuned[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        missing = torch.dist(difference, up.double() @ down.double()) / difference.norm()
        (stated,) = manifest.tensors[f"base_model.model.{name}.lora_B.weight"].numbers
        assert stated == pytest.approx(float(missing), rel=1e-4)
        values = np.linalg.svd(difference.numpy(), compute_uv=False)
        least = np.sqrt((values[16:] ** 2).sum() / (values**2).sum())
        assert least * (1 - 1e-6) <= stated <= least * (1.01 if dtype == "float32" else 1.02)
        # Both factors have the same share of every singular value.
        torch.testing.assert_close(
            up.double().norm(dim=0), down.double().norm(dim=1), rtol=0.01, atol=0
        )
    assert torch.equal(factors["base_model.model.norm.weight"], tuned["norm.weight"])


def test_a_projection_finds_what_a_decomposition_finds() -> None:
    generator = torch.Generator().manual_seed(3)
    spectrum = torch.exp(-torch.arange(300) / 20.0)
    left = torch.linalg.qr(torch.randn(300, 300, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(500, 300, generator=generator))[0]
    matrix = (left * spectrum) @ right.T

    exact, projected = (factor(matrix, 20, exact=each, seed=5) for each in (True, False))

    torch.testing.assert_close(
        projected.up @ projected.down, exact.up @ exact.down, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(projected.up, exact.up, rtol=0, atol=1e-3)
    assert relative_error(matrix, projected.down, projected.up) == pytest.approx(
        float((spectrum[20:].double() ** 2).sum() / (spectrum.double() ** 2).sum()) ** 0.5, rel=1e-3
    )


def test_threads_change_no_byte(pair: tuple[Path, Path], tmp_path: Path) -> None:
    files = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        streammerge.extract(*pair, out, rank=8, workers=workers)
        files.append((out / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_new_thread_computes_as_one_that_has_computed(models: Models, tmp_path: Path) -> None:
    """Torch's number of threads is that of each thread, and decides in which order it adds."""
    shapes = [(600, 520), (520, 700), (130, 400), (40, 400)]
    made = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"{i}.weight": torch.randn(s, generator=generator) for i, s in enumerate(shapes)}
        made.append(models.write(tensors))
    files = []
    for workers in (1, len(shapes)):
        out = tmp_path / f"out{workers}"
        streammerge.extract(*made, out, rank=8, workers=workers)
        files.append((out / "adapter_model.safetensors").read_bytes())

    assert files[0] == files[1]


def test_the_adapter_merges_into_its_base_here(
    pair: tuple[Path, Path], models: Models, tmp_path: Path
) -> None:
    manifest = streammerge.extract(*pair, tmp_path / "out", rank=40, exact=True)
    recipe: dict[str, Any] = {"method": "task_arithmetic", "base": str(pair[0])}
    recipe |= {"sources": [{"path": str(tmp_path / "out")}], "output": {"dtype": "float32"}}

    merged, _ = models.merge(recipe)

    tuned = load_model(pair[1])
    base = load_model(pair[0])
    for name in ("layers.0.q", "layers.0.up"):
        (stated,) = manifest.tensors[f"base_model.model.{name}.lora_B.weight"].numbers
        difference = tuned[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        missing = torch.dist(merged[f"{name}.weight"].double(), tuned[f"{name}.weight"].double())
        assert float(missing / difference.norm()) == pytest.approx(stated, rel=1e-3, abs=1e-6)


def test_the_command_says_what_it_does(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["extract", *map(str, pair), str(tmp_path / "out"), "--rank", "8"]

    assert main([*arguments, "--modules", "*.q"]) == 0

    said = capsys.readouterr().err
    assert "1 matrices, of rank 8 x 1" in said
    assert "left out     1 that differ: layers.0.up.weight" in said
    document = json.loads((tmp_path / "out" / "streammerge_manifest.json").read_text())
    assert document["notes"] == [
        {"topic": "left out", "text": "layers.0.up.weight differs and is not extracted"}
    ]
    assert document["run"]["measured_memory"] <= document["run"]["projected_memory"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["modules_to_save"]) == (["q"], ["norm"])
    assert main(arguments) == 4
    assert main([*arguments, "--overwrite", "--quiet"]) == 0
    assert not streammerge.verify_files(tmp_path / "out").damages


def test_what_does_not_differ_is_not_extracted(models: Models, tmp_path: Path) -> None:
    base = draw(1)
    tuned = base | {"layers.0.up.weight": base["layers.0.up.weight"] * 2}

    streammerge.extract(models.write(base), models.write(tuned), tmp_path / "out", rank=4)

    assert sorted(load_model(tmp_path / "out")) == [
        "base_model.model.layers.0.up.lora_A.weight",
        "base_model.model.layers.0.up.lora_B.weight",
    ]


def test_names_that_differ_are_matched(models: Models, tmp_path: Path) -> None:
    tuned = {f"model.{name}": tensor for name, tensor in draw(2).items()}

    streammerge.extract(models.write(draw(1)), models.write(tuned), tmp_path / "out", rank=4)

    assert "base_model.model.layers.0.q.lora_A.weight" in load_model(tmp_path / "out")


def test_what_cannot_be_extracted_is_refused(
    pair: tuple[Path, Path], models: Models, tmp_path: Path
) -> None:
    base, tuned = pair
    out = tmp_path / "out"
    longer = draw(3) | {"layers.0.q.weight": torch.ones(601, 700)}
    nan = draw(3)
    nan["layers.0.q.weight"][3, 5] = float("nan")
    adapter = write_adapter(tmp_path / "lora", {"layers.0.q.weight": (600, 700)}, seed=1)
    for error, said, other, options in (
        (RecipeError, "has the very values of", base, {}),
        (RecipeError, "is an adapter already", adapter, {}),
        (
            ShapeMismatchError,
            r"is \[600, 700\] in the base and \[601, 700\]",
            models.write(longer),
            {},
        ),
        (
            MissingTensorError,
            "are in one of the models alone: extra",
            models.write(draw(3) | {"extra": torch.ones(3)}),
            {},
        ),
        (
            NonFiniteError,
            "layers.0.q.weight: the difference is nan at flat element 2105",
            models.write(nan),
            {},
        ),
        (RecipeError, "--modules allows", tuned, {"modules": ("*.none",)}),
        (
            RecipeError,
            "--dtype: expected float32 or float16 or bfloat16, got int8",
            tuned,
            {"dtype": "int8"},
        ),
        (RecipeError, "--rank: expected a whole number", tuned, {"rank": 0}),
        (MemoryBudgetError, "one matrix takes", tuned, {"memory": "260MiB", "exact": True}),
    ):
        with pytest.raises(error, match=said):
            streammerge.extract(base, other, out, **{"rank": 4} | options)
        assert not out.exists()
    with pytest.raises(RecipeError, match="is one file"):
        streammerge.extract(base, tuned, tmp_path / "out.safetensors", rank=4)
    streammerge.extract(base, tuned, out, rank=4)
    plans: list[object] = []
    with pytest.raises(OutputExistsError):
        streammerge.extract(base, tuned, out, rank=4, on_plan=plans.append)
    # Without a look at the values.
    assert not plans


def test_modules_with_others_inside_are_left_out(models: Models, tmp_path: Path) -> None:
    """A mixer's own parameters: saving it whole would save its matrices too, which change by factors."""
    shapes = {
        "layers.0.mixer.A_log": (8, 4),
        "layers.0.mixer.D": (8,),
        "layers.0.mixer.in_proj.weight": (16, 8),
        "layers.0.norm.weight": (8,),
    }
    base, tuned = (
        models.write({name: torch.randn(shape) for name, shape in shapes.items()}) for _ in range(2)
    )

    manifest = streammerge.extract(base, tuned, tmp_path / "out", rank=4)

    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["layers.0.norm"]
    said = [note.text for note in manifest.notes if note.topic == "left out"]
    assert [text.split()[0] for text in said] == ["layers.0.mixer.A_log", "layers.0.mixer.D"]


def test_a_pipeline_is_refused_with_its_parts(models: Models, tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        for part in ("unet", "vae"):
            models.write({"a.weight": torch.randn(3, 3)}, f"{name}/{part}")
        index = {part: ["diffusers", "X"] for part in ("unet", "vae")} | {"_class_name": "P"}
        (models.root / name / "model_index.json").write_text(json.dumps(index))

    with pytest.raises(RecipeError, match=r"has the parts unet and vae.* name one of their"):
        streammerge.extract(models.root / "base", models.root / "tuned", tmp_path / "o", rank=2)
