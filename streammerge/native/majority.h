/* The weighted mean of those rows whose entry has the elected sign. */
#ifndef STREAMMERGE_MAJORITY_H
#define STREAMMERGE_MAJORITY_H

#include "arithmetic.h"

/* What the sum of what agrees is divided by: nothing; how many agree; the sum of their shares. */
enum divisor { UNDIVIDED, BY_NUMBER, BY_SHARES };

typedef struct {
    const float *factors; /* [n_rows] */
    const float *shares;  /* [n_rows] */
    float least;          /* the smallest sum of votes that elects a positive sign */
} election;

ALWAYS_INLINE float vote_of(float value, int by_frequency) {
    return by_frequency ? sign_or_zero(value) : value;
}

/* The sum of magnitudes is signed at the end: rounding is symmetric. */
ALWAYS_INLINE float signed_mean(float sum, float share, uint32_t sign, enum divisor divisor) {
    float mean = float_of(bits_of(sum) ^ sign);
    if (divisor == BY_NUMBER) mean /= share > 1.0f ? share : 1.0f;
    if (divisor == BY_SHARES) mean /= share == 0.0f ? 1.0f : share;
    return mean + 0.0f;
}

ALWAYS_INLINE float share_of(float agreeing, const float *shares, int64_t row,
                             enum divisor divisor) {
    return agreeing > 0.0f ? divisor == BY_SHARES ? shares[row] : 1.0f : 0.0f;
}

/* For a number of rows that is known when this is compiled: half the time of what is below. */
ALWAYS_INLINE void average_few(float *out, const float *const *rows, int n_rows, election by,
                               int64_t count, int by_frequency, enum divisor divisor) {
    const float *row[8];
    float factors[8], shares[8];
    for (int k = 0; k < n_rows; k++) {
        row[k] = rows[k];
        factors[k] = by.factors[k];
        shares[k] = by.shares[k];
    }
    EACH(i, count) {
        float votes = vote_of(row[0][i], by_frequency);
#pragma GCC unroll 8
        for (int k = 1; k < n_rows; k++) votes += vote_of(row[k][i], by_frequency);
        uint32_t sign = votes >= by.least ? 0 : SIGN_BIT;
        float sum = 0.0f, share = 0.0f;
#pragma GCC unroll 8
        for (int k = 0; k < n_rows; k++) {
            float value = float_of(bits_of(row[k][i]) ^ sign);
            float agreeing = 0.0f > value ? 0.0f : value;
            share += share_of(agreeing, shares, k, divisor);
            sum += agreeing * factors[k];
        }
        out[i] = signed_mean(sum, share, sign, divisor);
    }
}

/* The same for any number of rows, row by row; `out` may be any of them. */
ALWAYS_INLINE void average_many(float *out, const float *const *rows, int n_rows, election by,
                                int64_t count, int by_frequency, enum divisor divisor) {
    float votes[TILE], share[TILE], sum[TILE];
    uint32_t sign[TILE];
    EACH(i, count) votes[i] = vote_of(rows[0][i], by_frequency);
    for (int k = 1; k < n_rows; k++) {
        const float *row = rows[k];
        EACH(i, count) votes[i] += vote_of(row[i], by_frequency);
    }
    EACH(i, count) {
        sign[i] = votes[i] >= by.least ? 0 : SIGN_BIT;
        sum[i] = share[i] = 0.0f;
    }
    for (int k = 0; k < n_rows; k++) {
        const float *row = rows[k];
        float factor = by.factors[k];
        EACH(i, count) {
            float value = float_of(bits_of(row[i]) ^ sign[i]);
            float agreeing = 0.0f > value ? 0.0f : value;
            share[i] += share_of(agreeing, by.shares, k, divisor);
            sum[i] += agreeing * factor;
        }
    }
    EACH(i, count) out[i] = signed_mean(sum[i], share[i], sign[i], divisor);
}

ALWAYS_INLINE void average_by(float *out, const float *const *rows, int n_rows, election by,
                              int64_t count, int by_frequency, enum divisor divisor) {
    switch (n_rows) {
        case 1: average_few(out, rows, 1, by, count, by_frequency, divisor); break;
        case 2: average_few(out, rows, 2, by, count, by_frequency, divisor); break;
        case 3: average_few(out, rows, 3, by, count, by_frequency, divisor); break;
        case 4: average_few(out, rows, 4, by, count, by_frequency, divisor); break;
        default: average_many(out, rows, n_rows, by, count, by_frequency, divisor);
    }
}

ALWAYS_INLINE void average_divided_by(float *out, const float *const *rows, int n_rows, election by,
                                      int64_t count, int by_frequency, int divides) {
    int ones = 1;
    for (int k = 0; k < n_rows; k++) ones &= by.shares[k] == 1.0f;
    if (!divides) {
        average_by(out, rows, n_rows, by, count, by_frequency, UNDIVIDED);
    } else if (ones) {
        average_by(out, rows, n_rows, by, count, by_frequency, BY_NUMBER);
    } else {
        average_by(out, rows, n_rows, by, count, by_frequency, BY_SHARES);
    }
}

/* Averages; the numbers are the factors, the shares, and the sign that a vote of zero elects. */
ALWAYS_INLINE void average_majority_of(float *out, const float *const *rows, int n_rows,
                                       const float *numbers, int64_t count, int32_t flags) {
    election by = {numbers, numbers + n_rows, 0.0f};
    if (!(numbers[2 * n_rows] >= 0.0f)) by.least = 0x1p-149f; /* the smallest number above zero */
    if (flags & BY_FREQUENCY) {
        average_divided_by(out, rows, n_rows, by, count, 1, flags & DIVIDES);
    } else {
        average_divided_by(out, rows, n_rows, by, count, 0, flags & DIVIDES);
    }
}

#endif
