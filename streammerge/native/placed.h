/* Steps that depend on where an element lies: trims, and random numbers. */
#ifndef STREAMMERGE_PLACED_H
#define STREAMMERGE_PLACED_H

#include "arithmetic.h"
#include "functions.h"
#include "philox.h"

/* The smallest magnitude that is kept, while ties need not be told apart. */
ALWAYS_INLINE int32_t floor_of(const sm_trim *trim) {
    if (trim->everything) return 0;
    return magnitude_of(trim->threshold) + (trim->ties == 0);
}

/* Counts the ties of a row down; returns whether some are kept and some are not. */
ALWAYS_INLINE int parts_ties(const float *a, int64_t count, sm_trim *trim) {
    if (trim->everything || trim->ties == 0 || trim->ties == INT64_MAX) return 0;
    int32_t threshold = magnitude_of(trim->threshold), ties = 0;
    for (int64_t i = 0; i < count; i++) ties += magnitude_of(a[i]) == threshold;
    if (ties > trim->ties) return 1;
    trim->ties -= ties;
    return 0;
}

ALWAYS_INLINE void keep_first_ties(float *out, const float *a, int64_t count, sm_trim *trim,
                                   int marks) {
    int32_t threshold = magnitude_of(trim->threshold);
    for (int64_t i = 0; i < count; i++) {
        int32_t magnitude = magnitude_of(a[i]);
        int keeps = magnitude > threshold;
        if (magnitude == threshold && trim->ties > 0) {
            trim->ties--;
            keeps = 1;
        }
        trim->kept += keeps;
        out[i] = keeps ? marks ? 1.0f : a[i] : 0.0f;
    }
}

ALWAYS_INLINE void keep_above(float *out, const float *a, int64_t count, int32_t floor,
                              int64_t *kept, int marks) {
    int32_t chosen = 0;
    EACH(i, count) {
        int32_t magnitude = magnitude_of(a[i]);
        chosen += magnitude >= floor;
        out[i] = magnitude >= floor ? marks ? 1.0f : a[i] : 0.0f;
    }
    *kept += chosen;
}

/* Sets what a trim drops to zero; `marks` sets what it keeps to one. */
ALWAYS_INLINE void trim_row(float *out, const float *a, int64_t count, sm_trim *trim, int marks) {
    int32_t floor = floor_of(trim);
    /* One row of a job at most: no tie is left after it. */
    if (parts_ties(a, count, trim)) {
        keep_first_ties(out, a, count, trim, marks);
    } else {
        keep_above(out, a, count, floor, &trim->kept, marks);
    }
}

enum { COUNTERS = TILE / LANES + ABREAST };

/* Draws the lanes of elements from any one on; returns the first one's. */
ALWAYS_INLINE const uint16_t *draw_lanes_at(uint16_t *lanes, int64_t element, int64_t count,
                                            const uint64_t key[2]) {
    uint64_t words[COUNTERS * WORDS];
    int64_t within = element % LANES;
    uint64_t counter = (uint64_t)(element / LANES) + 1;
    int64_t counters = (within + count + LANES - 1) / LANES;
    for (int64_t i = 0; i < counters; i += ABREAST)
        philox(words + WORDS * i, counter + (uint64_t)i, key);
    memcpy(lanes, words, (size_t)(WORDS * sizeof *words) * (size_t)counters);
    return lanes + within;
}

/* The integer below which a number of 32 bits is kept, as upper and lower lane. */
typedef struct {
    int32_t upper; /* up to 2^16 */
    int32_t lower;
} limit;

ALWAYS_INLINE float within_one(float probability) {
    probability = probability > 0.0f ? probability : 0.0f;
    return probability < 1.0f ? probability : 1.0f;
}

/* For a probability in [0, 1]: 2^32 times it, rounded. What is left of it below the upper lane is exact,
 * so that numbers of 32 bits do, of which vectors hold more. */
ALWAYS_INLINE limit limit_of(float probability) {
    float scaled = probability * 0x1p16f;
    int32_t upper = (int32_t)scaled;
    float rest = (scaled - (float)upper) * 0x1p16f;
    int32_t lower = (int32_t)(rest + 0x1.8p23f - 0x1.8p23f);
    return (limit){upper + (lower >> 16), lower & 0xffff};
}

/* Tells by the upper lanes which are kept; returns how many they do not decide about. */
ALWAYS_INLINE int32_t decide(uint8_t *restrict kept, const uint16_t *restrict lanes, int64_t count,
                             limit of) {
    int32_t undecided = 0;
    for (int64_t i = 0; i < count; i++) {
        kept[i] = lanes[i] < of.upper;
        undecided += lanes[i] == of.upper;
    }
    return of.lower ? undecided : 0;
}

ALWAYS_INLINE int32_t decide_by_row(uint8_t *restrict kept, const uint16_t *restrict lanes,
                                    int64_t count, const float *restrict probabilities) {
    float within[TILE];
    int32_t undecided = 0;
    /* A loop of its own: with the other it would have branches, and not become vectors. */
    for (int64_t i = 0; i < count; i++) within[i] = within_one(probabilities[i]);
    for (int64_t i = 0; i < count; i++) {
        limit of = limit_of(within[i]);
        kept[i] = lanes[i] < of.upper;
        undecided += (lanes[i] == of.upper) & (of.lower != 0);
    }
    return undecided;
}

/* Sets what random numbers drop to zero; `at` is an element of the job. */
ALWAYS_INLINE void drop_randomly_from(float *out, const float *a, const float *probabilities,
                                      int64_t at, int64_t count, sm_stream *stream) {
    uint16_t drawn[COUNTERS * LANES];
    uint8_t kept[TILE];
    int64_t first = stream->start + at;
    limit of_all = {(int32_t)(stream->limit >> 16), (int32_t)(stream->limit & 0xffff)};
    int32_t chosen = 0;
    const uint16_t *lanes = draw_lanes_at(drawn, first, count, stream->key);
    int32_t undecided = probabilities ? decide_by_row(kept, lanes, count, probabilities)
                                      : decide(kept, lanes, count, of_all);
    for (int64_t i = 0; undecided && i < count; i++) {
        limit own = probabilities ? limit_of(within_one(probabilities[i])) : of_all;
        if (lanes[i] != own.upper) continue;
        kept[i] = draw_lower_lane(first + i, stream->key) < (uint32_t)own.lower;
    }
    EACH(i, count) {
        chosen += kept[i];
        out[i] = kept[i] ? a[i] : 0.0f;
    }
    stream->kept += chosen;
}

/* Likewise; nothing is drawn where all are kept, or none. */
ALWAYS_INLINE void keep_by_chance(float *out, const float *a, const float *probabilities,
                                  int64_t at, int64_t count, sm_stream *stream) {
    if (!probabilities && stream->limit == 0) {
        EACH(i, count) out[i] = 0.0f;
    } else if (!probabilities && stream->limit >> 32) {
        EACH(i, count) out[i] = a[i];
        stream->kept += count;
    } else {
        drop_randomly_from(out, a, probabilities, at, count, stream);
    }
}

#endif
