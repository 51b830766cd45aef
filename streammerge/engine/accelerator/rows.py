"""Pieces whose rows must be seen whole: measured, ranked and merged on a device in steps of whole rows.

    what is asked about rows   totals of each row, whose answers come back; what they come to is brought there
    ranks within rows          sorted there, right before the rows that need them are merged

A row that begins before the piece is merged once more, and what is kept of it is counted where it begins; see
:mod:`streammerge.engine.rows`, the twin on the CPU. Where something is asked and inputs do not stay on the
device (:mod:`~streammerge.engine.accelerator.keeping`), they cross the bus once more for every round.

Memory: that of the ring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streammerge.engine.accelerator.keeping import Kept
from streammerge.engine.accelerator.ring import Ring, Step
from streammerge.engine.asking import Asking, BlockAnswer, join_answers
from streammerge.engine.pieces import PieceInMemory
from streammerge.engine.rows import Run, iter_measuring
from streammerge.methods.programs import Programs
from streammerge.plan.device_rows import count_rows_before_ranks
from streammerge.statistics.rounds import NOTHING, Found, RowAnswers
from streammerge.statistics.totals import join_totals
from streammerge.tiles.program import Program

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.engine.accelerator.fused.running import FusedSteps


@dataclass(frozen=True, slots=True)
class RowsThere:
    """What is known of the rows of a step, on the device."""

    numel: int
    """Elements of a row."""
    computed: Tensor
    """``[values, stride]``: ranks within rows; the strides are those of the ring's rows."""
    numbers: Tensor
    """Numbers of rows, those of the step's first row first, flat, in float64."""
    known: int
    """How many there are of each."""
    are_own: bool
    """Whether the rows begin in the piece, and not before it."""


MergeStep = Callable[[Step, RowsThere], None]
"""Enqueues the merge of a step, given what is known of its rows."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """A piece in steps of whole rows."""

    inputs: Sequence[Tensor | None]
    """``[elements]`` per model, with all of the first and last row."""
    piece: PieceInMemory
    """The piece, without what surrounds it."""
    steps: tuple[range, ...]
    """Elements of each step; the first row by itself where it is another piece's."""
    kept: Kept | None
    """Where the inputs stay on the device; None to copy them for each round."""

    @property
    def row(self) -> int:
        """Elements of a row."""
        return self.piece.first.task.row

    @property
    def rows(self) -> int:
        """Rows of all steps."""
        return self.steps[-1].stop // self.row

    def is_own(self, step: Step) -> bool:
        """Return whether the rows of a step begin in the piece."""
        return not self.piece.before or step.begin > 0


