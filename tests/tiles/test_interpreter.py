"""What the interpreter leaves to no library's taste."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from streammerge.tiles.functions import logarithm
from streammerge.tiles.interpreter import count_rows, run_program
from streammerge.tiles.program import Majority, Number, Op, Origin, Program, Step, Vote
from streammerge.tiles.totalling import HostSinks


class Zeros:
    """Models of one row of values."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def computed(self, index: int, out: torch.Tensor) -> None:
        out.copy_(self._values)

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"nothing asks for {name}")


@dataclass
class Outcome:
    """What a run leaves behind."""

    result: torch.Tensor | None
    totals: np.ndarray


def run(program: Program, values: torch.Tensor, *, rows: int = 1, numbers: object = ()) -> Outcome:
    memory = torch.empty(count_rows(program), values.numel())
    sinks = HostSinks(program, lambda _, __: None, rows=rows)
    result = run_program(
        program,
        Zeros(values),  # type: ignore[arg-type]
        numbers=numbers,  # type: ignore[arg-type]
        memory=memory,
        row_numel=values.numel() // rows,
        sinks=sinks,
    )
    return Outcome(result, sinks.totals)


@pytest.mark.parametrize("op", [Op.MINIMUM, Op.MAXIMUM])
def test_of_two_zeros_neither_has_a_sign(op: Op) -> None:
    """In vectors and at the end of a row alike."""
    steps = (Step(Op.COMPUTED, 0, 0), Step(op, 0, 0, number=0), Step(Op.STORE, 0, 0))
    constant = Number(Origin.CONSTANT)
    found = run(Program(steps, 1, (constant,)), torch.full((37,), -0.0), numbers=[-0.0]).result

    assert found is not None
    assert not found.signbit().any()


@pytest.mark.parametrize("op", [Op.SUM, Op.LARGEST])
def test_a_total_of_zero_has_no_sign(op: Op) -> None:
    steps = (Step(Op.COMPUTED, 0, 0), Step(op, 0, 0))
    found = run(Program(steps, 1, (), totals=(op,)), torch.full((37,), -0.0)).totals

    assert found.tolist() == [[0.0]]
    assert not np.signbit(found).any()


def test_totals_of_no_elements_are_those_of_one_row() -> None:
    steps = (Step(Op.COMPUTED, 0, 0), Step(Op.SUM, 0, 0), Step(Op.LARGEST, 1, 0))
    program = Program(steps, 1, (), totals=(Op.SUM, Op.LARGEST))

    assert run(program, torch.empty(0)).totals.tolist() == [[0.0, -np.inf]]


def test_square_roots_are_rounded_once() -> None:
    values = torch.rand(1003, generator=torch.Generator().manual_seed(0))
    steps = (Step(Op.COMPUTED, 0, 0), Step(Op.SQUARE_ROOT, 0, 0), Step(Op.STORE, 0, 0))
    found = run(Program(steps, 1, ()), values).result

    assert found is not None
    np.testing.assert_array_equal(found.numpy(), np.sqrt(values.numpy()))


def test_factors_of_a_majority_may_differ_from_row_to_row() -> None:
    row = Number(Origin.ROW)
    one = Number(Origin.CONSTANT, 1.0)
    steps = (
        Step(Op.COMPUTED, 0, 0),
        Step(
            Op.MAJORITY_MEAN, 0, number=0, rows=(0,), majority=Majority(Vote.TOTAL, divides=False)
        ),
        Step(Op.STORE, 0, 0),
    )
    factors = np.array([2.0, 3.0])
    found = run(
        Program(steps, 1, (row, one, one)), torch.ones(4), rows=2, numbers=[factors, 1.0, 1.0]
    ).result

    assert found is not None
    assert found.tolist() == [2.0, 2.0, 3.0, 3.0]


def test_the_logarithm_of_what_is_not_finite_is_no_number() -> None:
    assert np.isnan(logarithm(np.array([np.inf, np.nan, -np.nan]))).all()
