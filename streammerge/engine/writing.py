"""The writer: puts finished bytes at their final place, in whatever order they come.

Memory: none of its own; the bytes stay in the buffer they were made in until they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streammerge.checkpoint.outputfile import OutputFile
from streammerge.engine.progress import Progress, Stage
from streammerge.engine.queues import WorkQueue


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes and where they go."""

    shard: int
    """Index of the output file."""
    offset: int
    """First byte in that file."""
    memory: memoryview
    """The bytes."""


@dataclass(frozen=True, slots=True)
class WriteJob:
    """What is written together, because it lies in one buffer."""

    extents: tuple[Extent, ...]
    """The bytes."""
    then: Callable[[], None]
    """Gives the buffer back."""


def run_writer(
    queue: WorkQueue[WriteJob], outputs: Sequence[OutputFile], progress: Progress
) -> None:
    """Write until the queue is closed; the body of every writer thread."""
    while True:
        with progress.spending(Stage.WRITER_IDLE):
            job = queue.take()
        if job is None:
            return
        with progress.spending(Stage.WRITE):
            for extent in job.extents:
                outputs[extent.shard].write_at(extent.offset, extent.memory)
                progress.count(Stage.WRITE, len(extent.memory))
        job.then()
