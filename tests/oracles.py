"""The slow, obvious versions: whole models in memory, a stable sort, and streammerge.functional."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streammerge import functional
from streammerge.methods import discover_methods
from streammerge.methods.base import MergeChunk, Operand, Stack
from streammerge.methods.parts import trim_
from streammerge.reductions.topk import TiePolicy, TopK
from streammerge.rng import keep_mask, stream_key

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Trim:
    """What a stable sort says about one source over one scope."""

    keep: np.ndarray
    """``[numel]`` bool in the scope's flat order."""
    threshold: float | None
    """The k-th largest magnitude; None where nothing is kept, 0 where density is 1."""
    greater: int
    """Elements above the threshold."""
    equal: int
    """Elements at the threshold."""


def trim_by_sorting(values: np.ndarray, density: float, policy: str = "exact") -> Trim:
    """Return what a trim keeps; NaN ranks above everything."""
    magnitudes = np.abs(values)
    k = int(density * magnitudes.size)
    if density >= 1 or magnitudes.size == 0:
        return Trim(np.ones(magnitudes.size, dtype=bool), 0.0, magnitudes.size, 0)
    if k == 0:
        return Trim(np.zeros(magnitudes.size, dtype=bool), None, 0, 0)
    ranks = np.where(np.isnan(magnitudes), np.inf, magnitudes)
    # NaN before infinity, then by magnitude; a stable sort leaves ties in flat order.
    order = np.lexsort((-ranks, ~np.isnan(magnitudes)))
    threshold = magnitudes[order[k - 1]]
    above = np.isnan(magnitudes) | (magnitudes > threshold)
    at = magnitudes == threshold
    keep = np.zeros(magnitudes.size, dtype=bool)
    keep[order[:k]] = True
    keep = {"exact": keep, "inclusive": above | at, "strict": above}[policy]
    return Trim(keep, float(threshold), int(above.sum()), int(at.sum()))


