"""Bytes that lie in a file in runs of equal length and distance, as columns of a matrix do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Runs:
    """How bytes of a range lie in a file."""

    nbytes: int
    """Length of a run."""
    stride: int
    """Bytes of the file from the start of one run to the next."""

    def spans(self, begin: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
        """Yield where a part of the range lies.

        Args:
            begin: First byte of the part, in the range.
            nbytes: Its length.

        Yields:
            Byte in the file from that of the range's first one, begin and end in the part.
        """
        done = 0
        while done < nbytes:
            run, inside = divmod(begin + done, self.nbytes)
            count = min(self.nbytes - inside, nbytes - done)
            yield run * self.stride + inside, done, done + count
            done += count
