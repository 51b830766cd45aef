"""Whether a plan can be run as it is cut: one that was edited may wait for ever, or write past a buffer."""

from __future__ import annotations

from streammerge.assignment.types import Action
from streammerge.checkpoint.types import Encoding
from streammerge.dtypes import DType
from streammerge.errors import PlanError, printable
from streammerge.plan.chunking import chunk_numel, output_bytes, widest_input
from streammerge.plan.types import MergePlan
from streammerge.statistics import BLOCK

_CODES = frozenset({DType.F8_E4M3, DType.F8_E5M2})
"""What values become."""
_SCALES = frozenset({DType.F32, DType.F64, DType.F16, DType.BF16, DType.F8_E8M0, DType.U8})
"""What scales can be stored as."""


def check_runnable(plan: MergePlan) -> None:
    """Return if there are threads for every stage and each buffer holds what goes into it.

    How many buffers a chunk takes is only known once it is cut;
    :class:`~streammerge.engine.buffers.SlotPool` looks at that.

    Raises:
        PlanError: A thread or a byte is missing.
    """
    resources = plan.resources
    for name in ("readers", "workers", "writers"):
        if getattr(resources, name) < 1:
            raise PlanError(
                f"the plan has {getattr(resources, name)} {name} and needs at least 1; plan again"
            )
    _check_encodings(plan)
    for task in plan.tasks:
        if task.action is Action.SCALES:
            continue
        widest = widest_input(task)
        numel = task.numel
        if numel * widest > resources.slot_bytes:
            numel = chunk_numel(task, resources.slot_bytes)
            if numel < 1:
                raise PlanError(
                    f"{printable(task.name)}: the plan's buffers have {resources.slot_bytes} "
                    f"bytes, and a block of this tensor needs {BLOCK * widest}; plan again"
                )
        made = task.action in (Action.MERGE, Action.CONVERT)
        needed = numel * task.made_dtype.itemsize if made else 0
        if task.encoding is not None and numel == task.numel:
            needed = output_bytes(task)
        if needed > resources.output_slot_bytes:
            raise PlanError(
                f"{printable(task.name)}: the plan's output buffers have "
                f"{resources.output_slot_bytes} bytes, and a chunk of this tensor needs {needed}; "
                "plan again"
            )


def _check_encodings(plan: MergePlan) -> None:
    """Raise unless every tensor of codes has one of scales, of the size that its codes ask for."""
    scales = {task.name: task for task in plan.tasks if task.action is Action.SCALES}
    owners = [task for task in plan.tasks if task.encoding is not None]
    for task in owners:
        assert task.encoding is not None  # noqa: S101 - chosen so
        own = scales.pop(task.encoding.scales, None)
        fits = own is not None and (own.numel, own.dtype) == (
            task.encoding.scale_numel,
            task.encoding.scale_dtype,
        )
        known = task.dtype in _CODES and task.encoding.scale_dtype in _SCALES
        if not (fits and known and _is_whole(task.encoding, task.numel)):
            raise PlanError(
                f"{printable(task.name)}: the plan has no scales for its codes, or others than its blocks "
                "ask for; plan again"
            )
    if scales:
        raise PlanError(f"{printable(next(iter(scales)))}: scales of no tensor; plan again")


def _is_whole(encoding: Encoding, numel: int) -> bool:
    """Return whether the blocks of an encoding are those of a tensor."""
    if min(encoding.rows, encoding.columns, *encoding.block) < 1:
        return False
    matrices, rest = divmod(numel, encoding.rows * encoding.columns)
    in_matrix = -(-encoding.rows // encoding.block[0]) * encoding.scale_columns
    shared = encoding.matrix_scales == 0 and in_matrix == encoding.scale_numel == 1
    each = encoding.matrix_scales == in_matrix and matrices * in_matrix == encoding.scale_numel
    return rest == 0 and (shared or each)
