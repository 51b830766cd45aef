"""Rows that are wider than a block are computed one by one, also where a sample lies across two."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from models import BLOCK, Models, assert_same_model, recipe_of, without_kernels
from oracles import apply_to_whole_tensors

METHOD = "arcee_fusion"
"""It ranks what depends on whole rows, and ranks of large tensors are found from samples."""


@pytest.mark.parametrize("kernels", [True, False], ids=["compiled", "plain"])
def test_a_sample_may_lie_across_two_of_them(models: Models, *, kernels: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    base, tuned = ({"w": torch.randn(2, BLOCK + 37, generator=generator)} for _ in range(2))
    recipe = recipe_of(METHOD, models.write(base), [models.write(tuned)])

    with nullcontext() if kernels else without_kernels():
        merged, _ = models.merge(recipe)

    assert_same_model(merged, apply_to_whole_tensors(METHOD, base, [tuned], {}))
