"""The twins against mergekit 0.1.5 run as a black box, in float64 on both sides.

Values are multiples of 2**-16 below 8, so that they and their differences are float32 numbers too:
mergekit ranks magnitudes in float32 whatever the type. What it does wrong or oddly, and what the
twins do instead, stands in tests of its own at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from twins import families, sce, selecting, spherical, sums
from twins.shapes import Array
from twins.sparsifying import della_probabilities, order_by_magnitude

# mergekit's sce makes torch warn of the variance of nothing.
pytestmark = pytest.mark.filterwarnings("ignore:var.*degrees of freedom")

SHAPES = ((), (0,), (1,), (5,), (5, 1), (1, 5), (3, 4), (2, 3, 4), (2, 0, 3))
BIG = (40, 250)
CLOSE = {"rtol": 1e-12, "atol": 1e-13}

Inputs = tuple[Array, list[Array]]
Merge = Callable[..., Array]


@pytest.fixture(scope="module")
def mergekit() -> Merge:
    """Return a function of a method's name, a base or None, sources and parameters."""
    from mergekit.merge_methods import merge_tensors

    def merge(
        name: str, base: Array | None, sources: Sequence[Array], parameters: Mapping[str, Any]
    ) -> Array:
        arrays = list(sources) if base is None else [base, *sources]
        tensors = [torch.from_numpy(np.array(array)) for array in arrays]
        index = None if base is None else 0
        merged = merge_tensors(tensors, name, parameters=dict(parameters), base_index=index)
        return merged.numpy()

    return merge


def draw(shape: Sequence[int], seed: int) -> Array:
    values = np.random.default_rng(seed).standard_normal(tuple(shape)).clip(-7, 7)
    return np.asarray(np.round(values * 2.0**16) / 2.0**16)


def make_inputs(shape: Sequence[int]) -> dict[str, Inputs]:
    """Return bases with sources, by what is particular about them."""
    base, one, two, three = (draw(shape, seed) for seed in range(4))
    zeros = np.zeros(tuple(shape))
    return {
        "one": (base, [one]),
        "two": (base, [one, two]),
        "three": (base, [one, two, three]),
        "near the base": (base, [base + one * 2.0**-4, base + two * 2.0**-4]),
        "identical": (base, [one, one]),
        "opposite": (zeros, [one, -one]),
        "opposite task vectors": (base, [base + one, base - one]),
        "opposite the base": (base, [-base]),
        "the base": (base, [base]),
        "the base twice": (base, [base, base]),
        "the base and another": (base, [base, one]),
        "a zero tensor": (base, [one, zeros]),
        "zero tensors": (zeros, [zeros, zeros]),
    }


