"""A report as plain data: the tables, and all that stands beside them.

    report = sm.analyze("recipe.yaml")
    pandas.DataFrame(report.table("tensors"))

Everything but ``run`` depends on the recipe and the inputs alone.

Memory: about 40 bytes per number, 30 of each tensor with two sources.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.assignment.types import Action
from streammerge.checkpoint.manifest import RunRecord
from streammerge.dtypes import DType
from streammerge.engine.pipeline import RunReport
from streammerge.engine.results import TensorResult
from streammerge.plan.asking import find_method
from streammerge.plan.sweeps import programs_of_plan, surveys_of_plan
from streammerge.plan.types import MergePlan, TensorTask
from streammerge.recipe.types import BASE, Recipe
from streammerge.report.advice import FRACTIONS, advise, density_for
from streammerge.report.naming import natural
from streammerge.report.tables import (
    TABLES,
    SurveyedTensor,
    Table,
    build_tables,
    describe_measures,
)
from streammerge.statistics.surveying import BINS, SAMPLED, bin_edges

FORMAT = "streammerge report"
REPORT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Report:
    """What models differ in, and what a merge made of it."""

    document: dict[str, Any]
    """All of it, as JSON has it."""

    def table(self, name: str = "tensors") -> Table:
        """Return one of the tables ``tensors``, ``layers``, ``modules``, ``cells`` and ``model``.

        Raises:
            ValueError: There is no such table.
        """
        if name not in TABLES:
            raise ValueError(f"table: expected one of {', '.join(TABLES)}, got {name!r}")
        table: Table = self.document["tables"][name]
        return table

    @property
    def advice(self) -> list[dict[str, Any]]:
        """What arithmetic alone suggests, each with its number."""
        found: list[dict[str, Any]] = self.document["advice"]
        return found

    def as_json(self) -> str:
        """Return it as text."""
        return json.dumps(self.document, allow_nan=False)


def report_of(
    planned: MergePlan, run: RunReport, recipe: Recipe, *, kind: str, record: RunRecord | None
) -> Report:
    """Return the report of a plan that has run.

    Args:
        planned: The plan, which asked for one.
        run: What running it came to.
        recipe: The recipe that it was made from.
        kind: ``merge``, ``analysis`` or ``comparison``.
        record: What the run took; None leaves that out.
    """
    sources = planned.models[planned.has_base :]
    tables = build_tables(list(surveyed_tensors(planned, run)), len(sources))
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": REPORT_VERSION,
        "kind": kind,
        "method": planned.method,
        "semantics": planned.semantics,
        "recipe": planned.recipe,
        "vectors": "task vectors" if planned.has_base else "the models' own values",
        "base": planned.models[0].origin if planned.has_base else None,
        "sources": [
            {"number": number, "label": each.label, "path": each.origin, "adapter": each.adapter}
            for number, each in enumerate(sources)
        ],
        "measures": describe_measures(tables),
        "tables": tables,
        "histograms": {
            "edges": bin_edges().tolist(),
            "counts": run.histograms[planned.has_base :].tolist(),
            "sampled": SAMPLED,
        },
        "copied": _copied(planned, recipe),
        "densities": _densities(run.histograms[planned.has_base :].tolist()),
        "dropped": sorted(planned.dropped, key=natural),
        "notes": [f"{note.topic}: {note.text}" for note in planned.notes],
    }
    weights = [(each.models, dict(each.values)) for each in planned.settings]
    document["advice"] = advise(document, weights, has_base=planned.has_base)
    document["run"] = None if record is None else _run_of(record)
    return Report(document)


def comparison_of(
    paths: Sequence[str],
    tensors: Sequence[SurveyedTensor],
    histograms: NDArray[np.int64] | None,
    lists: Mapping[str, Any],
) -> Report:
    """Return the report of a comparison of models with the first of them.

    Args:
        paths: The models.
        tensors: What is known of the tensors that the first one shares with others.
        histograms: ``[models - 1, bins]``; None where there are no such tensors.
        lists: Which tensors are equal, changed, or not everywhere the same thing.
    """
    tables = {
        title: {name: each for name, each in table.items() if not _is_of_a_result(name)}
        for title, table in build_tables(tensors, len(paths) - 1).items()
    }
    counts = [[0] * BINS] * (len(paths) - 1) if histograms is None else histograms.tolist()
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": REPORT_VERSION,
        "kind": "comparison",
        "method": "diff",
        "semantics": "values",
        "recipe": "",
        "vectors": "task vectors",
        "base": paths[0],
        "sources": [
            {"number": number, "label": f"models[{number + 1}]", "path": path, "adapter": None}
            for number, path in enumerate(paths[1:])
        ],
        "measures": describe_measures(tables),
        "tables": tables,
        "histograms": {"edges": bin_edges().tolist(), "counts": counts, "sampled": SAMPLED},
        "copied": {"name": [], "action": [], "numel": [], "reason": []},
        "densities": _densities(counts),
        "dropped": [],
        "notes": [],
        **lists,
    }
    document["advice"] = advise(document, [], has_base=True)
    document["run"] = None
    return Report(document)


def _is_of_a_result(column: str) -> bool:
    """Return whether a column tells of what a merge has made."""
    kept = {"density", "threshold", "kept_norm", "overlap", "kept_conflicts"}
    return column.partition(".")[0] in {"change", "change_norm", "carried", "aligned", *kept}


def _densities(counts: Sequence[Sequence[int]]) -> list[dict[str, float | None]]:
    return [
        {str(fraction): density_for(each, fraction) for fraction in FRACTIONS} for each in counts
    ]


def surveyed_tensors(planned: MergePlan, run: RunReport) -> Iterator[SurveyedTensor]:
    """Yield what a run has found of its tensors."""
    programs = programs_of_plan(planned, find_method(planned.method))
    surveys = surveys_of_plan(planned, programs)
    for index, task in enumerate(planned.tasks):
        result = run.results.get(index)
        if result is None or result.survey is None:
            continue
        setting = planned.settings[task.setting]
        sources = tuple(model - planned.has_base for model in setting.sources)
        layout = surveys[task.setting].layout
        thresholds = _thresholds_of(result) if layout.keeps else ()
        name = task.name if task.region is None or task.leads else f"{task.name} (rest)"
        yield SurveyedTensor(
            name, task.numel, layout, result.survey, sources, result.kept, thresholds
        )


def _thresholds_of(result: TensorResult) -> tuple[float | None, ...]:
    # JSON has no infinity, which is the threshold where nothing is kept.
    return tuple(None if each == float("inf") else each for each in result.thresholds)


def _copied(planned: MergePlan, recipe: Recipe) -> Table:
    """Return which tensors were not merged, and why."""
    given = [
        (re.compile(fnmatch.translate(rule.tensors)).match, number, rule.copy)
        for number, rule in enumerate(recipe.rules)
        if rule.copy is not None
    ]
    rows = []
    for task in planned.tasks:
        if task.action is Action.MERGE or not task.leads:
            continue
        reason = _reason_of(planned, task)
        for matches, number, copied in given:
            if task.name not in planned.copied_from_base and matches(task.name):
                owner = "base" if copied == BASE else str(copied)
                reason = f"rules[{number}] says copy: {owner}"
                break
        rows.append((task.name, task.action.value, task.numel, reason))
    rows.sort(key=lambda row: natural(row[0]))
    heads = ("name", "action", "numel", "reason")
    return {head: [row[at] for row in rows] for at, head in enumerate(heads)}


def _reason_of(planned: MergePlan, task: TensorTask) -> str:
    if task.name in planned.copied_from_base:
        return "a source lacks it, and the recipe says missing: base"
    if task.action is Action.SCALES:
        return "scales, found of the values that are stored as codes"
    if task.action is Action.COPY_IF_EQUAL or not _is_float(task.dtype):
        return "not numbers to be merged; equal in all models that have it"
    if sum(entry is not None for entry in task.inputs) == 1:
        return "no source changes it"
    return "taken from one model"


def _is_float(dtype: DType) -> bool:
    return dtype.is_float


def _run_of(record: RunRecord) -> dict[str, Any]:
    return {
        "seconds": record.seconds,
        "seconds_by_stage": record.seconds_by_stage,
        "bytes_by_stage": record.bytes_by_stage,
        "threads": record.threads,
        "projected_memory": record.projected_memory,
        "measured_memory": record.measured_memory,
        "memory_budget": record.memory_budget,
        "resumed": record.resumed,
        "device": record.device,
        "kernels": record.kernels,
        "versions": record.versions,
    }
