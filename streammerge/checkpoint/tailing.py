"""Journals that others write, read while they grow: what is durable since the last look.

Memory: a place in each file, and the beginnings of all pieces that were seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from streammerge.checkpoint.attempts import is_attempt_of
from streammerge.checkpoint.journal import PieceDone, parse_line
from streammerge.checkpoint.ownfiles import open_own


class JournalTail:
    """Reads the journals of all attempts at parts of one merge, again and again."""

    def __init__(self, partial: Path, epoch: str) -> None:
        """Begin with nothing.

        Args:
            partial: Where they are.
            epoch: Of the merge.
        """
        self._partial = partial
        self._epoch = epoch
        self._places: dict[str, int] = {}
        self._seen: set[tuple[int, int]] = set()

    def read_new(self) -> Iterator[PieceDone]:
        """Yield pieces that have become durable since the last call; each place of a tensor once."""
        for name in os.listdir(self._partial):  # noqa: PTH208 - names are all that is looked at
            if not is_attempt_of(name, self._epoch):
                continue
            for line in self._read_lines(name):
                piece = parse_line(line)
                if isinstance(piece, PieceDone) and (piece.task, piece.start) not in self._seen:
                    self._seen.add((piece.task, piece.start))
                    yield piece

    def _read_lines(self, name: str) -> list[bytes]:
        """Return the whole lines that a journal has gained."""
        try:
            descriptor = open_own(self._partial / name, os.O_RDONLY)
        except FileNotFoundError:
            return []
        with os.fdopen(descriptor, "rb") as stream:
            stream.seek(self._places.get(name, 0))
            data = stream.read()
        end = data.rfind(b"\n") + 1
        self._places[name] = self._places.get(name, 0) + end
        return data[:end].splitlines()
