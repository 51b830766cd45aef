"""Codes that need scales are found by what stands beside them, and refused with the way out."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path

import pytest
import torch
from rawfiles import RawTensor, write_shard
from safetensors.torch import save_file

from streammerge.checkpoint.quantised import check_not_quantized, find_scales
from streammerge.checkpoint.reading import read_checkpoint
from streammerge.checkpoint.types import TensorEntry
from streammerge.dtypes import DType
from streammerge.errors import QuantizedCheckpointError

A = torch.arange(6.0).reshape(2, 3)
B = torch.arange(5).to(torch.bfloat16)
TENSORS = {"a.weight": A, "b.weight": B}
F8, E8 = DType.F8_E4M3, DType.F8_E8M0


def entries(**tensors: tuple[DType, tuple[int, ...]]) -> dict[str, TensorEntry]:
    return {
        name.replace("__", "."): TensorEntry(name.replace("__", "."), dtype, shape, 0, 0)
        for name, (dtype, shape) in tensors.items()
    }


# --- scales


@pytest.mark.parametrize(
    ("codes", "scale", "dtype", "shape"),
    [
        # Mistral native
        ("layers.0.wq.weight", "layers.0.wq.qscale_weight", DType.F32, ()),
        # DeepSeek, and V4
        ("layers.0.wq.weight", "layers.0.wq.scale", DType.F32, (1, 2)),
        ("layers.0.wq.weight", "layers.0.wq.scale", E8, (1, 2)),
        # DeepSeek-V3 as transformers has it
        ("layers.0.wq.weight", "layers.0.wq.weight_scale_inv", DType.F32, (1, 2)),
        # compressed-tensors: per channel
        ("layers.0.wq.weight", "layers.0.wq.weight_scale", DType.BF16, (8, 1)),
        # ComfyUI
        ("layers.0.wq.weight", "layers.0.wq.scale_weight", DType.F16, (1,)),
        # torchao
        ("layers.0.wq._weight_qdata", "layers.0.wq._weight_scale", DType.F32, (8, 1)),
        ("layers.0.wq.weight_qdata", "layers.0.wq.weight_scale", DType.F32, (8, 1)),
        # stacks of experts
        ("experts.gate_up_proj", "experts.gate_up_proj.weight_scale", DType.F32, (2, 1)),
        ("experts.gate_up_proj", "experts.gate_up_proj_scale_inv", DType.F32, (2, 1)),
        ("experts.gate_up_proj", "experts.gate_up_proj_scale", E8, (2, 1)),
        # modelopt and its like
        ("layers.0.wq.weight", "layers.0.wq.weight_quantizer._amax", DType.F32, ()),
        ("layers.0.wq.weight", "layers.0.wq.weight_quantizer._scale", DType.F32, ()),
        ("layers.0.wq.weight", "layers.0.wq.scale_b", DType.F32, (8, 1)),
        ("layers.0.wq.weight", "layers.0.wq.weight_amax", DType.F64, ()),
        # exponents in bytes
        ("layers.0.wq.weight", "layers.0.wq.weight_scale", DType.U8, (8, 2)),
        # no module at all, and nobody's spelling yet
        ("weight", "scale", DType.F32, ()),
        ("w", "theScaleOf", DType.F32, ()),
    ],
)
def test_a_scale_is_found_by_where_it_is_and_what_its_name_holds(
    codes: str, scale: str, dtype: DType, shape: tuple[int, ...]
) -> None:
    tensors = {
        codes: TensorEntry(codes, F8, (8, 64), 0, 0),
        scale: TensorEntry(scale, dtype, shape, 0, 0),
        "norm.weight": TensorEntry("norm.weight", DType.BF16, (8,), 0, 0),
    }

    found = find_scales(tensors)

    assert found.keys() == {codes}
    assert found[codes].weight is tensors[codes]
    assert found[codes].scale is tensors[scale]
    assert found[codes].others == ()


@pytest.mark.parametrize(
    "beside",
    [
        # of attention's keys and values
        "self_attn.k_scale",
        "self_attn.v_scale",
        "self_attn.kv_scale",
        "self_attn.q_scale",
        "self_attn.prob_output_scale",
        # in another module
        "other.weight_scale",
        "self_attn.o_proj.weight_scale",
        "weight_scale",
        # learned
        "self_attn.logit_scale",
        "self_attn.scale_shift_table",
        "self_attn.layer_scale1",
        # of another tensor in the module
        "self_attn.bias_scale",
        # no scale by name
        "self_attn.gain",
    ],
)
def test_what_is_no_scale_of_a_weight_is_left_alone(beside: str) -> None:
    tensors = entries(
        self_attn__qkv=(F8, (8, 64)),
        self_attn__bias=(DType.BF16, (8,)),
        self_attn__gate=(F8, (8, 8)),
    )
    tensors[beside] = TensorEntry(beside, DType.F32, (1,), 0, 0)

    assert find_scales(tensors) == {}


def test_a_scale_that_bears_a_name_belongs_to_it_alone() -> None:
    tensors = entries(
        experts__up=(F8, (2, 8, 8)),
        experts__up_gate=(F8, (2, 8, 8)),
        experts__down=(F8, (2, 8, 8)),
        experts__up_scale=(DType.F32, (2,)),
        experts__up_gate_scale=(DType.F32, (2,)),
    )

    found = find_scales(tensors)

    assert {name: each.scale and each.scale.name for name, each in found.items()} == {
        "experts.up": "experts.up_scale",
        "experts.up_gate": "experts.up_gate_scale",
    }


def test_the_scale_of_the_weight_comes_before_those_of_activations() -> None:
    tensors = entries(
        x__input_scale=(DType.F32, ()),
        x__weight=(F8, (8, 8)),
        x__k_scale=(DType.F32, ()),
        x__weight_scale=(DType.F32, ()),
        x__weight_scale_2=(DType.F32, ()),
        x__bias=(F8, (8,)),
        y__weight=(F8, (8, 8)),
        y__act_scale=(DType.F32, ()),
    )

    found = find_scales(tensors)

    assert found.keys() == {"x.weight", "y.weight"}
    assert found["x.weight"].scale is tensors["x.weight_scale"]
    assert found["x.weight"].others == (tensors["x.weight_scale_2"], tensors["x.input_scale"])
    assert found["y.weight"].scale is None
    assert found["y.weight"].others == (tensors["y.act_scale"],)


@pytest.mark.parametrize("dtype", [DType.I8, DType.U8])
def test_integers_are_codes_where_a_scale_says_so(dtype: DType) -> None:
    tensors = entries(
        experts__w1=(dtype, (2, 8, 8)),
        experts__w1_scale=(DType.F32, (2,)),
        attn__mask=(dtype, (8, 8)),
        attn__scale=(DType.F32, ()),
        v4__codes=(dtype, (8, 8)),
        v4__scale=(E8, (8, 1)),
    )

    assert find_scales(tensors).keys() == {"experts.w1", "v4.codes"}


def test_wide_weights_have_no_scales() -> None:
    tensors = entries(x__weight=(DType.BF16, (8, 8)), x__weight_scale=(DType.F32, ()))

    assert find_scales(tensors) == {}


def test_the_scale_and_the_bias_of_a_layer_norm_are_no_pair() -> None:
    tensors = entries(norm__bias=(F8, (8,)), norm__scale=(DType.F32, (8,)))

    assert find_scales(tensors) == {}


def test_finding_scales_takes_time_in_proportion() -> None:
    """One module of 40,000 tensors would take minutes if each scale were held against each weight."""
    tensors = entries(
        **{f"m__w_{i}": (F8, (2, 2)) for i in range(20_000)},
        **{f"m__w_{i}_scale": (DType.F32, ()) for i in range(20_000)},
    )
    begin = time.process_time()

    found = find_scales(tensors)

    assert time.process_time() - begin < 3
    assert all(each.scale is tensors[f"{name}_scale"] for name, each in found.items())
    assert len(found) == 20_000


@pytest.mark.parametrize("dtype", ["F32", "F8_E8M0"])
def test_the_quantised_refusal_comes_before_that_of_a_type(dtype: str, tmp_path: Path) -> None:
    """It names both tensors, and never proposes to do without the scale."""
    size = 4 if dtype == "F32" else 1
    tensors: dict[str, RawTensor] = {
        "layers.0.wq.scale": (dtype, [1, 2], bytes(2 * size)),
        "layers.0.wq.weight": ("F8_E4M3", [2, 4], bytes(8)),
    }
    write_shard(tmp_path / "model.safetensors", tensors)

    with pytest.raises(QuantizedCheckpointError) as caught:
        check_not_quantized(read_checkpoint(tmp_path))

    message = str(caught.value)
    assert (
        f"'layers.0.wq.weight' is F8_E4M3 scaled by 'layers.0.wq.scale' ({dtype} [1, 2])" in message
    )
    assert "drop" not in message


# --- the way out


@pytest.mark.parametrize(
    ("method", "essentials"),
    [
        ("gptq", ["pip install gptqmodel", "from gptqmodel.utils.model_dequant import"]),
        ("awq", ["pip install gptqmodel", "dequantize_model("]),
        (
            "bitsandbytes",
            [".dequantize().save_pretrained(o)", "transformers accelerate bitsandbytes"],
        ),
        ("compressed-tensors", ["CompressedTensorsConfig(dequantize=True)"]),
        ("fp8", ["FineGrainedFP8Config(dequantize=True)"]),
        ("mxfp4", ["Mxfp4Config(dequantize=True)"]),
    ],
)
def test_the_command_is_one_that_a_shell_and_python_take(
    method: str, essentials: list[str], tmp_path: Path
) -> None:
    directory = tmp_path / 'a model\'s "folder"'
    directory.mkdir()
    save_file(TENSORS, directory / "model.safetensors")
    (directory / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": method}})
    )

    with pytest.raises(QuantizedCheckpointError) as caught:
        check_not_quantized(read_checkpoint(directory))

    message = str(caught.value)
    assert f"({method})" in message
    assert all(essential in message for essential in essentials)
    command = message[message.index("python -c ") :].removesuffix(
        " (if they are already, delete the entry)"
    )
    program, option, code = shlex.split(command)
    assert (program, option) == ("python", "-c")
    compile(code, "command", "exec")
    assert json.dumps(str(directory)) in code
    assert json.dumps(f"{directory}-bf16") in code


def test_transformers_has_what_the_commands_call() -> None:
    transformers = pytest.importorskip("transformers")

    for name in ("FineGrainedFP8Config", "Mxfp4Config"):
        assert getattr(transformers, name)(dequantize=True).dequantize is True
    assert hasattr(transformers, "CompressedTensorsConfig")
    assert callable(transformers.PreTrainedModel.dequantize)


def test_a_gguf_file_is_refused_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"GGUF\3\0\0\0" + bytes(100))

    with pytest.raises(QuantizedCheckpointError) as caught:
        read_checkpoint(tmp_path)

    assert 'gguf_file="model.safetensors"' in str(caught.value)


# --- what is refused


def check_quantized(
    directory: Path,
    tensors: dict[str, torch.Tensor],
    *essentials: str,
    config: dict[str, object] | None = None,
) -> None:
    save_file(tensors, directory / "model.safetensors")
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    checkpoint = read_checkpoint(directory)
    if not essentials:
        check_not_quantized(checkpoint)
        return
    with pytest.raises(QuantizedCheckpointError) as caught:
        check_not_quantized(checkpoint)
    for essential in (*essentials, "dequantise the model first", "bfloat16"):
        assert re.search(re.escape(essential), str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("config", "essentials"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, ["gptq", "config.json"]),
        ({"quantization_config": {"load_in_4bit": True}}, ["no quant_method given"]),
        (
            {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
            ["text_config.quantization_config", "fp8"],
        ),
    ],
)
def test_quantized_config_is_refused(
    config: dict[str, object], essentials: list[str], tmp_path: Path
) -> None:
    check_quantized(tmp_path, TENSORS, *essentials, config=config)


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": None}, {"text_config": {"hidden_size": 3}}]
)
def test_config_without_quantization_passes(config: dict[str, object], tmp_path: Path) -> None:
    check_quantized(tmp_path, TENSORS, config=config)


@pytest.mark.parametrize(
    "name",
    [
        "layer.qweight",
        "layer.qzeros",
        "layer.g_idx",
        "layer.weight.absmax",
        "layer.weight.nested_absmax",
        "layer.weight.quant_map",
        "layer.weight.nested_quant_map",
        "layer.weight.quant_state.bitsandbytes__nf4",
        "layer.weight_packed",
        "layer.SCB",
        "layer.W_q",
    ],
)
def test_name_of_a_packed_weight_is_refused(name: str, tmp_path: Path) -> None:
    check_quantized(tmp_path, {name: A}, repr(name))


@pytest.mark.parametrize(
    ("dtype", "code"),
    [(torch.uint8, "U8"), (torch.int8, "I8"), (torch.int32, "I32"), (torch.uint32, "U32")],
)
def test_integer_weight_is_refused(dtype: torch.dtype, code: str, tmp_path: Path) -> None:
    check_quantized(
        tmp_path, {"layer.weight": torch.zeros(2, dtype=dtype)}, "'layer.weight'", f"dtype {code}"
    )


def test_packed_blocks_with_scales_are_refused(tmp_path: Path) -> None:
    """MXFP4 as in gpt-oss."""
    packed = torch.zeros(2, dtype=torch.uint8)
    tensors = {"experts.down_proj_blocks": packed, "experts.down_proj_scales": packed.clone()}
    check_quantized(tmp_path, tensors, "'experts.down_proj_blocks'", "'experts.down_proj_scales'")


@pytest.mark.parametrize(
    ("name", "companion"),
    [
        ("layer.weight", "layer.weight_scale"),
        ("layer.weight", "layer.weight_scale_inv"),
        ("layer.weight", "layer.input_scale"),
        ("layer.weight", "layer.scale_weight"),
        ("weight", "input_scale"),
        ("experts.down_proj", "experts.down_proj_scale"),
        ("experts.down_proj", "experts.down_proj_scale_inv"),
    ],
)
def test_float8_with_a_scale_is_refused(name: str, companion: str, tmp_path: Path) -> None:
    tensors = {name: A.to(torch.float8_e4m3fn), companion: torch.ones(())}
    check_quantized(tmp_path, tensors, repr(name), repr(companion), "F8_E4M3")


def test_float8_without_a_scale_passes(tmp_path: Path) -> None:
    check_quantized(tmp_path, {"layer.weight": A.to(torch.float8_e4m3fn), "b.weight_scale": B})


def test_scale_of_a_wide_weight_passes(tmp_path: Path) -> None:
    check_quantized(tmp_path, {"layer.weight": A, "layer.input_scale": torch.ones(())})


def test_integer_buffers_pass(tmp_path: Path) -> None:
    tensors = {
        "embeddings.position_ids": torch.arange(3),
        "norm.num_batches_tracked": torch.tensor(3),
        "attention.mask": torch.ones(3, dtype=torch.uint8),
        "table.weight": torch.arange(3),
    }
    check_quantized(tmp_path, tensors)
