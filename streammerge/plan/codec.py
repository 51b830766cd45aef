"""A plan as JSON and back, so that any process that sees the files can run it."""

from __future__ import annotations

import json
from pathlib import PurePosixPath, PureWindowsPath

from pydantic import TypeAdapter, ValidationError

from streammerge.errors import PlanError
from streammerge.plan.types import PLAN_VERSION, MergePlan


def dump_plan(plan: MergePlan) -> str:
    """Return the plan as one line of JSON, in ASCII, which any stream can carry."""
    return json.dumps(TypeAdapter(MergePlan).dump_python(plan, mode="json"))


def parse_plan(text: str) -> MergePlan:
    """Return the plan that :func:`dump_plan` wrote.

    Raises:
        PlanError: The text is no plan, or one of another version, or names an output file that is
            not in the output's directory.
    """
    try:
        plan = TypeAdapter(MergePlan).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise PlanError(f"not a plan: {place}: {first['msg']}; plan again") from error
    if plan.version != PLAN_VERSION:
        raise PlanError(
            f"the plan has version {plan.version}, this is version {PLAN_VERSION}; plan again"
        )
    for name in (*(shard.name for shard in plan.layout.shards), plan.layout.index_name):
        if name is not None and not _is_plain(name):
            raise PlanError(
                f"the plan names the output file {name!r}, not a plain name; plan again"
            )
    return plan


def _is_plain(name: str) -> bool:
    """Return whether a file of this name lies in its directory on every system."""
    readings = {name, PurePosixPath(name).name, PureWindowsPath(name).name}
    return len(readings) == 1 and name.isprintable() and name not in {"", ".."}
