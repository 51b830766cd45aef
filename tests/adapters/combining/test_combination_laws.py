"""The same bits always, inputs untouched, memory within what the plan says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MEMORY
from safetensors.torch import save_file

import streammerge
from streammerge.adapters.combining.combinations import COMBINATIONS, Sparsify, Target
from tests.adapters.tiny import llama, make_lora, read_tensors

NAME = "adapter_model.safetensors"


def recipe_for(method: str, paths: list[Path], **document: Any) -> dict[str, Any]:
    """Return a recipe with the parameters that the type needs."""
    sparse = COMBINATIONS[method].sparsify is not Sparsify.NOTHING
    return {
        "method": method,
        "sources": [
            {"path": str(path), "weight": 0.5 + 0.2 * index} for index, path in enumerate(paths)
        ],
        "parameters": {"density": 0.4} if sparse else {},
    } | document


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters that tests only read."""
    root = tmp_path_factory.mktemp("loras")
    return [
        make_lora(root / f"{seed}", llama(), seed=seed, target_modules="all-linear", r=4)
        for seed in (1, 2)
    ]


@pytest.mark.parametrize("method", COMBINATIONS)
def test_bytes_do_not_depend_on_run_threads_or_storage(
    method: str, loras: list[Path], tmp_path: Path
):
    before = [(path / NAME).read_bytes() for path in loras]
    as_bin = []
    for path in loras:
        other = tmp_path / path.name
        other.mkdir()
        torch.save(read_tensors(path), other / "adapter_model.bin")
        (other / "adapter_config.json").write_bytes((path / "adapter_config.json").read_bytes())
        as_bin.append(other)

    streammerge.merge(recipe_for(method, loras), tmp_path / "one", memory=MEMORY)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        streammerge.merge(recipe_for(method, as_bin), tmp_path / "two", memory="3GiB")
    finally:
        torch.set_num_threads(threads)

    assert (tmp_path / "one" / NAME).read_bytes() == (tmp_path / "two" / NAME).read_bytes()
    assert [(path / NAME).read_bytes() for path in loras] == before
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "method", [name for name, each in COMBINATIONS.items() if each.sparsify is Sparsify.DROP]
)
def test_masks_follow_the_seed(method: str, loras: list[Path], tmp_path: Path):
    for seed in (0, 7):
        recipe = recipe_for(method, loras, seed=seed)
        streammerge.merge(recipe, tmp_path / f"{seed}", memory=MEMORY)

    assert (tmp_path / "0" / NAME).read_bytes() != (tmp_path / "7" / NAME).read_bytes()


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize(
    "method", [name for name, each in COMBINATIONS.items() if each.sparsify is not Sparsify.NOTHING]
)
def test_densities_at_their_ends(method: str, density: float, loras: list[Path], tmp_path: Path):
    recipe = recipe_for(method, loras, parameters={"density": density})
    streammerge.merge(recipe, tmp_path / "out", memory=MEMORY)
    found = read_tensors(tmp_path / "out")

    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
    if density == 0:
        for name, tensor in found.items():
            if "lora_B" in name:
                assert not bool(tensor.any())
    elif not COMBINATIONS[method].elects and method != "linear":
        same = {True: "linear", False: "svd"}[COMBINATIONS[method].target is Target.FACTORS]
        streammerge.merge(recipe_for(same, loras), tmp_path / "same", memory=MEMORY)
        expected = read_tensors(tmp_path / "same")
        for name in found:
            if "lora_A" in name:
                up = name.replace("lora_A", "lora_B")
                torch.testing.assert_close(
                    found[up] @ found[name], expected[up] @ expected[name], atol=1e-6, rtol=1e-5
                )


_MEASURE = """
import json, sys
from pathlib import Path
import streammerge
plan = streammerge.plan(json.loads(sys.argv[1]), memory="6GiB")
streammerge.merge(plan, sys.argv[2])
# The peak that getrusage tells is inherited from the process that started this one.
peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
print(json.dumps([plan.peak_memory, int(peak) * 1024]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's proc")
@pytest.mark.parametrize("method", ["linear", "ties", "cat", "svd", "ties_svd", "dare_ties_svd"])
def test_memory_stays_within_the_projection(method: str, tmp_path: Path):
    # Primes, so that no term of the projection can hide behind another.
    paths = []
    for index, rank in enumerate((61, 61)):
        torch.manual_seed(index)
        path = tmp_path / f"{index}"
        path.mkdir()
        stem = "base_model.model.model.layers.0.mlp.down_proj"
        tensors = {
            f"{stem}.lora_A.weight": torch.randn(rank, 2311),
            f"{stem}.lora_B.weight": torch.randn(1499, rank),
        }
        if method in ("linear", "ties", "cat", "svd"):
            tensors = {
                f"{stem}.lora_A.weight": torch.randn(rank, 100_003),
                f"{stem}.lora_B.weight": torch.randn(150_001, rank),
            }
        save_file(tensors, path / NAME)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 7, "target_modules": ["down_proj"]}
        (path / "adapter_config.json").write_text(json.dumps(config))
        paths.append(path)

    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, json.dumps(recipe_for(method, paths)), tmp_path / "out"],
        check=True,
        capture_output=True,
        text=True,
    )

    projected, measured = json.loads(done.stdout)
    assert measured <= projected
    # And not far below it either, else small machines are refused for nothing.
    assert measured >= projected * 0.4
