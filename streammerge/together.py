"""Several recipes over the same inputs, merged side by side from one read.

Every one of them is the merge that it would be alone, with its own directory, journal and manifest, so
its bytes are the same and it resumes by itself. They share a process, its memory in equal parts, and the
page cache, so that inputs on a disk are read once: :mod:`streammerge.engine.pacing` keeps them together,
and pages are let go when the last one has read them (:mod:`streammerge.checkpoint.sharing`). What does
not fit the memory at once is merged in groups, one after the other, each of which reads the inputs once.

On accelerators, and where adapters are combined, which takes seconds, they run one by one.
"""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from streammerge.adapters.combining.plans import CombinationPlan
from streammerge.adapters.combining.recipes import is_combination
from streammerge.checkpoint.bytesource import ByteSourceKind, choose_byte_source
from streammerge.checkpoint.inputs import parse_path
from streammerge.checkpoint.manifest import Manifest
from streammerge.checkpoint.outputform import form_of
from streammerge.checkpoint.permitting import allocated, check_place
from streammerge.checkpoint.places import choose_place
from streammerge.checkpoint.sharing import SharedFiles
from streammerge.engine.accelerator.opening import choose_devices
from streammerge.engine.pacing import Pacer
from streammerge.engine.progress import OnProgress, ProgressEvent
from streammerge.engine.shelter import run_sheltered
from streammerge.errors import DiskSpaceError, MemoryBudgetError, OutputError, OutputExistsError
from streammerge.limits import allow_open_files, naming_limits
from streammerge.merging import MergeJob
from streammerge.plan.types import MergePlan
from streammerge.recipe.types import Recipe
from streammerge.run import RecipeLike, as_output, find_complete, load_recipe, merge, plan
from streammerge.sources import locate_models
from streammerge.storage.urls import refuse_store
from streammerge.units import format_size

AnyPlan = MergePlan | CombinationPlan
_TICK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Grid:
    """The recipes of one file with a grid, each with the name of its output."""

    recipes: tuple[tuple[str, Recipe], ...]
    """At least one."""


@dataclass(frozen=True, slots=True)
class Group:
    """Merges that run at the same time."""

    plans: tuple[AnyPlan, ...]
    """One or more; what they read of a disk, they read once."""

    @property
    def reads(self) -> int:
        """How often inputs are read: once, or of a store, which no page cache stands before, by each."""
        stores = any(isinstance(each, MergePlan) and each.asks_stores for each in self.plans)
        return len(self.plans) if stores else 1

    @property
    def bytes_to_read(self) -> int:
        """Bytes that they read together, of a disk or a store."""
        each = [planned.bytes_to_read for planned in self.plans]
        return max(each) if self.reads == 1 else sum(each)


@naming_limits()
def plan_together(recipes: Sequence[RecipeLike], **options: Any) -> list[Group]:
    """Return the plans of several merges, in the groups in which they run.

    Args:
        recipes: As for :func:`streammerge.run.plan`, at least one.
        options: What :func:`streammerge.run.plan` takes.

    Raises:
        StreamMergeError: As for :func:`streammerge.run.plan`, for the first that is refused.
    """
    download = options.get("download", False)
    loaded = [load_recipe(each, download=download) for each in recipes]
    alone = bool(choose_devices(options.get("device", "auto"))) or any(
        is_combination(locate_models(each, download=download)) for each in loaded
    )
    for size in _sizes(1 if alone else len(loaded)):
        try:
            plans = [plan(each, at_once=size, **options) for each in loaded]
            if size > 1:
                # Once more, because what is known of all of them, and torch, is in memory now.
                for index, each in enumerate(loaded):
                    plans[index] = plan(each, at_once=size, **options)
        except MemoryBudgetError:
            if size == 1:
                raise
            continue
        groups = [plans[at : at + size] for at in range(0, len(plans), size)]
        return [Group(tuple(_beside_each_other(each))) for each in groups]
    raise AssertionError  # A size of 1 returns or raises.


def _beside_each_other(plans: Sequence[AnyPlan]) -> Iterator[AnyPlan]:
    """Yield plans that say what the others take, in the place of what these might have taken."""
    own = [each.memory.own if isinstance(each, MergePlan) else 0 for each in plans]
    for planned, nbytes in zip(plans, own, strict=True):
        if isinstance(planned, MergePlan) and len(plans) > 1:
            memory = replace(planned.memory, beside=sum(own) - nbytes)
            yield replace(planned, memory=memory)
        else:
            yield planned


