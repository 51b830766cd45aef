"""Runs a program step by step with the operations of torch: the oracle of every faster machine.

It takes float32 and float64, any number of models, and values that are not finite; and it runs on
any device that torch knows.

Memory: the caller's rows (:func:`count_rows`), a comparison mask, and what :mod:`streammerge.tiles.functions` takes for
a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from streammerge.lazily import torch
from streammerge.tiles.functions import (
    exponential,
    exponential_less_one,
    logarithm,
    logarithm_of_one_more,
    square_root,
)
from streammerge.tiles.program import SINKS, Op, Program, Step, Vote

if TYPE_CHECKING:
    from torch import Tensor

_SLICE = 16_384
"""Elements whose exponentials are computed at once."""


class Models(Protocol):
    """What a program reads, and what depends on where in a tensor an element lies."""

    def base(self, out: Tensor) -> None:
        """Write the base's values into ``[m]``."""
        ...

    def source(self, source: int, out: Tensor) -> None:
        """Write a source's values into ``[m]``."""
        ...

    def task_vector(self, source: int, out: Tensor) -> None:
        """Write a source's values minus the base's into ``[m]``."""
        ...

    def computed(self, index: int, out: Tensor) -> None:
        """Write what was computed before, one value per element, into ``[m]``."""
        ...

    def change_(self, row: Tensor, source: int) -> None:
        """Change the values ``[m]`` as a source's adapter does, and round them, in place."""
        ...

    def trim_(self, row: Tensor, trim: int) -> None:
        """Set to zero what a trim does not keep of ``[m]``, in place."""
        ...

    def mark_(self, row: Tensor, trim: int) -> None:
        """Replace each value of ``[m]`` by 1 if a trim keeps it, and 0 if not."""
        ...

    def drop_(self, row: Tensor, source: int, probability: Tensor | float) -> None:
        """Set to zero what a source's random numbers do not keep of ``[m]``, in place."""
        ...


class Sinks(Protocol):
    """What becomes of the rows that a program does not store."""

    def rank(self, index: int, row: Tensor) -> None:
        """Take ``[m]`` of values that are ranked, in a register."""
        ...

    def total(self, index: int, op: Op, a: Tensor, b: Tensor | None) -> None:
        """Take ``[m]``, or two of them, in registers, whose total of this kind is asked for."""
        ...


def run_program(
    program: Program,
    models: Models,
    *,
    numbers: Sequence[float | NDArray[np.float64]],
    memory: Tensor,
    row_numel: int,
    sinks: Sinks | None = None,
) -> Tensor | None:
    """Run a program on some consecutive elements of a tensor.

    Args:
        program: The program.
        models: What it reads.
        numbers: The number of each slot; ``[rows]`` of those that differ from row to row.
        memory: ``[count_rows(program), m]`` in the compute dtype.
        row_numel: Elements per row; ``m`` is a multiple of it. The same as ``m`` where rows do not
            matter.
        sinks: Takes what is not stored.

    Returns:
        The result, ``[m]``, in a register; None where nothing is stored.
    """
    machine = _Machine(program, models, numbers, memory, row_numel)
    result = None
    for step in program.steps:
        if step.op is Op.STORE:
            result = machine.rows[step.a]
            if step.b >= 0:
                result = torch.add(machine.rows[step.b], result, out=result)
        elif step.op in SINKS:
            assert sinks is not None  # noqa: S101 - who asks, listens
            row = machine.rows[step.a]
            if step.op is Op.RANK:
                sinks.rank(step.out, row)
            else:
                sinks.total(step.out, step.op, row, machine.rows[step.b] if step.b >= 0 else None)
        else:
            machine.run(step)
    return result


def count_rows(program: Program) -> int:
    """Return how many rows a run needs: the program's registers, and some for single steps."""
    if program.uses(Op.MAJORITY_MEAN):
        return program.registers + 5
    return program.registers + program.uses(Op.ADD_SCALED, Op.KEEP_RANDOM)


