"""PEFT's other kinds of adapters equal its own merge_and_unload: LoHa, LoKr, OFT, BOFT, HRA, VeRA, VB-LoRA.

Sums equal it bit for bit in every type. What multiplies the base is computed here in float64 and
rounded once, in PEFT in float32 step by step: those differ by roundings, and are compared with the
formulas in float64 too.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MEMORY, Models, assert_same_model, recut
from peft import (
    BOFTConfig,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftModel,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import streammerge
from streammerge.adapters.files.reading import read_adapter
from streammerge.adapters.onto_base.cayley import make_butterfly
from streammerge.errors import (
    MissingTensorError,
    RecipeError,
    ShapeMismatchError,
    StreamMergeError,
    UnsupportedAdapterError,
)
from tests.adapters.onto_base.test_baking_layers import saved
from tests.adapters.tiny import convnet, gpt2, llama, read_config, rewrite

LINEAR = ["q_proj", "v_proj", "down_proj"]
Make = Callable[[], nn.Module]
Case = tuple[Make, Any, dict[str, Any]]

SUMS: dict[str, Case] = {
    "loha": (llama, LoHaConfig, {"r": 3, "alpha": 5, "target_modules": LINEAR}),
    "loha patterns": (
        llama,
        LoHaConfig,
        {
            "r": 3,
            "alpha": 5,
            "target_modules": LINEAR,
            "rank_pattern": {"v_proj": 6},
            "alpha_pattern": {"q_proj": 2},
        },
    ),
    "loha saved module": (
        llama,
        LoHaConfig,
        {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "lokr": (llama, LoKrConfig, {"r": 2, "alpha": 3, "target_modules": LINEAR}),
    "lokr both": (
        llama,
        LoKrConfig,
        {"r": 1, "target_modules": LINEAR, "decompose_both": True, "decompose_factor": 4},
    ),
    # Whole factors are scaled all the same.
    "lokr whole": (llama, LoKrConfig, {"r": 32, "alpha": 5, "target_modules": LINEAR}),
    "vera": (llama, VeraConfig, {"r": 5, "target_modules": LINEAR}),
    "vera transposed": (
        gpt2,
        VeraConfig,
        {"r": 5, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
    ),
    "vblora": (
        llama,
        VBLoRAConfig,
        {"r": 3, "target_modules": LINEAR, "num_vectors": 20, "vector_length": 8, "topk": 3},
    ),
    "vblora transposed": (
        gpt2,
        VBLoRAConfig,
        {
            "r": 3,
            "target_modules": ["c_attn"],
            "num_vectors": 300,
            "vector_length": 8,
            "fan_in_fan_out": True,
        },
    ),
}
CONVOLUTIONS: dict[str, Case] = {
    f"{name}, {how}": (
        convnet,
        kind,
        {"r": 2, "target_modules": targets, "use_effective_conv2d": tucker},
    )
    for name, kind, targets in (
        ("loha", LoHaConfig, ["conv1d", "conv2d", "point"]),
        ("lokr", LoKrConfig, ["conv2d", "point"]),
    )
    for how, tucker in (("flat", False), ("tucker", True))
}
TOPK: dict[str, Case] = {
    "vblora topk": (
        llama,
        VBLoRAConfig,
        {
            "r": 3,
            "target_modules": LINEAR,
            "num_vectors": 20,
            "vector_length": 8,
            "topk": 3,
            "save_only_topk_weights": True,
        },
    )
}
PRODUCTS: dict[str, Case] = {
    "oft": (llama, OFTConfig, {"oft_block_size": 8, "target_modules": LINEAR}),
    "oft exact": (
        llama,
        OFTConfig,
        {"r": 2, "oft_block_size": 0, "target_modules": LINEAR, "use_cayley_neumann": False},
    ),
    "oft terms": (
        llama,
        OFTConfig,
        {"oft_block_size": 4, "target_modules": LINEAR, "num_cayley_neumann_terms": 7},
    ),
    "oft shared": (
        llama,
        OFTConfig,
        {"oft_block_size": 8, "target_modules": LINEAR, "block_share": True},
    ),
    "oft constrained": (
        llama,
        OFTConfig,
        {"oft_block_size": 8, "target_modules": LINEAR, "coft": True, "eps": 0.9},
    ),
    "oft convolution": (convnet, OFTConfig, {"oft_block_size": 3, "target_modules": ["conv2d"]}),
    "oft embedding": (convnet, OFTConfig, {"oft_block_size": 3, "target_modules": ["embed"]}),
    "boft": (llama, BOFTConfig, {"boft_block_size": 4, "target_modules": LINEAR}),
    "boft odd blocks": (
        llama,
        BOFTConfig,
        {"boft_block_size": 0, "boft_block_num": 16, "target_modules": ["down_proj"]},
    ),
    "hra": (llama, HRAConfig, {"r": 5, "target_modules": LINEAR}),
    "hra orthogonal": (llama, HRAConfig, {"r": 4, "target_modules": LINEAR, "apply_GS": True}),
    "hra convolution": (convnet, HRAConfig, {"r": 3, "target_modules": ["conv2d", "point"]}),
}


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_adapter(path: Path, case: Case, *, seed: int = 1) -> Path:
    """Save an adapter of the case with random values, and return ``path``."""
    make, kind, options = case
    torch.manual_seed(seed)
    with quiet():
        options = {"init_weights": False} | options if kind is not VBLoRAConfig else options
        tuned = get_peft_model(make(), kind(**options))
        for name, parameter in tuned.named_parameters():
            if "vera_lambda" in name or "vblora_" in name or "modules_to_save" in name:
                nn.init.normal_(parameter, std=0.3)
        tuned.save_pretrained(path)
    return path


def bake(
    directory: Path, case: Case, dtype: torch.dtype, rounding: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what this project and what PEFT make of the base."""
    base = saved(case[0]().to(dtype), directory / "base")
    adapter = make_adapter(directory / "a", case)
    recipe = {
        "method": "task_arithmetic",
        "base": str(base),
        "sources": [{"path": str(adapter)}],
        "parameters": {"rounding": rounding},
    }
    streammerge.merge(recipe, directory / "out")
    with quiet():
        expected = PeftModel.from_pretrained(case[0]().to(dtype), adapter).merge_and_unload()
    return load_file(directory / "out" / "model.safetensors"), expected.state_dict()


