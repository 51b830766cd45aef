/* Steps that compute one row from others, element by element: loops that are turned into vectors.
 *
 * A row may be computed in place: every element depends on elements at its own place alone.
 */
#ifndef STREAMMERGE_ARITHMETIC_H
#define STREAMMERGE_ARITHMETIC_H

#include "block.h"
#include "machine.h"

#if defined(__clang__)
#define EACH(i, count) \
    _Pragma("clang loop vectorize(assume_safety)") for (int64_t i = 0; i < (count); i++)
#else
#define EACH(i, count) _Pragma("GCC ivdep") for (int64_t i = 0; i < (count); i++)
#endif

/* A zero has no sign, and what is no number stays none, as in the interpreter. */
ALWAYS_INLINE float minimum(float a, float b) { return ((b < a) | (b != b) ? b : a) + 0.0f; }
ALWAYS_INLINE float maximum(float a, float b) { return ((b > a) | (b != b) ? b : a) + 0.0f; }
ALWAYS_INLINE float one_if(int condition) { return condition ? 1.0f : 0.0f; }
ALWAYS_INLINE float sign_or_zero(float value) {
    return (float)((value > 0.0f) - (value < 0.0f));
}

#define BINARY(OP, EXPRESSION)                              \
    case OP:                                                \
        if (b) {                                            \
            EACH(i, count) {                                \
                float x = a[i], y = b[i];                   \
                out[i] = EXPRESSION;                        \
            }                                               \
        } else {                                            \
            float y = number;                               \
            EACH(i, count) {                                \
                float x = a[i];                             \
                out[i] = EXPRESSION;                        \
            }                                               \
        }                                                   \
        break;

/* Computes from two rows, or from a row and a number where there is no `b`. */
ALWAYS_INLINE void compute_binary(enum op op, float *out, const float *a, const float *b,
                                  float number, int64_t count) {
    switch (op) {
        BINARY(OP_ADD, x + y)
        BINARY(OP_SUBTRACT, x - y)
        BINARY(OP_MULTIPLY, x * y)
        BINARY(OP_DIVIDE, x / y)
        BINARY(OP_MINIMUM, minimum(x, y))
        BINARY(OP_MAXIMUM, maximum(x, y))
        BINARY(OP_GREATER, one_if(x > y))
        BINARY(OP_AT_LEAST, one_if(x >= y))
        BINARY(OP_EQUAL, one_if(x == y))
        default: break;
    }
}

#undef BINARY

ALWAYS_INLINE void add_scaled(float *out, const float *a, const float *b, float number,
                              int64_t count) {
    EACH(i, count) out[i] = a[i] + b[i] * number;
}

ALWAYS_INLINE void select_rows(float *out, const float *a, const float *b, const float *chosen,
                               int64_t count) {
    EACH(i, count) out[i] = chosen[i] != 0.0f ? a[i] : b[i];
}

#endif
