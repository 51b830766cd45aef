"""Statistics over the whole model that several processes find together are those that one finds."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MEMORY, Models, recipe_of

import streammerge
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.checkpoint.snapshot import SNAPSHOT_NAME
from streammerge.engine import scheduling, scopes
from streammerge.errors import ClusterError, ResumeError, StreamMergeError
from streammerge.executors import driving, sweeping, unit
from streammerge.executors.driving import merge_on
from streammerge.executors.seam import Outcome
from streammerge.methods import discover_methods
from streammerge.methods.base import Operand
from streammerge.statistics import BLOCK

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.name != "posix", reason="processes share locks as POSIX does"),
]


class Here:
    """An engine whose only worker is this process."""

    def __init__(self, before: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        self._before = before
        self._ended: list[Outcome] = []
        self.submitted: list[dict[str, Any]] = []

    def workers(self) -> int:
        return 3

    def idle(self) -> int:
        return 3 - len(self._ended)

    def running(self) -> int:
        return len(self._ended)

    def submit(self, request: dict[str, Any]) -> None:
        self._before(request)
        # As it would come over a wire.
        request = json.loads(json.dumps(request))
        self.submitted.append(request)
        error = None
        try:
            unit._do(request, threading.Event())
        except StreamMergeError as failure:
            kind = type(failure).__name__
            error = {"kind": kind, "message": str(failure), "notes": []}
        self._ended.append(Outcome(request["part"], "here", error=error))

    def gather(self, _seconds: float) -> list[Outcome]:
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Here:
    here = Here()
    monkeypatch.setattr(driving, "open_executor", lambda _: here)
    return here


def sweeps_of(engine: Here) -> list[tuple[int, bool]]:
    """Return the shares of sweeps that were asked for: of which part, and whether a sample."""
    asked = [request for request in engine.submitted if "sweep" in request]
    return [(request["part"], request["sweep"]["samples"]) for request in asked]


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def models_of(models: Models, *, ties: bool = False) -> tuple[Path, list[Path]]:
    generator = torch.Generator().manual_seed(9)
    shapes = {"a": (2, BLOCK + 5), "b": (7, 5), "c": (3, BLOCK // 2), "d": (11,), "e": (0,)}

    def draw() -> Path:
        tensors = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
        if ties:
            # Few values, so that thousands share a magnitude, in all parts.
            tensors = {k: (v * 2).round() for k, v in tensors.items()}
        return models.write(tensors)

    return draw(), [draw() for _ in range(2)]


WITH_SCOPE = [
    pytest.param(method.name, number, id=f"{method.name}-{number}")
    for method in discover_methods().values()
    if any(spec.name == "scope" for spec in method.parameters)
    for number in range(len(method.examples))
]


def test_there_are_methods_with_a_scope() -> None:
    assert len(WITH_SCOPE) > 5


@pytest.mark.parametrize(("name", "number"), WITH_SCOPE)
def test_every_method_over_the_model_has_the_same_bytes(
    name: str, number: int, engine: Here, models: Models
) -> None:
    method = discover_methods()[name]
    base, sources = models_of(models)
    recipe = recipe_of(
        name,
        None if method.operand is Operand.WEIGHTS else base,
        sources,
        parameters=dict(method.examples[number]) | {"scope": "model"},
    )
    alone = streammerge.merge(recipe, models.root / "alone", memory=MEMORY)

    manifest = merge_on(recipe, models.root / "out", on="dask", memory=MEMORY, workers=1)

    assert bytes_of(models.root / "out") == bytes_of(models.root / "alone")
    assert manifest.tensors == alone.tensors
    # No part looked for anything on its own: what parts read is what they merge.
    read = sum(part.bytes_by_stage["read"] for part in manifest.run.parts)
    assert read == streammerge.plan(recipe, memory=MEMORY).input_nbytes
    assert not list(models.root.glob("out.*")) + list((models.root / "out").glob(".*"))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "limits",
    [(10**7, 10**7), (1_000, 1_000), (100_000, 1_000), (1_000, 100_000), (100, 100)],
)
def test_little_room_for_values_on_any_side_changes_no_byte(
    limits: tuple[int, int],
    ties: bool,  # noqa: FBT001
    engine: Here,
    models: Models,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then samples choose what is collected, or histograms narrow it down, in several sweeps."""
    base, sources = models_of(models, ties=ties)
    recipe = recipe_of("ties", base, sources, parameters={"density": 0.3, "scope": "model"})
    streammerge.merge(recipe, models.root / "alone", memory=MEMORY)
    with monkeypatch.context() as patch:
        for module, limit in zip((sweeping, scheduling), limits, strict=True):
            _limit(patch, module, limit)
        merge_on(recipe, models.root / "out", on="dask", memory=MEMORY, workers=1)

    assert bytes_of(models.root / "out") == bytes_of(models.root / "alone")
    asked = sweeps_of(engine)
    assert {part for part, samples in asked if not samples} == {1, 2, 3}
    # Of fewer values than a run of a sample has, none is drawn.
    assert any(samples for _, samples in asked) == (limits[0] == 100_000)
    assert (len(asked) > 4) == (min(limits) < 100_000)


