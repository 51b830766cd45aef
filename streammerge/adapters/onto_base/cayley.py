"""Rotations made of what OFT and BOFT store, in float64 and rounded once.

Follows: peft 0.21.2, ``OFTRotationModule`` and ``BOFTLayer``.

Memory: some copies of the rotations; see :func:`~streammerge.adapters.onto_base.workings.working_numel`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.adapters.onto_base.workings import Working
from streammerge.lazily import torch

if TYPE_CHECKING:
    from torch import Tensor


def make_rotations(triangles: Tensor, working: Working) -> Tensor:
    """Return OFT's rotations, ``[n * b, b]``, for blocks of rows to be multiplied by.

    Args:
        triangles: ``[n, b (b - 1) / 2]``, the entries above the diagonals, row by row.
        working: Says how; see :class:`~streammerge.adapters.onto_base.workings.Op`.
    """
    terms, bound, turned = working.numbers
    size = working.columns
    skew = torch.zeros(triangles.shape[0], size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[:, rows, columns] = triangles.double()
    skew = skew - skew.transpose(1, 2)
    if bound >= 0:
        skew = _constrained(skew, bound)
    rotations = _neumann(skew, int(terms)) if terms else _cayley(skew)
    if turned:
        rotations = rotations.transpose(1, 2)
    return rotations.reshape(-1, size).to(triangles.dtype)


def make_butterfly(matrices: Tensor) -> Tensor:
    """Return BOFT's rotations as fewer and larger ones, ``[n * b, b]``, transposed.

    Every factor but the first is crossed over inside larger blocks: the product of all is a diagonal
    of the largest.

    Args:
        matrices: ``[factors, blocks, b, b]``.
    """
    factors, blocks, size, _ = matrices.shape
    wide = matrices.double()
    rotations = _cayley((wide - wide.transpose(2, 3)).reshape(-1, size, size) / 2)
    rotations = rotations.view(factors, blocks, size, size)
    span = size * 2 ** (factors - 1)
    product = torch.eye(span, dtype=torch.float64).repeat(blocks * size // span, 1, 1)
    for index in range(factors):
        order = _crossing(size * 2**index, size // 2) if factors > 1 else torch.arange(size)
        # Of the inner span, repeated along the outer one.
        starts = torch.arange(0, span, order.numel())
        places = (starts[:, None] + order).reshape(-1)
        diagonal = torch.zeros(blocks * size // span, span, span, dtype=torch.float64)
        for place in range(span // size):
            inside = slice(place * size, (place + 1) * size)
            diagonal[:, inside, inside] = rotations[index, place :: span // size]
        # P @ D @ P.T, where row i of P has its one at places[i].
        product = diagonal[:, places][:, :, places] @ product
    return product.transpose(1, 2).reshape(-1, span).to(matrices.dtype)


def _cayley(skew: Tensor) -> Tensor:
    """Return ``(I - S) @ inv(I + S)`` of skew-symmetric matrices ``[n, b, b]``."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew)
    made: Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    return made


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """Return the same by the first terms of a series, as PEFT sums them: ``I + 2 S + 2 S^2 + ...``."""
    made = torch.eye(skew.shape[-1], dtype=skew.dtype).repeat(skew.shape[0], 1, 1)
    if terms <= 1:
        return made
    made.add_(skew, alpha=2.0)
    if terms > 2:
        power = torch.bmm(skew, skew)
        made.add_(power, alpha=2.0)
        for _ in range(3, terms - 1):
            power = torch.bmm(power, skew)
            made.add_(power, alpha=2.0)
        # The last one counts once.
        made.add_(torch.bmm(power, skew))
    return made


def _constrained(skew: Tensor, bound: float) -> Tensor:
    """Return matrices whose norms are at most the bound over the root of their number (COFT)."""
    limit = bound / skew.shape[0] ** 0.5
    norms = torch.linalg.norm(skew, dim=(1, 2), keepdim=True)
    return torch.where(norms <= limit, skew, limit * skew / norms.clamp_min(limit))


def _crossing(span: int, half: int) -> Tensor:
    """Return the order in which pieces of a span change places: even ones first, then odd ones."""
    pieces = torch.arange(span).view(-1, half)
    return torch.cat([pieces[0::2], pieces[1::2]]).reshape(-1)
