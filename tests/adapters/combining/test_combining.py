"""Combined adapters against PEFT's own: factors bit for bit, products, and logits after loading."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import MEMORY, assert_same_bits
from peft import get_peft_model_state_dict
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import streammerge
from streammerge.adapters.combining.combinations import COMBINATIONS, Sparsify, Target
from streammerge.adapters.files.reading import read_adapter
from streammerge.rng import keep_mask, stream_key
from tests.adapters.tiny import (
    Tensors,
    bert,
    combine_in_peft,
    convnet,
    deltas,
    gpt2,
    llama,
    load_peft,
    make_ia3,
    make_lora,
    mixtral,
    read_config,
    read_tensors,
    rewrite,
)

FACTOR_TYPES = [name for name, each in COMBINATIONS.items() if each.target is Target.FACTORS]
SVD_TYPES = [name for name, each in COMBINATIONS.items() if each.makes_rank]
RANDOM_TYPES = [name for name, each in COMBINATIONS.items() if each.sparsify is Sparsify.DROP]
PLAIN_TYPES = [name for name in COMBINATIONS if name not in RANDOM_TYPES]
EXACT_TYPES = [*(name for name in FACTOR_TYPES if name not in RANDOM_TYPES), "cat"]
TOKENS = torch.arange(24).reshape(2, 12) % 16

BUILDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama": (llama, {"target_modules": "all-linear", "r": 4, "lora_alpha": 6}),
    "llama with its embedding": (llama, {"target_modules": ["embed_tokens", "v_proj"], "r": 4}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "r": 4, "fan_in_fan_out": True}),
    "bert": (bert, {"target_modules": ["query", "dense"], "r": 4}),
    "mixtral": (mixtral, {"target_modules": ["q_proj", "o_proj"], "r": 4}),
    "convnet": (convnet, {"target_modules": ["conv2d", "point", "embed", "head"], "r": 4}),
}
WEIGHTS = (0.7, -0.4)


def parameters_of(method: str) -> dict[str, Any]:
    """Return the parameters that the type needs."""
    return {} if COMBINATIONS[method].sparsify is Sparsify.NOTHING else {"density": 0.5}


def combine(
    out: Path,
    method: str,
    paths: Sequence[Path],
    weights: Sequence[float] = WEIGHTS,
    parameters: dict[str, Any] | None = None,
    **recipe: Any,
) -> Path:
    """Combine adapters into ``out`` and return it."""
    document = {
        "method": method,
        "sources": [
            {"path": str(path), "weight": weight}
            for path, weight in zip(paths, weights, strict=True)
        ],
        "parameters": parameters_of(method) if parameters is None else parameters,
        **recipe,
    }
    streammerge.merge(document, out, memory=MEMORY)
    return out


def pair(
    tmp_path: Path, build: Callable[[], nn.Module], first: dict[str, Any], second: dict[str, Any]
) -> list[Path]:
    """Make two adapters for one model."""
    return [
        make_lora(tmp_path / "a", build(), seed=1, **first),
        make_lora(tmp_path / "b", build(), seed=2, **second),
    ]


def logits(model: nn.Module) -> Tensor:
    """Return what the model makes of some tokens."""
    with torch.inference_mode():
        found = model(TOKENS)
    return getattr(found, "logits", found)


def exact_deltas(paths: Sequence[Path], weights: Sequence[float]) -> Tensors:
    """Return ``sum w s B A`` in float64, straight from the files."""
    found: Tensors = {}
    for path, weight in zip(paths, weights, strict=True):
        tensors = read_tensors(path)
        for module in read_adapter(path).modules:
            down = tensors[module.down.name].double().flatten(1)
            up = tensors[module.up.name].double().flatten(1)
            delta = weight * module.scaling * (up @ down)
            found[module.stem] = found[module.stem] + delta if module.stem in found else delta
    return found


def error_of(actual: Tensors, expected: Tensors) -> float:
    """Return the largest relative error over all modules."""
    assert sorted(actual) == sorted(expected)
    return max(
        float((actual[name].double() - expected[name].double()).norm() / expected[name].norm())
        for name in expected
    )


def assert_loads_whole(model: nn.Module, path: Path) -> None:
    """Check that PEFT holds exactly the tensors of the file."""
    with warnings.catch_warnings():
        # PEFT takes the biases of factors for factors that were not gathered.
        warnings.simplefilter("ignore")
        held = get_peft_model_state_dict(model, adapter_name="a0", save_embedding_layers=False)
    stored = {k: v for k, v in read_tensors(path).items() if not k.endswith("base_layer.weight")}
    assert sorted(held) == sorted(stored)
    for name, tensor in stored.items():
        assert_same_bits(held[name].detach(), tensor, name)


# 1. Against add_weighted_adapter.


@pytest.mark.parametrize("build_name", BUILDS)
@pytest.mark.parametrize("method", EXACT_TYPES)
def test_factors_have_pefts_bits(method: str, build_name: str, tmp_path: Path):
    build, config = BUILDS[build_name]
    paths = pair(tmp_path, build, config, config)

    out = combine(tmp_path / "out", method, paths)

    expected = combine_in_peft(build, paths, WEIGHTS, method, **parameters_of(method))
    state = get_peft_model_state_dict(expected, adapter_name="merged", save_embedding_layers=False)
    found = {k: v for k, v in read_tensors(out).items() if not k.endswith("base_layer.weight")}
    assert sorted(found) == sorted(state)
    for name, tensor in state.items():
        assert_same_bits(found[name], tensor.detach(), name)
    loaded = load_peft(build(), out)
    assert_loads_whole(loaded, out)
    assert torch.equal(logits(loaded), logits(expected))


@pytest.mark.parametrize("build_name", BUILDS)
@pytest.mark.parametrize("method", [name for name in PLAIN_TYPES if name in SVD_TYPES])
def test_products_are_pefts_up_to_rounding(method: str, build_name: str, tmp_path: Path):
    # Singular vectors have no unique sign, and PEFT decomposes in float32; so products are
    # compared, and the bound is a few times the float32 rounding of a dense decomposition.
    build, config = BUILDS[build_name]
    paths = pair(tmp_path, build, config, config)

    out = combine(tmp_path / "out", method, paths)

    expected = combine_in_peft(build, paths, WEIGHTS, method, **parameters_of(method))
    loaded = load_peft(build(), out)
    assert error_of(deltas(loaded, "a0"), deltas(expected, "merged")) < 5e-6
    assert_loads_whole(loaded, out)
    torch.testing.assert_close(logits(loaded), logits(expected), atol=2e-4, rtol=2e-4)


def masked_like_ours(
    monkeypatch: pytest.MonkeyPatch, named: dict[bytes, list[tuple[int, str]]]
) -> None:
    """Make PEFT's random pruning draw the masks that the generator draws here.

    Args:
        monkeypatch: Undoes it after the test.
        named: By the digest of its bytes, the source and the name of every tensor it will prune.
    """

    def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:  # noqa: FBT001
        [(source, name)] = named[digest(tensor)]
        mask = keep_mask(stream_key(0, source, name), 0, tensor.numel(), density)
        pruned = tensor * torch.from_numpy(mask.astype(np.float32)).view(tensor.shape)
        return pruned / density if rescale else pruned

    monkeypatch.setattr(merge_utils, "random_pruning", random_pruning)


def digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).digest()


@pytest.mark.parametrize("method", [name for name in RANDOM_TYPES if name in FACTOR_TYPES])
def test_random_types_have_pefts_bits_given_the_same_masks(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build, config = BUILDS["llama"]
    paths = pair(tmp_path, build, config, config)
    named: dict[bytes, list[tuple[int, str]]] = {}
    for source, path in enumerate(paths):
        for name, tensor in read_tensors(path).items():
            named.setdefault(digest(tensor), []).append((source, name))
    masked_like_ours(monkeypatch, named)

    out = combine(tmp_path / "out", method, paths)

    expected = combine_in_peft(build, paths, WEIGHTS, method, density=0.5)
    state = get_peft_model_state_dict(expected, adapter_name="merged")
    for name, tensor in read_tensors(out).items():
        assert_same_bits(tensor, state[name].detach(), name)


@pytest.mark.parametrize("method", [name for name in RANDOM_TYPES if name in SVD_TYPES])
def test_random_products_are_pefts_given_the_same_masks(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build, config = BUILDS["llama"]
    paths = pair(tmp_path, build, config, config)
    named: dict[bytes, list[tuple[int, str]]] = {}
    both = load_peft(build(), *paths)
    for source in range(2):
        for name, delta in deltas(both, f"a{source}").items():
            named.setdefault(digest(delta), []).append((source, f"{name}.weight"))
    masked_like_ours(monkeypatch, named)

    out = combine(tmp_path / "out", method, paths)

    expected = combine_in_peft(build, paths, WEIGHTS, method, density=0.5)
    assert error_of(deltas(load_peft(build(), out), "a0"), deltas(expected, "merged")) < 5e-6


@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune", "cat"])
def test_six_sources_have_pefts_bits(method: str, tmp_path: Path):
    # Beyond four rows torch adds in another order in some columns.
    build, config = BUILDS["llama"]
    paths = [make_lora(tmp_path / f"a{i}", build(), seed=i, **config) for i in range(6)]
    weights = (0.5, -0.25, 0.125, 0.3, 0.7, 0.01)

    out = combine(tmp_path / "out", method, paths, weights)

    expected = combine_in_peft(build, paths, weights, method, **parameters_of(method))
    state = get_peft_model_state_dict(expected, adapter_name="merged")
    for name, tensor in read_tensors(out).items():
        assert_same_bits(tensor, state[name].detach(), name)


@pytest.mark.parametrize("vote", ["total", "frequency"])
@pytest.mark.parametrize("method", ["ties", "ties_svd"])
def test_the_sign_vote_is_pefts(method: str, vote: str, tmp_path: Path):
    build, config = BUILDS["llama"]
    paths = [make_lora(tmp_path / f"a{i}", build(), seed=i, **config) for i in range(3)]
    weights = (0.5, 0.3, -0.2)
    parameters = {"density": 0.7, "majority_sign_method": vote}

    out = combine(tmp_path / "out", method, paths, weights, parameters)

    expected = combine_in_peft(build, paths, weights, method, **parameters)
    assert error_of(deltas(load_peft(build(), out), "a0"), deltas(expected, "merged")) < 5e-6


def test_a_module_that_one_source_lacks_is_combined_of_the_others(tmp_path: Path):
    paths = pair(
        tmp_path,
        llama,
        {"target_modules": ["q_proj", "v_proj"], "r": 4},
        {"target_modules": ["q_proj", "o_proj"], "r": 4},
    )
    for method in ("linear", "ties", "cat", "svd", "magnitude_prune_svd"):
        out = combine(tmp_path / method, method, paths)

        expected = combine_in_peft(llama, paths, WEIGHTS, method, **parameters_of(method))
        found = deltas(load_peft(llama(), out), "a0")
        assert error_of(found, deltas(expected, "merged")) < 5e-6, method


def test_ia3_is_pefts(tmp_path: Path):
    config = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    paths = [make_ia3(tmp_path / f"a{i}", llama(), seed=i, **config) for i in range(3)]
    weights = (0.5, 0.7, -0.2)
    expected = load_peft(llama(), *paths)
    expected.add_weighted_adapter(["a0", "a1", "a2"], list(weights), "merged")
    expected.set_adapter("merged")

    out = combine(tmp_path / "out", "linear", paths, weights)

    state = get_peft_model_state_dict(expected, adapter_name="merged")
    for name, tensor in read_tensors(out).items():
        assert_same_bits(tensor, state[name].detach(), name)
    loaded = load_peft(llama(), out)
    assert_loads_whole(loaded, out)
    assert torch.equal(logits(loaded), logits(expected))


# 2. Where PEFT's own result is wrong or does not load: against the sum itself.

DIFFERENT = {
    "ranks": ({"r": 2, "lora_alpha": 5}, {"r": 6, "lora_alpha": 3}),
    "rslora": ({"r": 4, "use_rslora": True}, {"r": 8, "use_rslora": True, "lora_alpha": 3}),
    "rslora in one": ({"r": 4}, {"r": 4, "use_rslora": True}),
    "patterns": (
        {"r": 4, "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 9}},
        {"r": 3, "rank_pattern": {r".*\.v_proj": 5}, "alpha_pattern": {r"layers\.1.*": 2}},
    ),
}


@pytest.mark.parametrize("difference", DIFFERENT)
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_exact_types_are_the_sum_of_adapters_of_any_rank(
    method: str, difference: str, tmp_path: Path
):
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    first, second = DIFFERENT[difference]
    paths = pair(tmp_path, llama, targets | first, targets | second)
    # The rank that no product of these loses anything at.
    parameters = {} if method == "cat" else {"svd_rank": 16}

    out = combine(tmp_path / "out", method, paths, parameters=parameters)

    loaded = load_peft(llama(), out)
    assert error_of(deltas(loaded, "a0"), exact_deltas(paths, WEIGHTS)) < 1e-6
    assert_loads_whole(loaded, out)
    scalings = {
        scaling
        for module in loaded.modules()
        if isinstance(getattr(module, "scaling", None), dict)
        for scaling in module.scaling.values()
    }
    assert scalings == {1.0}


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_rslora_and_patterns_are_folded_into_the_factors(method: str, tmp_path: Path):
    # PEFT keeps use_rslora and scales by sqrt(r) once more; a base of plain scalings is the oracle.
    config = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6}
    paths = pair(tmp_path, llama, config, config)
    expected = read_tensors(combine(tmp_path / "plain", method, paths))

    for path in paths:  # the same scaling, spelt otherwise
        rewrite(path, use_rslora=True, lora_alpha=1, alpha_pattern={"q_proj": 3, ".*v_proj": 3})
    out = combine(tmp_path / "out", method, paths)

    for name, tensor in read_tensors(out).items():
        assert_same_bits(tensor, expected[name], name)
    config = read_config(out)
    assert (config["use_rslora"], config["r"], config["lora_alpha"]) == (False, 4, 4)


def test_svd_truncates_to_the_best_rank(tmp_path: Path):
    config = {"target_modules": ["q_proj", "down_proj"], "r": 6}
    paths = pair(tmp_path, llama, config, config)

    out = combine(tmp_path / "out", "svd", paths, parameters={"svd_rank": 3})

    found = deltas(load_peft(llama(), out), "a0")
    for name, exact in exact_deltas(paths, WEIGHTS).items():
        left, values, right = torch.linalg.svd(exact)
        best = left[:, :3] @ torch.diag(values[:3]) @ right[:3]
        assert float((found[name] - best).norm() / best.norm()) < 1e-6
    factors = read_tensors(out)
    down = factors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    torch.testing.assert_close(down @ down.T, torch.eye(3))


def test_svd_never_forms_the_product(tmp_path: Path):
    # Formed, each of these two would take 160 GB.
    paths = []
    for index in range(2):
        path = make_lora(tmp_path / f"{index}", llama(), seed=index, r=4, target_modules=["q_proj"])
        stem = "base_model.model.model.layers.0.self_attn.q_proj"
        factors = {
            f"{stem}.lora_A.weight": torch.randn(4, 200_000),
            f"{stem}.lora_B.weight": torch.randn(200_000, 4),
        }
        paths.append(rewrite(path, lambda _, factors=factors: factors))

    out = combine(tmp_path / "out", "svd", paths, parameters={"svd_rank": 8})

    found, first, second = (read_tensors(path) for path in (out, *paths))
    rows = slice(0, 50)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    exact = sum(
        weight * 2.0 * each[b][rows].double() @ each[a].double()
        for weight, each in zip(WEIGHTS, (first, second), strict=True)
    )
    torch.testing.assert_close(
        found[b][rows].double() @ found[a].double(), exact, atol=1e-4, rtol=1e-4
    )


def test_clamping_bounds_the_factors(tmp_path: Path):
    config = {"target_modules": ["q_proj"], "r": 4}
    paths = pair(tmp_path, llama, config, config)
    free = read_tensors(combine(tmp_path / "free", "svd", paths))

    out = combine(tmp_path / "out", "svd", paths, parameters={"svd_clamp": 0.9})

    found = read_tensors(out)
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        names = [f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"]
        bound = torch.quantile(torch.cat([free[name].flatten() for name in names]), 0.9)
        for name in names:
            torch.testing.assert_close(found[name], free[name].clamp(-bound, bound))


@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_one_adapter_keeps_what_it_does(method: str, tmp_path: Path):
    config = {"target_modules": "all-linear", "r": 4, "lora_alpha": 7, "use_rslora": True}
    path = make_lora(tmp_path / "a", llama(), seed=1, **config)

    out = combine(tmp_path / "out", method, [path], [1.0])

    expected = logits(load_peft(llama(), path))
    torch.testing.assert_close(logits(load_peft(llama(), out)), expected, atol=1e-4, rtol=1e-4)


def test_biases_of_the_factors_add_up(tmp_path: Path):
    # PEFT drops them; two active adapters are the sum.
    config = {"target_modules": ["query", "dense"], "r": 4, "lora_bias": True, "lora_alpha": 6}
    paths = pair(tmp_path, bert, config, config | {"lora_alpha": 3})
    both = load_peft(bert(), *paths)
    both.base_model.set_adapter(["a0", "a1"])

    for method in ("cat", "svd"):
        parameters = {} if method == "cat" else {"svd_rank": 8}
        out = combine(tmp_path / method, method, paths, (1.0, 1.0), parameters)

        loaded = load_peft(bert(), out)
        assert_loads_whole(loaded, out)
        torch.testing.assert_close(logits(loaded), logits(both), atol=1e-5, rtol=1e-5)


def test_biases_of_one_source_are_kept(tmp_path: Path):
    paths = pair(
        tmp_path,
        bert,
        {"target_modules": ["query"], "r": 4, "lora_bias": True},
        {"target_modules": ["query", "value"], "r": 4},
    )
    both = load_peft(bert(), *paths)
    both.base_model.set_adapter(["a0", "a1"])

    out = combine(tmp_path / "out", "cat", paths, (1.0, 1.0))

    torch.testing.assert_close(logits(load_peft(bert(), out)), logits(both), atol=1e-5, rtol=1e-5)


def test_a_convolution_of_one_dimension_decomposes(tmp_path: Path):
    # PEFT raises a RuntimeError here.
    config = {"target_modules": ["conv1d"], "r": 4}
    paths = pair(tmp_path, convnet, config, config)
    both = load_peft(convnet(), *paths)
    both.base_model.set_adapter(["a0", "a1"])

    out = combine(tmp_path / "out", "svd", paths, (1.0, 1.0), {"svd_rank": 8})

    torch.testing.assert_close(logits(load_peft(convnet(), out)), logits(both))


class Attention(nn.Module):
    """An attention layer, which PEFT wraps twice."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.sub = nn.ModuleDict({"lin": nn.Linear(16, 16)})
        self.lin = nn.Linear(16, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = nn.functional.one_hot(tokens, 16).float()
        return self.sub["lin"](self.lin(self.attn(rows, rows, rows)[0]))


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention().eval()


# PEFT merges attention layers while it computes, and says so.
@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_nested_wrappers_and_names_that_end_alike_load(tmp_path: Path):
    config = {"target_modules": ["attn", "lin"], "r": 2, "rank_pattern": {"sub.lin": 3}}
    paths = pair(tmp_path, attention, config, config)
    both = load_peft(attention(), *paths)
    both.base_model.set_adapter(["a0", "a1"])

    out = combine(tmp_path / "out", "cat", paths, (1.0, 1.0))

    loaded = load_peft(attention(), out)
    assert_loads_whole(loaded, out)
    torch.testing.assert_close(logits(loaded), logits(both))


def test_exclusions_of_one_source_do_not_spread(tmp_path: Path):
    # PEFT applies those of the first adapter to all of them.
    paths = pair(
        tmp_path,
        llama,
        {"target_modules": ["q_proj"], "r": 4, "layers_to_transform": [0]},
        {"target_modules": r".*\.(v|q)_proj", "r": 4},
    )

    out = combine(tmp_path / "out", "cat", paths)

    loaded = load_peft(llama(), out)
    assert_loads_whole(loaded, out)
    assert error_of(deltas(loaded, "a0"), exact_deltas(paths, WEIGHTS)) < 1e-6


# 3. Tensors that replace the base's.


def test_a_trained_head_is_kept_from_the_source_that_has_it(tmp_path: Path):
    # In PEFT it becomes a copy of the base's head, or is lost.
    for first in (0, 1):
        targets = {"target_modules": ["query"], "r": 4}
        head = targets | {"modules_to_save": ["classifier"]}
        paths = pair(
            tmp_path / f"{first}", bert, *((head, targets) if first == 0 else (targets, head))
        )
        out = combine(tmp_path / f"out{first}", "cat", paths)

        loaded = load_peft(bert(), out)
        stored = read_tensors(paths[first])["base_model.model.classifier.weight"]
        wrapped = loaded.base_model.model.classifier
        assert_same_bits(wrapped.modules_to_save["a0"].weight.detach(), stored)
        assert_loads_whole(loaded, out)


def test_targeted_embeddings_that_both_bring_along_are_copied_once(tmp_path: Path):
    build, config = BUILDS["llama with its embedding"]
    paths = pair(tmp_path, build, config, config)

    out = combine(tmp_path / "out", "cat", paths)

    name = "base_model.model.model.embed_tokens.base_layer.weight"
    assert_same_bits(read_tensors(out)[name], read_tensors(paths[0])[name])


def test_trained_tokens_are_kept(tmp_path: Path):
    paths = pair(
        tmp_path,
        llama,
        {"target_modules": ["q_proj"], "r": 4, "trainable_token_indices": [3, 9]},
        {"target_modules": ["q_proj"], "r": 4},
    )
    out = combine(tmp_path / "out", "cat", paths, (1.0, 0.0))

    loaded = load_peft(llama(), out)
    torch.testing.assert_close(logits(loaded), logits(load_peft(llama(), paths[0])))


def test_rules_choose_between_heads_and_leave_modules_out(tmp_path: Path):
    config = {"target_modules": ["query", "value"], "r": 4, "modules_to_save": ["classifier"]}
    paths = pair(tmp_path, bert, config, config)
    rules = [
        {"tensors": "classifier.*", "copy": 1},
        {"tensors": "*.layer.0.*.value.weight", "drop": True},
        {"tensors": "*.layer.1.*.value.weight", "copy": 0},
        {"tensors": "*.layer.1.*.query.weight", "weight": [1.0, 0.0]},
    ]

    out = combine(tmp_path / "out", "linear", paths, rules=rules)

    found, first, second = (read_tensors(path) for path in (out, *paths))
    for name in ("base_model.model.classifier.weight", "base_model.model.classifier.bias"):
        assert_same_bits(found[name], second[name])
    assert not any("layer.0.attention.self.value" in name for name in found)
    loaded = load_peft(bert(), out, paths[0])
    for layer_1 in ("query", "value"):
        stem = f"bert.encoder.layer.1.attention.self.{layer_1}"
        torch.testing.assert_close(deltas(loaded, "a0")[stem], deltas(loaded, "a1")[stem])
    assert_same_bits(
        found["base_model.model.bert.encoder.layer.1.attention.self.value.lora_B.weight"],
        first["base_model.model.bert.encoder.layer.1.attention.self.value.lora_B.weight"],
    )


# 4. Types of elements, names of other programs.


@pytest.mark.parametrize("method", ["linear", "cat", "ties", "svd"])
def test_bfloat16_files_are_combined_in_float32_and_rounded_once(method: str, tmp_path: Path):
    config = {"target_modules": ["q_proj", "v_proj"], "r": 4}
    paths = pair(tmp_path, llama, config, config)
    for path in paths:
        rewrite(path, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})

    wide = combine(tmp_path / "wide", method, paths, output={"dtype": "float32"})
    out = combine(tmp_path / "out", method, paths)

    # PEFT widens the factors when it loads them.
    expected = combine_in_peft(llama, paths, WEIGHTS, method, **parameters_of(method))
    assert error_of(deltas(load_peft(llama(), wide), "a0"), deltas(expected, "merged")) < 5e-6
    for name, tensor in read_tensors(out).items():
        assert_same_bits(tensor, read_tensors(wide)[name].bfloat16(), name)


