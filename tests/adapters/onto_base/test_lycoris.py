"""LyCORIS' kinds of adapters, baked into a base, equal their published formulas in float64.

Raw files as LyCORIS' and kohya's scripts write them: LoKr, LoHa, LoCon with a middle factor, GLoRA,
differences, and DoRA on top of them with norms per output or per input.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import MEMORY, Models, assert_same_model, recut
from safetensors.torch import save_file
from torch import Tensor

import streammerge
from streammerge.adapters.files.forms import Form
from streammerge.adapters.files.inspecting import describe_adapter, describe_adapter_as_json
from streammerge.adapters.files.reading import is_adapter, read_adapter
from streammerge.errors import (
    HeaderError,
    MissingTensorError,
    ShapeMismatchError,
    StreamMergeError,
    UnsupportedAdapterError,
)
from streammerge.plan.codec import dump_plan, parse_plan
from streammerge.statistics import BLOCK

Tensors = dict[str, Tensor]
Formula = Callable[[Tensor, Tensors], Tensor]
LINEAR = (600, 448)  # more than a block, whose ends lie inside rows
WIDE = (8, 20_000)  # rows that are multiplied in parts
CONV = (96, 64, 3, 3)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape) / 2


def kron(_: Tensor, t: Tensors) -> Tensor:
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = torch.einsum("ij...,ip,jr->pr...", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = torch.einsum("pr,r...->p...", t["lokr_w2_a"], t["lokr_w2_b"])
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.dim() - 2)), w2.contiguous())


def hadamard(_: Tensor, t: Tensors) -> Tensor:
    if "hada_t1" in t:
        sides = [
            torch.einsum(
                "ij...,jr,ip->pr...", t[f"hada_t{i}"], t[f"hada_w{i}_b"], t[f"hada_w{i}_a"]
            )
            for i in (1, 2)
        ]
    else:
        sides = [t[f"hada_w{i}_a"] @ t[f"hada_w{i}_b"] for i in (1, 2)]
    return sides[0] * sides[1]


def locon(_: Tensor, t: Tensors) -> Tensor:
    up, down = (t[f"lora_{side}.weight"].flatten(1) for side in ("up", "down"))
    return torch.einsum("mn...,im,nj->ij...", t["lora_mid.weight"], up, down)


def glora(base: Tensor, t: Tensors) -> Tensor:
    a1, a2, b1 = (t[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1"))
    through = torch.einsum("oi...,ij,jk->ok...", base, a1, a2)
    return through + torch.einsum("or,r...->o...", b1, t["b2.weight"])


def old_glora(base: Tensor, t: Tensors) -> Tensor:
    a1, a2, b1, b2 = (t[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    return base @ a2 @ a1 + b2 @ b1


def lora(_: Tensor, t: Tensors) -> Tensor:
    return t["lora_up.weight"] @ t["lora_down.weight"]


def difference(_: Tensor, t: Tensors) -> Tensor:
    return next(iter(t.values()))


def lokr(shape: tuple[int, ...], outer: tuple[int, int], rank: int, kind: str) -> Tensors:
    """Return the factors of a Kronecker product of a shape."""
    a, b = outer
    c, d, kernel = shape[0] // a, shape[1] // b, shape[2:]
    first = {"lokr_w1": rand(a, b)}
    if "both" in kind:
        first = {"lokr_w1_a": rand(a, rank), "lokr_w1_b": rand(rank, b)}
    if "tucker" in kind:
        second = {
            "lokr_t2": rand(rank, rank, *kernel),
            "lokr_w2_a": rand(rank, c),
            "lokr_w2_b": rand(rank, d),
        }
    elif "whole" in kind:
        second = {"lokr_w2": rand(c, d, *kernel)}
    else:
        second = {"lokr_w2_a": rand(c, rank), "lokr_w2_b": rand(rank, d, *kernel)}
    return first | second


def loha(shape: tuple[int, ...], rank: int, *, tucker: bool = False) -> Tensors:
    out, inner, *kernel = shape
    if tucker:
        return {
            name: tensor
            for i in (1, 2)
            for name, tensor in {
                f"hada_t{i}": rand(rank, rank, *kernel),
                f"hada_w{i}_a": rand(rank, out),
                f"hada_w{i}_b": rand(rank, inner),
            }.items()
        }
    columns = inner * torch.Size(kernel).numel()
    return {
        name: tensor
        for i in (1, 2)
        for name, tensor in {
            f"hada_w{i}_a": rand(out, rank),
            f"hada_w{i}_b": rand(rank, columns),
        }.items()
    }


def glora_factors(shape: tuple[int, ...], rank: int) -> Tensors:
    out, inner, *kernel = shape
    ones = [1] * len(kernel)
    return {
        "a1.weight": rand(inner, rank, *ones) / 8,
        "a2.weight": rand(rank, inner, *ones) / 8,
        "b1.weight": rand(out, rank, *ones),
        "b2.weight": rand(rank, inner, *kernel),
    }


Case = tuple[tuple[int, ...], Callable[[], Tensors], Formula, float, str]
"""Shape of the weight, its factors, the formula, the scaling at alpha 3, the form's name."""
RANK = 4
CASES: dict[str, Case] = {
    "lokr": (LINEAR, lambda: lokr(LINEAR, (8, 14), RANK, ""), kron, 3 / RANK, "LoKr"),
    "lokr both": (LINEAR, lambda: lokr(LINEAR, (24, 16), RANK, "both"), kron, 3 / RANK, "LoKr"),
    # Without a product there is no rank to divide by, and alpha is not used.
    "lokr whole": (LINEAR, lambda: lokr(LINEAR, (3, 7), RANK, "whole"), kron, 1.0, "LoKr"),
    "lokr whole w2": (
        LINEAR,
        lambda: lokr(LINEAR, (24, 16), RANK, "both whole"),
        kron,
        3 / RANK,
        "LoKr",
    ),
    "lokr wide": (WIDE, lambda: lokr(WIDE, (2, 100), 2, ""), kron, 3 / 2, "LoKr"),
    "lokr one": (WIDE, lambda: lokr(WIDE, (1, 1), 2, "whole"), kron, 1.0, "LoKr"),
    "lokr conv": (CONV, lambda: lokr(CONV, (8, 4), RANK, ""), kron, 3 / RANK, "LoKr"),
    "lokr tucker": (CONV, lambda: lokr(CONV, (8, 4), RANK, "tucker"), kron, 3 / RANK, "LoKr"),
    "lokr conv whole": (CONV, lambda: lokr(CONV, (4, 4), RANK, "both whole"), kron, 0.75, "LoKr"),
    "loha": (LINEAR, lambda: loha(LINEAR, RANK), hadamard, 3 / RANK, "LoHa"),
    "loha wide": (WIDE, lambda: loha(WIDE, RANK), hadamard, 3 / RANK, "LoHa"),
    "loha conv": (CONV, lambda: loha(CONV, 5), hadamard, 3 / 5, "LoHa"),
    "loha tucker": (CONV, lambda: loha(CONV, 5, tucker=True), hadamard, 3 / 5, "LoHa"),
    "locon": (
        CONV,
        lambda: {
            "lora_down.weight": rand(6, 64, 1, 1),
            "lora_mid.weight": rand(6, 6, 3, 3),
            "lora_up.weight": rand(96, 6, 1, 1),
        },
        locon,
        3 / 6,
        "LoCon",
    ),
    "glora": (LINEAR, lambda: glora_factors(LINEAR, RANK), glora, 3 / RANK, "GLoRA"),
    "glora conv": (CONV, lambda: glora_factors(CONV, RANK), glora, 3 / RANK, "GLoRA"),
    "old glora": (
        LINEAR,
        lambda: {
            "a1.weight": rand(RANK, 448) / 8,
            "a2.weight": rand(448, RANK) / 8,
            "b1.weight": rand(RANK, 448),
            "b2.weight": rand(600, RANK),
        },
        old_glora,
        3 / RANK,
        "GLoRA",
    ),
    "diff": (LINEAR, lambda: {"diff": rand(*LINEAR)}, difference, 1.0, "difference"),
    "diff conv": (CONV, lambda: {"diff": rand(*CONV)}, difference, 1.0, "difference"),
    "norm": ((BLOCK + 7,), lambda: {"w_norm": rand(BLOCK + 7)}, difference, 1.0, "difference"),
}
STEM = "lora_unet_blocks_0_to_q"


