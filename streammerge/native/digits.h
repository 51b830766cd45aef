/* The k-th largest of some magnitudes: see streammerge/statistics/selecting.py.
 *
 * Bit patterns order like magnitudes, so they are told apart digit by digit, the highest first: a
 * histogram of the digit says in which bin the k-th largest is, and only what lies in that bin has a
 * next digit to look at.
 */
#ifndef STREAMMERGE_DIGITS_H
#define STREAMMERGE_DIGITS_H

#include "block.h"

enum {
    DIGIT_BITS = 11,
    DIGIT_BINS = 1 << DIGIT_BITS,
    DIGITS = 3, /* 11 + 10 + 10 bits; of the sign there is no need */
    /* Neighbours count in tables of their own: many share a value, and a counter has to wait for
       what the one before did to it. */
    TABLES = 4,
    /* So few are counted once per bit in the time that the tables take to be filled and searched. */
    FEW = 2048,
};

typedef struct {
    int64_t greater;   /* how many patterns are larger */
    int64_t equal;     /* how many are as large */
    int32_t threshold; /* the k-th largest */
} selected;

/* Counts the digits of patterns and adds the tables up. */
ALWAYS_INLINE void count_digits(const int32_t *patterns, int64_t count, int32_t shift, int32_t mask,
                                int32_t tables[TABLES][DIGIT_BINS]) {
    memset(tables, 0, TABLES * DIGIT_BINS * sizeof tables[0][0]);
    int64_t at = 0;
    for (; at + TABLES <= count; at += TABLES)
        for (int table = 0; table < TABLES; table++)
            tables[table][patterns[at + table] >> shift & mask]++;
    for (; at < count; at++) tables[0][patterns[at] >> shift & mask]++;
    for (int64_t bin = 0; bin < DIGIT_BINS; bin++)
        for (int table = 1; table < TABLES; table++) tables[0][bin] += tables[table][bin];
}

/* Finds the k-th largest of few patterns, which agree in all bits from `shift` on with the threshold:
 * the largest number that at least k of them reach. */
ALWAYS_INLINE void select_of_few(selected *found, const int32_t *patterns, int64_t count, int64_t k,
                                 int32_t shift) {
    int32_t greater = 0, equal = 0;
    for (int32_t bit = shift - 1; bit >= 0; bit--) {
        int32_t next = found->threshold | 1 << bit, reach = 0;
        for (int64_t i = 0; i < count; i++) reach += patterns[i] >= next;
        if (reach >= k) found->threshold = next;
    }
    for (int64_t i = 0; i < count; i++) {
        greater += patterns[i] > found->threshold;
        equal += patterns[i] == found->threshold;
    }
    found->greater += greater;
    found->equal = equal;
}

/* Finds the k-th largest of patterns, which are overwritten. */
ALWAYS_INLINE selected select_kth(int32_t *patterns, int64_t count, int64_t k) {
    static const int32_t shifts[DIGITS + 1] = {31, 20, 10, 0};
    int32_t tables[TABLES][DIGIT_BINS];
    selected found = {0, 0, 0};
    for (int digit = 0; digit < DIGITS; digit++) {
        int32_t shift = shifts[digit + 1], bin = DIGIT_BINS - 1;
        if (count <= FEW) {
            select_of_few(&found, patterns, count, k, shifts[digit]);
            return found;
        }
        count_digits(patterns, count, shift, digit == 0 ? DIGIT_BINS - 1 : DIGIT_BINS / 2 - 1, tables);
        while (tables[0][bin] < k) k -= tables[0][bin], found.greater += tables[0][bin--];
        found.threshold |= bin << shift;
        int64_t inside = 0;
        for (int64_t i = 0; i < count; i++) {
            int32_t pattern = patterns[i];
            patterns[inside] = pattern;
            inside += pattern >> shift == found.threshold >> shift;
        }
        count = inside;
    }
    found.equal = count;
    return found;
}

#endif
