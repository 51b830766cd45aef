/* Merges one block in one sweep: what streammerge/methods/parts.py does in thirty. */
#include "calls.h"
#include "philox.h"

/* Loads a tile, minus a base, without what is smaller than `floor`; returns the largest magnitude. */
ALWAYS_INLINE int32_t take_typed(float *restrict row, const void *values, enum dtype dtype,
                                 int64_t at, const float *restrict base, int64_t count, int32_t floor,
                                 int64_t *kept) {
    int32_t largest = 0, chosen = 0;
    for (int64_t i = 0; i < count; i++) {
        float value = load(values, dtype, at + i) - base[i];
        int32_t magnitude = magnitude_of(value);
        largest = magnitude > largest ? magnitude : largest;
        chosen += magnitude >= floor;
        row[i] = magnitude >= floor ? value : 0.0f;
    }
    *kept += chosen;
    return largest;
}

ALWAYS_INLINE int32_t take(float *row, const void *values, int32_t dtype, int64_t at,
                           const float *base, int64_t count, int32_t floor, int64_t *kept) {
    switch (dtype) {
        case BF16: return take_typed(row, values, BF16, at, base, count, floor, kept);
        case F16: return take_typed(row, values, F16, at, base, count, floor, kept);
        default: return take_typed(row, values, F32, at, base, count, floor, kept);
    }
}

/* Sets all but the first ties of a tile to zero. */
ALWAYS_INLINE void drop_late_ties(float *restrict row, int64_t count, sm_source *source) {
    int32_t threshold = magnitude_of(source->threshold), ties = 0;
    for (int64_t i = 0; i < count; i++) ties += magnitude_of(row[i]) == threshold;
    if (ties <= source->ties) {
        source->ties -= ties;
        return;
    }
    /* One tile of a block at most: no tie is left after it. */
    for (int64_t i = 0; i < count; i++) {
        if (magnitude_of(row[i]) != threshold) continue;
        if (source->ties > 0) {
            source->ties--;
        } else {
            row[i] = 0.0f;
            source->kept--;
        }
    }
}

/* Sets entries of a tile to zero by their places, and divides the others by the density. */
ALWAYS_INLINE void drop_randomly(float *restrict row, int64_t at, int64_t count, sm_source *source) {
    uint16_t lanes[TILE];
    uint8_t kept[TILE];
    int32_t limit = source->upper_limit, chosen = 0, undecided = 0;
    float density = source->density;
    draw_lanes(lanes, source->start + at, source->key);
    for (int64_t i = 0; i < count; i++) {
        kept[i] = lanes[i] < limit;
        undecided += lanes[i] == limit;
    }
    for (int64_t i = 0; undecided && source->lower_limit && i < count; i++) {
        if (lanes[i] != limit) continue;
        int32_t lower = (int32_t)draw_lower_lane(source->start + at + i, source->key);
        kept[i] = lower < source->lower_limit;
    }
    for (int64_t i = 0; i < count; i++) {
        chosen += kept[i];
        row[i] = kept[i] ? row[i] / density : 0.0f;
    }
    source->kept += chosen;
}

/* Loads a tile of a source and drops what its kind says; returns the largest magnitude. */
ALWAYS_INLINE int32_t load_operand(float *restrict row, sm_source *source, int64_t at,
                                   const float *restrict base, int64_t count) {
    int32_t floor = 0;
    int64_t all = 0, *kept = source->keep == KEEP_RANDOM ? &all : &source->kept;
    if (source->keep == KEEP_LARGEST) {
        /* Only what is above the threshold, once no tie is left. */
        floor = magnitude_of(source->threshold) + (source->ties == 0);
    }
    int32_t largest = take(row, source->values, source->dtype, at, base, count, floor, kept);
    if (source->keep == KEEP_RANDOM) {
        drop_randomly(row, at, count, source);
    } else if (source->keep == KEEP_LARGEST && source->ties > 0 && source->ties < INT64_MAX) {
        drop_late_ties(row, count, source);
    }
    return largest;
}

