"""PCB-Merging gives what its twin gives, where ranks, ranges and scores are degenerate, too."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from models import Models, Tensors, recipe_of, without_kernels
from numpy.typing import NDArray
from twins import competition
from twins.shapes import join_model, over_model

Array = NDArray[np.float64]
SHAPES = {
    "smooth": (60, 50),
    "strong": (700,),
    "opposed": (900,),
    "half zeros": (400,),
    "constant": (300,),
    "zeros": (50,),
    "two": (2,),
    "one": (1,),
    "scalar": (),
    "none": (0,),
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "half": {"ratio": 0.5, "clamp": 0.01, "lambda": 0.6},
    "all": {"ratio": 1.0, "clamp": 0.0},
    "best": {"ratio": 0.0, "clamp": 0.2},
    "crossed": {"ratio": 0.3, "clamp": 0.5},
}
"""Of the last, the limits cross where the number of entries is even."""


def draw(sources: int, dtype: torch.dtype) -> list[Tensors]:
    """Return a base and its sources."""
    generator = torch.Generator().manual_seed(sources)

    def noise(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    # Sixteenths, so that differences in halves are exact.
    base = {name: (noise(shape, 4.0)).round() / 16 for name, shape in SHAPES.items()}
    models = [base]
    for index in range(sources):
        tasks = {name: noise(shape, 0.05) for name, shape in SHAPES.items()}
        tasks["strong"] *= 20
        # Most scores are negative.
        tasks["opposed"] = tasks["opposed"].abs() * (-1.0 if index else 0.1 + sources)
        tasks["half zeros"] *= (noise((400,), 1.0) > 0).double()
        tasks["constant"] = noise((300,), 1.0).sign() / 2
        tasks["zeros"] *= 0
        models.append({name: base[name] + task for name, task in tasks.items()})
    return [{name: tensor.to(dtype) for name, tensor in model.items()} for model in models]


def merge(
    models: Models, drawn: list[Tensors], parameters: Mapping[str, Any], **document: Any
) -> dict[str, Array]:
    base, *sources = [models.write(each) for each in drawn]
    recipe = recipe_of("pcb", base, sources, parameters=dict(parameters), **document)
    merged, _ = models.merge(recipe)
    return as_arrays(merged)


def as_arrays(model: Tensors) -> dict[str, Array]:
    return {name: tensor.double().numpy() for name, tensor in model.items()}


def expected_of(
    drawn: list[Tensors], parameters: Mapping[str, Any], *, of_model: bool
) -> dict[str, Array]:
    base, *sources = [as_arrays(each) for each in drawn]
    options = {name.replace("lambda", "lambda_"): value for name, value in parameters.items()}
    if of_model:
        return over_model(competition.pcb, base, sources, **options)
    return {
        name: competition.pcb(base[name], [each[name] for each in sources], **options)
        for name in base
    }


def weights_of(sources: int) -> list[float]:
    return [(1.0, -0.7, 0.3)[index % 3] for index in range(sources)]


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("sources", [1, 2, 5])
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_float64_gives_the_values_of_the_twin(
    parameters: str, sources: int, scope: str, models: Models
) -> None:
    drawn = draw(sources, torch.float64)
    asked = PARAMETERS[parameters] | {"weight": weights_of(sources)}

    merged = merge(models, drawn, asked | {"scope": scope}, compute_dtype="float64")

    expected = expected_of(drawn, asked, of_model=scope == "model")
    for name, values in expected.items():
        scale = np.max(np.abs(values - drawn[0][name].numpy()), initial=0.0)
        np.testing.assert_allclose(
            merged[name], values, rtol=0, atol=1e-12 * (1 + scale), err_msg=name
        )


def near_a_cut(tasks: list[Array], *, ratio: float, clamp: float) -> NDArray[np.bool_]:
    """Return where rounding may decide whether an entry weighs next to nothing, or nothing at all."""
    near = np.zeros(tasks[0].shape, dtype=np.bool_)
    for _clamped, score in competition.score_tasks(tasks, clamp=clamp, cross="sum"):
        cut = np.sort(score)[int(score.size * (1 - ratio))]
        near |= np.abs(score - cut) < 1e-4 * np.abs(cut)
    return near


@pytest.mark.parametrize("kernels", ["compiled", "plain"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("sources", [1, 2, 5])
def test_float32_gives_the_values_of_the_twin_away_from_the_cuts(
    sources: int, scope: str, kernels: str, models: Models
) -> None:
    names = ["smooth", "strong", "opposed", "half zeros"]
    drawn = [{name: model[name] for name in names} for model in draw(sources, torch.float32)]
    asked = {"ratio": 0.5, "clamp": 0.01, "weight": weights_of(sources)}

    with nullcontext() if kernels == "compiled" else without_kernels():
        merged = merge(models, drawn, asked | {"scope": scope})

    expected = expected_of(drawn, asked, of_model=scope == "model")
    for part in [names] if scope == "model" else [[name] for name in names]:
        base, *tuned, found, wanted = (
            join_model({name: model[name] for name in part})
            for model in (*map(as_arrays, drawn), merged, expected)
        )
        near = near_a_cut([each - base for each in tuned], ratio=0.5, clamp=0.01)
        assert np.mean(near) < 0.02
        change = np.max(np.abs(wanted - base))
        np.testing.assert_allclose(found[~near], wanted[~near], rtol=0, atol=1e-5 * change)


def test_a_tensor_of_several_blocks_gives_the_values_of_the_twin(models: Models) -> None:
    """Values are then searched for, block by block."""
    generator = torch.Generator().manual_seed(3)
    base = {"w": torch.zeros(3, 100_000)}
    tuned = [
        {"w": torch.randn(3, 100_000, generator=generator) * scale} for scale in (0.01, 0.02, 0.01)
    ]
    drawn = [base, *tuned]
    tasks = [each["w"].double().numpy().ravel() for each in tuned]

    merged = merge(models, drawn, {"ratio": 0.2})

    expected = expected_of(drawn, {"ratio": 0.2}, of_model=False)
    near = near_a_cut(tasks, ratio=0.2, clamp=0.0001)
    assert np.mean(near) < 0.02
    found, wanted = merged["w"].ravel()[~near], expected["w"].ravel()[~near]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.max(np.abs(wanted)))
