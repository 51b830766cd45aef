"""The memory that one task of a combination takes at its worst, in bytes."""

from __future__ import annotations

from streammerge.adapters.combining.combinations import Combination, Sparsify, Target
from streammerge.adapters.combining.plans import CopyTask, ModuleTask, Task, VectorTask
from streammerge.recipe.types import ComputeDType
from streammerge.units import MIB

COPY_BYTES = 4 * MIB
"""A tensor that is copied passes through two pieces of this size."""
_FACTOR_COPIES = 3
"""Of the larger factor of all sources: stacked, weighted, with masks."""
_SPARSE_COPIES = 2
"""More of it where sources are trimmed or dropped first."""
_RANKED_BYTES = 24
"""Per element while the k-th largest of a factor is found: keys, their copy, and their places."""
_LOW_RANK_COPIES = 3
"""Of the stacked factors: as they are, LAPACK's copy, Q, and the result."""
_CORE_COPIES = 8
"""Of the square core: both triangles, their product, and its decomposition with work space."""
_DENSE_COPIES = 6
"""Of a product: itself, LAPACK's copy, both sets of singular vectors, trims and votes before."""
_DENSE_CORE_COPIES = 6
"""Of a square of its smaller side: the work space of the decomposition."""


def task_workspace(task: Task, combination: Combination, compute_dtype: ComputeDType) -> int:
    """Return the most memory that a task holds at once."""
    if isinstance(task, CopyTask):
        return 2 * COPY_BYTES
    itemsize = 4 if compute_dtype is ComputeDType.FLOAT32 else 8
    if isinstance(task, VectorTask):
        return sum(entry.nbytes + 3 * entry.numel * itemsize for entry in task.inputs)
    present = [module for module in task.inputs if module is not None]
    stored = sum(module.down.nbytes + module.up.nbytes for module in present)
    downs = sum(module.down.numel for module in present)
    ups = sum(module.up.numel for module in present)
    loaded = stored + (downs + ups) * itemsize
    written = sum(2 * tensor.numel * itemsize for tensor in task.outputs)
    if task.copies is not None:
        return loaded + written
    return loaded + written + _scratch(task, combination, downs, ups, itemsize)


def _scratch(
    task: ModuleTask, combination: Combination, downs: int, ups: int, itemsize: int
) -> int:
    present = [module for module in task.inputs if module is not None]
    total_rank = sum(module.rank for module in present)
    outer, inner = present[0].out_features, present[0].in_features
    match combination.target:
        case Target.FACTORS:
            largest = max(max(module.down.numel, module.up.numel) for module in present)
            if combination.sparsify is Sparsify.NOTHING:
                return max(downs, ups) * _FACTOR_COPIES * itemsize
            copies = _FACTOR_COPIES + _SPARSE_COPIES
            return max(downs, ups) * copies * itemsize + largest * _RANKED_BYTES
        case Target.CONCATENATION:
            return (downs + ups) * itemsize
        case Target.LOW_RANK_PRODUCT:
            core = min(total_rank, outer) * min(total_rank, inner)
            return 8 * ((outer + inner) * total_rank * _LOW_RANK_COPIES + core * _CORE_COPIES)
        case Target.DENSE_PRODUCT:
            smaller = min(outer, inner)
            copies = outer * inner * _DENSE_COPIES + smaller * smaller * _DENSE_CORE_COPIES
            return copies * itemsize
