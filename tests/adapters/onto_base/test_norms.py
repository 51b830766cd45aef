"""DoRA's norms are added up in one order, with compiled kernels and without; PEFT's are torch's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from streammerge.adapters.onto_base import deltas, norms, products
from streammerge.adapters.onto_base.changes import Change, ChangeKind
from streammerge.adapters.onto_base.deltas import WORK_NUMEL, Delta
from streammerge.checkpoint.types import TensorEntry
from streammerge.dtypes import DType
from streammerge.statistics import BLOCK

SHAPES = [
    (5, 60_001),  # a block ends within a row
    (3, BLOCK + 1000),  # rows that are longer than a block
    (BLOCK + 1000, 1),
    (411, 777),  # several blocks, of columns that are no multiple of the running sums
    (2, 7),
]
RANK = 5


class Drawn:
    """A matrix, factors, and what is added to it by a DoRA of its rows or columns."""

    def __init__(self, shape: tuple[int, int], *, along_rows: bool, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        rows, columns = shape
        draw = lambda *size: torch.randn(*size, generator=generator, dtype=dtype)  # noqa: E731
        self.base = draw(rows, columns)
        self.down, self.up = draw(RANK, columns), draw(rows, RANK)
        count = rows if along_rows else columns
        sizes = ((RANK, columns), (rows, RANK), (count,))
        factors = tuple(TensorEntry("x", DType.F32, size, 0, 0) for size in sizes)
        self.change = Change(ChangeKind.NORMED, factors, shape, scaling=0.7, along_rows=along_rows)
        self.magnitude = torch.ones(count, dtype=dtype)

    def norms(self, *, like_torch: bool = False) -> Tensor:
        factors = [self.down, self.up, self.magnitude]
        delta = Delta(self.change, factors, like_torch=like_torch)
        work = torch.empty(WORK_NUMEL, dtype=self.base.dtype)
        return delta.norms(lambda begin, end: self.base[begin:end].flatten().clone(), work)


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (norms, products, deltas):
        monkeypatch.setattr(module, "load_kernels", lambda: None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("along_rows", [True, False])
def test_norms_have_the_same_bits_with_kernels_and_without(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch, *, along_rows: bool
) -> None:
    drawn = Drawn(shape, along_rows=along_rows, dtype=torch.float32)
    found = drawn.norms()
    without_kernels(monkeypatch)

    assert torch.equal(drawn.norms(), found)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("along_rows", [True, False])
def test_norms_in_float32_are_the_nearest_to_the_true_ones(
    shape: tuple[int, int], dtype: torch.dtype, *, along_rows: bool
) -> None:
    drawn = Drawn(shape, along_rows=along_rows, dtype=dtype)
    added = torch.empty(shape, dtype=dtype)
    if dtype is torch.float32:
        products.multiply_in_order(drawn.up, drawn.down, added)
        bound = 0.501
    else:
        torch.mm(drawn.up, drawn.down, out=added)
        # Sums of so many squares, of which each is off by a few units, depending on how torch adds.
        bound = 64
    changed = drawn.base + added.mul_(0.7)
    lines = changed if along_rows else changed.T
    exact = [math.sqrt(math.fsum(line.double().square().tolist())) for line in lines[:50]]

    found = drawn.norms()[:50].double()

    units = torch.from_numpy(np.spacing(found.to(dtype).numpy())).double()
    assert float(((found - torch.tensor(exact, dtype=torch.float64)).abs() / units).max()) <= bound


def test_squares_are_added_in_the_stated_order() -> None:
    """As if by hand, where other orders give other sums."""
    generator = torch.Generator().manual_seed(2)
    scales = 10.0 ** torch.randint(-8, 8, (9, 53), generator=generator)
    block = (torch.randn(9, 53, generator=generator) * scales).float()
    rows = []
    for row in block.double().tolist():
        sums = [0.0] * 16
        for index, value in enumerate(row):
            sums[index % 16] += value * value
        for half in (8, 4, 2, 1):
            sums = [sums[i] + sums[half + i] for i in range(half)]
        rows.append(sums[0])
    columns = [0.0] * 53
    for row in block.double().tolist():
        columns = [total + value * value for total, value in zip(columns, row, strict=True)]

    found = np.zeros(53)
    for part in block.split(4):
        norms.add_square_columns(part.contiguous(), found)

    assert norms.square_rows(block).tolist() == rows
    assert found.tolist() == columns


@pytest.mark.parametrize("along_rows", [True, False])
def test_what_follows_peft_has_the_norms_of_torch(*, along_rows: bool) -> None:
    drawn = Drawn((411, 777), along_rows=along_rows, dtype=torch.float32)
    step = BLOCK // 777
    parts = zip(drawn.base.split(step), drawn.up.split(step), strict=True)
    changed = torch.cat([base + (up @ drawn.down) * 0.7 for base, up in parts])

    found = drawn.norms(like_torch=True)

    assert torch.equal(found, torch.linalg.norm(changed if along_rows else changed.T, dim=1))


def test_a_convolution_has_a_norm_per_input() -> None:
    """Squares of a kernel's elements are added up as those of a row are."""
    block = torch.randn(6, 5 * 9, generator=torch.Generator().manual_seed(3))

    found = norms.column_norms([block[:4], block[4:]], 45, 5, torch.float32)

    exact = block.double().view(6, 5, 9).square().sum(dim=(0, 2)).sqrt()
    torch.testing.assert_close(found.double(), exact, rtol=6e-8, atol=0)
