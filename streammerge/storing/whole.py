"""A merge by one process whose result goes to a store: its shards in parts as they are done, all else in the end.

What must outlive the process lies in a directory of this machine, and in the store: the journal, and what was
begun there. So a resume needs the store alone. A result is complete when it has its manifest, which comes last.

Memory: as any merge.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from streammerge.checkpoint.atwork import LOCK_NAME, is_busy
from streammerge.checkpoint.journal import JOURNAL_NAME, Found, read_journal
from streammerge.checkpoint.manifest import Manifest, digest_identity
from streammerge.checkpoint.outputdir import check_same, has_work
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.checkpoint.places import UPLOADS_NAME
from streammerge.checkpoint.scratch import scratch_of
from streammerge.checkpoint.storedjournal import (
    HEAD_NAME,
    StoredJournal,
    bring_uploads,
    is_journal,
    read_stored_head,
    remove_journal,
)
from streammerge.checkpoint.uploading import Uploads, begun_by_any, read_uploads
from streammerge.engine.progress import OnProgress, ProgressEvent
from streammerge.errors import OutputError, OutputExistsError, StreamMergeError
from streammerge.identity import identify, told
from streammerge.merging import MergeJob
from streammerge.plan.types import MergePlan
from streammerge.storage.targets import open_target
from streammerge.storage.urls import check_url
from streammerge.storing.permitting import check_objects, manifest_at
from streammerge.storing.places import open_place
from streammerge.storing.sending import Sender
from streammerge.storing.working import AtWork, refuse_busy


def find_stored(planned: MergePlan, url: str) -> Manifest | None:
    """Return the manifest at an address if that is the complete result of this very merge; else None."""
    target = open_target(check_url(url))
    manifest = manifest_at(target)
    if manifest is None or manifest.run.identity != digest_identity(identify(planned)):
        return None
    there = {each.name: each.object.nbytes for each in target.list()}
    listed = {name: file.nbytes for name, file in manifest.files.items()}
    if any(there.get(name) != nbytes for name, nbytes in listed.items()):
        return None
    lock = target.get(LOCK_NAME) if LOCK_NAME in there else None
    if not is_busy(lock):
        # What was killed behind its last step.
        if any(map(is_journal, there)):
            remove_journal(target)
        if lock is not None:
            target.delete(LOCK_NAME)
        shutil.rmtree(scratch_of(url), ignore_errors=True)
    return manifest


def store_job(job: MergeJob, url: str) -> Callable[[OnProgress], Manifest]:
    """Return what merges to an address.

    Args:
        job: The merge; its ``out`` is of no matter.
        url: ``s3://bucket/folder``.

    Raises:
        OutputError: Nothing can be written there.
        OutputExistsError: There is something else.
    """
    planned = job.planned
    if not isinstance(planned, MergePlan):
        raise OutputError(
            f"{url}: adapters are combined to a directory on a disk, in seconds; copy it there"
        )
    place = open_place(url)
    sender = WholeSender(planned, place, overwrite=job.overwrite, resume=job.resume)

    def run(on_progress: OnProgress) -> Manifest:
        sender.check()
        with AtWork(place.target, url, secrets.token_hex(8)) as at_work:

            def report(event: ProgressEvent) -> None:
                sender.keep_up()
                on_progress(event)

            # What an earlier run has published here was on its way to the store.
            shutil.rmtree(place.local, ignore_errors=True)
            sender.take_up()
            manifest = replace(job, out=place.local, sink=sender).run(at_work.hearing(report))
        shutil.rmtree(place.scratch, ignore_errors=True)
        return manifest

    return run


@dataclass
class WholeSender(Sender):
    """Sends the files of one merge to a store; see :class:`streammerge.merging.Sink`."""

    _: KW_ONLY
    overwrite: bool
    resume: bool
    journal: StoredJournal | None = None
    old: Sequence[str] = ()
    """The files of an earlier merge that is replaced."""
    outdated: bool = False
    """Whether something of a journal is there, if that turns out to be another's."""
    announced: bool = False
    """Whether the store knows what its objects are of."""

    def check(self) -> None:
        """Raise if the result may not go there."""
        place = self.place
        listed = [each.name for each in place.target.list()]
        there = [name for name in listed if name != LOCK_NAME and not is_journal(name)]
        if LOCK_NAME in listed:
            refuse_busy(place.target.get(LOCK_NAME), place.url)
        head = read_stored_head(place.target, place.url) if self.resume else None
        here = read_journal(place.partial / JOURNAL_NAME) if place.partial.is_dir() else None
        self.outdated = any(map(is_journal, listed))
        before = head or here
        replaces = self.overwrite or (
            self.resume and before is not None and bool(before.identity.get("overwrite"))
        )
        if HEAD_NAME in listed and not (self.resume or self.overwrite):
            raise OutputExistsError(
                f"{place.url}: holds an unfinished merge; give --resume to continue it, or --overwrite to start "
                "anew"
            )
        own = {None if head is None else head.token, token_here(place.partial, here)}
        self.old = check_objects(place, there, own, replaces=replaces)

    def take_up(self) -> None:
        """Go on with what an earlier run has begun, here or on another machine; or begin."""
        target, partial = self.place.target, self.place.partial
        head = read_stored_head(target, self.place.url) if self.resume else None
        here = read_journal(partial / JOURNAL_NAME) if self.resume else None
        token = token_here(partial, here)
        begun = read_uploads(partial / UPLOADS_NAME)[1] if here else {}
        if head is None:
            token = token or secrets.token_hex(8)
        else:
            check_same(
                Path(self.place.url), head.identity, identify(self.planned) | told(self.planned)
            )
            if token not in {None, head.token}:
                # Another machine has begun anew since: what lies here is of a merge that was given up.
                shutil.rmtree(partial, ignore_errors=True)
                begun = {}
            token = head.token
            bring_uploads(target, head, partial, begun)
        self.journal = StoredJournal(target, partial, token)
        self.uploads = Uploads(
            target,
            partial,
            token,
            before_complete=self._announce,
            while_waiting=self.journal.keep_up,
        )
        if here is not None or head is not None:
            self.uploads.recover({s.name: s.nbytes for s in self.planned.layout.shards})
        if head is not None:
            self.journal.bring(head, self.has)

    def keep_up(self) -> None:
        """Let another machine go on from about here, should this one not."""
        assert self.journal is not None  # noqa: S101 - taken up
        self.journal.keep_up()

    @contextmanager
    def at_work(self, partial: Path) -> Iterator[None]:
        """Throw away what earlier runs have begun in the store and this one does not go on with."""
        assert self.uploads is not None  # noqa: S101 - taken up
        assert self.journal is not None  # noqa: S101 - taken up
        if self.outdated and not self.journal.brought:
            remove_journal(self.place.target)
        self.abort_leftovers()
        try:
            yield
        except BaseException:
            self.uploads.stop()
            self._leave(partial)
            raise
        self.uploads.stop()

    def _leave(self, partial: Path) -> None:
        """Keep what a resume could go on from, and nothing else."""
        assert self.uploads is not None  # noqa: S101 - taken up
        assert self.journal is not None  # noqa: S101 - taken up
        journal = read_journal(partial / JOURNAL_NAME)
        if self.announced or (journal is not None and has_work(partial, journal)):
            # What ended it may be that the store cannot be reached.
            with contextlib.suppress(StreamMergeError):
                self.journal.save()
            return
        with contextlib.suppress(StreamMergeError):
            for name, upload in self.uploads.begun.items():
                if upload:
                    self.place.target.abort(name, upload)
            remove_journal(self.place.target)

    def _announce(self) -> None:
        """Let no object be complete of which nobody knows what it is of."""
        assert self.journal is not None  # noqa: S101 - taken up
        if self.announced:
            self.journal.keep_up()
            return
        self.announced = True
        self.journal.save(whatever=True)
        if self.old:
            # Until the new one is, there is no complete result.
            self.place.target.delete(MANIFEST_NAME)

    def publish(self, partial: Path, manifest: Manifest) -> None:
        """Send all that is no shard."""
        self.send_rest(partial, manifest, self.old)


def token_here(partial: Path, found: Found | None) -> str | None:
    """Return the token of the objects of a merge that this machine knows; None where it has begun none.

    Args:
        partial: Where it grows.
        found: Its journal.
    """
    if found is None:
        return None
    token, _ = read_uploads(partial / UPLOADS_NAME)
    epoch = found.identity.get("epoch")
    if token is None and isinstance(epoch, str) and begun_by_any(partial, epoch):
        # Processes that did a part each.
        token = epoch
    return token
