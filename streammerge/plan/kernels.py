"""Which tensors the compiled machine can merge; torch merges the others, and takes memory for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from streammerge.adapters.onto_base.changes import Change
from streammerge.assignment.types import Action, Setting
from streammerge.dtypes import DType
from streammerge.errors import DependencyError
from streammerge.floats import KINDS
from streammerge.methods.programs import Programs
from streammerge.native.library import DTYPE_CODES, load_kernels
from streammerge.plan.types import MergePlan, TensorTask
from streammerge.tiles.program import Op


def why_torch(
    programs: Sequence[Programs],
    settings: Sequence[Setting],
    tasks: Sequence[TensorTask],
    *,
    compute_dtype: DType,
    keep_non_finite: bool,
) -> str | None:
    """Return what of a merge the compiled machine leaves undone; None if it does all.

    Args:
        programs: What the method does, for each of its settings.
        settings: These settings.
        tasks: All tensors.
        compute_dtype: F32 or F64.
        keep_non_finite: Whether NaN and infinity are let through.
    """
    if load_kernels() is None:
        return "there are no compiled kernels (`streammerge doctor` says why)"
    if not _serve(compute_dtype, keep_non_finite=keep_non_finite):
        return "non_finite: keep" if keep_non_finite else "compute_dtype: float64"
    if any(one.work.whole is not None for one in programs):
        return "the method decomposes whole matrices"
    every = [program for one in programs for program in one.all]
    if any(program.uses(Op.CHANGED) for program in every):
        return "what the method does is not for the compiled kernels"
    loads_base = any(program.uses(Op.BASE, Op.TASK_VECTOR) for program in every)
    loaded = [each.models if loads_base else each.sources for each in settings]
    # Products of factors are task vectors, of any part of a tensor.
    takes_products = not any(program.uses(Op.SOURCE) for program in every) and not any(
        one.by_rows for one in programs
    )
    left = [
        task for task in tasks if not _machine_takes(task, loaded, takes_products=takes_products)
    ]
    if not left:
        return None
    kinds = {entry.dtype for entry in left[0].inputs if entry is not None} | {left[0].made_dtype}
    others = ", ".join(sorted(map(str, kinds - DTYPE_CODES.keys())))
    what = f"stored as {others}" if others else "changed by an adapter in a way of its own"
    return f"{len(left)} tensors, {left[0].name} the first, are {what}"


def measure_baseline(baseline: Callable[..., int], *, torch: bool, reason: str | None) -> int:
    """Return what the process takes before a merge, with torch if it will need it.

    Raises:
        DependencyError: It cannot have torch; the message begins with the reason to need it.
    """
    try:
        return baseline(torch=torch)
    except DependencyError as error:
        raise DependencyError(f"{reason}; {error}" if reason else str(error)) from error


def takes_torch(plan: MergePlan) -> bool:
    """Return whether this process needs torch to run a plan, which another one may have made."""
    return plan.needs_torch or not kernels_serve(plan)


def kernels_serve(plan: MergePlan) -> bool:
    """Return whether there is a compiled machine here, and anything in a plan that it can do."""
    return _serve(plan.compute_dtype, keep_non_finite=plan.keep_non_finite)


def _serve(compute_dtype: DType, *, keep_non_finite: bool) -> bool:
    return load_kernels() is not None and compute_dtype is DType.F32 and not keep_non_finite


def _machine_takes(
    task: TensorTask, loaded: Sequence[Sequence[int]], *, takes_products: bool
) -> bool:
    """Return whether a tensor needs no torch.

    Args:
        task: The tensor.
        loaded: The models that each setting loads.
        takes_products: Whether sources may be products of factors, or nothing.
    """
    match task.action:
        case Action.MERGE:
            inputs = [task.inputs[model] for model in loaded[task.setting]]
            if task.changes:
                # A model that has an adapter of its own has values beside the product.
                alone = all(task.inputs[change.model] is None for change in task.changes)
                if not (takes_products and alone and all(map(_is_product, task.changes))):
                    return False
                inputs = [entry for entry in inputs if entry is not None]
            for entry in inputs:
                if entry is None or entry.dtype not in DTYPE_CODES:
                    return False
            return task.made_dtype in DTYPE_CODES
        case Action.CONVERT:
            kinds = {task.made_dtype, *(entry.dtype for entry in task.inputs if entry is not None)}
            return not task.changes and kinds <= DTYPE_CODES.keys()
        case Action.COPY | Action.COPY_IF_EQUAL | Action.SCALES:
            return True


def _is_product(change: Change) -> bool:
    return change.is_plain and all(
        factor.dtype in KINDS or factor.dtype is DType.BF16 for factor in change.factors
    )
