"""From a recipe and the headers of adapters to a plan: every tensor, every byte, the peak memory.

Nothing is read but what :mod:`streammerge.adapters.files.reading` has read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from streammerge.adapters.combining.checking import check_clamp, check_combination
from streammerge.adapters.combining.combinations import COMBINATIONS, Combination, Target
from streammerge.adapters.combining.config import ia3_config, lora_config
from streammerge.adapters.combining.outputs import FILE_NAMES, factor_names, lay_out
from streammerge.adapters.combining.plans import (
    CombinationPlan,
    CopyTask,
    ModuleTask,
    OutputTensor,
    Task,
    VectorTask,
)
from streammerge.adapters.combining.sizing import task_workspace
from streammerge.adapters.files.naming import PEFT_PREFIX
from streammerge.adapters.files.patterns import blocks_targets, is_saved_module, matches_targets
from streammerge.adapters.files.types import Adapter, AdapterKind, LayerKind, LowRankModule, Naming
from streammerge.checkpoint.types import TensorEntry
from streammerge.dtypes import DType
from streammerge.errors import MemoryBudgetError, RecipeError, ShapeMismatchError
from streammerge.recipe.dumping import dump_recipe
from streammerge.recipe.resolving import Resolved, build_resolver
from streammerge.recipe.types import Recipe, Semantics
from streammerge.units import BASELINE_NOISE, MIB, format_budget, format_size

GROWTH_BYTES = 64 * MIB
"""What the interpreter, torch and LAPACK take beside the factors once they work."""
Resolve = Callable[[str], Resolved]


def plan_combination(
    recipe: Recipe, adapters: Sequence[Adapter], *, budget: int, baseline: int
) -> CombinationPlan:
    """Return what combining the adapters will do.

    Args:
        recipe: The parsed recipe, without a base.
        adapters: Its sources, in order.
        budget: Most resident memory that the process may use, in bytes.
        baseline: What it uses now, in bytes.

    Raises:
        RecipeError: The recipe asks for what no combination of these adapters can be.
        ShapeMismatchError: The adapters belong to different bases.
        UnsupportedAdapterError: What an adapter does depends on the base.
        MemoryBudgetError: One task does not fit the budget.
    """
    check_combination(recipe, adapters)
    draft = _Draft(recipe, tuple(adapters))
    draft.add_modules()
    draft.add_vectors()
    draft.add_whole_tensors()
    draft.check_conflicts()
    tasks, header = lay_out(draft.tasks)
    if not tasks:
        raise RecipeError("rules: nothing is left of the adapters once the rules are applied")
    workspace = max(task_workspace(task, draft.combination, recipe.compute_dtype) for task in tasks)
    peak = baseline + GROWTH_BYTES + workspace
    if peak > budget:
        raise MemoryBudgetError(
            f"{recipe.method} of {len(adapters)} adapters needs {format_size(workspace)} for one "
            f"module, beside {format_size(baseline + GROWTH_BYTES)} for the process, and --memory "
            f"allows {format_size(budget)}; give --memory "
            f"{format_budget(peak + BASELINE_NOISE)} or more"
            f"{_leaner(draft.combination)}"
        )
    naming = adapters[0].naming
    return CombinationPlan(
        method=recipe.method,
        semantics=(recipe.semantics or Semantics.PEFT).value,
        recipe=dump_recipe(recipe),
        seed=recipe.seed,
        compute_dtype=recipe.compute_dtype,
        adapters=tuple(adapters),
        tasks=tasks,
        file_name=FILE_NAMES[naming],
        header=header,
        config=draft.config() if naming is Naming.PEFT else None,
        dropped=tuple(draft.dropped),
        incomplete=tuple(draft.incomplete),
        workspace=workspace,
        peak_memory=peak,
        budget=budget,
    )


def _leaner(combination: Combination) -> str:
    if combination.target is Target.DENSE_PRODUCT:
        return ", or use svd or cat, which never form a whole product"
    return ""


class _Draft:
    """A plan while it grows: tasks without offsets."""

    def __init__(self, recipe: Recipe, adapters: tuple[Adapter, ...]) -> None:
        self.combination = COMBINATIONS[recipe.method]
        self.tasks: list[Task] = []
        self.dropped: list[str] = []
        self.incomplete: list[str] = []
        self._recipe = recipe
        self._adapters = adapters
        self._naming = adapters[0].naming
        self._resolve: Resolve = build_resolver(recipe, self.combination.parameters)
        self._modules_to_save: list[str] = []
        self._tokens: dict[str, tuple[int, ...]] = {}
        self._token_stems: set[str] = set()
        ranks = [module.rank for adapter in adapters for module in adapter.modules]
        self._largest_rank = max(ranks, default=0)

    def add_modules(self) -> None:
        """Add one task for every low-rank module that a source has."""
        tables = [{module.stem: module for module in each.modules} for each in self._adapters]
        with_bias = any(adapter.config.lora_bias for adapter in self._adapters)
        for stem in sorted(set().union(*tables)):
            inputs = tuple(table.get(stem) for table in tables)
            present = [module for module in inputs if module is not None]
            settled = self._resolve(present[0].weight_name)
            if settled.drop:
                self.dropped.append(present[0].weight_name)
                continue
            if settled.copy is not None and inputs[settled.copy] is None:
                if _replaces(self._adapters[settled.copy], present[0].name):
                    continue
                raise RecipeError(
                    f"rules: copy: sources[{settled.copy}] has no module {present[0].name}"
                )
            if len(present) < len(inputs) and settled.copy is None:
                self.incomplete.append(present[0].name)
            self._check_shapes(stem, inputs)
            values = dict(settled.values)
            check_clamp(values.get("svd_clamp"))
            rank = self._rank(stem, inputs, settled)
            down, up, bias, alpha = self._outputs(stem, present[0], rank, with_bias=with_bias)
            self.tasks.append(
                ModuleTask(
                    stem=stem,
                    layer=present[0].layer,
                    inputs=inputs,
                    values=settled.values,
                    copies=settled.copy,
                    rank=rank,
                    down=down,
                    up=up,
                    bias=bias,
                    alpha=alpha,
                )
            )

    def add_vectors(self) -> None:
        """Add one task for every vector of IA3."""
        tables = [{each.stem: each for each in adapter.vectors} for adapter in self._adapters]
        for stem in sorted(set().union(*tables)):
            settled = self._resolve(f"{stem}.weight")
            if settled.drop:
                self.dropped.append(f"{stem}.weight")
                continue
            weights = dict(settled.values)["weight"]
            assert isinstance(weights, tuple)  # noqa: S101 - weight has one value per source
            chosen = range(len(tables)) if settled.copy is None else [settled.copy]
            absent = [index for index in chosen if stem not in tables[index]]
            if absent:
                raise RecipeError(
                    f"sources[{absent[0]}]: has no IA3 vector for {stem}, which another source "
                    "scales; a sum would shrink it by the missing weight: choose with a rule "
                    f'{{tensors: "{stem}.weight", copy: ...}}, or drop it'
                )
            entries = tuple(tables[index][stem].vector for index in chosen)
            if len({entry.shape for entry in entries}) > 1:
                raise ShapeMismatchError(
                    f"{stem}: its IA3 vectors have the shapes "
                    f"{[list(entry.shape) for entry in entries]}; the adapters belong to "
                    "different bases"
                )
            factors = [1.0] if settled.copy is not None else [float(each) for each in weights]
            name = f"{PEFT_PREFIX}{stem}.ia3_l"
            output = OutputTensor(name, self._dtype(entries[0]), entries[0].shape)
            self.tasks.append(VectorTask(entries, tuple(factors), output))

    def add_whole_tensors(self) -> None:
        """Add a copy for everything that replaces a tensor of the base."""
        targeted = {task.stem for task in self.tasks if isinstance(task, ModuleTask)}
        for name in sorted({name for each in self._adapters for name in each.saved}):
            holders = [
                (i, each.saved[name]) for i, each in enumerate(self._adapters) if name in each.saved
            ]
            if self._copy(name, holders, f"{PEFT_PREFIX}{name}"):
                self._note_saved(name, [self._adapters[index] for index, _ in holders])
        for name in sorted({name for each in self._adapters for name in each.replaced}):
            holders = [
                (i, each.replaced[name])
                for i, each in enumerate(self._adapters)
                if name in each.replaced
            ]
            module, _, last = name.rpartition(".")
            inner = f"{module}.base_layer.{last}" if module in targeted else name
            self._copy(name, holders, f"{PEFT_PREFIX}{inner}")
        self._add_tokens()

    def _add_tokens(self) -> None:
        for stem in sorted({rows.stem for each in self._adapters for rows in each.tokens}):
            found = [
                (index, rows)
                for index, each in enumerate(self._adapters)
                for rows in each.tokens
                if rows.stem == stem
            ]
            name = f"{stem}.weight"
            settled = self._resolve(name)
            if settled.copy is not None:
                found = [pair for pair in found if pair[0] == settled.copy]
            if not found:
                continue
            indices = {rows.indices for _, rows in found}
            if len(indices) > 1:
                sources = " and ".join(f"sources[{index}]" for index, _ in found)
                raise RecipeError(
                    f"{sources} trained different tokens of {stem}; choose one with a rule "
                    f'{{tensors: "{name}", copy: {found[0][0]}}}'
                )
            target = f"{PEFT_PREFIX}{stem}.token_adapter.trainable_tokens_delta"
            if self._copy(name, [(index, rows.rows) for index, rows in found], target):
                config = self._adapters[found[0][0]].config
                keys = [key for key in config.token_indices if not key or stem.endswith(key)]
                self._tokens[keys[0]] = found[0][1].indices
                self._token_stems.add(stem)

    def _copy(self, name: str, holders: list[tuple[int, TensorEntry]], target: str) -> bool:
        """Add the copy of a tensor; return whether it is not dropped."""
        settled = self._resolve(name)
        if settled.drop:
            self.dropped.append(name)
            return False
        if settled.copy is not None:
            holders = [holder for holder in holders if holder[0] == settled.copy]
            if not holders:
                chosen, path = self._adapters[settled.copy], name.rpartition(".")[0]
                if _adapts(chosen, path) or _replaces(chosen, path):
                    return False
                raise RecipeError(f"rules: copy: sources[{settled.copy}] does not replace {name}")
        kinds = {(entry.dtype, entry.shape) for _, entry in holders}
        if len(kinds) > 1:
            raise RecipeError(
                f"{' and '.join(f'sources[{index}]' for index, _ in holders)} replace {name} by "
                "tensors of different shape or dtype, which have no combination; choose one with "
                f'a rule {{tensors: "{name}", copy: {holders[0][0]}}}'
            )
        entry = holders[0][1]
        self.tasks.append(CopyTask(tuple(holders), OutputTensor(target, entry.dtype, entry.shape)))
        return True

    def _note_saved(self, name: str, holders: Sequence[Adapter]) -> None:
        """Keep the entries of ``modules_to_save`` that this tensor is there for."""
        module = name.rpartition(".")[0]
        for adapter in holders:
            for entry in adapter.config.modules_to_save:
                alone = dataclasses.replace(adapter.config, modules_to_save=(entry,))
                if is_saved_module(alone, module) and entry not in self._modules_to_save:
                    self._modules_to_save.append(entry)

    def check_conflicts(self) -> None:
        """Raise where PEFT would leave a part of the result alone without a word."""
        for task in self.tasks:
            if isinstance(task, CopyTask):
                continue
            stem = task.stem if isinstance(task, ModuleTask) else _vector_stem(task)
            entry = blocks_targets(tuple(self._modules_to_save), stem)
            if entry is not None or stem in self._token_stems:
                raise RecipeError(
                    f"{stem}: one source adapts this module, and another one replaces it or some "
                    f"of its rows ({entry or 'trained tokens'}); PEFT would load only one of the "
                    f'two: choose a source with a rule {{tensors: "{stem}.*", copy: ...}}, or give '
                    'the recipe a "base"'
                )

    def config(self) -> dict[str, object]:
        """Return the configuration of the result."""
        saved = sorted(self._modules_to_save)
        if self._adapters[0].kind is AdapterKind.IA3:
            stems = [_vector_stem(task) for task in self.tasks if isinstance(task, VectorTask)]
            inputs = [each.config.feedforward_modules for each in self._adapters]
            feedforward = [
                stem
                for stem in stems
                if any(
                    matches_targets(names, stem, where="feedforward_modules") for names in inputs
                )
            ]
            return ia3_config(self._adapters, stems, feedforward, modules_to_save=saved)
        modules = [task for task in self.tasks if isinstance(task, ModuleTask)]
        return lora_config(
            self._adapters,
            {task.stem: task.rank for task in modules},
            lora_bias=any(task.bias is not None for task in modules),
            modules_to_save=saved,
            token_indices=self._tokens,
        )

    def _check_shapes(self, stem: str, inputs: Sequence[LowRankModule | None]) -> None:
        first: tuple[int, LowRankModule] | None = None
        for index, module in enumerate(inputs):
            if module is None:
                continue
            if first is None:
                first = index, module
            shapes = [(m.layer, m.down.shape[1:], m.up.shape[0]) for m in (first[1], module)]
            if shapes[0] != shapes[1]:
                described = [f"{layer} {list(inner)} to {outer}" for layer, inner, outer in shapes]
                raise ShapeMismatchError(
                    f"{stem}: sources[{first[0]}] adapts a layer of {described[0]}, "
                    f"sources[{index}] one of {described[1]}; the adapters belong to different "
                    "bases"
                )

    def _rank(self, stem: str, inputs: Sequence[LowRankModule | None], settled: Resolved) -> int:
        """Return the rank of the result."""
        if settled.copy is not None:
            module = inputs[settled.copy]
            return module.rank if module is not None else 0
        present = [module for module in inputs if module is not None]
        ranks = [module.rank for module in present]
        if self.combination.target is Target.CONCATENATION:
            return sum(ranks)
        if self.combination.target is Target.FACTORS:
            if len(set(ranks)) > 1:
                listed = ", ".join(
                    f"sources[{index}] {module.rank}"
                    for index, module in enumerate(inputs)
                    if module is not None
                )
                exact = [
                    name for name, each in COMBINATIONS.items() if each.target is not Target.FACTORS
                ]
                raise RecipeError(
                    f"{stem}: {self.combination.name} combines A and B separately, which takes "
                    f"equal ranks, got {listed}; these types allow different ones: "
                    f"{', '.join(exact)}"
                )
            return ranks[0]
        given = dict(settled.values)["svd_rank"]
        wanted = given if isinstance(given, int) and given else self._largest_rank
        limits = [wanted, present[0].out_features, present[0].in_features]
        if self.combination.target is Target.LOW_RANK_PRODUCT:
            # Beyond the sum of the ranks there are only zeros.
            limits.append(sum(ranks))
        return min(limits)

    def _outputs(
        self, stem: str, like: LowRankModule, rank: int, *, with_bias: bool
    ) -> tuple[OutputTensor, OutputTensor, OutputTensor | None, OutputTensor | None]:
        names = factor_names(self._naming, stem, like.layer)
        dtype = self._dtype(like.down)
        down = OutputTensor(names["down"], dtype, (rank, *like.down.shape[1:]))
        up = OutputTensor(names["up"], dtype, (like.up.shape[0], rank, *like.up.shape[2:]))
        bias = alpha = None
        if with_bias and like.layer is not LayerKind.EMBEDDING:
            bias = OutputTensor(names["bias"], dtype, (like.up.shape[0],))
        if "alpha" in names:
            alpha = OutputTensor(names["alpha"], DType.F32, ())
        return down, up, bias, alpha

    def _dtype(self, entry: TensorEntry) -> DType:
        return self._recipe.output.dtype or entry.dtype


def _replaces(adapter: Adapter, path: str) -> bool:
    """Return whether the adapter replaces tensors of the module at ``path``, or rows of them."""
    names = [*adapter.saved, *adapter.replaced]
    return any(name.rpartition(".")[0] == path for name in names) or any(
        rows.stem == path for rows in adapter.tokens
    )


def _adapts(adapter: Adapter, path: str) -> bool:
    """Return whether the adapter has factors or a vector for the module at ``path``."""
    return any(module.name == path for module in adapter.modules) or any(
        vector.stem == path for vector in adapter.vectors
    )


def _vector_stem(task: VectorTask) -> str:
    return task.output.name.removeprefix(PEFT_PREFIX).removesuffix(".ia3_l")
