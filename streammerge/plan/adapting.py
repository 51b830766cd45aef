"""What adapters do to a base, in words: forms, and whatever was decided for them by names or shapes."""

from __future__ import annotations

from collections import Counter

from streammerge.adapters.onto_base.changes import Change, ChangeKind
from streammerge.adapters.onto_base.workings import Op
from streammerge.plan.types import MergePlan


def describe_changes(plan: MergePlan) -> dict[int, str]:
    """Return a sentence about every model of a plan that is an adapter, by its index."""
    changes: dict[int, list[Change]] = {}
    tensors: Counter[int] = Counter()
    for task in plan.tasks:
        for change in task.changes:
            changes.setdefault(change.model, []).append(change)
        tensors.update({change.model for change in task.changes})
    return {model: _sentence(tensors[model], each) for model, each in sorted(changes.items())}


def _sentence(tensors: int, changes: list[Change]) -> str:
    kinds = Counter(_kind(change) for change in changes)
    parts = [f"{name} x {count}" for name, count in kinds.most_common()]
    placed = sum(change.window is not None for change in changes)
    if placed:
        parts.append(
            f"{placed} of them in rows of layers that the base names or cuts in another way"
        )
    ordered = sum(
        any(working.op is Op.INTERLEAVED for working in change.workings) for change in changes
    )
    if ordered:
        parts.append(f"{ordered} with the rows of heads put in the order of transformers")
    inputs = sum(
        change.kind is ChangeKind.NORMED and not change.along_rows and not change.transposed
        for change in changes
    )
    if inputs:
        parts.append(f"{inputs} with norms of inputs")
    return f"changes {tensors:,} tensor(s): {', '.join(parts)}"


def _kind(change: Change) -> str:
    if change.kind is ChangeKind.NORMED:
        return f"normed {change.added}"
    return str(change.kind)
