"""Factors that a change is computed from, made of the stored ones; see :mod:`.workings`.

What is multiplied out whole is multiplied as the programs do that wrote the files, so that it has
their bits. What the base takes part in is summed in float64 and rounded once.

Memory: what :func:`~streammerge.adapters.onto_base.workings.working_numel` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from streammerge.adapters.onto_base.cayley import make_butterfly, make_rotations
from streammerge.adapters.onto_base.workings import Op, Working
from streammerge.lazily import torch
from streammerge.statistics import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

ReadRows = Callable[[int, int], "Tensor"]
"""Returns rows of the tensor that changes from one index to another, ``[n * columns]``."""


def make_working(working: Working, stored: Sequence[Tensor], read_rows: ReadRows) -> Tensor:
    """Return a factor, ``[rows, columns]`` in the compute dtype.

    Args:
        working: How it is made.
        stored: The change's stored tensors, in the compute dtype and in the shapes that are stored.
        read_rows: Reads the tensor that changes, in the compute dtype.
    """
    parts = [stored[index] for index in working.parts]
    made: Tensor
    match working.op:
        case Op.STORED | Op.TURNED:
            made = view_stored(working, stored)
        case Op.PRODUCT:
            made = parts[0] @ parts[1].reshape(parts[1].shape[0], -1)
        case Op.CORE:
            made = _core(parts[0], parts[1])
        case Op.CORE_PRODUCT:
            made = parts[2].T @ _core(parts[0], parts[1])
        case Op.UNDER:
            made = _under(working, parts[0], parts[1])
        case Op.BASE_PRODUCT:
            made = _base_product(working, parts[0], parts[1], read_rows)
        case Op.INTERLEAVED:
            size = int(working.numbers[0])
            pairs = parts[0].reshape(-1, size // 2, 2, working.columns)
            made = pairs.transpose(1, 2).reshape(working.rows, working.columns)
        case Op.WEIGHTED:
            made = parts[0].reshape(-1, 1) * parts[1][: working.rows, : working.columns]
        case Op.MIXED | Op.MIXED_TURNED:
            made = _mixed(working, parts)
        case Op.UNIT:
            made = _unit_vectors(parts[0].double(), working).T.to(parts[0].dtype).contiguous()
        case Op.REFLECTED:
            made = _reflected(working, parts[0], read_rows)
        case Op.ROTATIONS:
            made = make_rotations(parts[0], working)
        case Op.BUTTERFLY:
            made = make_butterfly(parts[0])
    return made


def view_stored(working: Working, stored: Sequence[Tensor]) -> Tensor:
    """Return a factor that takes no memory of its own."""
    part = stored[working.parts[0]]
    if working.op is Op.TURNED:
        return part.reshape(working.columns, working.rows).T
    return part.reshape(working.rows, working.columns)


def _core(tucker: Tensor, down: Tensor) -> Tensor:
    """Return ``sum_j t[i, j, ...] b[j, r]`` as ``[i, r * ...]``."""
    outer, inner = tucker.shape[:2]
    turned = tucker.reshape(outer, inner, -1).transpose(1, 2).reshape(-1, inner)
    product = turned @ down.reshape(inner, -1)
    return product.reshape(outer, -1, product.shape[1]).transpose(1, 2).reshape(outer, -1)


def _under(working: Working, a2: Tensor, b2: Tensor) -> Tensor:
    rank = b2.shape[0]
    kernel = working.rows // rank - 1
    channels = a2.reshape(rank, -1)
    made = channels.new_zeros(working.rows, working.columns)
    # Row (k, r) holds a2[r] for the element k of the kernel and nothing for the others.
    for element in range(kernel):
        made[element * rank : (element + 1) * rank, element::kernel] = channels
    made[kernel * rank :] = b2.reshape(rank, -1)
    return made


def _mixed(working: Working, parts: Sequence[Tensor]) -> Tensor:
    """Return rows of a bank mixed as VB-LoRA does."""
    bank = parts[-1]
    count = int(working.numbers[0])
    if len(parts) == 2:
        logits, chosen = parts[0].topk(count, dim=-1)
        weights = torch.softmax(logits, dim=-1)
    else:
        chosen = parts[0].long()
        last = 1 - parts[1].sum(dim=-1, keepdim=True)
        weights = torch.cat([parts[1], last], dim=-1)
    mixed = (weights.unsqueeze(-1) * bank[chosen]).sum(dim=-2)
    if working.op is Op.MIXED_TURNED:
        mixed = mixed.transpose(1, 2)
    return mixed.reshape(working.rows, working.columns)


def _unit_vectors(vectors: Tensor, working: Working) -> Tensor:
    """Return the columns with norm 1; made orthogonal to those before where the number says so."""
    if not working.numbers[0]:
        made: Tensor = vectors / torch.linalg.norm(vectors, dim=0)
        return made
    units: list[Tensor] = []
    for column in vectors.T:
        rest = column
        for unit in units:
            rest = rest - (unit @ rest) * unit
        units.append(rest / torch.linalg.norm(rest))
    return torch.stack(units, dim=1)


def _reflected(working: Working, vectors: Tensor, read_rows: ReadRows) -> Tensor:
    """Return L of ``W @ (I - 2 u1 u1.T) @ (I - 2 u2 u2.T) ... = W + L @ U.T``.

    With T upper triangular, the product of the reflections is ``I - U @ T @ U.T``: one more
    reflection by u adds the column ``-2 T U.T u`` and the diagonal entry 2 (the compact WY form,
    Schreiber and Van Loan 1989).
    """
    units = _unit_vectors(vectors.double(), working)
    count = units.shape[1]
    triangle = 2 * torch.eye(count, dtype=torch.float64)
    if not working.numbers[0]:
        for index in range(1, count):
            before = units[:, :index].T @ units[:, index]
            triangle[:index, index] = -2 * (triangle[:index, :index] @ before)
    right = -(units @ triangle)
    made = vectors.new_empty(working.rows, count)
    step = max(1, BLOCK // units.shape[0])
    for begin in range(0, working.rows, step):
        end = min(begin + step, working.rows)
        weights = read_rows(begin, end).view(end - begin, -1).double()
        made[begin:end] = weights @ right
    return made


def _base_product(working: Working, a1: Tensor, b1: Tensor, read_rows: ReadRows) -> Tensor:
    rank = b1.shape[1]
    kernel = working.columns // rank - 1
    right = a1.reshape(a1.shape[0], rank).double()
    made = right.new_empty(working.rows, working.columns)
    step = max(1, BLOCK // (right.shape[0] * kernel))
    for begin in range(0, working.rows, step):
        end = min(begin + step, working.rows)
        weights = read_rows(begin, end).view(end - begin, right.shape[0], kernel).double()
        product = weights.transpose(1, 2) @ right
        made[begin:end, : kernel * rank] = product.reshape(end - begin, -1)
    first = int(working.numbers[0])
    made[:, kernel * rank :] = b1.reshape(-1, rank)[first : first + working.rows]
    return made.to(b1.dtype)
