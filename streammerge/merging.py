"""One merge, from open inputs to the directory in its place; nothing in here is ever interrupted.

It runs on a thread of its own (:mod:`streammerge.engine.shelter`), which owns every file and lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from streammerge.adapters.combining.plans import CombinationPlan
from streammerge.adapters.combining.writing import write_adapter
from streammerge.checkpoint.bytesource import (
    ByteSource,
    MemorySource,
    OpenByteSource,
    RemoteSource,
    check_unchanged,
)
from streammerge.checkpoint.journal import Journal, PieceDone
from streammerge.checkpoint.manifest import Manifest, digest_identity
from streammerge.checkpoint.outputdir import OutputDirectory
from streammerge.checkpoint.outputfile import OutputFile
from streammerge.checkpoint.outputform import form_of
from streammerge.checkpoint.recorded import Recorded
from streammerge.checkpoint.sidecars import make_folder
from streammerge.checkpoint.types import ShardFile
from streammerge.comparing import ComparedFile, Comparison, Sample, compare_results
from streammerge.engine.accelerator.combining import open_decomposer
from streammerge.engine.computing import ComputedSource, StageComputer
from streammerge.engine.context import SweepShare
from streammerge.engine.making import make_numbers
from streammerge.engine.memory import resident_memory
from streammerge.engine.pacing import Pace
from streammerge.engine.pipeline import RunReport, run_pipeline
from streammerge.engine.progress import OnProgress, ProgressEvent
from streammerge.engine.rechecking import entry_check, find_unsound
from streammerge.engine.resuming import Recovered, scope_found
from streammerge.engine.twins import check_twins
from streammerge.errors import CheckpointError, OutputError
from streammerge.finishing import (
    check_shards,
    copy_companions,
    output_names,
    room_beside,
    write_companions,
)
from streammerge.identity import identify, told
from streammerge.limits import allow_open_files, name_limit
from streammerge.machine import fits_page_cache
from streammerge.plan.asking import find_method
from streammerge.plan.chunking import Piece
from streammerge.plan.dividing import shards_of
from streammerge.plan.layout import render_header
from streammerge.plan.types import MergePlan
from streammerge.report.drawing import check_drawing
from streammerge.storage.objects import RemoteObject

_RECORDS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class MergeJob:
    """A plan, and the place for its result."""

    planned: MergePlan | CombinationPlan
    """What to do."""
    out: Path
    """The directory to make."""
    overwrite: bool
    """Whether an earlier merge there, or an unfinished one beside it, may be replaced."""
    resume: bool
    """Whether to continue an unfinished merge, if there is one."""
    opener: OpenByteSource
    """Opens an input file."""
    open_files: int
    """Files that the process has open for each input."""
    pace: Pace | None = None
    """Keeps to that of other merges over the same files; None without any."""
    vouched: Callable[[Piece], bool] | None = None
    """What an unfinished merge has done that need not be read again to be kept; None for nothing."""
    sink: Sink | None = None
    """Where files go from the directory; None for nowhere, which is where they stay."""

    @property
    def files_at_once(self) -> int:
        """Input and output files that are open together."""
        outputs = (
            1 if isinstance(self.planned, CombinationPlan) else len(self.planned.layout.shards)
        )
        return len(self.planned.files) * self.open_files + outputs

    def run(self, on_progress: OnProgress) -> Manifest:
        """Do it; ``out`` exists when this returns and not before.

        Raises:
            StreamMergeError: ``out`` is then as it was before.
        """
        allow_open_files(self.files_at_once)
        if isinstance(self.planned, CombinationPlan):
            return self._combine(self.planned, on_progress)
        return self._merge(self.planned, on_progress)

    def _combine(self, planned: CombinationPlan, on_progress: OnProgress) -> Manifest:
        from streammerge.adapters.combining.running import CombinationJob  # noqa: PLC0415 - loads torch

        with naming_errors(self.out), open_decomposer(planned) as opened:
            return write_adapter(
                CombinationJob(planned, opened.decompose, opened.peak_bytes),
                self.out,
                identity=identify(planned),
                overwrite=self.overwrite,
                resume=self.resume,
                opener=self.opener,
                measure_memory=resident_memory,
                on_bytes=_report_bytes(planned, on_progress),
            )

    def _merge(self, planned: MergePlan, on_progress: OnProgress) -> Manifest:
        if planned.survey:
            # Before anything is read for it.
            check_drawing()
        identity = identify(planned)
        with naming_errors(self.out):
            output = OutputDirectory(
                self.out,
                inputs=[
                    *(Path(model.path) for model in planned.models),
                    *(file.path for file in planned.files),
                ],
                nbytes=planned.bytes_to_write if self.sink is None else self.sink.room,
                nbytes_beside=room_beside(planned),
                names=output_names(planned, form_of(self.out)),
                identity=identity | told(planned),
                overwrite=self.overwrite,
                resume=self.resume,
                check=entry_check(planned),
            )
        with ExitStack() as stack:
            sources = open_sources(planned, self.opener, stack)
            check_twins(planned, sources)
            stack.enter_context(output)
            stack.enter_context(naming_errors(output.partial))
            if self.sink is not None:
                stack.enter_context(self.sink.at_work(output.partial))
            # At once, so that what happens to them while the tensors are merged is of no matter.
            copied = copy_companions(planned, output.partial)
            report, damaged = write_shards(
                planned,
                output,
                sources,
                on_progress,
                resumed=output.continues,
                pace=self.pace,
                vouched=self.vouched,
                sender=self.sink,
            )
            try:
                check_unchanged(planned.files, sources)
            except CheckpointError:
                # Nobody knows which version of an input the pieces are of; no resume may use them.
                output.discard()
                raise
            check_shards(planned, output.partial)
            manifest = write_companions(
                planned,
                output.partial,
                report,
                form=form_of(output.out),
                copied=copied,
                identity=digest_identity(identity),
                resumed=bool(output.recorded) and self.vouched is None,
                attempts=output.attempts,
                damaged=damaged,
                byte_source=sources[0].kind,
            )
            if self.sink is not None:
                self.sink.publish(output.partial, manifest)
            output.publish()
        return manifest


@dataclass(frozen=True, slots=True)
class SampleJob:
    """A part of a plan that is merged again, and the directory that should hold its result."""

    planned: MergePlan
    """What the directory should be the result of."""
    out: Path
    """The directory."""
    objects: Mapping[str, RemoteObject]
    """What its files are in a store; nothing where they lie on a disk."""
    sample: Sample
    """The part."""
    opener: OpenByteSource
    """Opens an input file."""

    def run(self, on_progress: OnProgress) -> Comparison:
        """Merge it again and compare, bit by bit."""
        planned = self.planned
        allow_open_files(len(planned.files) + len(planned.layout.shards))
        with ExitStack() as stack:
            sources = open_sources(planned, self.opener, stack)
            outputs = [
                stack.enter_context(
                    ComparedFile(
                        self.out / shard.name,
                        shard.nbytes,
                        render_header(planned, index),
                        remote=self.objects.get(shard.name),
                    )
                )
                for index, shard in enumerate(planned.layout.shards)
            ]
            report = run_pipeline(
                planned,
                find_method(planned.method),
                sources,
                outputs,
                recovered=Recovered(planned, Recorded(), wanted=self.sample.has),
                on_scope=lambda *_: None,
                snapshot=None,
                keep_cached=fits_page_cache(planned),
                on_progress=on_progress,
            )
            check_unchanged(planned.files, sources)
        return compare_results(planned, report, outputs)


@contextmanager
def naming_errors(directory: Path) -> Iterator[None]:
    """Give a name to what the system refuses where nothing more precise is known."""
    try:
        yield
    except OSError as error:
        where = error.filename or directory
        raise name_limit(error) or OutputError(f"{where}: {error.strerror or error}") from error


def _report_bytes(
    planned: CombinationPlan, on_progress: OnProgress
) -> Callable[[int, float], None]:
    total = planned.bytes_to_read + planned.bytes_to_write

    return lambda done, seconds: on_progress(ProgressEvent.at("merge", done, total, seconds))


def open_sources(planned: MergePlan, opener: OpenByteSource, stack: ExitStack) -> list[ByteSource]:
    """Open every input file, and check that it is still what was planned."""

    def open_one(file: ShardFile) -> ByteSource:
        if file.computed:
            # In its place until those are open that it is computed from.
            return MemorySource(file.path, b"")
        if file.made is not None:
            return MemorySource(file.path, make_numbers(file.made))
        if file.remote is not None:
            return RemoteSource(file.remote)
        return stack.enter_context(opener(file.path))

    sources = [open_one(file) for file in planned.files]
    for stage in planned.fused:
        own = [sources[index] for index in stage.files]
        computer = StageComputer(stage, own)
        for shard, index in enumerate(stage.shards):
            if index is not None:
                sources[index] = ComputedSource(planned.files[index].path, computer, shard)
        check_twins(stage.plan, own)
    check_unchanged(planned.files, sources)
    return sources


class Sender(Protocol):
    """Where the shards of a merge go while it runs."""

    def has(self, piece: Piece) -> bool:
        """Return whether it has all bytes of a piece already."""
        ...

    def open(
        self,
        shard: int,
        path: Path,
        *,
        resumed: bool,
        on_durable: Callable[[Sequence[PieceDone]], None],
    ) -> OutputFile:
        """Open a shard, by its index, that is at a path on its way."""
        ...


class Sink(Sender, Protocol):
    """Where all files of a merge go."""

    @property
    def room(self) -> int:
        """Bytes of disk that shards take here on their way, at most as far as can be told."""
        ...

    def at_work(self, partial: Path) -> AbstractContextManager[None]:
        """Go on with, or begin, what goes there from a directory."""
        ...

    def publish(self, partial: Path, manifest: Manifest) -> None:
        """Put everything else there; with the last file the result counts as complete."""
        ...


class Unfinished(Protocol):
    """The directory of an unfinished merge, open for work."""

    @property
    def partial(self) -> Path:
        """Where the files are."""
        ...

    @property
    def recorded(self) -> Recorded:
        """What is done."""
        ...

    @property
    def journal(self) -> Journal:
        """Where to record what is done."""
        ...

    def take_snapshot(self) -> Path:
        """Return where to save a sweep over the model."""
        ...


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a merge that one of several processes does."""

    tasks: frozenset[int]
    """Tensors, by index."""
    check: Callable[[], None]
    """Raises if the merge has been given up; called before a file that was opened is touched."""

    def has(self, piece: Piece) -> bool:
        """Return whether a piece is of it."""
        return piece.task in self.tasks


