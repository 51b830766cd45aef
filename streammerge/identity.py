"""What must not change for a merge to go on where another one stopped, or to be found complete."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from streammerge.adapters.combining.plans import CombinationPlan
from streammerge.checkpoint.manifest import digest_recipe
from streammerge.checkpoint.permitting import TOLD
from streammerge.lazily import torch_version
from streammerge.plan.types import MergePlan
from streammerge.recipe.text import load_document
from streammerge.version import VERSION

_MOST_TOLD = 1 << 14
"""Characters of the longest recipe that a journal has the values of."""


def identify(planned: MergePlan | CombinationPlan) -> dict[str, Any]:
    """Return what decides every byte of a merge's output, as JSON.

    How the work is cut, and with how much memory and how many threads it runs, is not part of it.
    """
    return {
        "recipe": digest_recipe(planned.recipe),
        "work": _digest_work(_work(planned)),
        "inputs": {
            file.origin: f"{file.nbytes} bytes of {file.mtime_ns} ns, header {file.header_digest}"
            + ("" if file.remote is None else f", version {file.remote.version}")
            for file in planned.files
        },
        # What is copied as it is; a combination of adapters writes its own.
        "companions": (
            {}
            if isinstance(planned, CombinationPlan)
            else {
                each.name: f"SHA-256 {each.digest}"
                + "".join(
                    f", {change.section}.{change.key} = {change.value}" for change in each.changes
                )
                + ("" if each.insertion is None else f", with {_digest_work((each.insertion,))}")
                for each in planned.companions
            }
        ),
        # Pieces that were merged without one have no numbers for it.
        **(
            {"report": "made"}
            if not isinstance(planned, CombinationPlan) and planned.survey
            else {}
        ),
        # Another build may round differently.
        "versions": {"streammerge": VERSION, "torch": torch_version()},
    }


def told(planned: MergePlan | CombinationPlan) -> dict[str, Any]:
    """Return what a journal has beside the identity: the recipe's values, by which another recipe is told.

    They decide nothing: the digest of the recipe does.
    """
    if len(planned.recipe) > _MOST_TOLD:
        return {}
    return {TOLD: dict(_values(load_document(planned.recipe, origin="recipe"), ""))}


def _values(value: object, path: str) -> Iterator[tuple[str, object]]:
    """Yield every single value of a recipe with the way to it, as ``sources[0].weight``."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _values(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _values(inner, f"{path}[{index}]")
    else:
        yield path, value


def _digest_work(parts: tuple[Any, ...]) -> str:
    """Return a digest of all parts, without their text ever being in memory at once."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        each = part if isinstance(part, tuple) else (part,)
        for value in (len(each), *each):
            # Names of files need not be Unicode.
            digest.update(f"{value!r}\n".encode(errors="backslashreplace"))
    return digest.hexdigest()


def _work(planned: MergePlan | CombinationPlan) -> tuple[Any, ...]:
    if isinstance(planned, CombinationPlan):
        return (
            planned.method,
            planned.semantics,
            planned.seed,
            planned.compute_dtype,
            planned.tasks,
            planned.file_name,
            planned.header,
            planned.config,
        )
    return (
        planned.version,
        planned.method,
        planned.semantics,
        planned.seed,
        planned.keep_non_finite,
        planned.compute_dtype,
        planned.has_base,
        planned.model_scope,
        planned.settings,
        planned.tasks,
        planned.layout,
        *((stage.name, stage.files, stage.shards, *_work(stage.plan)) for stage in planned.fused),
    )
