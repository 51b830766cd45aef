"""Methods at work on one tensor in memory, for whoever measures what the kernels take."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import streammerge
from benchmarks.jobs import DECOMPOSING, METHODS, Job, streammerge_recipe
from benchmarks.models import Models
from streammerge.dtypes import DType
from streammerge.engine.compiled.opening import open_cpu_stage
from streammerge.engine.device import DeviceStage
from streammerge.engine.pieces import Part, PieceInMemory, Stored
from streammerge.engine.resident import measure, sample_pieces
from streammerge.engine.scopes import ScopeStatistics
from streammerge.floats import narrow
from streammerge.methods import discover_methods
from streammerge.methods.programs import Programs
from streammerge.plan.budgeting import values_limit
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import MergePlan
from streammerge.statistics import count_blocks
from streammerge.statistics.rounds import Found

ROW_NUMEL = 2048
SOURCES = 2
NAME = "weight"
BY_ELEMENT = [name for name, job in METHODS.items() if name not in DECOMPOSING and not job.as_it_is]
"""All but what decomposes whole matrices, in torch, and recipes that speak of layers."""


@dataclass(frozen=True)
class Drawn:
    """A base and its fine-tunes, of one tensor each, in memory and as files."""

    dtype: DType
    """Their element type, and that of what is merged."""
    tensors: tuple[NDArray[np.uint8], ...]
    """The bytes of the base, and of every fine-tune."""
    models: Models
    """The files, for the planner."""

    @classmethod
    def at_random(cls, shape: tuple[int, int], dtype: DType, directory: Path) -> Drawn:
        """Draw them; the same numbers every time."""
        generator = np.random.default_rng(0)
        base = 0.02 * generator.standard_normal(shape[0] * shape[1])
        tuned = [base + 0.002 * generator.standard_normal(base.size) for _ in range(SOURCES)]
        tensors = tuple(narrow(values, dtype) for values in (base, *tuned))
        paths = [directory / f"{dtype}-{index}.safetensors" for index in range(len(tensors))]
        for path, tensor in zip(paths, tensors, strict=True):
            entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, tensor.nbytes]}
            header = json.dumps({NAME: entry}).encode()
            path.write_bytes(len(header).to_bytes(8, "little") + header + tensor.tobytes())
        return cls(dtype, tensors, Models("0.15B", paths[0], tuple(paths[1:])))


@dataclass(frozen=True)
class Merging:
    """A method at work on one tensor."""

    plan: MergePlan
    programs: Programs
    stage: DeviceStage
    piece: PieceInMemory

    @classmethod
    def of(cls, name: str, drawn: Drawn) -> Merging:
        """Prepare a method of the comparison."""
        job = Job(METHODS[name], drawn.models)
        recipe = json.loads(streammerge_recipe(job))
        recipe["output"]["dtype"] = drawn.dtype.torch_name
        plan = streammerge.plan(recipe, memory="4GiB", workers=1)
        method = discover_methods()[job.method.streammerge]
        paths = [drawn.models.base, *drawn.models.tuned]
        by_path = dict(zip(paths, drawn.tensors, strict=True))
        inputs = tuple(Stored(by_path[Path(model.path)], drawn.dtype) for model in plan.models)
        return cls(
            plan,
            programs_of_plan(plan, method)[0],
            open_cpu_stage(plan, method),
            PieceInMemory((Part(plan.tasks[0], 0, 0, plan.tasks[0].numel),), inputs),
        )

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return self.plan.tasks[0].numel

    def find(self) -> Found:
        """Find all that the method asks, as the engine does: sample, sweep, conclude."""
        statistics = ScopeStatistics(
            self.programs,
            numel=self.numel,
            blocks=count_blocks(self.numel),
            compute_dtype=self.plan.compute_dtype,
            limit=values_limit(self.numel),
        )
        while statistics.found is None:
            sample_pieces(self.stage, statistics, [self.piece])
            measure(self.stage, statistics, self.piece)
            statistics.conclude()
        return statistics.found

    def merge(self, found: Found, out: NDArray[np.uint8]) -> None:
        """Merge the tensor, as the last pass does.

        Args:
            found: What the method asks.
            out: Receives the bytes of the result.
        """
        self.stage.apply(self.piece, [found], Stored(out, self.plan.tasks[0].made_dtype))
