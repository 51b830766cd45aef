"""The mathematics of combining low-rank factors: tensors in, tensors out.

With ``c = weight * scaling`` of a source, the change of the weight that is aimed at is
``sum c_i B_i A_i``. Factors are matrices here, ``A [r, in]`` and ``B [out, r]``, in the compute
dtype; convolutions are flattened by the caller.

Follows: peft.LoraModel.add_weighted_adapter 0.21.2, bit for bit where A and B are combined
separately or concatenated. Decompositions have no unique factors; theirs are fixed by the rule that
the largest entry of every column of B is positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streammerge.adapters.combining.combinations import Combination, Sparsify
from streammerge.functional import (
    SignMethod,
    calculate_majority_sign_mask,
    disjoint_merge,
    magnitude_mask,
    task_arithmetic,
)
from streammerge.methods.matrices import singular_parts
from streammerge.recipe.types import ParameterValue
from streammerge.rng import keep_mask, stream_key
from streammerge.statistics.selecting import select_block
from streammerge.statistics.topk import TiePolicy, kept_count
from streammerge.statistics.trimming import trim_

_MASK_STEP = 2**22
"""Elements whose random mask is drawn at once; a multiple of what one counter gives."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The parameters that one module is combined with, one value per source that has it."""

    combination: Combination
    """The combination type."""
    sources: tuple[int, ...]
    """Index in the recipe; random masks are drawn for it."""
    weights: tuple[float, ...]
    """Factor per source."""
    densities: tuple[float, ...]
    """Fraction kept per source, in [0, 1]; 1 where nothing is trimmed or dropped."""
    sign_method: SignMethod
    """``total`` or ``frequency``."""
    clamp: float
    """Quantile, or 0 for none."""
    seed: int
    """Seed of the random masks."""


def read_settings(
    combination: Combination,
    values: Sequence[tuple[str, ParameterValue]],
    sources: Sequence[int],
    seed: int,
) -> Settings:
    """Return the settings of the sources that take part, from those of all."""
    by_name = dict(values)

    def of_each(name: str, default: float) -> tuple[float, ...]:
        every = by_name.get(name)
        if not isinstance(every, tuple):
            return (default,) * len(sources)
        return tuple(float(every[index]) for index in sources)

    return Settings(
        combination=combination,
        sources=tuple(sources),
        weights=of_each("weight", 1.0),
        densities=of_each("density", 1.0),
        sign_method="frequency" if by_name.get("majority_sign_method") == "frequency" else "total",
        clamp=float(str(by_name.get("svd_clamp", 0.0))),
        seed=seed,
    )


