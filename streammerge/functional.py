"""Merges of whole tensors in memory, under the names and signatures that PEFT uses.

Every function takes one tensor per task, all of one shape, and treats density as a fraction of
that tensor, never of a model. None modifies its inputs. Magnitude trimming and merging give the
bits of peft.utils.merge_utils 0.21.2 (NaN, infinities and -0.0 included); only among equal
magnitudes at the threshold does the choice differ: here everything greater is kept, then the
first ties in flat order until exactly ``int(density * numel)`` elements are. Random masks are
PEFT's too, given the same torch generator state and device.

Output dtypes: a weighted sum has torch's promotion of task and weight dtypes (float32 weights
raise bfloat16 tasks to float32); a disjoint mean divides by a float32 count, so it is at least
float32. Nothing is rounded back to the dtype of the tasks.

What PEFT turns into NaN, broadcasts or lets pass is refused with ``RecipeError``, a ``ValueError``:
shapes or weights that do not fit, weights that are not finite, densities outside [0, 1], and the
dtypes bool, complex and float8.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from streammerge.errors import RecipeError, suggestion

Weights = Tensor | Sequence[float]
Densities = float | Sequence[float]
PruneMethod = Literal["magnitude", "random"]
SignMethod = Literal["total", "frequency"]

_PRUNE_METHODS = ("magnitude", "random")
_SIGN_METHODS = ("total", "frequency")
_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def prune(
    tensor: Tensor,
    density: float,
    method: PruneMethod,
    rescale: bool = False,  # noqa: FBT001, FBT002 - PEFT callers pass it by position
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the tensor with all but a fraction of its elements multiplied by zero.

    So a pruned negative becomes -0.0, and a pruned NaN or infinity NaN.

    Args:
        tensor: Any shape and layout; flat order is row-major whatever the strides.
        density: Fraction of elements kept, in [0, 1]. At 1 the tensor itself is returned and no
            random number is drawn.
        method: "magnitude" keeps exactly ``int(density * numel)`` of the largest magnitudes, see
            ``magnitude_mask``. "random" keeps each element with probability density, rounded to
            the dtype of the tensor (0.999 is 1 in bfloat16).
        rescale: Divide what "random" kept by density. "magnitude" never rescales.
        generator: Source of the random mask, on the tensor's device; None is torch's global one.

    Returns:
        A tensor of the same shape and dtype.

    Raises:
        RecipeError: The density is not a number in [0, 1], or is 0 in the dtype of the division
            with rescaling; the method is unknown; the dtype has no arithmetic, or no random mask.

    Source: magnitude trimming, arXiv:2306.01708; drop and rescale, arXiv:2311.03099.
    Follows: peft.utils.merge_utils.prune 0.21.2.
    Differs from PEFT: the choice among ties; a density above 1 is refused, not taken as 1; density
    1 gives no warning; a density of 0 with rescaling is refused, not answered with NaN; a NaN, bool
    or text density and integers under "random" get a message of their own; the method's name and
    the dtype are checked at density 1 too; complex tensors are refused.
    """
    _check_word("method", method, _PRUNE_METHODS)
    _check_dtype("tensor", tensor)
    fraction = _parse_density("density", density)
    if method == "random":
        _check_random(tensor, fraction, rescale=rescale)
    if fraction == 1:
        return tensor
    if method == "magnitude":
        return tensor * magnitude_mask(tensor, fraction)
    # The probabilities must be a tensor of this dtype: a scalar probability is another algorithm
    # in torch, with other random numbers.
    kept = tensor * torch.bernoulli(torch.full_like(tensor, fraction), generator=generator)
    return kept / fraction if rescale else kept


def magnitude_mask(tensor: Tensor, density: float) -> Tensor:
    """Return a bool mask that is True at exactly ``int(density * numel)`` largest magnitudes.

    NaN ranks above infinity. Among elements whose magnitude equals the threshold, the first in
    flat order are kept.

    Args:
        tensor: Any shape and layout.
        density: Fraction of elements kept, in [0, 1]. The product with numel is a Python float,
            truncated: 0.29 of 100 elements are 28.

    Returns:
        A bool tensor of the same shape, on the same device.

    Raises:
        RecipeError: The density is not a number in [0, 1], or the dtype has no arithmetic.

    Source: the trim step of TIES, arXiv:2306.01708.
    Differs from PEFT: ``torch.topk`` keeps an unspecified choice of the ties; the lowest value of
    a signed integer dtype ranks highest here, while in PEFT its ``abs`` overflows and it ranks
    lowest.
    """
    _check_dtype("tensor", tensor)
    fraction = _parse_density("density", density)
    numel = tensor.numel()
    k = int(fraction * numel)
    if k == 0:
        return torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
    keys = _magnitude_keys(tensor)
    threshold = torch.kthvalue(keys, numel - k + 1).values
    mask = keys > threshold
    ties_in_flat_order = torch.nonzero(keys == threshold).flatten()
    mask[ties_in_flat_order[: k - int(mask.sum())]] = True
    return mask.reshape(tensor.shape)


