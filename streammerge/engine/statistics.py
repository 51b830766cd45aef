"""Pass 1 of one scope: the searches of all its sources, fed by any number of threads.

Memory: what :func:`streammerge.plan.sweeps.scope_bytes` says, reserved by the caller.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.snapshot import load_snapshot, save_snapshot
from streammerge.dtypes import DType
from streammerge.engine.buffers import allocate
from streammerge.methods.base import MagnitudeTopK
from streammerge.plan.sweeps import count_sample_runs
from streammerge.reductions.magnitude import STATE_ARRAYS, Counted, MagnitudeSearch, Question
from streammerge.reductions.topk import TopK


class ScopeStatistics:
    """Finds every source's threshold over one scope; thread-safe."""

    def __init__(
        self,
        need: MagnitudeTopK,
        *,
        numel: int,
        blocks: int,
        compute_dtype: DType,
        limit: int,
    ) -> None:
        """Start the searches.

        Args:
            need: What is to be found.
            numel: Elements in the scope.
            blocks: Blocks in the scope.
            compute_dtype: F32 or F64.
            limit: Most magnitudes that each search collects.
        """
        sources = len(need.densities)
        self._lock = threading.Lock()
        self.sample_runs = count_sample_runs(need, numel, limit)
        dtype = np.dtype(compute_dtype.torch_name)
        rooms = allocate((sources + 1) * limit * dtype.itemsize).view(dtype)
        self._rooms = rooms.reshape(sources + 1, limit)
        self._searches = [
            MagnitudeSearch(
                numel=numel,
                blocks=blocks,
                density=density,
                tie_policy=need.tie_policy,
                room=room,
                spare=self._rooms[-1],
            )
            for density, room in zip(need.densities, self._rooms[:-1], strict=True)
        ]
        self._sample_numel = 0
        self._sampled = 0
        self._numel = numel
        self._answered = np.zeros(blocks, dtype=np.bool_)

    @property
    def tops(self) -> tuple[TopK, ...] | None:
        """The results, one per source; None until all are known."""
        results = tuple(search.result for search in self._searches)
        if any(result is None for result in results):
            return None
        return tuple(result for result in results if result is not None)

    @property
    def questions(self) -> list[Question | None]:
        """What to ask of every block now, per source; None where nothing is open."""
        return [s.question if s.result is None else None for s in self._searches]

    def prepare_sample(self, numel: int) -> None:
        """Expect a sample of ``numel`` elements per source."""
        self._sample_numel = numel

    def sample_room(self, count: int) -> NDArray[Any]:
        """Return the next ``[n_sources, count]`` of the sample, to be filled."""
        with self._lock:
            begin = self._sampled
            self._sampled += count
        return self._rooms[:-1, begin : begin + count]

    def conclude_sample(self) -> None:
        """Choose the first questions from the sample."""
        for search, room in zip(self._searches, self._rooms[:-1], strict=True):
            search.ask_after_sample(room[: self._sample_numel])

    def add(self, first_block: int, answers: Sequence[Sequence[Counted | None]]) -> None:
        """Add the answers of consecutive blocks."""
        with self._lock:
            for block, row in enumerate(answers, first_block):
                self._answered[block] = True
                for search, counted in zip(self._searches, row, strict=True):
                    if counted is not None:
                        search.answer(block, counted)

    def has_answers_of(self, first_block: int, count: int) -> bool:
        """Return whether these blocks have been asked the present questions."""
        return bool(self._answered[first_block : first_block + count].all())

    def save(self, path: Path) -> None:
        """Save what is known so far; others wait meanwhile.

        Raises:
            OutputError: The system refuses.
        """
        with self._lock:
            states = [search.state() for search in self._searches]
            arrays = {"answered": self._answered}
            for index, (_, own) in enumerate(states):
                arrays |= {f"{index} {name}": array for name, array in own.items()}
            facts = {"numel": self._numel, "searches": [own for own, _ in states]}
            save_snapshot(path, facts, arrays)

    def restore(self, path: Path) -> bool:
        """Go on from what :meth:`save` saved; return whether there was something that fits."""
        found = load_snapshot(path)
        if found is None:
            return False
        facts, arrays = found
        answered = arrays.pop("answered")
        if facts["numel"] != self._numel or answered.shape != self._answered.shape:
            return False
        states = [
            (search, own, {name: arrays[f"{index} {name}"] for name in STATE_ARRAYS})
            for index, (search, own) in enumerate(
                zip(self._searches, facts["searches"], strict=True)
            )
        ]
        if not all(search.has_room_for(own, mine) for search, own, mine in states):
            return False
        for search, own, mine in states:
            search.restore(own, mine)
        self._answered = answered
        return True

    def conclude(self) -> None:
        """End a round: every search has its result or its next question."""
        self._answered[:] = False
        for search in self._searches:
            if search.result is None:
                search.conclude()
