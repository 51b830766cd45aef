"""The slow, obvious versions: whole models in memory, a stable sort, sums from left to right.

Up to as many sources as torch adds in that order, they are checked with streammerge.functional.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streammerge import functional
from streammerge.engine.gathering import make_whole
from streammerge.engine.plain import bind_numbers
from streammerge.engine.rows import KnownRows
from streammerge.methods import discover_methods
from streammerge.methods.base import Operand, Scope, Work
from streammerge.methods.programs import Programs, programs_of
from streammerge.rng import keep_mask, keep_mask_by, stream_key
from streammerge.statistics import BLOCK, count_blocks
from streammerge.statistics.rounds import NOTHING, Answers, Found, RowAnswers
from streammerge.statistics.topk import TopK
from streammerge.statistics.totals import join_totals
from streammerge.statistics.trimming import mark_unseen_, trim_
from streammerge.tiles.interpreter import count_rows, run_program
from streammerge.tiles.program import Op, Program
from streammerge.tiles.totalling import HostSinks, total_rows

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
    return trim_to(values, values.size if density >= 1 else int(density * values.size), policy)


def trim_to(values: np.ndarray, k: int, policy: str, *, of_value: bool = False) -> Trim:
    """Return which k values of largest magnitude are kept; NaN ranks above everything."""
    magnitudes = np.abs(values)
    if k >= magnitudes.size and not (of_value and 0 < k == magnitudes.size):
        return Trim(np.ones(magnitudes.size, dtype=bool), 0.0, magnitudes.size, 0)
    if k <= 0:
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


def add_in_order(rows: Sequence[Tensor]) -> Tensor:
    """Return the sum of rows, added from left to right; for up to four that is torch's."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        total = total + row
    return total


def _add(tasks: list[Tensor], weights: Tensor, _: Mapping[str, Any]) -> Tensor:
    total = add_in_order([task * weight for task, weight in zip(tasks, weights, strict=True)])
    if len(tasks) <= ADDED_ALIKE:
        _check_same(total, functional.task_arithmetic(tasks, weights))
    return total


def _elect_and_average(tasks: list[Tensor], weights: Tensor, values: Mapping[str, Any]) -> Tensor:
    vote = values.get("majority_sign_method", "total")
    votes = add_in_order(tasks if vote == "total" else [task.sign() for task in tasks])
    masks = [torch.where(votes >= 0, task > 0, task < 0) for task in tasks]
    scaled = [task * weight for task, weight in zip(tasks, weights, strict=True)]
    total = add_in_order([row * mask for row, mask in zip(scaled, masks, strict=True)])
    mean = total / torch.clamp(add_in_order([mask.to(total.dtype) for mask in masks]), min=1.0)
    if len(tasks) <= ADDED_ALIKE:
        mask = functional.calculate_majority_sign_mask(torch.stack(tasks), vote)
        _check_same(mean, functional.disjoint_merge(torch.stack(scaled), mask))
    return mean


def _check_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def _average(models: list[Tensor], weights: Tensor, values: Mapping[str, Any]) -> Tensor:
    total = _add(models, weights, values)
    # The divisor is summed before it is rounded to the compute dtype.
    divisor = torch.tensor(sum(float(weight) for weight in values["weight"]), dtype=total.dtype)
    return total / divisor if values.get("normalize", True) else total


