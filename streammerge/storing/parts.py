"""A merge by several processes whose result goes to a store: each sends whole shards, the last one all else.

    process 1: shards 1, 2 ─▶ store     journals, uploads ┐
    process 2: shards 3, 4 ─▶ store     journals, uploads ┼─▶ whichever is last: configuration, manifest
    process 3: shards 5, 6 ─▶ store     journals, uploads ┘

What they know of each other lies in a directory that all of them see (:mod:`streammerge.storing.places`): some
kilobytes for each shard, and what waits to be sent. Objects are marked by the epoch of the merge. What waits
lies in files of each process alone, since one that was given up may live on, and cut out what it has sent.

Memory: as any merge.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path

from streammerge.checkpoint.atwork import LOCK_NAME
from streammerge.checkpoint.journal import PieceDone
from streammerge.checkpoint.manifest import Manifest
from streammerge.checkpoint.outputfile import OutputFile
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.checkpoint.partdir import PartDirectory
from streammerge.checkpoint.places import waiting_name
from streammerge.checkpoint.sidecars import make_folder
from streammerge.checkpoint.storedjournal import HEAD_NAME, is_journal
from streammerge.checkpoint.uploading import Uploads, attempt_uploads_name
from streammerge.engine.progress import OnProgress
from streammerge.errors import BusyError, OutputError, OutputExistsError
from streammerge.merging import MergeJob
from streammerge.plan.chunking import Piece
from streammerge.plan.types import MergePlan
from streammerge.storing.permitting import check_objects
from streammerge.storing.places import StoredPlace
from streammerge.storing.sending import Sender
from streammerge.storing.working import AtWork


def announce(
    place: StoredPlace,
    directory: PartDirectory,
    stack: ExitStack,
    on_progress: OnProgress,
    *,
    alone: bool,
) -> OnProgress:
    """Let no other merge write to a place while parts of one are done, until a stack ends.

    Args:
        place: Where their result goes.
        directory: What they share, open.
        stack: Ends it.
        on_progress: Told how far the work is.
        alone: Whether this process gives the sign for all of them.

    Returns:
        What is to be told instead.

    Raises:
        OutputError: Objects cannot be marked there.
        OutputExistsError: There is something else.
    """

    def leaves() -> bool:
        # Of those that are done their locks are gone.
        return alone or not any(
            each.is_alive()
            for each in directory.read_attempts()
            if directory.attempt not in each.path.name
        )

    sign = stack.enter_context(
        AtWork(place.target, place.url, directory.epoch, shared=True, leaves=leaves)
    )
    found = place.target.get(LOCK_NAME)
    if found is not None and found.token is None:
        raise OutputError(
            f"{place.url}: the store keeps no metadata with objects, by which the processes that do a part each "
            "tell theirs from others; merge by one process, without --part or --on"
        )
    _check_place(place, directory.epoch, overwrite=directory.overwrite)
    return sign.hearing(on_progress)


def _check_place(place: StoredPlace, epoch: str, *, overwrite: bool) -> list[str]:
    """Return the objects at a place that a merge in parts replaces; raise if there is something else."""
    listed = [each.name for each in place.target.list()]
    if HEAD_NAME in listed and not overwrite:
        raise OutputExistsError(
            f"{place.url}: holds an unfinished merge by one process; finish it with --resume and without --part "
            "or --on, or give --overwrite to start anew"
        )
    there = [name for name in listed if name != LOCK_NAME and not is_journal(name)]
    return check_objects(place, there, {epoch}, replaces=overwrite)


@contextmanager
def sending_part(
    planned: MergePlan, place: StoredPlace, directory: PartDirectory, shards: frozenset[int]
) -> Iterator[PartSender]:
    """Send the shards of one part, by index, while it is done."""
    sender = PartSender(planned, place, directory=directory)
    sender.begin(shards)
    assert sender.uploads is not None  # noqa: S101 - begun
    try:
        yield sender
    finally:
        sender.uploads.stop()


@dataclass
class PartSender(Sender):
    """Sends shards of which this process makes everything; see :class:`streammerge.merging.Sender`."""

    _: KW_ONLY
    directory: PartDirectory
    _waiting: dict[int, Path] = field(default_factory=dict)
    _announced: bool = False

    def begin(self, shards: frozenset[int]) -> None:
        """Ask the store what it has of some shards, by index."""
        directory = self.directory
        self.uploads = Uploads(
            self.place.target,
            directory.partial,
            directory.epoch,
            name=attempt_uploads_name(directory.epoch, directory.attempt),
            before_complete=self._announce,
        )
        layout = self.planned.layout.shards
        self.uploads.recover({layout[index].name: layout[index].nbytes for index in shards})

    def open(
        self,
        shard: int,
        path: Path,  # noqa: ARG002 - another process may be at that
        *,
        resumed: bool,  # noqa: ARG002 - nothing of others is gone on with
        on_durable: Callable[[Sequence[PieceDone]], None],
    ) -> OutputFile:
        """Open a shard on its way, in a file of this process alone."""
        directory = self.directory
        own = directory.partial / waiting_name(directory.epoch, directory.attempt, shard)
        self._waiting[shard] = own
        return super().open(shard, own, resumed=False, on_durable=on_durable)

    def settle(self) -> None:
        """Wait until the store has all that was opened.

        Raises:
            StreamMergeError: The store refuses, or the merge was given up.
        """
        assert self.uploads is not None  # noqa: S101 - begun
        self.uploads.settle()
        self.directory.check_current()
        for shard, own in self._waiting.items():
            name = self.planned.layout.shards[shard].name
            place = self.directory.partial / name
            make_folder(place.parent)
            own.replace(place)
        self._waiting.clear()

    def _announce(self) -> None:
        self.directory.check_current()
        if self._announced:
            return
        self._announced = True
        earlier = self.place.target.get(MANIFEST_NAME)
        if earlier is not None and earlier.token != self.directory.epoch:
            # Until the new one is, there is no complete result.
            self.place.target.delete(MANIFEST_NAME)


@dataclass
class LastSender(Sender):
    """Sends what is no shard; see :class:`streammerge.merging.Sink`."""

    _: KW_ONLY
    epoch: str
    old: Sequence[str]
    """Objects of a result that is replaced."""

    @contextmanager
    def at_work(self, partial: Path) -> Iterator[None]:
        """Find what the parts have sent, and throw away what nobody goes on with."""
        self.uploads = Uploads(self.place.target, partial, self.epoch)
        self.uploads.recover({each.name: each.nbytes for each in self.planned.layout.shards})
        self.abort_leftovers()
        try:
            yield
        finally:
            self.uploads.stop()

    def has(self, piece: Piece | PieceDone) -> bool:
        """Return whether the store has all bytes of a piece."""
        assert self.uploads is not None  # noqa: S101 - at work
        task = self.planned.tasks[piece.task]
        known = self.uploads.known.get(self.planned.layout.shards[task.shard].name)
        if known is not None and not known.upload:
            # The object is complete; of tensors in parts the digest is found by reading what stayed here.
            return task.region is None
        return super().has(piece)

    def publish(self, partial: Path, manifest: Manifest) -> None:
        """Send all that is no shard."""
        self.send_rest(partial, manifest, self.old)


def publish_parts(
    job: MergeJob, place: StoredPlace, epoch: str, on_progress: OnProgress
) -> Manifest:
    """Send what is left of a merge whose parts are all done.

    Args:
        job: The merge.
        place: Where its result goes.
        epoch: Of the merge.
        on_progress: Told how far the work is.

    Raises:
        StreamMergeError: As for :func:`streammerge.run.merge`; BusyError where a part still works.
    """
    planned = job.planned
    assert isinstance(planned, MergePlan)  # noqa: S101 - nothing else is done in parts
    busy = False
    with AtWork(place.target, place.url, epoch, shared=True, leaves=lambda: not busy) as sign:
        old = _check_place(place, epoch, overwrite=job.overwrite)
        sender = LastSender(planned, place, epoch=epoch, old=old)
        try:
            manifest = replace(job, out=place.local, sink=sender, vouched=sender.has).run(
                sign.hearing(on_progress)
            )
        except BusyError:
            # Somebody else does it, or a part works on.
            busy = True
            raise
    with contextlib.suppress(OSError):
        shutil.rmtree(place.scratch)
    return manifest
