"""streammerge.functional against PEFT's merge_utils, against hand-computed values, and alone."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge import functional
from streammerge.errors import RecipeError

# PEFT warns at density 1.
pytestmark = pytest.mark.filterwarnings("ignore:The density .* no pruning will be performed")

INT_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Bit patterns of non-negative finite values, all of them and those in [0.25, 4).
FINITE_BITS = {
    torch.float16: (0, 0x7C00),
    torch.bfloat16: (0, 0x7F80),
    torch.float32: (0, 0x7F800000),
    torch.float64: (0, 0x7FF0000000000000),
}
MODERATE_BITS = {
    torch.float16: (0x3400, 0x4400),
    torch.bfloat16: (0x3E80, 0x4080),
    torch.float32: (0x3E800000, 0x40800000),
    torch.float64: (0x3FD0000000000000, 0x4010000000000000),
}
SHAPES = (
    (),
    (0,),
    (1,),
    (7, 1),
    (1, 7),
    (5,),
    (3, 5),
    (2, 0, 3),
    (2, 3, 4),
    (100,),
    (131,),
    (333,),
)
DENSITIES = (
    0,
    1,
    0.0,
    -0.0,
    1.0,
    5e-324,
    1e-12,
    0.01,
    0.29,
    0.35,
    0.5,
    0.57,
    0.7,
    0.999,
    1 - 2**-53,
)

quick = settings(deadline=None, max_examples=200)
seeds = st.integers(0, 2**32)
densities = st.sampled_from(DENSITIES) | st.floats(0, 1)
positive_densities = st.sampled_from([1, 1e-30, 0.01, 0.29, 0.5, 0.7, 0.999]) | st.floats(1e-6, 1)
sign_methods = st.sampled_from(["total", "frequency"])


@pytest.fixture(scope="module")
def peft():
    """PEFT's merge functions."""
    return pytest.importorskip("peft.utils.merge_utils")


def assert_same_bits(actual, expected):
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    as_bits = INT_OF_SIZE[expected.element_size()]
    assert torch.equal(actual.contiguous().view(as_bits), expected.contiguous().view(as_bits))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def distinct_magnitudes(shape, dtype, seed, *, wide, special):
    """Return random signed values with no two equal magnitudes, so that top-k has no choice.

    ``wide`` draws from all finite values, subnormal and huge, else from [0.25, 4).
    ``special`` plants one NaN, one infinity and one negative zero where there is room.
    """
    rng = np.random.default_rng(seed)
    low, high = (FINITE_BITS if wide else MODERATE_BITS)[dtype]
    numel = math.prod(shape)
    patterns = rng.integers(low + 1, high, size=4 * numel + 8)
    _, first = np.unique(patterns, return_index=True)
    patterns = patterns[np.sort(first)][:numel]
    assert patterns.size == numel
    bits = torch.from_numpy(patterns).to(INT_OF_SIZE[dtype.itemsize]).view(dtype)
    values = torch.where(torch.from_numpy(rng.random(numel) < 0.5), -bits, bits)
    if special:
        for value, at in zip((math.nan, -math.inf, -0.0), rng.permutation(numel), strict=False):
            values[at] = value
    return values.reshape(shape)


