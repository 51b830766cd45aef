"""``output.quantization: as base``: merged weights become codes with scales of their own again."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_backend import COMPUTE, MakeDevices
from models import (
    MEMORY,
    assert_same_bits,
    assert_same_model,
    recut,
    residence_of,
    tight_plan,
    without_kernels,
)
from oracles import merge_in_memory
from safetensors.torch import load_file, save_file
from test_resume import interrupt_after
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import streammerge as sm
from streammerge.checkpoint import outputfile
from streammerge.checkpoint.verifying import verify_files
from streammerge.dtypes import DType
from streammerge.errors import CheckpointError, PlanError, RecipeError
from streammerge.plan.chunking import Residence
from streammerge.plan.codec import dump_plan, parse_plan
from streammerge.plan.types import MergePlan
from streammerge.run import verify_against
from streammerge.statistics import BLOCK

pytestmark = pytest.mark.timeout(120)

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
Tensors = dict[str, Tensor]
AS_BASE = {"quantization": "as base"}


def spread(scale: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """Return the scale of every element of a matrix, or of a stack of them."""
    wide = scale.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., : shape[-2], : shape[-1]].expand(shape)


def quantise(values: Tensor, block: tuple[int, int], codes: torch.dtype, dtype: torch.dtype) -> Any:
    """Return codes and ``[.., rows, columns]`` scales of whole tensors: the slow, obvious way."""
    *_, rows, columns = values.shape
    padding = (0, -columns % block[1], 0, -rows % block[0])
    padded = torch.nn.functional.pad(values.float(), padding)
    blocks = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    amax = blocks.abs().amax(dim=(-3, -1))
    if dtype in (E8M0, torch.uint8):
        exponent = torch.ceil(torch.log2(amax.double() / LARGEST[codes])).clamp(-126, 127)
        wide = torch.exp2(exponent).float()
        stored = (exponent + 127).to(torch.uint8).view(dtype)
    else:
        stored = (amax / LARGEST[codes]).clamp(min=2.0**-126).to(dtype)
        wide = stored.float()
    quotients = values.float() / spread(wide, values.shape, block)
    return quotients.clamp(-LARGEST[codes], LARGEST[codes]).to(codes), stored


def numbers(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Return what codes stand for."""
    wide = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale
    return weight.float() * spread(wide, weight.shape, block)


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Rows and columns of different size, so that a scale in a wrong place is seen.
    size = torch.exp2(torch.randint(-4, 4, shape[-2:], generator=generator).float())
    return torch.randn(shape, generator=generator) * size.cumsum(0).remainder(7).add(0.1) / 30


def write(path: Path, tensors: Tensors, **config: Any) -> Path:
    path.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", **config}))
    return path


BIG, SMALL = (1100, 1300), (70, 200)
"""Six blocks of work, and one."""
KINDS: dict[str, tuple[tuple[int, ...], str, tuple[int, int], torch.dtype, torch.dtype, Any]] = {
    # shape, name of the scales, block, codes, scales, shape of the scales as they are stored
    "blocks": (BIG, "weight_scale_inv", (128, 128), E4M3, torch.float32, None),
    "blocks, told": (BIG, "weight_scale_inv", (64, 96), E4M3, torch.bfloat16, None),
    "one": (BIG, "weight_scale", BIG, E4M3, torch.float32, ()),
    "one, E5M2": (BIG, "scale_weight", BIG, E5M2, torch.float32, (1,)),
    "rows": (BIG, "weight_scale", (1, 1300), E4M3, torch.bfloat16, (1100, 1)),
    "rows, flat": (BIG, "weight_scale", (1, 1300), E4M3, torch.float32, (1100,)),
    "powers of two": ((1100, 1312), "weight_scale", (1, 32), E4M3, E8M0, None),
    "powers of two as bytes": ((300, 544), "weight_scale", (1, 32), E5M2, torch.uint8, None),
    "stack": ((3, 700, 300), "weight_scale", (700, 300), E4M3, torch.float32, (3,)),
    "stack, rows": ((3, 700, 300), "weight_scale", (1, 300), E4M3, torch.float32, (3, 700, 1)),
    "stack, blocks": ((3, 700, 300), "weight_scale_inv", (128, 128), E4M3, torch.float32, None),
    "small": (SMALL, "weight_scale_inv", (128, 128), E4M3, torch.float32, None),
}


