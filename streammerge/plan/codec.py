"""A plan as JSON and back, so that any process that sees the files can run it."""

from __future__ import annotations

from pydantic import TypeAdapter, ValidationError

from streammerge.errors import PlanError
from streammerge.plan.types import PLAN_VERSION, MergePlan


def dump_plan(plan: MergePlan) -> str:
    """Return the plan as one line of JSON."""
    return TypeAdapter(MergePlan).dump_json(plan).decode()


def parse_plan(text: str) -> MergePlan:
    """Return the plan that :func:`dump_plan` wrote.

    Raises:
        PlanError: The text is no plan, or one of another version.
    """
    try:
        plan = TypeAdapter(MergePlan).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise PlanError(f"not a plan: {place}: {first['msg']}") from error
    if plan.version != PLAN_VERSION:
        raise PlanError(f"the plan has version {plan.version}, this is version {PLAN_VERSION}")
    return plan