def merge_in_memory(
    method: str,
    base: Tensors | None,
    sources: Sequence[Tensors],
    parameters: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    compute_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Merge whole models, with one rounding to the output dtype at the end.

    Args:
        method: One of :data:`IN_MEMORY`.
        base: The base; ``linear`` does without.
        sources: The sources.
        parameters: As in a recipe.
        seed: Of the random masks.
        compute_dtype: What is computed in.
        dtype: The output dtype; None keeps the base's, or the first source's, per tensor.
    """
    values = {"weight": 1.0} | dict(parameters or {})
    n = len(sources)
    for name in ("weight", "density"):
        if name in values and not isinstance(values[name], list | tuple):
            values[name] = [values[name]] * n
    weights = torch.tensor(values["weight"], dtype=compute_dtype)
    first = sources[0] if base is None else base
    merged = {}
    keeps = _model_keeps(base, sources, values, compute_dtype)
    for name, like in first.items():
        wide = [source[name].to(compute_dtype) for source in sources]
        if method != "linear":
            start = base[name].to(compute_dtype)
            wide = [each - start for each in wide]
        for index, each in enumerate(wide):
            if method in {"ties", "magnitude_prune"}:
                keep = keeps[name][index] if keeps else _tensor_keep(each, index, values)
                wide[index] = each * torch.from_numpy(keep).reshape(each.shape)
            elif method.startswith("dare"):
                wide[index] = _drop(each, values["density"][index], seed, index, name)
        result = IN_MEMORY[method](wide, weights, values)
        if method != "linear":
            result = start + result
        merged[name] = result.to(dtype or like.dtype)
    return merged


def _add(tasks: list[Tensor], weights: Tensor, _: Mapping[str, Any]) -> Tensor:
    return functional.task_arithmetic(tasks, weights)


def _elect_and_average(tasks: list[Tensor], weights: Tensor, values: Mapping[str, Any]) -> Tensor:
    stack = torch.stack(tasks)
    mask = functional.calculate_majority_sign_mask(
        stack, values.get("majority_sign_method", "total")
    )
    return functional.disjoint_merge(stack * weights.view(-1, *[1] * tasks[0].dim()), mask)


def _average(models: list[Tensor], weights: Tensor, values: Mapping[str, Any]) -> Tensor:
    total = functional.task_arithmetic(models, weights)
    # The divisor is summed before it is rounded to the compute dtype.
    divisor = torch.tensor(sum(float(weight) for weight in values["weight"]), dtype=total.dtype)
    return total / divisor if values.get("normalize", True) else total


IN_MEMORY = {
    "dare_linear": _add,
    "dare_ties": _elect_and_average,
    "linear": _average,
    "magnitude_prune": _add,
    "task_arithmetic": _add,
    "ties": _elect_and_average,
}
"""What each method does with task vectors (``linear``: models) that are trimmed already."""


def _drop(task: Tensor, density: float, seed: int, source: int, name: str) -> Tensor:
    if density == 0:
        return torch.zeros_like(task)
    mask = keep_mask(stream_key(seed, source, name), 0, task.numel(), density)
    kept = task * torch.from_numpy(mask).reshape(task.shape)
    return kept / density if density < 1 else kept


def _tensor_keep(task: Tensor, source: int, values: Mapping[str, Any]) -> np.ndarray:
    policy = values.get("tie_policy", "exact")
    return trim_by_sorting(task.reshape(-1).numpy(), values["density"][source], policy).keep


def _model_keeps(
    base: Tensors | None,
    sources: Sequence[Tensors],
    values: Mapping[str, Any],
    compute_dtype: torch.dtype,
) -> dict[str, list[np.ndarray]]:
    """Return what each tensor keeps of each source under ``scope: model``, else nothing."""
    if values.get("scope") != "model":
        return {}
    keeps: dict[str, list[np.ndarray]] = {name: [] for name in base}
    for source, trim in enumerate(model_trims(base, sources, values, compute_dtype)):
        assert len(keeps[next(iter(keeps))]) == source
        begin = 0
        for name in sorted(base):
            keeps[name].append(trim.keep[begin : begin + base[name].numel()])
            begin += base[name].numel()
    return keeps


def model_trims(
    base: Tensors,
    sources: Sequence[Tensors],
    values: Mapping[str, Any],
    compute_dtype: torch.dtype = torch.float32,
) -> list[Trim]:
    """Return one trim per source over all tensors together, in the order of their sorted names."""
    trims = []
    for source, density in zip(sources, values["density"], strict=True):
        flat = [
            (source[name].to(compute_dtype) - base[name].to(compute_dtype)).reshape(-1)
            for name in sorted(base)
        ]
        policy = values.get("tie_policy", "exact")
        trims.append(trim_by_sorting(torch.cat(flat).numpy(), density, policy))
    return trims


def apply_to_whole_tensors(
    method_name: str,
    base: Tensors,
    sources: Sequence[Tensors],
    parameters: Mapping[str, Any],
    *,
    seed: int = 0,
    compute_dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Run any method's ``apply`` on each tensor as one chunk, however large.

    This knows no method by name, so it checks those that are still to be written.
    """
    method = discover_methods()[method_name]
    n = len(sources)
    values = {}
    for spec in method.parameters:
        value = parameters.get(spec.name, spec.default)
        spread = spec.per_source and not isinstance(value, list | tuple)
        values[spec.name] = (value,) * n if spread else value
        if isinstance(value, list):
            values[spec.name] = tuple(value)
    params = method.params(**values)
    need = method.reduction(params)
    on_tasks = method.operand is Operand.TASK_VECTORS
    vectors, trims = {}, {}
    for name in sorted(base):
        start = base[name].to(compute_dtype).reshape(-1)
        rows = [source[name].to(compute_dtype).reshape(-1) for source in sources]
        vectors[name] = torch.stack([row - start if on_tasks else row for row in rows])
    if need is not None:
        policy = TiePolicy(need.tie_policy).value
        for source, density in enumerate(need.densities):
            scopes = [list(vectors)] if need.scope.value == "model" else [[n] for n in vectors]
            for scope in scopes:
                flat = torch.cat([vectors[name][source] for name in scope]).numpy()
                trim = trim_by_sorting(flat, density, policy)
                begin = 0
                for name in scope:
                    end = begin + vectors[name].shape[1]
                    trims[name, source] = _whole_top(trim, flat, begin, end)
                    begin = end
    merged = {}
    for name, rows in vectors.items():
        chunk = MergeChunk(
            base=base[name].to(compute_dtype).reshape(-1) if on_tasks else None,
            vectors=Stack(rows, rows.unbind()),
            scratch=torch.empty(method.scratch_rows, rows.shape[1], dtype=compute_dtype),
            trims=_WholeTrims(tuple(trims[name, source] for source in range(n)) if need else ()),
            masks=_WholeMasks(seed, name),
            steps=_NoSteps(),
        )
        result = method.apply(chunk, params).clone()
        merged[name] = result.reshape(base[name].shape).to(base[name].dtype)
    return merged


class _NoSteps:
    """Whole models are merged at once, never one after the other."""

    def step_(self, weights: Tensor, *, source: int) -> Tensor:
        raise AssertionError(f"source {source} is no adapter: {weights.shape}")


def _whole_top(trim: Trim, flat: np.ndarray, begin: int, end: int) -> TopK:
    """Return the statistic of a scope as one of its tensors, taken as one block, sees it."""
    threshold = float("inf") if trim.threshold is None else trim.threshold
    ties = int((trim.keep & (np.abs(flat) == threshold))[begin:end].sum())
    return TopK(threshold, flat.size, trim.greater, trim.equal, ties, 0, ties)


@dataclass(frozen=True)
class _WholeTrims:
    tops: tuple[TopK, ...]

    def trim_(self, row: Tensor, *, source: int) -> Tensor:
        return trim_(row, self.tops[source], 0)


@dataclass(frozen=True)
class _WholeMasks:
    seed: int
    name: str

    def drop_(self, row: Tensor, *, source: int, density: float) -> Tensor:
        mask = keep_mask(stream_key(self.seed, source, self.name), 0, row.numel(), density)
        return row.mul_(torch.from_numpy(mask))
