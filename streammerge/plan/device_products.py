"""Products of adapters' factors on a device: which tensors have them computed there, and what is brought for it."""

from __future__ import annotations

from collections.abc import Sequence

from streammerge.adapters.onto_base.changes import Change
from streammerge.plan.types import TensorTask

MOST_PLACED = 8
"""Products of a tensor, if some are placed. Each is written out in a kernel, and a placed one goes through all
elements: with eight, compiling takes some seconds, with the 64 of a layer that has a part per head, minutes."""


def has_products_for_device(changes: Sequence[Change]) -> bool:
    """Return whether a kernel can add what adapters change, if it is anything."""
    few = len(changes) <= MOST_PLACED or not any(change.is_placed for change in changes)
    return few and all(change.adds_product for change in changes)


def factor_bytes(task: TensorTask) -> int:
    """Return the bytes of what a tensor that is merged there needs of its adapters' factors, in float32.

    DoRA's vector has as many elements as the magnitude that it is made of.
    """
    return 4 * sum(change.product_numel for change in task.changes)
