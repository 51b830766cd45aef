/* The k-th largest magnitude of a task vector that is all here: see streammerge/reductions/selecting.py.
 *
 * Bit patterns order like magnitudes, so they are told apart digit by digit, the highest first: a
 * histogram of the digit says in which bin the k-th largest is, and only what lies in that bin has a
 * next digit to look at.
 */
#include "block.h"
#include "calls.h"

enum {
    DIGIT_BITS = 11,
    BINS = 1 << DIGIT_BITS,
    DIGITS = 3, /* 11 + 10 + 10 bits; of the sign there is no need */
    /* Neighbours count in tables of their own: many share a value, and a counter has to wait for
       what the one before did to it. */
    TABLES = 4,
};

static const int32_t SHIFTS[DIGITS] = {20, 10, 0};

ALWAYS_INLINE void load_patterns(int32_t *restrict patterns, const sm_selection *asked) {
    float values[TILE], base[TILE];
    for (int64_t at = 0; at < asked->numel; at += TILE) {
        int64_t count = asked->numel - at < TILE ? asked->numel - at : TILE;
        load_tile(values, asked->values, asked->dtype, at, count);
        load_tile(base, asked->base, asked->base_dtype, at, count);
        for (int64_t i = 0; i < count; i++) patterns[at + i] = magnitude_of(values[i] - base[i]);
    }
}

/* Counts the digits of patterns and adds the tables up. */
ALWAYS_INLINE void count_digits(const int32_t *patterns, int64_t count, int32_t shift,
                                int32_t tables[TABLES][BINS]) {
    int32_t mask = shift == SHIFTS[0] ? BINS - 1 : BINS / 2 - 1;
    memset(tables, 0, TABLES * BINS * sizeof tables[0][0]);
    int64_t at = 0;
    for (; at + TABLES <= count; at += TABLES)
        for (int table = 0; table < TABLES; table++)
            tables[table][patterns[at + table] >> shift & mask]++;
    for (; at < count; at++) tables[0][patterns[at] >> shift & mask]++;
    for (int64_t bin = 0; bin < BINS; bin++)
        for (int table = 1; table < TABLES; table++) tables[0][bin] += tables[table][bin];
}

ALWAYS_INLINE void select_kth(sm_selection *asked, int32_t *patterns) {
    int32_t tables[TABLES][BINS];
    int64_t count = asked->numel, wanted = asked->k, greater = 0;
    int32_t prefix = 0;
    load_patterns(patterns, asked);
    for (int digit = 0; digit < DIGITS; digit++) {
        int32_t shift = SHIFTS[digit], bin = BINS - 1;
        count_digits(patterns, count, shift, tables);
        while (tables[0][bin] < wanted) wanted -= tables[0][bin], greater += tables[0][bin--];
        prefix |= bin << shift;
        int64_t inside = 0;
        for (int64_t i = 0; i < count; i++) {
            int32_t pattern = patterns[i];
            patterns[inside] = pattern;
            inside += pattern >> shift == prefix >> shift;
        }
        count = inside;
    }
    asked->threshold = float_of((uint32_t)prefix);
    asked->greater = greater;
    asked->equal = count;
}

/* Selects in several task vectors; `patterns` has room for the longest. */
FOR_EVERY_CPU
void sm_select(sm_selection *asked, int32_t count, int32_t *patterns) {
    for (int32_t i = 0; i < count; i++) select_kth(&asked[i], patterns);
}
