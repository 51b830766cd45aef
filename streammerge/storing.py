"""A merge whose result goes to a store: its shards in parts as they are done, all else in the end.

What must outlive the process lies in a directory of this machine, and in the store: the journal, and what was
begun there. So a resume needs the store alone. A result is complete when it has its manifest, which comes last.
While a merge is at work an object says so, which no other merge writes over.

Memory: as any merge.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import TypeAdapter

from streammerge.assignment.types import Action
from streammerge.checkpoint.atwork import LOCK_NAME, STALE_SECONDS, is_busy, sign_of_life, signs
from streammerge.checkpoint.journal import JOURNAL_NAME, PieceDone, read_journal
from streammerge.checkpoint.manifest import (
    MANIFEST_VERSION,
    Manifest,
    digest_identity,
    read_manifest,
)
from streammerge.checkpoint.outputdir import check_same, has_work
from streammerge.checkpoint.outputfile import OutputFile
from streammerge.checkpoint.outputform import MANIFEST_NAME, form_of
from streammerge.checkpoint.places import UPLOADS_NAME, choose_place, is_own
from streammerge.checkpoint.storedjournal import (
    HEAD_NAME,
    StoredJournal,
    bring_uploads,
    is_journal,
    read_stored_head,
    remove_journal,
)
from streammerge.checkpoint.uploading import UploadedFile, Uploads, is_sent, read_uploads
from streammerge.engine.progress import OnProgress, ProgressEvent
from streammerge.errors import CheckpointError, OutputError, OutputExistsError, StreamMergeError
from streammerge.identity import identify
from streammerge.merging import MergeJob
from streammerge.plan.chunking import Piece
from streammerge.plan.types import MergePlan
from streammerge.storage.targets import Small, Target, open_target
from streammerge.storage.urls import check_url
from streammerge.units import GIB

SCRATCH_VARIABLE = "STREAMMERGE_SCRATCH"
"""Names the directory for what waits to be sent."""
_BEAT_SECONDS = 60.0
"""How often a merge says that it is still at work."""


def find_stored(planned: MergePlan, url: str) -> Manifest | None:
    """Return the manifest at an address if that is the complete result of this very merge; else None."""
    target = open_target(check_url(url))
    manifest = _read_manifest(target)
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
    shutil.rmtree(_scratch_of(url), ignore_errors=True)
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
    if form_of(Path(url)).file is not None:
        raise OutputError(
            f"{url}: is one file; name a folder, s3://bucket/folder, for a result in a store has its manifest "
            "beside it"
        )
    target = open_target(check_url(url))
    scratch = _scratch_of(url)
    try:
        scratch.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{scratch}: cannot be made: {error.strerror}; name another directory for what waits to be sent "
            f"by {SCRATCH_VARIABLE}"
        ) from error
    local = scratch / (Path(url).name or "result")
    sink = _StoreSink(planned, target, url, local, job.overwrite, job.resume)

    def run(on_progress: OnProgress) -> Manifest:
        sink.check()
        with sink.locked() as beat:

            def report(event: ProgressEvent) -> None:
                beat()
                sink.keep_up()
                on_progress(event)

            # What an earlier run has published here was on its way to the store.
            shutil.rmtree(local, ignore_errors=True)
            sink.take_up()
            manifest = MergeJob(
                planned,
                local,
                overwrite=job.overwrite,
                resume=job.resume,
                opener=job.opener,
                open_files=job.open_files,
                sink=sink,
            ).run(report)
        shutil.rmtree(scratch, ignore_errors=True)
        return manifest

    return run


def _scratch_of(url: str) -> Path:
    """Return the directory on this machine for a merge to an address."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = os.environ.get(SCRATCH_VARIABLE) or f"{caches}/streammerge/uploads"
    name = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    return Path(os.path.abspath(os.path.expanduser(root))) / name  # noqa: PTH100, PTH111 - no link is followed, no home is no error


def _read_manifest(target: Target) -> Manifest | None:
    """Return the manifest in a store; None without one that this version can read."""
    found = target.get(MANIFEST_NAME)
    if found is None:
        return None
    with TemporaryDirectory(prefix="streammerge-") as directory:
        (Path(directory) / MANIFEST_NAME).write_bytes(found.content)
        try:
            manifest = TypeAdapter(Manifest).validate_python(read_manifest(Path(directory)))
        except (CheckpointError, ValueError):
            return None
    return manifest if manifest.version == MANIFEST_VERSION else None


