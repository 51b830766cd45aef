"""How much memory a job takes, and how it is cut so that it takes no more than it may.

The parts, in bytes, for ``n`` inputs, ``w`` workers and slots of ``s`` bytes:

    inputs      slots · s                one slot per input of every chunk in flight
    outputs     output slots · s'        a merged chunk until it is written
    scratch     w · rows · block in the compute dtype: one for the kernels, and where torch computes one
                for each input and for each scratch row of the method, and one more; masks, random words
    statistics  searches and totals, or scales of codes, of the tensors in flight
    factors     adapters' tensors, in the compute dtype, of the tensors in flight
    growth      thread stacks, allocator slack, small objects, what is known of finished tensors
    baseline    the process as it stands: interpreter, headers, this plan, torch where it is needed
    beside      equal shares of what is left, for merges that run at the same time
"""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.errors import MemoryBudgetError
from streammerge.methods.programs import Counts
from streammerge.plan.types import MemoryProjection, Resources
from streammerge.statistics import BLOCK
from streammerge.units import BASELINE_NOISE, MIB, format_budget, format_size

GROWTH_BYTES = 40 * MIB
"""Measured on Linux with torch 2.13: starting the threads and touching its first kernels adds 15 to
25 MiB of private memory; twice that leaves room for other builds."""
_RECORD_BYTES = 1024
"""What the engine knows of a finished tensor until the manifest is written; measured: 600 to 900."""
_BLOCK_RECORD_BYTES = 160
"""The digest of a block, and where an interrupted run had got to with it."""
_SURVEY_RECORD_BYTES = 1024
"""Of a tensor in a report, beside its numbers: its record, its name in tables and texts, and its share of
those tensors that are not finished, whose sums are exact and longer."""
_SURVEY_NUMBER_BYTES = 100
"""Of each of its numbers: as a row, in sums and measures, as an object in a table, and twice as text."""
LARGEST_SLOT = 8 * MIB
"""Requests of 8 to 16 MiB saturate disks; larger slots only make the pipeline coarser."""
_DEPTH = 3
"""Chunks in flight beyond those being read and computed, so that no stage waits for another."""
_WORKER_BYTES = 40 * BLOCK
"""Temporary arrays of a worker on one block. The histogram of float64 needs most: four copies of
eight bytes per element and comparison masks."""
_STATISTICS_SHARE = 0.15
"""Share of the free budget for top-k searches; more would only help guesses that miss."""
_FACTORS_SHARE = 0.25
"""Share of the free budget for the adapters' tensors beyond what one tensor needs."""
WHOLE_BYTES = 128
"""Bytes per element that a method takes for what it makes of a whole tensor: a singular value
decomposition in float64 with its workspace, copies, and the factors of all sources."""
_BINS_BYTES = 1 * MIB
"""A histogram of 2^16 counters, and the one block's that is added to it."""
_BYTES_PER_BLOCK = 24
"""Counts of up to four crowded values, and of the ties of the threshold."""
_DIRECT_NUMEL = 2 * BLOCK
"""Up to here a search simply collects every magnitude."""
_FEW_RANKED = 8
"""Up to so many values at once each may collect that many. More, as of 16 sources with two each, collect
as much together as these: a band that a sample suggests rarely needs it."""
_LEAST_COLLECTED = 1 << 16
"""What each of them collects in any case: as many as are sampled."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a job asks of memory, whatever the budget."""

    inputs: int
    """Models read per chunk."""
    input_itemsize: int
    """Widest element among the inputs, in bytes."""
    output_ratio: float
    """Largest output bytes per input slot byte over all tensors."""
    compute_rows: int
    """Blocks that a worker keeps in the compute dtype."""
    compute_itemsize: int
    """Bytes per element there."""
    statistics: Counts
    """What the statistics of one tensor hold at once; nothing when the method needs none."""
    statistic_numel: int
    """Elements in the largest scope of a statistic."""
    scattered_nbytes: int
    """What that takes for having many short blocks, in bytes."""
    resident_nbytes: int
    """Input bytes of the largest tensor that needs a statistic; 0 when none does."""
    input_nbytes: int
    """Input bytes of the whole job."""
    tensors: int
    """Tensors in the output."""
    blocks: int
    """Blocks in the output."""
    factors_largest: int = 0
    """Bytes of adapters that the tensor which needs most of them needs."""
    factors_nbytes: int = 0
    """Bytes of adapters that all tensors need."""
    whole_nbytes: int = 0
    """What one tensor that must be seen whole takes at most; 0 where none must."""
    whole_useful: int = 0
    """What several take that are in work at the same time, where that helps."""
    whole_worker_bytes: int = 0
    """What a worker takes for one of at most a block."""
    around_numel: int = 0
    """Most elements that a chunk reads beyond its own, for the sake of whole rows."""
    run_numel: int = BLOCK
    """Elements that a worker computes at once: a block, or the widest row."""
    row_bytes: int = 0
    """Memory of a worker for what is known of the rows that it computes at once."""
    reader_bytes: int = 0
    """Scratch memory of a reader, for codes; 0 where none are read."""
    encoding_bytes: int = 0
    """Scratch memory of a worker for what becomes codes; 0 where nothing does."""
    scales_nbytes: int = 0
    """Largest magnitudes and scales of the tensor that has most of them."""
    survey_bytes: int = 0
    """What is known of finished tensors for a report, until it is written."""
    device_worker_bytes: int = 0
    """Host memory of a worker for what comes back from an accelerator; 0 without one."""
    device_growth: int = 0
    """Host memory that comes with the use of accelerators, beside that; 0 without any."""


