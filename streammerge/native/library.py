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
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from streammerge.dtypes import DType
from streammerge.native.machine import JobCall, RoomCall, list_sizes

SWITCH = "STREAMMERGE_NATIVE"
"""Environment variable that, set to 0, leaves the compiled kernels alone."""
SOURCES_AT_MOST = 16
"""Sources that :class:`MergeCall` takes."""
CROWDS_AT_MOST = 4
"""Crowded magnitudes that :class:`QuestionCall` takes."""
ALL_TIES = 2**63 - 1
"""As :attr:`SourceCall.ties`: every tie is kept."""
DTYPE_CODES: Mapping[DType, int] = {DType.F32: 0, DType.BF16: 1, DType.F16: 2}
"""The element types that the kernels read and write."""
_ROW_NUMEL = 528
"""``ROW`` of block.h."""


Call = TypeVar("Call", bound=ctypes.Structure)


class SourceCall(ctypes.Structure):
    """``sm_source`` of calls.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("ties", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("key", ctypes.c_uint64 * 2),
        ("kept", ctypes.c_int64),
        ("weight", ctypes.c_float),
        ("threshold", ctypes.c_float),
        ("density", ctypes.c_float),
        ("upper_limit", ctypes.c_int32),
        ("lower_limit", ctypes.c_int32),
        ("keep", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


class MergeCall(ctypes.Structure):
    """``sm_merge`` of calls.h."""

    _fields_ = (
        ("sources", ctypes.POINTER(SourceCall)),
        ("base", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("divisor", ctypes.c_float),
        ("limit", ctypes.c_float),
        ("n_sources", ctypes.c_int32),
        ("base_dtype", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("combine", ctypes.c_int32),
        ("refused", ctypes.c_int32),
    )


class QuestionCall(ctypes.Structure):
    """``sm_question`` of calls.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("base", ctypes.c_void_p),
        ("histogram", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("above", ctypes.c_int64),
        ("inside", ctypes.c_int64),
        ("crowds", ctypes.c_int64 * CROWDS_AT_MOST),
        ("crowded", ctypes.c_int32 * CROWDS_AT_MOST),
        ("n_crowded", ctypes.c_int32),
        ("low", ctypes.c_int32),
        ("high", ctypes.c_int32),
        ("shift", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("base_dtype", ctypes.c_int32),
        ("largest", ctypes.c_int32),
    )


class SelectionCall(ctypes.Structure):
    """``sm_selection`` of calls.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("base", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("greater", ctypes.c_int64),
        ("equal", ctypes.c_int64),
        ("threshold", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("base_dtype", ctypes.c_int32),
    )


def count_scratch(n_sources: int) -> int:
    """Return how many float32 numbers :meth:`Kernels.merge_blocks` needs."""
    return (n_sources + 2) * _ROW_NUMEL


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
        library = ctypes.CDLL(str(path))
        calls = (SourceCall, MergeCall, QuestionCall, SelectionCall)
        sizes = [*map(ctypes.sizeof, calls), _ROW_NUMEL, SOURCES_AT_MOST, CROWDS_AT_MOST]
        if sizes != [library.sm_size_of(index) for index in range(len(sizes))]:
            raise OSError(f"{path} was compiled from other sources")
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
        self._merge_blocks = library.sm_merge_blocks
        self._merge_blocks.argtypes = (ctypes.POINTER(MergeCall), *numbers)
        self._answer_bands = library.sm_answer_bands
        self._answer_bands.argtypes = (ctypes.POINTER(QuestionCall), *numbers, ctypes.c_int64)
        self._answer_bins = library.sm_answer_bins
        self._answer_bins.argtypes = (ctypes.POINTER(QuestionCall), ctypes.c_int32)
        self._answer_bins.restype = None
        self._select = library.sm_select
        self._select.argtypes = (ctypes.POINTER(SelectionCall), *numbers)
        self._select.restype = None
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

    def merge_blocks(self, calls: ctypes.Array[MergeCall], count: int, scratch: int) -> int:
        """Merge blocks and return how many were refused; what those wrote is not to be used.

        Args:
            calls: The blocks.
            count: How many there are.
            scratch: Address of :func:`count_scratch` numbers.
        """
        return int(self._merge_blocks(calls, count, scratch))

    def answer_bands(
        self,
        calls: ctypes.Array[QuestionCall],
        first: int,
        count: int,
        collected: NDArray[np.float32],
    ) -> int:
        """Count what lies above bands and what is crowded in them; collect the rest.

        Args:
            calls: The questions.
            first: The first one that is asked.
            count: How many are.
            collected: Receives what is collected, question by question.

        Returns:
            How many were answered before there was no room left.
        """
        return int(
            self._answer_bands(_from(calls, first), count, collected.ctypes.data, collected.size)
        )

    def answer_bins(self, calls: ctypes.Array[QuestionCall], first: int, count: int) -> None:
        """Add to the histograms of intervals.

        Args:
            calls: The questions.
            first: The first one that is asked.
            count: How many are.
        """
        self._answer_bins(_from(calls, first), count)

    def select(self, calls: ctypes.Array[SelectionCall], count: int, patterns: int) -> None:
        """Find the k-th largest magnitudes.

        Args:
            calls: The scopes.
            count: How many there are.
            patterns: Address of as many 32-bit numbers as the longest has.
        """
        self._select(calls, count, patterns)

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


def _from(calls: ctypes.Array[Call], first: int) -> ctypes._Pointer[Call]:
    """Return a pointer to one of the calls."""
    return ctypes.pointer(calls[first])


@functools.cache
def load_kernels() -> Kernels | None:
    """Return the compiled functions; None where they were not compiled, or are switched off."""
    if os.environ.get(SWITCH) == "0":
        return None
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            try:
                return Kernels(path)
            except (OSError, AttributeError):
                # Compiled for another system or from other sources: what is plain works anywhere.
                return None
    return None
