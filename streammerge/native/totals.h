/* Totals of rows, in float64: the order of streammerge/tiles/interpreter.py. */
#ifndef STREAMMERGE_TOTALS_H
#define STREAMMERGE_TOTALS_H

#include "arithmetic.h"

/* Element i of a row is added to running sum i % SUMS; tiles are whole numbers of them. */
enum { SUMS = 16 };

ALWAYS_INLINE double larger(double a, double b) { return (b > a) | (b != b) ? b : a; }

ALWAYS_INLINE double totalled(enum op op, double so_far, const float *a, const float *b, int64_t i) {
    if (op == OP_DOT) return so_far + (double)a[i] * (double)b[i];
    return so_far + (double)a[i];
}

ALWAYS_INLINE void total_tile_by(enum op op, double *kept, const float *a, const float *b,
                                 int64_t count) {
    double sums[SUMS];
    int64_t whole = count / SUMS * SUMS;
    memcpy(sums, kept, sizeof sums);
    for (int64_t at = 0; at < whole; at += SUMS)
        for (int64_t k = 0; k < SUMS; k++) sums[k] = totalled(op, sums[k], a, b, at + k);
    for (int64_t at = whole; at < count; at++)
        sums[at - whole] = totalled(op, sums[at - whole], a, b, at);
    memcpy(kept, sums, sizeof sums);
}

/* The pattern of a value, ordered as values are, zeros and infinities too. */
ALWAYS_INLINE int32_t ordered(float value) {
    int32_t bits = (int32_t)bits_of(value);
    return bits ^ (int32_t)((uint32_t)(bits >> 31) & MAGNITUDE_BITS);
}

/* In integers, of which vectors find the larger at once; and it is told if there is no number. */
ALWAYS_INLINE void total_largest(double *kept, const float *a, int64_t count) {
    int32_t best = INT32_MIN, odd = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t place = ordered(a[i]);
        best = place > best ? place : best;
        odd |= a[i] != a[i];
    }
    int32_t bits = best ^ (int32_t)((uint32_t)(best >> 31) & MAGNITUDE_BITS);
    if (count) kept[0] = larger(kept[0], odd ? __builtin_nan("") : float_of((uint32_t)bits));
}

/* A row times itself, each element of which becomes a double once. */
ALWAYS_INLINE void total_square(double *kept, const float *a, int64_t count) {
    double sums[SUMS];
    int64_t whole = count / SUMS * SUMS;
    memcpy(sums, kept, sizeof sums);
    for (int64_t at = 0; at < whole; at += SUMS)
        for (int64_t k = 0; k < SUMS; k++) sums[k] += (double)a[at + k] * (double)a[at + k];
    for (int64_t at = whole; at < count; at++) sums[at - whole] += (double)a[at] * (double)a[at];
    memcpy(kept, sums, sizeof sums);
}

/* Whole numbers below 2^53, which no order changes. */
ALWAYS_INLINE void total_count(double *kept, const float *a, const float *b, int64_t count) {
    int32_t chosen = 0;
    if (b) {
        for (int64_t i = 0; i < count; i++) chosen += (a[i] != 0.0f) & (b[i] != 0.0f);
    } else {
        for (int64_t i = 0; i < count; i++) chosen += a[i] != 0.0f;
    }
    kept[0] += chosen;
}

ALWAYS_INLINE void total_opposed(double *kept, const float *a, const float *b, int64_t count) {
    int32_t chosen = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t differ = (int32_t)(bits_of(a[i]) ^ bits_of(b[i])) < 0;
        /* Magnitudes of what is no number are not above 0. */
        chosen += differ & (__builtin_fabsf(a[i]) > 0.0f) & (__builtin_fabsf(b[i]) > 0.0f);
    }
    kept[0] += chosen;
}

ALWAYS_INLINE void total_tile(enum op op, double *sums, const float *a, const float *b,
                              int64_t count) {
    switch (op) {
        case OP_SUM: total_tile_by(OP_SUM, sums, a, b, count); break;
        case OP_DOT:
            if (a == b) total_square(sums, a, count);
            else total_tile_by(OP_DOT, sums, a, b, count);
            break;
        case OP_COUNT: total_count(sums, a, b, count); break;
        case OP_OPPOSED: total_opposed(sums, a, b, count); break;
        default: total_largest(sums, a, count);
    }
}

ALWAYS_INLINE void begin_total(enum op op, double *sums) {
    for (int k = 0; k < SUMS; k++) sums[k] = op == OP_LARGEST ? -__builtin_inf() : 0.0;
}

/* A total of zero has no sign. */
ALWAYS_INLINE double end_total(enum op op, double *sums) {
    for (int half = SUMS / 2; half > 0; half /= 2)
        for (int k = 0; k < half; k++)
            sums[k] = op == OP_LARGEST ? larger(sums[k], sums[half + k]) : sums[k] + sums[half + k];
    return sums[0] + 0.0;
}

#endif