@dataclass(frozen=True)
class Pair:
    """A method of mergekit and the twin that should agree, with the parameters of both."""

    name: str
    twin: Merge
    grid: dict[str, Sequence[Any]] = field(default_factory=dict)
    """Values to try of parameters that both have; what is a list is cut to the sources."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Names of the twin's parameters where they differ."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What only mergekit is given."""
    own: dict[str, Any] = field(default_factory=dict)
    """What only the twin is given."""
    bases: Sequence[bool] = (True,)
    counts: Sequence[int] = (1, 2, 3)
    without: Sequence[str] = ()

    def cases(self, count: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        for values in _product(self.grid):
            cut = {k: v[:count] if isinstance(v, list) else v for k, v in values.items()}
            renamed = {self.renamed.get(k, k): v for k, v in cut.items()}
            yield cut | self.extra, renamed | self.own


def _product(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    if not grid:
        yield {}
        return
    name, *_ = grid
    for rest in _product({key: grid[key] for key in grid if key != name}):
        for value in grid[name]:
            yield {name: value} | rest


WEIGHTS = ([0.5, 0.75, -0.25], [1.0, -1.0, 0.5], [0.0, 0.0, 0.0], [1e-9, 1e-9, 1e-9])
POSITIVE = ([0.5, 0.75, 0.25], [1.0, 3.0, 2.0])
DENSITIES = (0.0, 1e-3, 0.29, 0.5, 1.0, 1.5, [0.2, 0.7, 0.4])
SWITCHES = {"normalize": (True, False), "rescale": (True, False), "lambda": (0.4,)}
RENAMED = {"lambda": "lambda_", "rescale": "rescaled"}
CUTS = {"density": (0.0, 0.29, 0.5, 1.0, [0.2, 0.9, 0.4]), "gamma": (0.0, 0.01, 0.3, 0.8, 1.0)}
UNSTABLE = ("opposite", "opposite task vectors")

PAIRS = (
    Pair("linear", sums.linear, {"weight": WEIGHTS, "normalize": (True, False)}, bases=(False,)),
    Pair(
        "task_arithmetic",
        sums.task_arithmetic,
        {"weight": WEIGHTS, "normalize": (True, False), "lambda": (1.0, 0.4)},
        RENAMED,
    ),
    Pair("passthrough", sums.passthrough, bases=(False,), counts=(1,)),
    Pair("passthrough", sums.passthrough, {"scale": (0.3, 0.0)}, bases=(False,), counts=(1,)),
    Pair("slerp", spherical.slerp, {"t": (0.0, 0.25, 1.0, 1.5, -0.2)}, counts=(1,)),
    Pair(
        "nuslerp",
        spherical.nuslerp,
        {"weight": (*WEIGHTS, *POSITIVE)},
        own={"axis": "tensor"},
        bases=(True, False),
        counts=(2,),
        without=UNSTABLE,
    ),
    Pair(
        "nuslerp",
        spherical.nuslerp,
        {"weight": (*WEIGHTS, *POSITIVE)},
        extra={"nuslerp_flatten": False},
        own={"axis": "rows"},
        bases=(True, False),
        counts=(2,),
        without=UNSTABLE,
    ),
    Pair(
        "nuslerp",
        spherical.nuslerp,
        {"weight": (*WEIGHTS, *POSITIVE)},
        extra={"nuslerp_flatten": False, "nuslerp_row_wise": True},
        own={"axis": "columns"},
        bases=(True, False),
        counts=(2,),
        without=UNSTABLE,
    ),
    Pair(
        "multislerp",
        spherical.multislerp,
        {"weight": (*WEIGHTS, *POSITIVE), "normalize_weights": (True, False)},
        bases=(True, False),
    ),
    Pair(
        "karcher",
        spherical.karcher,
        {"max_iter": (1, 10), "tol": (1e-5, 0.1)},
        bases=(False,),
    ),
    Pair(
        "model_stock",
        spherical.model_stock,
        {"filter_wise": (True, False)},
        counts=(2, 3),
    ),
    Pair("nearswap", selecting.nearswap, {"t": (0.0, 1e-7, 0.1, 1.0)}, counts=(1,)),
    Pair("ram", selecting.ram, {"epsilon": (1e-5, 0.5)}),
    Pair("ties", families.ties, {"weight": WEIGHTS, "density": DENSITIES} | SWITCHES, RENAMED),
    Pair("breadcrumbs", families.breadcrumbs, {"weight": WEIGHTS[:1]} | CUTS | SWITCHES, RENAMED),
    Pair(
        "breadcrumbs_ties",
        families.breadcrumbs_ties,
        {"weight": WEIGHTS[:1]} | CUTS | SWITCHES,
        RENAMED,
    ),
    Pair(
        "sce",
        sce.sce,
        {"select_topk": (0.0, 0.01, 0.3, 0.5, 0.99, 1.0)},
        own={"select_without_variance": False, "uniform_below": 1e-6},
    ),
)
PRESET = ("ties", "breadcrumbs", "breadcrumbs_ties")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.name}-{pair.own.get('axis', '')}")
def test_twins_agree_with_mergekit(mergekit: Merge, pair: Pair, shape: tuple[int, ...]) -> None:
    for label, (base, sources) in make_inputs(shape).items():
        if len(sources) not in pair.counts or label in pair.without:
            continue
        for with_base in pair.bases:
            start = base if with_base else None
            for theirs, ours in pair.cases(len(sources)):
                preset = {"preset": "mergekit"} if pair.name in PRESET else {}
                expected = _outcome(mergekit, pair.name, start, sources, theirs)
                actual = _outcome(pair.twin, start, sources, **ours, **preset)
                _check_equal(expected, actual, f"{label}, base {with_base}: {theirs}")


def _outcome(merge: Merge, *arguments: Any, **parameters: Any) -> Array | None:
    """Return the result, or None where there is none: an error, or nothing but NaN."""
    try:
        merged = merge(*arguments, **parameters)
    except ValueError:
        return None
    return None if merged.size and np.isnan(merged).all() else merged


def _check_equal(expected: Array | None, actual: Array | None, case: str) -> None:
    if expected is None or actual is None or expected.size == 0:
        # Of nothing there may be a result where of something there is none.
        assert actual is None or expected is None or actual.shape == expected.shape, case
        if expected is None or actual is None:
            empty = [each for each in (expected, actual) if each is not None]
            assert all(each.size == 0 for each in empty), case
        return
    assert actual.dtype == np.float64
    assert actual.shape == expected.shape, case
    np.testing.assert_allclose(actual, expected, err_msg=case, **CLOSE)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape], ids=str)