def laid_out(tensor, layout):
    """Return a tensor of equal values and other strides."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and tensor.dim() > 0:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    return tensor


layouts = st.sampled_from(["contiguous", "transposed", "strided"])


@st.composite
def tensors(draw):
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(FLOATS))
    wide, special = draw(st.booleans()), draw(st.booleans())
    values = distinct_magnitudes(shape, dtype, draw(seeds), wide=wide, special=special)
    return laid_out(values, draw(layouts))


@st.composite
def tasks_and_weights(draw):
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(FLOATS))
    n_tasks, seed = draw(st.integers(1, 17)), draw(seeds)
    wide, special = draw(st.booleans()), draw(st.booleans())
    layout, mixed = draw(layouts), draw(st.booleans())
    tasks = [
        laid_out(
            distinct_magnitudes(
                shape,
                FLOATS[(FLOATS.index(dtype) + mixed * index) % len(FLOATS)],
                [seed, index],
                wide=wide,
                special=special,
            ),
            layout,
        )
        for index in range(n_tasks)
    ]
    weight_dtype = draw(st.sampled_from([*FLOATS, torch.int64, torch.uint8]))
    weights = torch.randn(n_tasks, generator=seeded(seed)) * 2
    return tasks, (weights if weight_dtype.is_floating_point else weights.abs()).to(weight_dtype)


# ---- bit parity with PEFT ---------------------------------------------------------------------


@quick
@given(tensor=tensors(), density=densities, rescale=st.booleans())
def test_magnitude_pruning_has_peft_bits(peft, tensor, density, rescale):
    """At density 1 both return the tensor itself; rescale changes neither."""
    expected = peft.prune(tensor, density, "magnitude", rescale)

    actual = functional.prune(tensor, density, "magnitude", rescale)

    assert_same_bits(actual, expected)
    assert (actual is tensor) == (expected is tensor)


@quick
@given(tensor=tensors(), density=densities, seed=seeds)
def test_random_pruning_has_peft_bits(peft, tensor, density, seed):
    torch.manual_seed(seed)
    expected = peft.prune(tensor, density, "random")

    assert_same_bits(functional.prune(tensor, density, "random", generator=seeded(seed)), expected)


@quick
@given(tensor=tensors(), density=positive_densities, seed=seeds)
def test_rescaled_random_pruning_has_peft_bits(peft, tensor, density, seed):
    torch.manual_seed(seed)
    expected = peft.prune(tensor, density, "random", rescale=True)

    actual = functional.prune(tensor, density, "random", rescale=True, generator=seeded(seed))

    assert_same_bits(actual, expected)


@quick
@given(merge=tasks_and_weights(), method=sign_methods)
def test_sign_mask_and_disjoint_merge_have_peft_bits(peft, merge, method):
    stacked = torch.stack(merge[0])
    mask = peft.calculate_majority_sign_mask(stacked, method)

    assert torch.equal(functional.calculate_majority_sign_mask(stacked, method), mask)
    assert_same_bits(functional.disjoint_merge(stacked, mask), peft.disjoint_merge(stacked, mask))


@quick
@given(merge=tasks_and_weights())
def test_task_arithmetic_has_peft_bits(peft, merge):
    assert_same_bits(functional.task_arithmetic(*merge), peft.task_arithmetic(*merge))


@quick
@given(merge=tasks_and_weights(), density=densities)
def test_magnitude_prune_has_peft_bits(peft, merge, density):
    expected = peft.magnitude_prune(*merge, density)

    assert_same_bits(functional.magnitude_prune(*merge, density), expected)


@quick
@given(merge=tasks_and_weights(), density=densities, method=sign_methods)
def test_ties_has_peft_bits(peft, merge, density, method):
    expected = peft.ties(*merge, density, method)

    assert_same_bits(functional.ties(*merge, density, method), expected)


@quick
@given(merge=tasks_and_weights(), density=positive_densities, seed=seeds)
def test_dare_linear_has_peft_bits(peft, merge, density, seed):
    torch.manual_seed(seed)
    expected = peft.dare_linear(*merge, density)

    assert_same_bits(functional.dare_linear(*merge, density, generator=seeded(seed)), expected)


@quick
@given(merge=tasks_and_weights(), density=positive_densities, method=sign_methods, seed=seeds)
def test_dare_ties_has_peft_bits(peft, merge, density, method, seed):
    torch.manual_seed(seed)
    expected = peft.dare_ties(*merge, density, method)

    actual = functional.dare_ties(*merge, density, method, generator=seeded(seed))

    assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("density", [0.003, 0.2, 0.5, 0.9])
def test_ties_of_normal_tensors_has_peft_bits_off_the_thresholds(peft, dtype, density):
    """Normal values have ties in 16 bits: positions where a task sits on its threshold are masked."""
    tasks = [torch.randn(50_000, generator=seeded(seed)).to(dtype) for seed in range(5)]
    weights = torch.tensor([0.5, -1.0, 2.0, 0.25, 1.5])
    k = int(density * 50_000)
    on_threshold = torch.stack(
        [task.abs() == task.abs().sort(descending=True).values[k - 1] for task in tasks]
    ).any(dim=0)

    actual = functional.ties(tasks, weights, density)

    expected = peft.ties(tasks, weights, density)
    assert_same_bits(actual[~on_threshold], expected[~on_threshold])
    assert on_threshold.float().mean() < 0.05


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("dtype", FLOATS)
def test_without_a_generator_the_global_one_is_used_as_peft_does(peft, dtype, seed):
    tasks = [torch.randn(40, 50, generator=seeded(index)).to(dtype) for index in range(3)]
    weights = torch.tensor([1.0, 0.5, 0.25])
    torch.manual_seed(seed)
    expected = peft.dare_ties(tasks, weights, 0.3), peft.dare_linear(tasks, weights, 0.6)
    torch.manual_seed(seed)
    actual = functional.dare_ties(tasks, weights, 0.3), functional.dare_linear(tasks, weights, 0.6)

    for ours, theirs in zip(actual, expected, strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize(
    ("tasks", "weights", "sums", "means"),
    [
        # PEFT's own callers: float32 weights raise low-precision tasks to float32
        (torch.bfloat16, torch.float32, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32, torch.float32),
        # integer weights do not raise; the float32 count of the mean does
        (torch.bfloat16, torch.int64, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
        # neither 16-bit format holds the other
        (torch.bfloat16, torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64, torch.float64),
        (torch.int64, torch.float32, torch.float32, torch.float32),
        # integer sums widen
        (torch.uint8, torch.uint8, torch.int64, torch.float32),
    ],
)
def test_output_dtypes_are_those_of_peft(peft, tasks, weights, sums, means):
    values = [torch.tensor([3, 1, 2]).to(tasks), torch.tensor([1, 3, 0]).to(tasks)]
    factors = torch.tensor([1, 2]).to(weights)
    for module in (functional, peft):
        assert module.task_arithmetic(values, factors).dtype == sums
        assert module.magnitude_prune(values, factors, 0.7).dtype == sums
        assert module.ties(values, factors, 0.7).dtype == means
    assert_same_bits(functional.ties(values, factors, 0.7), peft.ties(values, factors, 0.7))


@quick
@given(seed=seeds, density=densities, dtype=st.sampled_from(sorted(INT_OF_SIZE)))
def test_integers_are_trimmed_as_in_peft(peft, seed, density, dtype):
    magnitudes = torch.randperm(100, generator=seeded(seed))
    signs = torch.randint(0, 2, (100,), generator=seeded(seed)) * 2 - 1
    tensor = (magnitudes * signs).to(INT_OF_SIZE[dtype])

    expected = peft.prune(tensor, density, "magnitude")

    assert torch.equal(functional.prune(tensor, density, "magnitude"), expected)


# ---- the exact top-k mask ---------------------------------------------------------------------


def sorted_mask(values, k):
    """The slow obvious version: sort by magnitude, NaN first, then by position."""
    order = sorted(
        range(len(values)),
        key=lambda index: (-math.inf if math.isnan(values[index]) else -abs(values[index]), index),
    )
    nans_first = sorted(order, key=lambda index: not math.isnan(values[index]))
    kept = set(nans_first[:k])
    return [index in kept for index in range(len(values))]


@quick
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 2.0, -math.inf, math.nan])),
    density=densities,
    dtype=st.sampled_from(FLOATS),
)
def test_mask_keeps_everything_greater_then_the_first_ties(values, density, dtype):
    mask = functional.magnitude_mask(torch.tensor(values, dtype=dtype), density)

    assert mask.tolist() == sorted_mask(values, int(density * len(values)))


@quick
@given(
    values=st.lists(st.sampled_from([-128, -127, -1, 0, 1, 127])),
    density=densities,
    dtype=st.sampled_from([torch.int8, torch.int16, torch.int32, torch.int64]),
)
def test_mask_of_integers_keeps_everything_greater_then_the_first_ties(values, density, dtype):
    mask = functional.magnitude_mask(torch.tensor(values, dtype=dtype), density)

    assert mask.tolist() == sorted_mask(values, int(density * len(values)))


@pytest.mark.parametrize(
    ("numel", "density", "k"),
    [
        (100, 0.29, 28),  # the Python product is 28.999999999999996
        (100, 0.57, 56),  # 56.99999999999999
        (10, 0.7, 7),  # the product rounds up to exactly 7
        (10, 0.35, 3),  # truncated, not rounded
        (9, 0.1, 0),  # less than one element
        (3, 1 - 2**-53, 2),  # the largest density below 1
        (3, np.float32(1 / 3), 1),  # float32 thirds are above a third
        (4, 0, 0),
        (4, 1, 4),
    ],
)
def test_kept_count_is_the_truncated_python_product(numel, density, k):
    distinct, equal = torch.arange(numel) + 1.0, torch.ones(numel)

    assert functional.magnitude_mask(distinct, density).sum() == k
    assert functional.magnitude_mask(equal, density).tolist() == [True] * k + [False] * (numel - k)


def test_flat_order_of_ties_is_row_major_whatever_the_strides():
    tensor = torch.ones(3, 2).t()

    mask = functional.magnitude_mask(tensor, 0.5)

    assert mask.tolist() == [[True, True, True], [False, False, False]]


def test_all_nan_payloads_are_one_tie_above_infinity():
    inf, small_nan, large_nan = 0x7F800000, 0x7FC00000, 0x7FC00001
    tensor = torch.tensor([inf, small_nan, large_nan], dtype=torch.int32).view(torch.float32)

    assert functional.magnitude_mask(tensor, 0.34).tolist() == [False, True, False]
    assert functional.magnitude_mask(tensor, 0.67).tolist() == [False, True, True]


# ---- values worked out by hand ----------------------------------------------------------------


def test_pruned_negatives_are_negative_zero_and_pruned_infinities_nan():
    pruned = functional.prune(torch.tensor([-1.0, 4.0, math.inf, math.nan]), 0.25, "magnitude")

    assert_same_bits(pruned[:2], torch.tensor([-0.0, 0.0]))
    assert pruned[2:].isnan().all()


def test_ties_by_hand():
    tasks = [torch.tensor([4.0, 1.0, -3.0, 2.0]), torch.tensor([-2.0, 5.0, 1.0, 3.0])]
    # trimmed to half: [4, 0, -3, 0] and [0, 5, 0, 3]; elected + + - +
    expected = torch.tensor([0.5 * 4, 2 * 5, 0.5 * -3, 2 * 3])

    assert torch.equal(functional.ties(tasks, [0.5, 2.0], 0.5), expected)


@pytest.mark.parametrize(
    ("column", "method", "mask"),
    [
        ([1.0, -1.0], "total", [True, False]),  # an exact balance elects +
        ([1.0, -1.0], "frequency", [True, False]),
        ([3.0, -1.0, -1.0], "total", [True, False, False]),  # values outvote ...
        ([3.0, -1.0, -1.0], "frequency", [False, True, True]),  # ... signs do not
        ([0.0, -0.0], "total", [False, False]),  # zeros agree with nobody
        ([math.nan, 1.0, -1.0], "total", [False, False, True]),  # a NaN sum elects -
        ([math.inf, -math.inf], "total", [False, True]),  # as inf - inf does
        ([math.nan, 1.0], "frequency", [False, True]),  # NaN has no sign to count
    ],
)
def test_elected_signs(peft, column, method, mask):
    stacked = torch.tensor(column)[:, None]

    for module in (functional, peft):
        assert module.calculate_majority_sign_mask(stacked, method)[:, 0].tolist() == mask


def test_disjoint_merge_divides_by_the_number_of_tasks_and_gives_zero_where_none_agrees():
    stacked = torch.tensor([[1.0, 5.0], [2.0, 5.0], [9.0, 5.0]])
    mask = torch.tensor([[True, False], [True, False], [False, False]])

    assert functional.disjoint_merge(stacked, mask).tolist() == [1.5, 0.0]


def test_a_sum_is_never_negative_zero():
    assert_same_bits(functional.task_arithmetic([torch.tensor(-0.0)], [1.0]), torch.tensor(0.0))


@pytest.mark.parametrize(
    ("dtype", "density", "probability"),
    [
        (torch.bfloat16, 0.999, 1.0),  # rounds to 1: everything is kept
        (torch.bfloat16, 0.7, 0.69921875),
        (torch.float16, 0.7, 0.7001953125),
        (torch.float16, 1e-9, 0.0),  # rounds to 0: nothing is kept
    ],
)
def test_keep_probability_is_rounded_to_the_dtype_of_the_tensor(dtype, density, probability):
    tensor = torch.ones(5000, dtype=dtype)
    draws = torch.rand(5000, generator=seeded(3))

    kept = functional.prune(tensor, density, "random", generator=seeded(3))

    assert torch.equal(kept != 0, draws < probability)


def test_rescaling_divides_in_float32_and_rounds_to_the_dtype_of_the_tensor():
    tensor = torch.full((64,), 1.25, dtype=torch.bfloat16)
    expected = (torch.tensor(1.25) / torch.tensor(0.7)).bfloat16()

    pruned = functional.prune(tensor, 0.7, "random", rescale=True, generator=seeded(0))

    assert set(pruned.tolist()) == {0.0, expected.item()}


# ---- what PEFT does not have ------------------------------------------------------------------


def test_densities_can_differ_by_task():
    tasks = [torch.randn(60, generator=seeded(index)) for index in range(3)]
    weights, fractions = torch.tensor([1.0, -0.5, 2.0]), [0.2, 1, 0.5]
    trimmed = [
        functional.prune(task, density, "magnitude")
        for task, density in zip(tasks, fractions, strict=True)
    ]
    shared = seeded(5)
    dropped = [
        functional.prune(task, density, "random", rescale=True, generator=shared)
        for task, density in zip(tasks, fractions, strict=True)
    ]

    def merged(merge):
        return merge(tasks, weights, fractions)

    def dared(merge):
        return merge(tasks, weights, fractions, generator=seeded(5))

    assert_same_bits(
        merged(functional.magnitude_prune), functional.task_arithmetic(trimmed, weights)
    )
    assert_same_bits(merged(functional.ties), functional.ties(trimmed, weights, 1))
    assert_same_bits(dared(functional.dare_linear), functional.task_arithmetic(dropped, weights))
    assert_same_bits(dared(functional.dare_ties), functional.ties(dropped, weights, 1))


@pytest.mark.parametrize("weights", [[0.1, 2], (0.1, 2.0), [np.float64(0.1), np.int32(2)]])
def test_a_sequence_of_weights_is_a_float32_tensor(weights):
    tasks = [torch.tensor([1.0], dtype=torch.bfloat16)] * 2

    actual = functional.task_arithmetic(tasks, weights)

    assert_same_bits(actual, functional.task_arithmetic(tasks, torch.tensor([0.1, 2.0])))


def test_a_sequence_of_weights_is_float32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        merged = functional.task_arithmetic([torch.ones(1, dtype=torch.bfloat16)], [0.1])
    finally:
        torch.set_default_dtype(torch.float32)

    assert_same_bits(merged, torch.tensor([0.1]))


def test_density_one_draws_no_random_number():
    generator = seeded(0)

    functional.dare_linear([torch.ones(9)], [1.0], 1, generator=generator)

    assert torch.equal(generator.get_state(), seeded(0).get_state())


def test_a_refused_merge_draws_no_random_number():
    generator = seeded(0)

    with pytest.raises(RecipeError, match="rescaling divides"):
        functional.dare_linear([torch.ones(9)] * 2, [1, 1], [0.5, 0], generator=generator)

    assert torch.equal(generator.get_state(), seeded(0).get_state())


def test_random_pruning_to_nothing_needs_no_rescaling():
    assert functional.prune(torch.ones(9), 0, "random").tolist() == [0.0] * 9


@pytest.mark.parametrize("density", [0.5, 1])
def test_inputs_are_not_modified(density):
    tasks = [torch.randn(31, generator=seeded(index)) for index in range(5)]
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    before = [tensor.clone() for tensor in (*tasks, weights)]

    functional.task_arithmetic(tasks, weights)
    functional.magnitude_prune(tasks, weights, density)
    functional.ties(tasks, weights, density)
    functional.dare_linear(tasks, weights, density)
    functional.dare_ties(tasks, weights, density, "frequency")

    for tensor, copy in zip((*tasks, weights), before, strict=True):
        assert_same_bits(tensor, copy)


def test_gradients_flow_through_the_kept_elements():
    tensor = torch.tensor([1.0, -3.0, 2.0], requires_grad=True)

    functional.ties([tensor], [2.0], 0.7).sum().backward()

    assert tensor.grad.tolist() == [0.0, 2.0, 2.0]


# ---- documented differences from PEFT ---------------------------------------------------------


def test_both_keep_as_many_ties_but_not_the_same_ones(peft):
    tensor = torch.ones(10_000)
    ours = functional.prune(tensor, 0.5, "magnitude")
    theirs = peft.prune(tensor, 0.5, "magnitude")

    assert ours.sum() == theirs.sum() == 5000
    assert ours[:5000].all()
    assert not theirs[:5000].all()


def test_the_lowest_int8_ranks_highest_here_and_lowest_in_peft(peft):
    tensor = torch.tensor([-128, 1, 2, 3], dtype=torch.int8)

    assert functional.prune(tensor, 0.5, "magnitude").tolist() == [-128, 0, 0, 3]
    assert peft.prune(tensor, 0.5, "magnitude").tolist() == [0, 0, 2, 3]


def test_the_lowest_int64_ranks_highest():
    tensor = torch.tensor([3, -(2**63), 2**63 - 1])

    assert functional.magnitude_mask(tensor, 0.34).tolist() == [False, True, False]


def test_peft_warns_at_density_one_and_we_do_not(peft):
    tensor = torch.ones(3)

    with pytest.warns(UserWarning, match="no pruning will be performed"):
        assert peft.prune(tensor, 1, "magnitude") is tensor
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert functional.prune(tensor, 1, "magnitude") is tensor


ONES = torch.ones(4)
PAIR = [torch.ones(4), torch.ones(4)]
HALVES = torch.tensor([0.5, 0.5])


def all_nan(result):
    return bool(result.isnan().all())


def unchanged(result):
    return torch.equal(result, ONES)


def of_shape(*shape):
    return lambda result: tuple(result.shape) == shape


# What is asked of both modules, what PEFT makes of it (an error, or a result that satisfies the
# function), and what the refusal says.
REFUSALS = {
    "density 0, rescaled": (
        lambda m: m.prune(ONES, 0, "random", rescale=True),
        all_nan,
        r"density: rescaling divides by it, and 0.0 is 0 in torch.float32",
    ),
    "density that is 0 in float32, rescaled": (
        lambda m: m.prune(ONES, 1e-46, "random", rescale=True),
        all_nan,
        r"density: rescaling divides by it, and 1e-46 is 0",
    ),
    "dare at density 0": (
        lambda m: m.dare_linear(PAIR, HALVES, 0.0),
        all_nan,
        r"density: rescaling divides",
    ),
    "dare_ties at density 0": (
        lambda m: m.dare_ties(PAIR, HALVES, 0.0),
        all_nan,
        r"density: rescaling divides",
    ),
    "density NaN, by magnitude": (
        lambda m: m.prune(ONES, math.nan, "magnitude"),
        ValueError,
        r"density: expected a fraction in \[0, 1\], got nan",
    ),
    "density NaN, at random": (
        lambda m: m.prune(ONES, math.nan, "random"),
        RuntimeError,
        r"density: expected a fraction in \[0, 1\], got nan",
    ),
    "density above 1": (
        lambda m: m.prune(ONES, 1.5, "magnitude"),
        unchanged,
        r"density: expected a fraction in \[0, 1\], got 1.5",
    ),
    "density infinite": (
        lambda m: m.prune(ONES, math.inf, "random"),
        unchanged,
        r"density: expected a fraction in \[0, 1\], got inf",
    ),
    "density negative": (
        lambda m: m.prune(ONES, -1e-12, "magnitude"),
        ValueError,
        r"density: expected a fraction in \[0, 1\], got -1e-12",
    ),
    "density missing": (
        lambda m: m.prune(ONES, None, "magnitude"),
        TypeError,
        r"density: expected a number, got None",
    ),
    "density as text": (
        lambda m: m.ties(PAIR, HALVES, "0.2"),
        TypeError,
        r"density: expected a number, got '0.2'",
    ),
    "density True": (
        lambda m: m.prune(ONES, True, "magnitude"),
        unchanged,
        r"density: expected a number, got True",
    ),
    "too few densities": (
        lambda m: m.ties(PAIR, HALVES, [0.2]),
        TypeError,
        r"density: expected a number or 2, got 1",
    ),
    "one bad density of several": (
        lambda m: m.ties(PAIR, HALVES, [0.2, 2]),
        TypeError,
        r"density\[1\]: expected a fraction in \[0, 1\], got 2",
    ),
    "unknown prune method": (
        lambda m: m.prune(ONES, 0.5, "magnitud"),
        ValueError,
        r'method: expected magnitude or random, got \'magnitud\'; did you mean "magnitude"\?',
    ),
    "unknown prune method at density 1": (
        lambda m: m.prune(ONES, 1, "largest"),
        unchanged,
        r"method: expected magnitude or random, got 'largest'",
    ),
    "unknown sign method": (
        lambda m: m.calculate_majority_sign_mask(torch.ones(2, 4), "median"),
        RuntimeError,
        r"method: expected total or frequency, got 'median'",
    ),
    "unknown sign method in ties": (
        lambda m: m.ties(PAIR, HALVES, 0.5, "sum"),
        RuntimeError,
        r"majority_sign_method: expected total or frequency, got 'sum'",
    ),
    "unknown sign method in dare_ties": (
        lambda m: m.dare_ties(PAIR, HALVES, 0.5, "sum"),
        RuntimeError,
        r"majority_sign_method: expected total or frequency, got 'sum'",
    ),
    "no tasks": (
        lambda m: m.task_arithmetic([], torch.ones(0)),
        RuntimeError,
        r"task_tensors: expected at least one tensor, got none",
    ),
    "tasks of two shapes": (
        lambda m: m.ties([ONES, ONES, torch.ones(2, 2)], torch.ones(3), 0.5),
        RuntimeError,
        r"task_tensors\[2\]: expected task_tensors\[0\]'s shape \[4\], got \[2, 2\]",
    ),
    "a task that is no tensor": (
        lambda m: m.task_arithmetic([[1.0]], torch.ones(1)),
        TypeError,
        r"task_tensors\[0\]: expected a tensor, got list",
    ),
    "too many weights": (
        lambda m: m.task_arithmetic(PAIR, torch.ones(3)),
        RuntimeError,
        r"weights: expected one per task, shape \[2\], got \[3\]",
    ),
    "one weight for two tasks": (
        lambda m: m.ties(PAIR, torch.ones(1), 1),
        unchanged,
        r"weights: expected one per task, shape \[2\], got \[1\]",
    ),
    "a 0-d weight": (
        lambda m: m.magnitude_prune(PAIR, torch.tensor(0.5), 1),
        unchanged,
        r"weights: expected one per task, shape \[2\], got \[\]",
    ),
    "a column of weights": (
        lambda m: m.task_arithmetic(PAIR, HALVES[:, None]),
        unchanged,
        r"weights: expected one per task, shape \[2\], got \[2, 1\]",
    ),
    "weights per element": (
        lambda m: m.task_arithmetic(PAIR, torch.full((2, 4), 0.5)),
        unchanged,
        r"weights: expected one per task, shape \[2\], got \[2, 4\]",
    ),
    "weights with more dimensions than the stack": (
        lambda m: m.task_arithmetic([torch.tensor(1.0)] * 2, torch.ones(2, 3)),
        RuntimeError,
        r"weights: expected one per task, shape \[2\], got \[2, 3\]",
    ),
    "weights with more dimensions that happen to broadcast": (
        lambda m: m.task_arithmetic([torch.tensor(1.0)] * 2, torch.ones(2, 2)),
        of_shape(2),
        r"weights: expected one per task, shape \[2\], got \[2, 2\]",
    ),
    "weights not finite": (
        lambda m: m.task_arithmetic(PAIR, torch.tensor([0.5, math.nan])),
        all_nan,
        r"weights: expected finite numbers, got \[0.5, nan\]",
    ),
    "a weight missing": (
        lambda m: m.task_arithmetic(PAIR, [0.5, None]),
        AttributeError,
        r"weights\[1\]: expected a number, got None",
    ),
    "one number as weights": (
        lambda m: m.task_arithmetic(PAIR, 0.5),
        AttributeError,
        r"weights: expected a tensor, got float",
    ),
    "bool tensor": (
        lambda m: m.prune(ONES > 0, 0.5, "magnitude"),
        NotImplementedError,
        r"tensor: torch.bool has no merge arithmetic",
    ),
    "bool tasks": (
        lambda m: m.task_arithmetic([ONES > 0, ONES > 0], HALVES),
        unchanged,
        r"task_tensors\[0\]: torch.bool has no merge arithmetic",
    ),
    "float8 tensor": (
        lambda m: m.prune(ONES.to(torch.float8_e4m3fn), 0.5, "magnitude"),
        NotImplementedError,
        r"tensor: torch.float8_e4m3fn has no merge arithmetic",
    ),
    "complex tensor": (
        lambda m: m.prune(ONES.to(torch.complex64), 0.5, "magnitude"),
        of_shape(4),
        r"tensor: torch.complex64 has no merge arithmetic",
    ),
    "bool weights": (
        lambda m: m.task_arithmetic(PAIR, torch.tensor([True, False])),
        unchanged,
        r"weights: torch.bool has no merge arithmetic",
    ),
    "integers at random": (
        lambda m: m.prune(ONES.long(), 0.5, "random"),
        NotImplementedError,
        r"random pruning needs a floating-point tensor, got torch.int64",
    ),
    "a single value as a stack": (
        lambda m: m.calculate_majority_sign_mask(torch.tensor(1.0)),
        of_shape(),
        r"tensor: expected \[n_tasks >= 1, \*shape\], got \[\]",
    ),
    "an empty stack": (
        lambda m: m.disjoint_merge(torch.ones(0, 4), torch.ones(0, 4, dtype=torch.bool)),
        of_shape(4),
        r"task_tensors: expected \[n_tasks >= 1, \*shape\], got \[0, 4\]",
    ),
    "a mask for one task only": (
        lambda m: m.disjoint_merge(torch.ones(2, 4), torch.ones(4, dtype=torch.bool)),
        of_shape(4),
        r"majority_sign_mask: expected the shape of task_tensors, \[2, 4\], got \[4\]",
    ),
}


@pytest.mark.parametrize(("call", "in_peft", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_peft_lets_pass_is_refused_with_a_reason(peft, call, in_peft, message):
    with pytest.raises(ValueError, match=message) as refusal:
        call(functional)

    assert isinstance(refusal.value, RecipeError)
    if isinstance(in_peft, type):
        with pytest.raises(in_peft):
            call(peft)
    else:
        assert in_peft(call(peft))
