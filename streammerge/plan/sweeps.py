"""What a statistic over one tensor or the whole model reads: a sample, then everything.

Engine and planner both ask here, so that the plan states exactly what the engine will read as long
as the sample guesses well; only a guess that misses costs another sweep.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from streammerge.assignment.types import Action, Setting
from streammerge.methods.base import MergeMethod
from streammerge.methods.programs import Programs, programs_of
from streammerge.methods.surveying import Survey, survey_of
from streammerge.plan.budgeting import affordable_limit, search_bytes, values_limit
from streammerge.plan.chunking import (
    Chunk,
    Piece,
    around_numel,
    fits_one_slot,
    most_around,
    reads_twice,
)
from streammerge.plan.factors import factors_nbytes, norms_nbytes
from streammerge.plan.types import MergePlan, TensorTask
from streammerge.statistics.magnitude import SAMPLE_RUN, choose_sample_runs
from streammerge.statistics.rounds import NOTHING, Rank
from streammerge.statistics.topk import TiePolicy

_SAMPLE_RUNS = 64
"""Runs sampled from a tensor: 2^16 elements put the rank within 0.8 % at five sigma."""
_SAMPLE_NUMEL_PER_RUN = 2**19
"""A larger scope gets a run per so many elements: its band must be narrower to be collected."""
_LEAST_NUMEL_PER_RUN = 8 * SAMPLE_RUN
"""A smaller scope is sampled at most to an eighth, or the sample would cost as much as a sweep."""
_GATHERED_RUNS = 4
"""Runs that are read as one where each read is a request to a store. More would leave too few places to tell
how much they differ."""


def programs_of_settings(method: MergeMethod, settings: Iterable[Setting]) -> list[Programs]:
    """Return what a method does with each of some settings."""
    return [
        programs_of(method, each.values, sources=len(each.sources), has_base=each.has_base)
        for each in settings
    ]


def programs_of_plan(plan: MergePlan, method: MergeMethod) -> list[Programs]:
    """Return what a method does in a plan, for each of its settings."""
    return programs_of_settings(method, plan.settings)


def surveys_of_plan(plan: MergePlan, programs: Sequence[Programs]) -> list[Survey]:
    """Return what is surveyed of the tensors of each setting; nothing unless the plan is to.

    Args:
        plan: The plan.
        programs: What its method does, for each of its settings.
    """
    return [survey_of(each) for each in programs] if plan.survey else []


class Needs:
    """The statistics that a plan's tensors need."""

    def __init__(self, plan: MergePlan, method: MergeMethod) -> None:
        """Ask the method once per setting."""
        self._plan = plan
        self._by_setting = programs_of_plan(plan, method)

    def of(self, task: TensorTask) -> Programs | None:
        """Return what one tensor needs; None for copies and for methods without statistics."""
        if task.action is not Action.MERGE:
            return None
        programs = self._by_setting[task.setting]
        return programs if programs.rounds or programs.work.whole else None

    def must_look(self, task: TensorTask) -> bool:
        """Return whether a tensor must be seen whole before it can be merged.

        It need not when everything or nothing is kept, whatever the values are; nor when the
        statistic covers the whole model, for which a sweep comes first.
        """
        need = self.of(task)
        return need is not None and not self._plan.model_scope and asks(need, task.numel)

    def of_model(self) -> tuple[Programs, list[int]] | None:
        """Return the one need of a model-wide scope and its tensors; None without one."""
        merged = [i for i, task in enumerate(self._plan.tasks) if task.action is Action.MERGE]
        need = self.of(self._plan.tasks[merged[0]]) if merged else None
        if need is None or not self._plan.model_scope:
            return None
        return need, merged


def asks(need: Programs, numel: int) -> bool:
    """Return whether the statistics of ``numel`` elements depend on the elements at all."""
    if numel == 0:
        return False
    if need.work.whole is not None:
        return True
    if len(need.rounds) > 1 or need.rounds[0].totals:
        return True
    return _any_open(need.work.rounds[0].ranks(numel, NOTHING), numel)


def _any_open(ranks: Sequence[Rank], numel: int) -> bool:
    return any(rank.is_open(numel) for rank in ranks)


def scope_bytes(plan: MergePlan, need: Programs, numel: int) -> int:
    """Return the bytes that the statistics of a scope reserve, at most what the plan has."""
    itemsize = plan.compute_dtype.itemsize
    useful = search_bytes(need.counts, numel, itemsize, values_limit(numel))
    return min(useful, plan.resources.statistics_bytes)


def collecting_limit(plan: MergePlan, need: Programs, numel: int, available: int) -> int:
    """Return how many values each search of a scope may collect in ``available`` bytes."""
    return affordable_limit(need.counts, numel, plan.compute_dtype.itemsize, available)