def test_arcee_fusion_agrees_with_mergekit(mergekit: Merge, shape: tuple[int, ...]) -> None:
    for label, (base, sources) in make_inputs(shape).items():
        if len(sources) == 1:
            expected = mergekit("arcee_fusion", base, sources, {})
            actual = selecting.arcee_fusion(base, sources)
            np.testing.assert_allclose(actual, expected, err_msg=label, **CLOSE)


def test_arcee_fusion_agrees_with_mergekit_on_a_large_tensor(mergekit: Merge) -> None:
    base, source = draw(BIG, 0), draw(BIG, 1)

    expected = mergekit("arcee_fusion", base, [source], {})

    np.testing.assert_allclose(selecting.arcee_fusion(base, [source]), expected, **CLOSE)
    assert 0 < np.count_nonzero(expected != base) < base.size / 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ramplus_tl_agrees_with_mergekit_to_float32(
    mergekit: Merge, shape: tuple[int, ...]
) -> None:
    """Its factors are float32 numbers, whatever the tensors are."""
    parameters = {"r": 0.3, "alpha": 0.4, "epsilon": 0.5}
    for label, (base, sources) in make_inputs(shape).items():
        expected = mergekit("ramplus_tl", base, sources, parameters)
        actual = selecting.ramplus_tl(base, sources, **parameters)
        np.testing.assert_allclose(actual, expected, err_msg=label, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize(("name", "gamma"), [("ties", None), ("breadcrumbs", 0.1)])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.77])
def test_trims_differ_from_mergekit_in_nothing_but_which_of_equal_magnitudes_they_keep(
    mergekit: Merge, name: str, gamma: float | None, density: float
) -> None:
    task = np.random.default_rng(5).integers(-9, 10, BIG).astype(np.float64)
    base = np.zeros(BIG)
    parameters: dict[str, Any] = {"weight": 1.0, "density": density, "normalize": False}
    if gamma is not None:
        parameters["gamma"] = gamma

    theirs = mergekit(name, base, [task], parameters)
    ours = getattr(families, name)(base, [task], preset="mergekit", **parameters)

    np.testing.assert_array_equal(np.sort(np.abs(ours.ravel())), np.sort(np.abs(theirs.ravel())))
    differing = np.unique(np.abs(task[ours != theirs]))
    kept = np.abs(ours[ours != 0])
    assert set(differing) <= {kept.min(), kept.max()}


def recover_masks(
    merge: Callable[[], Array], base: Array, tasks: Sequence[Array]
) -> list[np.ndarray]:
    """Return which entries were kept, of one or two task vectors that were added."""
    change = merge() - base
    masks = np.zeros((len(tasks), *base.shape), dtype=bool)
    found = np.zeros(base.shape, dtype=bool)
    for bits in np.ndindex(*[2] * len(tasks)):
        total = sum((bit * task for bit, task in zip(bits, tasks, strict=True)), 0 * base)
        # A few candidates lie apart by far more than rounding.
        here = ~found & (np.abs(change - total) < 1e-9)
        for mask, bit in zip(masks, bits, strict=True):
            mask[here] = bool(bit)
        found |= here
    assert found.all()
    return list(masks)


