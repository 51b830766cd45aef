"""The projection is the sum of what will be allocated, and never more than the budget."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.errors import MemoryBudgetError
from streammerge.methods.programs import Counts
from streammerge.plan.budgeting import (
    GROWTH_BYTES,
    Demand,
    affordable_limit,
    choose_resources,
    private_limit,
    records_bytes,
    search_bytes,
    values_limit,
)
from streammerge.plan.types import MemoryProjection, Resources
from streammerge.statistics import BLOCK
from streammerge.units import GIB, MIB, parse_size

BASELINE = 100_000_007
"""A prime near what interpreter and torch take."""
PLAIN = Demand(
    inputs=3,
    input_itemsize=4,
    output_ratio=0.5,
    compute_rows=5,
    compute_itemsize=4,
    statistics=Counts(ranked=0, totals=0),
    statistic_numel=0,
    scattered_nbytes=0,
    resident_nbytes=0,
    input_nbytes=10**12 + 39,
    tensors=1000,
    blocks=30_000,
)
"""Three inputs of a terabyte in all, and no statistics."""
TRIMMED = replace(
    PLAIN,
    statistics=Counts(ranked=2, totals=0),
    statistic_numel=1_000_000_007,
    scattered_nbytes=0,
    resident_nbytes=12 * 1_000_000_007,
)
"""The same with a top-k over a tensor of a billion elements."""


def choose(demand: Demand, budget: int, **options: Any) -> tuple[Resources, MemoryProjection]:
    machine = {"baseline": BASELINE, "workers": 7, "readers": 5, "writers": 2} | options
    return choose_resources(demand, budget=budget, **machine)


def smallest_budget(demand: Demand, **options: Any) -> int:
    """Find it by bisection, as the slow obvious way to know."""

    def fits(budget: int) -> bool:
        try:
            choose(demand, budget, **options)
        except MemoryBudgetError:
            return False
        return True

    low, high = 0, 2**50
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


counts = st.builds(Counts, ranked=st.integers(0, 8), totals=st.integers(0, 70))
demands = st.builds(
    Demand,
    inputs=st.integers(1, 9),
    input_itemsize=st.sampled_from([1, 2, 4, 8]),
    output_ratio=st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0]),
    compute_rows=st.integers(2, 14),
    compute_itemsize=st.sampled_from([4, 8]),
    statistics=counts,
    statistic_numel=st.one_of(st.integers(0, 10**6), st.integers(0, 10**11)),
    scattered_nbytes=st.integers(0, 10**8),
    resident_nbytes=st.one_of(st.just(0), st.integers(0, 10**12)),
    input_nbytes=st.one_of(st.integers(0, 10**7), st.integers(0, 10**13)),
    tensors=st.integers(0, 10**6),
    blocks=st.integers(0, 10**7),
)
machines = st.fixed_dictionaries(
    {
        "baseline": st.integers(1, 2 * GIB),
        "workers": st.integers(1, 16),
        "readers": st.integers(1, 8),
        "writers": st.integers(1, 4),
    }
)
BUDGETS = st.one_of(st.integers(1, 2 * GIB), st.integers(1, 2**42))


@given(demands, BUDGETS, machines)
@settings(deadline=None, max_examples=400)
def test_the_peak_is_within_the_budget_and_the_parts_are_what_is_allocated(
    demand: Demand, budget: int, machine: dict[str, int]
) -> None:
    try:
        resources, memory = choose(demand, budget, **machine)
    except MemoryBudgetError:
        return

    assert memory.peak <= budget == memory.budget
    assert memory.inputs == resources.slots * resources.slot_bytes
    assert memory.outputs == resources.output_slots * resources.output_slot_bytes
    assert memory.statistics == resources.statistics_bytes
    assert memory.baseline == machine["baseline"]
    assert memory.growth == GROWTH_BYTES + records_bytes(demand.tensors, demand.blocks)


@given(demands, BUDGETS, machines)
@settings(deadline=None, max_examples=400)
def test_whatever_is_chosen_can_work(demand: Demand, budget: int, machine: dict[str, int]) -> None:
    """One chunk can always be loaded, one merged and one written."""
    try:
        resources, _ = choose(demand, budget, **machine)
    except MemoryBudgetError:
        return

    assert resources.slots >= demand.inputs
    assert resources.output_slots >= 2
    assert resources.slot_bytes % (BLOCK * demand.input_itemsize) == 0
    assert resources.output_slot_bytes == resources.slot_bytes * demand.output_ratio
    if demand.statistics.ranked:
        # A search must at least be able to count, and to collect what one block holds.
        numel = demand.statistic_numel
        limit = affordable_limit(
            demand.statistics, numel, demand.compute_itemsize, resources.statistics_bytes
        )
        assert limit >= min(numel, BLOCK)


@given(demands, machines)
@settings(deadline=None, max_examples=100)
def test_the_named_budget_is_enough_for_the_same_and_a_slightly_larger_process(
    demand: Demand, machine: dict[str, int]
) -> None:
    with pytest.raises(MemoryBudgetError) as caught:
        choose(demand, 1, **machine)

    named = re.search(r"--memory (\S+) or more", str(caught.value))
    assert named is not None
    budget = parse_size(named[1])
    choose(demand, budget, **machine)
    choose(demand, budget, **machine | {"baseline": machine["baseline"] + 16 * MIB})


@given(demands, machines)
@settings(deadline=None, max_examples=60)
def test_the_named_budget_is_not_far_above_the_smallest(
    demand: Demand, machine: dict[str, int]
) -> None:
    with pytest.raises(MemoryBudgetError) as caught:
        choose(demand, 1, **machine)

    named = re.search(r"--memory (\S+) or more", str(caught.value))
    assert named is not None
    assert 0 <= parse_size(named[1]) - smallest_budget(demand, **machine) <= 17 * MIB


@given(demands, machines)
@settings(deadline=None, max_examples=60)
def test_the_smallest_budget_is_used_to_the_last_byte(
    demand: Demand, machine: dict[str, int]
) -> None:
    """A request that equals the budget is granted, one byte less is not."""
    least = smallest_budget(demand, **machine)

    _, memory = choose(demand, least, **machine)

    assert memory.peak <= least
    with pytest.raises(MemoryBudgetError):
        choose(demand, least - 1, **machine)


@given(demands, BUDGETS, st.integers(0, 2**40), machines)
@settings(deadline=None, max_examples=200)
def test_more_memory_never_fits_less(
    demand: Demand, budget: int, more: int, machine: dict[str, int]
) -> None:
    try:
        resources, _ = choose(demand, budget, **machine)
    except MemoryBudgetError:
        return

    richer, _ = choose(demand, budget + more, **machine)

    assert richer.slot_bytes >= resources.slot_bytes
    assert richer.statistics_bytes >= resources.statistics_bytes


@given(demands, BUDGETS, machines)
@settings(deadline=None, max_examples=200)
def test_threads_are_taken_as_given(demand: Demand, budget: int, machine: dict[str, int]) -> None:
    try:
        resources, _ = choose(demand, budget, **machine)
    except MemoryBudgetError:
        return

    assert (resources.workers, resources.readers, resources.writers) == (
        machine["workers"],
        machine["readers"],
        machine["writers"],
    )


def test_every_part_of_the_smallest_job_is_counted() -> None:
    """Prime counts, so that no term can hide behind another."""
    _, memory = choose(PLAIN, smallest_budget(PLAIN))

    worker = 5 * BLOCK * 4 + 40 * BLOCK
    assert memory == MemoryProjection(
        baseline=100_000_007,
        growth=GROWTH_BYTES + records_bytes(1000, 30_000),
        inputs=3 * BLOCK * 4,
        outputs=2 * BLOCK * 2,
        scratch=7 * worker,
        statistics=0,
        budget=100_000_007
        + GROWTH_BYTES
        + records_bytes(1000, 30_000)
        + 7 * worker
        + 3 * BLOCK * 4
        + 2 * BLOCK * 2,
    )


def test_the_totals_of_the_smallest_job_are_counted() -> None:
    """As they are where nothing is ranked: eight bytes for each in every block."""
    totalled = replace(TRIMMED, statistics=Counts(ranked=0, totals=13))
    _, memory = choose(totalled, smallest_budget(totalled))

    assert memory.statistics == 13 * 8 * (1_000_000_007 // BLOCK + 1)


def test_the_searches_of_the_smallest_job_are_counted() -> None:
    _, memory = choose(TRIMMED, smallest_budget(TRIMMED))

    assert memory.statistics == search_bytes(Counts(2, 0), 1_000_000_007, 4, 2 * BLOCK)
    # Each worker may run a search over a small tensor by itself.
    own = search_bytes(Counts(2, 0), 2 * MIB, 4, values_limit(2 * MIB))
    assert memory.scratch == 7 * (5 * BLOCK * 4 + 40 * BLOCK + own)


def test_many_searches_collect_about_as_much_together_as_eight() -> None:
    def bytes_of(ranked: int) -> int:
        counts = Counts(ranked, 0)
        return search_bytes(counts, 2 * MIB, 4, private_limit(counts, 2 * MIB))

    sizes = [bytes_of(ranked) for ranked in range(1, 65)]
    assert sizes == sorted(sizes)
    # Beyond that each adds its counters of one MiB.
    assert sizes[31] - sizes[7] < 24 * 1.1 * MIB
    assert private_limit(Counts(8, 0), 2 * MIB) == values_limit(2 * MIB)
    # What is small is collected whole, and what is not leaves room for a sample.
    assert private_limit(Counts(64, 0), 1000) == 1000
    assert private_limit(Counts(999, 0), 2 * MIB) == 1 << 16


@pytest.mark.parametrize(
    "more",
    [
        {"inputs": 4},
        {"compute_rows": 6},
        {"statistics": Counts(ranked=3, totals=0)},
        {"statistics": Counts(ranked=2, totals=1)},
    ],
    ids=str,
)
def test_a_larger_job_needs_more(more: dict[str, Any]) -> None:
    larger = replace(TRIMMED, **more)

    assert smallest_budget(larger) > smallest_budget(TRIMMED)


@pytest.mark.parametrize("option", ["baseline", "workers"])
def test_a_larger_process_needs_more(option: str) -> None:
    options = {"baseline": BASELINE, "workers": 7}

    larger = smallest_budget(PLAIN, **options | {option: options[option] + 1})

    assert larger > smallest_budget(PLAIN, **options)


def test_the_size_of_the_job_does_not_matter_without_statistics() -> None:
    """What streams is never in memory as a whole."""
    larger = replace(PLAIN, input_nbytes=1_000 * PLAIN.input_nbytes)

    assert choose(larger, GIB) == choose(PLAIN, GIB)


def test_a_small_job_takes_no_more_than_it_has() -> None:
    small = replace(PLAIN, input_nbytes=3_000)

    resources, memory = choose(small, 8 * GIB)

    assert resources.slots == 2 * small.inputs
    assert memory.peak < GIB


def test_a_tensor_that_needs_a_threshold_is_kept_when_it_fits() -> None:
    """Read once instead of twice: the slots hold it and a part of the next."""
    resources, _ = choose(TRIMMED, 40 * GIB)

    assert resources.slots * resources.slot_bytes >= TRIMMED.resident_nbytes


def test_memory_that_would_not_help_is_not_taken() -> None:
    _, enough = choose(PLAIN, 64 * GIB)

    assert enough.peak < GIB


def test_a_refusal_says_what_is_needed_what_is_used_and_what_there_is() -> None:
    with pytest.raises(
        MemoryBudgetError,
        match=r"^3 inputs need at least \S+ MiB of memory, of which 95\.4 MiB is in use before "
        r"work starts; the budget is 10\.0 MiB; give --memory \d+MiB or more$",
    ):
        choose(PLAIN, 10 * MIB)


@given(counts, st.integers(0, 10**11), st.sampled_from([4, 8]), st.integers(0, 2**36))
def test_an_affordable_search_costs_no_more_than_there_is(
    asked: Counts, numel: int, itemsize: int, available: int
) -> None:
    limit = affordable_limit(asked, numel, itemsize, available)

    assert 0 <= limit <= values_limit(numel) <= numel
    if limit:
        assert search_bytes(asked, numel, itemsize, limit) <= available
    if asked.ranked and limit < values_limit(numel):
        assert search_bytes(asked, numel, itemsize, limit + 1) > available
