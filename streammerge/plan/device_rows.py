"""Which tensors whose rows must be seen whole are merged on an accelerator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from streammerge.dtypes import DType
from streammerge.methods.programs import Programs
from streammerge.plan.chunking import widest_input
from streammerge.plan.types import TensorTask
from streammerge.rng import LANES_PER_COUNTER
from streammerge.statistics import BLOCK
from streammerge.tiles.fusing import count_sink_rows
from streammerge.tiles.program import Op

MOST_IN_REGISTERS = 8192
"""Elements of a row that one program instance ranks: its keys pass through 64 KiB of a multiprocessor's shared
memory, which every device has. Twice as many would fit data centres' devices alone, and four times as many
would spill. Longer ones are sorted by torch."""
_SORTING_BYTES = 96
"""Per element of a step that torch sorts: keys, those that are sorted, their indices, and as much again for
the sort, twice. An estimate."""
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


def sorting_bytes(tasks: Iterable[TensorTask], programs: Sequence[Programs]) -> int:
    """Return what torch takes to sort long rows, per element of a step; 0 where it sorts none.

    Args:
        tasks: Tensors that go to a device.
        programs: What the method does, for each of its settings.
    """
    sorts = any(
        task.row > MOST_IN_REGISTERS and programs[task.setting].row_ranks is not None
        for task in tasks
    )
    return _SORTING_BYTES if sorts else 0