def count_sample_runs(ranks: Sequence[Rank], numel: int, limit: int) -> int:
    """Return how many runs to sample; 0 where nothing is asked, or everything is collected."""
    if numel <= limit or not _any_open(ranks, numel):
        return 0
    runs = max(_SAMPLE_RUNS, numel // _SAMPLE_NUMEL_PER_RUN)
    # The sample lies where the collected values will; it is used before they come.
    return min(runs, numel // _LEAST_NUMEL_PER_RUN, limit // SAMPLE_RUN)


def sample_run_numel(plan: MergePlan) -> int:
    """Return the elements of what is sampled side by side of a tensor that is not in memory."""
    return SAMPLE_RUN * (_GATHERED_RUNS if plan.asks_stores else 1)


def spread_runs(plan: MergePlan, tasks: Sequence[int], runs: int) -> list[Piece]:
    """Spread sample runs over tensors in proportion to their size, gathered where each is a request."""
    run_numel = sample_run_numel(plan)
    if runs:
        runs = max(1, runs * SAMPLE_RUN // run_numel)
    total = sum(plan.tasks[index].numel for index in tasks)
    pieces: list[Piece] = []
    # What is owed carries over, so that many small tensors together are sampled as they weigh.
    owed = 0.0
    for index in tasks:
        owed += runs * plan.tasks[index].numel / max(total, 1)
        count = int(owed)
        owed -= count
        whole = plan.tasks[index].numel
        for start, numel in choose_sample_runs(whole, count, run_numel=run_numel):
            pieces.append(Piece(index, start, numel))
    return pieces


def pack_sample(plan: MergePlan, runs: Sequence[Piece]) -> Iterator[Chunk]:
    """Pack sample runs into as few chunks as their slots allow."""
    widest = max(
        entry.dtype.itemsize
        for piece in runs
        for entry in plan.tasks[piece.task].inputs
        if entry is not None
    )
    # A slot's worth per chunk, but enough chunks for all readers.
    around = max(most_around(plan.tasks[piece.task].row) for piece in runs)
    fitting = plan.resources.slot_bytes // ((sample_run_numel(plan) + around) * widest)
    per_chunk = max(1, min(fitting, -(-len(runs) // plan.resources.readers)))
    for pieces in _groups(plan, runs, per_chunk):
        models = {
            model
            for piece in pieces
            for model, entry in enumerate(plan.tasks[piece.task].inputs)
            if entry is not None
        }
        yield Chunk(pieces, tuple(sorted(models)))


def _groups(plan: MergePlan, runs: Sequence[Piece], most: int) -> Iterator[tuple[Piece, ...]]:
    """Group runs so that the adapters' tensors that a group needs have room."""
    group: list[Piece] = []
    factor_bytes = 0
    for run in runs:
        task = plan.tasks[run.task]
        own = factors_nbytes(task, plan.compute_dtype.itemsize)
        if group and group[-1].task == run.task:
            own = 0
        if len(group) == most or factor_bytes + own > plan.resources.factor_bytes:
            if group:
                yield tuple(group)
            group, factor_bytes = [], 0
            own = factors_nbytes(task, plan.compute_dtype.itemsize)
        group.append(run)
        factor_bytes += own
    if group:
        yield tuple(group)


def bytes_beyond_once(plan: MergePlan, needs: Needs) -> int:
    """Return the bytes that samples and sweeps read beyond every input byte once."""
    total = sum(norms_nbytes(task) for task in plan.tasks if task.changes)
    total += sum(_stored_nbytes(task, around_numel(plan, task)) for task in plan.tasks if task.row)
    total += sum(
        _stored_nbytes(task, task.numel)
        for task in plan.tasks
        if task.encoding is not None and not fits_one_slot(plan, task)
    )
    whole = needs.of_model()
    if whole is not None:
        return total + _sweep_bytes(plan, *whole)
    for index, task in enumerate(plan.tasks):
        if fits_one_slot(plan, task):
            continue
        need = needs.of(task)
        if need is not None and reads_twice(plan, task) and needs.must_look(task):
            total += _sweep_bytes(plan, need, [index])
    return total


def _sweep_bytes(plan: MergePlan, need: Programs, tasks: Sequence[int]) -> int:
    """Return what the rounds of a scope read, as far as it is known before they have found anything.

    How many values a later round ranks may depend on what an earlier one found; it is taken to
    need a sample, and one sweep.
    """
    numel = sum(plan.tasks[index].numel for index in tasks)
    if not asks(need, numel):
        return 0
    limit = collecting_limit(plan, need, numel, scope_bytes(plan, need, numel))
    whole = sum(
        _stored_nbytes(task, task.numel + around_numel(plan, task))
        for task in (plan.tasks[index] for index in tasks)
    )
    read = whole if need.work.whole is not None else 0
    for index, program in enumerate(need.rounds):
        if index == 0:
            ranks = need.work.rounds[0].ranks(numel, NOTHING)
        else:
            ranks = [Rank(numel // 2, TiePolicy.EXACT)] * program.ranked
        if not program.totals and not _any_open(ranks, numel):
            continue
        sample = spread_runs(plan, tasks, count_sample_runs(ranks, numel, limit))
        read += whole
        read += sum(
            _stored_nbytes(task, piece.numel + sum(task.surroundings(piece.start, piece.numel)))
            for piece in sample
            for task in (plan.tasks[piece.task],)
        )
    return read


def _stored_nbytes(task: TensorTask, numel: int) -> int:
    return sum(entry.stored_nbytes(numel) for entry in task.inputs if entry is not None)
