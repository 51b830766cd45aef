"""Finds the compiled kernels and calls them; see :mod:`streammerge.native`.

Memory: a few hundred bytes per caller; scratch memory and results are the caller's.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from streammerge.dtypes import DType
from streammerge.native.machine import JobCall, RoomCall, list_sizes

SWITCH = "STREAMMERGE_NATIVE"
"""Environment variable that, set to 0, leaves the compiled kernels alone."""
DTYPE_CODES: Mapping[DType, int] = {DType.F32: 0, DType.BF16: 1, DType.F16: 2}
"""The element types that the kernels read and write."""
DIFFERENCE_CODE = 3
"""Stands in the place of a type where a source is a task vector in float32 already."""


class Kernels:
    """The compiled functions; the interpreter is free for others while one runs.

    Each takes an array of calls: to get the interpreter back takes longer than some of them.
    """

    def __init__(self, path: Path) -> None:
        """Load them.

        Raises:
            OSError: The file is no library for this system, or one of other sources.
            AttributeError: It has other functions.
        """
        self.path = path
        library = ctypes.CDLL(str(path))
        sizes = list_sizes()
        if sizes != [library.sm_machine_size_of(index) for index in range(len(sizes))]:
            raise OSError(f"{path} was compiled from other sources")
        numbers = (ctypes.c_int32, ctypes.c_void_p)
        self._run = library.sm_run
        self._run.argtypes = (ctypes.POINTER(JobCall), *numbers, ctypes.POINTER(RoomCall))
        self._rank_rows = library.sm_rank_rows
        self._rank_rows.argtypes = (
            ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p,
        )  # fmt: skip
        self._rank_rows.restype = None
        self._product = library.sm_product
        self._product.argtypes = (
            ctypes.c_void_p,
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64) * 2,
            *(ctypes.c_int64,) * 3,
        )
        self._product.restype = None
        squares = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
        self._row_squares = library.sm_row_squares
        self._row_squares.argtypes = squares
        self._row_squares.restype = None
        self._column_squares = library.sm_column_squares
        self._column_squares.argtypes = squares
        self._column_squares.restype = None
        self._change_range = library.sm_change_range
        self._change_range.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        self._change_range.restype = None
        self._copy_mapped = library.sm_copy_mapped
        self._copy_mapped.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        self._copy_mapped.restype = ctypes.c_int64
        self._guard_begin = library.sm_guard_begin
        self._guard_end = library.sm_guard_end
        self._guard_end.restype = None
        self._mappings = 0
        self._guarding = threading.Lock()

    def run(
        self,
        jobs: ctypes.Array[JobCall],
        first: int,
        count: int,
        *,
        memory: int,
        room: RoomCall | None = None,
    ) -> int:
        """Run jobs and return how many were refused; what those wrote is not to be used.

        Args:
            jobs: The jobs.
            first: The first one that is run.
            count: How many are; fewer where the room is too small: it says how many were.
            memory: Address of as many float32 numbers as the largest program needs.
            room: Where questions collect; None where nothing is collected.
        """
        room_or_null = None if room is None else ctypes.byref(room)
        return int(self._run(_from(jobs, first), count, memory, room_or_null))

    def rank_rows(
        self, values: int, *, rows: int, row_numel: int, ranks: int, scratch: int
    ) -> None:
        """Rank the magnitudes of each row from 0, ascending; of equal ones the first is the largest.

        Args:
            values: Address of ``[rows, row_numel]`` float32.
            rows: Number of rows.
            row_numel: Elements per row, at most 2^24: float32 holds their numbers exactly.
            ranks: Address of ``[rows, row_numel]`` float32, which receive the ranks; may be that of
                the values.
            scratch: Address of ``[2, row_numel]`` numbers of 64 bits.
        """
        self._rank_rows(values, rows, row_numel, ranks, scratch)

    def product(
        self,
        out: int,
        left: tuple[int, int, int],
        right: tuple[int, int, int],
        *,
        rows: int,
        rank: int,
        columns: int,
    ) -> None:
        """Multiply two matrices of float32, each element's terms added in order.

        Args:
            out: Address of ``[rows, columns]``.
            left: Address of ``[rows, rank]``, with the steps from row to row and column to column in
                elements.
            right: Likewise of ``[rank, columns]``.
            rows: Rows of the left one.
            rank: Its columns.
            columns: Columns of the right one.
        """
        self._product(out, *left, *right, rows, rank, columns)

    def row_squares(self, values: int, rows: int, columns: int, totals: int) -> None:
        """Add up the squares of each row, in the order of every total.

        Args:
            values: Address of ``[rows, columns]`` float32.
            rows: Number of rows.
            columns: Elements per row.
            totals: Address of ``[rows]`` float64, which receive the sums.
        """
        self._row_squares(values, rows, columns, totals)

    def column_squares(self, values: int, rows: int, columns: int, totals: int) -> None:
        """Add the squares of each column to its total, from the first row to the last.

        Args:
            values: Address of ``[rows, columns]`` float32.
            rows: Number of rows.
            columns: Elements per row.
            totals: Address of ``[columns]`` float64.
        """
        self._column_squares(values, rows, columns, totals)

    def change_range(self, change: int, *, start: int, numel: int) -> None:
        """Compute elements of a change into where it goes.

        Args:
            change: Address of a :class:`~streammerge.native.machine.ChangeCall`.
            start: Flat index of the first in its matrix.
            numel: How many.
        """
        self._change_range(change, start, numel)

    @contextmanager
    def guard_mappings(self) -> Iterator[None]:
        """Let :meth:`copy_mapped` survive SIGBUS meanwhile; the last to leave puts back what was.

        Raises:
            OSError: The system refuses the handler.
        """
        with self._guarding:
            if self._mappings == 0 and self._guard_begin() != 0:
                raise OSError(errno.EINVAL, "the handler of SIGBUS cannot be set")
            self._mappings += 1
        try:
            yield
        finally:
            with self._guarding:
                self._mappings -= 1
                if self._mappings == 0:
                    self._guard_end()

    def copy_mapped(self, to: int, mapped: int, nbytes: int) -> int:
        """Copy from a mapping under :meth:`guard_mappings`, and return how many bytes were there.

        Args:
            to: Address of as much memory.
            mapped: Address in the mapping.
            nbytes: Bytes to copy.
        """
        return int(self._copy_mapped(to, mapped, nbytes))


def _from(calls: ctypes.Array[JobCall], first: int) -> ctypes._Pointer[JobCall]:
    """Return a pointer to one of the calls."""
    return ctypes.pointer(calls[first])


@functools.cache
def load_kernels() -> Kernels | None:
    """Return the compiled functions; None where they were not compiled, or are switched off."""
    found = find_kernels()
    return found if isinstance(found, Kernels) else None


def find_kernels() -> Kernels | str:
    """Return the compiled functions, or in a sentence why there are none."""
    if os.environ.get(SWITCH) == "0":
        return f"switched off by {SWITCH}=0"
    refused = []
    # Those that depend on no version of Python first: wheels hold them.
    for suffix in reversed(EXTENSION_SUFFIXES):
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            try:
                return Kernels(path)
            except (OSError, AttributeError) as error:
                # Compiled for another system or from other sources: what is plain works anywhere.
                refused.append(f"{path}: {error}")
    return "; ".join(refused) or "not compiled: no C compiler was found when this was installed"
