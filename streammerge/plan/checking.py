"""Whether a plan can be run as it is cut: one that was edited may wait for ever, or write past a buffer."""

from __future__ import annotations

from streammerge.assignment.types import Action
from streammerge.errors import PlanError, printable
from streammerge.plan.chunking import chunk_numel, widest_input
from streammerge.plan.types import MergePlan
from streammerge.reductions import BLOCK


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
    for task in plan.tasks:
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
        needed = numel * task.dtype.itemsize if made else 0
        if needed > resources.output_slot_bytes:
            raise PlanError(
                f"{printable(task.name)}: the plan's output buffers have "
                f"{resources.output_slot_bytes} bytes, and a chunk of this tensor needs {needed}; "
                "plan again"
            )
