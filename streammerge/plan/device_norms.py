"""How much memory of an accelerator the norms that DoRA divides by take while they are found there.

The tensor that an adapter changes is read once for them, before it is merged, a few rows at a time: brought
to the device as it is stored, changed and squared there, and only sums come back. A reader does so at a
bench; one that finds none computes them itself, with the same bits, so that no budget is too small. The
parts, in bytes, for each bench:

    rows       as they are stored, and changed in float32
    factors    of one adapter's module, in float32
    sums       one per row or column, in float64

Memory of the host: stages through which all of that goes, page-locked, for each reader.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from streammerge.adapters.onto_base.changes import Change, ChangeKind
from streammerge.plan.factors import changed_input
from streammerge.plan.types import TensorTask
from streammerge.statistics import BLOCK
from streammerge.units import MIB

STAGES = 2
"""One is filled while the other is copied."""
CONSTANTS = 8
"""Numbers of a kernel, at most."""
ALIGNMENT = 256
"""Where parts begin, in bytes."""
_ROWS_NUMEL = 4 * BLOCK
"""Elements that are brought and changed at once, in whole rows: more where a single row has more."""
_ROUNDED_TO = 20 * MIB
"""The allocator asks a device for so much at once."""


@dataclass(frozen=True, slots=True)
class NormsShape:
    """What a bench for norms holds."""

    changes: int
    """Changes whose norms are found at benches."""
    rows_numel: int
    """Most elements that are brought at once."""
    itemsize: int
    """Widest element among them, in bytes."""
    factors_numel: int
    """Elements of the factors of the module that has most."""
    sums: int
    """Most rows or columns."""

    @property
    def stage_bytes(self) -> int:
        """Bytes of a stage; a power of two, to which torch rounds page-locked memory."""
        return 1 << (self.rows_numel * self.itemsize - 1).bit_length()

    @property
    def host_bytes(self) -> int:
        """Page-locked bytes of a bench."""
        return STAGES * self.stage_bytes if self.changes else 0

    @property
    def device_bytes(self) -> int:
        """Bytes of the device that a bench takes."""
        if not self.changes:
            return 0
        rows = self.rows_numel * (self.itemsize + 4)
        parts = rows + 4 * self.factors_numel + 8 * (self.sums + CONSTANTS) + 8 * ALIGNMENT
        return -(-parts // _ROUNDED_TO) * _ROUNDED_TO


def has_norms_for_device(change: Change) -> bool:
    """Return whether a change of a tensor that fused kernels merge has its norms found on their device.

    What is not the sum of a stored matrix and one product of factors, or of parts of them, is the CPU's.
    """
    return change.kind is ChangeKind.NORMED and change.adds_product


def shape_norms(tasks: Iterable[TensorTask]) -> NormsShape:
    """Return what a bench holds for these tensors, which are merged on a device by fused kernels."""
    found = [
        (changed_input(task, change, in_turn=False).dtype.itemsize, change)
        for task in tasks
        for change in task.changes
        if has_norms_for_device(change)
    ]
    if not found:
        return NormsShape(0, 0, 0, 0, 0)
    return NormsShape(
        changes=len(found),
        rows_numel=max(_ROWS_NUMEL, *(change.matrix[1] for _, change in found)),
        itemsize=max(itemsize for itemsize, _ in found),
        factors_numel=max(change.product_numel for _, change in found),
        sums=max(max(change.matrix) for _, change in found),
    )