def calculate_majority_sign_mask(tensor: Tensor, method: SignMethod = "total") -> Tensor:
    """Return a mask that is True where an element has the sign its position elected.

    A position elects + if its sum over tasks is >= 0, so an exact balance elects +, and - if the
    sum is negative or NaN. Zeros and NaN never have the elected sign.

    Args:
        tensor: The stacked tasks, ``[n_tasks, *shape]``.
        method: "total" sums values, "frequency" sums signs.

    Returns:
        A bool tensor, ``[n_tasks, *shape]``.

    Raises:
        RecipeError: The method is unknown, there is no task, or the dtype has no arithmetic.

    Source: the elect step of TIES, arXiv:2306.01708.
    Follows: peft.utils.merge_utils.calculate_majority_sign_mask 0.21.2.
    Differs from PEFT: an unknown method is a ValueError, not a RuntimeError; a 0-d tensor and an
    empty stack are refused. Differs from the paper: a balance elects +, not the sign of the model.
    """
    _check_word("method", method, _SIGN_METHODS)
    _check_stack("tensor", tensor)
    votes = tensor if method == "total" else tensor.sign()
    return torch.where(votes.sum(dim=0) >= 0, tensor > 0, tensor < 0)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """Return at each position the mean over the tasks that the mask selects, 0 where none is.

    The mean counts tasks, not their weights. A NaN or infinity the mask leaves out still makes the
    position NaN.

    Args:
        task_tensors: The stacked tasks, already weighted, ``[n_tasks, *shape]``.
        majority_sign_mask: Which tasks to count, ``[n_tasks, *shape]``.

    Returns:
        The merged tensor, ``[*shape]``, float64 for float64, otherwise float32.

    Raises:
        RecipeError: The two shapes differ, there is no task, or the dtype has no arithmetic.

    Source: the merge step of TIES, arXiv:2306.01708.
    Follows: peft.utils.merge_utils.disjoint_merge 0.21.2.
    Differs from PEFT: a mask of another shape is refused, not broadcast, and so are a 0-d tensor
    and an empty stack.
    """
    _check_stack("task_tensors", task_tensors)
    if task_tensors.shape != majority_sign_mask.shape:
        raise RecipeError(
            f"majority_sign_mask: expected the shape of task_tensors, {list(task_tensors.shape)}, "
            f"got {list(majority_sign_mask.shape)}"
        )
    total = (task_tensors * majority_sign_mask).sum(dim=0)
    # A float minimum makes the integer count floating, which sets the dtype of the mean.
    return total / torch.clamp(majority_sign_mask.sum(dim=0), min=1.0)


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Weights) -> Tensor:
    """Return the weighted sum of the tasks.

    Args:
        task_tensors: One tensor per task, all of one shape.
        weights: One finite weight per task, [n_tasks]; a sequence becomes a float32 tensor.

    Returns:
        The merged tensor, in the promotion of task and weight dtypes.

    Raises:
        RecipeError: No task, shapes that differ, a dtype without arithmetic, or weights that are
            not one finite number per task.

    Source: task arithmetic, arXiv:2212.04089.
    Follows: peft.utils.merge_utils.task_arithmetic 0.21.2.
    Differs from PEFT: weights may be a sequence; weights of shape [], [1] or [n_tasks, ...] are
    refused, not broadcast; weights that are NaN or infinite are refused.
    """
    tasks = _parse_tasks(task_tensors)
    column = _parse_weights(weights, tasks)
    return (torch.stack(tasks) * column).sum(dim=0)


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Weights, density: Densities) -> Tensor:
    """Return the weighted sum of the tasks, each trimmed to its largest magnitudes.

    Args:
        task_tensors: One tensor per task, all of one shape.
        weights: One finite weight per task, [n_tasks]; a sequence becomes a float32 tensor.
        density: Fraction of elements kept, in [0, 1]; a sequence holds one per task.

    Returns:
        The merged tensor, in the promotion of task and weight dtypes.

    Raises:
        RecipeError: As ``task_arithmetic`` and ``prune``, or the wrong number of densities.

    Source: the trim step of TIES, arXiv:2306.01708, with the sum of arXiv:2212.04089.
    Follows: peft.utils.merge_utils.magnitude_prune 0.21.2.
    Differs from PEFT: as ``task_arithmetic`` and ``prune``; density may differ by task.
    """
    tasks = _parse_tasks(task_tensors)
    column = _parse_weights(weights, tasks)
    densities = _parse_densities(density, len(tasks))
    return (_stack_trimmed(tasks, densities) * column).sum(dim=0)


