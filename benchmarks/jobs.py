"""The merges that are measured, and how each contender is told to do them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
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
    mergekit: str | None = None
    """``merge_method`` of a mergekit configuration; None where it has no such method."""
    peft: str | None = None
    """Function in ``peft.utils.merge_utils``; None where nothing there does the same."""
    has_base: bool = True
    """Whether the base takes part."""
    has_weights: bool = True
    """Whether every source has a weight."""
    has_density: bool = False
    """Whether task vectors are trimmed or dropped to :data:`DENSITY`."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Further parameters of a recipe."""
    of_mergekit: dict[str, Any] = field(default_factory=dict)
    """Further parameters of a mergekit configuration."""
    semantics: str | None = None
    """``semantics`` of a recipe; None leaves the default."""
    most_sources: int | None = None
    """How many sources it takes at most; None for any number."""
    sweeps: int = 1
    """How often every input must be read when none of it is kept."""
    as_it_is: bool = False
    """Whether streammerge is given mergekit's own configuration."""
    sliced: bool = False
    """Whether that lists the layers of every model, as people do."""

    @classmethod
    def of_both(cls, name: str, **options: Any) -> Method:
        """Return a method that mergekit calls by the same name, and does the same way."""
        return cls(name, name, name, semantics="mergekit", **options)

    @classmethod
    def of_all(cls, name: str, **options: Any) -> Method:
        """Return a method that PEFT, too, calls by the same name; it is done as PEFT does."""
        return cls(name, name, name, name, **options)


_ROWS = {"nuslerp_flatten": False}
_T = {"t": 0.4}
METHODS = {
    method.name: method
    for method in (
        Method.of_all("ties", has_density=True),
        Method.of_all("dare_ties", has_density=True),
        Method.of_all("dare_linear", has_density=True),
        # On models instead of task vectors, PEFT's weighted sum is the weighted average.
        Method("linear", "linear", "linear", "task_arithmetic", has_base=False),
        Method.of_all("task_arithmetic"),
        Method("magnitude_prune", "magnitude_prune", peft="magnitude_prune", has_density=True),
        Method(
            "ties-model-scope", "ties", has_density=True, parameters={"scope": "model"}, sweeps=2
        ),
        Method("ties-mergekit", "ties", "ties", semantics="mergekit", has_density=True),
        Method(
            "dare_ties-mergekit", "dare_ties", "dare_ties", semantics="mergekit", has_density=True
        ),
        Method(
            "dare_linear-mergekit",
            "dare_linear",
            "dare_linear",
            semantics="mergekit",
            has_density=True,
        ),
        Method.of_both("breadcrumbs", has_density=True),
        Method.of_both("breadcrumbs_ties", has_density=True),
        Method.of_both("della", has_density=True),
        Method.of_both("della_linear", has_density=True),
        Method.of_both(
            "sce",
            has_weights=False,
            parameters={"select_topk": DENSITY},
            of_mergekit={"select_topk": DENSITY},
        ),
        Method.of_both("slerp", has_weights=False, parameters=_T, of_mergekit=_T, most_sources=1),
        Method.of_both("nuslerp", most_sources=2),
        Method(
            "nuslerp-rows",
            "nuslerp",
            "nuslerp",
            parameters={"axis": "rows"},
            of_mergekit=_ROWS,
            most_sources=2,
        ),
        Method.of_both("multislerp"),
        Method.of_both("karcher", has_base=False, has_weights=False),
        Method.of_both("model_stock", has_weights=False),
        Method(
            "model_stock-rows",
            "model_stock",
            "model_stock",
            has_weights=False,
            parameters={"filter_wise": True},
            of_mergekit={"filter_wise": True},
        ),
        Method.of_both("ram", has_weights=False),
        Method.of_both("ramplus_tl", has_weights=False),
        Method.of_both("arcee_fusion", has_weights=False, most_sources=1),
        Method.of_both(
            "nearswap",
            has_weights=False,
            parameters={"t": 1e-3},
            of_mergekit={"t": 1e-3},
            most_sources=1,
        ),
        Method(
            "slerp-slices",
            "slerp",
            "slerp",
            has_weights=False,
            of_mergekit={
                "t": [
                    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                    {"value": 0.5},
                ]
            },
            most_sources=1,
            as_it_is=True,
            sliced=True,
        ),
        Method(
            "ties-gradients",
            "ties",
            "ties",
            of_mergekit={"density": [0.5, DENSITY, 0.1]},
            as_it_is=True,
        ),
        Method.of_both("passthrough", has_base=False, has_weights=False, most_sources=1),
        Method("average", "average", has_base=False, has_weights=False),
        Method("consensus", "consensus", has_weights=False),
        Method("emr_unify", "emr_unify", has_weights=False),
        Method("magmax", "magmax", has_weights=False),
        Method("pcb", "pcb"),
        Method("tsv_m", "tsv_m", has_weights=False),
        Method("iso_c", "iso_c", has_weights=False),
        Method("iso_cts", "iso_cts", has_weights=False),
    )
}
"""Every method that is measured, by name."""
FEW = (
    "ties",
    "dare_ties",
    "dare_linear",
    "linear",
    "task_arithmetic",
    "magnitude_prune",
    "ties-model-scope",
)
"""Those that stand for the others where each run is dear."""
DECOMPOSING = ("tsv_m", "iso_c", "iso_cts")
"""Those that decompose whole matrices: of 1.1B parameters in about an hour of a core, whatever the disk does."""


