"""Runs a plan: starts the threads of all stages, watches them, and ends them.

    readers ──work queue──▶ workers ──write queue──▶ writers

Queues carry references; what flows is bounded by the slots that loading and merging must take
first. The first error stops every stage; all threads end before :func:`run_pipeline` returns.

Memory: the plan's slots, scratch and statistics, and the stacks of the threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.bytesource import ByteSource
from streammerge.engine.accelerator.sharing import Accelerators
from streammerge.engine.buffers import Allowance, SlotPool
from streammerge.engine.compiled.opening import open_cpu_stage
from streammerge.engine.context import MergeContext, OnScope, SweepShare, Work
from streammerge.engine.device import DeviceStage
from streammerge.engine.factors import FactorCache
from streammerge.engine.loading import Loader
from streammerge.engine.memory import PeakMemory
from streammerge.engine.merging import ChunkMerger
from streammerge.engine.monitor import Monitor, StoppedError
from streammerge.engine.pacing import Pace
from streammerge.engine.progress import OnProgress, Progress, Stage
from streammerge.engine.queues import Outstanding, WorkQueue
from streammerge.engine.results import Results, TensorResult
from streammerge.engine.resuming import Recovered
from streammerge.engine.scheduling import Schedule
from streammerge.engine.writing import Output, WriteJob, run_writer
from streammerge.errors import StageError, StreamMergeError
from streammerge.lazily import torch
from streammerge.limits import name_limit, naming_limits
from streammerge.methods.base import MergeMethod
from streammerge.plan.chunking import iter_units
from streammerge.plan.kernels import takes_torch
from streammerge.plan.sweeps import Needs
from streammerge.plan.types import MergePlan

_TICK_SECONDS = 0.1
"""How often the calling thread looks at memory and reports progress."""


@dataclass(frozen=True, slots=True)
class RunReport:
    """What running a plan came to."""

    results: dict[int, TensorResult]
    """Per tensor, by task index."""
    bytes_by_stage: dict[str, int]
    """Bytes read and written."""
    seconds_by_stage: dict[str, float]
    """Thread-seconds per stage."""
    seconds: float
    """Wall time."""
    peak_memory: int
    """Largest private memory of the process that was seen, in bytes."""
    histograms: NDArray[np.int64]
    """``[models, bins]`` of sampled magnitudes, for a report; zeros without one."""
    device_peak_memory: int
    """Most memory that the process had of any one accelerator, in bytes; 0 without one."""


def run_pipeline(
    plan: MergePlan,
    method: MergeMethod,
    sources: Sequence[ByteSource],
    outputs: Sequence[Output],
    *,
    recovered: Recovered,
    on_scope: OnScope,
    snapshot: Path | None,
    keep_cached: bool,
    on_progress: OnProgress,
    pace: Pace | None = None,
    sweep: SweepShare | None = None,
) -> RunReport:
    """Merge everything in the plan, but for what was recovered, into the output files.

    Args:
        plan: The plan.
        method: Its method.
        sources: Open input files, by index in the plan.
        outputs: Open output files, by index in the plan's layout.
        recovered: What an interrupted run has done.
        on_scope: Told the statistics of each large tensor, or of the model, when they are known.
        snapshot: Where to save the state of a sweep over the model; None for nowhere.
        keep_cached: Whether the page cache holds all inputs, so that a first sweep leaves them.
        on_progress: Told how far the work is, on the calling thread.
        pace: Keeps to that of other merges over the same files; None without any.
        sweep: What to do of a sweep over the model, and nothing else; None for a merge.

    Raises:
        StreamMergeError: Whatever ended the first stage that failed; later errors are its notes.
        KeyboardInterrupt: The user interrupted; all threads have ended.
    """
    running = _Running(
        plan,
        method,
        sources,
        outputs,
        recovered=recovered,
        on_scope=on_scope,
        snapshot=snapshot,
        keep_cached=keep_cached,
        pace=pace,
        sweep=sweep,
    )
    if not takes_torch(plan):
        return running.run(on_progress)
    threads_before = torch.get_num_threads()
    try:
        return running.run(on_progress)
    finally:
        # Workers set this to one for themselves, but torch remembers it for threads to come.
        torch.set_num_threads(threads_before)


class _Running:
    """The threads of one merge and what they share."""

    def __init__(
        self,
        plan: MergePlan,
        method: MergeMethod,
        sources: Sequence[ByteSource],
        outputs: Sequence[Output],
        *,
        recovered: Recovered,
        on_scope: OnScope,
        snapshot: Path | None,
        keep_cached: bool,
        pace: Pace | None,
        sweep: SweepShare | None,
    ) -> None:
        resources = plan.resources
        self._takes_torch = takes_torch(plan)
        self._accelerators = Accelerators(plan, method)
        needs = Needs(plan, method)
        units = partial(iter_units, plan, must_look=needs.must_look)
        self._plan = plan
        self._method = method
        self._monitor = Monitor()
        self._progress = Progress(
            plan.bytes_to_read + plan.layout.data_nbytes - recovered.nbytes(units())
        )
        self._work: WorkQueue[Work] = WorkQueue(self._monitor)
        self._writes: WorkQueue[WriteJob] = WorkQueue(self._monitor)
        self._outstanding = Outstanding(self._monitor)
        self._results = Results(plan, recovered.take_pieces(units()))
        self._outputs = outputs
        pool = SlotPool(
            self._monitor,
            count=resources.slots,
            nbytes=resources.slot_bytes,
            make=self._accelerators.pin,
        )
        merger = ChunkMerger(
            plan,
            outputs=SlotPool(
                self._monitor,
                count=resources.output_slots,
                nbytes=resources.output_slot_bytes,
                make=self._accelerators.pin,
            ),
            writes=self._writes,
            outstanding=self._outstanding,
            progress=self._progress,
        )
        context = MergeContext(
            plan=plan,
            needs=needs,
            monitor=self._monitor,
            work=self._work,
            outstanding=self._outstanding,
            pool=pool,
            statistics=Allowance(self._monitor, resources.statistics_bytes),
            merger=merger,
            progress=self._progress,
            recovered=recovered,
            on_scope=on_scope,
            snapshot=snapshot,
            keep_cached=keep_cached,
            make_whole=self._accelerators.whole_maker(self._monitor),
            sweep=sweep,
        )
        self._loader = Loader(
            plan,
            sources,
            pool,
            FactorCache(
                plan,
                sources,
                # The same for every tensor.
                in_turn=any(method.in_turn(method.bind(each.values)) for each in plan.settings),
                monitor=self._monitor,
                progress=self._progress,
                find_norms=self._accelerators.norms_finder(),
            ),
            Schedule(context).iter_loads(),
            monitor=self._monitor,
            progress=self._progress,
            pace=pace,
        )

    def run(self, on_progress: OnProgress) -> RunReport:
        resources = self._plan.resources
        # One more than the chunks, so that the count cannot reach zero while readers still run.
        self._outstanding.begin(resources.readers)
        bodies: list[tuple[str, Callable[[], None]]] = [
            *[(f"streammerge-reader-{i}", self._read) for i in range(resources.readers)],
            *[
                (f"streammerge-worker-{i}", partial(self._compute, i))
                for i in range(resources.workers)
            ],
            *[(f"streammerge-writer-{i}", self._write) for i in range(resources.writers)],
        ]
        threads = [
            threading.Thread(target=self._guarded, args=(body,), name=name, daemon=True)
            for name, body in bodies
        ]
        peak = PeakMemory()
        try:
            for thread in threads:
                with naming_limits():
                    thread.start()
            while not self._outstanding.wait(_TICK_SECONDS):
                peak.look()
                on_progress(self._progress.event())
        except StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001 - an interrupt must end the threads too
            self._monitor.fail(error)
        self._work.close()
        self._writes.close()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        if self._monitor.failure is not None:
            raise self._monitor.failure
        peak.look()
        event = self._progress.event()
        on_progress(event)
        return RunReport(
            results=self._results.by_task(),
            histograms=self._results.histograms(),
            bytes_by_stage=self._progress.bytes_by_stage(),
            seconds_by_stage=self._progress.seconds_by_stage(),
            seconds=event.seconds,
            peak_memory=peak.nbytes,
            device_peak_memory=self._accelerators.peak_bytes(),
        )

    def _guarded(self, body: Callable[[], None]) -> None:
        try:
            body()
        except StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, the caller must see it
            self._monitor.fail(_named(error))

    def _read(self) -> None:
        with self._one_torch_thread():
            self._loader.run()
        self._outstanding.end()

    def _compute(self, worker: int) -> None:
        with self._one_torch_thread(), self._stage_of(worker) as stage:
            while True:
                with self._progress.spending(Stage.WORKER_IDLE):
                    work = self._work.take()
                if work is None:
                    return
                with self._progress.spending(Stage.COMPUTE):
                    work(stage)

    @contextmanager
    def _one_torch_thread(self) -> Iterator[None]:
        """Let torch compute on the calling thread alone, if it computes at all.

        Blocks are small: one thread per block and several blocks at once beats the reverse.
        """
        if not self._takes_torch:
            yield
            return
        torch.set_num_threads(1)
        with torch.inference_mode():
            yield

    @contextmanager
    def _stage_of(self, worker: int) -> Iterator[DeviceStage]:
        if self._plan.device is None:
            yield open_cpu_stage(self._plan, self._method)
        else:
            with self._accelerators.stage_of(worker) as stage:
                yield stage

    def _write(self) -> None:
        run_writer(self._writes, self._outputs, self._progress, self._results)


def _named(error: BaseException) -> BaseException:
    """Return an error that a caller can tell from others, whatever ended a stage."""
    if isinstance(error, StreamMergeError):
        return error
    named: StreamMergeError = name_limit(error) or StageError(
        f"{type(error).__name__}: {error}; please report it, with the traceback"
    )
    named.__cause__ = error
    return named
