/* Exponential and logarithm: the operations of streammerge/tiles/functions.py for float32, in its order.
 *
 * Powers of two are one factor here, as what lies beyond e**200 is infinite in float32: a product with
 * two of them has the same bits. */
#ifndef STREAMMERGE_FUNCTIONS_H
#define STREAMMERGE_FUNCTIONS_H

#include "arithmetic.h"

/* 2^52 + 2^51: a number of less than 2^51 that is added to it is rounded to a whole one, to even where
 * two are as near, and stands in its low bits. Works in vectors of every instruction set. */
#define WHOLE 0x1.8p52

ALWAYS_INLINE int64_t bits_of_double(double value) {
    int64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

ALWAYS_INLINE double double_of(int64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#define LN2_HIGH 0.693147180369123816490
#define LN2_LOW 1.90821492927058770002e-10
#define LOG2_E 1.44269504088896338700
/* e to a power beyond it is 0 or infinite in float32. */
#define FARTHEST 200.0
#define SQRT_HALF 0.70710678118654752440

/* A value is `power * ln 2 + rest`. */
typedef struct {
    double rest;
    int64_t power;
} reduced;

ALWAYS_INLINE reduced reduce(double value) {
    value = value < -FARTHEST ? -FARTHEST : value;
    value = value > FARTHEST ? FARTHEST : value;
    double shifted = value * LOG2_E + WHOLE;
    double powers = shifted - WHOLE;
    return (reduced){
        value - powers * LN2_HIGH - powers * LN2_LOW,
        bits_of_double(shifted) - bits_of_double(WHOLE),
    };
}

/* (e**rest - 1) / rest, of what is left of a value. */
ALWAYS_INLINE double exponential_series(double rest) {
    static const double terms[] = {
        1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0,
        1.0 / 24.0,     1.0 / 6.0,     1.0 / 2.0,    1.0,
    };
    double series = terms[0];
#pragma GCC unroll 8
    for (int term = 1; term < 9; term++) series = series * rest + terms[term];
    return series;
}

ALWAYS_INLINE double power_of_two(int64_t power) { return double_of((power + 1023) << 52); }

ALWAYS_INLINE double exponential(double value) {
    reduced of = reduce(value);
    double series = exponential_series(of.rest) * of.rest + 1.0;
    return series * power_of_two(of.power);
}

ALWAYS_INLINE double exponential_less_one(double value) {
    reduced of = reduce(value);
    double series = of.rest * exponential_series(of.rest);
    double scale = power_of_two(of.power);
    return series * scale + (scale - 1.0);
}

/* The logarithm of `value`, which is 1 + `more`: near 1 `more` tells what rounding has left of it. */
ALWAYS_INLINE double logarithm_of(double value, double more, int knows_more) {
    static const double terms[] = {
        1.0 / 13, 1.0 / 11, 1.0 / 9, 1.0 / 7, 1.0 / 5, 1.0 / 3, 1.0,
    };
    int64_t bits = bits_of_double(value);
    /* With the sign's bit, as a shift of signed numbers leaves it. */
    int64_t exponent = ((int64_t)((uint64_t)bits >> 52) ^ 2048) - 2048 - 1022;
    double exponents = double_of(exponent + bits_of_double(WHOLE)) - WHOLE;
    double mantissa = double_of((bits & (((int64_t)1 << 52) - 1)) | (int64_t)1022 << 52);
    int small = mantissa < SQRT_HALF;
    mantissa = small ? mantissa + mantissa : mantissa;
    exponents = small ? exponents - 1.0 : exponents;
    double above = mantissa - 1.0;
    if (knows_more) above = exponents == 0.0 ? more : above;
    double ratio = above / (above + 2.0);
    double square = ratio * ratio;
    double series = terms[0];
#pragma GCC unroll 6
    for (int term = 1; term < 7; term++) series = series * square + terms[term];
    return exponents * LN2_HIGH + (exponents * LN2_LOW + (ratio + ratio) * series);
}

/* What is not finite gives no number. */
ALWAYS_INLINE double logarithm(double value) {
    return logarithm_of(value, 0.0, 0) + (value - value);
}

ALWAYS_INLINE double logarithm_of_one_more(double value) {
    return logarithm_of(1.0 + value, value, 1) + (value - value);
}

/* Computes from one row. */
ALWAYS_INLINE void compute_unary(enum op op, float *out, const float *a, int64_t count) {
    switch (op) {
        case OP_ABSOLUTE:
            EACH(i, count) out[i] = float_of(bits_of(a[i]) & MAGNITUDE_BITS);
            break;
        case OP_SIGN: EACH(i, count) out[i] = sign_or_zero(a[i]); break;
        case OP_SQUARE_ROOT: EACH(i, count) out[i] = __builtin_sqrtf(a[i]); break;
        case OP_EXPONENTIAL: EACH(i, count) out[i] = (float)exponential(a[i]); break;
        case OP_LOGARITHM: EACH(i, count) out[i] = (float)logarithm(a[i]); break;
        case OP_EXPONENTIAL_LESS_ONE:
            EACH(i, count) out[i] = (float)exponential_less_one(a[i]);
            break;
        case OP_LOGARITHM_OF_ONE_MORE:
            EACH(i, count) out[i] = (float)logarithm_of_one_more(a[i]);
            break;
        default: break;
    }
}

#endif
