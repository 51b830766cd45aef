"""Statistics over the whole model, found by several processes: each sweeps its part of every round.

    driver: questions ─▶ file ─▶ processes: answers for the blocks of their tensors ─▶ files ─▶ driver
    driver: adds them up, and has the thresholds, or the next questions

Answers are counts, histograms and collected values with the block that they are of, so it does not matter
who found them, or when. Files stay until the output is in place: a driver that goes on asks for what is not
there alone.

Memory: the statistics of a scope, as the plan has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from streammerge.checkpoint.attempts import sweep_name
from streammerge.checkpoint.partdir import PartDirectory
from streammerge.engine.resuming import WHOLE_MODEL, scope_found
from streammerge.engine.scheduling import open_model_statistics
from streammerge.engine.scopes import ScopeStatistics
from streammerge.errors import ResumeError
from streammerge.executors.seam import Request
from streammerge.plan.asking import find_method
from streammerge.plan.sweeps import Needs
from streammerge.plan.types import MergePlan

RunAll = Callable[[Sequence[Request]], None]
"""Has the shares of a sweep done: for each the part whose tensors it is about, and ``sweep``."""


def find_model_statistics(
    planned: MergePlan, directory: PartDirectory, parts: int, run_all: RunAll
) -> None:
    """Find what the method asks of the whole model, if it does, and record it for all parts.

    Args:
        planned: The plan.
        directory: Where the merge is done.
        parts: In how many parts.
        run_all: Has shares of a sweep done.

    Raises:
        StreamMergeError: One of them failed, or its answers are not there.
    """
    needs = Needs(planned, find_method(planned.method))
    if WHOLE_MODEL in directory.recorded.scopes or needs.of_model() is None:
        return
    statistics, _ = open_model_statistics(planned, needs)
    sweep = 0
    while statistics.found is None:
        sweep += 1
        _sweep(statistics, directory, sweep, parts, run_all)
    directory.check_current()
    directory.journal.append([scope_found(WHOLE_MODEL, statistics.found)])
    directory.journal.sync()


def _sweep(
    statistics: ScopeStatistics,
    directory: PartDirectory,
    sweep: int,
    parts: int,
    run_all: RunAll,
) -> None:
    """Put the present questions to all blocks, and take the answers together."""
    question = directory.partial / sweep_name(directory.epoch, sweep)
    # One that an earlier driver left is asked on, with the answers that it has.
    if not statistics.restore(question):
        if statistics.sample_runs:
            first = directory.partial / sweep_name(directory.epoch, sweep, "first")
            statistics.save(first)
            run_all([_share(1, str(first), str(question), samples=True)])
            if not statistics.restore(question):
                raise ResumeError(f"{question}: what a sample led to is not there; merge again")
        else:
            statistics.save(question)
    answers = {
        part: directory.partial / sweep_name(directory.epoch, sweep, f"{part}of{parts}")
        for part in range(1, parts + 1)
    }
    left = [part for part, path in answers.items() if not path.exists()]
    run_all([_share(part, str(question), str(answers[part]), samples=False) for part in left])
    for path in answers.values():
        statistics.absorb(path)
    if not statistics.is_answered():
        raise ResumeError(
            f"{question}: not all blocks are answered; give --overwrite to start anew"
        )
    statistics.conclude()


def _share(part: int, question: str, answers: str, *, samples: bool) -> Request:
    return {"part": part, "sweep": {"question": question, "answers": answers, "samples": samples}}
