"""Adapters of mlx-lm and torchtune, and names of Megatron, merge into models of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MEMORY, Models
from safetensors.torch import load_file, save_file
from torch import Tensor

import streammerge
from streammerge.adapters.files.inspecting import describe_adapter
from streammerge.adapters.files.reading import is_adapter, read_adapter
from streammerge.adapters.files.types import Naming
from streammerge.errors import (
    CheckpointError,
    HeaderError,
    MissingTensorError,
    ShapeMismatchError,
    StreamMergeError,
    UnsupportedAdapterError,
)
from tests.adapters.tiny import llama

Tensors = dict[str, Tensor]
RANK, SCALE = 4, 10.0
HEADS, GROUPS, HEAD, HIDDEN, INNER = 4, 2, 8, 32, 48


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def random(*shape: int) -> Tensor:
    return torch.randn(*shape) / 4


def write(path: Path, tensors: Tensors, name: str, config: dict[str, Any]) -> Path:
    path.mkdir()
    if name.endswith(".pt"):
        torch.save(tensors, path / name)
    else:
        save_file(tensors, path / name)
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def write_mlx(path: Path, tensors: Tensors, **config: Any) -> Path:
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    document = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters} | config
    return write(path, tensors, "adapters.safetensors", document | {"batch_size": 4})


def write_tune(path: Path, tensors: Tensors, **config: Any) -> Path:
    document = {"r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"], "peft_type": "LORA"}
    return write(path, tensors, "adapter_model.pt", document | config)


def merge(base: Path, adapter: Path) -> tuple[Tensors, Tensors]:
    """Return the tensors of the base and of the result."""
    recipe = {
        "method": "task_arithmetic",
        "base": str(base),
        "sources": [{"path": str(adapter)}],
    }
    out = adapter.parent / "out"
    streammerge.merge(recipe, out)
    return load_file(base / "model.safetensors"), load_file(out / "model.safetensors")


def assert_changed(before: Tensors, after: Tensors, expected: Tensors) -> None:
    """Compare what changed with what was expected, and that nothing else did."""
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        wanted = before[name].double() + expected.get(name, torch.zeros(1)).double()
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-6, msg=name)
        assert torch.equal(tensor, before[name]) == (name not in expected), name


SHAPES = {
    "model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN),
    "model.layers.1.self_attn.v_proj": (GROUPS * HEAD, HIDDEN),
    "model.layers.1.mlp.down_proj": (HIDDEN, INNER),
}


def mlx_factors(shapes: dict[str, tuple[int, int]]) -> Tensors:
    """Return factors as mlx-lm stores them: ``lora_a [in, r]``, ``lora_b [r, out]``."""
    return {
        name: tensor
        for stem, (rows, columns) in shapes.items()
        for name, tensor in {
            f"{stem}.lora_a": random(columns, RANK),
            f"{stem}.lora_b": random(RANK, rows),
        }.items()
    }


def mlx_delta(tensors: Tensors, stem: str) -> Tensor:
    """Return what ``LoRALinear.fuse`` of mlx-lm adds, in float64."""
    a, b = (tensors[f"{stem}.lora_{side}"].double() for side in "ab")
    return (SCALE * b.T) @ a.T


def test_mlx_factors_are_turned_and_scaled(base: Path, tmp_path: Path) -> None:
    tensors = mlx_factors(SHAPES)
    adapter = write_mlx(tmp_path / "a", tensors)
    assert is_adapter(adapter)
    assert read_adapter(adapter).naming is Naming.MLX
    assert "mlx names" in describe_adapter(read_adapter(adapter))

    before, after = merge(base, adapter)

    assert_changed(before, after, {f"{s}.weight": mlx_delta(tensors, s) for s in SHAPES})


def test_mlx_dora_norms_the_outputs(base: Path, tmp_path: Path) -> None:
    tensors = mlx_factors(SHAPES)
    for stem, (rows, _) in SHAPES.items():
        tensors[f"{stem}.m"] = torch.rand(rows) + 0.5
    adapter = write_mlx(tmp_path / "a", tensors, fine_tune_type="dora")

    before, after = merge(base, adapter)

    for stem in SHAPES:
        adapted = before[f"{stem}.weight"].double() + mlx_delta(tensors, stem)
        norms = tensors[f"{stem}.m"].double() / torch.linalg.norm(adapted, dim=1)
        torch.testing.assert_close(
            after[f"{stem}.weight"].double(), norms[:, None] * adapted, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_embeddings_are_stored_the_other_way_round(
    base: Path, tmp_path: Path, kind: str
) -> None:
    tensors = {
        "model.embed_tokens.lora_a": random(64, RANK),
        "model.embed_tokens.lora_b": random(RANK, HIDDEN),
    }
    if kind == "dora":
        tensors["model.embed_tokens.m"] = torch.rand(64) + 0.5
    adapter = write_mlx(tmp_path / "a", tensors, fine_tune_type=kind)
    before, after = merge(base, adapter)

    a, b = (tensors[f"model.embed_tokens.lora_{side}"].double() for side in "ab")
    expected = before["model.embed_tokens.weight"].double() + SCALE * a @ b
    if kind == "dora":
        norms = tensors["model.embed_tokens.m"].double() / torch.linalg.norm(expected, dim=1)
        expected = norms[:, None] * expected
    torch.testing.assert_close(
        after["model.embed_tokens.weight"].double(), expected, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_mlx_embeddings_that_are_tied_are_refused(tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tensors = {
        "model.embed_tokens.lora_a": random(64, RANK),
        "model.embed_tokens.lora_b": random(RANK, HIDDEN),
    }
    adapter = write_mlx(tmp_path / "a", tensors)

    with pytest.raises(UnsupportedAdapterError, match=r"one tensor with another.*mlx_lm\.fuse"):
        merge(tmp_path / "base", adapter)


TUNE = {
    "q_proj": ("layers.0.attn.q_proj", "model.layers.0.self_attn.q_proj"),
    "k_proj": ("layers.0.attn.k_proj", "model.layers.0.self_attn.k_proj"),
    "v_proj": ("layers.1.attn.v_proj", "model.layers.1.self_attn.v_proj"),
    "output_proj": ("layers.1.attn.output_proj", "model.layers.1.self_attn.o_proj"),
    "w1": ("layers.0.mlp.w1", "model.layers.0.mlp.gate_proj"),
    "w2": ("layers.0.mlp.w2", "model.layers.0.mlp.down_proj"),
    "w3": ("layers.1.mlp.w3", "model.layers.1.mlp.up_proj"),
    "output": ("output", "lm_head"),
}


def tune_factors(base: Path) -> Tensors:
    weights = load_file(base / "model.safetensors")
    tensors = {}
    for inner, outer in TUNE.values():
        rows, columns = weights[f"{outer}.weight"].shape
        tensors[f"{inner}.lora_a.weight"] = random(RANK, columns)
        tensors[f"{inner}.lora_b.weight"] = random(rows, RANK)
    return tensors


def test_torchtune_rows_are_put_in_the_order_of_transformers(base: Path, tmp_path: Path) -> None:
    """Heads of queries and keys have their pairs side by side there, and half a head apart here."""
    tensors = tune_factors(base)
    adapter = write_tune(tmp_path / "a", tensors)
    recipe = {
        "method": "task_arithmetic",
        "base": str(base),
        "sources": [{"path": str(adapter)}],
    }
    plan = streammerge.plan(recipe, memory=MEMORY)
    assert "2 with the rows of heads put in the order of transformers" in str(plan)

    before, after = merge(base, adapter)

    expected = {}
    for part, (inner, outer) in TUNE.items():
        a, b = (tensors[f"{inner}.lora_{side}.weight"].double() for side in "ab")
        if part in ("q_proj", "k_proj"):
            heads = HEADS if part == "q_proj" else GROUPS
            b = torch.cat([part for head in b.chunk(heads) for part in (head[0::2], head[1::2])])
        expected[f"{outer}.weight"] = (8 / RANK) * b @ a
    assert_changed(before, after, expected)


def test_torchtune_on_a_base_of_its_own_names_keeps_the_order(
    tmp_path: Path, models: Models
) -> None:
    weights = {"layers.0.attn.q_proj.weight": random(HIDDEN, HIDDEN)}
    base = models.write(weights)
    tensors = {
        "layers.0.attn.q_proj.lora_a.weight": random(RANK, HIDDEN),
        "layers.0.attn.q_proj.lora_b.weight": random(HIDDEN, RANK),
    }

    before, after = merge(base, write_tune(tmp_path / "a", tensors))

    a, b = (tensors[f"layers.0.attn.q_proj.lora_{side}.weight"] for side in "ab")
    assert_changed(before, after, {"layers.0.attn.q_proj.weight": 2 * b @ a})


def test_torchtune_heads_of_an_unknown_kind_are_refused(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    adapter = write_tune(tmp_path / "a", tune_factors(base))

    with pytest.raises(UnsupportedAdapterError, match=r"order torchtune keeps the rows.*qwen2"):
        merge(base, adapter)


MEGATRON = {
    "decoder.layers.0.self_attention.linear_qkv": ((HEADS + 2 * GROUPS) * HEAD, HIDDEN),
    "decoder.layers.0.self_attention.linear_proj": (HIDDEN, HIDDEN),
    "decoder.layers.1.mlp.linear_fc1": (2 * INNER, HIDDEN),
    "decoder.layers.1.mlp.linear_fc2": (HIDDEN, INNER),
}


@pytest.mark.parametrize("before_names", ["", "module."])
def test_megatron_groups_of_heads_are_taken_apart(
    base: Path, tmp_path: Path, before_names: str
) -> None:
    tensors = {}
    for stem, (rows, columns) in MEGATRON.items():
        name = f"base_model.model.{before_names}{stem}"
        tensors[f"{name}.lora_A.weight"] = random(RANK, columns)
        tensors[f"{name}.lora_B.weight"] = random(rows, RANK)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["linear_qkv"]}
    adapter = write(tmp_path / "a", tensors, "adapter_model.safetensors", config)

    before, after = merge(base, adapter)

    def delta(stem: str) -> Tensor:
        name = f"base_model.model.{before_names}{stem}"
        return 2 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]

    # Megatron-Bridge's split: every group of heads has its queries, a key and a value.
    qkv = delta("decoder.layers.0.self_attention.linear_qkv").view(
        GROUPS, HEADS // GROUPS + 2, HEAD, HIDDEN
    )
    gate, up = delta("decoder.layers.1.mlp.linear_fc1").chunk(2)
    attention, mlp = "model.layers.0.self_attn", "model.layers.1.mlp"
    assert_changed(
        before,
        after,
        {
            f"{attention}.q_proj.weight": qkv[:, :-2].reshape(-1, HIDDEN),
            f"{attention}.k_proj.weight": qkv[:, -2].reshape(-1, HIDDEN),
            f"{attention}.v_proj.weight": qkv[:, -1].reshape(-1, HIDDEN),
            f"{attention}.o_proj.weight": delta("decoder.layers.0.self_attention.linear_proj"),
            f"{mlp}.gate_proj.weight": gate,
            f"{mlp}.up_proj.weight": up,
            f"{mlp}.down_proj.weight": delta("decoder.layers.1.mlp.linear_fc2"),
        },
    )


def test_nemo_files_without_alpha_are_refused_by_name(tmp_path: Path) -> None:
    stem = "model.decoder.layers.0.self_attention.linear_qkv.adapter"
    path = tmp_path / "adapter_model.safetensors"
    save_file(
        {f"{stem}.linear_in.weight": random(4, 8), f"{stem}.linear_out.weight": random(8, 4)}, path
    )

    with pytest.raises(UnsupportedAdapterError, match="NeMo, whose alpha is not in the file"):
        read_adapter(path)


BROKEN: dict[str, tuple[Tensors, dict[str, Any], type[StreamMergeError], str]] = {
    "layers instead of factors": (
        {"a.lora_a": torch.ones(8, 4), "a.lora_b": torch.ones(4, 8)},
        {"fine_tune_type": "full"},
        UnsupportedAdapterError,
        "the file holds layers",
    ),
    "no scale": (
        {"a.lora_a": torch.ones(8, 4), "a.lora_b": torch.ones(4, 8)},
        {"lora_parameters": {"rank": 4}},
        HeaderError,
        "lora_parameters.scale: expected a finite number, got None",
    ),
    "one factor": (
        {"a.lora_a": torch.ones(8, 4)},
        {},
        MissingTensorError,
        "needs lora_a and lora_b",
    ),
    "other ranks": (
        {"a.lora_a": torch.ones(8, 4), "a.lora_b": torch.ones(5, 8)},
        {},
        ShapeMismatchError,
        r"lora_a is \[8, 4\], lora_b is \[5, 8\]",
    ),
    "experts": (
        {"a.lora_a": torch.ones(2, 4, 8), "a.lora_b": torch.ones(2, 8, 4)},
        {},
        UnsupportedAdapterError,
        "a stack of experts",
    ),
    "magnitudes of nothing": (
        {"a.lora_a": torch.ones(8, 4), "a.lora_b": torch.ones(4, 8), "a.m": torch.ones(3)},
        {"fine_tune_type": "dora"},
        ShapeMismatchError,
        r"'a.m' is \[3\]",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_mlx_files_that_contradict_themselves_are_refused(broken: str, tmp_path: Path) -> None:
    tensors, config, error, says = BROKEN[broken]

    with pytest.raises(error, match=says):
        read_adapter(write_mlx(tmp_path / "a", tensors, **config))


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    adapter = write_mlx(tmp_path / "a", mlx_factors(SHAPES))
    (adapter / "adapter_config.json").unlink()

    with pytest.raises(CheckpointError, match=r"adapter_config\.json: is missing"):
        read_adapter(adapter / "adapters.safetensors")


def test_plans_name_the_adapter(base: Path, tmp_path: Path) -> None:
    adapter = write_mlx(tmp_path / "a", mlx_factors(SHAPES))
    recipe = {
        "method": "task_arithmetic",
        "base": str(base),
        "sources": [{"path": str(adapter)}],
    }

    assert str(adapter) in str(streammerge.plan(recipe, memory=MEMORY))
