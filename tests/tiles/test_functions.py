"""Exponential and logarithm in elementary operations."""

from __future__ import annotations

import numpy as np

from streammerge.tiles.functions import exponential, logarithm


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
