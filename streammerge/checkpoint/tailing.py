"""Journals that others write, read while they grow: what is durable since the last look.

Memory: a place in each file, a byte per block of the output, a line at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from streammerge.checkpoint.attempts import is_attempt_of
from streammerge.checkpoint.digests import LEAF_ELEMENTS
from streammerge.checkpoint.journal import PieceDone, parse_line
from streammerge.checkpoint.ownfiles import open_own


class JournalTail:
    """Reads the journals of all attempts at parts of one merge, again and again."""

    def __init__(self, partial: Path, epoch: str, numels: Sequence[int]) -> None:
        """Begin with nothing.

        Args:
            partial: Where they are.
            epoch: Of the merge.
            numels: Elements of each tensor of the output.
        """
        self._partial = partial
        self._epoch = epoch
        self._places: dict[str, int] = {}
        # A piece begins where a block does; a tensor without elements has one all the same.
        blocks = np.array(numels, dtype=np.int64) // LEAF_ELEMENTS + 1
        self._first = np.concatenate([[0], np.cumsum(blocks)])
        self._seen = bytearray(int(self._first[-1]))

    def read_new(self) -> Iterator[PieceDone]:
        """Yield pieces that have become durable since the last call; each place of a tensor once."""
        for name in os.listdir(self._partial):  # noqa: PTH208 - names are all that is looked at
            if not is_attempt_of(name, self._epoch):
                continue
            for line in self._iter_lines(name):
                piece = parse_line(line)
                if isinstance(piece, PieceDone) and self._is_new(piece):
                    yield piece

    def _is_new(self, piece: PieceDone) -> bool:
        """Return whether a place was not seen before; what no tensor has is for others to refuse."""
        if not 0 <= piece.task < len(self._first) - 1:
            return False
        block = int(self._first[piece.task]) + piece.start // LEAF_ELEMENTS
        if block >= self._first[piece.task + 1] or self._seen[block]:
            return False
        self._seen[block] = 1
        return True

    def _iter_lines(self, name: str) -> Iterator[bytes]:
        """Yield the whole lines that a journal has gained."""
        try:
            descriptor = open_own(self._partial / name, os.O_RDONLY)
        except FileNotFoundError:
            return
        with os.fdopen(descriptor, "rb") as stream:
            place = self._places.get(name, 0)
            stream.seek(place)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                place += len(line)
                self._places[name] = place
                yield line[:-1]