def task_vectors(shape: tuple[int, ...]) -> tuple[Array, list[Array]]:
    """Return a base and two sources no two sums of whose task vectors are equal."""
    base = draw(shape, 0)
    return base, [base + 1.0 + np.abs(draw(shape, 1)), base - 20.0 - np.abs(draw(shape, 2))]


@pytest.mark.parametrize("weight", [[1.0, 1.0], [0.5, -0.25]])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della_linear", "della"])
def test_random_methods_agree_with_mergekit_given_its_masks(
    mergekit: Merge, name: str, *, rescale: bool, normalize: bool, weight: list[float]
) -> None:
    """Rescaled to float32 only: it computes the ratio of sums in that, whatever the tensors are."""
    base, sources = task_vectors((7, 9))
    added = name.replace("_ties", "_linear") if "dare" in name else "della_linear"
    common = {"density": [0.6, 0.3]} | ({"epsilon": 0.2} if "della" in name else {})

    def add() -> Array:
        torch.manual_seed(3)
        plain = {"weight": 1.0, "rescale": False, "normalize": False}
        return mergekit(added, base, sources, common | plain)

    masks = recover_masks(add, base, [source - base for source in sources])
    given = common | {"weight": weight, "rescale": rescale, "normalize": normalize, "lambda": 0.7}
    torch.manual_seed(3)
    expected = mergekit(name, base, sources, given)
    ours = {RENAMED.get(key, key): value for key, value in given.items()}
    actual = getattr(families, name)(base, sources, masks=masks, preset="mergekit", **ours)

    close = {"rtol": 1e-12, "atol": 1e-5} if rescale else CLOSE
    np.testing.assert_allclose(actual, expected, **close)


@pytest.mark.parametrize("density", [0.05, 0.5, 0.93])
def test_mergekit_keeps_with_probability_density_in_dare(mergekit: Merge, density: float) -> None:
    torch.manual_seed(0)
    shape = (200, 500)
    kept = mergekit(
        "dare_linear", np.zeros(shape), [np.ones(shape)], {"weight": 1, "density": density}
    )

    _check_binomial(np.count_nonzero(kept), kept.size, density)


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.3), (0.2, 0.1)])
def test_mergekit_keeps_with_the_probabilities_of_the_twin_in_della(
    mergekit: Merge, density: float, epsilon: float
) -> None:
    shape = (20_000, 6)
    task = draw(shape, 0) + np.where(draw(shape, 1) > 0, 0.25, -0.25)
    torch.manual_seed(1)
    parameters = {"weight": 1, "density": density, "epsilon": epsilon, "normalize": False}
    kept = mergekit("della_linear", np.zeros(shape), [task], parameters) != 0
    expected = della_probabilities(task, density=density, epsilon=epsilon)

    np.testing.assert_allclose(expected.mean(axis=1), density)
    for probability in np.unique(expected.round(12)):
        here = np.abs(expected - probability) < 1e-9
        _check_binomial(np.count_nonzero(kept[here]), np.count_nonzero(here), probability)


def _check_binomial(successes: int, trials: int, probability: float) -> None:
    """Check within five standard deviations."""
    deviation = np.sqrt(trials * probability * (1 - probability))
    assert abs(successes - trials * probability) < 5 * deviation


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_mergekit_and_twin_keep_the_sum_of_magnitudes(mergekit: Merge, name: str) -> None:
    base, (source, _) = task_vectors(BIG)
    parameters: dict[str, Any] = {"weight": 1.0, "density": 0.3}
    torch.manual_seed(2)
    merged = mergekit(name, base, [source], parameters)
    mask = merged != base
    ours = getattr(families, name)(base, [source], masks=[mask], preset="mergekit", **parameters)

    for result, tolerance in ((merged, 1e-6), (ours, 1e-12)):
        total = np.abs(source - base).sum()
        assert np.abs(result - base).sum() == pytest.approx(total, rel=tolerance)
    assert 0 < np.count_nonzero(mask) < mask.size / 2