def assert_changed(got: dict[str, Tensor], case: Case) -> None:
    before = case[0]().state_dict()
    changed = [
        name
        for name, tensor in got.items()
        if not torch.equal(tensor.float(), before[name].to(tensor.dtype).float())
    ]
    assert changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["once", "peft"])
@pytest.mark.parametrize("case", SUMS)
def test_sums_equal_merge_and_unload(
    tmp_path: Path, case: str, rounding: str, dtype: torch.dtype
) -> None:
    got, expected = bake(tmp_path, SUMS[case], dtype, rounding)

    assert_changed(got, SUMS[case])
    for name, tensor in got.items():
        if rounding == "once":
            # torch adds the terms of a product in another order.
            close = (32 if dtype is torch.float32 else 1) * torch.finfo(dtype).eps
            torch.testing.assert_close(tensor, expected[name], rtol=close, atol=close, msg=name)
        else:
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CONVOLUTIONS | TOPK)
def test_convolutions_and_stored_weights_equal_merge_and_unload_but_for_roundings(
    tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    """PEFT contracts the cores in another order, and takes logarithms of weights and back."""
    got, expected = bake(tmp_path, (CONVOLUTIONS | TOPK)[case], dtype, "peft")

    assert_changed(got, (CONVOLUTIONS | TOPK)[case])
    eps = torch.finfo(dtype).eps
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["once", "peft"])
@pytest.mark.parametrize("case", PRODUCTS)
def test_what_multiplies_the_base_equals_merge_and_unload_but_for_roundings(
    tmp_path: Path, case: str, rounding: str, dtype: torch.dtype
) -> None:
    got, expected = bake(tmp_path, PRODUCTS[case], dtype, rounding)

    assert_changed(got, PRODUCTS[case])
    for name, tensor in got.items():
        scale = float(expected[name].abs().max())
        # In float32 a rotation is a sum of as many terms as a block has rows, each rounded.
        bound = 32 * torch.finfo(torch.float32).eps * scale
        eps = torch.finfo(dtype).eps if dtype is not torch.float32 else 0.0
        torch.testing.assert_close(tensor, expected[name], rtol=eps, atol=bound, msg=name)


