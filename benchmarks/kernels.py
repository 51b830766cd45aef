"""Methods at work on one tensor in memory, for whoever measures what the kernels take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

import streammerge
from benchmarks.jobs import DECOMPOSING, METHODS, Job, streammerge_recipe
from benchmarks.models import Models
from streammerge.dtypes import DType
from streammerge.engine.compiled.opening import open_cpu_stage
from streammerge.engine.device import DeviceStage
from streammerge.engine.pieces import Part, PieceInMemory, Stored
from streammerge.engine.resident import measure, sample_pieces
from streammerge.engine.scopes import ScopeStatistics
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


def draw_tensors(shape: tuple[int, int]) -> list[torch.Tensor]:
    """Return a base and its fine-tunes: one tensor each, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
    tuned = [
        (base + 0.002 * torch.randn(shape, generator=generator)).bfloat16() for _ in range(SOURCES)
    ]
    return [base, *tuned]


def write_tensors(tensors: Sequence[torch.Tensor], directory: Path) -> Models:
    """Write them as models, for the planner."""
    paths = [directory / f"model-{index}.safetensors" for index in range(len(tensors))]
    for path, tensor in zip(paths, tensors, strict=True):
        save_file({NAME: tensor}, path)
    return Models("0.15B", paths[0], tuple(paths[1:]))


@dataclass(frozen=True)
class Merging:
    """A method at work on one tensor."""

    plan: MergePlan
    programs: Programs
    stage: DeviceStage
    piece: PieceInMemory

    @classmethod
    def of(cls, name: str, models: Models, tensors: Sequence[torch.Tensor]) -> Merging:
        """Prepare a method of the comparison."""
        job = Job(METHODS[name], models)
        plan = streammerge.plan(json.loads(streammerge_recipe(job)), memory="4GiB", workers=1)
        method = discover_methods()[job.method.streammerge]
        by_path = dict(zip([models.base, *models.tuned], tensors, strict=True))
        inputs = tuple(stored(by_path[Path(model.path)]) for model in plan.models)
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


def stored(tensor: torch.Tensor) -> Stored:
    """Return a tensor in bfloat16 as a piece holds it."""
    return Stored(tensor.view(torch.uint8).numpy().reshape(-1), DType.BF16)
