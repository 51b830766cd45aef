"""A tensor of all sources gathered, for methods that must see whole matrices.

Memory: what :func:`streammerge.plan.device_matrices.gathering_bytes` says, reserved by the caller; what was made,
one value per element, for as long as the tensor is merged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.dtypes import DType
from streammerge.engine.asking import BlockAnswer
from streammerge.engine.buffers import allocate
from streammerge.lazily import torch
from streammerge.methods.base import Work
from streammerge.plan.types import TensorTask
from streammerge.statistics import count_blocks
from streammerge.statistics.rounds import Found

MakeWhole = Callable[[Work, NDArray[Any], TensorTask], Found]
"""What :func:`make_on_cpu` is: the CPU's, or that of accelerators."""


class GatheredTensor:
    """Collects the vectors of one tensor, and makes of them what the method does; thread-safe.

    Has what the schedule asks of :class:`streammerge.engine.scopes.ScopeStatistics`.
    """

    sample_runs = 0
    """Nothing is sampled."""

    def __init__(
        self,
        work: Work,
        task: TensorTask,
        *,
        sources: int,
        compute_dtype: DType,
        make: MakeWhole,
    ) -> None:
        """Make room.

        Args:
            work: What the method does.
            task: The tensor.
            sources: Number of sources.
            compute_dtype: F32 or F64.
            make: Makes of the whole tensor what the method does.
        """
        self._make = make
        self._work = work
        self._task = task
        dtype = np.dtype(compute_dtype.torch_name)
        memory = allocate(sources * task.numel * dtype.itemsize)
        self._vectors: NDArray[Any] | None = memory.view(dtype).reshape(sources, task.numel)
        self._dtype = dtype
        self._lock = threading.Lock()
        self._answered = np.zeros(count_blocks(task.numel), dtype=np.bool_)
        self.found: Found | None = None
        """What was made; None until it is."""

    def room(self, start: int, numel: int) -> NDArray[Any]:
        """Return where a range of all sources goes, ``[sources, numel]``."""
        assert self._vectors is not None  # noqa: S101 - nothing is gathered after the end
        return self._vectors[:, start : start + numel]

    def add(self, first_block: int, answers: Sequence[BlockAnswer]) -> None:
        """Note that some blocks are there."""
        with self._lock:
            self._answered[first_block : first_block + len(answers)] = True

    def has_answers_of(self, first_block: int, count: int) -> bool:
        """Return whether these blocks are there."""
        return bool(self._answered[first_block : first_block + count].all())

    def conclude(self) -> None:
        """Make of the whole tensor what the method does."""
        assert self._vectors is not None  # noqa: S101 - it ends once
        self.found = self._make(self._work, self._vectors, self._task)
        self._vectors = None


def make_on_cpu(work: Work, vectors: NDArray[Any], task: TensorTask) -> Found:
    """Return what a method makes of the whole of a planned tensor; see :func:`make_whole`."""
    return make_whole(work, vectors, task.shape)


def make_whole(work: Work, vectors: NDArray[Any], shape: tuple[int, ...]) -> Found:
    """Return what a method makes of the whole of a tensor.

    Args:
        work: What it does.
        vectors: ``[sources, numel]``.
        shape: Of the tensor.
    """
    assert work.whole is not None  # noqa: S101 - or nothing is gathered
    made = work.whole([torch.from_numpy(row).view(shape) for row in vectors])
    room = allocate(made.numel() * vectors.itemsize).view(vectors.dtype)
    room[:] = made.reshape(-1).to(torch.from_numpy(room).dtype).numpy()
    return Found(made=room)
