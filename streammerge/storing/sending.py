"""What sends the files of a merge to a store, whoever makes them: shards as they grow, all else in the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from streammerge.assignment.types import Action
from streammerge.checkpoint.journal import PieceDone
from streammerge.checkpoint.manifest import Manifest
from streammerge.checkpoint.outputfile import OutputFile
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.checkpoint.places import is_own
from streammerge.checkpoint.storedjournal import remove_journal
from streammerge.checkpoint.uploading import UploadedFile, Uploads, is_sent
from streammerge.plan.chunking import Piece
from streammerge.plan.types import MergePlan
from streammerge.storing.places import StoredPlace
from streammerge.units import GIB


@dataclass
class Sender:
    """Sends shards; see :class:`streammerge.merging.Sender`."""

    planned: MergePlan
    place: StoredPlace
    uploads: Uploads | None = None

    @property
    def room(self) -> int:
        """Bytes of disk that shards take on their way, at most as far as can be told."""
        return room_on_the_way(self.planned)

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
                (task.offset + at, task.offset + at + last - first)
                for at, first, last in task.runs.spans(begin, nbytes)
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
            keep=layout.nbytes if _stays(self.planned, shard) else layout.header_nbytes,
            uploads=self.uploads,
            resumed=resumed,
            on_durable=on_durable,
        )

    def abort_leftovers(self) -> None:
        """Throw away what earlier merges have begun in the store and this one does not go on with."""
        assert self.uploads is not None  # noqa: S101 - at work
        going_on = set(self.uploads.begun.items())
        for name, upload in self.place.target.uploads():
            if (name, upload) not in going_on:
                self.place.target.abort(name, upload)

    def send_rest(self, partial: Path, manifest: Manifest, old: Sequence[str]) -> None:
        """Send all that is no shard, the manifest last.

        Args:
            partial: Where the result grew.
            manifest: Of it.
            old: Objects of a result that is replaced.
        """
        assert self.uploads is not None  # noqa: S101 - at work
        self.uploads.settle()
        target, token = self.place.target, self.uploads.token
        shards = {each.name for each in self.planned.layout.shards}
        for name in old:
            if name not in manifest.files and name != MANIFEST_NAME:
                target.delete(name)
        for path in sorted(partial.rglob("*")):
            name = path.relative_to(partial).as_posix()
            if path.is_file() and name not in shards and name != MANIFEST_NAME and not is_own(name):
                target.put(name, path.read_bytes(), token=token)
        target.put(MANIFEST_NAME, (partial / MANIFEST_NAME).read_bytes(), token=token)
        remove_journal(target)
        # Such as were begun by requests whose answers were lost.
        for name, upload in target.uploads():
            target.abort(name, upload)
        for name in shards:
            # Nothing that has holes in the place of values may look like a result.
            (partial / name).unlink()


def room_on_the_way(planned: MergePlan) -> int:
    """Return a gigabyte for what waits, or the whole where that is less or has to stay until the end."""
    whole = planned.bytes_to_write
    stays = any(_stays(planned, shard) for shard in range(len(planned.layout.shards)))
    return whole if stays else min(whole, GIB)


def _stays(planned: MergePlan, shard: int) -> bool:
    """Return whether a shard stays here until its digest is known: of tensors made in parts it is read."""
    tasks = planned.layout.shards[shard].tasks
    return any(planned.tasks[index].region is not None for index in tasks)
