"""The stage between loader and writer: merges and measures pieces of tensors that lie in memory.

A stage gets host memory and fills host memory; what lies between is its own affair.

    compiled/      compiled kernels, which go from the slots to the output slot in one sweep
    plain.py       the operations of torch, for what kernels do not take
    accelerator/   another device's memory, by way of copies
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from streammerge.engine.asking import Asking, BlockAnswer
from streammerge.engine.pieces import PieceInMemory, Stored
from streammerge.statistics.magnitude import SampleRun
from streammerge.statistics.rounds import Found
from streammerge.statistics.surveying import Surveyed


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

    def apply(self, piece: PieceInMemory, found: Sequence[Found], out: Stored) -> list[Applied]:
        """Merge a piece into ``out``, ``[numel]`` in the output dtype.

        Args:
            piece: The inputs.
            found: What is known of each part of the piece.
            out: Receives the result.

        Returns:
            What the manifest records, for each part.

        Raises:
            NonFiniteError: An input or the result is not finite and the recipe forbids it.
        """
        ...

    def survey(self, piece: PieceInMemory, found: Sequence[Found], out: Stored) -> list[Surveyed]:
        """Return what a report knows of a piece that was merged, for each of its parts.

        Args:
            piece: The inputs.
            found: What it was merged with.
            out: The result, ``[numel]``.
        """
        ...

    def convert(self, piece: PieceInMemory, out: Stored) -> Applied:
        """Store the values of a piece's only input in the type of ``out``.

        Raises:
            NonFiniteError: A value does not fit the type, or is not finite and the recipe forbids it.
        """
        ...

    def measure(self, piece: PieceInMemory, asking: Asking) -> Iterable[BlockAnswer]:
        """Answer what is asked, for each block of a piece of one part; each when it is asked for.

        An answer may hold all values of its block.
        """
        ...

    def gather(self, piece: PieceInMemory, out: NDArray[Any]) -> None:
        """Fill ``out``, ``[sources, numel]`` in the compute dtype, with the vectors of a piece."""
        ...

    def settle(self, piece: PieceInMemory) -> list[Found]:
        """Return all that the method asks about whole tensors that fill at most a block, each."""
        ...

    def sample(
        self, piece: PieceInMemory, runs: Sequence[SampleRun], asking: Asking, out: NDArray[Any]
    ) -> None:
        """Fill ``out``, ``[ranked, sum of runs]``, with values to be ranked of some runs of elements."""
        ...
