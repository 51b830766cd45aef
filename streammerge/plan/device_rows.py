"""Which tensors whose rows must be seen whole are merged on an accelerator."""

from __future__ import annotations

from streammerge.dtypes import DType
from streammerge.methods.programs import Programs
from streammerge.plan.chunking import widest_input
from streammerge.plan.types import TensorTask
from streammerge.rng import LANES_PER_COUNTER
from streammerge.statistics import BLOCK
from streammerge.tiles.fusing import count_sink_rows
from streammerge.tiles.program import Op

SORTING_BYTES = 64
"""Per element of a step whose rows are sorted by torch: keys, those that are sorted, their indices, and as much
for the sort. An estimate."""
_TOTALS = frozenset({Op.SUM, Op.DOT})
"""What is added up there, row by row."""


def has_rows_for_device(task: TensorTask, work: Programs, compute_itemsize: int) -> bool:
    """Return whether a tensor is merged on a device, for all that is asked about its rows.

    Rows begin where a block of random numbers does, and one fits the smallest step. Where values of the
    whole tensor are ranked beside, it is the CPU's, as is float64.

    Args:
        task: The tensor.
        work: What is done with it.
        compute_itemsize: Bytes per element that is computed with.
    """
    if work.ranked or compute_itemsize != DType.F32.itemsize:
        return False
    totals = {op for program in (*work.row_rounds, *work.rounds) for op in program.totals}
    return totals <= _TOTALS and task.row % LANES_PER_COUNTER == 0 and task.row <= BLOCK


def count_rows_before_ranks(programs: Programs) -> int:
    """Return how many rows of a ring kernels fill before those that hold ranks within rows."""
    asking = (
        programs.rounds if programs.row_ranks is None else (programs.row_ranks, *programs.rounds)
    )
    return max((count_sink_rows(each) for each in asking), default=0)


def count_rows_of(task: TensorTask, slot_bytes: int) -> int:
    """Return the most rows that a chunk of a tensor has a part of.

    Args:
        task: The tensor.
        slot_bytes: Size of an input buffer, which limits chunks.
    """
    return min(task.numel, slot_bytes // widest_input(task)) // task.row + 2
