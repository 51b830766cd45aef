"""From two models to a plan: which tensors differ, and what becomes of each that does."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from streammerge.adapters.combining.outputs import place_tensors
from streammerge.adapters.combining.plans import OutputTensor
from streammerge.adapters.files.naming import PEFT_PREFIX
from streammerge.adapters.onto_base.adapted import AdaptedModel
from streammerge.adapters.onto_base.tying import find_tie, has_head
from streammerge.assignment.naming import match_names
from streammerge.assignment.ties import settle_ties
from streammerge.assignment.types import Model
from streammerge.checkpoint.bytesource import ByteSourceKind, check_unchanged, choose_byte_source
from streammerge.checkpoint.ties import declares_tie, head_pair, iter_unstored_pairs, table_pair
from streammerge.checkpoint.types import Checkpoint, ShardFile, TensorEntry
from streammerge.dtypes import DType
from streammerge.errors import (
    MemoryBudgetError,
    MissingTensorError,
    RecipeError,
    ShapeMismatchError,
    UnsupportedDTypeError,
    printable,
)
from streammerge.extracting.devices import (
    host_bytes,
    host_growth_bytes,
    is_for_device,
    share_devices,
)
from streammerge.extracting.factoring import is_exact, workspace
from streammerge.extracting.plans import CopyTask, ExtractionPlan, FactorTask, Pair
from streammerge.extracting.reading import differs
from streammerge.plan.planning import Machine
from streammerge.recipe.resolving import Resolved
from streammerge.recipe.text import dump_document
from streammerge.recipe.types import (
    ComputeDType,
    MissingPolicy,
    NonFinitePolicy,
    OutputSpec,
    Recipe,
    Source,
)
from streammerge.sources import locate_models, read_models
from streammerge.storage.urls import spelled
from streammerge.units import MIB, format_budget, format_size

_NO_MATRIX = re.compile(
    r"(?:.*[._])?(?:embed\w*|wte|wpe|shared|lm_head|embed_out|position_ids|relative_attention_bias)(?:[._].*)?"
)
"""Embeddings and heads, which are no layers that are multiplied with."""
_CONV1D = re.compile(r".*\.(?:c_attn|q_attn|c_proj|c_fc)\.weight")
_WITH_CONV1D = frozenset({"gpt2", "imagegpt", "openai-gpt", "decision_transformer"})
"""Values of ``model_type`` whose layers of those names are stored the other way round."""
_GROWTH_BYTES = 64 * MIB
"""Thread stacks, allocator slack and small objects that come with the work."""
_VARIES_BYTES = 2 * MIB
"""What one process with torch takes more than the next, before work starts."""
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Wishes:
    """What an extraction is asked for."""

    rank: int
    """Of every matrix, or its smaller side if that is less."""
    modules: tuple[str, ...] = ()
    """Globs on names; matrices that one fits are factored. Empty for all of linear layers."""
    dtype: DType = DType.F32
    """What the factors are stored in."""
    exact: bool = False
    """Whether all singular values of every matrix are found."""


def plan_extraction(
    base: Path,
    tuned: Path,
    wishes: Wishes,
    *,
    machine: Machine,
    download: bool,
    on_compared: Callable[[int, int], None] = lambda _done, _all: None,
) -> ExtractionPlan:
    """Compare two models and return what the extraction will do.

    Args:
        base: The model that the other one was tuned from.
        tuned: The tuned model.
        wishes: What is asked for.
        machine: What may be used.
        download: Whether models named as on the hub are fetched.
        on_compared: Told the bytes that were compared, and how many there are.

    Raises:
        RecipeError: One of the two is an adapter, or nothing is left to extract.
        CheckpointError: A model is not what it should be, or they do not belong together.
        MemoryBudgetError: One matrix does not fit the budget, or the devices.
    """
    asked = _recipe(base, tuned)
    located = locate_models(asked, download=download)
    read = read_models(located, shares_ties=False)
    _check_one_model(read.models, (base, tuned))
    models = _settled(located, read.models)
    files, pairs = _pairs(models)
    changed = _changed(files, pairs, on_compared)
    if not changed:
        raise RecipeError(f"{tuned}: has the very values of {base}; there is nothing to extract")
    draft = _Draft(models[0], wishes, _tied_names(models[0]))
    for pair in changed:
        draft.add(pair)
    draft.save(pairs)
    if not draft.matrices:
        raise RecipeError(
            f"{tuned}: none of the {len(changed)} tensors that differ from {base} is a matrix of a linear "
            f"layer that --modules allows; the first is {printable(changed[0].name)}"
        )
    placed, header = place_tensors(draft.outputs)
    factors = [replace(t, down=placed[t.down.name], up=placed[t.up.name]) for t in draft.matrices]
    device = share_devices(factors, machine)
    budget = machine.budget
    baseline = machine.baseline(torch=True) + _GROWTH_BYTES + host_growth_bytes(machine)
    each = max(_workspace(task, has_devices=device is not None) for task in factors)
    fitting = (budget - baseline) // each
    if fitting < 1:
        raise MemoryBudgetError(
            f"one matrix takes {format_size(each)} while it is decomposed, beside {format_size(baseline)} "
            f"for the process, and --memory allows {format_size(budget)}; give --memory "
            f"{format_budget(baseline + each + _VARIES_BYTES)} or more"
        )
    threads = min(machine.workers, fitting, len(factors))
    return ExtractionPlan(
        base=base,
        tuned=tuned,
        recipe=_describe(base, tuned, wishes),
        files=files,
        factors=tuple(factors),
        copies=tuple(replace(task, output=placed[task.output.name]) for task in draft.copies),
        left_out=tuple(draft.left_out),
        equal=len(pairs) - len(changed),
        header=header,
        config=draft.config(base),
        workers=threads,
        peak_memory=baseline + threads * each,
        budget=budget,
        device=device,
    )


def _recipe(base: Path, tuned: Path) -> Recipe:
    """Return a recipe with the two models, by which they are found, read and matched."""
    return Recipe(
        method="task_arithmetic",
        base=base,
        sources=(Source(tuned, {}),),
        parameters={},
        rules=(),
        semantics=None,
        seed=0,
        missing=MissingPolicy.ERROR,
        non_finite=NonFinitePolicy.ERROR,
        compute_dtype=ComputeDType.FLOAT32,
        output=OutputSpec(dtype=None, max_shard_bytes=None),
    )


def _describe(base: Path, tuned: Path, wishes: Wishes) -> str:
    """Return what was asked for, as the output keeps it."""
    document = {
        "extract": {
            "base": spelled(base),
            "tuned": spelled(tuned),
            "rank": wishes.rank,
            "modules": list(wishes.modules),
            "dtype": wishes.dtype.torch_name,
            "exact": wishes.exact,
        }
    }
    return dump_document(document)


def _settled(recipe: Recipe, models: Sequence[Model]) -> list[Checkpoint]:
    """Return both models by the base's names, tensors that are tied in both as one."""
    labels = ["base", "tuned"]
    if isinstance(models[1], AdaptedModel):
        raise RecipeError(
            f"{recipe.sources[0].path}: is an adapter already; name the model that comes of it"
        )
    matched, _, _ = match_names(models, labels, recipe)
    plain = Resolved(copy=None, drop=False, values=())
    settled = settle_ties(matched, labels, lambda _: plain)
    return [each for each in settled.models if isinstance(each, Checkpoint)]


