"""Sums that no order and no grouping changes."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streammerge.statistics.exact import NOT_FINITE, ZERO, added, exact_rows, exact_sums, rounded

numbers = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300)


@given(st.lists(numbers, min_size=1, max_size=20), st.data())
def test_a_sum_of_groups_is_the_exact_sum_of_all_rounded_once(
    values: list[float], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(values)))
    groups = [np.array(group)[:, None] for group in (values[:cut], values[cut:]) if group]

    total = ZERO
    for group in groups:
        total = added(total, exact_sums(group)[0])

    assert rounded(total) == math.fsum(values)


@given(st.lists(numbers, min_size=2, max_size=12))
def test_columns_are_summed_each_by_itself(values: list[float]) -> None:
    rows = np.array([values, values[::-1]])

    assert [rounded(each) for each in exact_sums(rows)] == [math.fsum(column) for column in rows.T]


def test_what_is_not_finite_stays_so() -> None:
    (infinite,) = exact_sums(np.array([[1.0], [math.inf]]))

    assert infinite == NOT_FINITE
    assert math.isnan(rounded(added(infinite, (1, 0))))


def test_numbers_of_rows_stand_by_themselves_and_so_does_what_is_not_finite() -> None:
    given = np.array([[1.5, -0.0, math.nan], [math.inf, 5e-324, -1e300]])

    rows = exact_rows(given)

    assert [[each == NOT_FINITE for each in row] for row in rows] == [
        [False, False, True],
        [True, False, False],
    ]
    assert rows[0][1] == ZERO
    assert [rounded(rows[row][at]) for row, at in ((0, 0), (1, 1), (1, 2))] == [1.5, 5e-324, -1e300]
    assert exact_sums(given[1:]) == rows[1]


def test_a_sum_beyond_float64_is_infinite() -> None:
    (large,) = exact_sums(np.array([[1.7e308], [1.7e308]]))

    assert rounded(large) == math.inf
    assert rounded((-large[0], large[1])) == -math.inf
    assert rounded(added(large, (-large[0], large[1]))) == 0.0


def test_numbers_far_apart_are_all_kept() -> None:
    (total,) = exact_sums(np.array([[1e300], [5e-324], [-1e300]]))

    assert rounded(total) == 5e-324
