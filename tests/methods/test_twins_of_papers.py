"""Twins of methods without a second implementation at hand, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from twins import competition, families, localising, matrices, sce, sums
from twins.paper_ties import ties_over_model
from twins.shapes import Array, over_model
from twins.sparsifying import count_kept, della_probabilities, keep_between, keep_largest

ZERO = np.zeros(4)


def array(*values: float) -> Array:
    return np.array(values, dtype=np.float64)


def orthonormal(rows: int, columns: int, seed: int) -> Array:
    drawn = np.random.default_rng(seed).standard_normal((rows, columns))
    return np.asarray(np.linalg.qr(drawn)[0])


# Averages.


def test_the_newest_checkpoint_weighs_most_in_an_exponential_average() -> None:
    weights = sums.average_weights(3, schedule="exponential", decay=0.5)

    assert weights == [1 / 7, 2 / 7, 4 / 7]
    merged = sums.average(
        None, [array(7.0), array(0.0), array(14.0)], schedule="exponential", decay=0.5
    )
    np.testing.assert_allclose(merged, [9.0])


@pytest.mark.parametrize("decay", [0.5, 0.9, 1.0])
def test_weights_of_64_checkpoints_sum_to_one(decay: float) -> None:
    weights = sums.average_weights(64, schedule="exponential", decay=decay)

    assert sum(weights) == pytest.approx(1.0)
    assert weights == sorted(weights)


def test_an_average_without_decay_is_uniform() -> None:
    sources = [array(1.0, 2.0), array(3.0, 6.0)]

    np.testing.assert_allclose(sums.average(None, sources), [2.0, 4.0])
    exponential = sums.average(None, sources, schedule="exponential", decay=1.0)
    np.testing.assert_allclose(exponential, [2.0, 4.0])


# Trims.


def test_a_trim_truncates_the_float_product() -> None:
    assert count_kept(100, 0.29, "floor") == 28
    assert count_kept(3, 0.01, "floor") == 0
    assert count_kept(3, 0.01, "at_least_one") == 1
    assert count_kept(3, 0.0, "at_least_one") == 0


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("exact", [-2, 3, 2, 0, 0]),
        ("inclusive", [-2, 3, 2, 2, 0]),
        ("strict", [0, 3, 0, 0, 0]),
    ],
)
def test_tie_policies_say_which_of_equal_magnitudes_stay(
    policy: str, expected: list[float]
) -> None:
    task = array(-2, 3, 2, 2, 1)

    np.testing.assert_array_equal(keep_largest(task, density=0.6, tie_policy=policy), expected)


@pytest.mark.parametrize(
    ("density", "gamma", "expected"),
    [
        (0.4, 0.2, [0, 4, 3, 0, 0]),  # the largest goes, then two stay
        (0.4, 0.0, [5, 4, 0, 0, 0]),  # nothing goes at the top
        (0.6, 0.8, [0, 0, 3, 2, 1]),  # what goes at the top leaves what is to be kept
        (0.0, 0.2, [0, 0, 0, 0, 0]),
    ],
)
def test_breadcrumbs_keep_what_lies_between_two_cuts(
    density: float, gamma: float, expected: list[float]
) -> None:
    task = array(5, 4, 3, 2, 1)

    np.testing.assert_array_equal(keep_between(task, density=density, gamma=gamma), expected)


def test_della_keeps_larger_magnitudes_more_often_in_equal_steps() -> None:
    task = np.array([[1.0, -3.0, 2.0], [0.0, 0.0, 9.0]])

    probabilities = della_probabilities(task, density=0.5, epsilon=0.2)

    # Of equal magnitudes the first counts as the larger.
    np.testing.assert_allclose(probabilities, [[0.3, 0.7, 0.5], [0.5, 0.3, 0.7]])


def test_della_ranks_are_exact_in_long_rows() -> None:
    probabilities = della_probabilities(np.arange(1.0, 10_001), density=0.5, epsilon=0.4)

    assert np.unique(probabilities).size == 10_000
    assert np.all(np.diff(probabilities) > 0)


def test_the_papers_della_divides_by_each_entrys_probability() -> None:
    base, source, mask = np.zeros((1, 3)), np.array([[1.0, -3.0, 2.0]]), np.array([[1, 1, 0]])

    merged = families.della_linear(
        base, [source], masks=[mask], preset="paper", density=0.5, epsilon=0.2
    )

    np.testing.assert_allclose(merged, [[1 / 0.3, -3 / 0.7, 0]])


def test_darex_divides_by_q_in_place_of_the_density() -> None:
    source, mask = array(1, 2, 3, 4), array(1, 0, 1, 0)

    merged = families.dare_linear(ZERO, [source], masks=[mask], density=0.5, rescale_by=0.8)

    np.testing.assert_allclose(merged, [1.25, 0, 3.75, 0])


def test_magnitude_prune_over_a_model_spends_the_budget_where_changes_are_large() -> None:
    base = {"a": np.zeros(2), "b": np.zeros((2, 2))}
    source = {"a": array(1, 2), "b": np.array([[9.0, -8.0], [7.0, 3.0]])}

    merged = over_model(families.magnitude_prune, base, [source], density=0.5)

    np.testing.assert_array_equal(merged["a"], [0, 0])
    np.testing.assert_array_equal(merged["b"], [[9, -8], [7, 0]])


# TIES as in the paper's notebook.


def test_ties_keeps_one_more_than_the_fraction_and_all_that_equal_it() -> None:
    base = {"w": np.zeros(10)}

    kept = ties_over_model(base, [{"w": np.arange(1.0, 11)}], keep=0.2)["w"]
    equal = ties_over_model(base, [{"w": np.ones(10)}], keep=0.2)["w"]

    assert np.count_nonzero(kept) == 3
    assert np.count_nonzero(equal) == 10


def test_a_cancelled_vote_takes_the_sign_of_the_whole_model() -> None:
    base = {"a": np.zeros(1), "b": np.zeros(2)}
    sources = [{"a": array(1), "b": array(-1, -1)}, {"a": array(-1), "b": array(-1, -1)}]

    merged = ties_over_model(base, sources, keep=1.0)

    np.testing.assert_array_equal(merged["a"], [-1])
    np.testing.assert_array_equal(merged["b"], [-1, -1])
    alone = families.ties(base["a"], [source["a"] for source in sources])
    np.testing.assert_array_equal(alone, [1])


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_ties_of_parts_over_a_model_is_that_of_the_notebook(keep: float) -> None:
    """Small whole numbers: many are equal, and many votes cancel."""
    draws = np.random.default_rng(3).integers(-3, 4, (4, 2, 50)).astype(np.float64)
    base, *sources = [{"a": draw[0], "b": draw[1]} for draw in draws]

    expected = ties_over_model(base, sources, keep=keep, lambda_=0.5)
    actual = over_model(families.ties, base, sources, preset="paper", density=keep, lambda_=0.5)

    for name, values in expected.items():
        np.testing.assert_allclose(actual[name], values, rtol=1e-14, atol=1e-14)


def test_ties_trims_over_all_tensors_together() -> None:
    base = {"a": np.zeros(5), "b": np.zeros(5)}
    source = {"a": np.arange(1.0, 6), "b": np.arange(11.0, 16)}

    merged = ties_over_model(base, [source], keep=0.4)

    np.testing.assert_array_equal(merged["a"], np.zeros(5))
    np.testing.assert_array_equal(merged["b"], source["b"])


# SCE over a model.


def test_sce_over_a_model_weighs_and_selects_over_all_tensors() -> None:
    base = {"a": np.zeros(2), "b": np.zeros(2)}
    sources = [{"a": array(1, 1), "b": array(3, 1)}, {"a": array(1, 1), "b": array(1, 3)}]

    merged = over_model(sce.sce, base, sources, select_topk=0.5)

    # Only b varies, equally; half of its two entries is the first. 9 and 1 are the energies.
    np.testing.assert_array_equal(merged["a"], [0, 0])
    np.testing.assert_allclose(merged["b"], [0.9 * 3 + 0.1 * 1, 0])


# Localising.


def test_tall_masks_compare_a_task_with_the_rest_of_the_sum() -> None:
    sources = [array(4, 1, 0, 2), array(1, 1, 0, -2)]

    first, second = localising.tall_masks(ZERO, sources, mask_lambda=1.0)

    assert first.tolist() == [True, True, True, True]
    assert second.tolist() == [False, True, True, True]
    strict = localising.tall_masks(ZERO, sources, mask_lambda=1.0, strict=True)
    assert [mask.tolist() for mask in strict] == [[True, False, False, False], [False] * 4]


@pytest.mark.parametrize(
    ("k", "expected"),
    [(0, [5, 2, 0, 1]), (1, [5, 2, 0, 1]), (2, [0, 2, 0, 0]), (3, [0, 0, 0, 0])],
)
def test_consensus_keeps_of_the_sum_what_enough_tasks_need(k: int, expected: list[float]) -> None:
    sources = [array(4, 1, 0, 2), array(1, 1, 0, -1)]

    merged = localising.consensus(ZERO, sources, k=k, mask_lambda=1.0, lambda_=1.0)

    np.testing.assert_array_equal(merged, expected)


def test_emr_takes_the_largest_of_the_elected_sign() -> None:
    sources = [array(1, -5, 2, 1), array(3, 2, -1, -1), array(-2, 2, -1, 0)]

    np.testing.assert_array_equal(localising.emr_unify(ZERO, sources), [3, -5, 0, 0])
    plus = localising.emr_unify(ZERO, sources, balance="plus")
    np.testing.assert_array_equal(plus, [3, -5, 2, 1])
    minus = localising.emr_unify(ZERO, sources, balance="minus")
    np.testing.assert_array_equal(minus, [3, -5, -1, -1])


def test_magmax_takes_the_largest_change_and_of_equals_the_last() -> None:
    sources = [array(1, -5, 2, 1), array(3, 2, -2, -1)]

    np.testing.assert_array_equal(localising.magmax(ZERO, sources), [3, -5, -2, -1])
    first = localising.magmax(ZERO, sources, of_equals="first", lambda_=2.0)
    np.testing.assert_array_equal(first, [6, -10, 4, 2])


# PCB.


def test_pcb_keeps_the_clamped_entries_that_win_the_competition() -> None:
    task = array(1, 2, 3, 4)

    merged = competition.pcb(ZERO, [task], ratio=0.5, clamp=0.0)

    # Scores rise with magnitude, and the third, where the cut is, weighs 0 itself.
    np.testing.assert_allclose(merged, [0, 0, 0, 4])


def test_pcb_of_entries_that_cannot_be_ranked_takes_those_that_agree_with_the_sum() -> None:
    merged = competition.pcb(np.zeros(1), [array(3), array(1), array(-2)])

    np.testing.assert_allclose(merged, [2.0])
    np.testing.assert_array_equal(competition.pcb(ZERO, [ZERO, ZERO]), ZERO)


def test_pcb_differs_between_a_tensor_and_a_model() -> None:
    rng = np.random.default_rng(0)
    base = {"a": np.zeros(50), "b": np.zeros((10, 10))}
    sources = [
        {"a": rng.standard_normal(50), "b": 3 * rng.standard_normal((10, 10))} for _ in range(2)
    ]

    merged = over_model(competition.pcb, base, sources)
    alone = competition.pcb(base["a"], [source["a"] for source in sources])

    assert np.count_nonzero(merged["a"]) < np.count_nonzero(alone)
    assert np.count_nonzero(merged["b"]) > 0


# Matrices.


def test_tsv_m_of_orthogonal_tasks_is_the_sum_of_their_leading_parts() -> None:
    left, right = orthonormal(6, 4, 0), orthonormal(8, 4, 1)
    base = np.ones((6, 8))
    tasks = [left[:, :2] * [3, 2] @ right[:, :2].T, left[:, 2:] * [5, 1] @ right[:, 2:].T]

    merged = matrices.tsv_m(base, [base + task for task in tasks])

    np.testing.assert_allclose(merged, base + tasks[0] + tasks[1], atol=1e-12)


def test_tsv_m_of_equal_tasks_is_the_leading_part_of_one() -> None:
    left, right = orthonormal(4, 4, 0), orthonormal(4, 4, 1)
    task = left * [4.0, 3.0, 2.0, 1.0] @ right.T

    merged = matrices.tsv_m(np.zeros((4, 4)), [task, task])

    np.testing.assert_allclose(merged, left[:, :2] * [4.0, 3.0] @ right[:, :2].T, atol=1e-12)


def test_iso_c_flattens_the_spectrum_and_keeps_its_sum() -> None:
    tasks = [np.random.default_rng(seed).standard_normal((5, 7)) for seed in range(3)]

    merged = matrices.iso_c(np.zeros((5, 7)), tasks)

    values = np.linalg.svd(merged, compute_uv=False)
    total = np.linalg.svd(sum(tasks), compute_uv=False).sum()
    np.testing.assert_allclose(values, total / 5)


def test_iso_c_stays_in_the_directions_of_a_sum_of_low_rank() -> None:
    left, right = orthonormal(6, 2, 0), orthonormal(8, 2, 1)
    task = left * [3.0, 1.0] @ right.T

    merged = matrices.iso_c(np.zeros((6, 8)), [task])

    np.testing.assert_allclose(merged, 2.0 * left @ right.T, atol=1e-12)
    every = matrices.iso_c(np.zeros((6, 8)), [task], mean="all")
    np.testing.assert_allclose(np.linalg.svd(every, compute_uv=False), np.full(6, 4 / 6))


def test_iso_cts_without_task_directions_is_iso_c() -> None:
    tasks = [np.random.default_rng(seed).standard_normal((5, 7)) for seed in range(3)]
    base = np.zeros((5, 7))

    common = matrices.iso_cts(base, tasks, common_space_fraction=1.0)

    np.testing.assert_allclose(common, matrices.iso_c(base, tasks), atol=1e-12)
    specific = matrices.iso_cts(base, tasks, common_space_fraction=0.4)
    values = np.linalg.svd(specific, compute_uv=False)
    np.testing.assert_allclose(values, np.full(5, values[0]))
    assert not np.allclose(specific, common)


@pytest.mark.parametrize(
    ("directions", "tasks", "fraction", "expected"),
    [(10, 2, 0.8, (8, 1)), (10, 4, 0.8, (10, 0)), (5, 8, 0.0, (5, 0)), (12, 4, 0.0, (0, 3))],
)
def test_common_and_task_directions_add_up(
    directions: int, tasks: int, fraction: float, expected: tuple[int, int]
) -> None:
    assert matrices.count_directions(directions, tasks, fraction) == expected


@pytest.mark.parametrize("method", [matrices.tsv_m, matrices.iso_c, matrices.iso_cts])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)], ids=str)
def test_what_is_no_matrix_is_averaged(method: object, shape: tuple[int, ...]) -> None:
    base, one, two = (
        np.asarray(np.random.default_rng(seed).standard_normal(shape)) for seed in range(3)
    )

    merged = method(base, [one, two])

    np.testing.assert_allclose(merged, (one + two) / 2, atol=1e-15)


@pytest.mark.parametrize("method", [matrices.tsv_m, matrices.iso_c, matrices.iso_cts])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (4, 4), (1, 5), (5, 1)], ids=str)
def test_sources_that_are_the_base_leave_it(method: object, shape: tuple[int, ...]) -> None:
    base = np.random.default_rng(0).standard_normal(shape)

    np.testing.assert_array_equal(method(base, [base, base]), base)