def _check_one_model(models: Sequence[Model], paths: Sequence[Path]) -> None:
    """Raise if one of the two is a pipeline, of whose parts each would have an adapter of its own."""
    for model, path in zip(models, paths, strict=True):
        if isinstance(model, Checkpoint) and model.parts:
            names = " and ".join(printable(name) for name, _ in model.parts)
            raise RecipeError(
                f"{path}: has the parts {names}, and an adapter is of one model; name one of their "
                "directories"
            )


def _tied_names(base: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Return the other names of tensors that are one in both models, by the name that stands for all."""
    tie = find_tie(base)
    names = {tie.inner: [tie.outer]} if tie is not None and not tie.stored else {}
    heads = [table_pair(name) for name in base.tensors] if has_head(base) else []
    for pair in (*heads, *iter_unstored_pairs(base.tensors)):
        if pair is not None and declares_tie(base.config, pair) and pair.outer not in base.tensors:
            names.setdefault(pair.inner, []).append(pair.outer)
    return {name: tuple(dict.fromkeys(others)) for name, others in names.items()}


def _pairs(models: Sequence[Checkpoint]) -> tuple[tuple[ShardFile, ...], list[Pair]]:
    """Return all files, and every tensor in both models, with indices into them."""
    base, tuned = models
    apart = sorted(base.tensors.keys() ^ tuned.tensors.keys())
    if apart:
        shown = ", ".join(map(printable, apart[:_SHOWN]))
        raise MissingTensorError(
            f"{len(apart)} tensor(s) are in one of the models alone: {shown}; extract from models that "
            "have the same tensors"
        )
    pairs = []
    for name, entry in base.tensors.items():
        other = tuned.tensors[name]
        if entry.is_coded or other.is_coded:
            raise UnsupportedDTypeError(
                f"{printable(name)}: is stored as codes with scales; store the model as numbers first, by "
                "a recipe with `method: passthrough` and the model as its source"
            )
        if entry.shape != other.shape:
            raise ShapeMismatchError(
                f"{printable(name)}: is {list(entry.shape)} in the base and {list(other.shape)} in the "
                "tuned model; bring the base to that shape first, as transformers' "
                "resize_token_embeddings does"
            )
        pairs.append(Pair(name, entry.shape, entry, _shifted(other, len(base.files))))
    return (*base.files, *tuned.files), pairs


def _shifted(entry: TensorEntry, shift: int) -> TensorEntry:
    parts = tuple(replace(part, file=part.file + shift) for part in entry.parts)
    return replace(entry, file=entry.file + shift, parts=parts)


def _changed(
    files: Sequence[ShardFile], pairs: Sequence[Pair], on_compared: Callable[[int, int], None]
) -> list[Pair]:
    """Return the tensors whose values differ."""
    opener = choose_byte_source(ByteSourceKind.PREAD)
    everything = sum(pair.base.nbytes + pair.tuned.nbytes for pair in pairs)
    done = 0
    changed = []
    with ExitStack() as stack:
        sources = [stack.enter_context(opener(file.path)) for file in files]
        check_unchanged(files, sources)
        for pair in pairs:
            if differs(sources, pair):
                changed.append(pair)
            done += pair.base.nbytes + pair.tuned.nbytes
            on_compared(done, everything)
    return changed


def _workspace(task: FactorTask, *, has_devices: bool) -> int:
    """Return the host memory of a matrix."""
    if has_devices and is_for_device(task):
        return host_bytes(task)
    rows, columns = task.pair.shape
    return workspace(rows, columns, task.rank, exact=task.exact)


class _Draft:
    """Decides about tensors that differ."""

    def __init__(self, base: Checkpoint, wishes: Wishes, tied: Mapping[str, Sequence[str]]) -> None:
        self._wishes = wishes
        self._tied = tied
        self._names = list(base.tensors)
        self._config = base.config or {}
        self._linear = [
            name for name, entry in base.tensors.items() if _is_matrix(name, entry.shape)
        ]
        self.matrices: list[FactorTask] = []
        self.copies: list[CopyTask] = []
        self.left_out: list[str] = []
        self._saved: dict[str, list[str]] = {}
        self._saves_tied = False

    def add(self, pair: Pair) -> None:
        """Add what becomes of a tensor."""
        module, _, last = pair.name.rpartition(".")
        if _is_matrix(pair.name, pair.shape):
            if self._wanted(pair.name):
                self.matrices.append(self._factored(pair, module))
            else:
                self.left_out.append(pair.name)
        elif len(pair.shape) > 2 or not last or not module or not pair.base.dtype.is_float:
            self.left_out.append(pair.name)
        elif last == "bias" and f"{module}.weight" in self._linear:
            # A module is saved whole or changed by factors, not both.
            self.left_out.append(pair.name)
        else:
            self._saved.setdefault(module, []).append(pair.name)

    def save(self, pairs: Sequence[Pair]) -> None:
        """Add all tensors of the modules that are saved, whether they differ or not."""
        for module in [each for each in self._saved if self._has_modules(each)]:
            # It would be saved with all that is in it, of which the matrices change by factors.
            self.left_out += self._saved.pop(module)
        for pair in pairs:
            if pair.name.rpartition(".")[0] not in self._saved:
                continue
            others = self._tied.get(pair.name, ())
            # An adapter that changes one of two tied tensors alone parts them. Tables of encoders cannot
            # be said to stay tied: peft 0.21 loads them as linear layers then.
            self._saves_tied |= bool(others) and head_pair(pair.name) is not None
            for name in (pair.name, *others):
                self._saved.setdefault(name.rpartition(".")[0], [])
                output = OutputTensor(f"{PEFT_PREFIX}{name}", pair.tuned.dtype, pair.shape)
                self.copies.append(CopyTask(pair.tuned, output))

    def _has_modules(self, module: str) -> bool:
        """Return whether a module has tensors of its own and others that have, such as a mixer."""
        inside = (name for name in self._names if name.startswith(f"{module}."))
        return any("." in name[len(module) + 1 :] for name in inside)

    def _wanted(self, name: str) -> bool:
        globs = self._wishes.modules
        return not globs or any(
            fnmatchcase(name, glob) or fnmatchcase(name.removesuffix(".weight"), glob)
            for glob in globs
        )

    def _factored(self, pair: Pair, module: str) -> FactorTask:
        rows, columns = pair.shape
        conv1d = self._config.get("model_type") in _WITH_CONV1D and _CONV1D.fullmatch(pair.name)
        outer, inner = (columns, rows) if conv1d else (rows, columns)
        rank = min(self._wishes.rank, rows, columns)
        dtype = self._wishes.dtype
        return FactorTask(
            pair,
            transposed=bool(conv1d),
            rank=rank,
            exact=is_exact(rows, columns, rank, wanted=self._wishes.exact),
            down=OutputTensor(f"{PEFT_PREFIX}{module}.lora_A.weight", dtype, (rank, inner)),
            up=OutputTensor(f"{PEFT_PREFIX}{module}.lora_B.weight", dtype, (outer, rank)),
        )

    @property
    def outputs(self) -> list[OutputTensor]:
        """All tensors of the result, without places."""
        factors = [tensor for task in self.matrices for tensor in (task.down, task.up)]
        return [*factors, *(task.output for task in self.copies)]

    def config(self, base: Path) -> dict[str, object]:
        """Return ``adapter_config.json``, by which PEFT loads the adapter with scaling 1."""
        ranks = {task.pair.name.rpartition(".")[0]: task.rank for task in self.matrices}
        rank = max(ranks.values())
        pattern = {re.escape(name): each for name, each in ranks.items() if each != rank}
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": spelled(base),
            "task_type": None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": pattern,
            "alpha_pattern": dict(pattern),
            "target_modules": self._targets(ranks),
            "modules_to_save": list(self._saved) or None,
            "ensure_weight_tying": self._saves_tied,
            "fan_in_fan_out": any(task.transposed for task in self.matrices),
            "bias": "none",
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
        }

    def _targets(self, ranks: Sequence[str] | dict[str, int]) -> list[str]:
        """Return the last parts of names where they say it all, else whole paths."""
        every = [name.removesuffix(".weight") for name in self._linear]
        leaves = {name.rpartition(".")[2] for name in ranks}
        said = {name for name in every if name.rpartition(".")[2] in leaves}
        return sorted(leaves) if said == set(ranks) else sorted(ranks)


def _is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor is the weight of a linear layer."""
    return len(shape) == 2 and name.endswith(".weight") and _NO_MATRIX.fullmatch(name) is None
