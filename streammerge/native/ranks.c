/* Where each value of a row stands among the row's magnitudes, from the smallest.
 *
 * Magnitudes are numbered in their order, sorted by the leading digits of their numbers, and put right by
 * insertion: values that agree in a digit or two mostly are the same, or in order by chance. Where they
 * are not, one more digit helps.
 */
#include "block.h"

enum {
    /* Bits of a digit: tables of bins stay in the first-level cache, and are not much larger than what
     * they are filled with. */
    MOST_BITS = 11,
    FEWER_BITS = 8,
    /* As many elements want the larger tables. */
    LONG_ROW = 512,
    /* As few are sorted by insertion alone. */
    SHORT_ROW = 32,
    /* Moves per element, above which insertion is given up. */
    MOST_MOVES = 1,
    /* Zeros are ranked apart where more than one in so many is: each of them would wait for the count of
     * the one before, and few are no reason to look at every element. */
    MANY = 8,
};

/* Differences of numbers of 16 bits share their low bits, and all but a few magnitudes lie within some
 * powers of two. */
typedef struct {
    uint32_t before; /* the smallest pattern that is not 0, less 1 */
    int32_t shift;   /* bits that no pattern has */
    int32_t bits;    /* of the largest number */
    int32_t many_zeros; /* whether they are ranked apart */
} numbering;

/* 1 for 0, 0 for larger patterns. In integers: compilers would branch, which cannot be guessed. */
ALWAYS_INLINE uint32_t is_zero(uint32_t pattern) { return (pattern - 1) >> 31; }

/* 0 for zero alone. */
ALWAYS_INLINE uint32_t number_of(float value, numbering by) {
    uint32_t magnitude = (uint32_t)magnitude_of(value);
    uint32_t step = 1u << by.shift, above = (magnitude - by.before - 1 + step) >> by.shift;
    return above & (is_zero(magnitude) - 1);
}

ALWAYS_INLINE numbering choose_numbering(const float *restrict row, int64_t count) {
    uint32_t any = 0, largest = 0, before = UINT32_MAX, zeros = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t magnitude = (uint32_t)magnitude_of(row[i]), less_one = magnitude - 1;
        any |= magnitude;
        largest = magnitude > largest ? magnitude : largest;
        before = less_one < before ? less_one : before;
        zeros += is_zero(magnitude);
    }
    if (any == 0) return (numbering){0, 0, 1, 1};
    numbering by = {before, __builtin_ctz(any), 0, zeros > count / MANY};
    by.bits = 32 - __builtin_clz(((largest - before - 1) >> by.shift) + 1);
    return by;
}

/* A number above the element's place from the end of its row: all differ, and of equal magnitudes the
 * first one of the row is the largest. */
ALWAYS_INLINE uint64_t key_of(uint32_t number, int64_t at) {
    return (uint64_t)number << 32 | (uint64_t)at;
}

/* Sorts keys; returns whether it took at most so many moves. */
ALWAYS_INLINE int insert(uint64_t *keys, int64_t count, int64_t most_moves) {
    for (int64_t i = 1; i < count; i++) {
        uint64_t key = keys[i];
        int64_t at = i;
        for (; at > 0 && keys[at - 1] > key; at--) keys[at] = keys[at - 1];
        keys[at] = key;
        most_moves -= i - at;
        if (most_moves < 0) return 0;
    }
    return 1;
}

/* Sorts keys by a digit from one place to another. */
ALWAYS_INLINE void scatter(uint64_t *restrict to, const uint64_t *restrict from, int64_t count,
                           int32_t shift, int32_t bits) {
    int32_t bins[1 << MOST_BITS], n_bins = 1 << bits;
    uint64_t mask = (uint64_t)n_bins - 1;
    memset(bins, 0, (size_t)n_bins * sizeof *bins);
    for (int64_t i = 0; i < count; i++) bins[from[i] >> shift & mask]++;
    for (int32_t bin = 0, before = 0; bin < n_bins; bin++) {
        int32_t in_bin = bins[bin];
        bins[bin] = before;
        before += in_bin;
    }
    for (int64_t i = 0; i < count; i++) to[bins[from[i] >> shift & mask]++] = from[i];
}

/* Ranks a row by so many leading digits and insertion; returns whether that was enough. */
ALWAYS_INLINE int rank_by_digits(uint64_t *keys, const float *row, int64_t count, float *ranks,
                                 numbering by, int32_t digits) {
    uint64_t *from = keys, *to = keys + count;
    int32_t bits = count < LONG_ROW ? FEWER_BITS : MOST_BITS;
    int64_t others = 0, zeros = 0;
    if (by.many_zeros) {
        for (int64_t i = 0; i < count; i++) {
            uint32_t number = number_of(row[count - 1 - i], by);
            /* In any case, to be overwritten. */
            from[others] = key_of(number, i);
            others += 1 - is_zero(number);
        }
    } else {
        for (int64_t i = 0; i < count; i++) from[i] = key_of(number_of(row[count - 1 - i], by), i);
        others = count;
    }
    for (int32_t digit = digits; digit > 0; digit--) {
        int32_t shift = by.bits - bits * digit;
        scatter(to, from, others, 32 + (shift > 0 ? shift : 0), bits);
        uint64_t *sorted = to;
        to = from;
        from = sorted;
    }
    int64_t most_moves = digits * bits < by.bits ? MOST_MOVES * others : INT64_MAX;
    if (!insert(from, others, most_moves)) return 0;
    for (int64_t i = count - 1; i >= 0 && others < count; i--) {
        int64_t more = is_zero((uint32_t)magnitude_of(row[i]));
        ranks[i] = (float)zeros;
        zeros += more;
    }
    for (int64_t i = 0; i < others; i++)
        ranks[count - 1 - (uint32_t)from[i]] = (float)(zeros + i);
    return 1;
}

/* Ranks a row, beginning with as many digits as the row before has needed; returns how many it took. */
ALWAYS_INLINE int32_t rank_long(uint64_t *keys, const float *row, int64_t count, float *ranks,
                                int32_t digits) {
    numbering by = choose_numbering(row, count);
    while (!rank_by_digits(keys, row, count, ranks, by, digits)) digits++;
    return digits;
}

ALWAYS_INLINE void rank_short(uint64_t *keys, const float *row, int64_t count, float *ranks) {
    for (int64_t i = 0; i < count; i++)
        keys[i] = key_of((uint32_t)magnitude_of(row[count - 1 - i]), i);
    insert(keys, count, INT64_MAX);
    for (int64_t i = 0; i < count; i++) ranks[count - 1 - (uint32_t)keys[i]] = (float)i;
}

/* Ranks the magnitudes of each row from 0, in ascending order; of equal ones the first is the largest.
 *
 * `values` and `ranks`, `[rows][row_numel]`, may be the same; `keys` has room for 2 * row_numel.
 */
FOR_EVERY_CPU
void sm_rank_rows(const float *values, int64_t rows, int64_t row_numel, float *ranks,
                  uint64_t *keys) {
    int32_t digits = 1;
    for (int64_t row = 0; row < rows; row++, values += row_numel, ranks += row_numel) {
        if (row_numel > SHORT_ROW) {
            digits = rank_long(keys, values, row_numel, ranks, digits);
        } else {
            rank_short(keys, values, row_numel, ranks);
        }
    }
}
