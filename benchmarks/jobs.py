"""The merges that are measured, and how each contender is told to do them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.models import Models

DENSITY = 0.2
"""Fraction kept by every method that trims or drops."""


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method under the names that the contenders have for it."""

    name: str
    """What commands and results call it."""
    streammerge: str
    """``method`` of a recipe."""
    mergekit: str | None
    """``merge_method`` of a mergekit configuration; None where it has no such method."""
    peft: str | None
    """Function in ``peft.utils.merge_utils``; None where nothing there does the same."""
    has_base: bool
    """Whether the base takes part."""
    has_density: bool
    """Whether task vectors are trimmed or dropped to :data:`DENSITY`."""
    scope: str | None = None
    """``model`` for one threshold over the whole model; None leaves the default."""
    sweeps: int = 1
    """How often every input must be read when none of it is kept."""


METHODS = {
    method.name: method
    for method in (
        Method("ties", "ties", "ties", "ties", has_base=True, has_density=True),
        Method("dare_ties", "dare_ties", "dare_ties", "dare_ties", has_base=True, has_density=True),
        Method(
            "dare_linear",
            "dare_linear",
            "dare_linear",
            "dare_linear",
            has_base=True,
            has_density=True,
        ),
        # On models instead of task vectors, PEFT's weighted sum is the weighted average.
        Method("linear", "linear", "linear", "task_arithmetic", has_base=False, has_density=False),
        Method(
            "task_arithmetic",
            "task_arithmetic",
            "task_arithmetic",
            "task_arithmetic",
            has_base=True,
            has_density=False,
        ),
        Method(
            "magnitude_prune",
            "magnitude_prune",
            None,
            "magnitude_prune",
            has_base=True,
            has_density=True,
        ),
        Method(
            "ties-model-scope",
            "ties",
            None,
            None,
            has_base=True,
            has_density=True,
            scope="model",
            sweeps=2,
        ),
    )
}
"""Every method that is measured, by name."""


class AnyJob(Protocol):
    """What measuring has to know of a job, whatever is done."""

    @property
    def name(self) -> str:
        """What tables and results call it."""

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Directories whose safetensors files are read."""

    @property
    def sweeps(self) -> int:
        """How often every input must be read when none of it is kept."""

    @property
    def nbytes_to_read(self) -> int:
        """Bytes of tensors that are read, over all sweeps."""

    @property
    def nbytes_to_write(self) -> int:
        """Bytes of tensors in the result."""

    @property
    def max_shard_nbytes(self) -> int:
        """Most bytes of tensors per file of the result."""


@dataclass(frozen=True, slots=True)
class Job:
    """One merge: a method on certain models."""

    method: Method
    """What is done."""
    models: Models
    """What it is done to."""

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method.name

    @property
    def sweeps(self) -> int:
        """How often every input must be read when none of it is kept."""
        return self.method.sweeps

    @property
    def max_shard_nbytes(self) -> int:
        """Most bytes of tensors per file of the result: as in the inputs."""
        return self.models.max_shard_nbytes

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The models that are read: the base, if it takes part, then the sources."""
        return self.models.inputs(with_base=self.method.has_base)

    @property
    def weights(self) -> list[float]:
        """One weight per source; they add up to 1."""
        count = len(self.models.tuned)
        return [0.6, 0.4] if count == 2 else [1 / count] * count

    @property
    def nbytes_to_read(self) -> int:
        """Bytes of tensors that are read when every sweep reads all inputs."""
        return self.sweeps * len(self.inputs) * self.models.nbytes

    @property
    def nbytes_to_write(self) -> int:
        """Bytes of tensors in the result."""
        return self.models.nbytes


def streammerge_recipe(job: Job) -> str:
    """Return the recipe, as JSON, which is YAML too."""
    recipe: dict[str, Any] = {
        "method": job.method.streammerge,
        "sources": [
            {"path": str(path), "weight": weight}
            for path, weight in zip(job.models.tuned, job.weights, strict=True)
        ],
        "parameters": {},
        "output": {"dtype": "bfloat16", "max_shard_size": job.max_shard_nbytes},
    }
    if job.method.has_base:
        recipe["base"] = str(job.models.base)
    if job.method.has_density:
        recipe["parameters"]["density"] = DENSITY
    if job.method.scope is not None:
        recipe["parameters"]["scope"] = job.method.scope
    return json.dumps(recipe, indent=1)


def mergekit_config(job: Job) -> str:
    """Return mergekit's configuration; paths are absolute, since it looks others up on a hub."""
    density = {"density": DENSITY} if job.method.has_density else {}
    config: dict[str, Any] = {
        "merge_method": job.method.mergekit,
        "models": [
            {"model": str(path.resolve()), "parameters": {"weight": weight, **density}}
            for path, weight in zip(job.models.tuned, job.weights, strict=True)
        ],
        "dtype": "bfloat16",
    }
    if job.method.has_base:
        config["base_model"] = str(job.models.base.resolve())
    return json.dumps(config, indent=1)


def peft_job(job: Job) -> str:
    """Return what ``run_peft.py`` reads."""
    return json.dumps(
        {
            "function": job.method.peft,
            "base": str(job.models.base) if job.method.has_base else None,
            "sources": [str(path) for path in job.models.tuned],
            "weights": job.weights,
            "density": DENSITY if job.method.has_density else None,
        }
    )
