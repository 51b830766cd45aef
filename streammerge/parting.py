"""A merge in parts: several processes, on as many machines as see the same files, do one each.

    process 1: part 1 of 3 ─▶ journal ┐
    process 2: part 2 of 3 ─▶ journal ┼─▶ whichever is last: all of it, put in place as one
    process 3: part 3 of 3 ─▶ journal ┘

Each plans for itself, so nothing is sent between them: what must be the same is compared by name in the
directory that they share (:mod:`streammerge.checkpoint.partdir`), and what a part is depends on the plan
alone (:mod:`streammerge.plan.dividing`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streammerge.adapters.combining.plans import CombinationPlan
from streammerge.checkpoint.attempts import parts_done
from streammerge.checkpoint.bytesource import (
    ByteSource,
    ByteSourceKind,
    OpenByteSource,
    check_unchanged,
    choose_byte_source,
)
from streammerge.checkpoint.inputs import parse_path
from streammerge.checkpoint.journal import PartDone
from streammerge.checkpoint.manifest import Manifest
from streammerge.checkpoint.outputform import form_of
from streammerge.checkpoint.partdir import PartDirectory
from streammerge.engine.accelerator.opening import named_devices
from streammerge.engine.context import SweepShare
from streammerge.engine.progress import OnProgress, ProgressEvent
from streammerge.engine.rechecking import entry_check
from streammerge.engine.shelter import run_sheltered
from streammerge.engine.twins import check_twins
from streammerge.errors import BusyError, CheckpointError, OutputExistsError, RecipeError
from streammerge.finishing import output_names, room_beside
from streammerge.identity import identify, told
from streammerge.limits import allow_open_files, naming_limits
from streammerge.merging import MergeJob, Share, naming_errors, open_sources, write_shards
from streammerge.plan.checking import check_runnable
from streammerge.plan.chunking import Piece
from streammerge.plan.dividing import divide, find_seams, is_near_seam, shards_of
from streammerge.plan.types import MergePlan
from streammerge.run import RecipeLike, as_output, find_complete, plan
from streammerge.storage.targets import load_target
from streammerge.storing.parts import (
    PartSender,
    announce,
    publish_parts,
    sending_part,
)
from streammerge.storing.places import StoredPlace, open_place
from streammerge.storing.sending import room_on_the_way

_SECONDS_BETWEEN_CHECKS = 5.0
"""How often a part asks whether its merge is still the one that is done in the directory."""
_PUBLISH_SECONDS = 10.0
"""How long the last part waits for locks of others that are done too, and are about to leave."""
_RETRY_SECONDS = 0.2


@naming_limits()
def merge_part(
    recipe: RecipeLike | MergePlan,
    out: str | os.PathLike[str],
    *,
    part: int,
    parts: int,
    memory: int | str | None = None,
    workers: int | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
    download: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    report: bool = False,
    byte_source: ByteSourceKind | str = ByteSourceKind.PREAD,
    on_progress: OnProgress | None = None,
) -> Manifest | None:
    """Do one part of a merge whose other parts other processes do, at any time and in any order.

    The paths of the recipe and of ``out`` must lead to the same files for all of them. Which one is last
    puts the output in place. A part that was interrupted is done by the same call again; one that is
    done already, or whose merge is complete, by nothing.

    Args:
        recipe: As for :func:`streammerge.run.merge`.
        out: As there.
        part: Which part, from 1.
        parts: Of how many; all processes give the same number.
        memory: As there, for this process.
        workers: As there.
        device: As there, but None and ``"auto"`` are the CPU.
        device_memory: As there.
        download: As there.
        overwrite: Whether an earlier merge in ``out`` may be replaced, and an unfinished one of something
            else, that nobody works on, discarded. What parts of this very merge have done is kept.
        resume: Whether what a merge without parts has left is to be continued in parts.
        report: As there; the same for all of them.
        byte_source: As there.
        on_progress: As there.

    Returns:
        The manifest, if the output is in place; None while parts are left to do.

    Raises:
        StreamMergeError: As there; what is done stays for the same call again.
        ValueError: There is no such part.
    """
    out = parse_path(out, "out")
    check_part(part, parts)
    url = load_target(out)
    if isinstance(recipe, MergePlan):
        planned = recipe
    else:
        found = plan(
            recipe,
            memory=memory,
            workers=workers,
            device=named_devices(device),
            device_memory=device_memory,
            download=download,
            report=report,
        )
        planned = check_divisible(found)
    check_runnable(planned)
    stored = None if url is None else open_place(url)
    named = as_output(planned, out)
    assert isinstance(named, MergePlan)  # noqa: S101 - as it was
    job = part_job(
        named,
        out if stored is None else stored.local,
        stored=stored,
        part=part,
        parts=parts,
        overwrite=overwrite,
        resume=resume,
        byte_source=ByteSourceKind(byte_source),
    )
    finished = find_complete(named, out)
    if finished is not None:
        return finished
    try:
        return run_sheltered(job.run, on_progress or (lambda _: None))
    except OutputExistsError:
        # Another process may have put the output in place since this one looked.
        finished = find_complete(named, out)
        if finished is None:
            raise
        return finished


def check_part(part: int, parts: int) -> None:
    """Return if there is such a part.

    Raises:
        ValueError: There is not.
    """
    # Not isinstance: True is an int.
    if type(part) is not int or type(parts) is not int or not 1 <= part <= parts:
        raise ValueError(
            f"part: expected a number from 1 to that of all parts, got {part!r} of {parts!r}"
        )


def check_divisible(planned: MergePlan | CombinationPlan) -> MergePlan:
    """Return a plan that can be done in parts.

    Raises:
        RecipeError: It cannot.
    """
    if isinstance(planned, CombinationPlan):
        raise RecipeError(
            "the recipe combines adapters, which one process does in seconds; leave --part and --on out"
        )
    return planned


@dataclass(frozen=True, slots=True)
class PartJob:
    """A plan, which part of it is to be done, and the place for the result of all."""

    planned: MergePlan
    """What to do."""
    out: Path
    """The directory to make."""
    part: int
    """Which part, from 1; 0 for none, as of the process that hands them out."""
    parts: int
    """Of how many."""
    overwrite: bool
    """As for :func:`merge_part`."""
    resume: bool
    """As there."""
    opener: OpenByteSource
    """Opens an input file."""
    open_files: int
    """Files that the process has open for each input."""
    watch: Callable[[PartDirectory], None] = PartDirectory.check_current
    """Asked now and then; what it raises ends the work."""
    publishes: bool = True
    """Whether the output is put in place if this part is the last."""
    epoch: str | None = None
    """That of the merge that another process has begun; None to begin one where there is none."""
    sweep: SweepShare | None = None
    """What to do of a sweep over the model, in place of a part; None for a part."""
    stored: StoredPlace | None = None
    """The store to which the result goes from ``out``; None for nowhere, which is where it stays."""

    def divided(self) -> list[frozenset[int]]:
        """Return the tensors of each part, by index; to a store a part sends whole shards."""
        return divide(self.planned, self.parts, whole_shards=self.stored is not None)

    def run(self, on_progress: OnProgress) -> Manifest | None:
        """Do the part, and put the output in place if it is the last.

        Raises:
            StreamMergeError: What is done of the part stays for another attempt.
        """
        planned = self.planned
        divided = self.divided()
        own = divided[self.part - 1] if self.part else frozenset()
        files = len(planned.files) * self.open_files + len(shards_of(planned, own))
        allow_open_files(files)
        directory = self.directory(own)
        with ExitStack() as stack:
            sources = open_sources(planned, self.opener, stack)
            check_twins(planned, sources)
            stack.enter_context(directory)
            stack.enter_context(naming_errors(directory.partial))
            watched = _watched(directory, self.watch, on_progress)
            if self.sweep is not None:
                self._sweep(directory, sources, self.sweep, watched)
            elif not directory.is_done():
                sender = None
                if self.stored is not None:
                    if self.epoch is None:
                        # Else the process that hands out the parts has done so.
                        watched = announce(self.stored, directory, stack, watched, alone=False)
                    sender = stack.enter_context(
                        sending_part(planned, self.stored, directory, shards_of(planned, own))
                    )
                done = self._do(directory, sources, own, sender, watched)
                try:
                    check_unchanged(planned.files, sources)
                except CheckpointError:
                    # Nobody knows which version of an input the pieces are of.
                    directory.discard()
                    raise
                directory.finish(done)
        # Others let go of the directory before they look whether they were the last, too.
        return self._publish(directory, on_progress) if self.publishes else None

    def directory(self, own: frozenset[int]) -> PartDirectory:
        """Return the directory of the merge, for a part of these tensors."""
        planned = self.planned
        with naming_errors(self.out):
            return PartDirectory(
                self.out,
                part=self.part,
                parts=self.parts,
                inputs=[
                    *(Path(model.path) for model in planned.models),
                    *(file.path for file in planned.files),
                ],
                nbytes=(
                    planned.bytes_to_write if self.stored is None else room_on_the_way(planned)
                ),
                nbytes_beside=room_beside(planned),
                names=output_names(planned, form_of(self.out)),
                identity=identify(planned) | told(planned),
                overwrite=self.overwrite,
                resume=self.resume,
                wanted=own,
                numel=sum(planned.tasks[index].numel for index in own),
                check=entry_check(planned),
                epoch=self.epoch,
            )

    def _sweep(
        self,
        directory: PartDirectory,
        sources: list[ByteSource],
        sweep: SweepShare,
        on_progress: OnProgress,
    ) -> None:
        share = Share(frozenset(), directory.check_current)
        write_shards(
            self.planned, directory, sources, on_progress, resumed=True, share=share, sweep=sweep
        )
        try:
            check_unchanged(self.planned.files, sources)
        except CheckpointError:
            sweep.answers.unlink(missing_ok=True)
            raise

    def _do(
        self,
        directory: PartDirectory,
        sources: list[ByteSource],
        own: frozenset[int],
        sender: PartSender | None,
        on_progress: OnProgress,
    ) -> PartDone:
        planned = self.planned
        began = time.perf_counter()
        # Without tensors there is nothing to look for either, as a sweep over the model would.
        report, damaged = (
            write_shards(
                planned,
                directory,
                sources,
                on_progress,
                resumed=True,
                share=Share(own, directory.check_current),
                sender=sender,
            )
            if own
            else (None, 0)
        )
        if sender is not None:
            sender.settle()
        return PartDone(
            seconds=round(time.perf_counter() - began, 3),
            read=0 if report is None else report.bytes_by_stage["read"],
            written=0 if report is None else report.bytes_by_stage["write"],
            measured_memory=0 if report is None else report.peak_memory,
            memory_budget=planned.memory.budget,
            workers=planned.resources.workers,
            device="cpu" if planned.device is None else ",".join(planned.device.names),
            damaged=damaged,
        )

    def _publish(self, directory: PartDirectory, on_progress: OnProgress) -> Manifest | None:
        """Put the output in place if all parts are done and nobody else does it."""
        deadline = time.monotonic() + _PUBLISH_SECONDS
        while len(parts_done(directory.read_attempts(), self.parts)) == self.parts:
            try:
                return finish_parts(self, directory, on_progress)
            except BusyError:
                if time.monotonic() > deadline:
                    return None
            time.sleep(_RETRY_SECONDS)
        return None


def part_job(
    planned: MergePlan,
    out: Path,
    *,
    byte_source: ByteSourceKind,
    **options: Any,
) -> PartJob:
    """Return a job that reads its inputs in some way.

    Args:
        planned: What to do, with the files that ``out`` asks for.
        out: The directory to make.
        byte_source: How inputs are read.
        options: Other fields of :class:`PartJob`.
    """
    return PartJob(
        planned,
        out,
        opener=choose_byte_source(byte_source),
        open_files=byte_source.open_files,
        **options,
    )


def finish_parts(job: PartJob, directory: PartDirectory, on_progress: OnProgress) -> Manifest:
    """Put the output in place whose parts are all done.

    What lies where two parts meet in one file is read again, and made again if it is not what was
    written: of a page that processes on two machines write to, one may write back what it had read
    before the other wrote.

    Args:
        job: Any of the parts.
        directory: What they shared; closed.
        on_progress: Told how far the work is.

    Raises:
        StreamMergeError: As for :func:`streammerge.run.merge`; BusyError where a part still works.
    """
    planned = job.planned
    whole = MergeJob(
        planned,
        job.out,
        overwrite=directory.overwrite,
        resume=True,
        opener=job.opener,
        open_files=job.open_files,
    )
    if job.stored is not None:
        # Whose parts meet in no file.
        return publish_parts(whole, job.stored, directory.epoch, on_progress)
    seams = find_seams(planned, job.divided())

    def is_apart(piece: Piece) -> bool:
        return not is_near_seam(planned, seams, piece.task, piece.start, piece.numel)

    return replace(whole, vouched=is_apart).run(on_progress)


def _watched(
    directory: PartDirectory, watch: Callable[[PartDirectory], None], on_progress: OnProgress
) -> OnProgress:
    """Return what is told how far the work is, and asks now and then whether it is still wanted."""
    due = time.monotonic() + _SECONDS_BETWEEN_CHECKS

    def hear(event: ProgressEvent) -> None:
        nonlocal due
        if time.monotonic() >= due:
            watch(directory)
            due = time.monotonic() + _SECONDS_BETWEEN_CHECKS
        on_progress(event)

    return hear
