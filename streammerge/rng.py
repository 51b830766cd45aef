"""Random words that depend only on what they are for, never on when they are drawn.

A counter-based generator turns (key, position) into a word without any state, so a mask is the
same for every chunk size, order, thread and device.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", Philox 4x64 with ten
rounds, as numpy's ``Philox`` computes it: 64-bit word ``i`` of a stream is word ``i % 4`` of the
block with counter ``i // 4 + 1``. Every 64-bit word gives four 16-bit lanes, low bits first.

An element's random number has 32 bits: its lane of one stream above its lane of a second one. The
upper lane decides about all elements but one in 65,536, so the second stream is hardly ever drawn.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

LANES_PER_COUNTER = 16
"""16-bit lanes in one Philox block; streams may be entered at multiples of it."""
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
PHILOX_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
"""The constants of Philox 4x64, Salmon et al. 2011, tables 2 and 3."""
_MASK = 2**64 - 1


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


def random_lanes(key: int, start: int, count: int) -> NDArray[np.uint16]:
    """Return lanes ``start`` to ``start + count`` of a stream, uniform in [0, 2^16).

    Args:
        key: What :func:`stream_key` returned.
        start: Index of the first lane.
        count: Number of lanes.
    """
    counter, within = divmod(start, LANES_PER_COUNTER)
    generator = np.random.Philox(key=key, counter=counter)
    wide = generator.random_raw(-(-(within + count) // 4))
    lanes = wide.astype("<u8", copy=False).view("<u2")[within : within + count]
    return lanes.astype(np.uint16, copy=False)


def keep_limit(density: float) -> int:
    """Return the integer below which a 32-bit number means "keep", for a keep rate of ``density``.

    The rate is met to within 2^-33; density 1 keeps every number.
    """
    return round(density * 2**32)


def keep_mask(key: int, start: int, count: int, density: float) -> NDArray[np.bool_]:
    """Return which of ``count`` elements from flat index ``start`` are kept.

    Args:
        key: What :func:`stream_key` returned.
        start: Flat index of the first element.
        count: Number of elements.
        density: Keep probability, in [0, 1].
    """
    upper_limit, lower_limit = divmod(keep_limit(density), 2**16)
    if upper_limit >= 2**16:
        return np.ones(count, dtype=np.bool_)
    upper = random_lanes(key, start, count)
    mask = upper < np.uint16(upper_limit)
    if lower_limit:
        for element in np.flatnonzero(upper == np.uint16(upper_limit)).tolist():
            mask[element] = _lower_lane(key, start + element) < lower_limit
    return mask


def keep_mask_by(
    key: int, start: int, probabilities: NDArray[np.floating[Any]]
) -> NDArray[np.bool_]:
    """Return which elements from flat index ``start`` are kept, each with its own probability.

    Args:
        key: What :func:`stream_key` returned.
        start: Flat index of the first element.
        probabilities: ``[count]``, in [0, 1].
    """
    # rint rounds halves to even, as round does.
    limits = np.rint(probabilities.astype(np.float64) * 2.0**32).astype(np.int64)
    upper = random_lanes(key, start, probabilities.size).astype(np.int64)
    mask = upper < limits >> 16
    undecided = (upper == limits >> 16) & (limits & 0xFFFF > 0)
    for element in np.flatnonzero(undecided).tolist():
        mask[element] = _lower_lane(key, start + element) < limits[element] & 0xFFFF
    return mask


def _lower_lane(key: int, element: int) -> int:
    """Return one element's lane of the second stream, whose key differs in the lowest bit."""
    counter, lane = divmod(element, LANES_PER_COUNTER)
    word = philox_block(key ^ 1, counter + 1)[lane // 4]
    return word >> 16 * (lane % 4) & 0xFFFF


def philox_block(key: int, counter: int) -> tuple[int, int, int, int]:
    """Return the four 64-bit words of one Philox block.

    For single blocks: numpy takes ten times longer to set up a generator than this to run.

    Args:
        key: In [0, 2^128).
        counter: In [0, 2^128).
    """
    c0, c1, c2, c3 = counter & _MASK, counter >> 64, 0, 0
    k0, k1 = key & _MASK, key >> 64
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = PHILOX_MULTIPLIERS[0] * c0, PHILOX_MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = p1 >> 64 ^ c1 ^ k0, p1 & _MASK, p0 >> 64 ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + PHILOX_KEY_STEPS[0] & _MASK, k1 + PHILOX_KEY_STEPS[1] & _MASK
    return c0, c1, c2, c3