def model_of(kind: str, seed: int) -> tuple[Tensors, Tensors]:
    """Return a model of one coded weight and a norm: as it is stored, and in numbers."""
    shape, name, block, codes, dtype, scale_shape = KINDS[kind]
    weight, scale = quantise(draw(shape, seed), block, codes, dtype)
    norm = torch.linspace(0.5, 1.5, 16).add(seed).bfloat16()
    stored = {
        "x.weight": weight,
        f"x.{name}": scale if scale_shape is None else scale.reshape(scale_shape),
        "norm.weight": norm,
    }
    return stored, {"x.weight": numbers(weight, scale, block), "norm.weight": norm}


def config_of(kind: str) -> dict[str, Any]:
    block = list(KINDS[kind][2]) if kind.startswith("blocks") else None
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}


def expect(kind: str, merged: Tensor, like: Tensors) -> Tensors:
    """Return codes and scales of a merged weight, as the base has them."""
    _, name, block, codes, dtype, _ = KINDS[kind]
    weight, scale = quantise(merged, block, codes, dtype)
    return {"x.weight": weight, f"x.{name}": scale.reshape(like[f"x.{name}"].shape)}


def as_numbers(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == E8M0 else tensor


def assert_same(got: Tensors, expected: Tensors) -> None:
    assert_same_model(*({n: as_numbers(t) for n, t in each.items()} for each in (got, expected)))


def merged_by(plan: MergePlan, out: Path) -> Tensors:
    sm.merge(plan, out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_those_of_the_merged_numbers(kind: str, tmp_path: Path) -> None:
    stored, plain = model_of(kind, 0)
    base = write(tmp_path / "base", stored, **config_of(kind))
    tuned = {"x.weight": draw(KINDS[kind][0], 9), "norm.weight": plain["norm.weight"] * 2}
    source = write(tmp_path / "tuned", tuned)
    recipe = {
        "method": "task_arithmetic",
        "base": str(base),
        "sources": [{"path": str(source), "weight": 0.5}],
        "output": AS_BASE,
    }
    plan = sm.plan(recipe, memory=MEMORY)

    got = merged_by(plan, tmp_path / "out")
    again = merged_by(recut(plan, slots=3), tmp_path / "again")

    merged = merge_in_memory(
        "task_arithmetic", plain, [tuned], {"weight": 0.5}, dtype=torch.float32
    )
    expected = expect(kind, merged["x.weight"], stored)
    expected["norm.weight"] = merged["norm.weight"].bfloat16()
    assert_same(got, expected)
    assert_same(again, expected)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"] == config_of(kind)["quantization_config"]
    assert not verify_files(tmp_path / "out").damages
    # It is a model of codes again: read once more, it stands for what was merged.
    sm.merge(
        {
            "method": "linear",
            "sources": [{"path": str(tmp_path / "out")}],
            "output": {"dtype": "F32"},
        },
        tmp_path / "read",
        memory=MEMORY,
    )
    read = load_file(tmp_path / "read" / "model.safetensors")["x.weight"]
    _, name, block, codes, _, _ = KINDS[kind]
    scale = expected[f"x.{name}"]
    scale = scale.reshape(quantise(read, block, codes, torch.float32)[1].shape)
    # A sum of one number begins at zero, which swallows the sign of a zero.
    assert_same_bits(read, numbers(expected["x.weight"], scale, block) + 0.0)
    if scale.dtype != torch.uint8:
        step = 2.0**-4 if codes == E4M3 else 2.0**-3
        floor = spread(scale, read.shape, block) * (2.0**-10 if codes == E4M3 else 2.0**-17)
        bound = torch.maximum(merged["x.weight"].abs() * step, floor) * (1 + 2.0**-8)
        assert ((read - merged["x.weight"]).abs() <= bound).all()


METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.3},
    "ties over the model": {"density": 0.3, "scope": "model"},
    "dare_linear": {"density": 0.4},
}


