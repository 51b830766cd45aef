"""The statistics of one scope, round by round, fed by any number of threads.

Memory: what :func:`streammerge.plan.sweeps.scope_bytes` says, reserved by the caller.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.snapshot import load_snapshot, save_snapshot
from streammerge.dtypes import DType
from streammerge.engine.asking import Asking, BlockAnswer
from streammerge.engine.buffers import allocate
from streammerge.errors import ResumeError
from streammerge.methods.programs import Programs
from streammerge.plan.sweeps import count_sample_runs
from streammerge.statistics.magnitude import SAMPLE_RUN, STATE_ARRAYS, MagnitudeSearch
from streammerge.statistics.rounds import NOTHING, Answers, Found, RowMemory
from streammerge.statistics.topk import TopK
from streammerge.statistics.totals import join_totals, no_totals


class ScopeStatistics:
    """Finds what a method asks about one scope; thread-safe."""

    def __init__(
        self,
        programs: Programs,
        *,
        numel: int,
        blocks: int,
        compute_dtype: DType,
        limit: int,
        rows: RowMemory | None = None,
    ) -> None:
        """Start with the first round.

        Args:
            programs: What is to be found.
            numel: Elements in the scope.
            blocks: Blocks in the scope.
            compute_dtype: F32 or F64.
            limit: Most values that each search collects.
            rows: Remembers what is found about rows.
        """
        self._programs = programs
        self._lock = threading.Lock()
        dtype = np.dtype(compute_dtype.torch_name)
        rooms = programs.ranked + 1 if programs.ranked else 0
        self._rooms = allocate(rooms * limit * dtype.itemsize).view(dtype).reshape(rooms, limit)
        self._numel = numel
        self._limit = limit
        self._answered = np.zeros(blocks, dtype=np.bool_)
        self._known = replace(NOTHING, rows=rows)
        self._round = 0
        self._begin_round()

    def _begin_round(self) -> None:
        """Start the searches of a round, or of the next one that depends on values."""
        while self._round < len(self._programs.rounds):
            program = self._programs.rounds[self._round]
            asked = self._programs.work.rounds[self._round]
            ranks = asked.ranks(self._numel, self._known)
            self._searches = [
                MagnitudeSearch(
                    numel=self._numel,
                    blocks=self._answered.size,
                    k=rank.k,
                    tie_policy=rank.tie_policy,
                    room=room,
                    spare=self._rooms[-1],
                    of_value=rank.of_value,
                )
                for rank, room in zip(ranks, self._rooms[: program.ranked], strict=True)
            ]
            self._totals = no_totals(program.totals, self._answered.size)
            self._has_totals = not program.totals or self._answered.size == 0
            self._sample_runs = count_sample_runs(ranks, self._numel, self._limit)
            self._sample_numel = 0
            self._run_numel = SAMPLE_RUN
            self._sampled = 0
            if not self._settled():
                return
            self._end_round()

    def _settled(self) -> bool:
        return self._has_totals and all(each.result is not None for each in self._searches)

    def _end_round(self) -> None:
        program = self._programs.rounds[self._round]
        answers = Answers(
            self._numel,
            join_totals(program.totals, self._totals),
            tuple(each.result for each in self._searches if each.result is not None),
            self._known,
        )
        self._known = self._known.joined(self._programs.work.rounds[self._round].concluded(answers))
        # Those of the next round take their place; there is no room for both.
        self._totals = no_totals((), 0)
        self._round += 1

    @property
    def found(self) -> Found | None:
        """What has been found; None until all is."""
        return self._known if self._round == len(self._programs.rounds) else None

    @property
    def asking(self) -> Asking:
        """What to ask of every block now."""
        questions = tuple(s.question if s.result is None else None for s in self._searches)
        return Asking(self._round, self._known, questions, totals=not self._has_totals)

    @property
    def sample_runs(self) -> int:
        """How many runs of elements to sample before the present question is asked; 0 for none."""
        return self._sample_runs

    def prepare_sample(self, numel: int, run_numel: int) -> None:
        """Expect a sample of ``numel`` elements per ranked value, in runs of ``run_numel``."""
        self._sample_numel = numel
        self._run_numel = run_numel

    def sample_room(self, count: int) -> NDArray[Any]:
        """Return the next ``[ranked, count]`` of the sample, to be filled."""
        with self._lock:
            begin = self._sampled
            self._sampled += count
        return self._rooms[: len(self._searches), begin : begin + count]

    def conclude_sample(self) -> None:
        """Choose the first questions from the sample."""
        for search, room in zip(self._searches, self._rooms, strict=False):
            search.ask_after_sample(room[: self._sample_numel], run_numel=self._run_numel)
        self._sample_runs = 0

    def add(self, first_block: int, answers: Sequence[BlockAnswer]) -> None:
        """Add the answers of consecutive blocks."""
        with self._lock:
            for block, answer in enumerate(answers, first_block):
                self._answered[block] = True
                if answer.totals is not None:
                    self._totals[block] = answer.totals
                for search, counted in zip(self._searches, answer.counted, strict=True):
                    if counted is not None:
                        search.answer(block, counted)

    def has_answers_of(self, first_block: int, count: int) -> bool:
        """Return whether these blocks have been asked the present questions."""
        return bool(self._answered[first_block : first_block + count].all())

    def conclude(self) -> None:
        """End a sweep: every search has its result or its next question, or a round begins."""
        self._answered[:] = False
        self._has_totals = True
        for search in self._searches:
            if search.result is None:
                search.conclude()
        if self._settled():
            self._end_round()
            self._begin_round()

    def save(self, path: Path) -> None:
        """Save what is known so far; others wait meanwhile.

        Raises:
            OutputError: The system refuses.
        """
        with self._lock:
            states = [search.state() for search in self._searches]
            arrays = {"answered": self._answered, "totals": self._totals}
            for index, (_, own) in enumerate(states):
                arrays |= {f"{index} {name}": array for name, array in own.items()}
            facts = {
                "numel": self._numel,
                "round": self._round,
                "tops": [astuple(top) for top in self._known.tops],
                "numbers": self._known.numbers,
                "has_totals": self._has_totals,
                "searches": [own for own, _ in states],
            }
            save_snapshot(path, facts, arrays)

    def absorb(self, path: Path) -> None:
        """Add the answers of other blocks that another process saved, which asked the same questions.

        Raises:
            ResumeError: They are not there, or to other questions.
        """
        loaded = load_snapshot(path)
        if loaded is None:
            raise ResumeError(
                f"{path}: the answers of a process are not there any more; merge again"
            )
        facts, arrays = loaded
        own = [search.state()[0] for search in self._searches]
        asked = [(each["band"], each["bins"], each["result"]) for each in own]
        theirs = [(each["band"], each["bins"], each["result"]) for each in facts["searches"]]
        # As JSON has them: what was saved has lists for tuples.
        if json.dumps([self._round, asked]) != json.dumps([facts["round"], theirs]):
            raise ResumeError(f"{path}: answers other questions than are asked; merge again")
        answered = arrays["answered"]
        self._answered |= answered
        if self._totals.size:
            self._totals[answered] = arrays["totals"][answered]
        for index, (search, mine) in enumerate(zip(self._searches, facts["searches"], strict=True)):
            if search.result is None:
                search.absorb(mine, {name: arrays[f"{index} {name}"] for name in STATE_ARRAYS})

    def is_answered(self) -> bool:
        """Return whether all blocks have been asked the present questions."""
        return bool(self._answered.all())

    def restore(self, path: Path, *, sampled: bool = True) -> bool:
        """Go on from what :meth:`save` saved; return whether there was something that fits.

        Args:
            path: What was saved.
            sampled: Whether its questions are those that a sample led to, if one helps.
        """
        found = load_snapshot(path)
        if found is None:
            return False
        facts, arrays = found
        answered = arrays.pop("answered")
        if facts["numel"] != self._numel or answered.shape != self._answered.shape:
            return False
        before = self._round, self._known
        self._round = facts["round"]
        self._known = Found(tuple(TopK(*top) for top in facts["tops"]), tuple(facts["numbers"]))
        self._begin_round()
        states = [
            (search, own, {name: arrays[f"{index} {name}"] for name in STATE_ARRAYS})
            for index, (search, own) in enumerate(
                zip(self._searches, facts["searches"], strict=True)
            )
        ]
        if not all(search.has_room_for(own, mine) for search, own, mine in states):
            self._round, self._known = before
            self._begin_round()
            return False
        for search, own, mine in states:
            search.restore(own, mine)
        self._answered, self._totals = answered, arrays["totals"]
        self._has_totals = facts["has_totals"]
        if sampled:
            self._sample_runs = 0
        return True
