"""A plan of terabytes, and the driver that has its parts done: what they take, on any machine.

    python -m benchmarks.scale --directory DIR [--tensors 100000] [--shards 1000] [--workers 16]

Inputs are files of holes: their headers are real, their data takes no room and reads as zeros. Planner,
division, driver and the end of the merge are the real ones. Workers are not: what stands for them writes the
journals that they would leave, with the digests of zeros, in the pieces that the plan cuts. So the result
is what the merge would be, of zeros, and nothing of its data is ever read or written, but for what the end
of a merge in parts reads again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

import streammerge
from streammerge.checkpoint.attempts import describe_process, draw_token, journal_path
from streammerge.checkpoint.bytesource import ByteSourceKind
from streammerge.checkpoint.digests import LEAF_ELEMENTS, leaf_digests
from streammerge.checkpoint.journal import Journal, PartDone, PieceDone
from streammerge.executors.driving import choose_parts, drive
from streammerge.executors.seam import Outcome, Request
from streammerge.plan.chunking import Piece, iter_units
from streammerge.plan.dividing import divide, work_of
from streammerge.plan.types import MergePlan
from streammerge.units import format_size

_ROWS = 2_048
_MODELS = 3


def write_holes(directory: Path, *, tensors: int, shards: int, columns: int) -> Path:
    """Write a model of bfloat16 zeros that takes the room of its headers alone."""
    directory.mkdir(parents=True)
    weight_map = {}
    nbytes = _ROWS * columns * 2
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = [f"model.layers.{i}.weight" for i in range(shard, tensors, shards)]
        header = {
            each: {
                "dtype": "BF16",
                "shape": [_ROWS, columns],
                "data_offsets": [at * nbytes, (at + 1) * nbytes],
            }
            for at, each in enumerate(names)
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (directory / name).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + nbytes * len(names))
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": nbytes * tensors}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


class Pretending:
    """An engine whose workers leave journals, and do nothing else."""

    def __init__(self, planned: MergePlan, *, slots: int) -> None:
        self._planned = planned
        self._divided: list[frozenset[int]] = []
        self._slots = slots
        self._cut: dict[int, list[Piece]] = {}
        self._ended: list[Outcome] = []
        self.seconds = 0.0
        """Spent on what workers would do."""
        self._leaf: dict[int, str] = {}

    def workers(self) -> int:
        """Return how many there are."""
        return self._slots

    def idle(self) -> int:
        """Return how many have nothing to do."""
        return self._slots - len(self._ended)

    def running(self) -> int:
        """Return how many parts are not gathered."""
        return len(self._ended)

    def submit(self, request: Request) -> None:
        """Leave what a worker would."""
        began = time.perf_counter()
        part, parts = request["part"], request["parts"]
        self._divided = self._divided or divide(self._planned, parts)
        own = self._divided[part - 1]
        partial = Path(request["driver"]).parent
        numel = sum(self._planned.tasks[index].numel for index in own)
        journal = Journal(journal_path(partial, request["epoch"], part, parts, draw_token()))
        journal.begin(describe_process(part, parts, numel))
        journal.append(list(self._pieces(own)))
        journal.append([PartDone(1.0, 0, 0, 0, 0, 1, "cpu", 0)])
        journal.close()
        for shard in {self._planned.tasks[index].shard for index in own}:
            layout = self._planned.layout.shards[shard]
            with (partial / layout.name).open("ab") as stream:
                stream.truncate(layout.nbytes)
        self._ended.append(Outcome(part, "nowhere"))
        self.seconds += time.perf_counter() - began

    def _pieces(self, own: frozenset[int]) -> Iterator[PieceDone]:
        if not self._cut:
            for unit in iter_units(self._planned, must_look=lambda _: False):
                for chunk in unit.chunks:
                    for piece in chunk.pieces:
                        self._cut.setdefault(piece.task, []).append(piece)
        for task in sorted(own):
            for piece in self._cut[task]:
                leaves = self._leaves(piece.numel)
                yield PieceDone(task, piece.start, piece.numel, leaves, (), 0, (), (), ())

    def _leaves(self, numel: int) -> str:
        if numel not in self._leaf:
            digests = leaf_digests(memoryview(bytes(2 * numel)), LEAF_ELEMENTS * 2)
            self._leaf[numel] = digests.hex()
        return self._leaf[numel]

    def gather(self, _seconds: float) -> list[Outcome]:
        """Return all parts: they are done."""
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Do nothing."""


