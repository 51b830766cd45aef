"""Numbers without a merge: what a recipe would make of its sources, and what models differ in.

A plan runs as it would for a merge, statistics and all, and what it makes is let go at once. So the
numbers are those of a merge's report, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from streammerge.checkpoint.bytesource import (
    ByteSourceKind,
    OpenByteSource,
    check_unchanged,
    choose_byte_source,
)
from streammerge.checkpoint.journal import PieceDone
from streammerge.checkpoint.recorded import Recorded
from streammerge.checkpoint.runs import Runs
from streammerge.engine.accelerator.opening import named_devices
from streammerge.engine.pipeline import RunReport, run_pipeline
from streammerge.engine.progress import OnProgress
from streammerge.engine.resuming import Recovered
from streammerge.engine.shelter import run_sheltered
from streammerge.finishing import recipe_of, record_run
from streammerge.limits import allow_open_files, naming_limits
from streammerge.machine import fits_page_cache
from streammerge.merging import open_sources
from streammerge.plan.asking import find_method
from streammerge.plan.checking import check_runnable
from streammerge.plan.types import MergePlan
from streammerge.report.document import Report, report_of
from streammerge.run import RecipeLike, plan


@naming_limits()
def analyze(
    recipe: RecipeLike | MergePlan,
    *,
    memory: int | str | None = None,
    workers: int | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
    download: bool = False,
    on_progress: OnProgress | None = None,
) -> Report:
    """Return the report that a merge would make, without writing anything.

    Args:
        recipe: As for :func:`streammerge.run.plan`, or its result, made with ``report=True``; a plan
            brings its own memory, workers and device.
        memory: As there.
        workers: As there.
        device: As there, but None and ``"auto"`` are the CPU.
        device_memory: As there.
        download: As there.
        on_progress: Told several times per second how far the work is.

    Raises:
        StreamMergeError: As for :func:`streammerge.run.plan`; a value that is not finite, too.
    """
    if isinstance(recipe, MergePlan):
        if any(each is not None for each in (memory, workers, device, device_memory)):
            raise ValueError("a plan already says what memory, workers and device it takes")
        if not recipe.survey:
            raise ValueError("the plan was made without a report; give plan() report=True")
        check_runnable(recipe)
        return _analyze(recipe, on_progress)
    planned = plan(
        recipe,
        memory=memory,
        workers=workers,
        device=named_devices(device),
        device_memory=device_memory,
        download=download,
        report=True,
    )
    assert isinstance(planned, MergePlan)  # noqa: S101 - others make no report, and are refused
    return _analyze(planned, on_progress)


def _analyze(planned: MergePlan, on_progress: OnProgress | None) -> Report:
    job = AnalysisJob(planned, choose_byte_source(ByteSourceKind.PREAD))
    run = run_sheltered(job.run, on_progress or (lambda _: None))
    return report_of(
        planned,
        run,
        recipe_of(planned),
        kind="analysis",
        record=record_run(
            planned,
            run,
            identity="",
            resumed=False,
            attempts=(),
            damaged=0,
            byte_source=ByteSourceKind.PREAD,
        ),
    )


@dataclass(frozen=True, slots=True)
class AnalysisJob:
    """A plan that runs for its numbers alone."""

    planned: MergePlan
    """What to do."""
    opener: OpenByteSource
    """Opens an input file."""

    def run(self, on_progress: OnProgress) -> RunReport:
        """Do it; nothing is written."""
        planned = self.planned
        allow_open_files(len(planned.files))
        with ExitStack() as stack:
            sources = open_sources(planned, self.opener, stack)
            report = run_pipeline(
                planned,
                find_method(planned.method),
                sources,
                [_Nowhere()] * len(planned.layout.shards),
                recovered=Recovered(planned, Recorded(), wanted=None),
                on_scope=lambda *_: None,
                snapshot=None,
                keep_cached=fits_page_cache(planned),
                on_progress=on_progress,
            )
            check_unchanged(planned.files, sources)
        return report


class _Nowhere:
    """Takes the bytes of a shard, and lets them go; see :class:`streammerge.engine.writing.Output`."""

    def write_at(
        self,
        offset: int,
        buffer: memoryview,
        pieces: Sequence[PieceDone] = (),
        *,
        runs: Runs | None = None,
        begin: int = 0,
    ) -> None:
        """Let them go."""
