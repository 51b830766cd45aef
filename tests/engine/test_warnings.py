"""Values that are refused give an error with a name, and no warning of numpy's beside it."""

from __future__ import annotations

import warnings
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from models import MEMORY, Models, recipe_of, without_kernels

import streammerge
from streammerge.errors import NonFiniteError


@pytest.mark.parametrize("pattern", [0x7FA00000, 0x7FC00000, 0x7F800000, 0xFFA00001])
@pytest.mark.parametrize("kernels", ["compiled", "plain"])
def test_values_that_are_not_finite_are_refused_without_a_warning(
    pattern: int, kernels: str, models: Models
) -> None:
    """Signalling and quiet NaN, and infinity."""
    values = np.ones(1000, dtype=np.float32)
    values.view(np.uint32)[7] = pattern
    bad = models.write({"a": torch.from_numpy(values)}, "bad")
    good = models.write({"a": torch.ones(1000)}, "good")
    recipe = recipe_of("linear", None, [good, bad])

    with warnings.catch_warnings(record=True) as caught, ExitStack() as stack:
        warnings.simplefilter("always")
        if kernels == "plain":
            stack.enter_context(without_kernels())
        with pytest.raises(NonFiniteError, match=r"element \[?7"):
            streammerge.merge(recipe, models.root / "out", memory=MEMORY)

    assert not any(issubclass(each.category, RuntimeWarning) for each in caught)


def test_a_result_beyond_its_type_is_refused_without_a_warning(models: Models) -> None:
    inputs = [models.write({"a": torch.full((1000,), 3e38)}, f"in-{i}") for i in range(2)]
    recipe = recipe_of("linear", None, inputs, parameters={"weight": 1.0, "normalize": False})

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(NonFiniteError, match="exceeds"):
            streammerge.merge(recipe, models.root / "out", memory=MEMORY)

    assert not any(issubclass(each.category, RuntimeWarning) for each in caught)
