"""The stage between loader and writer: merges and measures pieces of tensors that lie in memory.

A stage gets host memory and fills host memory; what lies between is its own affair.

    compiled/      compiled kernels, which go from the slots to the output slot in one sweep
    plain.py       the operations of torch, for what kernels do not take
    accelerator/   another device's memory, by way of copies
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from streammerge.engine.pieces import PieceInMemory, Stored
from streammerge.methods.base import MagnitudeTopK
from streammerge.reductions.magnitude import Counted, Question
from streammerge.reductions.topk import TopK


@dataclass(frozen=True, slots=True)
class Applied:
    """What merging one part of a piece came to."""

    not_finite: int
    """Input values that were NaN or infinite; always 0 unless the recipe keeps them."""
    kept: tuple[int, ...]
    """Entries of the part kept per source; empty where the statistics of the tensor tell, and for
    methods that neither trim nor drop."""


class DeviceStage(Protocol):
    """What a device must be able to do. One per worker thread; never called concurrently."""

    def apply(
        self, piece: PieceInMemory, tops: Sequence[tuple[TopK, ...]], out: Stored
    ) -> list[Applied]:
        """Merge a piece into ``out``, ``[numel]`` in the output dtype.

        Args:
            piece: The inputs.
            tops: For each part of the piece, one statistic per source; empty tuples when the
                method needs none.
            out: Receives the result.

        Returns:
            What the manifest records, for each part.

        Raises:
            NonFiniteError: An input or the result is not finite and the recipe forbids it.
        """
        ...

    def convert(self, piece: PieceInMemory, out: Stored) -> Applied:
        """Store the values of a piece's only input in the type of ``out``.

        Raises:
            NonFiniteError: A value does not fit the type, or is not finite and the recipe forbids it.
        """
        ...

    def measure(
        self, piece: PieceInMemory, questions: Sequence[Question | None]
    ) -> list[list[Counted | None]]:
        """Answer every source's question for each block of a piece of one part.

        Returns:
            ``[blocks][sources]``.
        """
        ...

    def select(self, piece: PieceInMemory, need: MagnitudeTopK) -> list[tuple[TopK, ...]]:
        """Return the statistics of whole tensors that fill at most a block: parts, then sources."""
        ...

    def sample(self, piece: PieceInMemory, start: int, out: NDArray[Any]) -> None:
        """Fill ``out``, ``[n_sources, run]``, with magnitudes from the tensor's ``start`` on."""
        ...
