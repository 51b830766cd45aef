"""Adapters' tensors stay within the room that the plan gives them, and so does the process."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from models import Models, recut, tight_plan, write_model
from numpy.typing import NDArray

from streammerge.engine import factors
from tests.adapters.onto_base.test_adapters_as_sources import write_adapter
from tests.test_memory import STATUS, run_merge

LAYERS = 12
RANK = 64
ROWS, COLUMNS = 3000, 40


class Live:
    """Counts the bytes of adapters' tensors that exist at once."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self._lock = threading.Lock()

    def allocate(self, nbytes: int) -> NDArray[np.uint8]:
        memory = np.empty(nbytes, dtype=np.uint8)
        with self._lock:
            self.now += nbytes
            self.peak = max(self.peak, self.now)
        weakref.finalize(memory, self._free, nbytes)
        return memory

    def _free(self, nbytes: int) -> None:
        with self._lock:
            self.now -= nbytes


def layers(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    return {f"layer{index}.weight": torch.ones(shape).bfloat16() for index in range(LAYERS)}


def write_layers_adapter(path: Path, shape: tuple[int, int], rank: int, **config: Any) -> Path:
    rows, columns = shape
    tensors = {}
    for index in range(LAYERS):
        name = f"layer{index}"
        tensors[f"{name}.lora_A.weight"] = torch.full((rank, columns), 2.0**-6).bfloat16()
        tensors[f"{name}.lora_B.weight"] = torch.full((rows, rank), 2.0**-6).bfloat16()
        if config.get("use_dora"):
            tensors[f"{name}.lora_magnitude_vector"] = torch.ones(rows).bfloat16()
    return write_adapter(path, tensors, target_modules=r".*", r=rank, **config)


def small(*shape: int) -> torch.Tensor:
    return torch.full(shape, 2.0**-6)


FORMS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    # Whole factors and what is made of them are large here.
    "LoKr": (
        {"peft_type": "LOKR", "r": 64, "alpha": 1},
        {"lokr_w1": small(2, 2), "lokr_w2_a": small(2000, 64), "lokr_w2_b": small(64, 300)},
    ),
    "LoHa": (
        {"peft_type": "LOHA", "r": 128, "alpha": 1},
        {
            f"hada_w{i}_{side}": small(*size)
            for i in (1, 2)
            for side, size in {"a": (4000, 128), "b": (128, 600)}.items()
        },
    ),
    "HRA": ({"peft_type": "HRA", "r": 128}, {"hra_u": small(600, 128)}),
    "BOFT": (
        {"peft_type": "BOFT", "boft_block_size": 300},
        {"boft_R": small(1, 2, 300, 300), "boft_s": small(4000, 1)},
    ),
    "OFT": (
        {
            "peft_type": "OFT",
            "oft_block_size": 600,
            "use_cayley_neumann": True,
            "peft_version": "0.21.2",
        },
        {"oft_R.weight": small(1, 600 * 599 // 2)},
    ),
}


def write_formed_adapter(
    path: Path, config: dict[str, Any], parts: dict[str, torch.Tensor]
) -> None:
    tensors = {
        f"layer{index}.{name}": tensor.clone()
        for index in range(LAYERS)
        for name, tensor in parts.items()
    }
    write_adapter(path, tensors, target_modules=r".*", lora_alpha=None, **config)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_no_more_factors_exist_than_the_plan_has_room_for(
    method: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is done with a chunk keeps nothing of it, however long it waits for the next."""
    base = models.write(layers((ROWS, COLUMNS)))
    adapter = write_layers_adapter(tmp_path / "adapter", (ROWS, COLUMNS), RANK)
    parameters = {"density": 0.5} if method == "ties" else {}
    recipe = {
        "method": method,
        "base": str(base),
        "sources": [{"path": str(adapter)}],
        "parameters": parameters,
    }
    plan = recut(tight_plan(recipe, workers=3), slots=12, workers=3)
    needed = (ROWS + COLUMNS) * RANK * 4
    assert needed <= plan.resources.factor_bytes < LAYERS * needed
    live = Live()
    monkeypatch.setattr(factors, "allocate", live.allocate)

    models.merge(plan)

    assert needed <= live.peak <= plan.resources.factor_bytes
    assert live.now == 0


@pytest.mark.skipif(not STATUS.exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dora", *FORMS])
def test_measured_peak_stays_within_the_plan(method: str, tmp_path: Path) -> None:
    shape = (4000, 600)
    write_model(tmp_path / "base", layers(shape))
    for name in ("a", "b"):
        if method in FORMS:
            write_formed_adapter(tmp_path / name, *FORMS[method])
            continue
        write_layers_adapter(tmp_path / name, shape, 256, use_dora=method == "dora")
    document = {
        "method": "ties" if method == "ties" else "task_arithmetic",
        "base": str(tmp_path / "base"),
        "sources": [{"path": str(tmp_path / name)} for name in ("a", "b")],
        "parameters": {"density": 0.3} if method == "ties" else {},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))

    measured = run_merge(tmp_path / "recipe.yaml", tmp_path / "out", "420MiB")

    assert measured["planned"] <= measured["budget"]
    assert measured["peak"] <= measured["planned"]
