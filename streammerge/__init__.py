"""Merge models and adapters larger than memory, exactly, at the speed of the disk.

import streammerge as sm
plan = sm.plan("recipe.yaml", memory="2GiB")     # reads headers only
print(plan)
manifest = sm.merge(plan, "out/")
sm.functional.ties(task_tensors, weights, density=0.2)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from streammerge.version import VERSION

if TYPE_CHECKING:
    from streammerge import functional
    from streammerge.analysing import analyze
    from streammerge.checkpoint.manifest import Manifest
    from streammerge.checkpoint.reading import read_checkpoint
    from streammerge.checkpoint.types import Checkpoint
    from streammerge.checkpoint.verifying import verify_files
    from streammerge.differing import diff
    from streammerge.engine.progress import ProgressEvent
    from streammerge.errors import StreamMergeError
    from streammerge.extracting.extraction import extract
    from streammerge.plan.types import MergePlan
    from streammerge.recipe.types import Recipe
    from streammerge.report.document import Report
    from streammerge.report.page import render_page
    from streammerge.report.writing import read_report
    from streammerge.run import load_recipe, merge, plan, verify_against
    from streammerge.together import merge_together, plan_together

__version__ = VERSION

__all__ = [
    "Checkpoint",
    "Manifest",
    "MergePlan",
    "ProgressEvent",
    "Recipe",
    "Report",
    "StreamMergeError",
    "__version__",
    "analyze",
    "diff",
    "extract",
    "functional",
    "load_recipe",
    "merge",
    "merge_part",
    "merge_together",
    "plan",
    "plan_together",
    "read_checkpoint",
    "read_report",
    "read_status",
    "render_page",
    "verify_against",
    "verify_files",
]

# Names are imported on first use, so that `streammerge --help` does not wait for torch.
_HOMES = {
    "Checkpoint": "streammerge.checkpoint.types",
    "Manifest": "streammerge.checkpoint.manifest",
    "MergePlan": "streammerge.plan.types",
    "ProgressEvent": "streammerge.engine.progress",
    "Recipe": "streammerge.recipe.types",
    "Report": "streammerge.report.document",
    "StreamMergeError": "streammerge.errors",
    "analyze": "streammerge.analysing",
    "diff": "streammerge.differing",
    "extract": "streammerge.extracting.extraction",
    "load_recipe": "streammerge.run",
    "merge": "streammerge.run",
    "merge_part": "streammerge.parting",
    "merge_together": "streammerge.together",
    "plan": "streammerge.run",
    "plan_together": "streammerge.together",
    "read_checkpoint": "streammerge.checkpoint.reading",
    "read_report": "streammerge.report.writing",
    "render_page": "streammerge.report.page",
    "read_status": "streammerge.checkpoint.status",
    "verify_against": "streammerge.run",
    "verify_files": "streammerge.checkpoint.verifying",
}


# `plan` names a function here and a subpackage on disk. Loading a subpackage binds its name once;
# done now, and undone, it cannot hide the function later.
importlib.import_module("streammerge.plan")
del globals()["plan"]


def __getattr__(name: str) -> Any:
    if name == "functional":
        return importlib.import_module("streammerge.functional")
    if name not in _HOMES:
        raise AttributeError(f"module 'streammerge' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value
