"""The changes that adapters make, computed block by block of a flattened tensor.

A product ``B @ A`` is never formed whole. A block asks for the rows it touches. In float32 their bits depend
on nothing else (``products.py``). Torch's products, in float64 or where PEFT's bits are asked for, always come
from the same multiplication, whose shape depends on the tensor and the block alone, and of at least
:data:`~streammerge.adapters.onto_base.workings.LEAST_ROWS` rows: libraries compute a single row in another order
of addition than the same row of a matrix.

Follows: peft 0.21.2, ``get_delta_weight`` of each layer and the merges of its variants.

Memory: the factors, which the caller holds; :data:`WORK_NUMEL` elements per thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from streammerge.adapters.onto_base.changes import WHOLE_NORM_NUMEL, Change, ChangeKind
from streammerge.adapters.onto_base.kronecker import fill_kronecker
from streammerge.adapters.onto_base.norms import (
    column_norms,
    column_norms_of_torch,
    row_norms,
    row_norms_of_torch,
)
from streammerge.adapters.onto_base.products import Adder, Product, multiply
from streammerge.adapters.onto_base.rotations import rotate_
from streammerge.adapters.onto_base.rows import by_rows
from streammerge.adapters.onto_base.workings import LEAST_ROWS
from streammerge.lazily import torch
from streammerge.native.library import load_kernels
from streammerge.statistics import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

_WIDE = 2 * BLOCK // LEAST_ROWS
"""Columns beyond which so many rows are multiplied a part of their columns at a time."""
_WIDE_STEP = BLOCK // LEAST_ROWS
"""Columns of such a part."""
WORK_NUMEL = 2 * BLOCK
"""Elements of a workspace: a block of rows that are not too wide, with a part of a row at each end."""

Put = Callable[["Tensor", "Tensor"], object]
"""Writes the second to the first, or multiplies the first by it."""


class Delta:
    """One change of one tensor, with its factors in memory."""

    def __init__(
        self,
        change: Change,
        factors: Sequence[Tensor],
        norms: Tensor | None = None,
        read: Callable[[int, int], Tensor] | None = None,
        *,
        like_torch: bool = False,
    ) -> None:
        """Prepare to compute.

        Args:
            change: What is done.
            factors: Its tensors, whole, in the compute dtype and in the shapes that are stored; with
                workings those that were made, and DoRA's magnitude last.
            norms: For DoRA, what :meth:`norms` returned.
            read: For rotations, reads elements of the tensor that changes, in the compute dtype.
            like_torch: Whether products must have torch's bits, as PEFT's have.
        """
        self.depends_on_cut = like_torch or factors[0].dtype is not torch.float32
        """Whether an element's bits may depend on what is computed beside it, as in torch's products."""
        self._like_torch = like_torch
        self._change = change
        self._factors = factors
        self._read = read
        self._kind = change.sum_kind
        self._rows, self._columns = change.matrix
        self._vector = factors[-1].reshape(-1)
        if change.along_rows and change.window is not None:
            self._vector = self._vector[change.first_row : change.first_row + self._rows]
        if norms is not None:
            self._vector = self._vector / norms
        order = sorted(range(len(change.indices)), key=change.indices.__getitem__)
        self._tokens = [(change.indices[index], index) for index in order]

    def forget(self) -> None:
        """Let go of the factors, so that their memory is free whoever still refers to this."""
        self._factors = ()
        self._vector = self._vector.new_empty(0)

    def product(self) -> Product | None:
        """Return what it is made of, given its norms if it has any.

        None of what is more than a product of float32 factors, with or without norms.
        """
        change = self._change
        if not change.adds_product or self.depends_on_cut:
            return None
        ups, downs = self._lefts(0).numpy(), self._rights(0).numpy()
        own, columns = change.expert or 0, change.matrix[1]
        # All columns in one tile.
        others = columns, max(columns, 1), change.scaling, change.product_kind
        if change.is_placed:
            if change.expert is not None:
                ups, downs = ups[own : own + 1], downs[own : own + 1]
            return Product(ups, downs, *others, window=change.window)
        vector = self._vector.numpy() if change.kind is ChangeKind.NORMED else None
        return Product(ups[own], downs[own], *others, vector)

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
        inside, start = self._clip(out, begin)
        if inside.numel() < out.numel():
            out.zero_()
        if inside.numel():
            self._fill(inside, start, work, dtype)

    def _clip(self, flat: Tensor, begin: int) -> tuple[Tensor, int]:
        """Return what of a flat range lies in the window, and where in the window it begins."""
        if self._change.window is None:
            return flat, begin
        low, high = self._change.window
        first = min(max(low - begin, 0), flat.numel())
        last = max(first, min(high - begin, flat.numel()))
        return flat[first:last], begin + first - low

    def _fill(self, out: Tensor, begin: int, work: Tensor, dtype: torch.dtype | None) -> None:
        """Write what is added, from flat index ``begin`` of the window on."""
        above = self._change.first_row * self._columns
        match self._kind:
            case ChangeKind.ADDED:
                vector = self._factors[0].reshape(-1)[above + begin :]
                torch.mul(vector[: out.numel()], self._change.scaling, out=out)
                return
            case ChangeKind.KRONECKER:
                fill_kronecker(out, above + begin, self._factors[0], self._factors[1], work)
            case _:
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
        *,
        block: range | None = None,
    ) -> None:
        """Change weights in place.

        Args:
            weights: ``[m]`` of the tensor in the compute dtype; at most a block.
            begin: Flat index of the first.
            work: ``[WORK_NUMEL]``, scratch.
            delta: ``[>= m]``, or that of the block, scratch.
            dtype: As for :meth:`fill`.
            block: The flat range whose products are computed, of which the weights may be a part;
                None for that of the weights.
        """
        if block is None or not self.depends_on_cut:
            block = range(begin, begin + weights.numel())
        products, first = self._clip(delta[: len(block)], block.start)
        weights, begin = self._clip(weights, begin)
        if not weights.numel():
            return
        match self._change.kind:
            case ChangeKind.ROWS:
                self._replace_rows(weights, begin)
            case ChangeKind.SCALED:
                self._scale(weights, begin)
            case ChangeKind.ROTATED:
                assert self._read is not None  # noqa: S101 - whoever applies a rotation gives it
                rotate_(weights, begin, self._factors[0], self._columns, (work, delta, self._read))
                if len(self._factors) > 1:
                    self._scale(weights, begin)
            case kind:
                self._fill(products, first, work, dtype)
                weights.add_(products[begin - first :][: weights.numel()])
                if kind is ChangeKind.NORMED:
                    self._scale(weights, begin)

    def norms(self, read_rows: Callable[[int, int], Tensor], work: Tensor) -> Tensor:
        """Return the norms that DoRA divides by: of every row of ``W + scaling * B @ A``, or column.

        The bits are the same on every processor, unless they must be torch's; and those are for columns
        only up to :data:`WHOLE_NORM_NUMEL` elements.

        Args:
            read_rows: Returns rows of W from one index to another, in the compute dtype.
            work: ``[WORK_NUMEL]``, scratch.
        """
        blocks = self._iter_added(read_rows, work)
        if self._change.along_rows:
            if self._like_torch:
                return row_norms_of_torch(blocks)
            return row_norms(blocks, work.dtype)
        count, columns = self._vector.numel(), self._columns
        # Beyond linear layers, an input has as many columns as its kernel has elements.
        if self._like_torch and count == columns and self._rows * columns <= WHOLE_NORM_NUMEL:
            return column_norms_of_torch(blocks)
        return column_norms(blocks, columns, count, work.dtype)

    def _iter_added(
        self, read_rows: Callable[[int, int], Tensor], work: Tensor
    ) -> Iterator[Tensor]:
        """Yield rows of ``W + scaling * B @ A``, ``[n, columns]``, about a block at a time."""
        add = self._adds(work)
        step = max(1, BLOCK // self._columns)
        for begin in range(0, self._rows, step):
            end = min(begin + step, self._rows)
            weights = read_rows(begin, end)
            add(weights, begin * self._columns)
            yield weights.view(end - begin, self._columns)

    def _adds(self, work: Tensor) -> Callable[[Tensor, int], None]:
        """Return what adds the change to elements of the tensor from a flat index on."""
        product = self.product() if self._change.adds_plain_product else None
        kernels = load_kernels()
        if product is not None and kernels is not None:
            adder = Adder(product, kernels)
            return lambda weights, begin: adder.add_to(weights.numpy(), begin)
        delta = work.new_empty(min(BLOCK, self._rows * self._columns))

        def add(weights: Tensor, begin: int) -> None:
            for first, count in _split(weights.numel(), BLOCK):
                part = delta[:count]
                self._fill(part, begin + first, work, None)
                weights[first : first + count].add_(part)

        return add

    def _by_matrix(self, flat: Tensor, begin: int) -> Iterator[tuple[Tensor, int, int]]:
        """Cut a flat range of a stack at the matrices' ends: part, expert, start in the matrix."""
        numel = self._rows * self._columns
        done = 0
        while done < flat.numel():
            expert, start = divmod(begin + done, numel)
            count = min(flat.numel() - done, numel - start)
            yield flat[done : done + count], self._change.expert or expert, start
            done += count

    def _lefts(self, pair: int) -> Tensor:
        """Return the left factors of a product, ``[experts, rows, r]``."""
        change = self._change
        down, up = self._factors[2 * pair], self._factors[2 * pair + 1]
        rank = down.shape[0] // change.experts
        if change.transposed:
            # The product's transpose: A' @ B'.
            lefts = down.reshape(change.experts, rank, -1).transpose(1, 2)
        else:
            lefts = up.reshape(up.shape[0], rank, change.experts).permute(2, 0, 1)
        return lefts[:, change.first_row : change.first_row + self._rows]

    def _rights(self, pair: int) -> Tensor:
        """Return the right factors of a product, ``[experts, r, columns]``."""
        change = self._change
        down, up = self._factors[2 * pair], self._factors[2 * pair + 1]
        rank = down.shape[0] // change.experts
        if change.transposed:
            return up.reshape(up.shape[0], rank, change.experts).permute(2, 1, 0)
        return down.reshape(change.experts, rank, -1)

    def _fill_matrix(self, out: Tensor, expert: int, start: int, work: Tensor) -> None:
        """Write one matrix of a stack, from flat index ``start`` of it on."""
        first = self._lefts(0)[expert], self._rights(0)[expert]
        self._put_product(torch.Tensor.copy_, out, first, start, work)
        if self._kind is ChangeKind.HADAMARD:
            second = self._lefts(1)[expert], self._rights(1)[expert]
            self._put_product(torch.Tensor.mul_, out, second, start, work)

    def _put_product(
        self, put: Put, out: Tensor, factors: tuple[Tensor, Tensor], start: int, work: Tensor
    ) -> None:
        """Write a product, or multiply by it, from flat index ``start`` of it on."""
        columns = self._columns
        left, right = factors
        if not self.depends_on_cut:
            for part, row, column in by_rows(out, start, columns):
                rows, width = part.shape
                whole = (
                    part if put is torch.Tensor.copy_ else work[: part.numel()].view(rows, width)
                )
                multiply(left[row : row + rows], right[:, column : column + width], whole)
                if whole is not part:
                    put(part, whole)
            return
        first, last = start // columns, -(-(start + out.numel()) // columns)
        if start % columns == 0 and out.numel() % columns == 0 and last - first >= LEAST_ROWS:
            whole = out if put is torch.Tensor.copy_ else work[: out.numel()]
            torch.mm(left[first:last], right, out=whole.view(-1, columns))
            if whole is not out:
                put(out, whole)
            return
        if columns > _WIDE:
            for part, row, column in by_rows(out, start, columns):
                wide = right[:, column : column + part.shape[1]]
                self._put_wide(put, part, (left, wide), row, work)
            return
        begin, end = self._window(first, last)
        window = work[: (end - begin) * columns]
        torch.mm(left[begin:end], right, out=window.view(-1, columns))
        skipped = start - begin * columns
        put(out, window[skipped : skipped + out.numel()])

    def _put_wide(
        self, put: Put, part: Tensor, factors: tuple[Tensor, Tensor], row: int, work: Tensor
    ) -> None:
        """Do the same for rows that are too wide to multiply many of them whole."""
        left, right = factors
        for index in range(part.shape[0]):
            begin, end = self._window(row + index, row + index + 1)
            for offset, count in _split(part.shape[1], _WIDE_STEP):
                window = work[: (end - begin) * count].view(-1, count)
                torch.mm(left[begin:end], right[:, offset : offset + count], out=window)
                put(part[index, offset : offset + count], window[row + index - begin])

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
        for part, row, column in by_rows(weights, begin, self._columns):
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


def _split(numel: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield begin and length of the parts of a range."""
    for begin in range(0, numel, step):
        yield begin, min(step, numel - begin)
