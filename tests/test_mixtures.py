"""Mixtures of experts: each tensor is somebody's, gates are drawn or given, and nothing is guessed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import MEMORY, Models, assert_same_bits, load_model, write_adapter
from safetensors.torch import save_file

import streammerge
from streammerge.checkpoint.bytesource import PreadSource
from streammerge.checkpoint.types import MadeFile, MadeKind
from streammerge.dtypes import DType
from streammerge.engine.making import make_numbers
from streammerge.errors import (
    CheckpointError,
    MissingTensorError,
    RecipeError,
    StreamMergeError,
)
from streammerge.plan.codec import dump_plan, parse_plan
from streammerge.together import merge_together

LAYERS, HIDDEN, INNER, ROWS = 2, 24, 40, 30
NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": ROWS,
}


def llama(seed: int, dtype: torch.dtype = torch.bfloat16, inner: int = INNER) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{each}_proj.weight": (HIDDEN, HIDDEN) for each in "qkvo"}
        shapes |= {f"{prefix}mlp.{each}_proj.weight": (inner, HIDDEN) for each in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, inner)
        shapes[f"{prefix}input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (ROWS, HIDDEN)}
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


@pytest.fixture
def paths(models: Models) -> list[Path]:
    """A base and two others, whose type is another one."""
    return [
        write_llama(models, "base", llama(0)),
        write_llama(models, "one", llama(1)),
        write_llama(models, "other", llama(2, torch.float16)),
    ]


def write_llama(models: Models, name: str, tensors: Mapping[str, Any], **config: Any) -> Path:
    path = models.write(tensors, name)
    (path / "config.json").write_text(json.dumps(LLAMA | config))
    return path


def mixture_of(paths: list[Path], **keys: Any) -> dict[str, Any]:
    return {
        "method": "passthrough",
        "base": str(paths[0]),
        "sources": [{"path": str(path)} for path in paths[1:]],
        "mixture": {"gates": "random"} | keys,
    }


def expected_of(paths: list[Path], dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """What a mixture has but for its gates."""
    expected = {
        name: tensor for name, tensor in load_model(paths[0]).items() if ".mlp." not in name
    }
    for expert, path in enumerate(paths[1:]):
        tensors = load_model(path)
        for layer in range(LAYERS):
            for old, new in NAMES.items():
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{new}.weight"
                expected[name] = tensors[f"model.layers.{layer}.mlp.{old}.weight"].to(dtype)
    return expected


def router(layer: int) -> str:
    return f"model.layers.{layer}.block_sparse_moe.gate.weight"


def test_every_tensor_is_that_of_the_base_or_of_one_expert(
    models: Models, paths: list[Path]
) -> None:
    merged, manifest = models.merge(mixture_of(paths))

    expected = expected_of(paths)
    assert merged.keys() == expected.keys() | {router(layer) for layer in range(LAYERS)}
    for name, tensor in expected.items():
        assert_same_bits(merged[name], tensor, name)
    for layer in range(LAYERS):
        assert merged[router(layer)].shape == (2, HIDDEN)
        assert merged[router(layer)].dtype == torch.bfloat16
    assert any("the gate vectors are drawn" in note.text for note in manifest.notes)


def test_configuration_says_what_the_class_of_the_base_takes_for_granted(
    models: Models, paths: list[Path]
) -> None:
    out = models.new_output()
    streammerge.merge(mixture_of(paths, experts_per_token=1), out, memory=MEMORY)

    config = json.loads((out / "config.json").read_text())

    assert config["model_type"] == "mixtral"
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (2, 1)
    # Mixtral's own defaults are 1e6, 1e-5 and 8.
    assert (config["rope_theta"], config["rms_norm_eps"]) == (10000.0, 1e-6)
    assert config["num_key_value_heads"] == 4


@pytest.mark.parametrize("cut", ["memory", "workers", "mmap", "resumed"])
def test_however_the_work_is_cut_the_bytes_are_the_same(
    models: Models, paths: list[Path], monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    recipe = mixture_of(paths) | {"seed": 7}
    usual, _ = models.merge(recipe)
    out = models.new_output()
    if cut == "resumed":
        with monkeypatch.context() as patched:
            stop_after_some_reads(patched)
            with pytest.raises(CheckpointError, match="the disk is gone"):
                streammerge.merge(recipe, out, memory=MEMORY)
        streammerge.merge(recipe, out, memory=MEMORY, resume=True)
    elif cut == "mmap":
        streammerge.merge(recipe, out, memory=MEMORY, byte_source="mmap")
    else:
        streammerge.merge(recipe, out, memory="3GiB", workers=1 if cut == "workers" else 2)

    found = load_model(out)
    assert found.keys() == usual.keys()
    for name, tensor in usual.items():
        assert_same_bits(found[name], tensor, name)


def stop_after_some_reads(patched: pytest.MonkeyPatch) -> None:
    read, left = PreadSource.read_into, [2]

    def failing(self: PreadSource, offset: int, buffer: memoryview) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise CheckpointError("the disk is gone")
        read(self, offset, buffer)

    patched.setattr(PreadSource, "read_into", failing)


def test_drawn_gates_depend_on_the_seed_and_differ_between_layers(
    models: Models, paths: list[Path]
) -> None:
    one, _ = models.merge(mixture_of(paths))
    again, _ = models.merge(mixture_of(paths))
    other, _ = models.merge(mixture_of(paths) | {"seed": 1})

    assert_same_bits(one[router(0)], again[router(0)])
    assert not torch.equal(one[router(0)], other[router(0)])
    assert not torch.equal(one[router(0)], one[router(1)])


def made(kind: MadeKind, shape: tuple[int, int], **given: Any) -> torch.Tensor:
    content = make_numbers(MadeFile(kind, shape, DType.F64, ("name",), **given))
    return torch.frombuffer(bytearray(content), dtype=torch.float64).reshape(shape)


def test_normal_numbers_are_normal() -> None:
    values = made(MadeKind.NORMAL, (400, 500)).flatten()

    assert abs(values.mean()) < 4 / math.sqrt(values.numel())
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / values.numel())
    for bound in (-2.0, -1.0, -0.3, 0.0, 0.5, 1.5, 3.0):
        share = 0.5 * (1 + math.erf(bound / math.sqrt(2)))
        found = (values < bound).double().mean()
        assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / values.numel())
    # Of a pair, one says nothing about the other.
    assert abs((values[::2] * values[1::2]).mean()) < 5 / math.sqrt(values.numel() / 2)


def test_uniform_numbers_lie_evenly_below_one_over_the_root_of_the_columns() -> None:
    values = made(MadeKind.UNIFORM, (400, 625)).flatten() * 25

    assert values.abs().max() < 1
    counts = torch.histc(values, bins=20, min=-1, max=1)
    mean = values.numel() / 20
    assert (counts - mean).abs().max() < 5 * math.sqrt(mean)


def test_given_numbers_are_rounded_once() -> None:
    given = torch.tensor([[1.0, 1 + 2**-9], [1 + 3 * 2**-9, -3.0]])
    content = make_numbers(
        MadeFile(
            MadeKind.GIVEN, (2, 2), DType.BF16, ("a", "b"), given=given.numpy().tobytes().hex()
        )
    )
    found = torch.frombuffer(bytearray(content), dtype=torch.bfloat16).reshape(2, 2)
    assert_same_bits(found, given.bfloat16())


def test_gates_of_a_file_are_taken_as_they_are(
    models: Models, paths: list[Path], tmp_path: Path
) -> None:
    gates = {router(layer): torch.randn(2, HIDDEN) for layer in range(LAYERS)}
    save_file(gates, tmp_path / "gates.safetensors")

    merged, _ = models.merge(mixture_of(paths, gates=str(tmp_path / "gates.safetensors")))

    for name, tensor in gates.items():
        assert_same_bits(merged[name], tensor.bfloat16(), name)


def test_gates_of_a_file_are_checked_before_work_starts(paths: list[Path], tmp_path: Path) -> None:
    recipe = mixture_of(paths, gates=str(tmp_path / "gates.safetensors"))
    with pytest.raises(CheckpointError, match=r"gates\.safetensors"):
        streammerge.plan(recipe, memory=MEMORY)
    save_file({router(0): torch.randn(2, HIDDEN)}, tmp_path / "gates.safetensors")
    with pytest.raises(MissingTensorError, match=r"has no .*layers\.1.*of \[2, 24\]"):
        streammerge.plan(recipe, memory=MEMORY)
    save_file(
        {router(layer): torch.randn(3, HIDDEN) for layer in range(LAYERS)},
        tmp_path / "gates.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"shape \[3, 24\]; expected floats of \[2, 24\]"):
        streammerge.plan(recipe, memory=MEMORY)


def test_an_expert_may_be_a_model_with_an_adapter(models: Models, paths: list[Path]) -> None:
    weights = {f"model.layers.{layer}.mlp.up_proj": (INNER, HIDDEN) for layer in range(LAYERS)}
    adapter = write_adapter(models.new_output(), weights, seed=3)
    recipe = mixture_of(paths)
    recipe["sources"][0]["adapter"] = str(adapter)
    baked = {
        "method": "task_arithmetic",
        "base": str(paths[1]),
        "sources": [{"path": str(adapter)}],
    }
    tuned, _ = models.merge(baked)

    merged, _ = models.merge(recipe)

    for layer in range(LAYERS):
        name = f"model.layers.{layer}.block_sparse_moe.experts.0.w3.weight"
        assert_same_bits(merged[name], tuned[f"model.layers.{layer}.mlp.up_proj.weight"], name)
    with pytest.raises(RecipeError, match=r"is an adapter, and an expert is a model"):
        streammerge.plan(
            mixture_of(paths) | {"sources": [{"path": str(adapter)}, {"path": str(paths[2])}]},
            memory=MEMORY,
        )


def test_a_rule_scales_what_an_expert_gives_back(models: Models, paths: list[Path]) -> None:
    recipe = mixture_of(paths)
    recipe["rules"] = [{"tensors": "*.experts.1.w2.weight", "scale": 0.5}]

    merged, _ = models.merge(recipe)

    expected = expected_of(paths)
    for name, tensor in expected.items():
        scaled = 0.5 * tensor.float() if ".experts.1.w2." in name else tensor.float()
        assert_same_bits(merged[name], scaled.bfloat16(), name)


def test_a_plan_goes_to_another_process_with_its_gates(models: Models, paths: list[Path]) -> None:
    planned = streammerge.plan(mixture_of(paths), memory=MEMORY)
    expected, _ = models.merge(mixture_of(paths))
    out = models.new_output()

    streammerge.merge(parse_plan(dump_plan(planned)), out)  # type: ignore[arg-type]

    found = load_model(out)
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor, name)


def test_mixtures_are_made_side_by_side(models: Models, paths: list[Path]) -> None:
    recipes = [mixture_of(paths) | {"seed": seed} for seed in (0, 1)]
    alone = [models.merge(recipe)[0] for recipe in recipes]
    outs = [models.new_output(), models.new_output()]

    merge_together(list(zip(recipes, outs, strict=True)), memory=MEMORY)

    for expected, out in zip(alone, outs, strict=True):
        found = load_model(out)
        for name, tensor in expected.items():
            assert_same_bits(found[name], tensor, name)


def test_command_line_plans_merges_finds_it_complete_and_verifies(
    paths: list[Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(mixture_of(paths)))
    out = tmp_path / "out"

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "streammerge", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    assert "a mixtral model of 2 experts" in run("plan", str(recipe))
    run("merge", str(recipe), str(out))
    assert "complete" in run("merge", str(recipe), str(out), "--resume")
    run("verify", str(out), "--against", str(recipe))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gates": None}, "mixture: gates: this key is required: random, uniform, embeddings"),
        ({"gates": 3}, "gates: expected random, uniform, embeddings or the path of a file, got 3"),
        ({"form": "phi"}, "form: expected mixtral or"),
        (
            {"form": "qwen3_moe"},
            'qwen3_moe is made of models of the type qwen3, and the base is "llama"',
        ),
        ({"form": "qwen2_moe"}, "mixture.shared: qwen2_moe needs an expert of every token"),
        ({"shared": 2}, "mixture.shared: expected the index of one of 2 sources, 0 to 1, got 2"),
        ({"shared": -1}, "shared: expected the index of a source from 0, got -1"),
        (
            {"shared": 0, "form": "mixtral", "experts_per_token": 1},
            "mixtral has no expert of every token",
        ),
        ({"shared": 0}, "a token cannot be given to 2 of 1 experts"),
        ({"experts_per_token": 3}, "mixture.experts_per_token: a token cannot be given to 3 of 2"),
        ({"prompts": [{"positive": ["a"]}]}, "no effect on gates that are drawn"),
        ({"gates": "embeddings"}, "need prompts for each of 2 sources, got 0"),
        ({"prompts": 3}, "prompts: expected a list with an entry per source"),
        ({"prompts": [{"positive": []}]}, "prompts[0].positive: expected at least one text"),
        ({"prompts": [{"positve": []}]}, "prompts[0].positve: unknown key"),
        ({"prompt": []}, 'unknown key; did you mean "prompts"'),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_by_its_key(
    paths: list[Path], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError) as raised:
        streammerge.plan(mixture_of(paths, **change), memory=MEMORY)

    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"method": "linear"},
            'the experts of a mixture are sources as they are, which is "method: passthrough"',
        ),
        ({"base": None}, "mixture: the recipe has no base"),
        ({"mixture": 3}, "mixture: expected a mapping"),
        ({"vocabulary": "union"}, "mixture: its embeddings are the base's"),
        (
            {"layers": [{"sources": [{"source": 0, "layers": [0, 1]}]}]},
            "mixture: cannot be put together of layers as well",
        ),
        ({"output": {"companions": {"config": 1}}}, "is another model; leave config out"),
    ],
)
def test_what_does_not_go_with_a_mixture_is_refused(
    paths: list[Path], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError) as raised:
        streammerge.plan(mixture_of(paths) | change, memory=MEMORY)

    assert said in str(raised.value)


def test_models_that_cannot_be_experts_are_refused(models: Models, paths: list[Path]) -> None:
    def refuse(base: Path, expert: Path, kind: type[StreamMergeError], said: str) -> None:
        with pytest.raises(kind) as raised:
            streammerge.plan(mixture_of([base, expert, paths[1]]), memory=MEMORY)
        assert said in str(raised.value)

    base, expert = paths[:2]
    wide = write_llama(models, "wide", llama(3, inner=48))
    refuse(base, wide, CheckpointError, "has the shape [48, 24], and [40, 24] in the base")
    some = {name: each for name, each in llama(4).items() if "layers.1.mlp.down" not in name}
    less = write_llama(models, "less", some)
    refuse(base, less, MissingTensorError, "has no model.layers.1.mlp.down_proj.weight")
    refuse(less, expert, RecipeError, "base")
    biased = llama(5) | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(HIDDEN)}
    odd = write_llama(models, "odd", biased)
    refuse(odd, expert, RecipeError, "has model.layers.0.self_attn.q_proj.bias, of which no layer")
    gpt = write_llama(models, "gpt", llama(6), model_type="gpt2")
    refuse(gpt, expert, RecipeError, 'no mixture can be made of a "gpt2" model')
    bare = models.write(llama(7), "bare")
    refuse(bare, expert, RecipeError, "has no config.json with a model_type")


def test_embeddings_need_a_tokenizer_that_belongs_to_them(paths: list[Path]) -> None:
    prompts = [{"positive": ["a"]}, {"positive": ["b"]}]
    recipe = mixture_of(paths, gates="embeddings", prompts=prompts)
    with pytest.raises(RecipeError, match=r"prompts need tokenizer\.json beside"):
        streammerge.plan(recipe, memory=MEMORY)
    (paths[0] / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is no tokenizer"):
        streammerge.plan(recipe, memory=MEMORY)
    write_words(paths[0], {"a": 0, "b": ROWS})
    with pytest.raises(RecipeError, match=f"gives token {ROWS}, and .* has {ROWS} rows"):
        streammerge.plan(recipe, memory=MEMORY)


def test_gates_from_embeddings_are_directions_of_sums(models: Models, paths: list[Path]) -> None:
    write_words(paths[0], {"<s>": 0, "a": 3, "b": 5, "c": 7})
    (paths[0] / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}}')
    prompts = [{"positive": ["a b", "c"], "negative": ["b"]}, {"positive": ["b"]}]

    merged, _ = models.merge(mixture_of(paths, gates="embeddings", prompts=prompts))

    rows = load_model(paths[0])["model.embed_tokens.weight"].double()

    def unit(vector: torch.Tensor) -> torch.Tensor:
        return vector / vector.norm()

    first = unit(unit(2 * rows[0] + rows[3] + rows[5] + rows[7]) - unit(rows[0] + rows[5]))
    expected = torch.stack([first, unit(rows[0] + rows[5])])
    for layer in range(LAYERS):
        assert_same_bits(merged[router(layer)], expected.float().bfloat16())


def test_prompts_that_mean_the_same_are_stated(paths: list[Path]) -> None:
    write_words(paths[0], {"a": 0, "b": 1})
    prompts = [{"positive": ["a b"]}, {"positive": ["b a"]}]
    planned = streammerge.plan(
        mixture_of(paths, gates="embeddings", prompts=prompts), memory=MEMORY
    )
    assert "sources[0] and sources[1] point almost the same way" in str(planned)


def write_words(directory: Path, vocabulary: dict[str, int]) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    tokenizer = Tokenizer(kinds.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))


def test_an_interrupted_mixture_goes_on(paths: list[Path], tmp_path: Path) -> None:
    """Killed at once, and continued by another process."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(mixture_of(paths)))
    command = [sys.executable, "-m", "streammerge", "merge", str(recipe), str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (tmp_path / "out.partial").exists():
            pass
        os.kill(process.pid, signal.SIGKILL)
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    streammerge.merge(mixture_of(paths), tmp_path / "whole", memory=MEMORY)

    found, expected = load_model(tmp_path / "out"), load_model(tmp_path / "whole")
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor, name)
