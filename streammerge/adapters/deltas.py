"""The changes that adapters make, computed block by block of a flattened tensor.

A product ``B @ A`` is never formed whole. A block asks for the rows it touches, and always gets
them from the same multiplication, whatever else is in memory: its shape depends on the tensor and
the block alone. At least :data:`LEAST_ROWS` rows are multiplied at once, since libraries compute
a single row in another order of addition than the same row of a matrix.

Follows: peft 0.21.2, ``get_delta_weight`` of each layer and the merges of its variants.

Memory: the factors, which the caller holds; :data:`WORK_NUMEL` elements per thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from streammerge.adapters.changes import WHOLE_NORM_NUMEL, Change, ChangeKind
from streammerge.lazily import torch
from streammerge.reductions import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

LEAST_ROWS = 16
"""Rows multiplied at once, if the matrix has so many. Measured with MKL: from 8 rows on, a part of
a product has the bits of the whole."""
_WIDE = 2 * BLOCK // LEAST_ROWS
"""Columns beyond which so many rows are multiplied a part of their columns at a time."""
_WIDE_STEP = BLOCK // LEAST_ROWS
"""Columns of such a part."""
WORK_NUMEL = 2 * BLOCK
"""Elements of a workspace: a block of rows that are not too wide, with a part of a row at each end."""


class Delta:
    """One change of one tensor, with its factors in memory."""

    def __init__(
        self, change: Change, factors: Sequence[Tensor], norms: Tensor | None = None
    ) -> None:
        """Prepare to compute.

        Args:
            change: What is done.
            factors: Its tensors, whole, in the compute dtype and in the shapes that are stored.
            norms: For DoRA, what :meth:`norms` returned.
        """
        self._change = change
        self._factors = factors
        self._rows, self._columns = change.matrix
        self._vector = factors[-1].reshape(-1)
        if norms is not None:
            self._vector = self._vector / norms
        order = sorted(range(len(change.indices)), key=change.indices.__getitem__)
        self._tokens = [(change.indices[index], index) for index in order]

    def forget(self) -> None:
        """Let go of the factors, so that their memory is free whoever still refers to this."""
        self._factors = ()
        self._vector = self._vector.new_empty(0)

    @property
    def is_sum(self) -> bool:
        """Whether :meth:`fill` gives the change, whatever the base's values are."""
        return self._change.is_sum

    def fill(self, out: Tensor, begin: int, work: Tensor, dtype: torch.dtype | None = None) -> None:
        """Write what is added to the base, from flat index ``begin`` on.

        Args:
            out: ``[m]`` in the compute dtype; at most a block.
            begin: Flat index of its first element.
            work: ``[WORK_NUMEL]`` in the compute dtype.
            dtype: The base's type, to round products to where PEFT does; None rounds none.
        """
        if self._change.kind is ChangeKind.ADDED:
            torch.mul(self._vector[begin : begin + out.numel()], self._change.scaling, out=out)
            return
        for part, expert, start in self._by_matrix(out, begin):
            self._fill_matrix(part, expert, start, work)
        out.mul_(self._change.scaling)
        if dtype is not None and self._change.rounds_product:
            out.copy_(out.to(dtype))

    def apply_(
        self,
        weights: Tensor,
        begin: int,
        work: Tensor,
        delta: Tensor,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Change weights in place.

        Args:
            weights: ``[m]`` of the tensor in the compute dtype; at most a block.
            begin: Flat index of the first.
            work: ``[WORK_NUMEL]``, scratch.
            delta: ``[>= m]``, scratch.
            dtype: As for :meth:`fill`.
        """
        match self._change.kind:
            case ChangeKind.ROWS:
                self._replace_rows(weights, begin)
            case ChangeKind.SCALED:
                self._scale(weights, begin)
            case kind:
                part = delta[: weights.numel()]
                self.fill(part, begin, work, dtype)
                weights.add_(part)
                if kind is ChangeKind.NORMED:
                    self._scale(weights, begin)

    def norms(self, read_rows: Callable[[int, int], Tensor], work: Tensor) -> Tensor:
        """Return the norms that DoRA divides by: of every row of ``W + scaling * B @ A``, or column.

        With torch's bits, for columns only up to :data:`WHOLE_NORM_NUMEL` elements; beyond, columns
        are summed in float64, in the order of rows, which torch, that adds in float32, may differ
        from in the last bit.

        Args:
            read_rows: Returns rows of W from one index to another, in the compute dtype.
            work: ``[WORK_NUMEL]``, scratch.
        """
        whole = not self._change.along_rows and self._rows * self._columns <= WHOLE_NORM_NUMEL
        found = []
        squares = torch.zeros(self._columns, dtype=torch.float64)
        step = max(1, BLOCK // self._columns)
        for begin in range(0, self._rows, step):
            end = min(begin + step, self._rows)
            weights = read_rows(begin, end).view(end - begin, self._columns)
            for row, first in _split(weights.numel(), BLOCK):
                part = weights.view(-1)[row : row + first]
                delta = torch.empty_like(part)
                self.fill(delta, begin * self._columns + row, work)
                part.add_(delta)
            if self._change.along_rows:
                found.append(torch.linalg.norm(weights, dim=1))
            elif whole:
                found.append(weights)
            else:
                squares += weights.double().square().sum(dim=0)
        if whole:
            norms: Tensor = torch.linalg.norm(torch.cat(found).T, dim=1)
            return norms
        return torch.cat(found) if self._change.along_rows else squares.sqrt().to(work.dtype)

    def _by_matrix(self, flat: Tensor, begin: int) -> Iterator[tuple[Tensor, int, int]]:
        """Cut a flat range of a stack at the matrices' ends: part, expert, start in the matrix."""
        numel = self._rows * self._columns
        done = 0
        while done < flat.numel():
            expert, start = divmod(begin + done, numel)
            count = min(flat.numel() - done, numel - start)
            yield flat[done : done + count], self._change.expert or expert, start
            done += count

    def _left(self, expert: int) -> Tensor:
        """Return the product's left factor, ``[rows, r]``."""
        change = self._change
        down, up = self._factors[0], self._factors[1]
        if change.transposed:
            # The product's transpose: A' @ B'.
            left = down.reshape(change.experts, change.rank, -1)[expert].T
            return left[change.first_row : change.first_row + self._rows]
        rows = up.reshape(up.shape[0], change.rank, change.experts)[:, :, expert]
        return rows[change.first_row : change.first_row + self._rows]

    def _right(self, expert: int) -> Tensor:
        """Return the product's right factor, ``[r, columns]``."""
        change = self._change
        down, up = self._factors[0], self._factors[1]
        if change.transposed:
            return up.reshape(up.shape[0], change.rank, change.experts)[:, :, expert].T
        return down.reshape(change.experts, change.rank, -1)[expert]

    def _fill_matrix(self, out: Tensor, expert: int, start: int, work: Tensor) -> None:
        """Write the product of one matrix, from flat index ``start`` of it on."""
        left, right, columns = self._left(expert), self._right(expert), self._columns
        first, last = start // columns, -(-(start + out.numel()) // columns)
        if start % columns == 0 and out.numel() % columns == 0 and last - first >= LEAST_ROWS:
            torch.mm(left[first:last], right, out=out.view(-1, columns))
            return
        if columns > _WIDE:
            for part, row, column in _by_rows(out, start, columns):
                wide = right[:, column : column + part.shape[1]]
                self._fill_wide(part, left, wide, row, work)
            return
        begin, end = self._window(first, last)
        window = work[: (end - begin) * columns]
        torch.mm(left[begin:end], right, out=window.view(-1, columns))
        skipped = start - begin * columns
        out.copy_(window[skipped : skipped + out.numel()])

    def _fill_wide(self, part: Tensor, left: Tensor, right: Tensor, row: int, work: Tensor) -> None:
        """Write rows that are too wide to multiply many of them whole."""
        for index in range(part.shape[0]):
            begin, end = self._window(row + index, row + index + 1)
            for offset, count in _split(part.shape[1], _WIDE_STEP):
                window = work[: (end - begin) * count].view(-1, count)
                torch.mm(left[begin:end], right[:, offset : offset + count], out=window)
                part[index, offset : offset + count] = window[row + index - begin]

    def _window(self, first: int, last: int) -> tuple[int, int]:
        """Widen a range of rows to what is multiplied at once."""
        end = min(self._rows, max(last, first + LEAST_ROWS))
        return max(0, min(first, end - LEAST_ROWS)), end

    def _scale(self, weights: Tensor, begin: int) -> None:
        """Multiply rows or columns by the vector."""
        vector = self._vector
        if not self._change.along_rows:
            # A convolution has as many columns per input channel as its kernel has elements.
            vector = vector.repeat_interleave(self._columns // vector.numel())
        for part, row, column in _by_rows(weights, begin, self._columns):
            if self._change.along_rows:
                part.mul_(vector[row : row + part.shape[0], None])
            else:
                part.mul_(vector[column : column + part.shape[1]])

    def _replace_rows(self, weights: Tensor, begin: int) -> None:
        columns = self._columns
        end = begin + weights.numel()
        rows = self._factors[0].reshape(-1, columns)
        position = bisect_left(self._tokens, (begin // columns, -1))
        while position < len(self._tokens) and self._tokens[position][0] * columns < end:
            row, index = self._tokens[position]
            low, high = max(begin, row * columns), min(end, (row + 1) * columns)
            weights[low - begin : high - begin] = rows[index, low - row * columns :][: high - low]
            position += 1


def _by_rows(flat: Tensor, begin: int, columns: int) -> Iterator[tuple[Tensor, int, int]]:
    """Cut a flat range into matrices: parts ``[n, c]``, each with its first row and column."""
    done = 0
    while done < flat.numel():
        row, column = divmod(begin + done, columns)
        left = flat.numel() - done
        count = left // columns * columns if column == 0 and left >= columns else 0
        width = columns
        if not count:
            # The rest of a row that began earlier, or the beginning of one that ends later.
            count = width = min(columns - column, left)
        yield flat[done : done + count].view(-1, width), row, column
        done += count


def _split(numel: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield begin and length of the parts of a range."""
    for begin in range(0, numel, step):
        yield begin, min(step, numel - begin)