@dataclass
class _StoreSink:
    """Sends the files of one merge to a store; see :class:`streammerge.merging.Sink`."""

    planned: MergePlan
    target: Target
    url: str
    local: Path
    overwrite: bool
    resume: bool
    uploads: Uploads | None = None
    journal: StoredJournal | None = None
    old: Sequence[str] = ()
    """The files of an earlier merge that is replaced."""
    outdated: bool = False
    """Whether something of a journal is there, if that turns out to be another's."""
    announced: bool = False
    """Whether the store knows what its objects are of."""

    @property
    def partial(self) -> Path:
        """Where the result grows on this machine."""
        return choose_place(self.local).partial

    @property
    def room(self) -> int:
        """A gigabyte for what waits, or the whole where that is less or has to stay until the end."""
        whole = self.planned.bytes_to_write
        return (
            whole
            if any(map(self._stays, range(len(self.planned.layout.shards))))
            else min(whole, GIB)
        )

    def _stays(self, shard: int) -> bool:
        """Return whether a shard stays here until its digest is known: of tensors made in parts it is read."""
        tasks = self.planned.layout.shards[shard].tasks
        return any(self.planned.tasks[index].region is not None for index in tasks)

    def check(self) -> None:
        """Raise if the result may not go there."""
        listed = [each.name for each in self.target.list()]
        there = [name for name in listed if name != LOCK_NAME and not is_journal(name)]
        if LOCK_NAME in listed:
            self._refuse_busy(self.target.get(LOCK_NAME))
        head = read_stored_head(self.target, self.url) if self.resume else None
        here = read_journal(self.partial / JOURNAL_NAME) if self.partial.is_dir() else None
        self.outdated = any(map(is_journal, listed))
        before = head or here
        replaces = self.overwrite or (
            self.resume and before is not None and bool(before.identity.get("overwrite"))
        )
        if MANIFEST_NAME in there and not replaces:
            raise OutputExistsError(
                f"{self.url}: already holds a result; give --overwrite to replace it, or choose another place"
            )
        if HEAD_NAME in listed and not (self.resume or self.overwrite):
            raise OutputExistsError(
                f"{self.url}: holds an unfinished merge; give --resume to continue it, or --overwrite to start "
                "anew"
            )
        own = {None if head is None else head.token}
        if here is not None:
            own.add(read_uploads(self.partial / UPLOADS_NAME)[0])
        self._check_objects(there, own, replaces=replaces)

    def _check_objects(self, there: Sequence[str], own: set[str | None], *, replaces: bool) -> None:
        """Raise if an object is of nobody known, or of another merge that may not be replaced."""
        ours = {MANIFEST_NAME}
        if MANIFEST_NAME in there:
            manifest = _read_manifest(self.target)
            ours |= set() if manifest is None else manifest.files.keys()
        tokens = {name: self.target.token_of(name) for name in there if name not in ours}
        foreign = [name for name, token in tokens.items() if token is None]
        if foreign:
            raise OutputExistsError(
                f"{self.url}: holds {len(foreign)} object(s) that no merge lists ({', '.join(foreign[:3])}); "
                "they would be mixed with the result, move them away or choose another place"
            )
        if any(token not in own for token in tokens.values()) and not replaces:
            raise OutputExistsError(
                f"{self.url}: holds {len(tokens)} object(s) of a merge that did not end, and of which neither this "
                "machine nor the store has a journal; give --overwrite to replace them"
            )
        ours |= tokens.keys()
        self.old = [name for name in there if name in ours]

    def take_up(self) -> None:
        """Go on with what an earlier run has begun, here or on another machine; or begin."""
        head = read_stored_head(self.target, self.url) if self.resume else None
        here = read_journal(self.partial / JOURNAL_NAME) if self.resume else None
        token, begun = read_uploads(self.partial / UPLOADS_NAME) if here else (None, {})
        if head is None:
            token = token or secrets.token_hex(8)
        else:
            check_same(Path(self.url), head.identity, identify(self.planned))
            if token not in {None, head.token}:
                # Another machine has begun anew since: what lies here is of a merge that was given up.
                shutil.rmtree(self.partial, ignore_errors=True)
                begun = {}
            token = head.token
            bring_uploads(self.target, head, self.partial, begun)
        self.journal = StoredJournal(self.target, self.partial, token)
        self.uploads = Uploads(
            self.target,
            self.partial,
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
    def locked(self) -> Iterator[Callable[[], None]]:
        """Let no other merge write to the place; gives what says now and then that this one is at work."""
        sign = secrets.token_hex(8)
        version = self._lock(sign)
        signs.add(sign)
        last = time.monotonic()
        state = threading.Lock()

        def beat() -> None:
            nonlocal version, last
            with state:
                if time.monotonic() - last < _BEAT_SECONDS:
                    return
                last = time.monotonic()
                # Looked at as well: not all stores know the condition.
                found = self.target.get(LOCK_NAME)
                new = None
                if found is not None and found.version == version:
                    new = self.target.put(LOCK_NAME, sign_of_life(sign), instead_of=version)
                    # An answer that was lost is followed by one that the version is gone.
                    found = self.target.get(LOCK_NAME) if new is None else None
                if found is not None and found.content == sign_of_life(sign):
                    new = found.version
                if new is None:
                    raise OutputError(
                        f"{self.url}: another merge has begun to write there, because this one gave no sign for "
                        f"{STALE_SECONDS:.0f} s; this one ends here"
                    )
                version = new

        try:
            yield beat
        finally:
            signs.discard(sign)
            # Whoever comes next sees that it is over.
            with contextlib.suppress(StreamMergeError):
                self.target.delete(LOCK_NAME)

    def _lock(self, sign: str) -> str:
        version = self.target.put(LOCK_NAME, sign_of_life(sign), new=True)
        if version is not None:
            return version
        found = self.target.get(LOCK_NAME)
        self._refuse_busy(found)
        version = self.target.put(
            LOCK_NAME, sign_of_life(sign), instead_of=None if found is None else found.version
        )
        if version is None:
            raise OutputExistsError(f"{self.url}: another merge has begun there at this moment")
        return version

    def _refuse_busy(self, found: Small | None) -> None:
        """Raise if a sign of life is that of a merge at work."""
        if found is not None and is_busy(found):
            raise OutputExistsError(
                f"{self.url}: another merge is at work there, by a sign of {found.age:.0f} s ago; wait for it, or if "
                f"it was killed for {STALE_SECONDS - found.age:.0f} s"
            )

    @contextmanager
    def at_work(self, partial: Path) -> Iterator[None]:
        """Throw away what earlier runs have begun in the store and this one does not go on with."""
        assert self.uploads is not None  # noqa: S101 - taken up
        assert self.journal is not None  # noqa: S101 - taken up
        if self.outdated and not self.journal.brought:
            remove_journal(self.target)
        going_on = set(self.uploads.begun.items())
        for name, upload in self.target.uploads():
            if (name, upload) not in going_on:
                self.target.abort(name, upload)
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
                    self.target.abort(name, upload)
            remove_journal(self.target)

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
            self.target.delete(MANIFEST_NAME)

    def has(self, piece: Piece | PieceDone) -> bool:
        """Return whether the store has all bytes of a piece."""
        assert self.uploads is not None  # noqa: S101 - at work
        if piece.task >= len(self.planned.tasks):
            # Whoever can write to the store can write lines too.
            return False
        task = self.planned.tasks[piece.task]
        shard = self.planned.layout.shards[task.shard]
        size = task.dtype.itemsize
        begin, nbytes = piece.start * size, piece.numel * size
        spans = [(task.offset + begin, task.offset + begin + nbytes)]
        if task.runs is not None:
            spans = [
                (task.offset + place, task.offset + place + last - first)
                for place, first, last in task.runs.spans(begin, nbytes)
            ]
        if task.encoding is not None or task.action is Action.SCALES or task.region is not None:
            # Its scales, or the whole of it, are needed here again.
            return False
        return is_sent(self.uploads.known, shard.name, shard.nbytes, spans)

    def open(
        self,
        shard: int,
        path: Path,
        *,
        resumed: bool,
        on_durable: Callable[[Sequence[PieceDone]], None],
    ) -> OutputFile:
        """Open a shard on its way."""
        assert self.uploads is not None  # noqa: S101 - at work
        layout = self.planned.layout.shards[shard]
        return UploadedFile(
            path,
            layout.nbytes,
            name=layout.name,
            keep=layout.nbytes if self._stays(shard) else layout.header_nbytes,
            uploads=self.uploads,
            resumed=resumed,
            on_durable=on_durable,
        )

    def publish(self, partial: Path, manifest: Manifest) -> None:
        """Send all that is no shard, the manifest last."""
        assert self.uploads is not None  # noqa: S101 - at work
        self.uploads.settle()
        token = self.uploads.token
        shards = {each.name for each in self.planned.layout.shards}
        for name in self.old:
            if name not in manifest.files and name != MANIFEST_NAME:
                self.target.delete(name)
        for path in sorted(partial.rglob("*")):
            name = path.relative_to(partial).as_posix()
            if path.is_file() and name not in shards and name != MANIFEST_NAME and not is_own(name):
                self.target.put(name, path.read_bytes(), token=token)
        self.target.put(MANIFEST_NAME, (partial / MANIFEST_NAME).read_bytes(), token=token)
        remove_journal(self.target)
        # Such as were begun by requests whose answers were lost.
        for name, upload in self.target.uploads():
            self.target.abort(name, upload)
        for name in shards:
            # Nothing that has holes in the place of values may look like a result.
            (partial / name).unlink()