class _OfOthers:
    """An output file of which other processes do everything."""

    def write_at(self, *_arguments: object, **_keywords: object) -> None:
        raise RuntimeError("a part wrote to a file of other parts")

    def read_into(self, *_arguments: object) -> bool:
        raise RuntimeError("a part read a file of other parts")

    def forget_cached(self) -> None:
        pass


def write_shards(
    planned: MergePlan,
    output: Unfinished,
    sources: Sequence[ByteSource],
    on_progress: OnProgress,
    *,
    resumed: bool,
    pace: Pace | None = None,
    share: Share | None = None,
    vouched: Callable[[Piece], bool] | None = None,
    sender: Sender | None = None,
    sweep: SweepShare | None = None,
) -> tuple[RunReport, int]:
    """Do what is left to do of the shards; also return how many pieces were damaged meanwhile.

    Args:
        planned: The plan.
        output: Where.
        sources: Open input files.
        on_progress: Told how far the work is.
        resumed: Whether files may be there already.
        pace: Keeps to that of other merges over the same files.
        share: What of it is this process's; None for everything.
        vouched: As in :class:`MergeJob`; with a sender, what that has.
        sender: Where the shards go; None for nowhere, which is where they stay.
        sweep: What to do of a sweep over the model, and nothing else; None for a merge.
    """
    recorded = output.recorded
    doubtful = _find_doubtful(recorded, vouched if sender is None else sender.has)
    if sender is not None and share is not None:
        # What waited to be sent lies with the process that made it.
        recorded = recorded.only(~doubtful)
        doubtful = np.zeros(len(recorded), dtype=bool)
    own = None if share is None else shards_of(planned, share.tasks)
    files: list[OutputFile] = []
    shards: list[OutputFile | _OfOthers] = []
    try:
        for index, shard in enumerate(planned.layout.shards):
            if own is not None and index not in own:
                shards.append(_OfOthers())
                continue
            make_folder(output.partial / shard.folder)
            path = output.partial / shard.name
            if sender is None:
                opened = OutputFile(
                    path,
                    shard.nbytes,
                    resumed=resumed,
                    # Of parts that are done, every byte has its room already.
                    shared=share is not None or vouched is not None,
                    on_open=lambda: None if share is None else share.check(),
                    on_durable=output.journal.append,
                )
            else:
                opened = sender.open(index, path, resumed=resumed, on_durable=output.journal.append)
            files.append(opened)
            shards.append(opened)
            opened.write_at(0, memoryview(render_header(planned, index)))
        unsound = find_unsound(planned, recorded, doubtful, shards, on_progress)
        kept = recorded.only(~unsound)
        if share is not None:
            # So that this journal alone tells all of it, cut as this process cuts.
            _copy_records(kept, output.journal)
        report = run_pipeline(
            planned,
            find_method(planned.method),
            sources,
            shards,
            recovered=Recovered(planned, kept, wanted=None if share is None else share.has),
            on_scope=lambda task, found: output.journal.append([scope_found(task, found)]),
            snapshot=None if sweep is not None else output.take_snapshot(),
            keep_cached=fits_page_cache(planned),
            on_progress=on_progress,
            pace=pace,
            sweep=sweep,
        )
        while files:
            files.pop(0).close()
    finally:
        # Whatever is left here is left because something failed.
        for each in files:
            each.abandon()
    return report, int(unsound.sum())


def _find_doubtful(
    recorded: Recorded, vouched: Callable[[Piece], bool] | None
) -> NDArray[np.bool_]:
    """Return which pieces must be read again to be kept."""
    doubtful = np.ones(len(recorded), dtype=bool)
    if vouched is not None:
        for number, place in enumerate(recorded.places()):
            doubtful[number] = not vouched(Piece(*place))
    return doubtful


def _copy_records(recorded: Recorded, journal: Journal) -> None:
    journal.append(list(recorded.scopes.values()))
    pieces = recorded.read()
    while some := list(islice(pieces, _RECORDS_AT_ONCE)):
        journal.append(some)
