"""Does what a plan of a combination says: one tensor at a time from the inputs to the output file.

Memory: the factors of one module in all sources, as stored and in the compute dtype, and what
:mod:`streammerge.adapters.combining.sizing` says that the combination takes; copies pass through two pieces.

One thread of torch computes, so that the bits of a decomposition do not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

from streammerge.adapters.combining.combinations import COMBINATIONS, Target
from streammerge.adapters.combining.factors import (
    Settings,
    clamp_factors,
    concatenate,
    merge_factor,
    merge_products,
    read_settings,
    split_coefficients,
    sum_low_rank,
)
from streammerge.adapters.combining.plans import (
    CombinationPlan,
    CopyTask,
    ModuleTask,
    OutputTensor,
    VectorTask,
)
from streammerge.adapters.combining.sizing import COPY_BYTES
from streammerge.adapters.files.types import LowRankModule
from streammerge.checkpoint.bytesource import ByteSource
from streammerge.checkpoint.outputfile import OutputFile
from streammerge.checkpoint.types import TensorEntry
from streammerge.dtypes import DType
from streammerge.errors import NonFiniteError, RecipeError
from streammerge.recipe.types import ComputeDType

OnTask = Callable[[int, int], None]
"""Told the bytes read and the bytes written by a task that is done."""
Decompose = Callable[[Tensor, int, str], tuple[Tensor, Tensor]]
"""Returns A ``[rank, in]`` and B ``[out, rank]`` of a product ``[out, in]``, given its name."""


def check_equal_copies(plan: CombinationPlan, sources: Sequence[ByteSource]) -> None:
    """Return if wherever several sources replace a tensor of the base, they do it by the same.

    Raises:
        RecipeError: They differ; which one counts is for the recipe to say.
    """
    for task in plan.tasks:
        if not isinstance(task, CopyTask) or len(task.inputs) < 2:
            continue
        first, entry = task.inputs[0]
        for index, other in task.inputs[1:]:
            if not _same_bytes(sources[first], entry, sources[index], other):
                raise RecipeError(
                    f"sources[{first}] and sources[{index}] replace the same tensor of the base by "
                    f"different ones ({entry.name}), which have no combination; choose one with a "
                    f'rule {{tensors: "...", copy: {first}}}'
                )


def execute(
    plan: CombinationPlan,
    sources: Sequence[ByteSource],
    output: OutputFile,
    on_task: OnTask,
    decompose: Decompose,
) -> None:
    """Write every tensor of the plan.

    Args:
        plan: The plan.
        sources: The open input files, in recipe order.
        output: The open output file; its header is written already.
        on_task: Called after every task.
        decompose: Decomposes whole products.

    Raises:
        NonFiniteError: An input holds NaN or infinity, or the result does not fit its dtype.
    """
    with _one_thread(), torch.inference_mode():
        for task in plan.tasks:
            if isinstance(task, CopyTask):
                read = _copy(plan, sources, output, task)
            elif isinstance(task, VectorTask):
                read = _Combiner(plan, sources, output, decompose).combine_vectors(task)
            else:
                read = _Combiner(plan, sources, output, decompose).combine_module(task)
            on_task(read, sum(tensor.nbytes for tensor in task.outputs))


class _Combiner:
    """Loads, combines and writes the factors of one task."""

    def __init__(
        self,
        plan: CombinationPlan,
        sources: Sequence[ByteSource],
        output: OutputFile,
        decompose: Decompose,
    ) -> None:
        self._decompose = decompose
        self._plan = plan
        self._sources = sources
        self._output = output
        self._read = 0
        self._dtype = torch.float32 if plan.compute_dtype is ComputeDType.FLOAT32 else torch.float64

    def combine_vectors(self, task: VectorTask) -> int:
        """Write a weighted sum of vectors; return the bytes read."""
        total: Tensor | None = None
        for index, (entry, weight) in enumerate(zip(task.inputs, task.weights, strict=True)):
            weighted = self._load(index, entry) * weight
            # PEFT starts from zero, so that no -0.0 is left.
            total = weighted.add_(0.0) if total is None else total.add_(weighted)
        assert total is not None  # noqa: S101 - a vector that no source has is no task
        self._write(total, task.output)
        return self._read

    def combine_module(self, task: ModuleTask) -> int:
        """Write the combined factors of a module; return the bytes read."""
        present = [
            (index, module)
            for index, module in enumerate(task.inputs)
            if module is not None and task.copies in (None, index)
        ]
        indices = [index for index, _ in present]
        modules = [module for _, module in present]
        combination = COMBINATIONS[self._plan.method]
        settings = read_settings(combination, task.values, indices, self._plan.seed)
        downs = [self._load(index, module.down).flatten(1) for index, module in present]
        ups = [self._load(index, module.up).flatten(1) for index, module in present]
        if task.copies is None:
            down, up = _combine(task, settings, modules, downs, ups, decompose=self._decompose)
        else:
            down, up = concatenate(downs, ups, [1.0], [modules[0].scaling])
        del downs, ups
        self._write(down, task.down)
        self._write(up, task.up)
        if task.bias is not None:
            self._write(self._bias(task, present, settings), task.bias)
        if task.alpha is not None:
            self._write(torch.tensor(float(task.rank)), task.alpha)
        return self._read

    def _bias(
        self, task: ModuleTask, present: Sequence[tuple[int, LowRankModule]], settings: Settings
    ) -> Tensor:
        """Return the biases, scaled as they act, combined as task vectors of their own."""
        scaled, weights, numbers, densities = [], [], [], []
        for place, (index, module) in enumerate(present):
            if module.bias is not None:
                scaled.append(self._load(index, module.bias) * module.scaling)
                weights.append(1.0 if task.copies is not None else settings.weights[place])
                numbers.append(index)
                densities.append(1.0 if task.copies is not None else settings.densities[place])
        assert task.bias is not None  # noqa: S101 - the caller asked
        if not scaled:
            return torch.zeros(task.bias.shape, dtype=self._dtype)
        own = Settings(
            combination=settings.combination,
            sources=tuple(numbers),
            weights=tuple(weights),
            densities=tuple(densities),
            sign_method=settings.sign_method,
            clamp=0.0,
            seed=settings.seed,
        )
        return merge_factor(scaled, weights, own, name=task.bias.name)

    def _load(self, index: int, entry: TensorEntry) -> Tensor:
        """Return a tensor in the compute dtype, finite."""
        stored = _load_stored(self._sources[index], entry)
        self._read += entry.nbytes
        loaded = stored.to(self._dtype)
        if not bool(torch.isfinite(loaded).all()):
            bad = int(torch.isfinite(loaded).logical_not().flatten().nonzero()[0])
            raise NonFiniteError(
                f"{entry.name}: sources[{index}] holds {float(loaded.flatten()[bad])} at flat "
                f"element {bad} ({self._plan.adapters[index].file.path}); repair or retrain the "
                "adapter"
            )
        return loaded

    def _write(self, tensor: Tensor, place: OutputTensor) -> None:
        """Round to the output dtype and write."""
        rounded = tensor.to(getattr(torch, place.dtype.torch_name)).contiguous()
        if not bool(torch.isfinite(rounded.float()).all()):
            raise NonFiniteError(
                f"{place.name}: the combined values reach "
                f"{float(tensor.abs().max()):g}, beyond the range of {place.dtype}; choose a wider "
                "output.dtype or smaller weights"
            )
        raw = rounded.reshape(-1).view(torch.uint8).numpy()
        assert raw.size == place.nbytes == prod(place.shape) * place.dtype.itemsize  # noqa: S101 - else the plan is wrong
        self._output.write_at(place.offset, raw.data)


def _combine(
    task: ModuleTask,
    settings: Settings,
    modules: Sequence[LowRankModule],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    *,
    decompose: Decompose,
) -> tuple[Tensor, Tensor]:
    """Return A and B of the result, as matrices."""
    scalings = [module.scaling for module in modules]
    coefficients = [w * s for w, s in zip(settings.weights, scalings, strict=True)]
    match settings.combination.target:
        case Target.FACTORS:
            on_down, on_up = split_coefficients(coefficients)
            return (
                merge_factor(downs, on_down, settings, name=task.down.name),
                merge_factor(ups, on_up, settings, name=task.up.name),
            )
        case Target.CONCATENATION:
            return concatenate(downs, ups, settings.weights, scalings)
        case Target.LOW_RANK_PRODUCT:
            down, up = sum_low_rank(downs, ups, coefficients, task.rank)
        case Target.DENSE_PRODUCT:
            product = merge_products(
                # Scaled after the multiplication, as PEFT's get_delta_weight.
                lambda index: (ups[index] @ downs[index]).mul_(scalings[index]),
                len(modules),
                settings,
                name=task.weight_name,
            )
            down, up = decompose(product, task.rank, task.weight_name)
    return clamp_factors(down, up, settings.clamp) if settings.clamp else (down, up)


def _load_stored(source: ByteSource, entry: TensorEntry) -> Tensor:
    buffer = bytearray(entry.nbytes)
    source.read_into(entry.offset, memoryview(buffer))
    dtype = getattr(torch, entry.dtype.torch_name)
    return torch.frombuffer(buffer, dtype=dtype).reshape(entry.shape)


def _copy(
    plan: CombinationPlan, sources: Sequence[ByteSource], output: OutputFile, task: CopyTask
) -> int:
    """Copy a tensor as it is, piece by piece; return the bytes read."""
    index, entry = task.inputs[0]
    for start, piece in _pieces(sources[index], entry):
        _check_piece(plan, index, entry, piece)
        output.write_at(task.output.offset + start, memoryview(piece))
    return entry.nbytes


def _pieces(source: ByteSource, entry: TensorEntry) -> Iterator[tuple[int, bytearray]]:
    """Yield the bytes of a tensor in pieces of whole elements, with where each begins."""
    for start in range(0, entry.nbytes, COPY_BYTES):
        piece = bytearray(min(COPY_BYTES, entry.nbytes - start))
        source.read_into(entry.offset + start, memoryview(piece))
        yield start, piece


def _check_piece(plan: CombinationPlan, index: int, entry: TensorEntry, piece: bytearray) -> None:
    if not entry.dtype.is_float or entry.dtype in (DType.F8_E4M3, DType.F8_E5M2):
        return
    values = torch.frombuffer(piece, dtype=getattr(torch, entry.dtype.torch_name))
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            f"{entry.name}: sources[{index}] holds NaN or infinity "
            f"({plan.adapters[index].file.path}); repair or retrain the adapter"
        )


def _same_bytes(
    first: ByteSource, entry: TensorEntry, second: ByteSource, other: TensorEntry
) -> bool:
    pairs = zip(_pieces(first, entry), _pieces(second, other), strict=True)
    return all(left == right for (_, left), (_, right) in pairs)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread inside: more would add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