def ties(
    task_tensors: Sequence[Tensor],
    weights: Weights,
    density: Densities,
    majority_sign_method: SignMethod = "total",
) -> Tensor:
    """Return the mean of the weighted tasks, each trimmed, that agree with the elected sign.

    Signs are elected before weighting, so a negative weight changes no election; the mean divides
    by the number of agreeing tasks, not by their weights.

    Args:
        task_tensors: One tensor per task, all of one shape.
        weights: One finite weight per task, [n_tasks]; a sequence becomes a float32 tensor.
        density: Fraction of elements kept by magnitude, in [0, 1]; a sequence holds one per task.
        majority_sign_method: "total" sums trimmed values, "frequency" sums their signs.

    Returns:
        The merged tensor, at least float32.

    Raises:
        RecipeError: As ``magnitude_prune``, or the sign method is unknown.

    Source: TIES, arXiv:2306.01708, Algorithm 1.
    Follows: peft.utils.merge_utils.ties 0.21.2.
    Differs from PEFT: as ``magnitude_prune`` and ``calculate_majority_sign_mask``. Differs from
    the paper: trims per tensor, not per model.
    """
    tasks = _parse_tasks(task_tensors)
    column = _parse_weights(weights, tasks)
    densities = _parse_densities(density, len(tasks))
    _check_word("majority_sign_method", majority_sign_method, _SIGN_METHODS)
    trimmed = _stack_trimmed(tasks, densities)
    agree = calculate_majority_sign_mask(trimmed, majority_sign_method)
    return disjoint_merge(trimmed * column, agree)


