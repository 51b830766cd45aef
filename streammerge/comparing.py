"""Merges a sample of a model again and compares it with the files: proof that they are its result.

Memory: what the merge takes, and 8 MiB per writer.
"""

from __future__ import annotations

import io
import os
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from streammerge.checkpoint.bytesource import RemoteSource
from streammerge.checkpoint.journal import PieceDone
from streammerge.checkpoint.runs import Runs
from streammerge.engine.pipeline import RunReport
from streammerge.errors import OutputError
from streammerge.plan.chunking import Piece
from streammerge.plan.types import MergePlan
from streammerge.storage.objects import RemoteObject
from streammerge.units import format_size

_STEP = 8 << 20
"""Bytes compared at once; where files lie in a store, a request."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A piece that is not what the recipe gives."""

    tensor: str
    """Name of the tensor."""
    element: int
    """Flat index of the first element that differs."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of merging a sample again."""

    tensors: int
    """Tensors that were looked at, wholly or in part."""
    nbytes: int
    """Bytes of output that were compared."""
    differing: tuple[Difference, ...]
    """Where bits differ: the first element of each piece; empty when all is as it should be."""

    def lines(self) -> Iterator[str]:
        """Yield what a person wants to read."""
        for difference in self.differing:
            yield f"differs  {difference.tensor}: first at flat element {difference.element}"
        verdict = f"{len(self.differing)} pieces differ" if self.differing else "equal, bit by bit"
        yield f"merged again: {format_size(self.nbytes)} of {self.tensors} tensors: {verdict}"


def check_sample(*, fraction: float, seed: int | None) -> None:
    """Return if a sample can be chosen by these.

    Raises:
        ValueError: They are no part of a whole, or no seed.
    """
    # Not isinstance: True is an int.
    if type(fraction) not in (int, float) or not 0 < fraction <= 1:
        raise ValueError(f"fraction: expected a number above 0 and up to 1, got {fraction!r}")
    if seed is not None and type(seed) is not int:
        raise ValueError(f"seed: expected a whole number, got {seed!r}")


class Sample:
    """A random choice of pieces of a merge, at least one."""

    def __init__(self, plan: MergePlan, *, fraction: float, seed: int | None) -> None:
        """Prepare to choose.

        Args:
            plan: The merge.
            fraction: How many of the pieces to choose, in (0, 1].
            seed: Chooses the sample; None for another one each time.
        """
        self._fraction = fraction
        self._salt = random.SystemRandom().getrandbits(64) if seed is None else seed
        # However small the fraction, one tensor is merged, weighted by its size.
        chooser = random.Random(self._salt)  # noqa: S311 - nothing secret depends on it
        sizes = [task.numel for task in plan.tasks]
        self._always = chooser.choices(range(len(sizes)), sizes if any(sizes) else None)[0]

    def has(self, piece: Piece) -> bool:
        """Return whether a piece is in the sample; the same answer every time."""
        if piece.task == self._always and piece.start == 0:
            return True
        key = f"{self._salt} {piece.task} {piece.start}"
        return random.Random(key).random() < self._fraction  # noqa: S311 - as above


class ComparedFile:
    """Takes the bytes of a shard as an output file does, and compares them with those there."""

    def __init__(
        self, path: Path, nbytes: int, header: bytes, *, remote: RemoteObject | None = None
    ) -> None:
        """Open a shard.

        Args:
            path: The file.
            nbytes: The size that the plan gives it.
            header: The header that the plan gives it.
            remote: What it is in a store; None for a file on a disk.

        Raises:
            OutputError: It is not there, or laid out in another way.
            CheckpointError: The store does not give it.
        """
        self._path = path
        self._lock = threading.Lock()
        self.differing: list[tuple[PieceDone, int]] = []
        self._remote = None if remote is None else RemoteSource(remote)
        self._stream: BinaryIO = io.BytesIO()
        if remote is None:
            try:
                self._stream = path.open("rb")
            except OSError as error:
                raise OutputError(f"{path}: cannot be opened: {error.strerror}") from error
        found = os.fstat(self._stream.fileno()).st_size if remote is None else remote.nbytes
        if found != nbytes or self._read(0, len(header)) != header:
            self._stream.close()
            raise OutputError(
                f"{path}: has {found} bytes, or other tensors, than this recipe gives "
                f"({nbytes} bytes); it is the result of another one"
            )

    def write_at(
        self,
        offset: int,
        buffer: memoryview,
        pieces: Sequence[PieceDone] = (),
        *,
        runs: Runs | None = None,
        begin: int = 0,
    ) -> None:
        """Compare bytes, and remember the pieces that differ."""
        if runs is not None:
            self._compare_runs(offset, buffer, pieces[0], runs, begin)
            return
        # What lies in one extent is of one type.
        itemsize = len(buffer) // max(1, sum(piece.numel for piece in pieces))
        first = 0
        for piece in pieces:
            end = first + piece.numel * itemsize
            unequal = self._first_unequal(offset + first, buffer[first:end])
            if unequal is not None:
                self._remember(piece, unequal // itemsize)
            first = end

    def _compare_runs(
        self, offset: int, buffer: memoryview, piece: PieceDone, runs: Runs, begin: int
    ) -> None:
        """Compare one piece whose bytes lie in runs."""
        for place, low, high in runs.spans(begin, len(buffer)):
            unequal = self._first_unequal(offset + place, buffer[low:high])
            if unequal is not None:
                self._remember(piece, (low + unequal) // (len(buffer) // piece.numel))
                return

    def _remember(self, piece: PieceDone, element: int) -> None:
        with self._lock:
            self.differing.append((piece, piece.start + element))

    def _first_unequal(self, offset: int, expected: memoryview) -> int | None:
        """Return the index of the first byte that is not the file's; None when all are."""
        for begin in range(0, len(expected), _STEP):
            part = expected[begin : begin + _STEP]
            found = self._read(offset + begin, len(part))
            if found != part:
                unequal = np.frombuffer(found, np.uint8) != np.frombuffer(part, np.uint8)
                return begin + int(np.argmax(unequal))
        return None

    def _read(self, offset: int, nbytes: int) -> bytes:
        if self._remote is not None:
            content = bytearray(nbytes)
            self._remote.read_into(offset, memoryview(content))
            return bytes(content)
        with self._lock:
            self._stream.seek(offset)
            found = self._stream.read(nbytes)
        if len(found) != nbytes:
            raise OutputError(f"{self._path}: ends at byte {offset + len(found)}")
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()


def compare_results(
    plan: MergePlan, report: RunReport, outputs: Sequence[ComparedFile]
) -> Comparison:
    """Return what the files of a finished run came to."""
    differing = sorted(
        (plan.tasks[piece.task].name, element)
        for output in outputs
        for piece, element in output.differing
    )
    return Comparison(
        tensors=len(report.results),
        nbytes=report.bytes_by_stage["write"],
        differing=tuple(Difference(name, element) for name, element in differing),
    )
