"""What all parts of a running merge share: the context that each of them is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from streammerge.engine.buffers import Allowance, SlotPool
from streammerge.engine.device import DeviceStage
from streammerge.engine.gathering import MakeWhole
from streammerge.engine.merging import ChunkMerger
from streammerge.engine.monitor import Monitor
from streammerge.engine.progress import Progress
from streammerge.engine.queues import Outstanding, WorkQueue
from streammerge.engine.resuming import Recovered
from streammerge.plan.sweeps import Needs
from streammerge.plan.types import MergePlan
from streammerge.statistics.rounds import Found

Work = Callable[[DeviceStage], None]
"""Something for a worker to do, on its own device stage."""
OnScope = Callable[[int, Found], None]
"""Told the index of a tensor, or :data:`~streammerge.engine.resuming.WHOLE_MODEL`, and the statistics
of that scope, one per source, on the thread that found them."""


@dataclass(frozen=True, slots=True)
class SweepShare:
    """What of one sweep over the model this process does; another one puts the shares together."""

    question: Path
    """The questions, as :meth:`~streammerge.engine.scopes.ScopeStatistics.save` left them."""
    answers: Path
    """Where to save the answers, or the questions that a sample leads to."""
    tasks: frozenset[int]
    """Tensors that are measured here, by index."""
    samples: bool
    """Whether a sample of the whole model is to lead to better questions, and nothing is measured."""


@dataclass(frozen=True, slots=True)
class MergeContext:
    """What all parts of a running merge share."""

    plan: MergePlan
    """The plan."""
    needs: Needs
    """The statistics that tensors need."""
    monitor: Monitor
    """Ends waiting."""
    work: WorkQueue[Work]
    """What workers take from."""
    outstanding: Outstanding
    """Chunks begun and not written."""
    pool: SlotPool
    """Input buffers."""
    statistics: Allowance
    """Bytes for statistics."""
    merger: ChunkMerger
    """Merges a loaded chunk and sends it to the writers."""
    progress: Progress
    """Counters."""
    recovered: Recovered
    """What an interrupted run has done."""
    on_scope: OnScope
    """Told the statistics of a scope, by tensor, when they are known."""
    snapshot: Path | None
    """Where to save the state of a sweep over the model, now and then; None for nowhere."""
    keep_cached: bool
    """Whether all inputs fit the page cache, so that a second sweep finds them there."""
    make_whole: MakeWhole
    """Makes of whole tensors what the method does."""
    sweep: SweepShare | None = None
    """What to do of a sweep over the model, and nothing else; None for a merge."""