class _Machine:
    """One run."""

    def __init__(
        self,
        program: Program,
        models: Models,
        numbers: Sequence[float | NDArray[np.float64]],
        memory: Tensor,
        row_numel: int,
    ) -> None:
        self._models = models
        self._numbers = numbers
        self.rows = memory[: program.registers].unbind()
        self._spare = memory[program.registers :].unbind()
        self._row_numel = row_numel
        self._n_rows = memory.shape[1] // row_numel if row_numel else 1

    def run(self, step: Step) -> None:
        """Do one step."""
        if step.op in _LOADS:
            self._load(step)
        elif step.op in _BINARY:
            self._compute(step, _BINARY[step.op])
        elif step.op in _UNARY:
            _UNARY[step.op](self.rows[step.a], self.rows[step.out])
        elif step.op in _PLACED:
            self._place(step)
        else:
            self._do_other(step)

    def _load(self, step: Step) -> None:
        row = self.rows[step.out]
        match step.op:
            case Op.BASE:
                self._models.base(row)
            case Op.SOURCE:
                self._models.source(step.a, row)
            case Op.TASK_VECTOR:
                self._models.task_vector(step.a, row)
                if step.c >= 0:
                    self._models.trim_(row, step.c)
            case _:
                self._models.computed(step.a, row)

    def _compute(self, step: Step, compute: _Binary) -> None:
        """Do what a step does to two rows, or to a row and a number."""
        a, out = self.rows[step.a], self.rows[step.out]
        if step.b >= 0:
            compute(a, self.rows[step.b], out)
            return
        number = self._number(step.number, a)
        if number.dim():
            compute(self._by_row(a), number, self._by_row(out))
        else:
            compute(a, number, out)

    def _number(self, index: int, like: Tensor) -> Tensor:
        """Return a number as a tensor: of no dimensions, or ``[rows, 1]``."""
        number = self._numbers[index]
        if isinstance(number, np.ndarray):
            return torch.from_numpy(number[:, None]).to(like.device, like.dtype)
        # A fill takes its number along; a tensor made from a list would be copied, and waited for.
        return like.new_full((), number)

    def _by_row(self, row: Tensor) -> Tensor:
        return row.view(self._n_rows, self._row_numel)

    def _place(self, step: Step) -> None:
        """Do what depends on where an element lies."""
        out = self.rows[step.out]
        probability: Tensor | float = 0.0
        if step.op is Op.KEEP_RANDOM:
            if step.b >= 0:
                probability = self._spare[0].copy_(self.rows[step.b])
            else:
                number = self._numbers[step.number]
                assert not isinstance(number, np.ndarray)  # noqa: S101 - rows have rows of them
                probability = number
        if step.a != step.out:
            out.copy_(self.rows[step.a])
        match step.op:
            case Op.KEEP_LARGEST:
                self._models.trim_(out, step.c)
            case Op.IN_TOP:
                self._models.mark_(out, step.c)
            case Op.KEEP_RANDOM:
                self._models.drop_(out, step.c, probability)
            case _:
                self._models.change_(out, step.c)

    def _do_other(self, step: Step) -> None:
        match step.op:
            case Op.FILL:
                out = self.rows[step.out]
                number = self._number(step.number, out)
                (self._by_row(out) if number.dim() else out).copy_(number)
            case Op.ADD_SCALED:
                self._add_scaled(step)
            case Op.SELECT:
                chosen = self.rows[step.c] != 0
                torch.where(chosen, self.rows[step.a], self.rows[step.b], out=self.rows[step.out])
            case Op.MAJORITY_MEAN:
                self._average_majority(step)
            case _:
                raise AssertionError(f"no step does {step.op}")

    def _add_scaled(self, step: Step) -> None:
        row, scaled = self.rows[step.b], self._spare[0]
        number = self._number(step.number, row)
        if number.dim():
            torch.mul(self._by_row(row), number, out=self._by_row(scaled))
        else:
            torch.mul(row, number, out=scaled)
        torch.add(self.rows[step.a], scaled, out=self.rows[step.out])

    def _average_majority(self, step: Step) -> None:
        rows = [self.rows[each] for each in step.rows]
        how, n = step.majority, len(rows)
        assert how is not None  # noqa: S101 - as every step of this kind
        first = step.number
        factors = [self._number(first + i, rows[0]) for i in range(n)]
        shares = [self._number(first + n + i, rows[0]) for i in range(n)]
        elected, total, share = self._spare[2:5]
        zero_elects = self._numbers[first + 2 * n]
        assert not isinstance(zero_elects, np.ndarray)  # noqa: S101 - one sign for all rows
        self._elect(rows, how.vote, zero_elects, elected)
        total.zero_()
        share.zero_()
        for row, factor, own_share in zip(rows, factors, shares, strict=True):
            # The magnitude where the entry agrees with the elected sign, and 0 elsewhere.
            agreeing = torch.mul(row, elected, out=self._spare[0]).clamp_min_(0.0)
            torch.sign(agreeing, out=self._spare[1])
            # Numbers may differ from row to row.
            self._by_row(self._spare[1]).mul_(own_share)
            self._by_row(agreeing).mul_(factor)
            share.add_(self._spare[1])
            total.add_(agreeing)
        # Rounding is symmetric: the sum of magnitudes, signed at the end, is the sum of the entries.
        total.mul_(elected)
        if how.divides:
            total.div_(share.masked_fill_(share == 0, 1.0))
        # Only the sign of a zero would differ, and +0.0 is what a sum gives.
        torch.add(total, 0.0, out=self.rows[step.out])

    def _elect(
        self, rows: Sequence[Tensor], vote: Vote, zero_elects: float, elected: Tensor
    ) -> None:
        """Fill a row with 1 and -1."""
        votes = self._spare[1]
        for index, row in enumerate(rows):
            own = row if vote is Vote.TOTAL else torch.sign(row, out=self._spare[0])
            if index == 0:
                votes.copy_(own)
            else:
                votes.add_(own)
        # ge and gt write 1.0 and 0.0 into a float row; 2x - 1 makes them 1 and -1.
        compare = torch.ge if zero_elects >= 0 else torch.gt
        compare(votes, 0.0, out=elected)
        elected.mul_(2.0).sub_(1.0)


