"""Ranks within rows are those of a stable sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.native.library import load_kernels

KERNELS = load_kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no compiler was found at installation")


@settings(deadline=None, max_examples=200)
@given(
    rows=st.integers(0, 4),
    row_numel=st.one_of(st.integers(0, 40), st.integers(200, 3000)),
    seed=st.integers(0, 999),
    kind=st.sampled_from(["all differ", "16 bits", "few", "one", "zeros", "crowded", "special"]),
    in_place=st.booleans(),
)
def test_ranks_are_those_of_a_stable_sort(
    *, rows: int, row_numel: int, seed: int, kind: str, in_place: bool
) -> None:
    assert KERNELS is not None
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((rows, row_numel), dtype=np.float32)
    if kind == "16 bits":
        values = (values.view(np.int32) & ~0xFFFF).view(np.float32)
    elif kind == "few":
        values = np.round(values)
    elif kind == "one":
        values[:] = -0.5
    elif kind == "zeros":
        values[generator.random(values.shape) < 0.6] = -0.0
    elif kind == "crowded":
        # All but a few agree in their leading digits: these are not enough.
        values = 1 + np.abs(values) / 2**15
        values[generator.random(values.shape) < 0.01] *= 1e30
    elif kind == "special":
        values = generator.integers(-(2**31), 0x7F800000, values.shape, dtype=np.int64)
        values = values.astype(np.int32).view(np.float32)
        values[~np.isfinite(values)] = np.inf
    # Of equal magnitudes the first is the largest: sorted backwards, by a stable sort.
    order = np.argsort(np.abs(values[:, ::-1]), axis=1, kind="stable")
    expected = np.argsort(order, axis=1, kind="stable")[:, ::-1].astype(np.float32)
    ranks = values if in_place else np.empty_like(values)
    scratch = np.empty(2 * row_numel, dtype=np.uint64)

    KERNELS.rank_rows(
        values.ctypes.data,
        rows=rows,
        row_numel=row_numel,
        ranks=ranks.ctypes.data,
        scratch=scratch.ctypes.data,
    )

    np.testing.assert_array_equal(ranks, expected)