def dare_linear(
    task_tensors: Sequence[Tensor],
    weights: Weights,
    density: Densities,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the weighted sum of the tasks, each dropped at random and rescaled.

    Masks are drawn task by task in list order, each over its whole tensor. The rescaled values are
    rounded to the dtype of the tasks before they are weighted.

    Args:
        task_tensors: One floating-point tensor per task, all of one shape.
        weights: One finite weight per task, [n_tasks]; a sequence becomes a float32 tensor.
        density: Probability of keeping an element, in (0, 1]; a sequence holds one per task.
        generator: Source of the random masks; None is torch's global generator.

    Returns:
        The merged tensor, in the promotion of task and weight dtypes.

    Raises:
        RecipeError: As ``task_arithmetic`` and ``prune``, or the wrong number of densities.

    Source: DARE, arXiv:2311.03099, with the sum of arXiv:2212.04089.
    Follows: peft.utils.merge_utils.dare_linear 0.21.2.
    Differs from PEFT: as ``task_arithmetic`` and ``prune``; density may differ by task.
    """
    tasks = _parse_tasks(task_tensors)
    column = _parse_weights(weights, tasks)
    densities = _parse_densities(density, len(tasks))
    return (_stack_dropped(tasks, densities, generator) * column).sum(dim=0)


def dare_ties(
    task_tensors: Sequence[Tensor],
    weights: Weights,
    density: Densities,
    majority_sign_method: SignMethod = "total",
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mean of the weighted tasks, each dropped at random, that agree in sign.

    Args:
        task_tensors: One floating-point tensor per task, all of one shape.
        weights: One finite weight per task, [n_tasks]; a sequence becomes a float32 tensor.
        density: Probability of keeping an element, in (0, 1]; a sequence holds one per task.
        majority_sign_method: "total" sums the rescaled values, "frequency" sums their signs.
        generator: Source of the random masks; None is torch's global generator.

    Returns:
        The merged tensor, at least float32.

    Raises:
        RecipeError: As ``dare_linear``, or the sign method is unknown.

    Source: DARE, arXiv:2311.03099, with the elect and merge steps of TIES, arXiv:2306.01708.
    Follows: peft.utils.merge_utils.dare_ties 0.21.2.
    Differs from PEFT: as ``dare_linear`` and ``calculate_majority_sign_mask``.
    """
    tasks = _parse_tasks(task_tensors)
    column = _parse_weights(weights, tasks)
    densities = _parse_densities(density, len(tasks))
    _check_word("majority_sign_method", majority_sign_method, _SIGN_METHODS)
    dropped = _stack_dropped(tasks, densities, generator)
    agree = calculate_majority_sign_mask(dropped, majority_sign_method)
    return disjoint_merge(dropped * column, agree)


def _stack_trimmed(tasks: list[Tensor], densities: list[float]) -> Tensor:
    """Return the tasks trimmed by magnitude, ``[n_tasks, *shape]``."""
    return torch.stack([prune(*pair, "magnitude") for pair in zip(tasks, densities, strict=True)])


def _stack_dropped(
    tasks: list[Tensor], densities: list[float], generator: torch.Generator | None
) -> Tensor:
    """Return the tasks dropped at random and rescaled, ``[n_tasks, *shape]``."""
    pairs = list(zip(tasks, densities, strict=True))
    for task, density in pairs:  # all of them before the first random number is drawn
        _check_random(task, density, rescale=True)
    return torch.stack([prune(*pair, "random", True, generator=generator) for pair in pairs])


def _magnitude_keys(tensor: Tensor) -> Tensor:
    """Return flat integers that order as the magnitudes do, NaN greatest.

    Non-negative floats order as their bit patterns. float16 and bfloat16 are exact in float32.
    """
    flat = tensor.reshape(-1)
    if flat.dtype in _INTEGER_DTYPES:
        wide = flat.long()
        # magnitude - 1, which exists for the lowest integer although its magnitude does not
        return torch.where(wide < 0, ~wide, wide - 1)
    bits = torch.int64 if flat.dtype == torch.float64 else torch.int32
    magnitudes = (flat if flat.dtype == torch.float64 else flat.float()).abs()
    return magnitudes.view(bits).masked_fill(magnitudes.isnan(), torch.iinfo(bits).max)


def _parse_tasks(task_tensors: Sequence[Tensor]) -> list[Tensor]:
    tasks = list(task_tensors)
    if not tasks:
        raise RecipeError("task_tensors: expected at least one tensor, got none")
    for index, task in enumerate(tasks):
        _check_dtype(f"task_tensors[{index}]", task)
        if task.shape != tasks[0].shape:
            shapes = f"{list(tasks[0].shape)}, got {list(task.shape)}"
            raise RecipeError(f"task_tensors[{index}]: expected task_tensors[0]'s shape {shapes}")
    return tasks


def _parse_weights(weights: object, tasks: list[Tensor]) -> Tensor:
    """Return the weights as [n_tasks, 1, ...], to multiply the stacked tasks with."""
    if isinstance(weights, Sequence):
        numbers = [_parse_number(f"weights[{index}]", each) for index, each in enumerate(weights)]
        weights = torch.tensor(numbers, dtype=torch.float32, device=tasks[0].device)
    column = _check_dtype("weights", weights)
    if column.shape != (len(tasks),):
        shapes = f"[{len(tasks)}], got {list(column.shape)}"
        raise RecipeError(f"weights: expected one per task, shape {shapes}")
    if not bool(torch.isfinite(column).all()):
        raise RecipeError(f"weights: expected finite numbers, got {column.tolist()}")
    return column.view(-1, *(1 for _ in tasks[0].shape))


def _parse_densities(density: object, n_tasks: int) -> list[float]:
    if isinstance(density, str) or not isinstance(density, Sequence):
        return [_parse_density("density", density)] * n_tasks
    if len(density) != n_tasks:
        raise RecipeError(f"density: expected a number or {n_tasks}, got {len(density)}")
    return [_parse_density(f"density[{index}]", each) for index, each in enumerate(density)]


def _parse_density(name: str, density: object) -> float:
    fraction = _parse_number(name, density)
    if not 0 <= fraction <= 1:
        raise RecipeError(f"{name}: expected a fraction in [0, 1], got {density}")
    return fraction


def _parse_number(name: str, number: object) -> float:
    if isinstance(number, bool) or not isinstance(number, Real):
        raise RecipeError(f"{name}: expected a number, got {number!r}")
    return float(number)


def _check_word(name: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        raise RecipeError(
            f"{name}: expected {' or '.join(known)}, got {word!r}{suggestion(str(word), known)}"
        )


def _check_dtype(name: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise RecipeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOAT_DTYPES + _INTEGER_DTYPES:
        raise RecipeError(f"{name}: {tensor.dtype} has no merge arithmetic; convert it first")
    return tensor


def _check_random(tensor: Tensor, density: float, *, rescale: bool) -> None:
    if tensor.dtype not in _FLOAT_DTYPES:
        raise RecipeError(f"random pruning needs a floating-point tensor, got {tensor.dtype}")
    # Torch rounds the divisor to the dtype it divides in, where a tiny one becomes 0.
    division = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if rescale and torch.tensor(density, dtype=division).item() == 0:
        raise RecipeError(
            f"density: rescaling divides by it, and {density} is 0 in {division}; "
            "use a larger density, or prune without rescaling"
        )


def _check_stack(name: str, stack: Tensor) -> None:
    _check_dtype(name, stack)
    if stack.dim() == 0 or stack.shape[0] == 0:
        raise RecipeError(f"{name}: expected [n_tasks >= 1, *shape], got {list(stack.shape)}")
