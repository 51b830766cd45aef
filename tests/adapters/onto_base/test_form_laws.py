"""Adapters of every form keep the laws: any number of threads, any budget, cut off and resumed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MEMORY, Models, assert_same_model, load_model, recut, write_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import streammerge
from streammerge.adapters.files.forms import Form
from streammerge.errors import MemoryBudgetError, NonFiniteError
from streammerge.plan.codec import dump_plan, parse_plan
from tests.adapters.onto_base.test_adapters_as_sources import write_adapter
from tests.test_resume import bytes_of, interrupt_after

Tensors = dict[str, Tensor]
ROWS, COLUMNS = 411, 780  # rows lie across the end of a block
LAYERS = 3


def random(*shape: int) -> Tensor:
    return torch.randn(*shape) / 4


def oft(size: int, **config: Any) -> tuple[Tensors, dict[str, Any]]:
    triangles = random(COLUMNS // size, size * (size - 1) // 2)
    options = {"oft_block_size": size, "use_cayley_neumann": False, **config}
    return {"oft_R.weight": triangles}, {"peft_type": "OFT", **options}


def of_peft(form: Form) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors of a module, and the configuration of its adapter."""
    match form:
        case Form.LOKR:
            factors = {
                "lokr_w1": random(3, 4),
                "lokr_w2_a": random(137, 2),
                "lokr_w2_b": random(2, 195),
            }
            return factors, {"peft_type": "LOKR", "r": 2, "alpha": 3}
        case Form.LOHA:
            sides = {"a": (ROWS, 5), "b": (5, COLUMNS)}
            factors = {
                f"hada_w{i}_{s}": random(*shape) for i in (1, 2) for s, shape in sides.items()
            }
            return factors, {"peft_type": "LOHA", "r": 5, "alpha": 3}
        case Form.OFT:
            return oft(26)
        case Form.BOFT:
            factors = {"boft_R": random(1, 12, 65, 65), "boft_s": torch.rand(ROWS, 1) + 0.5}
            return factors, {"peft_type": "BOFT", "boft_block_size": 65}
        case Form.HRA:
            return {"hra_u": random(COLUMNS, 4)}, {"peft_type": "HRA", "r": 4}
        case Form.VBLORA:
            factors = {
                "vblora_logits_A": random(3, COLUMNS // 3, 30),
                "vblora_logits_B": random(ROWS // 3, 3, 30),
            }
            return factors, {"peft_type": "VBLORA", "r": 3, "topk": 2}
    raise AssertionError(form)


FORMS = [Form.LOKR, Form.LOHA, Form.OFT, Form.BOFT, Form.HRA, Form.VBLORA]


def write_form(path: Path, form: Form, seed: int) -> Path:
    torch.manual_seed(seed)
    tensors: Tensors = {}
    for index in range(LAYERS):
        factors, config = of_peft(form)
        tensors |= {f"layer{index}.{name}": tensor for name, tensor in factors.items()}
    write_adapter(path, tensors, target_modules=r".*", lora_alpha=None, **config)
    if form is Form.VBLORA:
        # Beside the modules' tensors, under a name without their beginning.
        held = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
        held["base_model.vblora_vector_bank"] = random(30, 3)
        save_file(held, path / "adapter_model.safetensors")
    return path


def write_base(path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {f"layer{index}.weight": random(ROWS, COLUMNS).bfloat16() for index in range(LAYERS)}
    return write_model(path, tensors, shards=2)


def recipe_for(root: Path, form: Form, method: str = "ties", **keys: Any) -> dict[str, Any]:
    parameters = {"density": 0.4} if method == "ties" else {}
    sources = [{"path": str(write_form(root / f"a{seed}", form, seed))} for seed in (1, 2)]
    base = str(write_base(root / "base"))
    return {"method": method, "base": base, "sources": sources, "parameters": parameters} | keys


@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_the_same_for_any_cut_and_any_number_of_threads(
    form: Form, tmp_path: Path, models: Models
) -> None:
    recipe = recipe_for(tmp_path, form)
    plan = streammerge.plan(recipe, memory=MEMORY, workers=4)
    merged, _ = models.merge(plan)
    smallest, _ = models.merge(recut(plan, slots=1, workers=1, statistics_bytes=1))
    read_back, _ = models.merge(parse_plan(dump_plan(plan)))

    assert_same_model(smallest, merged)
    assert_same_model(read_back, merged)
    base = load_model(tmp_path / "base")
    assert all(not torch.equal(merged[name], tensor) for name, tensor in base.items())


@pytest.mark.parametrize("form", FORMS)
def test_a_merge_that_was_cut_off_ends_with_the_same_bytes(form: Form, tmp_path: Path) -> None:
    plan = recut(streammerge.plan(recipe_for(tmp_path, form), memory=MEMORY), slots=1, workers=1)
    streammerge.merge(plan, tmp_path / "whole")
    for writes in (1, 2):
        interrupt_after(plan, tmp_path / "out", writes, resume=True)

    manifest = streammerge.merge(plan, tmp_path / "out", resume=True)

    assert manifest.run.resumed
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("form", FORMS)
def test_the_smallest_budget_is_named_and_suffices(form: Form, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, form)
    with pytest.raises(MemoryBudgetError) as refusal:
        streammerge.plan(recipe, memory=1)
    found = re.search(r"--memory (\w+) or more", str(refusal.value))
    assert found is not None

    plan = streammerge.plan(recipe, memory=found[1])

    assert plan.memory.peak <= plan.memory.budget
    assert plan.memory.factors


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_in_a_file_is_named(form: Form, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, form, method="linear")
    path = tmp_path / "a1" / "adapter_model.safetensors"
    held = load_file(path)
    name = min(held)
    held[name].view(-1)[1] = float("inf")
    save_file(held, path)

    with pytest.raises(NonFiniteError, match=re.escape(name)):
        streammerge.merge(recipe, tmp_path / "out", memory=MEMORY)