def _sizes(count: int) -> Iterator[int]:
    """Yield how many could be merged at once: all, half of them, a third of them, down to one."""
    last = None
    for groups in range(1, count + 1):
        size = -(-count // groups)
        if size != last:
            yield size
        last = size


@naming_limits()
def merge_together(
    merges: Sequence[tuple[RecipeLike, str | os.PathLike[str]]],
    *,
    resume: bool = False,
    overwrite: bool = False,
    byte_source: ByteSourceKind | str = ByteSourceKind.PREAD,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> list[Manifest]:
    """Merge several recipes over the same inputs, which are read once for all that fit the memory.

    Each output is byte for byte what :func:`streammerge.run.merge` makes of its recipe. When one
    fails, all end, and what they have done stays for a resume.

    Args:
        merges: Recipes and the directories to make, or files.
        resume: Whether to continue unfinished merges; outputs that are complete stay.
        overwrite: Whether earlier merges in the outputs may be replaced.
        byte_source: As for :func:`streammerge.run.merge`.
        on_progress: Told several times per second how far all of them are together.
        options: What :func:`streammerge.run.plan` takes; memory and workers are for all of them.

    Returns:
        What each output's manifest says, in the order of ``merges``.

    Raises:
        StreamMergeError: As for :func:`streammerge.run.merge`.
        ValueError: There is nothing to merge.
    """
    if not merges:
        raise ValueError("merges: expected at least one recipe and its output")
    if overwrite and resume:
        raise ValueError("resume continues unfinished merges, overwrite discards them; choose one")
    for _, out in merges:
        refuse_store(parse_path(out, "out"), "several outputs from one read are made in")
    # Neither links nor dots: they are compared with each other.
    places = [parse_path(out, "out") for _, out in merges]
    outs = [Path(os.path.abspath(place)) for place in places]  # noqa: PTH100 - resolve() follows links
    _check_apart(outs)
    # Pipes are read once.
    recipes = [load_recipe(recipe, download=options.get("download", False)) for recipe, _ in merges]
    groups = plan_together(recipes, **options)
    plans = [as_output(each, out) for each, out in zip(_all(groups), outs, strict=True)]
    done = [find_complete(*each) if resume else None for each in zip(plans, outs, strict=True)]
    to_do = [index for index, manifest in enumerate(done) if manifest is None]
    inputs = _inputs([plans[index] for index in to_do])
    for index in to_do:
        # What is unfinished beside it, each merge looks at itself.
        check_place(outs[index], inputs, overwrite=overwrite, look=not resume)
    check_room([plans[index] for index in to_do], [outs[index] for index in to_do])
    _make_folders(outs)
    kind = ByteSourceKind(byte_source)
    made: dict[int, Manifest] = {}
    for group in _cut(to_do, [len(each.plans) for each in groups]):
        if len(group) == 1:
            # Alone, it has all of the memory, and plans with what is left of it now.
            index = group[0]
            made[index] = merge(
                recipes[index],
                outs[index],
                resume=resume,
                overwrite=overwrite,
                byte_source=kind,
                on_progress=on_progress,
                **options,
            )
            continue
        jobs = [
            MergeJob(
                plans[index],
                outs[index],
                overwrite=overwrite,
                resume=resume,
                opener=choose_byte_source(kind),
                open_files=kind.open_files,
            )
            for index in group
        ]
        manifests = run_sheltered(_SideBySide(jobs).run, on_progress or (lambda _: None))
        made.update(zip(group, manifests, strict=True))
    return [made[index] if each is None else each for index, each in enumerate(done)]


def _all(groups: Sequence[Group]) -> Iterator[AnyPlan]:
    for group in groups:
        yield from group.plans


def _cut(to_do: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Yield what of each group is left to do."""
    first = 0
    for size in sizes:
        left = [index for index in to_do if first <= index < first + size]
        if left:
            yield left
        first += size


def _check_apart(outs: Sequence[Path]) -> None:
    """Raise if an output is another one, or inside of it, or is where another one grows."""
    taken = [(out, choose_place(out).partial) for out in outs]
    for index, out in enumerate(outs):
        for at, other in enumerate(outs[:index]):
            if any(_overlap(*pair) for pair in itertools.product(taken[index], taken[at])):
                raise OutputExistsError(
                    f"{out}: overlaps the output {other}; give each recipe a place of its own"
                )


def _overlap(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents


def _make_folders(outs: Sequence[Path]) -> None:
    """Make the directory that a grid's outputs lie in, where its own is there."""
    for folder in dict.fromkeys(out.parent for out in outs):
        if folder.parent.is_dir() and not os.path.lexists(folder):
            try:
                folder.mkdir()
            except OSError as error:
                raise OutputError(f"{folder}: cannot be made: {error.strerror}") from error


def _inputs(plans: Sequence[AnyPlan]) -> list[Path]:
    """Return what any of them reads: no output may be among it."""
    files = [Path(file.path) for planned in plans for file in planned.files]
    models = [
        Path(model.path)
        for planned in plans
        if isinstance(planned, MergePlan)
        for model in planned.models
    ]
    return list(dict.fromkeys([*models, *files]))


def check_room(plans: Sequence[AnyPlan], outs: Sequence[Path]) -> None:
    """Raise unless there is room for all outputs at once, beside what is there of them already.

    Raises:
        DiskSpaceError: There is not.
    """
    needed: dict[Path, int] = {}
    for planned, out in zip(plans, outs, strict=True):
        folder = form_of(out).folder
        while not folder.is_dir():
            folder = folder.parent
        has = allocated(out.with_name(f"{out.name}.partial"))
        needed[folder] = needed.get(folder, 0) + max(0, planned.bytes_to_write - has)
    for folder, nbytes in needed.items():
        free = shutil.disk_usage(folder).free
        if free < nbytes:
            raise DiskSpaceError(
                f"{folder}: {len(plans)} outputs need {format_size(nbytes)} more together, of which "
                f"{format_size(free)} are free; free some, or merge them one by one"
            )


class _OtherFailedError(Exception):
    """Another one of the merges failed, or was interrupted."""


class _SideBySide:
    """Merges at the same time, each on a thread of its own."""

    def __init__(self, jobs: Sequence[MergeJob]) -> None:
        shared = SharedFiles([Path(file.path) for file in job.planned.files] for job in jobs)
        # Others than merges of models are planned one by one.
        plans = [job.planned for job in jobs if isinstance(job.planned, MergePlan)]
        pacer = Pacer(plans)
        self._jobs = [
            replace(job, opener=shared.opening(job.opener), pace=pacer.join(planned))
            for job, planned in zip(jobs, plans, strict=True)
        ]
        self._events: list[ProgressEvent | None] = [None] * len(jobs)
        self._manifests: list[Manifest | None] = [None] * len(jobs)
        self._errors: list[BaseException | None] = [None] * len(jobs)
        self._ended: SimpleQueue[int] = SimpleQueue()
        self._stopped = False

    def run(self, on_progress: OnProgress) -> list[Manifest]:
        """Run all; the first error ends all of them."""
        allow_open_files(sum(job.files_at_once for job in self._jobs))
        threads = [
            threading.Thread(target=self._run_one, args=(index,), name=f"streammerge-merge-{index}")
            for index in range(len(self._jobs))
        ]
        stop: BaseException | None = None
        began = time.perf_counter()
        try:
            for thread in threads:
                thread.start()
            left = len(threads)
            while left and not self._stopped:
                left -= self._wait()
                on_progress(self._event(time.perf_counter() - began))
        except BaseException as error:  # noqa: BLE001 - whatever it is, all of them must end first
            stop = error
        self._stopped = self._stopped or stop is not None
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        self._raise(stop)
        return [manifest for manifest in self._manifests if manifest is not None]

    def _wait(self) -> int:
        """Wait a little for one of them to end; return how many have."""
        try:
            index = self._ended.get(timeout=_TICK_SECONDS)
        except Empty:
            return 0
        if self._errors[index] is not None:
            self._stopped = True
        return 1

    def _run_one(self, index: int) -> None:
        job = self._jobs[index]
        try:
            self._manifests[index] = job.run(self._hear(index))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the others must end
            self._errors[index] = error
            self._stopped = True
        finally:
            if job.pace is not None:
                job.pace.leave()
            self._ended.put(index)

    def _hear(self, index: int) -> Callable[[ProgressEvent], None]:
        def hear(event: ProgressEvent) -> None:
            if self._stopped:
                raise _OtherFailedError
            self._events[index] = event

        return hear

    def _event(self, seconds: float) -> ProgressEvent:
        """Return where all of them are together."""
        events = [event for event in self._events if event is not None]
        activities = [event.activity for event in events if event.bytes_done < event.bytes_total]
        return ProgressEvent.at(
            activities[0] if activities else "merge",
            sum(event.bytes_done for event in events),
            # Those that have not begun are not known yet.
            sum(event.bytes_total for event in events) * len(self._jobs) // max(1, len(events)),
            seconds,
        )

    def _raise(self, stop: BaseException | None) -> None:
        """Raise what ended them, with what each of them has to say."""
        errors = [error for error in self._errors if error is not None]
        causes = [error for error in errors if not isinstance(error, _OtherFailedError)]
        first = stop or next(iter(causes), None)
        if first is None:
            return
        for error in errors:
            if error is first:
                continue
            if not isinstance(error, _OtherFailedError):
                first.add_note(f"then: {type(error).__name__}: {error}")
            for note in getattr(error, "__notes__", ()):
                first.add_note(note)
        raise first
