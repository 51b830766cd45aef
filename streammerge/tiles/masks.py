"""The random masks of :mod:`streammerge.rng` in tensor arithmetic, for devices without numpy.

Philox multiplies unsigned 64-bit words to 128 bits. torch has signed 64-bit integers alone, whose
products and sums keep their low 64 bits; the high halves are put together from products of 32-bit
halves. Only integers are involved, so a mask has the same bits on every device.

Nothing here waits for a device: keys and limits are arguments of the operations, and the second
stream, which decides about one element in 65,536, is drawn for all, as looking for those would mean
to wait for their number.

Memory: about 32 bytes per element while a mask is drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.lazily import torch
from streammerge.rng import (
    LANES_PER_COUNTER,
    PHILOX_KEY_STEPS,
    PHILOX_MULTIPLIERS,
    PHILOX_ROUNDS,
    keep_limit,
)

if TYPE_CHECKING:
    from torch import Tensor

_LOW_HALF = 2**32 - 1
_LANE = 2**16 - 1


def draw_keep_mask(
    key: int, start: int, count: int, density: float, *, device: torch.device
) -> Tensor:
    """Return which of ``count`` elements from flat index ``start`` are kept, ``[count]`` bool.

    Equals :func:`streammerge.rng.keep_mask`.

    Args:
        key: What :func:`streammerge.rng.stream_key` returned.
        start: Flat index of the first element; a multiple of the lanes per counter.
        count: Number of elements.
        density: Keep probability, in [0, 1].
        device: Where the mask is drawn.
    """
    upper_limit, lower_limit = divmod(keep_limit(density), 2**16)
    if upper_limit > _LANE:
        return torch.ones(count, dtype=torch.bool, device=device)
    # The second stream's key differs in the lowest bit.
    keys = [key, key ^ 1] if lower_limit else [key]
    upper, *lower = draw_lanes(keys, start, count, device=device).unbind()
    mask = upper < upper_limit
    for lanes in lower:
        mask |= (upper == upper_limit) & (lanes < lower_limit)
    return mask


def draw_lanes(keys: list[int], start: int, count: int, *, device: torch.device) -> Tensor:
    """Return lanes ``start`` to ``start + count`` of streams, ``[keys, count]`` int32 in [0, 2^16).

    Args:
        keys: One per stream; they differ in their low 64 bits only.
        start: Index of the first lane; a multiple of the lanes per counter.
        count: Number of lanes.
        device: Where they are drawn.
    """
    first = start // LANES_PER_COUNTER + 1
    counters = torch.arange(
        first, first + -(-count // LANES_PER_COUNTER), dtype=torch.int64, device=device
    )
    shape = (len(keys), counters.numel())
    words = torch.stack([word.expand(shape) for word in _philox(keys, counters)], dim=-1)
    lanes = words.view(torch.int16).flatten(1)[:, :count]
    return lanes.to(torch.int32).bitwise_and_(_LANE)


def _philox(keys: list[int], counters: Tensor) -> tuple[Tensor, ...]:
    """Return the four words, which broadcast to ``[keys, counters]``, of every block."""
    low_keys = torch.empty((len(keys), 1), dtype=torch.int64, device=counters.device)
    for index, key in enumerate(keys):
        # A fill takes its number along; a tensor made from a list would be copied, and waited for.
        low_keys[index].fill_(_signed(key))
    high_key = keys[0] >> 64
    c0, c1 = counters, counters.new_zeros(1)
    c2, c3 = c1, c1
    for _ in range(PHILOX_ROUNDS):
        high_0, low_0 = _multiply(c0, PHILOX_MULTIPLIERS[0])
        high_1, low_1 = _multiply(c2, PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high_1 ^ c1 ^ low_keys, low_1, high_0 ^ c3 ^ _signed(high_key), low_0
        low_keys = low_keys + _signed(PHILOX_KEY_STEPS[0])
        high_key += PHILOX_KEY_STEPS[1]
    return c0, c1, c2, c3


def _multiply(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low 64 bits of unsigned products."""
    low, high = words & _LOW_HALF, (words >> 32) & _LOW_HALF
    factor_low, factor_high = factor & _LOW_HALF, factor >> 32
    # Each sum below is less than 2^64, so that no carry is lost.
    middle = high * factor_low + ((low * factor_low >> 32) & _LOW_HALF)
    other = low * factor_high + (middle & _LOW_HALF)
    carried = ((middle >> 32) & _LOW_HALF) + ((other >> 32) & _LOW_HALF)
    return high * factor_high + carried, words * _signed(factor)


def _signed(word: int) -> int:
    """Return the signed integer with the low 64 bits of ``word``."""
    low = word & 2**64 - 1
    return low - 2**64 if low >= 2**63 else low
