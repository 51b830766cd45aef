"""A plan as JSON and back, so that any process that sees the files can run it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import PurePosixPath, PureWindowsPath

from pydantic import TypeAdapter, ValidationError

from streammerge.errors import PlanError
from streammerge.plan.rendering import printed_plan
from streammerge.plan.types import PLAN_VERSION, MergePlan


def dump_plan(plan: MergePlan) -> str:
    """Return the plan as one line of JSON, in ASCII, which any stream can carry."""
    document = TypeAdapter(MergePlan).dump_python(plan, mode="json")
    if plan.choice is None:
        # Where there was nothing to choose, a plan does not speak of it.
        del document["choice"]
    return json.dumps(document)


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
    for name in _odd_names(plan):
        raise PlanError(f"the plan names the output file {name!r}, not a plain name; plan again")
    return printed_plan(plan)


def _odd_names(plan: MergePlan) -> Iterator[str]:
    """Yield the names of output files that are not where such files lie."""
    layout = plan.layout
    for shard in layout.shards:
        # A folder is that of a part, after which its tensors are called.
        inside = not shard.folder or all(
            0 <= index < len(plan.tasks) and plan.tasks[index].name.startswith(shard.folder)
            for index in shard.tasks
        )
        if not (
            inside and shard.name.count("/") < 2 and all(map(_is_plain, shard.name.split("/")))
        ):
            yield shard.name
    folders = {shard.folder for shard in layout.shards}
    if layout.index_name is not None and not _is_plain(layout.index_name):
        yield layout.index_name
    for folder, name in layout.part_indexes:
        if f"{folder}/" not in folders or not _is_plain(name):
            yield f"{folder}/{name}"
    for companion in plan.companions:
        if not all(map(_is_plain, companion.name.split("/"))):
            yield companion.name


def _is_plain(name: str) -> bool:
    """Return whether a file of this name lies in its directory on every system."""
    readings = {name, PurePosixPath(name).name, PureWindowsPath(name).name}
    return len(readings) == 1 and name.isprintable() and name not in {"", ".."}
