"""The process that has the parts of a merge done by an engine, and puts the output in place.

It writes what the merge is, hands out parts as workers are idle, and watches the journals that they leave in
the directory that all of them share. It does nothing that ``--part`` does not, so what it leaves, processes
with ``--part`` or one process alone finish, and the reverse.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streammerge.checkpoint.attempts import parts_done
from streammerge.checkpoint.bytesource import ByteSourceKind
from streammerge.checkpoint.inputs import parse_path
from streammerge.checkpoint.manifest import Manifest
from streammerge.checkpoint.partdir import PartDirectory, recorded_parts
from streammerge.checkpoint.tailing import JournalTail
from streammerge.engine.accelerator.opening import named_devices
from streammerge.engine.progress import OnProgress, ProgressEvent
from streammerge.engine.shelter import run_sheltered
from streammerge.errors import BusyError, ClusterError, StreamMergeError
from streammerge.executors.apart import ENGINES, ExecutorApart
from streammerge.executors.seam import Executor, Outcome, Request, restore_error
from streammerge.executors.sweeping import find_model_statistics
from streammerge.identity import identify
from streammerge.limits import naming_limits
from streammerge.parting import PartJob, check_divisible, finish_parts, part_job
from streammerge.plan.dividing import work_of
from streammerge.plan.types import MergePlan
from streammerge.run import RecipeLike, as_output, find_complete, load_recipe, plan
from streammerge.storage.targets import load_target
from streammerge.storing.parts import announce
from streammerge.storing.places import StoredPlace, open_place
from streammerge.units import GIB

_PARTS_PER_WORKER = 4
"""So that one that is slow, or lost, keeps the others waiting for a fraction of its share."""
_LEAST_WORK = 8 * GIB
"""Bytes read and written by a part, if there are more parts than workers: a process takes a second or
two to begin, in which it would do 2 GiB."""
_TICK_SECONDS = 0.5
_LONELY_SECONDS = 60.0
"""How long to wait for a first worker, or for one after all were lost."""
_DRAIN_SECONDS = 20.0
"""How long parts have to notice that they are not wanted any more."""
_PUBLISH_SECONDS = 120.0
"""How long to wait for a part whose machine was lost to lose its lock, too: file systems take up to some
90 seconds to take it back."""
_TRIES = 3
"""Processes of one part that may be ended by signals, as when memory runs out."""


@naming_limits()
def merge_on(
    recipe: RecipeLike | MergePlan,
    out: str | os.PathLike[str],
    *,
    on: str,
    memory: int | str | None = None,
    workers: int | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
    download: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    byte_source: ByteSourceKind | str = ByteSourceKind.PREAD,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Merge on the workers of an engine, which see the same files as this process.

    Args:
        recipe: As for :func:`streammerge.run.merge`.
        out: As there.
        on: ``"dask"`` or ``"ray"`` for workers on this machine, ``"dask://HOST:PORT"`` for those of a
            scheduler, ``"ray://HOST:PORT"`` for the cluster of a head, of which this machine is a part.
        memory: Most private memory of each process that does a part; None takes a quarter of what is
            available where it runs, shared by the workers there.
        workers: Compute threads of each of them; None takes those of its worker.
        device: As there, but None and ``"auto"`` are the CPU.
        device_memory: As there.
        download: Whether this process fetches models of the hub; workers look into its cache alone.
        overwrite: As for :func:`streammerge.parting.merge_part`.
        resume: As there.
        byte_source: As for :func:`streammerge.run.merge`.
        on_progress: Told how far all parts are together.

    Raises:
        StreamMergeError: As there; what is done stays for a resume, by an engine or without.
        ClusterError: The engine, or all of its workers, cannot be reached or were lost.
    """
    out = parse_path(out, "out")
    check_engine(on)
    url = load_target(out)
    stored = None if url is None else open_place(url)
    # A recipe that is none is refused before any engine is asked.
    asked = recipe if isinstance(recipe, MergePlan) else load_recipe(recipe, download=download)
    with contextlib.closing(open_executor(on)) as executor:
        # It connects meanwhile.
        if isinstance(asked, MergePlan):
            planned = asked
        else:
            planned = check_divisible(
                plan(asked, memory=memory, device=named_devices(device), download=download)
            )
        executor.workers()
        named = as_output(planned, out)
        assert isinstance(named, MergePlan)  # noqa: S101 - as it was
        finished = find_complete(named, out) if resume else None
        if finished is not None:
            return finished
        return drive(
            named,
            out if stored is None else stored.local,
            executor,
            stored=stored,
            memory=memory,
            workers=workers,
            device=named_devices(device),
            device_memory=device_memory,
            overwrite=overwrite,
            resume=resume,
            byte_source=ByteSourceKind(byte_source),
            on_progress=on_progress or (lambda _: None),
        )