def main() -> None:
    """Measure, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--tensors", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=1_000)
    parser.add_argument("--columns", type=int, default=4_883, help="of 2,048 rows")
    parser.add_argument("--workers", type=int, default=16)
    options = parser.parse_args()
    process = psutil.Process()
    root = options.directory / "scale"
    shutil.rmtree(root, ignore_errors=True)
    sizes = {name: getattr(options, name) for name in ("tensors", "shards", "columns")}
    paths = [write_holes(root / f"model-{i}", **sizes) for i in range(_MODELS)]
    base, *sources = map(str, paths)
    recipe: dict[str, Any] = {
        "method": "task_arithmetic",
        "base": base,
        "sources": [{"path": path} for path in sources],
        "output": {
            "max_shard_size": f"{2 * _ROWS * options.columns * options.tensors // options.shards}B"
        },
    }

    began = time.perf_counter()
    planned = streammerge.plan(recipe, memory="8GiB", workers=2)
    if not isinstance(planned, MergePlan):
        raise TypeError(planned)
    seconds = time.perf_counter() - began
    print(f"plan: {seconds:.1f} s, process {format_size(process.memory_info().rss)}")
    print(
        f"work: {format_size(work_of(planned))}, {len(planned.tasks)} tensors, {len(planned.files)} files, "
        f"{len(planned.layout.shards)} shards"
    )
    began = time.perf_counter()
    parts = choose_parts(work_of(planned), options.workers)
    divided = divide(planned, parts)
    works = [sum(work_of(planned, i, planned.tasks[i].numel) for i in part) for part in divided]
    print(
        f"{parts} parts: divided in {time.perf_counter() - began:.2f} s, largest part {max(works) / min(works):.3f} of the smallest"
    )
    engine = Pretending(planned, slots=options.workers)
    events: list[float] = []
    began, cpu = time.perf_counter(), process.cpu_times()
    done: dict[str, float] = {}

    def hear(event: Any) -> None:
        events.append(event.bytes_done)
        if event.bytes_done >= work_of(planned) and "drive" not in done:
            done["drive"] = time.perf_counter() - began
            partial = root / "out.partial"
            done["journals"] = sum(
                path.stat().st_size for path in partial.glob(".streammerge-journal*")
            )

    # Holes need no room.
    with (
        mock.patch("streammerge.checkpoint.partdir.check_room"),
        mock.patch("streammerge.checkpoint.outputdir.check_room"),
    ):
        manifest = drive(
            planned,
            root / "out",
            engine,
            memory=None,
            workers=None,
            device="auto",
            device_memory=None,
            overwrite=False,
            resume=False,
            byte_source=ByteSourceKind.PREAD,
            on_progress=hear,
        )
    total = time.perf_counter() - began
    used = process.cpu_times()
    print(
        f"driver: {done['drive'] - engine.seconds:.1f} s of its own beside {engine.seconds:.1f} s of pretended "
        f"work, journals {format_size(int(done['journals']))}"
    )
    print(
        f"end: {total - done['drive']:.1f} s; in all {used.user + used.system - cpu.user - cpu.system:.1f} "
        f"core-seconds; peak {format_size(manifest.run.measured_memory)} of "
        f"{format_size(manifest.run.memory_budget)}; damaged {manifest.run.damaged}"
    )
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