def choose_methods(sources: int) -> list[str]:
    """Return the methods that a comparison of so many sources measures unless told otherwise.

    What takes fewer sources merges the first ones. With more than two it is left out: it would be
    measured once more. :data:`DECOMPOSING` are measured when they are named.
    """
    return [
        method.name
        for method in METHODS.values()
        if method.name not in DECOMPOSING
        and (sources == 2 or method.most_sources is None or method.most_sources >= sources)
    ]


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
        base = (self.models.base,) if self.method.has_base else ()
        return (*base, *self.sources)

    @property
    def sources(self) -> tuple[Path, ...]:
        """The models that are merged, as many as the method takes."""
        return self.models.tuned[: self.method.most_sources]

    @property
    def weights(self) -> list[float]:
        """One weight per source; they add up to 1."""
        count = len(self.sources)
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
    method = job.method
    if method.as_it_is:
        return mergekit_config(job)
    density = {"density": DENSITY} if method.has_density else {}
    recipe: dict[str, Any] = {
        "method": method.streammerge,
        "sources": [
            {"path": str(path)} | ({"weight": weight} if method.has_weights else {})
            for path, weight in zip(job.sources, job.weights, strict=True)
        ],
        "parameters": density | method.parameters,
        "output": {"dtype": "bfloat16", "max_shard_size": job.max_shard_nbytes},
    }
    if method.has_base:
        recipe["base"] = str(job.models.base)
    if method.semantics is not None:
        recipe["semantics"] = method.semantics
    return json.dumps(recipe, indent=1)


def mergekit_config(job: Job) -> str:
    """Return mergekit's configuration; paths are absolute, since it looks others up on a hub."""
    method = job.method
    density = {"density": DENSITY} if method.has_density else {}
    config: dict[str, Any] = {
        "merge_method": method.mergekit,
        "models": [
            {
                "model": str(path.resolve()),
                "parameters": ({"weight": weight} if method.has_weights else {}) | density,
            }
            for path, weight in zip(job.sources, job.weights, strict=True)
        ],
        "parameters": method.of_mergekit,
        "dtype": "bfloat16",
        # One of its methods would write float32.
        "out_dtype": "bfloat16",
    }
    if method.has_base:
        config["base_model"] = str(job.models.base.resolve())
    if method.sliced:
        config["slices"] = [_slice(job)]
        del config["models"]
    return json.dumps(config, indent=1)


def _slice(job: Job) -> dict[str, Any]:
    """Return all layers of every model as one slice."""
    text = (job.models.base / "config.json").read_text(encoding="utf-8")
    layers = [0, json.loads(text)["num_hidden_layers"]]
    return {
        "sources": [{"model": str(path.resolve()), "layer_range": layers} for path in job.inputs]
    }


def peft_job(job: Job) -> str:
    """Return what ``run_peft.py`` reads."""
    return json.dumps(
        {
            "function": job.method.peft,
            "base": str(job.models.base) if job.method.has_base else None,
            "sources": [str(path) for path in job.sources],
            "weights": job.weights,
            "density": DENSITY if job.method.has_density else None,
        }
    )
