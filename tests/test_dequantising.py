"""Models whose weights are float8 codes with scales merge as the numbers that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import streammerge as sm
from streammerge.errors import QuantizedCheckpointError
from tests.models import assert_same_bits, tight_plan

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
Tensors = dict[str, Tensor]


def codes(shape: tuple[int, ...], seed: int, dtype: torch.dtype = E4M3) -> Tensor:
    """Return random codes of finite numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul_(20).to(dtype)


def scales(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator).mul_(0.02).add_(1e-3).to(dtype)


def spread(scale: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Return the scale of every element of a matrix."""
    wide = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]]


SHAPE = (300, 520)
"""More than two blocks of 65,536 elements, and no multiple of 128."""
CASES: dict[str, tuple[Tensors, dict[str, Any], dict[str, Tensor]]] = {}


def case(
    name: str,
    weight: Tensor,
    key: str,
    scale: Tensor,
    wide: Tensor,
    *,
    at: str = "x.weight",
    **config: Any,
) -> None:
    stored = {at: weight, key: scale, "norm.weight": torch.linspace(0.5, 1.5, 16).bfloat16()}
    plain = {"x.weight": weight.float() * wide, "norm.weight": stored["norm.weight"]}
    CASES[name] = (stored, config, plain)


fine = scales((3, 5), 1)
case("blocks", codes(SHAPE, 0), "x.weight_scale_inv", fine, spread(fine, SHAPE, (128, 128)))
case(
    "blocks, told",
    codes(SHAPE, 0),
    "x.weight_scale_inv",
    scales((5, 9), 1),
    spread(scales((5, 9), 1), SHAPE, (64, 64)),
    quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]},
)
one = scales((1,), 2)
case("one scale", codes(SHAPE, 0), "x.weight_scale", one, one)
case("one scale, ComfyUI", codes(SHAPE, 0, E5M2), "x.scale_weight", one[0], one)
case("one scale, Mistral", codes(SHAPE, 0), "x.qscale_weight", one[0], one)
rows = scales((300, 1), 3, torch.bfloat16)
case("a scale per row", codes(SHAPE, 0), "x.weight_scale", rows, rows.float())
case("a scale per row, flat", codes(SHAPE, 0), "x.weight_scale", rows[:, 0], rows.float())
powers = torch.arange(100, 100 + 300 * 17).remainder(30).add(110).to(torch.uint8).view(300, 17)
case(
    "powers of two per 32",
    codes((300, 544), 0),
    "x.scale",
    powers.view(E8M0),
    spread(powers.view(E8M0), (300, 544), (1, 32)),
)
case("torchao", codes(SHAPE, 0), "x._weight_scale", rows, rows.float(), at="x._weight_qdata")


def write(path: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    path.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors"
    )
    (path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", **config}))
    return path


def merge(directory: Path, base: Path, source: Path, **more: Any) -> Tensors:
    recipe = {
        "method": "task_arithmetic",
        "base": str(base),
        "sources": [{"path": str(source), "weight": 0.5}],
        **more,
    }
    sm.merge(recipe, directory / "out", memory="4GiB")
    return load_file(directory / "out" / "model.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_codes_merge_as_the_numbers_that_they_stand_for(name: str, tmp_path: Path) -> None:
    stored, config, plain = CASES[name]
    base = write(tmp_path / "base", stored, config)
    tuned = {key: tensor.float() + 0.25 for key, tensor in plain.items()}
    source = write(tmp_path / "tuned", tuned, {})

    got = merge(tmp_path, base, source)

    # float32 throughout, rounded once at the end.
    expected = {
        key: (tensor.float() + 0.5 * (tuned[key] - tensor.float())).bfloat16()
        for key, tensor in plain.items()
    }
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_same_bits(got[key], tensor)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written


def test_two_models_of_codes_merge_and_the_plan_says_so(tmp_path: Path) -> None:
    """Their scales differ by three, so that raw codes would be far from the truth."""
    weight, scale = codes(SHAPE, 0), scales((3, 5), 1)
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    base = write(tmp_path / "base", {"x.weight": weight, "x.weight_scale_inv": scale}, quantised)
    other = {"x.weight": codes(SHAPE, 7), "x.scale": scale * 3}
    source = write(tmp_path / "tuned", other, {})

    got = merge(tmp_path, base, source, output={"dtype": "float32"})

    wide = spread(scale, SHAPE, (128, 128))
    first, second = (
        weight.float() * wide,
        other["x.weight"].float() * spread(scale * 3, SHAPE, (128, 128)),
    )
    assert_same_bits(got["x.weight"], first + 0.5 * (second - first))
    recipe = {"method": "linear", "sources": [{"path": str(base)}, {"path": str(source)}]}
    text = str(sm.plan(recipe))
    assert "1 weight(s) are F8_E4M3 codes with scales, read as the numbers they stand for" in text


@pytest.mark.parametrize("scale_shape", [(3,), (3, 1, 1), (3, 40, 1), (3, 2, 3)])
def test_stacks_of_experts_have_scales_per_expert(
    scale_shape: tuple[int, ...], tmp_path: Path
) -> None:
    shape = (3, 40, 260) if scale_shape != (3, 2, 3) else (3, 200, 260)
    weight, scale = codes(shape, 0), scales(scale_shape, 1)
    stored = {"experts.up_proj": weight, "experts.up_proj.weight_scale": scale}
    if scale_shape == (3, 2, 3):
        wide = torch.stack([spread(each, (200, 260), (128, 128)) for each in scale])
    else:
        wide = scale.reshape(3, -1, 1)
    base = write(tmp_path / "base", stored, {})
    source = write(tmp_path / "tuned", {"experts.up_proj": torch.zeros(shape)}, {})

    got = merge(tmp_path, base, source)

    plain = weight.float() * wide
    assert_same_bits(got["experts.up_proj"], (plain + 0.5 * (0 - plain)).bfloat16())


@pytest.mark.parametrize("tight", [True, False])
@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_how_codes_are_cut_changes_no_bit(method: str, tmp_path: Path, *, tight: bool) -> None:
    shape = (1100, 1300)
    weight, scale = codes(shape, 0), scales((9, 11), 1)
    base = write(tmp_path / "base", {"x.weight": weight, "x.weight_scale_inv": scale}, {})
    plain = write(
        tmp_path / "plain", {"x.weight": weight.float() * spread(scale, shape, (128, 128))}, {}
    )
    tuned = write(
        tmp_path / "tuned", {"x.weight": codes(shape, 5), "x.weight_scale_inv": scale}, {}
    )
    results = []
    for index, first in enumerate((base, plain)):
        recipe = {
            "method": method,
            "base": str(first),
            "sources": [{"path": str(tuned)}],
            "parameters": {"density": 0.3},
            "output": {"dtype": "float32"},
        }
        planned = tight_plan(recipe) if tight else sm.plan(recipe, memory="4GiB")
        sm.merge(planned, tmp_path / f"out{index}")
        results.append((tmp_path / f"out{index}" / "model.safetensors").read_bytes())
    assert results[0] == results[1]


def test_copies_of_codes_are_numbers_too(tmp_path: Path) -> None:
    stored, config, plain = CASES["blocks"]
    base = write(tmp_path / "base", stored, config)
    source = write(tmp_path / "tuned", {"norm.weight": plain["norm.weight"]}, {})

    got = merge(tmp_path, base, source, missing="base")

    assert_same_bits(got["x.weight"], plain["x.weight"].bfloat16())


def test_codes_that_an_adapter_changes(tmp_path: Path) -> None:
    stored, config, plain = CASES["a scale per row"]
    base = write(tmp_path / "base", stored, config)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    a, b = torch.randn(4, 520), torch.randn(300, 4)
    prefix = "base_model.model.x"
    save_file(
        {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["x"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))

    got = merge(tmp_path, base, adapter, output={"dtype": "float32"})

    expected = plain["x.weight"] + 0.5 * (b @ a)
    torch.testing.assert_close(got["x.weight"], expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"x.weight_quantizer._amax": torch.ones(1)}, "no scale that codes are multiplied by"),
        ({"x.scale_b": torch.ones(1)}, "no scale that codes are multiplied by"),
        (
            {"x.weight_scale": torch.ones(7, 3)},
            r"\[7, 3\] does not say which codes of \[300, 520\]",
        ),
        ({"x.weight_scale": torch.ones(1), "x.weight_scale_2": torch.ones(1)}, "as well"),
    ],
)
def test_scales_that_are_not_understood_are_refused(
    more: Tensors, says: str, tmp_path: Path
) -> None:
    base = write(tmp_path / "base", {"x.weight": codes(SHAPE, 0), **more}, {})

    with pytest.raises(QuantizedCheckpointError, match=says):
        sm.plan({"method": "linear", "sources": [{"path": str(base)}]})


@pytest.mark.parametrize("tight", [True, False])
@pytest.mark.parametrize(("rows", "groups"), [(96, 2), (700, 40), (8, 9)])
def test_four_bit_stacks_are_what_transformers_make_of_them(
    rows: int, groups: int, tmp_path: Path, *, tight: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, rows, groups, 16), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(110, 130, (3, rows, groups), generator=generator, dtype=torch.uint8)
    place = "model.layers.0.mlp.experts.gate_up_proj"
    bias = torch.ones(3, rows, dtype=torch.bfloat16)
    stored = {f"{place}_blocks": blocks, f"{place}_scales": exponents, f"{place}_bias": bias}
    config = {"quantization_config": {"quant_method": "mxfp4"}, "model_type": "gpt_oss"}
    base = write(tmp_path / "base", stored, config)
    plain = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)
    tuned = plain + torch.randn(plain.shape, generator=generator)
    source = write(tmp_path / "tuned", {place: tuned, f"{place}_bias": bias}, {})
    recipe = {
        "method": "task_arithmetic",
        "base": str(base),
        "sources": [{"path": str(source), "weight": 0.5}],
    }
    planned = tight_plan(recipe) if tight else sm.plan(recipe, memory="4GiB")
    sm.merge(planned, tmp_path / "out")

    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == {place, f"{place}_bias"}
    assert_same_bits(got[place], (plain + 0.5 * (tuned - plain)).bfloat16())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
