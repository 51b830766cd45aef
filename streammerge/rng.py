"""Random words that depend only on what they are for, never on when they are drawn.

A counter-based generator turns (key, position) into a word without any state, so a mask is the
same for every chunk size, order, thread and device.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", Philox 4x64 with ten
rounds, as numpy's ``Philox`` computes it: 64-bit word ``i`` of a stream is word ``i % 4`` of the
block with counter ``i // 4 + 1``. Every 64-bit word gives two 32-bit words, low half first.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

WORDS_PER_COUNTER = 8
"""32-bit words in one Philox block; streams may be entered at multiples of it."""


def stream_key(seed: int, source: int, tensor_name: str) -> int:
    """Return the 128-bit Philox key of one source's stream for one tensor.

    Args:
        seed: The recipe's seed, in [0, 2^64).
        source: Index of the source in recipe order.
        tensor_name: Name of the output tensor.
    """
    digest = hashlib.blake2b(digest_size=16, person=b"streammerge-rng1")
    digest.update(seed.to_bytes(8, "little"))
    digest.update(source.to_bytes(8, "little"))
    digest.update(tensor_name.encode())
    return int.from_bytes(digest.digest(), "little")


def random_words(key: int, start: int, count: int) -> NDArray[np.uint32]:
    """Return words ``start`` to ``start + count`` of a stream, uniform in [0, 2^32).

    Args:
        key: What :func:`stream_key` returned.
        start: Index of the first word; a multiple of :data:`WORDS_PER_COUNTER`.
        count: Number of words.
    """
    if start % WORDS_PER_COUNTER:
        raise ValueError(f"start must be a multiple of {WORDS_PER_COUNTER}, got {start}")
    generator = np.random.Philox(key=key, counter=start // WORDS_PER_COUNTER)
    wide = generator.random_raw(-(-count // 2))
    return wide.astype("<u8", copy=False).view("<u4")[:count].astype(np.uint32, copy=False)


def keep_below(density: float) -> int:
    """Return the integer below which a 32-bit word means "keep", for a keep rate of ``density``.

    The rate is met to within 2^-33; density 1 keeps every word.
    """
    return round(density * 2**32)


def keep_mask(key: int, start: int, count: int, density: float) -> NDArray[np.bool_]:
    """Return which of ``count`` elements from flat index ``start`` are kept.

    Args:
        key: What :func:`stream_key` returned.
        start: Flat index of the first element; a multiple of :data:`WORDS_PER_COUNTER`.
        count: Number of elements.
        density: Keep probability, in [0, 1].
    """
    limit = keep_below(density)
    if limit >= 2**32:
        return np.ones(count, dtype=np.bool_)
    return random_words(key, start, count) < np.uint32(limit)