def shapes() -> dict[str, tuple[int, ...]]:
    return {"a.weight": BIG, "b.weight": SMALL, "c.weight": SMALL, "norm.weight": (1, 40)}


@pytest.fixture
def models(tmp_path: Path) -> tuple[list[Path], list[Tensors]]:
    """A base and two sources of large and small weights, the second source in bfloat16."""
    paths, plain = [], []
    for seed in range(3):
        values = {n: draw(s, seed * 10 + i) for i, (n, s) in enumerate(shapes().items())}
        stored: Tensors = {"norm.weight": values["norm.weight"].bfloat16()}
        wide: Tensors = {"norm.weight": stored["norm.weight"].float()}
        for name in ("a.weight", "b.weight", "c.weight"):
            if seed == 2:
                stored[name] = values[name].bfloat16()
                wide[name] = stored[name].float()
                continue
            weight, scale = quantise(values[name], (128, 128), E4M3, torch.float32)
            stored |= {name: weight, f"{name}_scale_inv": scale}
            wide[name] = numbers(weight, scale, (128, 128))
        quantised = config_of("blocks") if seed < 2 else {}
        paths.append(write(tmp_path / f"model{seed}", stored, **quantised))
        plain.append(wide)
    return paths, plain


def recipe_for(method: str, paths: list[Path], **output: Any) -> dict[str, Any]:
    return {
        "method": method.split(maxsplit=1)[0],
        "base": str(paths[0]),
        "sources": [{"path": str(path), "weight": 0.75} for path in paths[1:]],
        "parameters": METHODS[method],
        "seed": 3,
        "output": AS_BASE | output,
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_its_oracle_however_the_work_is_cut(
    method: str, models: tuple[list[Path], list[Tensors]], tmp_path: Path
) -> None:
    paths, (base, *sources) = models
    recipe = recipe_for(method, paths)
    plan = sm.plan(recipe, memory=MEMORY)
    tight = tight_plan(recipe)

    results = [
        merged_by(plan, tmp_path / "wide"),
        merged_by(tight, tmp_path / "tight"),
        merged_by(recut(plan, slots=3, slot_blocks=2, workers=3), tmp_path / "recut"),
    ]
    with without_kernels():
        results.append(merged_by(sm.plan(recipe, memory=MEMORY), tmp_path / "plain"))

    values = METHODS[method] | {"weight": 0.75}
    merged = merge_in_memory(
        method.split(maxsplit=1)[0], base, sources, values, seed=3, dtype=torch.float32
    )
    expected = {"norm.weight": merged["norm.weight"].bfloat16()}
    for name in ("a.weight", "b.weight", "c.weight"):
        weight, scale = quantise(merged[name], (128, 128), E4M3, torch.float32)
        expected |= {name: weight, f"{name}_scale_inv": scale}
    for got in results:
        assert_same_model(got, expected)
    assert residence_of(tight, "a.weight") is Residence.STREAMED


@pytest.mark.parametrize("method", ["ties", "ties over the model", "dare_linear"])
def test_a_device_has_the_bytes_of_the_cpu(
    method: str,
    models: tuple[list[Path], list[Tensors]],
    devices: MakeDevices,
    tmp_path: Path,
) -> None:
    recipe = recipe_for(method, models[0])
    expected = merged_by(sm.plan(recipe, memory=MEMORY), tmp_path / "cpu")
    backend = devices()["cuda:0"]
    plan = sm.plan(recipe, memory=MEMORY, device="cuda:0")
    assert isinstance(plan, MergePlan)

    assert_same_model(merged_by(plan, tmp_path / "device"), expected)
    assert_same_model(merged_by(recut(plan, slots=3), tmp_path / "recut"), expected)
    assert ("run", COMPUTE) in backend.log


def test_a_plan_reads_and_takes_what_it_says(
    models: tuple[list[Path], list[Tensors]], tmp_path: Path
) -> None:
    recipe = recipe_for("ties", models[0])
    for index, plan in enumerate((sm.plan(recipe, memory=MEMORY), tight_plan(recipe))):
        manifest = sm.merge(plan, tmp_path / f"out{index}")
        assert manifest.run.bytes_by_stage["read"] == plan.bytes_to_read
        assert manifest.run.measured_memory <= plan.memory.peak


def test_a_plan_survives_its_json_and_says_what_becomes_codes(
    models: tuple[list[Path], list[Tensors]], tmp_path: Path
) -> None:
    plan = sm.plan(recipe_for("task_arithmetic", models[0], dtype="float32"), memory=MEMORY)
    again = parse_plan(dump_plan(plan))

    assert again == plan
    text = str(plan)
    assert "3 weight(s) become F8_E4M3 with F32 scales, found anew of the merged values" in text
    assert "output.dtype F32 holds for the other tensors" in text
    assert "3 of scales found anew" in text
    got = merged_by(again, tmp_path / "out")
    assert got["norm.weight"].dtype == torch.float32
    assert got["a.weight"].dtype == E4M3
    manifest = json.loads((tmp_path / "out" / "streammerge_manifest.json").read_text())
    assert manifest["tensors"]["a.weight_scale_inv"]["action"] == "scales"
    assert manifest["tensors"]["a.weight"]["dtype"] == "F8_E4M3"
    assert "quantization: as base" in (tmp_path / "out" / manifest_recipe(tmp_path)).read_text()


def manifest_recipe(tmp_path: Path) -> str:
    (found,) = (tmp_path / "out").glob("*.yaml")
    return found.name


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "ties over the model"])
@pytest.mark.parametrize("writes", [0, 1, 3, 5, 7, 9])
def test_a_resumed_merge_has_the_same_bytes(
    method: str,
    writes: int,
    models: tuple[list[Path], list[Tensors]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to the last of its ten writes: six of the large tensor, its scales, three of small ones."""
    monkeypatch.setattr(outputfile, "SYNC_BYTES", BLOCK)
    plan = recut(sm.plan(recipe_for(method, models[0]), memory=MEMORY), slots=6)
    whole = sm.merge(plan, tmp_path / "whole")
    interrupt_after(plan, tmp_path / "out", writes)

    manifest = sm.merge(plan, tmp_path / "out", resume=True)

    assert manifest.run.resumed
    assert manifest.tensors == whole.tensors
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert not verify_files(tmp_path / "out").damages


@pytest.mark.parametrize(
    "name", ["a.weight_scale_inv", "a.weight", "b.weight_scale_inv", "b.weight"]
)
def test_scales_or_codes_that_were_damaged_meanwhile_are_made_again(
    name: str,
    models: tuple[list[Path], list[Tensors]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outputfile, "SYNC_BYTES", 1)
    plan = recut(sm.plan(recipe_for("dare_linear", models[0]), memory=MEMORY), slots=6)
    whole = sm.merge(plan, tmp_path / "whole")
    interrupt_after(plan, tmp_path / "out", 9)
    (partial,) = tmp_path.glob("out.partial")
    task = next(task for task in plan.tasks if task.name == name)
    data = bytearray((partial / "model.safetensors").read_bytes())
    data[task.offset] ^= 1
    (partial / "model.safetensors").write_bytes(data)

    manifest = sm.merge(plan, tmp_path / "out", resume=True)

    assert manifest.run.damaged == 1
    assert manifest.tensors == whole.tensors
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "name", ["a.weight_scale_inv", "a.weight", "b.weight_scale_inv", "b.weight"]
)
def test_verify_names_what_is_not_the_result_of_the_recipe(
    name: str, models: tuple[list[Path], list[Tensors]], tmp_path: Path
) -> None:
    recipe = recipe_for("dare_linear", models[0])
    plan = sm.plan(recipe, memory=MEMORY)
    sm.merge(plan, tmp_path / "out")
    for seed in range(3):
        found = verify_against(recipe, tmp_path / "out", fraction=0.3, seed=seed, memory=MEMORY)
        assert not found.differing
    task = next(task for task in plan.tasks if task.name == name)
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[task.offset + 4] ^= 1
    file.write_bytes(data)

    assert [damage.name for damage in verify_files(tmp_path / "out").damages] == [file.name]
    found = verify_against(recipe, tmp_path / "out", fraction=1, memory=MEMORY)

    element = 4 // task.dtype.itemsize
    assert [(each.tensor, each.element) for each in found.differing] == [(name, element)]


def test_what_is_not_merged_is_copied_bit_for_bit(
    models: tuple[list[Path], list[Tensors]], tmp_path: Path
) -> None:
    """From the base, and from a source that stores it in the same way; another one's becomes codes."""
    paths, plain = models
    rules = [
        {"tensors": "a.weight", "copy": "base"},
        {"tensors": "b.weight", "copy": 0},
        {"tensors": "c.weight", "copy": 1},
    ]
    recipe = recipe_for("task_arithmetic", paths) | {"rules": rules}

    got = merged_by(sm.plan(recipe, memory=MEMORY), tmp_path / "out")

    base, first = (load_file(path / "model.safetensors") for path in paths[:2])
    for name in ("a.weight", "a.weight_scale_inv"):
        assert_same_bits(got[name], base[name])
    for name in ("b.weight", "b.weight_scale_inv"):
        assert_same_bits(got[name], first[name])
    weight, scale = quantise(plain[2]["c.weight"], (128, 128), E4M3, torch.float32)
    assert_same_bits(got["c.weight"], weight)
    assert_same_bits(got["c.weight_scale_inv"], scale)
    assert "1 weight(s) become F8_E4M3" in str(sm.plan(recipe, memory=MEMORY))


def test_scales_of_activations_are_the_base_s_and_the_plan_says_so(tmp_path: Path) -> None:
    stored, plain = model_of("one", 0)
    more = {"x.input_scale": torch.tensor(0.25), "attn.k_scale": torch.tensor([0.5])}
    gone = {"y.weight": stored["x.weight"].clone(), "y.weight_scale": torch.tensor(0.5)}
    gone["y.input_scale"] = torch.tensor(0.75)
    base = write(tmp_path / "base", stored | more | gone | {"attn.bias": torch.ones(3)})
    source = write(tmp_path / "tuned", plain | {"attn.bias": torch.ones(3)})
    recipe = {
        "method": "task_arithmetic",
        "base": str(base),
        "sources": [{"path": str(source)}],
        "rules": [{"tensors": "y.weight", "drop": True}],
        "output": AS_BASE,
    }
    plan = sm.plan(recipe, memory=MEMORY)

    got = merged_by(plan, tmp_path / "out")

    assert got.keys() == stored.keys() | more.keys() | {"attn.bias"}
    for name, tensor in more.items():
        assert_same_bits(got[name], tensor)
    assert "2 scale(s) of activations or caches are the base's, measured with its weights" in str(
        plan
    )


def test_weights_that_an_adapter_changes_become_codes_and_the_others_stay(tmp_path: Path) -> None:
    stored, plain = model_of("blocks", 0)
    other = {f"y{name[1:]}": t.clone() for name, t in stored.items() if name.startswith("x")}
    base = write(tmp_path / "base", stored | other, **config_of("blocks"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    a, b = torch.randn(4, BIG[1]) / 30, torch.randn(BIG[0], 4) / 30
    prefix = "base_model.model.x"
    save_file(
        {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["x"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    recipe = {
        "method": "task_arithmetic",
        "base": str(base),
        "sources": [{"path": str(adapter)}],
        "output": AS_BASE,
    }
    plan = sm.plan(recipe, memory=MEMORY)

    got = merged_by(plan, tmp_path / "out")
    again = merged_by(recut(plan, slots=2), tmp_path / "again")

    for name, tensor in other.items():
        assert_same_bits(got[name], tensor)
    merged = plain["x.weight"] + b @ a
    scale = quantise(merged, (128, 128), E4M3, torch.float32)[1]
    torch.testing.assert_close(got["x.weight_scale_inv"], scale, rtol=1e-5, atol=0)
    wide = spread(got["x.weight_scale_inv"], BIG, (128, 128))
    found = numbers(got["x.weight"], got["x.weight_scale_inv"], (128, 128))
    bound = torch.maximum(merged.abs() * 2.0**-4, wide * 2.0**-10) * (1 + 1e-4)
    assert ((found - merged).abs() <= bound).all()
    assert_same_model(again, got)


def test_transformers_loads_the_result_and_reads_the_same_numbers(tmp_path: Path) -> None:
    """A model whose blocks are cut off by its edges, loaded with what its config says of its codes."""
    config = Qwen3Config(
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=64,
    )
    said = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        path = tmp_path / f"qwen{seed}"
        Qwen3ForCausalLM(config).bfloat16().save_pretrained(path)
        stored: Tensors = {}
        for name, tensor in load_file(path / "model.safetensors").items():
            stored[name] = tensor
            if "proj" in name:
                codes, scale = quantise(tensor, (128, 128), E4M3, torch.float32)
                stored |= {name: codes, f"{name}_scale_inv": scale}
        save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
        document = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(document | {"quantization_config": said}))
        paths.append(path)
    recipe = {
        "method": "linear",
        "base": str(paths[0]),
        "sources": [{"path": str(path)} for path in paths],
        "output": AS_BASE,
    }
    got = merged_by(sm.plan(recipe, memory=MEMORY), tmp_path / "out")

    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        quantization_config=FineGrainedFP8Config(dequantize=True),
        dtype=torch.bfloat16,
    )

    loaded = model.state_dict()
    coded = [name for name in loaded if f"{name}_scale_inv" in got]
    assert len(coded) == 14
    for name in coded:
        expected = numbers(got[name], got[f"{name}_scale_inv"], (128, 128)).bfloat16()
        assert_same_bits(loaded[name], expected, name)


def test_a_single_file_stays_one(tmp_path: Path) -> None:
    stored, plain = model_of("one, E5M2", 0)
    base = tmp_path / "base.safetensors"
    save_file(stored, base)
    source = tmp_path / "tuned.safetensors"
    save_file({name: tensor.float() + 1 for name, tensor in plain.items()}, source)
    recipe = {
        "method": "linear",
        "base": str(base),
        "sources": [{"path": str(source)}],
        "output": AS_BASE,
    }

    sm.merge(recipe, tmp_path / "out.safetensors", memory=MEMORY)

    got = load_file(tmp_path / "out.safetensors")
    expected = expect("one, E5M2", plain["x.weight"] + 1, stored)
    assert_same_model(got, expected | {"norm.weight": plain["norm.weight"] + 1})


def _plain_base(directory: Path) -> dict[str, Any]:
    return {"base": str(write(directory / "plain", model_of("small", 0)[1]))}


def _packed_base(directory: Path) -> dict[str, Any]:
    packed = {
        "e.up_blocks": torch.zeros(2, 8, 2, 16, dtype=torch.uint8),
        "e.up_scales": torch.full((2, 8, 2), 127, dtype=torch.uint8),
    }
    path = str(write(directory / "packed", packed | model_of("small", 0)[0]))
    return {"base": path, "sources": [{"path": path}]}


def _torchao_base(directory: Path) -> dict[str, Any]:
    stored, _ = model_of("rows", 0)
    renamed = {
        "x._weight_qdata": stored["x.weight"],
        "x._weight_scale": stored["x.weight_scale"],
        "norm.weight": stored["norm.weight"],
    }
    return {"base": str(write(directory / "torchao", renamed))}


def _wider_source(directory: Path) -> dict[str, Any]:
    _, plain = model_of("small", 1)
    wider = torch.cat([plain["x.weight"], torch.zeros(2, SMALL[1])])
    path = write(directory / "wider", {"x.weight": wider, "norm.weight": plain["norm.weight"]})
    return {"sources": [{"path": str(path)}], "mismatch": "common", "method": "task_arithmetic"}


def _copied_wider_source(directory: Path) -> dict[str, Any]:
    document = _wider_source(directory)
    return {"sources": document["sources"], "rules": [{"tensors": "x.weight", "copy": 0}]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda _: {"base": None}, r'the recipe has no base .* add the key "base"'),
        (_plain_base, "stores no weight as float8 codes with scales"),
        (_packed_base, r"stores e\.up as MXFP4, and codes are only made in F8_E4M3 and F8_E5M2"),
        (_torchao_base, r"stores x\.weight as x\._weight_qdata, .*torchao"),
        (_wider_source, r"x\.weight is merged in part and taken in part"),
        (_copied_wider_source, r"\[70, 200\] in the base and comes to \[72, 200\]"),
        (lambda _: {"non_finite": "keep"}, "a block with NaN or infinity has no scale"),
        (
            lambda _: {"output": AS_BASE | {"companions": {"config": 0}}},
            "quantization_config that tells how to read codes is in the base's config",
        ),
        (lambda _: {"output": {"quantization": "fp8"}}, 'expected as base, got "fp8"'),
    ],
)
def test_what_cannot_be_is_refused_by_name(change: Any, says: str, tmp_path: Path) -> None:
    stored, plain = model_of("small", 0)
    recipe = {
        "method": "linear",
        "base": str(write(tmp_path / "base", stored, **config_of("blocks"))),
        "sources": [{"path": str(write(tmp_path / "tuned", plain))}],
        "output": AS_BASE,
    } | change(tmp_path)

    with pytest.raises(RecipeError) as caught:
        sm.plan({key: value for key, value in recipe.items() if value is not None}, memory=MEMORY)

    assert re.search(says, str(caught.value)), caught.value
    assert "output." in str(caught.value)


def test_peft_s_rounding_is_refused(tmp_path: Path) -> None:
    stored, _ = model_of("small", 0)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    factors = {"lora_A": torch.randn(4, SMALL[1]), "lora_B": torch.randn(SMALL[0], 4)}
    save_file(
        {f"base_model.model.x.{name}.weight": t for name, t in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["x"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    recipe = {
        "method": "task_arithmetic",
        "base": str(write(tmp_path / "base", stored)),
        "sources": [{"path": str(adapter)}],
        "parameters": {"rounding": "peft"},
        "output": AS_BASE,
    }

    with pytest.raises(RecipeError, match="PEFT merges into weights that are numbers"):
        sm.plan(recipe, memory=MEMORY)


def test_a_plan_whose_scales_were_edited_is_not_run(
    models: tuple[list[Path], list[Tensors]], tmp_path: Path
) -> None:
    plan = sm.plan(recipe_for("task_arithmetic", models[0]), memory=MEMORY)

    def edited(**change: Any) -> MergePlan:
        tasks = tuple(
            replace(task, encoding=replace(task.encoding, **change)) if task.encoding else task
            for task in plan.tasks
        )
        return replace(plan, tasks=tasks)

    changes: list[dict[str, Any]] = [
        {"scales": "gone"},
        {"columns": 7},
        {"block": (0, 128)},
        {"matrix_scales": 5},
        {"scale_dtype": DType.BOOL},
    ]
    for change in changes:
        with pytest.raises(PlanError, match="plan again"):
            sm.merge(edited(**change), tmp_path / "out")


def test_a_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    stored, plain = model_of("blocks", 0)
    base = write(tmp_path / "base", stored, **config_of("blocks"))
    broken = plain["x.weight"].clone()
    broken[1000, 7] = float("nan")
    source = write(tmp_path / "tuned", plain | {"x.weight": broken})
    recipe = {
        "method": "linear",
        "base": str(base),
        "sources": [{"path": str(source)}],
        "output": AS_BASE,
    }

    with pytest.raises(CheckpointError, match=r"x\.weight: .* holds nan at element \[1000, 7\]"):
        sm.merge(recut(sm.plan(recipe, memory=MEMORY), slots=2), tmp_path / "out")
