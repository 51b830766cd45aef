"""What a job asks of memory: found from its tensors alone, whatever the budget."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from streammerge.adapters.onto_base.changes import DELTA_ROWS
from streammerge.assignment.types import Action
from streammerge.checkpoint.types import coded_bits
from streammerge.methods.programs import Counts, Programs
from streammerge.methods.surveying import Survey
from streammerge.plan.budgeting import (
    LARGEST_SLOT,
    Demand,
    scattered_bytes,
    survey_bytes,
    whole_bytes,
)
from streammerge.plan.chunking import DECODING_BYTES, most_around, output_bytes, widest_input
from streammerge.plan.factors import factors_nbytes, stored_nbytes
from streammerge.plan.types import TensorTask
from streammerge.statistics import BLOCK, count_blocks
from streammerge.statistics.rounds import RowMemory
from streammerge.tiles.interpreter import count_rows

ENCODING_BYTES = 2**22
"""Scratch memory of a worker that makes codes of numbers: quotients, scales spread out, bits of one step."""
_SMALL_NUMEL = 2**15
"""Tensors with scales are taken to be at least as large when output buffers are measured: smaller ones
fit by many times, and what one scale takes beside one code is no measure for others."""


def measure_demand(
    programs: Sequence[Programs],
    tasks: Sequence[TensorTask],
    *,
    itemsize: int,
    model_scope: bool,
    torch: bool,
    surveys: Sequence[Survey] = (),
) -> Demand:
    """Return what a merge asks of memory.

    Args:
        programs: What the method does, for each of its settings.
        tasks: All tensors.
        itemsize: Bytes per element in the compute dtype.
        model_scope: Whether statistics cover the whole model.
        torch: Whether torch computes anything.
        surveys: What a report asks about tensors, for each of the settings; nothing without one.
    """
    merged = [task for task in tasks if task.action is Action.MERGE]
    made = [task for task in tasks if task.action in (Action.MERGE, Action.CONVERT)]
    counts = reduce(Counts.joined, (each.counts for each in programs), Counts(0, 0))
    needs = any(each.rounds or each.work.whole for each in programs)
    widest = {id(task): widest_input(task) for task in tasks}
    numels = [task.numel for task in merged] or [0]
    nbytes = [_input_nbytes(task) for task in tasks]
    changed = [task for task in merged if task.changes]
    encoded = [task for task in tasks if task.encoding is not None]
    whole_numel = max((task.numel for task in tasks if task.whole), default=0)
    sources = max((each.sources for each in programs), default=0)
    return Demand(
        inputs=max(1, len(_models_read(tasks))),
        input_itemsize=max(widest.values(), default=1),
        output_ratio=max(
            [task.made_dtype.itemsize / widest[id(task)] for task in made]
            + [
                output_bytes(task) / (widest[id(task)] * max(task.numel, _SMALL_NUMEL))
                for task in encoded
            ],
            default=0.0,
        ),
        compute_rows=_compute_rows(
            programs,
            surveys,
            torch=torch,
            changed=most_changed_sources(programs, tasks),
        ),
        compute_itemsize=itemsize,
        whole_nbytes=whole_bytes(sources, whole_numel, itemsize),
        whole_worker_bytes=whole_bytes(sources, min(whole_numel, BLOCK), itemsize),
        around_numel=max((most_around(task.row) for task in tasks), default=0),
        run_numel=max([BLOCK, *(task.row for task in tasks)]),
        row_bytes=max((_row_bytes(each, tasks) for each in programs if each.by_rows), default=0),
        statistics=counts,
        statistic_numel=sum(numels) if model_scope else max(numels),
        scattered_nbytes=scattered_bytes(counts, sum(numels), sum(map(count_blocks, numels)))
        if model_scope
        else 0,
        resident_nbytes=0
        if model_scope or not needs
        else max(
            (n for n, task in zip(nbytes, tasks, strict=True) if task.action is Action.MERGE),
            default=0,
        ),
        input_nbytes=sum(nbytes) + stored_nbytes(changed),
        tensors=len(tasks),
        blocks=sum(count_blocks(task.numel) for task in tasks),
        survey_bytes=sum(
            survey_bytes(surveys[task.setting].layout.width) for task in merged if surveys
        ),
        reader_bytes=DECODING_BYTES if any(map(_is_made, tasks)) else 0,
        encoding_bytes=_encoding_bytes(encoded) if encoded else 0,
        scales_nbytes=max((_scales_nbytes(task) for task in encoded), default=0),
        factors_largest=max((factors_nbytes(task, itemsize) for task in changed), default=0),
        factors_nbytes=sum(factors_nbytes(task, itemsize) for task in changed),
    )


MOST_ROWS = 4096
"""Rows that are computed at once at most: there are tensors whose rows have one element."""


def _row_bytes(programs: Programs, tasks: Sequence[TensorTask]) -> int:
    """Return what a worker takes for what is known of rows: numbers, ranks, and what they come from."""
    counts = programs.row_counts
    numbers = max((len(program.numbers) for program in programs.all), default=0)
    of_rows = MOST_ROWS * 8 * 3 * (counts.totals + numbers)
    widest = max((task.row for task in tasks), default=0)
    # Per ranked value what was ranked and its ranks; the sort's own keys for one row, or, in numpy,
    # indices for all.
    of_ranks = 24 * max(BLOCK, widest) * counts.ranked + 32 * max(BLOCK, widest) * bool(
        counts.ranked
    )
    # What is known of the rows of a tensor that is measured and merged in one go.
    remembered = max(
        (
            RowMemory.nbytes_of(rows_to_remember(programs, task), programs.row_numbers)
            for task in tasks
            if task.numel * widest_input(task) <= LARGEST_SLOT
        ),
        default=0,
    )
    # A result of which only a part is asked for is written beside it first.
    return of_rows + of_ranks + remembered + 4 * max(BLOCK, widest)


_LEAST_REMEMBERED = 64
"""Elements of the shortest rows of which something is remembered: of shorter ones it would take more
memory than they do."""


def rows_to_remember(programs: Programs, task: TensorTask) -> int:
    """Return of how many rows of a tensor something is kept from when it is measured until it is merged."""
    if not programs.rounds or task.row < _LEAST_REMEMBERED:
        return 0
    return task.numel // task.row


def _encoding_bytes(encoded: Sequence[TensorTask]) -> int:
    """Return what a worker takes to make codes: of a tensor in one piece, its scales too."""
    small = [task for task in encoded if task.numel * widest_input(task) <= LARGEST_SLOT]
    return ENCODING_BYTES + max((_scales_nbytes(task) for task in small), default=0)


def _scales_nbytes(task: TensorTask) -> int:
    return 0 if task.encoding is None else task.encoding.nbytes


def _compute_rows(
    programs: Sequence[Programs], surveys: Sequence[Survey], *, torch: bool, changed: int
) -> int:
    """Return how many blocks a worker keeps in the compute dtype."""
    # A survey copies magnitudes of a block, and looks at them.
    kernels = count_rooms(programs) + 2 * bool(surveys)
    if not torch:
        return kernels + changed
    # For changes, a product and one more row, and what they come to of each source.
    plain = count_plain_rows(programs, surveys) + (DELTA_ROWS if changed else 0) + changed
    # An answer has a copy of what is ranked of a block; as much again is taken while it is made, and
    # stays with the worker's heap.
    return kernels + plain + 2 * max((each.ranked for each in programs), default=0)


_MOST_ROOMS = 8
"""Blocks that values are collected in at once: what finds no room is asked again by itself."""


def most_changed_sources(programs: Sequence[Programs], tasks: Sequence[TensorTask]) -> int:
    """Return how many sources are merged to a tensor that adapters change, at most."""
    changed = (task for task in tasks if task.changes and task.action is Action.MERGE)
    return max((programs[task.setting].sources for task in changed), default=0)


def count_rooms(programs: Sequence[Programs]) -> int:
    """Return how many blocks of collected values the compiled way keeps: one for each ranked value."""
    ranked = max((each.ranked for each in programs), default=0)
    return max(1, min(ranked, _MOST_ROOMS))


def count_plain_rows(programs: Sequence[Programs], surveys: Sequence[Survey]) -> int:
    """Return how many blocks the plain way keeps: the base, magnitudes, and what programs need."""
    every = [*(one.all for one in programs), *(one.all for one in surveys)]
    return 2 + max((count_rows(each) for some in every for each in some), default=0)


def _models_read(tasks: Sequence[TensorTask]) -> set[int]:
    """Return the models that any tensor is read from: a batch of small ones may need them all."""
    # Most are read for the first tensor already.
    count = len(tasks[0].inputs) if tasks else 0
    return {
        model for model in range(count) if any(task.inputs[model] is not None for task in tasks)
    }


def _is_made(task: TensorTask) -> bool:
    """Return whether a reader makes what it reads: numbers of codes, or rows of other rows."""
    for entry in task.inputs:
        if entry is not None and (entry.rows is not None or coded_bits(entry.parts)):
            return True
    return False


def _input_nbytes(task: TensorTask) -> int:
    nbytes = 0
    for entry in task.inputs:
        if entry is not None:
            nbytes += entry.stored_nbytes(task.numel)
    return nbytes