_Binary = Callable[["Tensor", "Tensor", "Tensor"], object]


_LOADS = frozenset({Op.BASE, Op.SOURCE, Op.TASK_VECTOR, Op.COMPUTED})
_PLACED = frozenset({Op.KEEP_LARGEST, Op.IN_TOP, Op.KEEP_RANDOM, Op.CHANGED})
_BINARY: Mapping[Op, _Binary] = {
    Op.ADD: lambda a, b, out: torch.add(a, b, out=out),
    Op.SUBTRACT: lambda a, b, out: torch.sub(a, b, out=out),
    Op.MULTIPLY: lambda a, b, out: torch.mul(a, b, out=out),
    Op.DIVIDE: lambda a, b, out: torch.div(a, b, out=out),
    # torch returns either of two zeros, by where in a row they lie.
    Op.MINIMUM: lambda a, b, out: torch.minimum(a, b, out=out).add_(0.0),
    Op.MAXIMUM: lambda a, b, out: torch.maximum(a, b, out=out).add_(0.0),
    Op.GREATER: lambda a, b, out: torch.gt(a, b, out=out),
    Op.AT_LEAST: lambda a, b, out: torch.ge(a, b, out=out),
    Op.EQUAL: lambda a, b, out: torch.eq(a, b, out=out),
}


def _through_numpy(
    function: Callable[..., NDArray[np.float64]],
) -> Callable[[Tensor, Tensor], object]:
    """Return a function of rows that computes slice by slice in float64."""

    def compute(a: Tensor, out: Tensor) -> None:
        single = out.dtype == torch.float32
        for begin in range(0, a.numel(), _SLICE):
            values = a[begin : begin + _SLICE].cpu().numpy().astype(np.float64)
            out[begin : begin + _SLICE].copy_(torch.from_numpy(function(values, single=single)))

    return compute


_UNARY: Mapping[Op, Callable[[Tensor, Tensor], object]] = {
    Op.ABSOLUTE: lambda a, out: torch.abs(a, out=out),
    Op.SIGN: lambda a, out: torch.sign(a, out=out),
    # torch's own is not rounded as IEEE 754 says: it may come from a library of lower accuracy.
    Op.SQUARE_ROOT: _through_numpy(square_root),
    Op.EXPONENTIAL: _through_numpy(exponential),
    Op.LOGARITHM: _through_numpy(logarithm),
    Op.EXPONENTIAL_LESS_ONE: _through_numpy(exponential_less_one),
    Op.LOGARITHM_OF_ONE_MORE: _through_numpy(logarithm_of_one_more),
}
