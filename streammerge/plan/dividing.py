"""How a merge is divided into parts for several processes: ranges of the output, equal in work.

    shards        |         1         |         2         |
    parts of 3    |      1      |      2     |      3     |

An output tensor belongs to one part, with all that it is made with. Parts end where shards do if that
leaves them nearly equal, so that few files are written by two processes. Everything depends on the work
alone, which all processes plan alike, not on their memory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

from streammerge.assignment.types import Action
from streammerge.plan.types import MergePlan, TensorTask, find_scale_tasks

_SLACK = 1 / 16
"""Of a part's work: how far its end may lie from where it would be equal, to lie between two shards."""
SEAM_BYTES = 2**20
"""Bytes around the place where two parts meet in a file that may be on one page of a file system's
clients: one of them may write back what the other has written since. Pages have 4 KiB to 64 KiB."""


@dataclass(frozen=True, slots=True)
class _Group:
    """What is made together: the tasks of an output tensor, and those of its scales."""

    shard: int
    """Where it lies."""
    offset: int
    """First byte there."""
    work: int
    """Bytes read and written for it."""
    tasks: tuple[int, ...]
    """Indices into :attr:`MergePlan.tasks`."""


def divide(plan: MergePlan, parts: int, *, whole_shards: bool = False) -> list[frozenset[int]]:
    """Return the tasks of each part, by index; parts may be empty where there are few tensors.

    Args:
        plan: A merge.
        parts: Into how many.
        whole_shards: Whether no two parts may write to one file.
    """
    groups = _groups(plan)
    ends = [0, *accumulate(group.work for group in groups)]
    # Where one shard ends and the next begins, in the count of groups.
    borders = [
        index for index in range(1, len(groups)) if groups[index - 1].shard != groups[index].shard
    ]
    cuts = [0]
    for part in range(1, parts):
        cut = (
            _nearest(ends, _clean_borders(plan, groups), part, parts)
            if whole_shards
            else _cut(ends, borders, part, parts)
        )
        cuts.append(max(cuts[-1], cut))
    cuts.append(len(groups))
    return [
        frozenset(task for group in groups[first:last] for task in group.tasks)
        for first, last in pairwise(cuts)
    ]


def _groups(plan: MergePlan) -> list[_Group]:
    """Return what is made together, in the order of the output."""
    scales = find_scale_tasks(plan)
    by_name: dict[str, list[int]] = {}
    for index, task in enumerate(plan.tasks):
        if task.action is Action.SCALES:
            # Made with the tensor whose they are.
            continue
        own = by_name.setdefault(task.name, [])
        own.append(index)
        if task.encoding is not None:
            own.append(scales[task.encoding.scales])
    groups = []
    for indices in by_name.values():
        tasks = [plan.tasks[index] for index in indices]
        first = tasks[0]
        groups.append(
            _Group(
                first.shard, _begin(first), sum(_work(t, t.numel) for t in tasks), tuple(indices)
            )
        )
    return sorted(groups, key=lambda group: (group.shard, group.offset))


def work_of(plan: MergePlan, task: int | None = None, numel: int = 0) -> int:
    """Return the bytes that are read and written, each once, for all, or for some elements of one tensor.

    Args:
        plan: A merge.
        task: The tensor, by index; None for all tensors.
        numel: Elements of it.
    """
    if task is not None:
        return _work(plan.tasks[task], numel)
    return sum(_work(each, each.numel) for each in plan.tasks)


def _work(task: TensorTask, numel: int) -> int:
    read = sum(entry.stored_nbytes(numel) for entry in task.inputs if entry is not None)
    return read + numel * task.dtype.itemsize


def _cut(ends: Sequence[int], borders: Sequence[int], part: int, parts: int) -> int:
    """Return the group with which the part after the first ``part`` begins.

    Args:
        ends: The work before each group, and that of all.
        borders: Groups that begin a shard.
        part: How many parts lie before.
        parts: How many there are.
    """
    wanted = ends[-1] * part / parts
    index = bisect_left(ends, wanted)
    if index and wanted - ends[index - 1] < ends[index] - wanted:
        index -= 1
    near = [each for each in borders if abs(ends[each] - wanted) * parts <= ends[-1] * _SLACK]
    return min(near, key=lambda each: abs(ends[each] - wanted), default=index)


def _nearest(ends: Sequence[int], borders: Sequence[int], part: int, parts: int) -> int:
    """Return the border that is nearest to where parts would be equal; arguments as of :func:`_cut`."""
    wanted = ends[-1] * part / parts
    return min([0, *borders, len(ends) - 1], key=lambda each: abs(ends[each] - wanted))


def _clean_borders(plan: MergePlan, groups: Sequence[_Group]) -> list[int]:
    """Return the groups before which no group writes to a file that this or a later one writes to."""
    shards = [[plan.tasks[index].shard for index in group.tasks] for group in groups]
    before = list(accumulate(map(max, shards), max))
    after = list(accumulate(map(min, reversed(shards)), min))[::-1]
    return [index for index in range(1, len(groups)) if before[index - 1] < after[index]]


def shards_of(plan: MergePlan, tasks: frozenset[int]) -> frozenset[int]:
    """Return the output files that some tasks write to, by index."""
    return frozenset(plan.tasks[index].shard for index in tasks)


def find_seams(plan: MergePlan, divided: Sequence[frozenset[int]]) -> dict[int, list[int]]:
    """Return the bytes of each file where the work of one part meets that of another.

    Args:
        plan: A merge.
        divided: What :func:`divide` returned.

    Returns:
        By shard, offsets in the file in ascending order; where several parts write to a shard, the end
        of its header is one of them.
    """
    part_of = {task: part for part, tasks in enumerate(divided) for task in tasks}
    seams: dict[int, list[int]] = {}
    for index, shard in enumerate(plan.layout.shards):
        ordered = sorted(shard.tasks, key=lambda task: _begin(plan.tasks[task]))
        meeting = [
            _begin(plan.tasks[after])
            for before, after in pairwise(ordered)
            if part_of[before] != part_of[after]
        ]
        if meeting:
            seams[index] = [shard.header_nbytes, *meeting]
    return seams


def is_near_seam(
    plan: MergePlan, seams: dict[int, list[int]], task: int, start: int, numel: int
) -> bool:
    """Return whether two processes may have written to a page that a range of a tensor lies on.

    Args:
        plan: A merge.
        seams: What :func:`find_seams` returned.
        task: The tensor.
        start: Its first element.
        numel: Elements.
    """
    planned = plan.tasks[task]
    own = seams.get(planned.shard)
    if not own:
        return False
    itemsize = planned.dtype.itemsize
    if planned.runs is not None:
        # All over its tensor.
        begin = _begin(planned)
        end = begin + planned.dtype.nbytes(prod(planned.output_shape))
    else:
        begin = planned.offset + start * itemsize
        end = begin + numel * itemsize
    at = bisect_left(own, begin - SEAM_BYTES)
    return at < len(own) and own[at] <= end + SEAM_BYTES


def _begin(task: TensorTask) -> int:
    """Return the first byte of the output tensor that a task makes, or makes a region of."""
    region = task.region
    return task.offset - (0 if region is None else task.dtype.nbytes(region.first))
