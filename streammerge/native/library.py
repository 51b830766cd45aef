"""Finds the compiled kernels and calls them; see :mod:`streammerge.native`.

Memory: a few hundred bytes per caller; scratch memory and results are the caller's.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping
from enum import IntEnum
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from streammerge.dtypes import DType

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


class Keep(IntEnum):
    """What is kept of a source; ``enum keep`` of merge.c."""

    ALL = 0
    LARGEST = 1
    RANDOM = 2


class Combine(IntEnum):
    """How the sources become one; ``enum combine`` of merge.c."""

    SUM = 0
    MAJORITY_TOTAL = 1
    MAJORITY_FREQUENCY = 2


class SourceCall(ctypes.Structure):
    """``sm_source`` of merge.c."""

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
    """``sm_merge`` of merge.c."""

    _fields_ = (
        ("sources", ctypes.POINTER(SourceCall)),
        ("base", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("divisor", ctypes.c_float),
        ("limit", ctypes.c_float),
        ("n_sources", ctypes.c_int32),
        ("base_dtype", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("combine", ctypes.c_int32),
    )


class QuestionCall(ctypes.Structure):
    """``sm_question`` of measure.c."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("base", ctypes.c_void_p),
        ("collected", ctypes.c_void_p),
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


def count_scratch(n_sources: int) -> int:
    """Return how many float32 numbers :attr:`MergeCall.scratch` must hold."""
    return (n_sources + 2) * _ROW_NUMEL


class Kernels:
    """The compiled functions; the interpreter is free for others while one runs."""

    def __init__(self, path: Path) -> None:
        """Load them.

        Raises:
            OSError: The file is no library for this system.
            AttributeError: It has other functions.
        """
        library = ctypes.CDLL(str(path))
        calls = (SourceCall, MergeCall, QuestionCall)
        sizes = [*map(ctypes.sizeof, calls), _ROW_NUMEL, SOURCES_AT_MOST, CROWDS_AT_MOST]
        if sizes != [library.sm_size_of(index) for index in range(len(sizes))]:
            raise OSError(f"{path} was compiled from other sources")
        self._merge_block = library.sm_merge_block
        self._merge_block.argtypes = (ctypes.POINTER(MergeCall),)
        self._merge_block.restype = ctypes.c_int32
        self._answer_band = library.sm_answer_band
        self._answer_bins = library.sm_answer_bins
        for answer in (self._answer_band, self._answer_bins):
            answer.argtypes = (ctypes.POINTER(QuestionCall),)
            answer.restype = None

    def merge_block(self, call: MergeCall) -> bool:
        """Merge a block; return whether all is finite and fits. If not, the output means nothing."""
        return self._merge_block(call) == 0  # type: ignore[no-any-return]

    def answer_band(self, call: QuestionCall) -> None:
        """Count what lies above a band and what is crowded in it; collect the rest."""
        self._answer_band(call)

    def answer_bins(self, call: QuestionCall) -> None:
        """Add to the histogram of an interval."""
        self._answer_bins(call)


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
