"""Files that several merges read at once: their pages are let go when the last one has read them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from streammerge.checkpoint.bytesource import ByteSource, OpenByteSource, Range
from streammerge.units import MIB

_GRAIN = 1 * MIB
"""Bytes that are let go together: eight bytes are kept for each."""


class SharedFiles:
    """What has been read of each file, and how often."""

    def __init__(self, files: Iterable[Iterable[Path]]) -> None:
        """Begin with the files that each of the merges reads."""
        self._readers = Counter(path for each in files for path in set(each))
        self._lock = threading.Lock()
        self._read: dict[Path, np.ndarray] = {}

    def opening(self, opener: OpenByteSource) -> OpenByteSource:
        """Return what opens files as ``opener`` does, for one of the merges."""

        def opened(path: Path) -> ByteSource:
            source = opener(path)
            if self._readers[path] > 1:
                source.share(lambda ranges: self._read_by_all(path, source, ranges))
            return source

        return opened

    def _read_by_all(self, path: Path, source: ByteSource, ranges: list[Range]) -> list[Range]:
        """Count what one merge has read, and return what all have read now."""
        with self._lock:
            if path not in self._read:
                grains = -(-source.fingerprint()[0] // _GRAIN)
                self._read[path] = np.zeros(grains, dtype=np.int64)
            read = self._read[path]
            full = self._readers[path] * _GRAIN
            done = []
            for begin, end in ranges:
                for grain in range(begin // _GRAIN, min(-(-end // _GRAIN), len(read))):
                    inside = min(end, (grain + 1) * _GRAIN) - max(begin, grain * _GRAIN)
                    before = read[grain]
                    read[grain] += inside
                    if before < full <= read[grain]:
                        done.append((grain * _GRAIN, (grain + 1) * _GRAIN))
        return done
