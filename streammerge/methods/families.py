"""Sparsified task vectors, combined: the steps that TIES, DARE, Breadcrumbs and DELLA share.

    sparsify each task vector ─▶ rescale what is kept ─▶ weigh ─▶ elect a sign per entry
    ─▶ divide the sum of what agrees ─▶ times lambda ─▶ plus the base

PEFT, mergekit and the papers differ in the parts alone: whether weights vote, what divides, what
makes up for what was dropped. Every part is a parameter, and semantics are presets of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from enum import StrEnum
from typing import Protocol

from streammerge.methods.refusing import refuse_sum
from streammerge.recipe.types import ParameterKind, ParameterSpec
from streammerge.statistics.rounds import Answers, Round
from streammerge.tiles.program import Vote
from streammerge.tiles.writing import Factor, Row, Sheet, Sink, majority_mean, total, weighted_sum

_LEAST_SUM = 1e-7
"""Sums of magnitudes below it are not divided by."""
_LEAST_DIVISOR = 1e-8
"""Sums of weights no farther from 0 divide nothing."""


class SignVote(StrEnum):
    """How the majority sign of an element is elected."""

    TOTAL = "total"
    """By the sign of the sum of the kept values."""
    FREQUENCY = "frequency"
    """By the sign of the sum of their signs."""


class Ballot(StrEnum):
    """What votes."""

    UNWEIGHTED = "unweighted"
    """The kept values."""
    WEIGHTED = "weighted"
    """The kept values times their weights, so that a negative weight turns a vote."""


class Divisor(StrEnum):
    """What the sum of what agrees is divided by."""

    NONE = "none"
    """Nothing."""
    COUNT = "count"
    """The number of entries that agree."""
    WEIGHTS = "weights"
    """The sum of their weights."""


class Rescale(StrEnum):
    """What makes up for entries that were dropped."""

    NONE = "none"
    """Nothing."""
    DENSITY = "density"
    """What is kept is divided by the density."""
    L1 = "l1"
    """What is kept is multiplied so that the sum of magnitudes is that of the task vector."""
    PROBABILITY = "probability"
    """What is kept is divided by the probability with which it is."""


MAJORITY_SIGN_METHOD = ParameterSpec(
    name="majority_sign_method",
    kind=ParameterKind.CHOICE,
    doc="How the sign is elected: by the sum of the kept values, or of their signs.",
    default=SignVote.TOTAL.value,
    per_source=False,
    choices=tuple(vote.value for vote in SignVote),
)
BALLOT = ParameterSpec(
    name="ballot",
    kind=ParameterKind.CHOICE,
    doc="What votes: the kept values, or these times their weights.",
    default=Ballot.UNWEIGHTED.value,
    per_source=False,
    choices=tuple(ballot.value for ballot in Ballot),
)
DIVISOR = ParameterSpec(
    name="divisor",
    kind=ParameterKind.CHOICE,
    doc="What the sum of what agrees is divided by: nothing, their number, or their weights.",
    default=Divisor.COUNT.value,
    per_source=False,
    choices=tuple(divisor.value for divisor in Divisor),
)
SUM_DIVISOR = ParameterSpec(
    name="divisor",
    kind=ParameterKind.CHOICE,
    doc="What the weighted sum is divided by: nothing, or the sum of the weights.",
    default=Divisor.NONE.value,
    per_source=False,
    choices=(Divisor.NONE.value, Divisor.WEIGHTS.value),
)
RESCALE = ParameterSpec(
    name="rescale",
    kind=ParameterKind.CHOICE,
    doc="What makes up for dropped entries: nothing, or a factor that keeps the sum of magnitudes.",
    default=Rescale.NONE.value,
    per_source=False,
    choices=(Rescale.NONE.value, Rescale.L1.value),
)
LAMBDA = ParameterSpec(
    name="lambda",
    kind=ParameterKind.FLOAT,
    doc="Factor of the whole change.",
    default=1.0,
    per_source=False,
)


class Adding(Protocol):
    """The parameters of a weighted sum."""

    @property
    def weight(self) -> tuple[float, ...]:
        """Factor per source."""
        ...

    @property
    def divisor(self) -> str:
        """``none`` or ``weights``."""
        ...


class Voting(Protocol):
    """The parameters of an election."""

    @property
    def weight(self) -> tuple[float, ...]:
        """Factor per source."""
        ...

    @property
    def majority_sign_method(self) -> str:
        """``total`` or ``frequency``."""
        ...

    @property
    def ballot(self) -> str:
        """``unweighted`` or ``weighted``."""
        ...

    @property
    def divisor(self) -> str:
        """``none``, ``count`` or ``weights``."""
        ...

    @property
    def lambda_(self) -> float:
        """Factor of the whole change."""
        ...


def elected(sheet: Sheet, rows: Sequence[Row], params: Voting, zero_elects: Factor = 1.0) -> Row:
    """Return the base plus the mean of the weighted rows that have the elected sign.

    Args:
        sheet: The sheet.
        rows: What is kept of each task vector.
        params: Who votes, and what divides.
        zero_elects: The sign that a vote of zero elects.

    Source: Yadav et al. 2023, arXiv:2306.01708, section 4.2, steps 2 and 3.
    """
    weights: Sequence[float] = params.weight
    shares: Sequence[float] | None = {
        Divisor.NONE: None,
        Divisor.COUNT: [1.0] * len(rows),
        Divisor.WEIGHTS: weights,
    }[Divisor(params.divisor)]
    # What votes with its weight is averaged as it is.
    votes = Ballot(params.ballot) is Ballot.WEIGHTED
    merged = majority_mean(
        ballots(rows, params),
        vote=Vote[SignVote(params.majority_sign_method).name],
        factors=[1.0] * len(rows) if votes else weights,
        shares=shares,
        zero_elects=zero_elects,
    )
    return sheet.base + times(merged, params.lambda_)


def ballots(rows: Sequence[Row], params: Voting) -> Sequence[Row]:
    """Return what votes: rows as they are, or times their weights."""
    if Ballot(params.ballot) is Ballot.UNWEIGHTED:
        return rows
    return [times(row, weight) for row, weight in zip(rows, params.weight, strict=True)]


def added(
    sheet: Sheet, rows: Sequence[Row], weights: Sequence[float], *, divisor: str, factor: float
) -> Row:
    """Return the base plus the weighted sum of rows, divided if asked, times a factor."""
    merged = weighted_sum(rows, weights)
    if Divisor(divisor) is Divisor.WEIGHTS:
        merged = merged / sum(weights)
    return sheet.base + times(merged, factor)


def refuse_divisor(params: Adding) -> str | None:
    """Return why the sum of the weights cannot divide, or None if it can or need not.

    Differs from mergekit: sums within 1e-8 of 0 are refused, where it does not divide.
    """
    if Divisor(params.divisor) is not Divisor.WEIGHTS:
        return None
    return refuse_sum(params.weight, "divisor: none", least=_LEAST_DIVISOR)


def times(row: Row, factor: float) -> Row:
    """Return a row times a factor, which mostly is 1."""
    return row if factor == 1 else row * factor


def l1_round(
    sparsified: Callable[[Sheet], Sequence[Row]],
    rescaled: Sequence[bool],
    about: tuple[Hashable, ...],
) -> Round:
    """Return the round that finds a factor per source, so that sums of magnitudes stay what they were.

    Args:
        sparsified: Returns what is kept of each task vector.
        rescaled: Whether a source's is rescaled; the factor of others is 1.
        about: The parameters that this depends on.
    """

    def sinks(sheet: Sheet) -> Sequence[Sink]:
        pairs = zip(sheet.task_vectors, sparsified(sheet), strict=True)
        return [total(abs(row)) for pair in pairs for row in pair]

    def settle(answers: Answers) -> Sequence[float]:
        whole, kept = answers.totals[::2], answers.totals[1::2]
        return [
            all_of_it / rest if wanted and min(all_of_it, rest) >= _LEAST_SUM else 1.0
            for wanted, all_of_it, rest in zip(rescaled, whole, kept, strict=True)
        ]

    return Round(sinks, settle=settle, about=about)