# What mergekit does wrong or oddly.


@pytest.mark.parametrize("label", UNSTABLE)
def test_nuslerp_goes_straight_between_opposite_tensors_where_mergekit_depends_on_rounding(
    mergekit: Merge, label: str
) -> None:
    base, sources = make_inputs((3, 4))[label]

    theirs = mergekit("nuslerp", base, sources, {"weight": [1.0, 3.0]})
    ours = spherical.nuslerp(base, sources, weight=[1.0, 3.0])

    np.testing.assert_allclose(ours, 0.25 * sources[0] + 0.75 * sources[1], **CLOSE)
    assert np.abs(theirs - ours).max() > 0.01


def test_multislerp_refuses_weights_of_which_mergekit_makes_nan(mergekit: Merge) -> None:
    base, sources = make_inputs((3, 4))["two"]

    assert np.isnan(mergekit("multislerp", base, sources, {"weight": [1.0, -1.0]})).all()
    with pytest.raises(ValueError, match="the weights sum to 0"):
        spherical.multislerp(base, sources, weight=[1.0, -1.0])


def test_arcee_fusion_of_nothing_is_nothing_and_an_error_in_mergekit(mergekit: Merge) -> None:
    nothing = np.zeros((2, 0))

    assert selecting.arcee_fusion(nothing, [nothing]).shape == (2, 0)
    with pytest.raises(IndexError):
        mergekit("arcee_fusion", nothing, [nothing], {})


def test_sce_of_one_source_is_that_source_and_the_base_in_mergekit(mergekit: Merge) -> None:
    base, sources = make_inputs((3, 4))["one"]

    theirs = mergekit("sce", base, sources, {"select_topk": 0.5})

    np.testing.assert_array_equal(theirs, base)
    np.testing.assert_allclose(sce.sce(base, sources, select_topk=0.5), sources[0], **CLOSE)


def test_sce_weighs_small_task_vectors_by_energy_and_mergekit_equally(mergekit: Merge) -> None:
    base = np.zeros((4, 4))
    sources = [np.full((4, 4), 1e-4), np.full((4, 4), 3e-4)]

    np.testing.assert_allclose(mergekit("sce", base, sources, {}), 2e-4, **CLOSE)
    np.testing.assert_allclose(sce.sce(base, sources), (1 + 27) / 10 * 1e-4, **CLOSE)


def test_della_keeps_rows_of_one_entry_where_mergekit_fails(mergekit: Merge) -> None:
    base, (source, _) = task_vectors((5, 1))

    np.testing.assert_array_equal(
        della_probabilities(source - base, density=0.5, epsilon=0.2), np.full((5, 1), 0.5)
    )
    with pytest.raises(RuntimeError):
        mergekit("della", base, [source], {"weight": 1.0, "density": 0.5, "epsilon": 0.2})


def test_mergekit_ranks_along_the_second_dimension_of_three(mergekit: Merge) -> None:
    """Its probabilities are what the twin has under ``ranks_along: second``."""
    shape = (3000, 5, 2)
    task = 1.0 + np.abs(draw(shape, 0))
    torch.manual_seed(0)
    parameters = {"weight": 1.0, "density": 0.5, "epsilon": 0.4, "rescale": False}
    kept = mergekit("della_linear", np.zeros(shape), [task], parameters) != 0
    along = {
        ranks: della_probabilities(task, density=0.5, epsilon=0.4, ranks_along=ranks)
        for ranks in ("last", "second")
    }

    for probability in np.unique(along["second"].round(12)):
        here = np.abs(along["second"] - probability) < 1e-9
        _check_binomial(np.count_nonzero(kept[here]), np.count_nonzero(here), probability)
    of_largest = kept[along["last"] > 0.8].mean()
    assert of_largest < 0.75


def test_equal_magnitudes_rank_by_place() -> None:
    assert order_by_magnitude(np.array([1.0, -2.0, 2.0, -1.0])).tolist() == [1, 2, 0, 3]
