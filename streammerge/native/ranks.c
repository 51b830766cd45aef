/* Where each value of a row stands among the row's magnitudes, from the smallest. */
#include "block.h"

enum {
    RANK_BITS = 8,
    RANK_BINS = 1 << RANK_BITS,
    RANK_PASSES = 4,
    /* Rows as short as this are sorted by insertion: tables of bins would take longer to fill. */
    SHORT_ROW = 32,
};

/* A pattern above the element's place from the end of its row: all differ, and of equal patterns the
 * first one of the row is the largest. */
ALWAYS_INLINE uint64_t key_of(float value, int64_t at) {
    return (uint64_t)magnitude_of(value) << 32 | (uint64_t)at;
}

ALWAYS_INLINE void sort_short(uint64_t *restrict keys, const float *restrict row, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        uint64_t key = key_of(row[count - 1 - i], i);
        int64_t at = i;
        for (; at > 0 && keys[at - 1] > key; at--) keys[at] = keys[at - 1];
        keys[at] = key;
    }
}

/* Sorts digit by digit, the lowest first; returns which half of `keys` the sorted ones are in. */
ALWAYS_INLINE uint64_t *sort_long(uint64_t *keys, const float *restrict row, int64_t count) {
    int32_t bins[RANK_PASSES][RANK_BINS];
    uint64_t *from = keys, *to = keys + count;
    memset(bins, 0, sizeof bins);
    for (int64_t i = 0; i < count; i++) {
        float value = row[count - 1 - i];
        int32_t magnitude = magnitude_of(value);
        from[i] = key_of(value, i);
        for (int pass = 0; pass < RANK_PASSES; pass++)
            bins[pass][magnitude >> RANK_BITS * pass & (RANK_BINS - 1)]++;
    }
    for (int pass = 0; pass < RANK_PASSES; pass++) {
        int32_t shift = 32 + RANK_BITS * pass, *begin = bins[pass];
        /* Numbers of 16 bits have nothing in the low digits. */
        if (begin[from[0] >> shift & (RANK_BINS - 1)] == count) continue;
        for (int32_t bin = 0, before = 0; bin < RANK_BINS; bin++) {
            int32_t in_bin = begin[bin];
            begin[bin] = before;
            before += in_bin;
        }
        for (int64_t i = 0; i < count; i++)
            to[begin[from[i] >> shift & (RANK_BINS - 1)]++] = from[i];
        uint64_t *sorted = to;
        to = from;
        from = sorted;
    }
    return from;
}

/* Ranks the magnitudes of each row from 0, in ascending order; of equal ones the first is the largest.
 *
 * `values` and `ranks`, `[rows][row_numel]`, may be the same; `keys` has room for 2 * row_numel.
 */
FOR_EVERY_CPU
void sm_rank_rows(const float *values, int64_t rows, int64_t row_numel, float *ranks,
                  uint64_t *keys) {
    for (int64_t row = 0; row < rows; row++, values += row_numel, ranks += row_numel) {
        uint64_t *sorted = keys;
        if (row_numel > SHORT_ROW) {
            sorted = sort_long(keys, values, row_numel);
        } else {
            sort_short(keys, values, row_numel);
        }
        for (int64_t i = 0; i < row_numel; i++)
            ranks[row_numel - 1 - (uint32_t)sorted[i]] = (float)i;
    }
}