def test_float64_is_computed_where_asked(tmp_path: Path):
    config = {"target_modules": ["q_proj"], "r": 4}
    paths = pair(tmp_path, llama, config, config)
    options = {"compute_dtype": "float64", "output": {"dtype": "float64"}}

    for method in ("cat", "svd", "ties_svd", "dare_ties"):
        out = combine(tmp_path / method, method, paths, **options)
        assert {tensor.dtype for tensor in read_tensors(out).values()} == {torch.float64}
    found = read_tensors(tmp_path / "cat")
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    product = found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"]
    exact = exact_deltas(paths, WEIGHTS)["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(product, exact, atol=1e-14, rtol=1e-14)


RAW_NAMES = {
    "lora": ("lora_unet_q.lora_down.weight", "lora_unet_q.lora_up.weight", "lora_unet_q.alpha"),
    "pytorch_lora_weights": ("unet.q.lora_A.weight", "unet.q.lora_B.weight", None),
}


@pytest.mark.parametrize("file", RAW_NAMES)
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_raw_files_keep_their_naming(method: str, file: str, tmp_path: Path):
    down, up, alpha = RAW_NAMES[file]
    expected = torch.zeros(6, 8, dtype=torch.float64)
    paths = []
    for index, rank in enumerate((2, 3)):
        torch.manual_seed(index)
        tensors = {down: torch.randn(rank, 8), up: torch.randn(6, rank)}
        scaling = 1.0
        if alpha is not None:
            tensors[alpha] = torch.tensor(4.0)
            scaling = 4.0 / rank
        save_file(tensors, tmp_path / f"{index}.safetensors")
        paths.append(tmp_path / f"{index}.safetensors")
        expected += WEIGHTS[index] * scaling * (tensors[up].double() @ tensors[down].double())

    parameters = {"svd_rank": 5} if method == "svd" else {}
    out = combine(tmp_path / "out", method, paths, parameters=parameters)

    found = load_file(out / f"{file}.safetensors")
    torch.testing.assert_close((found[up] @ found[down]).double(), expected, atol=1e-5, rtol=1e-5)
    if alpha is not None:
        assert found[alpha].item() == 5.0
    assert not (out / "adapter_config.json").exists()
    # A directory with nothing else is the same adapter.
    assert read_adapter(out).modules == read_adapter(out / f"{file}.safetensors").modules
    [module] = read_adapter(out / f"{file}.safetensors").modules
    assert (module.rank, module.scaling) == (5, 1.0)
