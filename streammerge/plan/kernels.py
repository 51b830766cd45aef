"""Which tensors the compiled kernels can merge; torch merges the others, and takes memory for it."""

from __future__ import annotations

from collections.abc import Sequence

from streammerge.assignment.types import Action, Setting
from streammerge.dtypes import DType
from streammerge.lazily import torch_version
from streammerge.methods.base import MergeMethod, Operand
from streammerge.methods.parts import ADD_LEFT_TO_RIGHT
from streammerge.native.library import DTYPE_CODES, SOURCES_AT_MOST, load_kernels
from streammerge.plan.types import MergePlan, TensorTask

VECTOR_COLUMNS = 64
"""torch.sum adds more rows than a few from left to right in the columns that it takes by whole
vectors, several at a time; this is a multiple of all of them."""
_KNOWN_SUMS = ((2, 4), (2, 13))
"""The first and the last version of torch whose sum over rows is known to be the one described."""


def needs_torch(
    method: MergeMethod,
    settings: Sequence[Setting],
    tasks: Sequence[TensorTask],
    *,
    n_sources: int,
    has_base: bool,
    compute_dtype: DType,
    keep_non_finite: bool,
) -> bool:
    """Return whether the kernels leave something of a merge undone.

    Args:
        method: The method.
        settings: Its parameters.
        tasks: All tensors.
        n_sources: Number of sources.
        has_base: Whether the first input of a task is the base's.
        compute_dtype: F32 or F64.
        keep_non_finite: Whether NaN and infinity are let through.
    """
    if not _serve(n_sources, compute_dtype, keep_non_finite=keep_non_finite):
        return True
    if not sums_are_known(n_sources):
        return True
    if any(method.sweep(method.bind(setting.values)) is None for setting in settings):
        return True
    first = first_operand(method, has_base=has_base)
    return not all(_kernels_take(task, first, n_sources) for task in tasks)


def takes_torch(plan: MergePlan) -> bool:
    """Return whether this process needs torch to run a plan, which another one may have made."""
    n_sources = len(plan.models) - plan.has_base
    return plan.needs_torch or not kernels_serve(plan) or not sums_are_known(n_sources)


def kernels_serve(plan: MergePlan) -> bool:
    """Return whether there are kernels here, and anything in a plan that they can do."""
    n_sources = len(plan.models) - plan.has_base
    return _serve(n_sources, plan.compute_dtype, keep_non_finite=plan.keep_non_finite)


def _serve(n_sources: int, compute_dtype: DType, *, keep_non_finite: bool) -> bool:
    there = load_kernels() is not None and 0 < n_sources <= SOURCES_AT_MOST
    return there and compute_dtype is DType.F32 and not keep_non_finite


def first_operand(method: MergeMethod, *, has_base: bool) -> int:
    """Return the first model that the kernels read: the base, or the first source."""
    return 0 if method.operand is Operand.TASK_VECTORS else int(has_base)


def any_length(n_sources: int) -> bool:
    """Return whether kernels add so many rows as torch.sum does, however long they are."""
    return n_sources <= ADD_LEFT_TO_RIGHT


def sums_are_known(n_sources: int) -> bool:
    """Return whether the installed torch is known to add so many rows in the order of the kernels."""
    if n_sources <= ADD_LEFT_TO_RIGHT:
        return True
    major, minor, *_ = torch_version().split(".")
    first, last = _KNOWN_SUMS
    return first <= (int(major), int(minor)) <= last


def _kernels_take(task: TensorTask, first: int, n_sources: int) -> bool:
    match task.action:
        case Action.MERGE:
            stored = [entry.dtype if entry else None for entry in task.inputs]
            fits = any_length(n_sources) or task.numel % VECTOR_COLUMNS == 0
            types = {task.made_dtype, *stored[first:]}
            return fits and not task.changes and types <= DTYPE_CODES.keys()
        case Action.CONVERT:
            kinds = {task.made_dtype, *(entry.dtype for entry in task.inputs if entry is not None)}
            return not task.changes and kinds <= DTYPE_CODES.keys()
        case Action.COPY | Action.COPY_IF_EQUAL | Action.SCALES:
            return True
