"""Products of factors: each element the sum of its terms in order, whatever is computed beside it."""

from __future__ import annotations

import math

import pytest
import torch
from models import assert_same_bits

from streammerge.adapters.onto_base import products
from streammerge.adapters.onto_base.products import multiply, multiply_in_order
from streammerge.native.library import load_kernels

SHAPES = [
    (1, 1, 1),
    (1, 7, 130),
    (3, 0, 5),
    (4, 1, 64),
    (5, 63, 65),
    (9, 64, 128),
    (6, 65, 63),
    (13, 200, 70),
    (130, 8, 3),
]


def draw(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    out = torch.full((left.shape[0], right.shape[1]), 7.0)
    multiply(left, right, out)
    return out


def in_order(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    out = torch.full((left.shape[0], right.shape[1]), 7.0)
    multiply_in_order(left, right, out)
    return out


@pytest.fixture(autouse=True)
def _needs_kernels() -> None:
    if load_kernels() is None:
        pytest.skip("no compiler was found at installation")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_the_sum_of_its_terms_in_order(shape: tuple[int, int, int]) -> None:
    rows, rank, columns = shape
    left, right = draw(rows, rank, 0), draw(rank, columns, 1)

    found = product(left, right)

    assert_same_bits(found, in_order(left, right))
    exact = left.double() @ right.double()
    # Each of the products and sums errs by half a unit of at most this much.
    bound = (rank + 1) * 2.0**-24 * (left.double().abs() @ right.double().abs())
    assert ((found.double() - exact).abs() <= bound + 1e-45).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_may_lie_in_any_order(shape: tuple[int, int, int]) -> None:
    rows, rank, columns = shape
    left, right = draw(rows, rank, 2), draw(rank, columns, 3)
    wide = torch.zeros(rows, 2 * rank + 1)
    wide[:, : 2 * rank : 2] = left

    turned = product(left.T.contiguous().T, right.T.contiguous().T)

    assert_same_bits(turned, product(left, right))
    assert_same_bits(product(wide[:, : 2 * rank : 2], right), turned)


def test_the_bits_of_an_element_depend_on_its_row_and_column_alone() -> None:
    left, right = draw(37, 70, 4), draw(70, 150, 5)
    whole = product(left, right)

    for rows, columns in ((slice(3, 4), slice(0, 150)), (slice(0, 37), slice(65, 66))):
        assert_same_bits(product(left[rows], right[:, columns]), whole[rows, columns])
    assert_same_bits(product(left[8:30], right[:, 61:140]), whole[8:30, 61:140])


@pytest.mark.parametrize("value", [-0.0, math.inf, -math.inf, math.nan, 1e-45, 3e38])
def test_odd_values_come_out_as_in_the_plain_way(value: float) -> None:
    left, right = draw(5, 3, 6), draw(3, 70, 7)
    left[2, 1] = value
    right[0, 69] = -0.0
    for first in (left, torch.full_like(left, value)):
        found, expected = product(first, right), in_order(first, right)
        assert torch.equal(found.isnan(), expected.isnan())
        assert_same_bits(found.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


def test_without_kernels_a_product_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = draw(20, 16, 8), draw(16, 90, 9)
    expected = product(left, right)
    monkeypatch.setattr(products, "load_kernels", lambda: None)

    assert_same_bits(product(left, right), expected)
