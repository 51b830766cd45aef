"""Parts of kernels, in Triton: what generated kernels call, in the CPU's order of operations.

Every function works on a tile of one program instance. Nothing here may be contracted to a fused
multiply-add, nor divided approximately: kernels are compiled with ``enable_fp_fusion=False``, and
quotients are ``div_rn``, so that each operation rounds once, as IEEE 754 says.

Twins: :mod:`streammerge.rng`, :mod:`streammerge.tiles.functions`, :func:`streammerge.tiles.totalling.add_up`,
:mod:`streammerge.engine.rows`, :mod:`streammerge.adapters.onto_base.products` and
:mod:`streammerge.adapters.onto_base.norms`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from streammerge import rng
from streammerge.tiles import functions

_MULTIPLIER_0 = tl.constexpr(rng.PHILOX_MULTIPLIERS[0])
_MULTIPLIER_1 = tl.constexpr(rng.PHILOX_MULTIPLIERS[1])
_STEP_0 = tl.constexpr(rng.PHILOX_KEY_STEPS[0])
_STEP_1 = tl.constexpr(rng.PHILOX_KEY_STEPS[1])
_ROUNDS = tl.constexpr(rng.PHILOX_ROUNDS)
_LANES = tl.constexpr(rng.LANES_PER_COUNTER)

_TERMS_AT_ONCE = tl.constexpr(8)

_LN2_HIGH = tl.constexpr(functions.LN2_HIGH)
_LN2_LOW = tl.constexpr(functions.LN2_LOW)
_LOG2_E = tl.constexpr(functions.LOG2_E)
_LOWEST = tl.constexpr(functions.LOWEST)
_HIGHEST = tl.constexpr(functions.HIGHEST)
_SQRT_HALF = tl.constexpr(functions.SQRT_HALF)
_WHOLE = tl.constexpr(2.0**52 + 2.0**51)
"""What is added to a number of less than 2^51 rounds it to a whole one, to even where two are as near."""
_EXPONENTIAL = tl.constexpr(functions.EXPONENTIAL_TERMS)
_EXPONENTIAL_TERMS = tl.constexpr(len(functions.EXPONENTIAL_TERMS))
_LOGARITHM = tl.constexpr(functions.LOGARITHM_TERMS)
_LOGARITHM_TERMS = tl.constexpr(len(functions.LOGARITHM_TERMS))


@triton.jit  # type: ignore[untyped-decorator]
def draw_lanes(
    key_low: tl.tensor, key_high: tl.tensor, first: tl.tensor, COUNT: tl.constexpr
) -> tl.tensor:
    """Return lanes ``[COUNT]`` int32 of a stream, from the counter ``first`` on."""
    counters: tl.constexpr = COUNT // _LANES
    c0 = (first + tl.arange(0, counters)).to(tl.uint64)
    c1 = tl.zeros([counters], tl.uint64)
    c2 = tl.zeros([counters], tl.uint64)
    c3 = tl.zeros([counters], tl.uint64)
    k0 = tl.full([counters], 0, tl.uint64) + key_low
    k1 = tl.full([counters], 0, tl.uint64) + key_high
    m0 = tl.full([counters], _MULTIPLIER_0, tl.uint64)
    m1 = tl.full([counters], _MULTIPLIER_1, tl.uint64)
    for _ in range(_ROUNDS):
        h0, l0 = tl.umulhi(c0, m0), c0 * m0
        h1, l1 = tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0 += tl.full([counters], _STEP_0, tl.uint64)
        k1 += tl.full([counters], _STEP_1, tl.uint64)
    # The last axis of a join is the new one: words in the order of their lanes.
    words = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), [4 * counters])
    shifts = (16 * tl.arange(0, 4)).to(tl.uint64)
    lanes = (words[:, None] >> shifts[None, :]) & 0xFFFF
    return tl.reshape(lanes, [COUNT]).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def keep_random(
    key_low: tl.tensor,
    key_high: tl.tensor,
    first: tl.tensor,
    upper: tl.tensor,
    lower: tl.tensor,
    COUNT: tl.constexpr,
) -> tl.tensor:
    """Return which elements are kept, ``[COUNT]``; see :func:`streammerge.rng.keep_mask`.

    Args:
        key_low: The lower half of the key.
        key_high: The upper half.
        first: The counter of the first lane.
        upper: What the upper lane is compared with, in [0, 2^16]; one number, or ``[COUNT]``.
        lower: What the lower lane is compared with where the upper one is equal, likewise.
        COUNT: Elements; a multiple of the lanes per counter.
    """
    lanes = draw_lanes(key_low, key_high, first, COUNT)
    kept = (lanes < upper).to(tl.int32)
    undecided = ((lanes == upper) & (lower > 0)).to(tl.int32)
    # One element in 65,536: most tiles need no second stream.
    if tl.max(undecided) > 0:
        kept |= undecided & (draw_lanes(key_low ^ 1, key_high, first, COUNT) < lower).to(tl.int32)
    return kept != 0


@triton.jit  # type: ignore[untyped-decorator]
def keep_random_by(
    key_low: tl.tensor,
    key_high: tl.tensor,
    first: tl.tensor,
    probabilities: tl.tensor,
    COUNT: tl.constexpr,
) -> tl.tensor:
    """Return which elements are kept, each with its own probability; see :func:`streammerge.rng.keep_mask_by`.

    Args:
        key_low: The lower half of the key.
        key_high: The upper half.
        first: The counter of the first lane.
        probabilities: ``[COUNT]``, in [0, 1].
        COUNT: Elements; a multiple of the lanes per counter.
    """
    # A sum that rounds to a whole number, halves to even.
    limits = ((probabilities.to(tl.float64) * 4294967296.0 + _WHOLE) - _WHOLE).to(tl.int64)
    upper, lower = (limits >> 16).to(tl.int32), (limits & 0xFFFF).to(tl.int32)
    return keep_random(key_low, key_high, first, upper, lower, COUNT)


@triton.jit  # type: ignore[untyped-decorator]
def widen_bf16(patterns: tl.tensor) -> tl.tensor:
    """Return float32 values of bfloat16 patterns, ``[m]`` int16."""
    return (patterns.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def round_to_bf16(values: tl.tensor) -> tl.tensor:
    """Return the patterns of float32 values as bfloat16, to even where two are as near, ``[m]`` int16.

    In integers, as Triton's interpreter cuts off where devices round.
    """
    bits = values.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(values == values, rounded, 0x7FC0).to(tl.int16)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_series(
    variable: tl.tensor,
    TERMS: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
) -> tl.tensor:
    series = tl.full(variable.shape, TERMS[FIRST], tl.float64)
    for term in tl.static_range(FIRST + 1, COUNT):
        series = series * variable + TERMS[term]
    return series


@triton.jit  # type: ignore[untyped-decorator]
def _reduce(values: tl.tensor) -> tl.tensor:
    values = tl.where(values < _LOWEST, _LOWEST, values)
    values = tl.where(values > _HIGHEST, _HIGHEST, values)
    powers = (values * _LOG2_E + _WHOLE) - _WHOLE
    return powers, values - powers * _LN2_HIGH - powers * _LN2_LOW


@triton.jit  # type: ignore[untyped-decorator]
def _power_of_two(exponents: tl.tensor) -> tl.tensor:
    # Of what is no number anything will do: it is multiplied with NaN.
    whole = tl.where(exponents == exponents, exponents, 0.0).to(tl.int64)
    return ((whole + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def exponential(values: tl.tensor, FIRST: tl.constexpr) -> tl.tensor:
    """Return ``e ** values``, ``[m]`` float64; of its series, the terms from ``FIRST`` on."""
    powers, rest = _reduce(values)
    series = _sum_series(rest, _EXPONENTIAL, FIRST, _EXPONENTIAL_TERMS) * rest + 1.0
    half = tl.floor(powers * 0.5)
    return series * _power_of_two(half) * _power_of_two(powers - half)


@triton.jit  # type: ignore[untyped-decorator]
def exponential_less_one(values: tl.tensor, FIRST: tl.constexpr) -> tl.tensor:
    """Return ``e ** values - 1``, likewise."""
    powers, rest = _reduce(values)
    series = _sum_series(rest, _EXPONENTIAL, FIRST, _EXPONENTIAL_TERMS) * rest
    half = tl.floor(powers * 0.5)
    other = powers - half
    scale = _power_of_two(half)
    return (series * scale + (scale - _power_of_two(-other))) * _power_of_two(other)


@triton.jit  # type: ignore[untyped-decorator]
def _split(values: tl.tensor) -> tl.tensor:
    bits = values.to(tl.int64, bitcast=True)
    exponents = ((bits >> 52) - 1022).to(tl.float64)
    mantissas = ((bits & 0xFFFFFFFFFFFFF) | (1022 << 52)).to(tl.float64, bitcast=True)
    small = mantissas < _SQRT_HALF
    mantissas = tl.where(small, mantissas + mantissas, mantissas)
    return tl.where(small, exponents - 1.0, exponents), mantissas - 1.0


@triton.jit  # type: ignore[untyped-decorator]
def _logarithm_of(
    exponents: tl.tensor,
    above: tl.tensor,
    values: tl.tensor,
    FIRST: tl.constexpr,
) -> tl.tensor:
    ratio = above / (above + 2.0)
    series = _sum_series(ratio * ratio, _LOGARITHM, FIRST, _LOGARITHM_TERMS)
    series = series * (ratio + ratio)
    series = series + exponents * _LN2_LOW
    series = series + exponents * _LN2_HIGH
    return series + (values - values)


@triton.jit  # type: ignore[untyped-decorator]
def logarithm(values: tl.tensor, FIRST: tl.constexpr) -> tl.tensor:
    """Return the natural logarithm of normal positive values, likewise."""
    exponents, above = _split(values)
    return _logarithm_of(exponents, above, values, FIRST)


@triton.jit  # type: ignore[untyped-decorator]
def logarithm_of_one_more(values: tl.tensor, FIRST: tl.constexpr) -> tl.tensor:
    """Return the natural logarithm of one plus values above -1, likewise."""
    exponents, above = _split(1.0 + values)
    return _logarithm_of(exponents, tl.where(exponents == 0.0, values, above), values, FIRST)


@triton.jit  # type: ignore[untyped-decorator]
def multiply(
    up: tl.tensor,
    down: tl.tensor,
    start: tl.tensor,
    rank: tl.tensor,
    columns: tl.tensor,
    wide: tl.tensor,
    here: tl.tensor,
    COUNT: tl.constexpr,
) -> tl.tensor:
    """Return elements of a product of factors, ``[COUNT]`` float32.

    Args:
        up: B, ``[rows, rank]``.
        down: A, ``[rank, columns]``, cut into tiles of columns that lie one behind the other.
        start: Flat index of the first element, in int64.
        rank: Terms of every element.
        columns: Columns of A.
        wide: Those of a tile; the last one may have fewer.
        here: ``[COUNT]``: which elements there are.
        COUNT: Elements.
    """
    # Within a tile 32 bits do, whose quotients are several times faster.
    place = (start % columns).to(tl.int32) + tl.arange(0, COUNT)
    narrow = columns.to(tl.int32)
    row = start // columns + place // narrow
    column = place % narrow
    tile = column // wide.to(tl.int32) * wide.to(tl.int32)
    step = tl.minimum(wide.to(tl.int32), narrow - tile)
    left = up + row * rank
    right = down + tile * rank + (column - tile)
    return _add_terms(left, right, step, rank, here, COUNT)


@triton.jit  # type: ignore[untyped-decorator]
def multiply_placed(
    up: tl.tensor,
    down: tl.tensor,
    element: tl.tensor,
    rank: tl.tensor,
    columns: tl.tensor,
    rows: tl.tensor,
    inside: tl.tensor,
    COUNT: tl.constexpr,
) -> tl.tensor:
    """Return elements of one of several products, ``[COUNT]`` float32.

    Args:
        up: B of each, ``[matrices, rows, rank]``.
        down: A of each, ``[matrices, rank, columns]``.
        element: ``[COUNT]`` int64: flat indices.
        rank: Terms of every element.
        columns: Columns of a matrix.
        rows: Rows of a matrix.
        inside: ``[COUNT]``: which elements there are.
        COUNT: Elements.
    """
    place = tl.where(inside, element, 0)
    row = place // columns
    left = up + row * rank
    right = down + row // rows * rank * columns + place % columns
    return _add_terms(left, right, columns, rank, inside, COUNT)


@triton.jit  # type: ignore[untyped-decorator]
def _add_terms(
    left: tl.tensor,
    right: tl.tensor,
    step: tl.tensor,
    rank: tl.tensor,
    here: tl.tensor,
    COUNT: tl.constexpr,
) -> tl.tensor:
    """Return sums of products, from the first to the last, each rounded.

    Args:
        left: ``[COUNT]``: where the first factors of the first terms are; further ones follow each other.
        right: ``[COUNT]``: where the second ones are.
        step: From one of these to the next.
        rank: Terms.
        here: ``[COUNT]``: which elements there are.
        COUNT: Elements.
    """
    # A number for each element: the interpreter takes no other for a mask.
    terms = tl.zeros([COUNT], tl.int32) + rank.to(tl.int32)
    there = here & (terms > 0)
    total = tl.load(left, mask=there, other=0.0) * tl.load(right, mask=there, other=0.0)
    term = 1
    while term < rank:
        # Loads need not wait for one another, sums must.
        for more in tl.static_range(_TERMS_AT_ONCE):
            own = term + more
            there = here & (terms > own)
            factor = tl.load(left + own, mask=there, other=0.0)
            value = tl.load(right + own * step, mask=there, other=0.0)
            total = tl.where(terms > own, total + factor * value, total)
        term += _TERMS_AT_ONCE
    return total


@triton.jit  # type: ignore[untyped-decorator]
def spread(
    vector: tl.tensor,
    start: tl.tensor,
    columns: tl.tensor,
    here: tl.tensor,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
) -> tl.tensor:
    """Return what elements of a matrix are multiplied by, ``[COUNT]`` float32.

    Args:
        vector: The factor of each row, or of each column.
        start: Flat index of the first element, in int64.
        columns: Columns of the matrix.
        here: ``[COUNT]``: which elements there are.
        ROWS: Whether it is that of rows.
        COUNT: Elements.
    """
    place = (start % columns).to(tl.int32) + tl.arange(0, COUNT)
    narrow = columns.to(tl.int32)
    own = start // columns + place // narrow if ROWS else place % narrow
    return tl.load(vector + own, mask=here, other=0.0)


# How long rows are, and where totals begin, is no reason to compile another one.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["stride", "numel", "length"], do_not_specialize_on_alignment=["totals"]
)
def add_up(
    a: tl.tensor,
    b: tl.tensor,
    totals: tl.tensor,
    stride: tl.tensor,
    numel: tl.tensor,
    length: tl.tensor,
    SQUARES: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """Add up the blocks of a row, or of the products of two, each block by a program instance.

    Element i of a block is added to running sum i mod 16, then these by halves, in float64; see
    :func:`streammerge.tiles.totalling.add_up`.

    Args:
        a: ``[numel]``.
        b: ``[numel]``; the same for squares.
        totals: Receives the total of block i at ``i * stride``.
        stride: See there.
        numel: Elements of the row.
        length: Elements of a block; the last one may have fewer.
        SQUARES: Whether products are added, not elements.
        UNROLL: Elements per running sum that are loaded at once, as they need not wait for one another.
    """
    lanes = tl.arange(0, 16)
    begin = tl.program_id(0).to(tl.int64) * length
    count = tl.minimum(length, numel - begin)
    sums = tl.zeros([16], tl.float64)
    first = 0
    while first < count:
        for more in tl.static_range(UNROLL):
            own = first + 16 * more + lanes
            here = own < count
            term = tl.load(a + begin + own, mask=here, other=0.0).to(tl.float64)
            if SQUARES:
                term = term * tl.load(b + begin + own, mask=here, other=0.0).to(tl.float64)
            # Nothing is added where there is nothing: a zero would take a negative zero's sign.
            sums = tl.where(here, sums + term, sums)
        first += 16 * UNROLL
    for half in tl.static_range(4):
        pairs = tl.reshape(sums, [2, 8 >> half])
        low, high = tl.split(tl.trans(pairs))
        sums = low + high
    tl.store(totals + tl.program_id(0) * stride + tl.arange(0, 1), sums + 0.0)


@triton.jit(do_not_specialize=["rows", "columns"])  # type: ignore[untyped-decorator]
def add_square_columns(
    values: tl.tensor,
    totals: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """Add the squares of each column to its total, row by row, so many columns by a program instance.

    Args:
        values: ``[rows, columns]`` float32.
        totals: ``[columns]`` float64.
        rows: See there.
        columns: See there.
        TILE: Columns of an instance.
        UNROLL: Rows that are loaded at once, as they need not wait for one another.
    """
    own = tl.program_id(0) * TILE + tl.arange(0, TILE)
    here = own < columns
    sums = tl.load(totals + own, mask=here, other=0.0)
    # A number for each column: the interpreter takes no other for a mask.
    left = tl.where(here, rows, 0)
    row = 0
    while row < rows:
        for more in tl.static_range(UNROLL):
            there = left > row + more
            term = tl.load(values + (row + more) * columns + own, mask=there, other=0.0)
            term = term.to(tl.float64)
            sums = tl.where(there, sums + term * term, sums)
        row += UNROLL
    tl.store(totals + own, sums, mask=here)


@triton.jit(do_not_specialize=["row"])  # type: ignore[untyped-decorator]
def rank_rows(values: tl.tensor, ranks: tl.tensor, row: tl.tensor, WIDE: tl.constexpr) -> None:
    """Rank the magnitudes of each row, a row by a program instance, in numbers from 0 to 1.

    Of equal ones the first is the largest, and what is no number is larger than all: see
    :func:`streammerge.engine.rows.rank_rows`.

    Args:
        values: ``[rows, row]`` float32.
        ranks: ``[rows, row]`` float32, receives the ranks.
        row: Elements of a row; two or more.
        WIDE: A power of two that is no less.
    """
    own = tl.arange(0, WIDE)
    here = own < row
    begin = tl.program_id(0).to(tl.int64) * row
    size = tl.abs(tl.load(values + begin + own, mask=here, other=0.0))
    # Patterns of magnitudes are ordered as they are; places behind them make all of them differ.
    pattern = tl.where(size == size, size.to(tl.int32, bitcast=True), 0x7FC00000)
    keys = (pattern.to(tl.int64) << 32) | (row - 1 - own).to(tl.int64)
    keys = tl.sort(tl.where(here, keys, 0x7FFFFFFFFFFFFFFF))
    place = row - 1 - (keys & 0xFFFFFFFF).to(tl.int32)
    last = tl.zeros([WIDE], tl.float32) + (row - 1).to(tl.float32)
    tl.store(ranks + begin + place, tl.div_rn(own.to(tl.float32), last), mask=here)