def drive(
    planned: MergePlan, out: Path, executor: Executor, *, on_progress: OnProgress, **options: Any
) -> Manifest:
    """Merge on an engine that is connected.

    Args:
        planned: What to do, with the files that ``out`` asks for.
        out: The directory to make.
        executor: The engine.
        on_progress: As for :func:`merge_on`.
        options: The other ones of :func:`merge_on`.

    Raises:
        StreamMergeError: As there.
    """
    # The same place for all of them, whatever directory they are in.
    place = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link at OUT
    return run_sheltered(_Driver(planned, place, executor, **options).run, on_progress)


def check_engine(on: str) -> None:
    """Return if a text names an engine.

    Raises:
        ValueError: It does not.
    """
    name, mark, address = on.partition("://")
    host, colon, port = address.rpartition(":")
    if name not in ENGINES or (mark and not (host and colon and port.isdecimal())):
        known = ", ".join(f"{each} or {each}://HOST:PORT" for each in ENGINES)
        raise ValueError(f"on: expected {known}, got {on!r}")


def open_executor(on: str) -> Executor:
    """Begin to connect to the engine that a text names; see :class:`~streammerge.executors.apart.ExecutorApart`."""
    return ExecutorApart(on)


def choose_parts(work: int, workers: int) -> int:
    """Return into how many parts so many bytes of work are divided for so many workers."""
    return max(workers, min(_PARTS_PER_WORKER * workers, work // _LEAST_WORK), 1)


class _Driver:
    """One merge on an engine."""

    def __init__(
        self,
        planned: MergePlan,
        out: Path,
        executor: Executor,
        *,
        memory: int | str | None,
        workers: int | None,
        device: str,
        device_memory: int | str | None,
        overwrite: bool,
        resume: bool,
        byte_source: ByteSourceKind,
        stored: StoredPlace | None = None,
    ) -> None:
        self._planned = planned
        self._out = out
        self._stored = stored
        self._executor = executor
        self._overwrite, self._resume = overwrite, resume
        self._byte_source = byte_source
        self._request: Request = {
            "recipe": planned.recipe,
            "directory": os.getcwd(),  # noqa: PTH109 - plain text for a request
            "out": str(out),
            "memory": memory,
            "workers": workers,
            "device": device,
            "device_memory": device_memory,
            "byte_source": byte_source.value,
            "sharing": 1,
            "url": None if stored is None else stored.url,
            "scratch": None if stored is None else str(stored.scratch),
        }
        self._signals: Counter[int] = Counter()
        self._lonely_since: float | None = None

    def run(self, on_progress: OnProgress) -> Manifest:
        """Have all parts done, and put the output in place."""
        parts = self._choose_parts(on_progress)
        job = part_job(
            self._planned,
            self._out,
            part=0,
            parts=parts,
            overwrite=self._overwrite,
            resume=self._resume,
            byte_source=self._byte_source,
            stored=self._stored,
        )
        directory = job.directory(frozenset())
        with contextlib.ExitStack() as announced:
            try:
                with directory:
                    hear = on_progress
                    if self._stored is not None:
                        hear = announce(self._stored, directory, announced, hear, alone=True)
                    self._drive(directory, parts, hear)
            except BaseException:
                # Its lock is free now, so the parts that run end soon.
                self._drain()
                raise
        return self._publish(job, directory, on_progress)

    def _choose_parts(self, on_progress: OnProgress) -> int:
        recorded = recorded_parts(self._out, identify(self._planned))
        if recorded is not None:
            return recorded
        while not self._executor.workers():
            self._look_for_workers()
            _report(on_progress, 0, 1, 0.0)
            time.sleep(_TICK_SECONDS)
        parts = choose_parts(work_of(self._planned), self._executor.workers())
        # To a store a part sends whole shards.
        most = parts if self._stored is None else len(self._planned.layout.shards)
        return min(parts, most)

    def _drive(self, directory: PartDirectory, parts: int, on_progress: OnProgress) -> None:
        request = {
            **self._request,
            "parts": parts,
            "epoch": directory.epoch,
            "driver": str(directory.journal.path),
            "overwrite": directory.overwrite,
        }
        find_model_statistics(
            self._planned,
            directory,
            parts,
            lambda shares: self._run_all([{**request, **share} for share in shares], on_progress),
        )
        done = parts_done(directory.read_attempts(), parts)
        left = [part for part in range(1, parts + 1) if part not in done]
        numels = [task.numel for task in self._planned.tasks]
        tail = JournalTail(directory.partial, directory.epoch, numels)
        self._run_all([{**request, "part": part} for part in left], on_progress, tail)

    def _run_all(
        self,
        requests: Sequence[Request],
        on_progress: OnProgress,
        tail: JournalTail | None = None,
    ) -> None:
        """Have all of this done, what is lost again.

        Args:
            requests: One for each process.
            on_progress: Told how far they are together.
            tail: Tells what is durable; None where shares of a sweep are done, which are told by number.
        """
        waiting = {int(request["part"]): request for request in requests}
        doing: dict[int, Request] = {}
        began = time.perf_counter()
        total = work_of(self._planned)
        moved = 0
        while waiting or doing:
            self._look_for_workers()
            while waiting and self._executor.idle():
                part = min(waiting)
                request = waiting.pop(part)
                self._executor.submit(request)
                doing[part] = request
            for outcome in self._executor.gather(_TICK_SECONDS):
                request = doing.pop(outcome.part)
                if self._is_lost(outcome, int(request["parts"])):
                    waiting[outcome.part] = request
            if waiting and not doing:
                # Nothing to wait for: no worker is idle, or none is there.
                time.sleep(_TICK_SECONDS)
            if tail is None:
                left = len(waiting) + len(doing)
                done, activity = total * (len(requests) - left) // len(requests), "statistics"
            else:
                moved += sum(
                    work_of(self._planned, piece.task, piece.numel) for piece in tail.read_new()
                )
                done, activity = moved, "merge"
            seconds = time.perf_counter() - began
            on_progress(ProgressEvent.at(activity, done, total, seconds))

    def _look_for_workers(self) -> None:
        """Raise if there have been no workers for a while."""
        if self._executor.workers():
            self._lonely_since = None
            return
        now = time.monotonic()
        self._lonely_since = self._lonely_since or now
        if now - self._lonely_since > _LONELY_SECONDS:
            raise ClusterError(
                f"{self._out}: for {_LONELY_SECONDS:.0f} s no worker has been there; look after them, then "
                "give the same command again, which goes on with what is done"
            )

    def _is_lost(self, outcome: Outcome, parts: int) -> bool:
        """Return whether a part has to be done again; raise what ended it, if it was an error."""
        if outcome.error is not None:
            raise _as_error(outcome, parts)
        if outcome.lost is None:
            return False
        self._signals[outcome.part] += 1
        if self._signals[outcome.part] >= _TRIES:
            raise ClusterError(
                f"{self._out}: part {outcome.part}/{parts} was lost {_TRIES} times, at last on {outcome.host}: "
                f"{outcome.lost}; if memory ran out there, give a smaller --memory; the same command goes on"
            )
        return True

    def _drain(self) -> None:
        """Wait a while for what runs to end."""
        deadline = time.monotonic() + _DRAIN_SECONDS
        with contextlib.suppress(StreamMergeError):
            while self._executor.running() and time.monotonic() < deadline:
                self._executor.gather(_TICK_SECONDS)

    def _publish(self, job: PartJob, directory: PartDirectory, on_progress: OnProgress) -> Manifest:
        deadline = time.monotonic() + _PUBLISH_SECONDS
        before = work_of(self._planned)

        def add(event: ProgressEvent) -> None:
            done, total = before + event.bytes_done, before + event.bytes_total
            on_progress(replace(event, bytes_done=done, bytes_total=total))

        while True:
            try:
                return finish_parts(job, directory, add)
            except BusyError:
                if time.monotonic() > deadline:
                    raise
            _report(on_progress, before, before, 0.0)
            time.sleep(_TICK_SECONDS)


def _report(on_progress: OnProgress, done: int, total: int, seconds: float) -> None:
    on_progress(ProgressEvent.at("merge", done, total, seconds))


def _as_error(outcome: Outcome, parts: int) -> StreamMergeError:
    """Return the error that ended a part elsewhere, as if it had been raised here."""
    error = restore_error(outcome.error or {})
    error.add_note(f"part {outcome.part}/{parts}, on {outcome.host}")
    return error
