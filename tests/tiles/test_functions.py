"""Exponential and logarithm in elementary operations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from streammerge.tiles.compiling import compile_result
from streammerge.tiles.functions import (
    Floats,
    exponential,
    exponential_less_one,
    logarithm,
    logarithm_of_one_more,
)
from streammerge.tiles.interpreter import count_rows, run_program
from streammerge.tiles.writing import Sheet, hyperbolic_tangent


def test_exponential_agrees_with_the_library_to_two_units_in_the_last_place() -> None:
    values = np.random.default_rng(0).uniform(-700, 700, 100_000)
    exact = np.exp(values)
    assert np.max(np.abs(exponential(values) - exact) / exact) < 4.5e-16


def test_exponential_is_cut_off_where_float64_ends() -> None:
    values = exponential(np.array([-1000.0, 0.0, 1000.0]))
    assert values[0] == 0
    assert values[1] == 1
    assert 1e308 < values[2] < np.inf


def test_logarithm_agrees_with_the_library_to_1e_15() -> None:
    generator = np.random.default_rng(0)
    for values in (
        np.exp(generator.uniform(-300, 300, 100_000)),
        generator.uniform(0.9, 1.1, 100_000),
    ):
        exact = np.log(values)
        assert np.max(np.abs(logarithm(values) - exact) / np.abs(exact)) < 1e-15


def test_logarithm_of_one_is_zero() -> None:
    assert logarithm(np.array([1.0]))[0] == 0


def values_of_every_size(low: float, high: float) -> Floats:
    """Return numbers between two, and numbers of every size down to 1e-300, of both signs."""
    generator = np.random.default_rng(0)
    tiny = np.exp(generator.uniform(-690, 0, 100_000)) * generator.choice([-1, 1], 100_000)
    return np.concatenate([generator.uniform(low, high, 100_000), tiny])


@pytest.mark.parametrize("high", [1.0, 50.0, 700.0])
def test_exponential_less_one_agrees_with_the_library_to_1e_15(high: float) -> None:
    values = values_of_every_size(-high, high)
    exact = np.expm1(values)
    assert np.max(np.abs(exponential_less_one(values) - exact) / np.abs(exact)) < 1e-15


def test_exponential_less_one_is_cut_off_where_float64_ends() -> None:
    values = exponential_less_one(np.array([-1000.0, -40.0, 0.0, 1000.0]))
    assert values[:3].tolist() == [-1, -1, 0]
    assert 1e308 < values[3] < np.inf


@pytest.mark.parametrize("high", [1.0, 1e3, 1e300])
def test_logarithm_of_one_more_agrees_with_the_library_to_1e_15(high: float) -> None:
    values = values_of_every_size(-1, high)
    below = np.nextafter(-1, 0) + np.exp(np.random.default_rng(1).uniform(-36, -1, 1000))
    values = np.concatenate([values, below])
    exact = np.log1p(values)
    assert np.max(np.abs(logarithm_of_one_more(values) - exact) / np.abs(exact)) < 1e-15


@pytest.mark.parametrize("name", ["exp", "expm1", "log", "log1p"])
def test_functions_for_float32_are_rounded_to_the_nearest_but_for_one_in_a_thousand(
    name: str,
) -> None:
    function = {
        "exp": exponential,
        "expm1": exponential_less_one,
        "log": logarithm,
        "log1p": logarithm_of_one_more,
    }[name]
    values = values_of_every_size(-80, 80).astype(np.float32)
    values = values[np.abs(values) > 1e-37]
    if "log" in name:
        values = np.abs(values)

    exact = getattr(np, name)(values.astype(np.float64))
    found = function(values.astype(np.float64), single=True)

    assert np.max(np.abs(found - exact) / np.abs(exact)) < 5e-11
    assert np.mean(found.astype(np.float32) != exact.astype(np.float32)) < 1e-3


def test_logarithm_of_one_more_is_no_number_where_the_value_is_not_finite() -> None:
    assert np.isnan(logarithm_of_one_more(np.array([np.inf, np.nan]))).all()
    assert logarithm_of_one_more(np.array([0.0]))[0] == 0


class OneSource:
    """Models of one source's values."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def source(self, _source: int, out: torch.Tensor) -> None:
        out.copy_(self._values)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 4e-7), (torch.float64, 1e-15)], ids=str
)
def test_hyperbolic_tangent_agrees_with_the_library_and_is_odd(
    dtype: torch.dtype, tolerance: float
) -> None:
    program = compile_result(hyperbolic_tangent(Sheet(1, has_base=False).values[0]))
    positive = torch.from_numpy(np.abs(values_of_every_size(0, 25))).to(dtype)
    positive = torch.cat([positive[positive > 1e-37], torch.tensor([0.0, 1e30], dtype=dtype)])
    values = torch.cat([positive, -positive])

    memory = torch.empty(count_rows(program), values.numel(), dtype=dtype)
    found = run_program(
        program,
        OneSource(values),  # type: ignore[arg-type]
        numbers=[number.value for number in program.numbers],
        memory=memory,
        row_numel=values.numel(),
    )

    assert found is not None
    above, below = found.chunk(2)
    assert torch.equal(-above, below)
    exact = np.tanh(values.numpy().astype(np.float64))
    np.testing.assert_allclose(found.numpy().astype(np.float64), exact, rtol=tolerance)


@pytest.mark.parametrize(
    "function", [exponential, exponential_less_one, logarithm, logarithm_of_one_more]
)
def test_what_is_no_number_stays_none_without_a_warning(
    function: Callable[[Floats], Floats],
) -> None:
    found = function(np.array([1.0, np.nan]))
    assert np.isnan(found).tolist() == [False, True]
