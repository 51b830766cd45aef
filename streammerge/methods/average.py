"""Average: the mean of many checkpoints of one run, oldest first, by a schedule of weights.

Source: Izmailov et al. 2018, "Averaging weights leads to wider optima", arXiv:1803.05407, and
Kaddour 2022, "Latest weight averaging", arXiv:2209.14981, for the uniform mean; an exponential moving
average, cut to the checkpoints at hand and normalised, for the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from streammerge.methods.base import Law, MergeMethod, Operand, Work, parameter
from streammerge.methods.refusing import refuse_unless_positive
from streammerge.recipe.types import ParameterKind, ParameterSpec
from streammerge.tiles.writing import Row, Sheet, weighted_sum


class Schedule(StrEnum):
    """How checkpoints weigh."""

    UNIFORM = "uniform"
    """All alike."""
    EXPONENTIAL = "exponential"
    """Each ``decay`` times what the next, newer one weighs."""


SCHEDULE = ParameterSpec(
    name="schedule",
    kind=ParameterKind.CHOICE,
    doc="How checkpoints weigh: all alike, or each `decay` times what the next, newer one weighs.",
    default=Schedule.UNIFORM.value,
    per_source=False,
    choices=tuple(Schedule),
)
DECAY = ParameterSpec(
    name="decay",
    kind=ParameterKind.FLOAT,
    doc="What a checkpoint weighs less than the next one under `schedule: exponential`, in (0, 1].",
    default=0.9,
    per_source=False,
    minimum=0.0,
    maximum=1.0,
)


@dataclass(frozen=True, slots=True)
class AverageParams:
    """Parameters of ``average``."""

    schedule: str = parameter(SCHEDULE)
    """``uniform`` or ``exponential``."""
    decay: float = parameter(DECAY)
    """Of ``exponential``, in (0, 1]."""


def average(params: AverageParams) -> Work:
    """Return ``sum_i d^(n - 1 - i) x_i``, divided by the sum of the weights."""

    def merge(sheet: Sheet) -> Row:
        decay = params.decay if Schedule(params.schedule) is Schedule.EXPONENTIAL else 1.0
        raw = [decay ** (sheet.sources - 1 - source) for source in range(sheet.sources)]
        return weighted_sum(sheet.values, [weight / sum(raw) for weight in raw])

    return Work(merge)


def _refuse(params: AverageParams) -> str | None:
    if Schedule(params.schedule) is Schedule.UNIFORM:
        return None
    return refuse_unless_positive("decay", params.decay, "all checkpoints but the last would go")


METHODS = (
    MergeMethod(
        name="average",
        summary="The mean of many checkpoints of one run, all alike or newer ones more.",
        reference="Izmailov et al. 2018, arXiv:1803.05407",
        params=AverageParams,
        operand=Operand.WEIGHTS,
        work=average,
        refuse=_refuse,
        sums=True,
        examples=({}, {"schedule": "exponential", "decay": 0.5}),
        waived={
            Law.FIXED_POINT: "weights times equal values are rounded before they are added",
            Law.ORDER: "under an exponential schedule a checkpoint weighs by its place",
        },
    ),
)
