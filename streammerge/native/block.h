/* What the compiled kernels share: tiles, element types, and how a function is compiled.
 *
 * A block streams through the core's first-level cache in tiles: values are read as they are stored,
 * everything is computed on one tile of float32, and the result is written as it is to be stored.
 *
 * Every operation is the IEEE one that torch does, in the same order, so that results have the same
 * bits: nothing here may be compiled with -ffast-math or with contraction of a*b + c to one rounding.
 */
#ifndef STREAMMERGE_BLOCK_H
#define STREAMMERGE_BLOCK_H

#include <stdint.h>
#include <string.h>

#if defined(__FAST_MATH__)
#error "results would not be exact"
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "files hold little-endian numbers, which are read as they are"
#endif

/* One body, compiled for several instruction sets; the loader of the system picks one. Tests compile it
 * for one at a time. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(FOR_ONE_CPU)
#if !defined(__clang__) && __GNUC__ >= 12
#define FOR_EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define FOR_EVERY_CPU __attribute__((target_clones("avx2", "default")))
#endif
#else
#define FOR_EVERY_CPU
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum {
    TILE = 512,
    /* Rows of a power of two bytes would share the few places of the cache. */
    ROW = TILE + 16,
};

/* As in streammerge/native/library.py. */
/* A difference is a task vector in float32: the base is not subtracted from it. */
enum dtype { F32 = 0, BF16 = 1, F16 = 2, DIFFERENCE = 3 };

#define SIGN_BIT 0x80000000u
#define MAGNITUDE_BITS 0x7fffffff
#define INFINITY_BITS 0x7f800000

ALWAYS_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

ALWAYS_INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The pattern of |value|: ordered like the magnitudes, with NaN above infinity. */
ALWAYS_INLINE int32_t magnitude_of(float value) {
    return (int32_t)(bits_of(value) & MAGNITUDE_BITS);
}

ALWAYS_INLINE float float_of_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t rest = half & 0x7fff;
    uint32_t subnormal = bits_of((float)(int32_t)rest * 0x1p-24f);
    uint32_t normal = (rest << 13) + (112u << 23); /* the bias of the exponent is 127, not 15 */
    uint32_t special = INFINITY_BITS | rest << 13;
    return float_of(sign | (rest < 0x400 ? subnormal : rest < 0x7c00 ? normal : special));
}

/* Rounds to nearest, ties to even, a finite number of at most 65504. */
ALWAYS_INLINE uint16_t half_of(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
    uint32_t rest = bits & MAGNITUDE_BITS;
    /* Below 2^-14 the steps are 2^-24, those of float32 numbers from 0.5 to 1: adding rounds. */
    uint32_t small = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);
    uint32_t normal = (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
    return (uint16_t)(sign | (rest < 113u << 23 ? small : normal));
}

ALWAYS_INLINE uint16_t bfloat16_of(float value) {
    uint32_t bits = bits_of(value);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

ALWAYS_INLINE float load(const void *values, enum dtype dtype, int64_t at) {
    if (dtype == BF16) return float_of((uint32_t)((const uint16_t *)values)[at] << 16);
    if (dtype == F16) return float_of_half(((const uint16_t *)values)[at]);
    return ((const float *)values)[at];
}

ALWAYS_INLINE void load_typed(float *restrict row, const void *values, enum dtype dtype, int64_t at,
                              int64_t count) {
    for (int64_t i = 0; i < count; i++) row[i] = load(values, dtype, at + i);
}

ALWAYS_INLINE void load_tile(float *restrict row, const void *values, int32_t dtype, int64_t at,
                             int64_t count) {
    switch (dtype) {
        case BF16: load_typed(row, values, BF16, at, count); break;
        case F16: load_typed(row, values, F16, at, count); break;
        default: load_typed(row, values, F32, at, count);
    }
}

#endif