class RowComputing:
    """Merges pieces of whole rows of one worker on its device."""

    def __init__(self, ring: Ring, fused: FusedSteps) -> None:
        """Prepare to compute in a ring's memory."""
        self._ring = ring
        self._fused = fused

    def merge(
        self,
        piece: PieceInMemory,
        programs: Programs,
        found: Found,
        merge_step: MergeStep,
        out: Tensor,
        *,
        kept: Kept | None,
    ) -> None:
        """Enqueue the merge of a piece, after what is asked about its rows.

        Args:
            piece: The piece, of one part.
            programs: What is done with it.
            found: What is known of its tensor.
            merge_step: Enqueues the merge of a step.
            out: Bytes that receive the results, page-locked.
            kept: Where its inputs stay on the device; None to copy them for each round.
        """
        cut = self._cut(piece, kept)
        numbers = self._ask(cut, programs)
        self._begin(cut, programs, programs.merge, found, numbers)

        def step_through(step: Step) -> None:
            known = self._known(cut, programs, step, numbers)
            self._rank(programs, step, known)
            merge_step(step, known)

        self._stream(cut, step_through, out)

    def measure(
        self,
        piece: PieceInMemory,
        programs: Programs,
        asking: Asking,
        *,
        checked: bool,
        kept: Kept | None,
    ) -> RowTotals:
        """Enqueue the totals of each row that a round asks for, after what is asked about rows.

        Args:
            piece: The piece, of one part.
            programs: What is done with it.
            asking: What is asked.
            checked: Whether the largest magnitudes are noted.
            kept: As for :meth:`merge`.
        """
        program = programs.rounds[asking.round]
        cut = self._cut(piece, kept)
        numbers = self._ask(cut, programs)
        self._begin(cut, programs, program, asking.found, numbers)
        totals = self._room(cut, program)

        def step_through(step: Step) -> None:
            known = self._known(cut, programs, step, numbers)
            self._rank(programs, step, known)
            self._add_totals(cut, program, known, totals, step, checked=checked)

        self._stream(cut, step_through, None)
        return RowTotals(piece, program, self._ring, totals.numel())

    def _ask(self, cut: _Cut, programs: Programs) -> NDArray[np.float64]:
        """Return what is asked about each row, ``[rows, numbers]``."""
        numbers = np.zeros((cut.rows, 0))
        for program, asked in zip(programs.row_rounds, programs.work.row_rounds, strict=True):
            self._begin(cut, programs, program, NOTHING, numbers)
            there = self._room(cut, program)

            def step_through(
                step: Step,
                program: Program = program,
                numbers: NDArray[np.float64] = numbers,
                there: Tensor = there,
            ) -> None:
                known = self._known(cut, programs, step, numbers)
                self._add_totals(cut, program, known, there, step, checked=False)

            self._stream(cut, step_through, None)
            self._ring.fetch((self._ring.row_totals, there.numel()))
            if cut.kept is not None:
                cut.kept.is_there = True
            totals = _fetched(self._ring, there.numel(), program)
            settled = asked.concluded(RowAnswers(cut.row, totals, numbers))
            numbers = np.concatenate([numbers, settled], axis=1)
        return numbers

    def _begin(
        self,
        cut: _Cut,
        programs: Programs,
        program: Program,
        found: Found,
        numbers: NDArray[np.float64],
    ) -> None:
        ranks = programs.row_ranks
        also = () if ranks is None else (ranks,)
        self._fused.begin(cut.piece.in_rows(), programs, program, found, (), also=also)
        self._ring.bring_row_numbers(numbers)

    def _cut(self, piece: PieceInMemory, kept: Kept | None) -> _Cut:
        row = piece.first.task.row
        wide = piece.in_rows().numel
        step = self._ring.shape.step_numel // row * row
        own = row if piece.before else 0
        steps = [range(own)] if own else []
        steps += [range(begin, min(begin + step, wide)) for begin in range(own, wide, step)]
        inputs = [None if stored is None else stored.tensor() for stored in piece.inputs]
        return _Cut(inputs, piece, tuple(steps), kept)

    def _stream(self, cut: _Cut, compute: Callable[[Step], None], out: Tensor | None) -> None:
        piece = cut.piece
        self._ring.stream(
            cut.inputs, piece.numel, compute, out, cut.kept, cuts=cut.steps, before=piece.before
        )

    def _room(self, cut: _Cut, program: Program) -> Tensor:
        """Return where the totals of each row go, ``[rows, totals]``."""
        width = len(program.totals)
        return self._ring.row_totals.device[: cut.rows * width].view(cut.rows, width)

    def _add_totals(
        self,
        cut: _Cut,
        program: Program,
        known: RowsThere,
        totals: Tensor,
        step: Step,
        *,
        checked: bool,
    ) -> None:
        first = step.begin // cut.row
        own = totals[first : first + step.numel // cut.row]
        for each in self._fused.measure(program, step, checked=checked, rows=known):
            self._fused.total(each.op, each.a, each.b, own[:, each.index], cut.row)

    def _rank(self, programs: Programs, step: Step, known: RowsThere) -> None:
        """Enqueue the ranks within a step's rows, to where programs read them."""
        if programs.row_ranks is None:
            return
        # Triton is here by now.
        from streammerge.engine.accelerator.fused.ranking import rank_rows  # noqa: PLC0415

        for each in self._fused.measure(programs.row_ranks, step, checked=False, rows=known):
            ranks = known.computed[each.index, : step.numel]
            rank_rows(each.a, known.numel, ranks)

    def _known(
        self, cut: _Cut, programs: Programs, step: Step, numbers: NDArray[np.float64]
    ) -> RowsThere:
        behind, known = count_rows_before_ranks(programs), numbers.shape[1]
        own = self._ring.row_numbers.device[step.begin // cut.row * known :]
        return RowsThere(cut.row, self._ring.rows[behind:], own, known, cut.is_own(step))


@dataclass(frozen=True, slots=True)
class RowTotals:
    """Totals of each row of a piece, which are on their way."""

    piece: PieceInMemory
    """The piece."""
    program: Program
    """What asks for them."""
    ring: Ring
    """Where they come to; to be fetched first, as far as :attr:`count`."""
    count: int
    """Numbers in all."""

    def answers(self, asking: Asking) -> list[BlockAnswer]:
        """Return what they come to in each block: of the rows that begin there."""
        row, totals = self.piece.first.task.row, _fetched(self.ring, self.count, self.program)
        kinds = self.program.totals

        def answer(run: Run) -> BlockAnswer:
            own = np.array(join_totals(kinds, totals[run.begin // row : run.end // row]))
            return BlockAnswer((), own if asking.totals else None)

        return [
            join_answers(kinds, [answer(run) for run in runs], asking)
            for runs in iter_measuring(self.piece)
        ]


def _fetched(ring: Ring, count: int, program: Program) -> NDArray[np.float64]:
    """Return totals that have been fetched, ``[rows, totals]``."""
    return ring.row_totals.host[:count].view(-1, len(program.totals)).numpy().copy()