def choose_resources(
    demand: Demand,
    *,
    budget: int,
    baseline: int,
    workers: int,
    readers: int,
    writers: int,
    at_once: int = 1,
) -> tuple[Resources, MemoryProjection]:
    """Cut the job as coarsely as is useful within the budget.

    Args:
        demand: What the job asks for.
        budget: Most private memory the process may have, in bytes.
        baseline: Private memory before work starts, in bytes.
        workers: Compute threads.
        readers: Reading threads.
        writers: Writing threads.
        at_once: Merges that share the budget, each with so many threads.

    Raises:
        MemoryBudgetError: Not even the smallest cut fits; names the smallest budget that does.
    """
    smallest_slot = _smallest_slot(demand)
    scratch = workers * _worker_bytes(demand) + readers * demand.reader_bytes
    growth = GROWTH_BYTES // at_once + records_bytes(demand.tensors, demand.blocks)
    growth += demand.device_growth + demand.survey_bytes
    beside = max(0, budget - baseline) // at_once * (at_once - 1)
    fixed = baseline + beside + growth + scratch + demand.factors_largest
    least = demand.inputs * smallest_slot + 2 * _output_bytes(demand, smallest_slot)
    floor = _statistics_floor(demand)
    if fixed + floor + least > budget:
        raise MemoryBudgetError(
            f"{demand.inputs} inputs need at least {format_size(fixed + floor + least)} of memory, "
            f"of which {format_size(baseline)} is in use before work starts; the budget is "
            f"{format_size(budget)}; give --memory "
            f"{format_budget(fixed + floor + least + BASELINE_NOISE)} or more"
        )
    share = int((budget - fixed) * _STATISTICS_SHARE)
    statistics = min(max(floor, share), _statistics_useful(demand), budget - fixed - least)
    # Enough for the tensors in work and those that are read meanwhile.
    spare = min(3 * demand.factors_largest, demand.factors_nbytes - demand.factors_largest)
    spare = min(spare, int((budget - fixed - statistics - least) * _FACTORS_SHARE))
    factors = demand.factors_largest + spare
    free = budget - fixed - statistics - spare
    slot_bytes, output_slots = _choose_slots(
        demand, free, chunks=readers + workers + _DEPTH, output_slots=workers + writers + 1
    )
    output_slot_bytes = _output_bytes(demand, slot_bytes)
    slots = (free - output_slots * output_slot_bytes) // slot_bytes
    in_flight = demand.inputs * (readers + workers + _DEPTH)
    # Those in flight are what the next tensor loads into while the largest is merged. More would
    # be new pages, which cost more than they save.
    resident = -(-demand.resident_nbytes // slot_bytes)
    everything = demand.inputs * (-(-demand.input_nbytes // slot_bytes) + 1)
    slots = min(slots, resident + in_flight, max(everything, demand.inputs))
    resources = Resources(
        slot_bytes=slot_bytes,
        slots=slots,
        output_slot_bytes=output_slot_bytes,
        output_slots=output_slots,
        statistics_bytes=statistics,
        readers=readers,
        workers=workers,
        writers=writers,
        factor_bytes=factors,
    )
    projection = MemoryProjection(
        baseline=baseline,
        growth=growth,
        inputs=slots * slot_bytes,
        outputs=output_slots * output_slot_bytes,
        scratch=scratch,
        statistics=statistics,
        budget=budget,
        factors=factors,
        beside=beside,
    )
    return resources, projection


def _smallest_slot(demand: Demand) -> int:
    return (BLOCK + demand.around_numel) * demand.input_itemsize


def whole_bytes(sources: int, numel: int, itemsize: int) -> int:
    """Return the memory of a tensor that is gathered, of what is made of it, and of the making.

    Args:
        sources: Vectors.
        numel: Elements of each.
        itemsize: Bytes per element.
    """
    return ((sources + 1) * itemsize + WHOLE_BYTES) * numel


def records_bytes(tensors: int, blocks: int) -> int:
    """Return the memory of what is known of finished tensors until the manifest is written."""
    return tensors * _RECORD_BYTES + blocks * _BLOCK_RECORD_BYTES


def survey_bytes(width: int) -> int:
    """Return the memory of what a report knows of a tensor, until it is written.

    Args:
        width: Its numbers.
    """
    return _SURVEY_NUMBER_BYTES * width + _SURVEY_RECORD_BYTES


def values_limit(numel: int) -> int:
    """Return how many magnitudes a search over ``numel`` elements should be able to collect.

    A band sampled from 2^16 elements is at most 2 % wide; more than that is rarely in it.
    """
    return min(numel, max(_DIRECT_NUMEL, numel // 40))


def private_limit(counts: Counts, numel: int) -> int:
    """Return how many magnitudes each search of a worker collects of a tensor that is all in memory.

    Args:
        counts: Values that are ranked at once, and totals per block.
        numel: Elements of the tensor.
    """
    return min(numel, max(_direct_limit(counts), numel // 40))


def _direct_limit(counts: Counts) -> int:
    if counts.ranked <= _FEW_RANKED:
        return _DIRECT_NUMEL
    return max(_LEAST_COLLECTED, _DIRECT_NUMEL * _FEW_RANKED // counts.ranked)


def search_bytes(counts: Counts, numel: int, itemsize: int, limit: int) -> int:
    """Return the memory of the searches and totals of a scope, and of a spare room to conclude one.

    Args:
        counts: Values that are ranked at once, and totals per block.
        numel: Elements in the scope.
        itemsize: Bytes per magnitude.
        limit: Most magnitudes that each collects.
    """
    blocks = numel // BLOCK + 1
    totals = counts.totals * 8 * blocks
    if not counts.ranked:
        return totals
    per_value = _BYTES_PER_BLOCK * blocks + _BINS_BYTES + limit * itemsize
    return totals + counts.ranked * per_value + limit * itemsize


def scattered_bytes(counts: Counts, numel: int, blocks: int) -> int:
    """Return what a scope takes beyond :func:`search_bytes` for having many short blocks.

    Args:
        counts: Values that are ranked at once, and totals per block.
        numel: Elements in the scope.
        blocks: Blocks: every tensor of a model starts a new one.
    """
    more = max(0, blocks - (numel // BLOCK + 1))
    return more * (counts.ranked * _BYTES_PER_BLOCK + counts.totals * 8)


def affordable_limit(counts: Counts, numel: int, itemsize: int, available: int) -> int:
    """Return the largest collecting limit, up to the useful one, that ``available`` bytes pay for."""
    if not counts.ranked:
        return 0
    fixed = search_bytes(counts, numel, itemsize, 0)
    rooms = (counts.ranked + 1) * itemsize
    return max(0, min(values_limit(numel), (available - fixed) // rooms))


def _has_statistics(demand: Demand) -> bool:
    return bool(demand.statistics.ranked or demand.statistics.totals)


def _statistics_floor(demand: Demand) -> int:
    # A tensor has its search behind it when its scales are found.
    if not _has_statistics(demand):
        return max(demand.scales_nbytes, demand.whole_nbytes)
    limit = min(demand.statistic_numel, _direct_limit(demand.statistics))
    search = search_bytes(demand.statistics, demand.statistic_numel, demand.compute_itemsize, limit)
    search += demand.scattered_nbytes
    return max(search, demand.scales_nbytes, demand.whole_nbytes)


def _statistics_useful(demand: Demand) -> int:
    """Two scopes at once, so that one is counted while the other is sorted out."""
    whole = max(demand.whole_nbytes, demand.whole_useful)
    if not _has_statistics(demand):
        return max(2 * demand.scales_nbytes, whole)
    numel = demand.statistic_numel
    search = search_bytes(demand.statistics, numel, demand.compute_itemsize, values_limit(numel))
    search += demand.scattered_nbytes
    return max(2 * search, 2 * demand.scales_nbytes, whole)


def _worker_bytes(demand: Demand) -> int:
    """One worker's blocks, and the search that it runs by itself on a small tensor."""
    blocks = demand.compute_rows * demand.run_numel * demand.compute_itemsize + _WORKER_BYTES
    blocks += demand.row_bytes + demand.whole_worker_bytes
    blocks += demand.device_worker_bytes + demand.encoding_bytes
    if not _has_statistics(demand):
        return blocks
    numel = min(demand.statistic_numel, LARGEST_SLOT // demand.input_itemsize)
    limit = private_limit(demand.statistics, numel)
    return blocks + search_bytes(demand.statistics, numel, demand.compute_itemsize, limit)


def _output_bytes(demand: Demand, slot_bytes: int) -> int:
    return int(slot_bytes * demand.output_ratio)


def _choose_slots(demand: Demand, free: int, *, chunks: int, output_slots: int) -> tuple[int, int]:
    """Return the largest slot, by halving, with which the pipeline still fills; and the outputs."""
    slot_bytes = _smallest_slot(demand)
    while slot_bytes * 2 <= LARGEST_SLOT:
        twice = slot_bytes * 2
        cost = demand.inputs * chunks * twice + output_slots * _output_bytes(demand, twice)
        if cost > free:
            break
        slot_bytes = twice
    inputs = demand.inputs * slot_bytes
    affordable = (free - inputs) // max(1, _output_bytes(demand, slot_bytes))
    return slot_bytes, max(2, min(output_slots, affordable))