def split_coefficients(coefficients: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return what A and B are weighted with: the root of each magnitude, the sign on A alone."""
    roots = [math.sqrt(abs(each)) for each in coefficients]
    return [root if c >= 0 else -root for root, c in zip(roots, coefficients, strict=True)], roots


def merge_factor(
    tensors: Sequence[Tensor], weights: Sequence[float], settings: Settings, *, name: str
) -> Tensor:
    """Return one factor of all sources combined elementwise, as PEFT does it.

    Args:
        tensors: The factor per source, all of one shape.
        weights: What each is weighted with.
        settings: How they are combined.
        name: The output tensor's name, which random masks go by.

    Returns:
        The combined factor, in the dtype of the factors.
    """
    column = torch.tensor(weights, dtype=tensors[0].dtype)
    sparse = [
        _sparsified(tensor, index, settings, name=name) for index, tensor in enumerate(tensors)
    ]
    if not settings.combination.elects:
        return task_arithmetic(sparse, column)
    stack = torch.stack(sparse)
    del sparse
    agree = calculate_majority_sign_mask(stack, settings.sign_method)
    return disjoint_merge(stack * column.view(-1, *(1 for _ in tensors[0].shape)), agree)


def concatenate(
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    weights: Sequence[float],
    scalings: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Return A and B of all sources side by side, the coefficients on A: the exact sum."""
    # Two multiplications, each rounded, as in PEFT.
    weighted = [
        down * weight * scaling
        for down, weight, scaling in zip(downs, weights, scalings, strict=True)
    ]
    return torch.cat(weighted, dim=0), torch.cat(list(ups), dim=1)


def sum_low_rank(
    downs: Sequence[Tensor], ups: Sequence[Tensor], coefficients: Sequence[float], rank: int
) -> tuple[Tensor, Tensor]:
    """Return the best approximation of ``sum c_i B_i A_i`` of a rank, without forming it.

    Thin QR of the factors side by side leaves a core as small as the sum of the ranks, whose
    singular values are those of the whole. Computed in float64: the work is small, and the result
    is then as near to the exact one as its dtype allows.

    Args:
        downs: ``A`` per source, ``[r_i, in]``.
        ups: ``B`` per source, ``[out, r_i]``.
        coefficients: ``c`` per source.
        rank: Rank of the result, at most the sum of the ranks, ``in`` and ``out``.

    Returns:
        ``A [rank, in]`` with orthonormal rows, and ``B [out, rank]``, in float64.
    """
    wide = torch.cat([up.double() * c for up, c in zip(ups, coefficients, strict=True)], dim=1)
    outer_q, outer_r = torch.linalg.qr(wide)
    del wide
    tall = torch.cat([down.double() for down in downs], dim=0).T
    inner_q, inner_r = torch.linalg.qr(tall)
    del tall
    left, values, right = torch.linalg.svd(outer_r @ inner_r.T, full_matrices=False)
    up = outer_q @ (left[:, :rank] * values[:rank])
    down = right[:rank] @ inner_q.T
    return _with_fixed_signs(down, up)


def merge_products(
    form: Callable[[int], Tensor], count: int, settings: Settings, *, name: str
) -> Tensor:
    """Return the products ``s_i B_i A_i`` of all sources combined elementwise.

    Holds the result, one product at a time, and for an election the signs and the counts: products
    are formed anew instead of being kept.

    Args:
        form: Returns the product of a source as a new ``[out, in]``.
        count: Number of sources.
        settings: How they are combined.
        name: The base tensor's name, which random masks go by.
    """

    def sparse(index: int) -> Tensor:
        return _sparsify_(form(index), index, settings, name=name)

    if not settings.combination.elects:
        total = sparse(0).mul_(settings.weights[0]).add_(0.0)
        for index in range(1, count):
            total.add_(sparse(index).mul_(settings.weights[index]))
        return total
    signs = _elect(sparse, count, settings)
    total = torch.zeros_like(signs)
    agreeing = torch.zeros_like(signs)
    for index in range(count):
        # The magnitude where the entry has the elected sign, and 0 elsewhere.
        agree = sparse(index).mul_(signs).clamp_min_(0.0)
        agreeing.add_(torch.sign(agree))
        total.add_(agree.mul_(settings.weights[index]))
    return total.mul_(signs).div_(agreeing.clamp_min_(1.0)).add_(0.0)


def decompose(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of a matrix of a rank, as ``A [rank, in]``, ``B [out, rank]``.

    Of a matrix where it lies: on the CPU, or on a device.
    """
    left, values, right = singular_parts(product)
    return _with_fixed_signs(right[:rank].clone(), left[:, :rank] * values[:rank])


def clamp_factors(down: Tensor, up: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Return A and B clamped to the magnitude of a quantile of their signed values together.

    Follows: peft 0.21.2, whose quantile fails beyond 2^24 values. It depends on the signs of the
    singular vectors, which are fixed here and in PEFT are what LAPACK leaves.
    """
    values = torch.cat([up.flatten(), down.flatten()]).numpy()
    high = float(np.quantile(values, quantile))
    return down.clamp(-high, high), up.clamp(-high, high)


def _elect(sparse: Callable[[int], Tensor], count: int, settings: Settings) -> Tensor:
    """Return +1 and -1 for the sign that each entry elects; a tie elects +1."""
    votes: Tensor | None = None
    for index in range(count):
        vector = sparse(index)
        vote = vector.sign_() if settings.sign_method == "frequency" else vector
        votes = vote if votes is None else votes.add_(vote)
    assert votes is not None  # noqa: S101 - a module that no source has is no task
    return torch.ge(votes, 0.0, out=votes).mul_(2.0).sub_(1.0)


def _sparsified(tensor: Tensor, index: int, settings: Settings, *, name: str) -> Tensor:
    """Return a source's factor trimmed or dropped, with PEFT's bits; the input stays as it is."""
    density = settings.densities[index]
    match settings.combination.sparsify:
        case Sparsify.TRIM if density < 1:
            return tensor * magnitude_mask(tensor, density)
        case Sparsify.DROP if density < 1:
            return _drop_(tensor.clone(), index, settings, name=name)
        case _:
            return tensor


def _sparsify_(product: Tensor, index: int, settings: Settings, *, name: str) -> Tensor:
    """Trim or drop a source's product in place."""
    match settings.combination.sparsify:
        case Sparsify.TRIM:
            flat = product.view(-1)
            magnitudes = flat.abs().numpy()
            k = kept_count(settings.densities[index], magnitudes.size)
            top = select_block(magnitudes, k, TiePolicy.EXACT)
            del magnitudes
            trim_(flat, top, 0)
            return product
        case Sparsify.DROP:
            return _drop_(product, index, settings, name=name)
        case _:
            return product


def _drop_(tensor: Tensor, index: int, settings: Settings, *, name: str) -> Tensor:
    """Drop entries at random and divide the rest by the density, in place.

    The mask depends on the seed, the source's place in the recipe, the name and the element only.
    """
    density = settings.densities[index]
    if density >= 1:
        return tensor
    if density <= 0:
        return tensor.zero_()
    key = stream_key(settings.seed, settings.sources[index], name)
    values = tensor.view(-1).numpy()
    for start in range(0, values.size, _MASK_STEP):
        part = values[start : start + _MASK_STEP]
        np.multiply(part, keep_mask(key, start, part.size, density), out=part)
    return tensor.div_(density)


def _with_fixed_signs(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors with the largest entry of every column of B made positive, in place."""
    if up.numel() == 0:
        return down, up
    largest = up.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(up.gather(0, largest) < 0, -1.0, 1.0).to(up.dtype)
    return down.mul_(signs.T), up.mul_(signs)
