"""Changes as the machine computes them: factors in tiles, any range of a matrix, several in one place."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import MEMORY, assert_same_bits, load_model, write_model

import streammerge
from streammerge.adapters.onto_base.products import PlainProduct, Tiles, multiply_in_order
from streammerge.native.library import Kernels, load_kernels
from streammerge.native.machine import TILE_COLUMNS
from tests.adapters.onto_base.test_adapters_as_sources import write_adapter

SHAPES = [(1, 1, 1), (3, 0, 5), (4, 1, 64), (5, 63, 65), (9, 64, 128), (6, 65, 63), (13, 70, 200)]
ODD = 0.30000001192092896
"""A scaling that rounds almost every product."""


@pytest.fixture
def kernels() -> Kernels:
    found = load_kernels()
    if found is None:
        pytest.skip("no compiler was found at installation")
    return found


def draw(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def in_tiles(right: np.ndarray, most: int = 64 * 1024) -> np.ndarray:
    """Lay out a right factor, brought in ranges of at most so many elements."""
    flat = np.full(right.size, 7.0, dtype=np.float32)
    tiles = Tiles(flat, right.shape)
    for begin, end in tiles.ranges(most):
        assert end - begin <= most
        tiles.put(begin, right.reshape(-1)[begin:end])
    return flat


def change_of(up: np.ndarray, right: np.ndarray, scaling: float = ODD) -> PlainProduct:
    return PlainProduct(in_tiles(right), up, right.shape[1], scaling)


def fill(
    kernels: Kernels, change: PlainProduct, out: np.ndarray, start: int, *, adds: bool = False
) -> None:
    call = change.call(out, adds=adds)
    kernels.change_range(ctypes.addressof(call), start=start, numel=out.size)


def plainly(up: np.ndarray, right: np.ndarray, scaling: float = ODD) -> np.ndarray:
    """Multiply term by term, then scale: every step rounded."""
    out = torch.empty(up.shape[0], right.shape[1])
    multiply_in_order(torch.from_numpy(up), torch.from_numpy(right), out)
    return (out.numpy() * np.float32(scaling)).reshape(-1)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert_same_bits(torch.from_numpy(found), torch.from_numpy(expected))


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("most", [TILE_COLUMNS, 130, 64 * 1024])
def test_tiles_hold_columns_side_by_side_however_they_are_brought(columns: int, most: int) -> None:
    right = draw(3, columns, 0)

    flat = in_tiles(right, most)

    expected = [
        right[:, begin : begin + TILE_COLUMNS].reshape(-1)
        for begin in range(0, columns, TILE_COLUMNS)
    ]
    assert_same(flat, np.concatenate(expected))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_change_is_the_product_term_by_term_times_its_scaling(
    shape: tuple[int, int, int], kernels: Kernels
) -> None:
    rows, rank, columns = shape
    up, right = draw(rows, rank, 1), draw(rank, columns, 2)
    out = np.full(rows * columns, 7.0, dtype=np.float32)

    fill(kernels, change_of(up, right), out, 0)

    assert_same(out, plainly(up, right))


def test_any_range_has_the_bits_of_the_whole(kernels: Kernels) -> None:
    up, right = draw(11, 5, 3), draw(5, 150, 4)
    change, whole = change_of(up, right), plainly(up, right)

    for start, numel in ((0, 1), (149, 2), (10, 140), (63, 66), (37, 1200), (300, 450), (1649, 1)):
        out = np.full(numel, 7.0, dtype=np.float32)
        fill(kernels, change, out, start)
        assert_same(out, whole[start : start + numel])


def test_a_second_change_is_added_once_it_is_scaled(kernels: Kernels) -> None:
    first, second = (draw(9, 4, 5), draw(4, 70, 6)), (draw(9, 2, 7), draw(2, 70, 8))
    out = np.empty(500, dtype=np.float32)

    fill(kernels, change_of(*first), out, 100)
    fill(kernels, change_of(*second, scaling=-1.7), out, 100, adds=True)

    expected = plainly(*first) + plainly(*second, scaling=-1.7)
    assert_same(out, expected[100:600])


@pytest.mark.parametrize("value", [-0.0, math.inf, math.nan, 1e-45, 3e38])
def test_odd_values_come_out_as_in_the_plain_way(value: float, kernels: Kernels) -> None:
    up, right = draw(5, 3, 9), draw(3, 70, 10)
    up[2, 1] = value
    right[0, 69] = -0.0
    out = np.empty(350, dtype=np.float32)

    fill(kernels, change_of(up, right), out, 0)

    with np.errstate(all="ignore"):
        expected = plainly(up, right)
    assert np.array_equal(np.isnan(out), np.isnan(expected))
    assert_same(np.nan_to_num(out, nan=0.0), np.nan_to_num(expected, nan=0.0))


def test_two_changes_of_one_source_are_added_up_before_they_reach_the_base(
    kernels: Kernels, tmp_path: Path
) -> None:
    """In several blocks of one call; a plan may say so, though adapters usually have one of each tensor."""
    base = {
        f"{name}.weight": torch.from_numpy(draw(1100, 130, seed)) for seed, name in enumerate("ab")
    }
    factors = {
        name: (draw(4, 130, seed), draw(1100, 4, seed + 1)) for name, seed in (("a", 20), ("b", 30))
    }
    stored = {}
    for name, (down, up) in factors.items():
        stored[f"{name}.lora_A.weight"] = torch.from_numpy(down)
        stored[f"{name}.lora_B.weight"] = torch.from_numpy(up)
    lora = write_adapter(tmp_path / "lora", stored, target_modules=["a", "b"], r=4, lora_alpha=3)
    recipe = {
        "method": "task_arithmetic",
        "base": str(write_model(tmp_path / "base", base)),
        "sources": [{"path": str(lora)}],
    }
    plan = streammerge.plan(recipe, memory=MEMORY)
    assert isinstance(plan, streammerge.MergePlan)
    assert not plan.needs_torch
    both = tuple(change for task in plan.tasks for change in task.changes)
    plan = replace(plan, tasks=tuple(replace(task, changes=both) for task in plan.tasks))

    streammerge.merge(plan, tmp_path / "out")

    added = plainly(*reversed(factors["a"]), 0.75) + plainly(*reversed(factors["b"]), 0.75)
    merged = load_model(tmp_path / "out")
    for name, values in base.items():
        assert_same_bits(merged[name], values + torch.from_numpy(added).view(values.shape), name)