/* Adds weighted rows from left to right, from +0.0: a sum of zeros is never negative.
 *
 * Row by row: a loop over rows inside one over columns is not turned into vectors unless their
 * number is known.
 */
ALWAYS_INLINE void add_rows(float *restrict merged, const float *restrict rows,
                            const float *restrict weights, int64_t n_rows, int64_t count) {
    for (int64_t i = 0; i < count; i++) merged[i] = rows[i] * weights[0];
    for (int64_t row = 1; row < n_rows; row++)
        for (int64_t i = 0; i < count; i++) merged[i] += rows[row * ROW + i] * weights[row];
    for (int64_t i = 0; i < count; i++) merged[i] += 0.0f;
}

ALWAYS_INLINE float sign_of(float value) { return (float)((value > 0.0f) - (value < 0.0f)); }

/* Averages the weighted entries whose sign is the majority's, over their number.
 *
 * For a number of rows that is known when this is compiled: two thirds of the time of what is below.
 */
ALWAYS_INLINE void average_majority(float *restrict merged, const float *restrict rows,
                                    const float *restrict weights, int64_t n_rows, int64_t count,
                                    enum combine vote) {
    for (int64_t i = 0; i < count; i++) {
        float votes = vote == MAJORITY_TOTAL ? rows[i] : sign_of(rows[i]);
#pragma GCC unroll 4
        for (int64_t row = 1; row < n_rows; row++) {
            float value = rows[row * ROW + i];
            votes += vote == MAJORITY_TOTAL ? value : sign_of(value);
        }
        /* The sum of magnitudes is signed at the end: rounding is symmetric. */
        uint32_t sign = votes >= 0.0f ? 0 : SIGN_BIT;
        float sum = 0.0f, agreeing = 0.0f;
#pragma GCC unroll 4
        for (int64_t row = 0; row < n_rows; row++) {
            float value = float_of(bits_of(rows[row * ROW + i]) ^ sign);
            agreeing += value > 0.0f ? 1.0f : 0.0f;
            sum += (value > 0.0f ? value : 0.0f) * weights[row];
        }
        float average = float_of(bits_of(sum) ^ sign) / (agreeing > 1.0f ? agreeing : 1.0f);
        merged[i] = average + 0.0f;
    }
}

/* The same for any number of rows, row by row. */
ALWAYS_INLINE void average_majority_of_many(float *restrict merged, const float *restrict rows,
                                            const float *restrict weights, int64_t n_rows,
                                            int64_t count, enum combine vote) {
    float votes[TILE], agreeing[TILE];
    for (int64_t i = 0; i < count; i++) votes[i] = agreeing[i] = merged[i] = 0.0f;
    for (int64_t row = 0; row < n_rows; row++)
        for (int64_t i = 0; i < count; i++) {
            float value = rows[row * ROW + i];
            votes[i] += vote == MAJORITY_TOTAL ? value : sign_of(value);
        }
    for (int64_t row = 0; row < n_rows; row++)
        for (int64_t i = 0; i < count; i++) {
            uint32_t sign = votes[i] >= 0.0f ? 0 : SIGN_BIT;
            float value = float_of(bits_of(rows[row * ROW + i]) ^ sign);
            agreeing[i] += value > 0.0f ? 1.0f : 0.0f;
            merged[i] += (value > 0.0f ? value : 0.0f) * weights[row];
        }
    for (int64_t i = 0; i < count; i++) {
        uint32_t sign = votes[i] >= 0.0f ? 0 : SIGN_BIT;
        float average = float_of(bits_of(merged[i]) ^ sign);
        merged[i] = average / (agreeing[i] > 1.0f ? agreeing[i] : 1.0f) + 0.0f;
    }
}

ALWAYS_INLINE void average(float *restrict merged, const float *restrict rows,
                           const float *restrict weights, int64_t n_rows, int64_t count,
                           enum combine vote) {
    switch (n_rows) {
        case 1: average_majority(merged, rows, weights, 1, count, vote); break;
        case 2: average_majority(merged, rows, weights, 2, count, vote); break;
        case 3: average_majority(merged, rows, weights, 3, count, vote); break;
        case 4: average_majority(merged, rows, weights, 4, count, vote); break;
        default: average_majority_of_many(merged, rows, weights, n_rows, count, vote);
    }
}