def write(path: Path, parts: Tensors, stem: str = STEM, alpha: float | None = 3.0) -> Path:
    tensors = {f"{stem}.{name}": tensor.contiguous() for name, tensor in parts.items()}
    if alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def base_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    draw = lambda *size: torch.randn(*size, generator=generator).to(dtype)  # noqa: E731
    return {
        "blocks.0.to_q.weight": draw(*shape),
        "blocks.0.to_q.bias": draw(shape[0]),
        "norm.weight": draw(9),
    }


def recipe_for(base: Path, *adapters: Path, **keys: object) -> dict[str, object]:
    sources = [{"path": str(path)} for path in adapters]
    return {"method": "task_arithmetic", "base": str(base), "sources": sources} | keys


def decomposed(weight: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA (arXiv:2402.09353): the weight with other norms, of its outputs or of its inputs."""
    dims = [0, *range(2, weight.dim())] if magnitude.shape[0] == 1 else [*range(1, weight.dim())]
    return magnitude * weight / weight.square().sum(dim=dims, keepdim=True).sqrt()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(11)


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_every_kind_equals_its_formula_in_any_cut(
    case: str, compute: str, tmp_path: Path, models: Models
) -> None:
    shape, make, formula, scaling, form = CASES[case]
    parts, base = make(), base_of(shape)
    adapter = write(tmp_path / "a.safetensors", parts)
    (module,) = read_adapter(adapter).formed
    assert (module.form, module.scaling) == (form, scaling)
    output = {"dtype": "float64"} if compute == "float64" else {}
    recipe = recipe_for(models.write(base), adapter, compute_dtype=compute, output=output)

    plan = streammerge.plan(recipe, memory=MEMORY, workers=3)
    merged, _ = models.merge(plan)
    again, _ = models.merge(recut(parse_plan(dump_plan(plan)), slots=1, workers=1))

    assert_same_model(again, merged)
    wide = {name: tensor.double() for name, tensor in parts.items()}
    start = base["blocks.0.to_q.weight"].double()
    change = scaling * formula(start, wide).reshape(shape)
    # Sums of so few terms err by some roundings of their largest.
    eps = torch.finfo(getattr(torch, compute)).eps
    bound = 16 * eps * float(change.abs().max())
    got = merged["blocks.0.to_q.weight"].double()
    torch.testing.assert_close(got, start + change, rtol=2 * eps, atol=bound)
    assert float((got - start).abs().max()) > 0.1
    for name in ("blocks.0.to_q.bias", "norm.weight"):
        assert torch.equal(merged[name].double(), base[name].double())


DORA = ["lokr", "lokr both", "lokr conv", "lokr tucker", "loha", "loha tucker", "locon", "lora"]
DORA_CASES = CASES | {
    "lora": (
        LINEAR,
        lambda: {"lora_down.weight": rand(RANK, 448), "lora_up.weight": rand(600, RANK)},
        lora,
        3 / RANK,
        "",
    )
}


@pytest.mark.parametrize("side", ["outputs", "inputs"])
@pytest.mark.parametrize("case", DORA)
def test_norms_are_those_of_outputs_or_of_inputs(
    case: str, side: str, tmp_path: Path, models: Models
) -> None:
    shape, make, formula, scaling, _ = DORA_CASES[case]
    parts, base = make(), base_of(shape)
    ones = [1] * (len(shape) - 2)
    count = (shape[0], 1, *ones) if side == "outputs" else (1, shape[1], *ones)
    magnitude = torch.rand(count) + 0.5
    adapter = write(tmp_path / "a.safetensors", parts | {"dora_scale": magnitude})

    plan = streammerge.plan(recipe_for(models.write(base), adapter), memory=MEMORY, workers=2)
    merged, _ = models.merge(plan)
    again, _ = models.merge(recut(plan, slots=1, workers=1))

    assert_same_model(again, merged)
    assert ("1 with norms of inputs" in str(plan)) is (side == "inputs")
    start = base["blocks.0.to_q.weight"].double()
    change = scaling * formula(start, {k: v.double() for k, v in parts.items()})
    expected = decomposed(start + change, magnitude.double())
    torch.testing.assert_close(
        merged["blocks.0.to_q.weight"].double(), expected, rtol=2e-6, atol=2e-6
    )


def test_biases_and_norms_take_their_differences(tmp_path: Path, models: Models) -> None:
    base = base_of(LINEAR)
    parts = {"lora_down.weight": rand(4, 448), "lora_up.weight": rand(600, 4), "diff_b": rand(600)}
    adapter = write(tmp_path / "a.safetensors", parts)

    merged, _ = models.merge(recipe_for(models.write(base), adapter))

    added = merged["blocks.0.to_q.bias"] - base["blocks.0.to_q.bias"]
    torch.testing.assert_close(added, parts["diff_b"], rtol=0, atol=1e-6)
    change = 0.75 * parts["lora_up.weight"] @ parts["lora_down.weight"]
    torch.testing.assert_close(
        merged["blocks.0.to_q.weight"], base["blocks.0.to_q.weight"] + change, rtol=1e-5, atol=1e-5
    )


SPELLINGS = [
    "lora_unet_blocks_0_to_q",
    "lycoris_blocks_0_to_q",
    "diffusion_model.blocks.0.to_q",
    "transformer.blocks.0.to_q",
    "blocks.0.to_q",
]


@pytest.mark.parametrize("stem", SPELLINGS)
def test_names_with_dots_and_with_underscores_mean_the_same(
    stem: str, tmp_path: Path, models: Models
) -> None:
    base, parts = base_of(LINEAR), lokr(LINEAR, (8, 14), RANK, "")
    adapter = write(tmp_path / "a.safetensors", parts, stem)
    assert is_adapter(adapter)

    merged, _ = models.merge(recipe_for(models.write(base), adapter))

    change = 0.75 * kron(merged["norm.weight"], parts)
    torch.testing.assert_close(
        merged["blocks.0.to_q.weight"], base["blocks.0.to_q.weight"] + change, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("method", ["ties", "linear", "dare_linear"])
@pytest.mark.parametrize("case", ["lokr", "loha", "glora", "lokr conv"])
def test_methods_take_them_as_any_source_in_any_cut(
    case: str, method: str, tmp_path: Path, models: Models
) -> None:
    """Compared with the full model that each adapter makes of the base, merged in its place."""
    shape, make, *_ = CASES[case]
    base = models.write(base_of(shape))
    adapters = [write(tmp_path / f"{i}.safetensors", make()) for i in range(2)]
    parameters = {} if method == "linear" else {"density": 0.5}
    keys = {"method": method, "parameters": parameters, "compute_dtype": "float64"}
    wide = keys | {"output": {"dtype": "float64"}}
    full = [
        models.write(
            models.merge(
                recipe_for(base, path) | wide | {"method": "task_arithmetic", "parameters": {}}
            )[0]
        )
        for path in adapters
    ]

    plan = streammerge.plan(recipe_for(base, *adapters) | wide, memory=MEMORY, workers=3)
    merged, _ = models.merge(plan)
    again, _ = models.merge(recut(plan, slots=1, workers=1, statistics_bytes=1))
    expected, _ = models.merge(recipe_for(base, *full) | wide)

    assert_same_model(again, merged)
    torch.testing.assert_close(
        merged["blocks.0.to_q.weight"], expected["blocks.0.to_q.weight"], rtol=1e-9, atol=1e-9
    )


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda parts: {key: value for key, value in parts.items() if key != name}


BROKEN: dict[str, tuple[str, Callable[[Tensors], Tensors], type[StreamMergeError], list[str]]] = {
    "a factor is missing": (
        "lokr",
        without("lokr_w2_b"),
        MissingTensorError,
        [STEM, "lacks w2 b", "lokr_w2_a", "[75, 4]"],
    ),
    "ranks differ": (
        "lokr",
        lambda parts: parts | {"lokr_w2_b": rand(3, 32)},
        ShapeMismatchError,
        ["ranks 4 of w2 a and 3 of w2 b differ"],
    ),
    "whole and in parts": (
        "lokr",
        lambda parts: parts | {"lokr_w2": rand(75, 32)},
        ShapeMismatchError,
        ["both whole and as a product"],
    ),
    "two products of different shape": (
        "loha",
        lambda parts: parts | {"hada_w2_a": rand(601, RANK)},
        ShapeMismatchError,
        ["[600, 448] and [601, 448]"],
    ),
    "two kinds": (
        "loha",
        lambda parts: parts | {"lokr_w1": rand(2, 2)},
        HeaderError,
        ["2 kinds of adapters at once"],
    ),
    "no such product": (
        "glora",
        lambda parts: parts | {"b1.weight": rand(600, 5)},
        ShapeMismatchError,
        ["W @ a1 @ a2 + b1 @ b2", "[600, 5]"],
    ),
    "square": (
        "glora",
        lambda _: {f"{name}.weight": rand(4, 4) for name in ("a1", "a2", "b1", "b2")},
        UnsupportedAdapterError,
        ["all four factors of GLoRA are square"],
    ),
    "magnitudes of neither side": (
        "lokr",
        lambda parts: parts | {"dora_scale": rand(17)},
        ShapeMismatchError,
        ["[17]", "[600, 1]", "[600, 448]"],
    ),
    "a core of the wrong rank": (
        "lokr tucker",
        lambda parts: parts | {"lokr_t2": rand(3, 4, 3, 3)},
        ShapeMismatchError,
        ["the core does not fit"],
    ),
    "empty": (
        "diff",
        lambda _: {"diff": torch.empty(0)},
        ShapeMismatchError,
        ["shape [0]"],
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_factors_that_contradict_each_other_are_refused(broken: str, tmp_path: Path) -> None:
    case, change, error, says = BROKEN[broken]
    adapter = write(tmp_path / "a.safetensors", change(CASES[case][1]()))

    with pytest.raises(error) as refusal:
        read_adapter(adapter)

    for words in [*says, str(adapter)]:
        assert words in str(refusal.value)


def test_another_base_is_refused_with_both_shapes(tmp_path: Path, models: Models) -> None:
    adapter = write(tmp_path / "a.safetensors", lokr(LINEAR, (8, 14), RANK, ""))
    base = models.write(base_of((608, 448)))

    with pytest.raises(ShapeMismatchError, match=r"LoKr.*\[600, 448\].*\[608, 448\]"):
        streammerge.plan(recipe_for(base, adapter), memory=MEMORY)


def test_without_a_base_they_are_refused_by_name(tmp_path: Path) -> None:
    adapters = [
        write(tmp_path / f"{i}.safetensors", lokr(LINEAR, (8, 14), RANK, "")) for i in range(2)
    ]
    recipe = {"method": "linear", "sources": [{"path": str(path)} for path in adapters]}

    with pytest.raises(UnsupportedAdapterError, match=r"LoKr.*no combination.*base"):
        streammerge.plan(recipe, memory=MEMORY)


def test_inspect_says_what_the_file_holds(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path / "a.safetensors", loha(LINEAR, RANK)))

    text, document = describe_adapter(adapter), describe_adapter_as_json(adapter)

    assert "LoHa x 1" in text
    assert document["formed"][0]["form"] == Form.LOHA
    assert document["formed"][0]["scaling"] == 0.75
    assert document["formed"][0]["tensors"]["first a"] == f"{STEM}.hada_w1_a"
    assert len(document["tensors"]) == 4
