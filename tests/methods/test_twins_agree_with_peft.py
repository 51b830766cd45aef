"""The twins' ``peft`` presets against PEFT's merge functions, in float64 on both sides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor
from twins import families, sums

# PEFT warns at density 1.
pytestmark = pytest.mark.filterwarnings("ignore:The density .* no pruning will be performed")

SHAPES = ((), (1,), (7, 1), (1, 7), (30, 20), (2, 3, 4))
WEIGHTS = [0.5, -0.75, 1.0]


def make_inputs(shape: tuple[int, ...]) -> tuple[np.ndarray, list[np.ndarray], list[Tensor]]:
    """Return a base, sources, and the task vectors as PEFT takes them."""
    values = np.random.default_rng(len(shape)).standard_normal((4, *shape))
    base, sources = values[0], list(values[1:])
    return base, sources, [torch.from_numpy(np.array(source - base)) for source in sources]


def check(base: np.ndarray, merged: np.ndarray, change: Tensor) -> None:
    np.testing.assert_allclose(merged, base + change.numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("method", ["total", "frequency"])
def test_trimming_methods_agree_with_peft(
    shape: tuple[int, ...], density: float, method: str
) -> None:
    base, sources, tasks = make_inputs(shape)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    trim: dict[str, Any] = {"weight": WEIGHTS, "density": density}

    check(
        base,
        families.ties(base, sources, majority_sign_method=method, **trim),
        merge_utils.ties(tasks, weights, density, method),
    )
    check(
        base,
        families.magnitude_prune(base, sources, **trim),
        merge_utils.magnitude_prune(tasks, weights, density),
    )
    check(
        base,
        sums.task_arithmetic(base, sources, weight=WEIGHTS),
        merge_utils.task_arithmetic(tasks, weights),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("method", ["total", "frequency"])
def test_random_methods_agree_with_peft_given_its_masks(
    shape: tuple[int, ...], density: float, method: str
) -> None:
    base, sources, tasks = make_inputs(shape)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    torch.manual_seed(0)
    masks = [merge_utils.prune(torch.ones_like(task), density, "random").numpy() for task in tasks]
    drop: dict[str, Any] = {"weight": WEIGHTS, "density": density, "masks": masks}

    torch.manual_seed(0)
    linear = merge_utils.dare_linear(tasks, weights, density)
    check(base, families.dare_linear(base, sources, **drop), linear)
    torch.manual_seed(0)
    elected = merge_utils.dare_ties(tasks, weights, density, method)
    merged = families.dare_ties(base, sources, majority_sign_method=method, **drop)
    check(base, merged, elected)