def _limit(patch: pytest.MonkeyPatch, module: Any, limit: int) -> None:
    """Let the statistics that a module opens collect so many values."""
    opened = scheduling.open_model_statistics

    def open_small(plan: Any, needs: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(scheduling, "collecting_limit", lambda *_: limit)
            return opened(plan, needs)

    patch.setattr(module, "open_model_statistics", open_small)


def test_a_driver_that_ended_in_a_sweep_goes_on_with_the_answers_that_are_there(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sources = models_of(models)
    recipe = recipe_of("ties", base, sources, parameters={"density": 0.3, "scope": "model"})
    streammerge.merge(recipe, models.root / "alone", memory=MEMORY)
    begun: list[int] = []

    def end(request: dict[str, Any]) -> None:
        begun.append(request["part"])
        if len(begun) == 3:
            raise ClusterError("Stop")

    monkeypatch.setattr(driving, "open_executor", lambda _: Here(end))
    with pytest.raises(ClusterError, match="Stop"):
        merge_on(recipe, models.root / "out", on="dask", memory=MEMORY, workers=1)
    # A sample, the answers of one part, and no more.
    assert len(list((models.root / "out.partial").glob(f"{SNAPSHOT_NAME}-q*of3"))) == 1
    rest = Here()
    monkeypatch.setattr(driving, "open_executor", lambda _: rest)

    merge_on(recipe, models.root / "out", on="dask", memory=MEMORY, workers=1)

    assert sweeps_of(rest) == [(2, False), (3, False)]
    assert bytes_of(models.root / "out") == bytes_of(models.root / "alone")


def test_one_process_goes_on_where_a_sweep_of_several_ended(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sources = models_of(models)
    recipe = recipe_of("ties", base, sources, parameters={"density": 0.3, "scope": "model"})
    streammerge.merge(recipe, models.root / "alone", memory=MEMORY)

    def end(request: dict[str, Any]) -> None:
        if "sweep" not in request:
            raise ClusterError("Stop")

    monkeypatch.setattr(driving, "open_executor", lambda _: Here(end))
    with pytest.raises(ClusterError, match="Stop"):
        merge_on(recipe, models.root / "out", on="dask", memory=MEMORY, workers=1)

    manifest = streammerge.merge(recipe, models.root / "out", memory=MEMORY, resume=True)

    # The thresholds are known.
    planned = streammerge.plan(recipe, memory=MEMORY)
    assert manifest.run.bytes_by_stage["read"] == planned.input_nbytes
    assert bytes_of(models.root / "out") == bytes_of(models.root / "alone")


@pytest.mark.parametrize("what", ["gone", "torn", "of another question"])
def test_answers_that_are_not_what_they_should_be_are_refused(
    what: str, engine: Here, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sources = models_of(models)
    recipe = recipe_of("ties", base, sources, parameters={"density": 0.3, "scope": "model"})
    absorb = scopes.ScopeStatistics.absorb

    def spoil(self: scopes.ScopeStatistics, path: Path) -> None:
        if what == "gone":
            path.unlink()
        elif what == "torn":
            path.write_bytes(path.read_bytes()[:-1])
        else:
            self._searches[0].ask_after_sample(self._searches[0]._room[:5000], run_numel=1024)
        absorb(self, path)

    monkeypatch.setattr(scopes.ScopeStatistics, "absorb", spoil)

    with pytest.raises(ResumeError, match=r"not there any more|answers other questions"):
        merge_on(recipe, models.root / "out", on="dask", memory=MEMORY, workers=1)

    assert not (models.root / "out" / MANIFEST_NAME).exists()