# -- formulas in float64, on tensors of more than a block whose ends lie inside of what is rotated

ROWS, COLUMNS = 131, 1530
BLOCKS, SIZE = 15, 102


def write_tuned(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    path.mkdir()
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()},
        path / "adapter_model.safetensors",
    )
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def skew(triangles: Tensor, size: int) -> Tensor:
    made = torch.zeros(len(triangles), size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    made[:, rows, columns] = triangles.double()
    return made - made.mT


def cayley(matrix: Tensor) -> Tensor:
    identity = torch.eye(matrix.shape[-1], dtype=torch.float64)
    return (identity - matrix) @ torch.linalg.inv(identity + matrix)


def neumann(matrix: Tensor, terms: int) -> Tensor:
    made = torch.eye(matrix.shape[-1], dtype=torch.float64) + torch.zeros_like(matrix)
    for power in range(1, terms):
        factor = 1 if power == terms - 1 > 1 else 2
        made = made + factor * torch.linalg.matrix_power(matrix, power)
    return made


def reflected(vectors: Tensor) -> Tensor:
    made = torch.eye(len(vectors), dtype=torch.float64)
    for vector in vectors.double().T:
        unit = vector / vector.norm()
        made = made @ (torch.eye(len(vectors), dtype=torch.float64) - 2 * torch.outer(unit, unit))
    return made


def oft_case(terms: int) -> tuple[dict[str, Tensor], dict[str, Any], Callable[[Tensor], Tensor]]:
    triangles = torch.randn(BLOCKS, SIZE * (SIZE - 1) // 2) / 16
    config = {
        "peft_type": "OFT",
        "oft_block_size": SIZE,
        "use_cayley_neumann": bool(terms),
        "num_cayley_neumann_terms": terms or 5,
        "peft_version": "0.21.2",
    }
    matrix = skew(triangles, SIZE)
    rotation = torch.block_diag(*(neumann(matrix, terms) if terms else cayley(matrix)))
    return {"q.oft_R.weight": triangles}, config, lambda base: base @ rotation.T


def boft_case() -> tuple[dict[str, Tensor], dict[str, Any], Callable[[Tensor], Tensor]]:
    raw, scale = torch.randn(1, BLOCKS, SIZE, SIZE) / 16, torch.rand(ROWS, 1) + 0.5
    rotation = torch.block_diag(*cayley((raw[0].double() - raw[0].double().mT) / 2))
    tensors = {"q.boft_R": raw, "q.boft_s": scale}
    config = {"peft_type": "BOFT", "boft_block_size": SIZE}
    return tensors, config, lambda base: base @ rotation.T * scale.double()


def hra_case() -> tuple[dict[str, Tensor], dict[str, Any], Callable[[Tensor], Tensor]]:
    vectors = torch.randn(COLUMNS, 7)
    config = {"peft_type": "HRA", "r": 7}
    return {"q.hra_u": vectors}, config, lambda base: base @ reflected(vectors)


FORMULAS = {
    "oft, series": lambda: oft_case(5),
    "oft, two terms": lambda: oft_case(2),
    "oft, exact": lambda: oft_case(0),
    "boft": boft_case,
    "hra": hra_case,
}


def tensor_base(models: Models) -> tuple[Path, Tensor]:
    weight = torch.randn(ROWS, COLUMNS)
    return models.write({"q.weight": weight, "norm.weight": torch.ones(5)}), weight.double()


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("case", FORMULAS)
def test_products_equal_their_formulas_in_any_cut(
    case: str, compute: str, tmp_path: Path, models: Models
) -> None:
    torch.manual_seed(7)
    tensors, config, formula = FORMULAS[case]()
    adapter = write_tuned(tmp_path / "a", tensors, target_modules=["q"], **config)
    base, weight = tensor_base(models)
    recipe = {
        "method": "task_arithmetic",
        "base": str(base),
        "sources": [{"path": str(adapter)}],
        "compute_dtype": compute,
        "output": {"dtype": compute},
    }

    plan = streammerge.plan(recipe, memory=MEMORY, workers=3)
    merged, _ = models.merge(plan)
    again, _ = models.merge(recut(plan, slots=1, workers=1))

    assert_same_model(again, merged)
    expected = formula(weight)
    eps = torch.finfo(getattr(torch, compute)).eps
    # Sums of as many terms as a row has elements.
    bound = 64 * eps * float(expected.abs().max())
    torch.testing.assert_close(merged["q.weight"].double(), expected, rtol=0, atol=bound)
    assert float((expected - weight).abs().max()) > 0.5


@pytest.mark.parametrize("method", ["ties", "linear", "dare_ties"])
@pytest.mark.parametrize("case", ["oft, series", "boft", "hra"])
def test_methods_take_products_as_any_source_in_any_cut(
    case: str, method: str, tmp_path: Path, models: Models
) -> None:
    """Compared with the full models that the adapters make of the base, merged in their place."""
    torch.manual_seed(7)
    base, _ = tensor_base(models)
    adapters = []
    for index in range(2):
        tensors, config, _ = FORMULAS[case]()
        adapters.append(write_tuned(tmp_path / str(index), tensors, target_modules=["q"], **config))
    wide = {"base": str(base), "compute_dtype": "float64", "output": {"dtype": "float64"}}
    full = [
        models.write(
            models.merge(wide | {"method": "task_arithmetic", "sources": [{"path": str(path)}]})[0]
        )
        for path in adapters
    ]
    keys = wide | {
        "method": method,
        "parameters": {} if method == "linear" else {"density": 0.5},
    }

    plan = streammerge.plan(
        keys | {"sources": [{"path": str(path)} for path in adapters]}, memory=MEMORY, workers=3
    )
    merged, _ = models.merge(plan)
    again, _ = models.merge(recut(plan, slots=1, workers=1, statistics_bytes=1))
    expected, _ = models.merge(keys | {"sources": [{"path": str(path)} for path in full]})

    assert_same_model(again, merged)
    torch.testing.assert_close(merged["q.weight"], expected["q.weight"], rtol=1e-9, atol=1e-9)


def test_a_butterfly_is_the_product_of_its_crossed_factors() -> None:
    """With PEFT's own permutations: its layer takes one factor only where it has no CUDA."""
    from peft.tuners.boft.layer import Linear

    factors, blocks, size = 3, 8, 4
    torch.manual_seed(3)
    raw = torch.randn(factors, blocks, size, size, dtype=torch.float64) / 4
    product = torch.eye(blocks * size, dtype=torch.float64)
    for index in range(factors):
        order = Linear.block_butterfly_perm(
            Linear, blocks * size, blocks // 2**index, size // 2, factors - 1
        )
        crossing = torch.eye(blocks * size, dtype=torch.float64)[order]
        diagonal = torch.block_diag(*cayley((raw[index] - raw[index].mT) / 2))
        product = crossing @ diagonal @ crossing.T @ product

    made = make_butterfly(raw)

    span = size * 2 ** (factors - 1)
    expected = product.T
    inside = torch.block_diag(*made.view(-1, span, span))
    torch.testing.assert_close(inside, expected, rtol=0, atol=1e-12)


def test_several_adapters_of_a_kind_are_merged_in_turn_as_in_peft(tmp_path: Path) -> None:
    case = SUMS["loha"]
    base = saved(llama().bfloat16(), tmp_path / "base")
    adapters = [make_adapter(tmp_path / f"a{seed}", case, seed=seed) for seed in (1, 2)]
    recipe = {
        "method": "task_arithmetic",
        "base": str(base),
        "sources": [{"path": str(path)} for path in adapters],
        "parameters": {"rounding": "peft"},
    }
    streammerge.merge(recipe, tmp_path / "out")
    with quiet():
        model = PeftModel.from_pretrained(llama().bfloat16(), adapters[0], adapter_name="a")
        model.load_adapter(adapters[1], adapter_name="b")
        model.base_model.set_adapter(["a", "b"])
        expected = model.merge_and_unload(adapter_names=["a", "b"]).state_dict()

    got = load_file(tmp_path / "out" / "model.safetensors")

    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name


def test_what_multiplies_the_base_is_not_rounded_after_another_adapter(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    adapters = [
        make_adapter(tmp_path / "a", SUMS["loha"]),
        make_adapter(tmp_path / "b", PRODUCTS["hra"]),
    ]
    recipe = {
        "method": "task_arithmetic",
        "base": str(base),
        "sources": [{"path": str(path)} for path in adapters],
        "parameters": {"rounding": "peft"},
    }

    with pytest.raises(RecipeError, match=r"sources\[1\] is relative to the base"):
        streammerge.plan(recipe, memory=MEMORY)


# -- refusals

BROKEN: dict[str, tuple[Case, Callable[[Path], object], type[StreamMergeError], str]] = {
    "vera without its matrices": (
        (llama, VeraConfig, {"r": 5, "target_modules": ["q_proj"], "save_projection": False}),
        lambda path: path,
        UnsupportedAdapterError,
        "save_projection: false.*another build of torch may draw others",
    ),
    "oft of an old version": (
        PRODUCTS["oft"],
        lambda path: rewrite(path, peft_version="0.17.1"),
        UnsupportedAdapterError,
        "'0.17.1': PEFT before 0.18 summed another series",
    ),
    "oft without a version": (
        PRODUCTS["oft"],
        lambda path: rewrite(path, use_cayley_neumann=None),
        UnsupportedAdapterError,
        "use_cayley_neumann is missing",
    ),
    "no triangle": (
        PRODUCTS["oft"],
        lambda path: rewrite(path, lambda held: {k: v[:, :-1] for k, v in held.items()}),
        ShapeMismatchError,
        "no triangle has 27 entries",
    ),
    "another rank": (
        SUMS["loha"],
        lambda path: rewrite(path, r=4),
        ShapeMismatchError,
        "have rank 3, .* says 4",
    ),
    "no bank": (
        SUMS["vblora"],
        lambda path: rewrite(path, lambda held: {k: v for k, v in held.items() if "bank" not in k}),
        MissingTensorError,
        "holds no vector bank",
    ),
    "mixing more than there are": (
        SUMS["vblora"],
        lambda path: rewrite(path, topk=21),
        ShapeMismatchError,
        "mixes 21 vectors",
    ),
    "scales missing": (
        SUMS["vera"],
        lambda path: rewrite(
            path, lambda held: {k: v for k, v in held.items() if "lambda_d" not in k}
        ),
        MissingTensorError,
        "lacks its lambda d",
    ),
    "convolution with boft": (
        (convnet, BOFTConfig, {"boft_block_size": 4, "target_modules": ["conv2d"]}),
        lambda path: path,
        UnsupportedAdapterError,
        "a convolution with BOFT",
    ),
    "lokr of a sequence": (
        (convnet, LoKrConfig, {"r": 2, "target_modules": ["conv1d"]}),
        lambda path: path,
        UnsupportedAdapterError,
        "convolution of one dimension with a whole inner factor",
    ),
    "a setting that nobody knows": (
        SUMS["loha"],
        lambda path: rewrite(path, surprise=1),
        UnsupportedAdapterError,
        "unknown setting 'surprise'",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_cannot_be_merged_faithfully_is_refused_by_name(broken: str, tmp_path: Path) -> None:
    case, change, error, says = BROKEN[broken]
    adapter = make_adapter(tmp_path / "a", case)
    change(adapter)

    with pytest.raises(error, match=says):
        read_adapter(adapter)


def test_the_kind_of_the_configuration_is_the_kind_of_the_tensors(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", SUMS["lokr"])
    rewrite(adapter, peft_type="HRA")
    document = read_config(adapter)
    for key in ("decompose_factor", "alpha", "use_effective_conv2d", "decompose_both"):
        document.pop(key, None)
    (adapter / "adapter_config.json").write_text(json.dumps(document))

    with pytest.raises(StreamMergeError, match="have no home"):
        read_adapter(adapter)