ADDED_ALIKE = 4
"""Rows that torch.sum adds from left to right; the order of more depends on column and processor."""
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
    has_base: bool | None = None,
    vectors: Sequence[Tensors] | None = None,
) -> dict[str, Tensor]:
    """Run any method's programs on each tensor as one block, however large.

    This knows no method by name, so it checks those that are still to be written.

    Args:
        method_name: The method.
        base: The base.
        sources: The sources.
        parameters: As a recipe gives them.
        seed: Of random numbers.
        compute_dtype: What is computed in.
        has_base: Whether the method is given the base; None if it takes task vectors.
        vectors: What the sources add to the base; None for the differences. What an adapter adds is
            known better than the difference of sums tells.
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
    on_tasks = method.operand is Operand.TASK_VECTORS if has_base is None else has_base
    programs = programs_of(method, values.items(), sources=n, has_base=on_tasks)
    whole = {
        name: _WholeTensor(
            name,
            base[name].to(compute_dtype).reshape(-1),
            [source[name].to(compute_dtype).reshape(-1) for source in sources],
            None if vectors is None else [each[name].reshape(-1) for each in vectors],
            seed,
            row=base[name].shape[-1] if programs.by_rows and base[name].dim() else 1,
        )
        for name in sorted(base)
    }
    whole = {name: tensor.knowing_rows(programs) for name, tensor in whole.items()}
    of_model = programs.work.scope is Scope.MODEL
    found = {}
    for scope in [list(whole)] if of_model else [[name] for name in whole]:
        if programs.work.whole is not None:
            (name,) = scope
            found[name] = whole[name].made(
                programs.work, tuple(base[name].shape), has_base=on_tasks
            )
            continue
        found |= _find_plainly(programs, {name: whole[name] for name in scope})
    merged = {}
    for name, tensor in whole.items():
        result = tensor.run(programs.merge, found[name])
        assert result is not None
        merged[name] = result.clone().reshape(base[name].shape).to(base[name].dtype)
    return merged


def _find_plainly(programs: Programs, scope: Mapping[str, _WholeTensor]) -> dict[str, Found]:
    """Return what a method asks about a scope, as each of its tensors sees it: by sorting."""
    known = dict.fromkeys(scope, NOTHING)
    numel = sum(tensor.base_row.numel() for tensor in scope.values())
    for program, asked in zip(programs.rounds, programs.work.rounds, strict=True):
        sinks = {
            name: _Collected(program, tensor.row if programs.by_rows else None)
            for name, tensor in scope.items()
        }
        for name, tensor in scope.items():
            tensor.run(program, known[name], sinks[name])
        of_blocks = np.concatenate([each.totals() for each in sinks.values()])
        totals = join_totals(program.totals, of_blocks)
        before = next(iter(known.values()))
        tops: dict[str, list[TopK]] = {name: [] for name in scope}
        for index, wish in enumerate(asked.ranks(numel, before)):
            flat = np.concatenate([each.ranked[index] for each in sinks.values()])
            trim = trim_to(flat, wish.k, wish.tie_policy.value, of_value=wish.of_value)
            begin = 0
            for name, each in sinks.items():
                end = begin + each.ranked[index].size
                tops[name].append(_whole_top(trim, flat, begin, end))
                begin = end
        for name in scope:
            answers = Answers(numel, totals, tuple(tops[name]), known[name])
            known[name] = known[name].joined(asked.concluded(answers))
    return known


class _Collected:
    """What a program leaves behind, whole."""

    def __init__(self, program: Program, row: int | None = None) -> None:
        self._kinds = program.totals
        self._row = row
        self.ranked: dict[int, np.ndarray] = {}
        self._totals: dict[int, np.ndarray] = {}

    def rank(self, index: int, row: Tensor) -> None:
        self.ranked[index] = row.numpy().copy()

    def total(self, index: int, op: Op, a: Tensor, b: Tensor | None) -> None:
        # Of one row alone, what is counted of it and itself is the same.
        b = a if b is None else b
        if self._row is not None:
            self._totals[index] = self._of_rows(op, a.numpy(), b.numpy(), self._row)
            return
        self._totals[index] = np.array(
            [
                total_rows(op, x.numpy()[None], y.numpy()[None])[0]
                for x, y in zip(a.split(BLOCK), b.split(BLOCK), strict=True)
                if x.numel()
            ]
        )

    def _of_rows(self, op: Op, a: np.ndarray, b: np.ndarray, row: int) -> np.ndarray:
        """Return the totals of blocks of rows: each row belongs to the block that it begins in."""
        shape = (a.size // max(row, 1), row)
        of_rows = total_rows(op, a.reshape(shape), b.reshape(shape))
        blocks = np.arange(of_rows.size) * row // BLOCK
        return np.array(
            [
                join_totals((op,), of_rows[blocks == block, None])[0]
                for block in range(count_blocks(a.size))
            ]
        )

    def totals(self) -> np.ndarray:
        """Return ``[blocks, totals]``."""
        columns = [self._totals[index] for index in range(len(self._kinds))]
        return np.stack(columns, axis=1) if columns else np.zeros((0, 0))


def _rank(values: np.ndarray, count: int, row: int) -> np.ndarray:
    """Return ranks in [0, 1], by sorting pairs of magnitude and place."""
    rows = values.reshape(count, row)
    ranks = np.full_like(rows, 0.5)
    for of_row, magnitudes in zip(ranks, np.abs(rows), strict=True):
        if row > 1:
            order = np.lexsort((-np.arange(row), magnitudes))
            of_row[order] = np.arange(row, dtype=rows.dtype) / rows.dtype.type(row - 1)
    return ranks.reshape(-1)


def _whole_top(trim: Trim, flat: np.ndarray, begin: int, end: int) -> TopK:
    """Return the statistic of a scope as one of its tensors, taken as one block, sees it."""
    threshold = float("inf") if trim.threshold is None else trim.threshold
    ties = int((trim.keep & (np.abs(flat) == threshold))[begin:end].sum())
    return TopK(threshold, flat.size, trim.greater, trim.equal, ties, 0, ties)


@dataclass(frozen=True)
class _WholeTensor:
    """A tensor as a program reads it, in one block, however large."""

    name: str
    base_row: Tensor
    rows: list[Tensor]
    vectors: list[Tensor] | None
    seed: int
    row: int = 1
    """Elements of a row, where that matters."""
    program: Program | None = None
    found: Found = NOTHING
    rows_known: KnownRows | None = None

    def run(self, program: Program, found: Found, sinks: _Collected | None = None) -> Tensor | None:
        numel = self.base_row.numel()
        known = self.rows_known
        return run_program(
            program,
            replace(self, program=program, found=found),
            numbers=bind_numbers(program, found, known),
            memory=torch.empty(count_rows(program), numel, dtype=self.base_row.dtype),
            row_numel=numel if known is None else known.numel,
            sinks=sinks,
        )

    def knowing_rows(self, programs: Programs) -> _WholeTensor:
        """Return the tensor with what the method asks about each of its rows."""
        if not programs.by_rows:
            return self
        count = self.base_row.numel() // self.row if self.row else 0
        known = KnownRows(self.row, np.zeros((count, 0)))
        for program, asked in zip(programs.row_rounds, programs.work.row_rounds, strict=True):
            sinks = HostSinks(program, lambda _, __: None, rows=count)
            replace(self, rows_known=known).run(program, NOTHING, sinks)
            found = asked.settle(RowAnswers(self.row, sinks.totals, known.numbers))
            known = replace(known, numbers=np.concatenate([known.numbers, found], axis=1))
        if programs.row_ranks is not None:
            collected = _Collected(programs.row_ranks)
            replace(self, rows_known=known).run(programs.row_ranks, NOTHING, collected)
            ranks = [collected.ranked[i] for i in range(programs.row_ranks.ranked)]
            known = replace(known, computed=tuple(_rank(each, count, self.row) for each in ranks))
        return replace(self, rows_known=known)

    def made(self, work: Work, shape: tuple[int, ...], *, has_base: bool) -> Found:
        """Return what a method makes of the whole tensor."""
        rows = self.rows
        if has_base:
            rows = [torch.empty_like(row) for row in rows]
            for source, row in enumerate(rows):
                self.task_vector(source, row)
        if not self.base_row.numel():
            return Found(made=np.zeros(0))
        return make_whole(work, torch.stack(rows).numpy(), shape)

    def computed(self, index: int, out: Tensor) -> None:
        if self.found.made is not None:
            out.copy_(torch.from_numpy(self.found.made))
            return
        out.copy_(torch.from_numpy(self.rows_known.computed[index]))

    def base(self, out: Tensor) -> None:
        out.copy_(self.base_row)

    def source(self, source: int, out: Tensor) -> None:
        out.copy_(self.rows[source])

    def task_vector(self, source: int, out: Tensor) -> None:
        if self.vectors is not None:
            out.copy_(self.vectors[source])
            return
        torch.sub(self.rows[source], self.base_row, out=out)

    def trim_(self, row: Tensor, trim: int) -> None:
        trim_(row, self.found.tops[self.program.trims[trim]], 0)

    def mark_(self, row: Tensor, trim: int) -> None:
        mark_unseen_(row, self.found.tops[self.program.trims[trim]], 0)

    def drop_(self, row: Tensor, stream: int, probability: Tensor | float) -> None:
        key = stream_key(self.seed, self.program.streams[stream], self.name)
        if isinstance(probability, float):
            mask = keep_mask(key, 0, row.numel(), probability)
        else:
            mask = keep_mask_by(key, 0, probability.numpy())
        row.mul_(torch.from_numpy(mask))