ALWAYS_INLINE void combine(float *restrict merged, const float *restrict rows,
                           const float *restrict weights, int64_t n_rows, int64_t count,
                           int32_t how) {
    switch (how) {
        case SUM: add_rows(merged, rows, weights, n_rows, count); break;
        case MAJORITY_TOTAL: average(merged, rows, weights, n_rows, count, MAJORITY_TOTAL); break;
        default: average(merged, rows, weights, n_rows, count, MAJORITY_FREQUENCY);
    }
}

/* Divides, adds the base and stores; returns the largest magnitude. */
ALWAYS_INLINE int32_t store_typed(void *restrict out, enum dtype dtype, int64_t at,
                                  const float *restrict merged, const float *restrict base,
                                  int64_t count, float divisor) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        float value = merged[i];
        if (divisor != 1.0f) value /= divisor;
        if (base) value = base[i] + value;
        int32_t magnitude = magnitude_of(value);
        largest = magnitude > largest ? magnitude : largest;
        if (dtype == BF16) {
            ((uint16_t *)out)[at + i] = bfloat16_of(value);
        } else if (dtype == F16) {
            ((uint16_t *)out)[at + i] = half_of(value);
        } else {
            ((float *)out)[at + i] = value;
        }
    }
    return largest;
}

ALWAYS_INLINE int32_t store(const sm_merge *job, int64_t at, const float *merged,
                            const float *base, int64_t count) {
    switch (job->out_dtype) {
        case BF16: return store_typed(job->out, BF16, at, merged, base, count, job->divisor);
        case F16: return store_typed(job->out, F16, at, merged, base, count, job->divisor);
        default: return store_typed(job->out, F32, at, merged, base, count, job->divisor);
    }
}

/* Merges a block; returns whether all operands are finite and the result fits the output type. */
ALWAYS_INLINE int32_t merge_block(const sm_merge *job, float *scratch) {
    float *base = scratch, *merged = base + ROW, *rows = merged + ROW;
    float weights[SOURCES_AT_MOST];
    int32_t operands = 0, results = 0;
    for (int64_t i = 0; i < job->n_sources; i++) {
        weights[i] = job->sources[i].weight;
        job->sources[i].kept = 0;
    }
    memset(base, 0, TILE * sizeof *base);
    for (int64_t at = 0; at < job->numel; at += TILE) {
        int64_t count = job->numel - at < TILE ? job->numel - at : TILE;
        if (job->base) load_tile(base, job->base, job->base_dtype, at, count);
        for (int64_t i = 0; i < job->n_sources; i++) {
            int32_t largest = load_operand(rows + i * ROW, &job->sources[i], at, base, count);
            operands = largest > operands ? largest : operands;
        }
        combine(merged, rows, weights, job->n_sources, count, job->combine);
        int32_t largest = store(job, at, merged, job->base ? base : 0, count);
        results = largest > results ? largest : results;
    }
    return operands < INFINITY_BITS && results <= magnitude_of(job->limit);
}

/* Merges blocks; returns how many it refuses.
 *
 * What was written for those is not to be used: the caller looks for what is wrong.
 * `scratch` has (sources + 2) * ROW numbers.
 */
FOR_EVERY_CPU
int32_t sm_merge_blocks(sm_merge *jobs, int32_t count, float *scratch) {
    int32_t refused = 0;
    for (int32_t i = 0; i < count; i++) {
        jobs[i].refused = !merge_block(&jobs[i], scratch);
        refused += jobs[i].refused;
    }
    return refused;
}

/* Tells the caller whether both mean the same by a call. */
int32_t sm_size_of(int32_t what) {
    static const int32_t sizes[] = {
        sizeof(sm_source), sizeof(sm_merge), sizeof(sm_question), sizeof(sm_selection),
        ROW,               SOURCES_AT_MOST,  CROWDS_AT_MOST,
    };
    return sizes[what];
}
