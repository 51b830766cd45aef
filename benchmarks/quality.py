"""An experiment: what methods, densities and scopes come to, by the accuracy of what they merge.

    python -m benchmarks.quality [--seeds 5]

On the quickstart's data: handwritten digits, a base that has seen all of them briefly, and two experts of
one half each, trained anew for every seed. Every merge is of the two experts, with weights of 1, and is
asked for all ten digits of images that none was trained on. A second table says how different the
models are that one density makes per tensor and over the whole model. Means over the seeds, with the
standard deviation; nothing is chosen by the results. It tells of these networks, and of no others.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import streammerge
from benchmarks import environment
from benchmarks.models import RESULTS, ROOT
from benchmarks.reporting import align

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
"""From where little is left to where little is dropped."""
TRIMMING = {
    "ties": ("tensor", "model"),
    "magnitude_prune": ("tensor", "model"),
    "breadcrumbs": (None,),
    "dare_linear": (None,),
    "dare_ties": (None,),
    "della": (None,),
}
"""Methods with a density, and their scopes; None where a method has no choice."""
WHOLE = {"linear": {}, "task_arithmetic": {}, "emr_unify": {}, "magmax": {}, "model_stock": {}}
"""Methods without a density, with their parameters."""
MEMORY = "1GiB"


@dataclass(frozen=True)
class Merge:
    """One row of the table."""

    method: str
    """Which method."""
    scope: str | None
    """What one threshold covers; None for methods without a choice."""
    density: float | None
    """Fraction kept; None for methods without one."""

    @property
    def parameters(self) -> dict[str, Any]:
        """As a recipe has them."""
        given = {"scope": self.scope, "density": self.density}
        return {name: value for name, value in given.items() if value is not None}


def main(arguments: Sequence[str]) -> int:
    """Train, merge, print and write, and return the exit code."""
    summary = (__doc__ or "").split("\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=summary)
    parser.add_argument("--seeds", type=int, default=5, help="networks that are trained")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the results")
    options = parser.parse_args(arguments)
    quickstart = load_quickstart()
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(options.seeds):
            print(f"seed {seed} ...", file=sys.stderr, flush=True)
            found.append(run_seed(quickstart, Path(directory) / str(seed), seed))
    rows = {name: [each[name] for each in found] for name in found[0]}
    print(render(rows))
    commit, dirty = environment.commit()
    document = {
        "format": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "seeds": options.seeds,
        "versions": {"project": environment.own_versions()},
        "values": rows,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    place = options.results / f"quality-{commit}{'-dirty' if dirty else ''}.json"
    place.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"written to {place}")
    return 0


def load_quickstart() -> ModuleType:
    """Return the quickstart's functions."""
    path = ROOT / "scripts" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: is no module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_seed(quickstart: ModuleType, place: Path, seed: int) -> dict[str, float]:
    """Train a base and two experts, merge them in every way, and return accuracies and distances."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    train, test = split_digits(quickstart, seed)
    base = quickstart.make_network()
    quickstart.train(base, *train, steps=quickstart.BASE_STEPS, learning_rate=1e-3)
    quickstart.save_checkpoint(place / "base", base)
    found = {"base": quickstart.accuracy(base, *test, "all")}
    for task in ("0-4", "5-9"):
        expert = copy.deepcopy(base)
        mine = quickstart.TASKS[task](train[1])
        quickstart.train(
            expert,
            train[0][mine],
            train[1][mine],
            steps=quickstart.EXPERT_STEPS,
            learning_rate=3e-4,
        )
        quickstart.save_checkpoint(place / task, expert)
        found[f"expert {task}"] = quickstart.accuracy(expert, *test, "all")
    made: dict[Merge, dict[str, Tensor]] = {}
    for merge in list_merges():
        out = place / f"merged-{len(made)}"
        recipe = {
            "method": merge.method,
            "base": str(place / "base"),
            "sources": [{"path": str(place / task)} for task in ("0-4", "5-9")],
            "parameters": merge.parameters | WHOLE.get(merge.method, {}),
            "seed": seed,
            # As the quickstart loads it: in shards.
            "output": {"max_shard_size": "200kB"},
        }
        streammerge.merge(recipe, out, memory=MEMORY, workers=1)
        network = quickstart.load_checkpoint(out)
        made[merge] = network.state_dict()
        found[name_of(merge)] = quickstart.accuracy(network, *test, "all")
    found |= compare_scopes(made, base.state_dict())
    return found


def split_digits(
    quickstart: ModuleType, seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return images and labels to train on, and others to ask about."""
    images, labels = quickstart.load_digits(return_X_y=True)
    parts = quickstart.train_test_split(
        (images / 16).astype("float32"), labels, test_size=0.3, random_state=seed
    )
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    return (train_images, train_labels), (test_images, test_labels)


def list_merges() -> Iterator[Merge]:
    """Yield every merge, in the order of the table."""
    for method in WHOLE:
        yield Merge(method, None, None)
    for method, scopes in TRIMMING.items():
        for scope in scopes:
            for density in DENSITIES:
                yield Merge(method, scope, density)


def name_of(merge: Merge) -> str:
    """Return what a merge is called in the results."""
    words = [merge.method, merge.scope or "", "" if merge.density is None else f"{merge.density:g}"]
    return " ".join(word for word in words if word)


def compare_scopes(
    made: Mapping[Merge, Mapping[str, Tensor]], base: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return how far apart the models of the two scopes are, as a share of what either changes.

    ``|a - b| / ((|a - base| + |b - base|) / 2)`` over all weights.
    """
    found = {}
    for method, scopes in TRIMMING.items():
        if scopes == (None,):
            continue
        for density in DENSITIES:
            one, other = (flatten(made[Merge(method, scope, density)]) for scope in scopes)
            start = flatten(base)
            size = float((one - start).norm() + (other - start).norm()) / 2
            found[f"distance {method} {density:g}"] = float((one - other).norm()) / size
    return found


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return all weights in a row, in the order of their names."""
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def render(rows: Mapping[str, Sequence[float]]) -> str:
    """Return the tables as text."""
    whole = [["", "all digits"]]
    whole += [[name, shown(rows[name])] for name in ("base", "expert 0-4", "expert 5-9", *WHOLE)]
    trimmed = [["method and scope", *(f"{density:g}" for density in DENSITIES)]]
    distances = [["apart", *(f"{density:g}" for density in DENSITIES)]]
    for method, scopes in TRIMMING.items():
        for scope in scopes:
            names = [name_of(Merge(method, scope, density)) for density in DENSITIES]
            title = method if scope is None else f"{method}, {scope}"
            trimmed.append([title, *(shown(rows[name]) for name in names)])
        if scopes != (None,):
            names = [f"distance {method} {density:g}" for density in DENSITIES]
            distances.append([method, *(shown(rows[name]) for name in names)])
    return "\n\n".join("\n".join(align(table)) for table in (whole, trimmed, distances))


def shown(values: Sequence[float]) -> str:
    """Return a mean with its deviation, in per cent."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1%} ±{spread:.1%}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
