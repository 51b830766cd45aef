"""Output files that go to a store part by part, as soon as all bytes of a part are there.

Pieces come in any order, so each file has a place on a disk for what waits for its neighbours: a sparse
file, of which a part that was sent is cut out again. Memory: none of its own; boto3 reads what it sends.

A piece is done when every part that has some of it has been sent. What the journal says is done after a
crash is what the store has: it is asked.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from streammerge.checkpoint.journal import PieceDone
from streammerge.checkpoint.outputfile import OnDurable, OutputFile, write_durably
from streammerge.checkpoint.ownfiles import read_own
from streammerge.checkpoint.places import UPLOADS_NAME, is_own
from streammerge.checkpoint.runs import Runs
from streammerge.errors import OutputError, ResumeError
from streammerge.storage.targets import Slice, Target, part_nbytes

_AT_ONCE = 8
"""Parts that are sent at the same time."""
_WAITING = 16
"""Parts that are complete and not sent yet, at most: then whoever writes waits."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of the object of a file that was begun before."""

    upload: str
    """The upload; empty for an object that is complete."""
    parts: Mapping[int, str]
    """The parts that have come, with their versions."""


@dataclass
class Uploads:
    """The objects of one merge; used by all writing threads."""

    target: Target
    """Where they go."""
    place: Path
    """The directory of the unfinished merge."""
    token: str
    """What marks the objects of this merge, whichever attempt makes them."""
    name: str = UPLOADS_NAME
    """The file there that says what was begun; of each process that does a part its own."""
    begun: dict[str, str] = field(default_factory=dict)
    """The upload of each file that was begun."""
    known: dict[str, Known] = field(default_factory=dict)
    """What the store has of them."""
    before_complete: Callable[[], None] = lambda: None
    """Called before an object becomes complete, by the thread that closes files."""
    while_waiting: Callable[[], None] = lambda: None
    """Called by that thread while it waits for parts."""

    def __post_init__(self) -> None:
        """Make what sends."""
        self._lock = threading.Lock()
        self._completing: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="streammerge-upload")
        self._room = threading.Semaphore(_AT_ONCE + _WAITING)

    def recover(self, shards: Mapping[str, int]) -> None:
        """Ask the store what it has of what an earlier run began.

        Args:
            shards: The files by name, with their sizes.

        Raises:
            ResumeError: What the earlier run has left cannot be read.
        """
        for name, uploads in begun_by_any(self.place, self.token).items():
            if name not in shards:
                continue
            sizes = dict(_parts_of(shards[name]))
            # Several where a process was given up: whichever has most.
            known = max(
                (self._look_at(name, upload, sizes) for upload in uploads if upload),
                key=lambda each: -1 if each is None else len(each.parts),
                default=None,
            )
            if known is not None:
                self.begun[name] = known.upload
                self.known[name] = known
            elif self.target.token_of(name) == self.token:
                self.begun[name] = ""
                self.known[name] = Known("", dict.fromkeys(sizes, ""))

    def _look_at(self, name: str, upload: str, sizes: Mapping[int, int]) -> Known | None:
        """Return what has come of an upload; None if it is over."""
        parts = self.target.parts(name, upload)
        if parts is None:
            return None
        # Cut in another way, they would not be the parts that are missing.
        fit = {
            number: part.version
            for number, part in parts.items()
            if part.nbytes == sizes.get(number)
        }
        return Known(upload, fit)

    def upload_of(self, name: str) -> str:
        """Return the upload of a file, begun now if it was not; empty for one that is complete."""
        with self._lock:
            if name not in self.begun:
                self.begun[name] = self.target.begin(name, self.token)
                said = write_uploads(self.token, self.begun)
                write_durably(self.place / self.name, [said], alone=self.name == UPLOADS_NAME)
            return self.begun[name]

    def send(
        self, name: str, number: int, part: Slice, sent: Callable[[str], None]
    ) -> Future[None]:
        """Send a part on a thread of its own; wait while too many others wait.

        Args:
            name: The file.
            number: The part's number, from 1.
            part: Where its bytes are.
            sent: Told its version, on that thread.
        """
        self._room.acquire()

        def work() -> None:
            try:
                sent(self.target.put_part(name, self.upload_of(name), number, part))
            finally:
                self._room.release()

        try:
            return self._pool.submit(work)
        except RuntimeError:
            self._room.release()
            raise

    def complete(self, name: str, parts: Mapping[int, str]) -> None:
        """Begin to make the object of a file of its parts, unless it is complete.

        Stores take seconds for large ones, so that many are made at once.
        """
        upload = self.upload_of(name)
        if not upload:
            return
        self.before_complete()
        self._completing.append(self._pool.submit(self._complete, name, upload, parts))

    def _complete(self, name: str, upload: str, parts: Mapping[int, str]) -> None:
        if (
            not self.target.complete(name, upload, parts)
            and self.target.token_of(name) != self.token
        ):
            raise OutputError(
                f"{name}: the store has lost what was uploaded of it; --resume sends it again"
            )
        # Or the answer was lost, and not the object.
        self.begun[name] = ""

    def settle(self) -> None:
        """Wait until all objects are complete that were to be.

        Raises:
            CheckpointError: The store refuses.
            OutputError: It has lost what was sent.
        """
        while self._completing:
            self._completing.pop(0).result()
            self.while_waiting()

    def stop(self) -> None:
        """Send what is being sent, and nothing more."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def attempt_uploads_name(epoch: str, attempt: str) -> str:
    """Return the name of the file that says what one of several processes has begun."""
    return f"{UPLOADS_NAME}-{epoch}-{attempt}"


def read_uploads(path: Path) -> tuple[str | None, dict[str, str]]:
    """Return the token of an unfinished merge and its uploads by file; nothing where it has begun none.

    Raises:
        ResumeError: The file is not what such files are.
    """
    try:
        content = read_own(path)
    except FileNotFoundError:
        return None, {}
    except OSError as error:
        raise ResumeError(f"{path}: cannot be read: {error.strerror}") from error
    found = parse_uploads(content)
    if found is None:
        raise ResumeError(
            f"{path}: does not say what was begun in the store; give --overwrite to start anew"
        )
    return found


def begun_by_any(place: Path, token: str) -> dict[str, list[str]]:
    """Return what one process, or several that did a part each, have begun of a merge, by file.

    Args:
        place: The directory of the unfinished merge.
        token: Of its objects.

    Raises:
        ResumeError: As :func:`read_uploads`.
    """
    begun: dict[str, list[str]] = {}
    for path in sorted(place.glob(f"{UPLOADS_NAME}*")):
        if not is_own(path.name) or path.name.endswith(".new"):
            continue
        said, uploads = read_uploads(path)
        for name, upload in uploads.items() if said == token else ():
            begun.setdefault(name, []).append(upload)
    return begun


def write_uploads(token: str, uploads: Mapping[str, str]) -> bytes:
    """Return what :func:`parse_uploads` reads."""
    return json.dumps({"token": token, "uploads": uploads}).encode()


def parse_uploads(content: bytes) -> tuple[str, dict[str, str]] | None:
    """Return the token of an unfinished merge and its uploads by file; None of what says something else."""
    try:
        said: Any = json.loads(content)
        return str(said["token"]), {str(k): str(v) for k, v in said["uploads"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _parts_of(nbytes: int) -> list[tuple[int, int]]:
    """Return numbers and sizes of the parts of a file of some bytes."""
    size = part_nbytes(nbytes)
    return [
        (number, min(size, nbytes - (number - 1) * size))
        for number in range(1, -(-nbytes // size) + 1)
    ]


class UploadedFile(OutputFile):
    """One file that becomes an object."""

    def __init__(
        self,
        path: Path,
        nbytes: int,
        *,
        name: str,
        keep: int,
        uploads: Uploads,
        resumed: bool,
        on_durable: OnDurable,
    ) -> None:
        """Make the place for what waits.

        Args:
            path: Where.
            nbytes: Size of the file.
            name: The object.
            keep: Bytes at the beginning that stay here.
            uploads: Sends parts.
            resumed: Whether there may be such a place already.
            on_durable: Told which pieces the store has.
        """
        super().__init__(path, nbytes, resumed=resumed, shared=True, on_durable=on_durable)
        self._name = name
        self._keep = keep
        self._uploads = uploads
        self._size = part_nbytes(nbytes)
        known = uploads.known.get(name)
        self._sent: dict[int, str] = {} if known is None else dict(known.parts)
        self._missing = {
            number: size for number, size in _parts_of(nbytes) if number not in self._sent
        }
        self._pieces: list[tuple[set[int], Sequence[PieceDone]]] = []
        self._state = threading.Lock()
        self._futures: list[Future[None]] = []

    def write_at(
        self,
        offset: int,
        buffer: memoryview,
        pieces: Sequence[PieceDone] = (),
        *,
        runs: Runs | None = None,
        begin: int = 0,
    ) -> None:
        """Write bytes to their place, and send the parts that they complete."""
        self._raise_failure()
        super().write_at(offset, buffer, runs=runs, begin=begin)
        spans = ((0, 0, len(buffer)),) if runs is None else runs.spans(begin, len(buffer))
        counts: dict[int, int] = {}
        for place, first, end in spans:
            self._count(offset + place, end - first, counts)
        complete: list[int] = []
        with self._state:
            open_parts = counts.keys() - self._sent.keys()
            for number in open_parts:
                self._missing[number] -= counts[number]
                if self._missing[number] == 0:
                    complete.append(number)
            if open_parts and pieces:
                self._pieces.append((set(open_parts), pieces))
        if pieces and not open_parts:
            self._on_durable(pieces)
        for number in complete:
            begins = (number - 1) * self._size
            part = Slice(self._path, begins, min(self._size, self._nbytes - begins))
            future = self._uploads.send(self._name, number, part, self._hear(number))
            with self._state:
                self._futures.append(future)

    def _count(self, offset: int, nbytes: int, counts: dict[int, int]) -> None:
        """Add how many bytes of a range lie in each part."""
        end = offset + nbytes
        while offset < end:
            number = offset // self._size + 1
            inside = min(end, number * self._size) - offset
            counts[number] = counts.get(number, 0) + inside
            offset += inside

    def _hear(self, number: int) -> Callable[[str], None]:
        def sent(version: str) -> None:
            done: list[PieceDone] = []
            with self._state:
                self._sent[number] = version
                for parts, pieces in self._pieces:
                    parts.discard(number)
                    if not parts:
                        done += pieces
                self._pieces = [each for each in self._pieces if each[0]]
            begins = max(self._keep, (number - 1) * self._size)
            cut_out(self._fd, begins, min(self._nbytes, number * self._size) - begins)
            self._on_durable(done)

        return sent

    def _raise_failure(self) -> None:
        with self._state:
            over = [each for each in self._futures if each.done()]
            self._futures = [each for each in self._futures if not each.done()]
        for each in over:
            each.result()

    def sync(self) -> None:
        """Nothing here has to outlive the process."""

    def close(self) -> None:
        """Wait until all parts are sent, and begin to make the object of them.

        Raises:
            OutputError: A part is missing.
            CheckpointError: The store refuses.
        """
        try:
            while self._futures:
                self._futures[0].result()
                self._uploads.while_waiting()
                self._raise_failure()
            if any(self._missing[number] for number in self._missing.keys() - self._sent.keys()):
                raise OutputError(f"{self._path}: not all of its bytes were written")
            self._uploads.complete(self._name, self._sent)
        finally:
            self._let_go()

    def abandon(self) -> None:
        """Let what is being sent arrive, and close; the merge has failed already."""
        self._let_go()

    def _let_go(self) -> None:
        """Close the file, once nobody sends of it any more: its number may then be another file's."""
        with self._state:
            futures = list(self._futures)
        for each in futures:
            each.cancel()
        for each in futures:
            with contextlib.suppress(BaseException):
                each.result()
        with contextlib.suppress(OSError):
            os.close(self._fd)


def is_sent(
    known: Mapping[str, Known], name: str, nbytes: int, spans: Sequence[tuple[int, int]]
) -> bool:
    """Return whether a store has all bytes of some ranges of a file.

    Args:
        known: What it has.
        name: The file.
        nbytes: Its size.
        spans: First bytes, and those behind the last.
    """
    found = known.get(name)
    if found is None:
        return False
    size = part_nbytes(nbytes)
    return all(
        number in found.parts
        for begin, end in spans
        if begin < end
        for number in range(begin // size + 1, (end - 1) // size + 2)
    )


_PUNCH = 0x02 | 0x01
"""FALLOC_FL_PUNCH_HOLE and FALLOC_FL_KEEP_SIZE of Linux."""


@cache
def _fallocate() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    try:
        found = library.fallocate64
    except AttributeError:
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return found


def cut_out(descriptor: int, offset: int, nbytes: int) -> None:
    """Give the room of some bytes of a file back to the disk, where the system can."""
    punch = _fallocate()
    if punch is not None and nbytes > 0:
        # It saves room, and where it fails none is saved.
        punch(descriptor, _PUNCH, offset, nbytes)
