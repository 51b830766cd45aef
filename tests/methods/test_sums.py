"""Methods that say they are sums let NaN and infinity of any operand reach the result.

The engine then checks results alone, and looks for the culprit only when one is not finite.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import write_model

import streammerge as sm
from streammerge.errors import NonFiniteError
from streammerge.methods import discover_methods
from streammerge.methods.base import Operand

SUMS = {name: method for name, method in discover_methods().items() if method.sums}
PARAMETERS = ({}, {"weight": [0.0, 1.0]}, {"weight": [-1.0, 0.5]})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("culprit", ["base", "sources[0]", "sources[1]"])
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        pytest.param(name, parameters, id=f"{name}-{parameters}")
        for name, method in SUMS.items()
        for parameters in PARAMETERS
        if parameters.keys() <= {spec.name for spec in method.parameters}
    ],
)
def test_a_value_that_is_not_finite_is_named_whatever_it_is_weighed_with(
    tmp_path: Path, name: str, parameters: dict[str, list[float]], culprit: str, value: float
) -> None:
    on_task_vectors = SUMS[name].operand is Operand.TASK_VECTORS
    if culprit == "base" and not on_task_vectors:
        pytest.skip("takes no base")
    paths = {}
    for seed, label in enumerate(("base", "sources[0]", "sources[1]")):
        weights = torch.randn(300, generator=torch.Generator().manual_seed(seed))
        if label == culprit:
            weights[7] = value
        paths[label] = str(write_model(tmp_path / f"model-{seed}", {"w": weights}))
    base = {"base": paths.pop("base")} if on_task_vectors else {}
    sources = [{"path": paths[f"sources[{index}]"]} for index in range(2)]
    recipe = {"method": name, "sources": sources, "parameters": parameters, **base}

    with pytest.raises(NonFiniteError, match=r"element \[7\]") as caught:
        sm.merge(recipe, tmp_path / "out", memory="4GiB")

    assert f"{culprit} (" in str(caught.value)
