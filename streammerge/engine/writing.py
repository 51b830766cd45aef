"""The writer: puts finished bytes at their final place, in whatever order they come.

Memory: none of its own; the bytes stay in the buffer they were made in until they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from streammerge.checkpoint.digests import LEAF_ELEMENTS, leaf_digests
from streammerge.checkpoint.journal import PieceDone
from streammerge.checkpoint.runs import Runs
from streammerge.engine.device import Applied
from streammerge.engine.pieces import Part
from streammerge.engine.progress import Progress, Stage
from streammerge.engine.queues import WorkQueue
from streammerge.engine.results import Results
from streammerge.statistics.rounds import Found
from streammerge.statistics.surveying import Surveyed, fields_of


class Output(Protocol):
    """Where the bytes of one shard go."""

    def write_at(
        self,
        offset: int,
        buffer: memoryview,
        pieces: Sequence[PieceDone] = (),
        *,
        runs: Runs | None = None,
        begin: int = 0,
    ) -> None:
        """Take bytes at an offset of the file, and what they are; they may lie in runs."""
        ...


@dataclass(frozen=True, slots=True)
class Claim:
    """A part of a tensor in an extent; its record is written once the bytes are durable."""

    part: Part
    """What it is."""
    applied: Applied
    """What merging it came to."""
    found: Found
    """The statistics it was merged with."""
    begin: int
    """First byte in the extent."""
    end: int
    """End in the extent."""
    surveyed: Surveyed | None = None
    """What a report knows of it; None without one."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes and where they go."""

    shard: int
    """Index of the output file."""
    offset: int
    """First byte in that file."""
    memory: memoryview
    """The bytes."""
    claims: tuple[Claim, ...]
    """The parts of tensors that they are."""
    runs: Runs | None = None
    """How they lie in the file, from the offset on; None for side by side."""
    begin: int = 0
    """With runs, the first byte in the range that lies in them."""


@dataclass(frozen=True, slots=True)
class WriteJob:
    """What is written together, because it lies in one buffer."""

    extents: tuple[Extent, ...]
    """The bytes."""
    then: Callable[[], None]
    """Gives the buffer back."""


def run_writer(
    queue: WorkQueue[WriteJob],
    outputs: Sequence[Output],
    progress: Progress,
    results: Results,
) -> None:
    """Write until the queue is closed; the body of every writer thread.

    Args:
        queue: What to write.
        outputs: Output files, by their index in the layout.
        progress: Counts bytes and seconds.
        results: Told what every piece came to.
    """
    while True:
        with progress.spending(Stage.WRITER_IDLE):
            job = queue.take()
        if job is None:
            return
        with progress.spending(Stage.WRITE):
            for extent in job.extents:
                done = [_record(claim, extent.memory) for claim in extent.claims]
                outputs[extent.shard].write_at(
                    extent.offset, extent.memory, done, runs=extent.runs, begin=extent.begin
                )
                results.add(done)
                progress.count(Stage.WRITE, len(extent.memory))
        job.then()


def _record(claim: Claim, memory: memoryview) -> PieceDone:
    part, found = claim.part, claim.found
    leaf_nbytes = LEAF_ELEMENTS * part.task.dtype.itemsize
    return PieceDone(
        task=part.task_index,
        start=part.start,
        numel=part.numel,
        leaves=leaf_digests(memory[claim.begin : claim.end], leaf_nbytes).hex(),
        kept=claim.applied.kept,
        not_finite=claim.applied.not_finite,
        tensor_kept=tuple(top.kept for top in found.tops),
        thresholds=tuple(top.threshold for top in found.tops),
        numbers=found.numbers,
        survey=() if claim.surveyed is None else fields_of(claim.surveyed),
    )
