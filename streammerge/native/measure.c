/* Answers one question about one block of a task vector: see streammerge/statistics/magnitude.py. */
#include "block.h"
#include "calls.h"

/* Puts the bit patterns of a tile's magnitudes into `row` and counts those on either side. */
ALWAYS_INLINE int load_magnitudes(int32_t *restrict row, sm_question *asked, int64_t at, int64_t count) {
    float values[TILE], base[TILE];
    int32_t low = asked->low, high = asked->high, largest = asked->largest;
    int above = 0, below = 0;
    load_tile(values, asked->values, asked->dtype, at, count);
    load_tile(base, asked->base, asked->base_dtype, at, count);
    for (int64_t i = 0; i < count; i++) {
        int32_t magnitude = magnitude_of(values[i] - base[i]);
        row[i] = magnitude;
        above += magnitude > high;
        below += magnitude < low;
        largest = magnitude > largest ? magnitude : largest;
    }
    asked->largest = largest;
    asked->above += above;
    return count - above - below;
}

/* Counts the magnitudes above a band and those that are crowded, and collects the others inside.
 *
 * Returns how many were collected; -1 if there may not be room for all.
 */
ALWAYS_INLINE int64_t answer_band(sm_question *asked, float *collected, int64_t room) {
    int32_t row[TILE], low = asked->low, high = asked->high;
    uint8_t wanted[TILE + 8];
    int64_t inside = 0;
    asked->above = asked->largest = 0;
    memset(asked->crowds, 0, sizeof asked->crowds);
    for (int64_t at = 0; at < asked->numel; at += TILE) {
        int64_t count = asked->numel - at < TILE ? asked->numel - at : TILE;
        int64_t left = load_magnitudes(row, asked, at, count);
        for (int64_t crowd = 0; crowd < asked->n_crowded; crowd++) {
            int32_t value = asked->crowded[crowd];
            int32_t found = 0;
            for (int64_t i = 0; i < count; i++) found += row[i] == value;
            asked->crowds[crowd] += found;
            left -= found;
        }
        if (left == 0) continue;
        if (inside + count > room) return -1;
        memset(wanted, 0, sizeof wanted);
        for (int64_t i = 0; i < count; i++) wanted[i] = (row[i] >= low) & (row[i] <= high);
        for (int64_t crowd = 0; crowd < asked->n_crowded; crowd++) {
            int32_t value = asked->crowded[crowd];
            for (int64_t i = 0; i < count; i++) wanted[i] &= row[i] != value;
        }
        /* Few are wanted: eight at a time are passed over. */
        for (int64_t i = 0; i < count; i += 8) {
            uint64_t any;
            memcpy(&any, wanted + i, sizeof any);
            if (any == 0) continue;
            for (int64_t k = i; k < i + 8 && k < count; k++) {
                /* Written in any case, to be overwritten by the next one: no branch to guess. */
                collected[inside] = float_of((uint32_t)row[k]);
                inside += wanted[k];
            }
        }
    }
    return inside;
}

/* Answers questions about bands, one after the other, and collects into one room.
 *
 * Returns how many were answered before the room was too small; it is enough for the first one if
 * it holds as many numbers as that has.
 */
FOR_EVERY_CPU
int32_t sm_answer_bands(sm_question *asked, int32_t count, float *collected, int64_t room) {
    for (int32_t i = 0; i < count; i++) {
        asked[i].inside = answer_band(&asked[i], collected, room);
        if (asked[i].inside < 0) return i;
        collected += asked[i].inside;
        room -= asked[i].inside;
    }
    return count;
}

/* Adds the magnitudes inside intervals to histograms of their bit patterns. */
FOR_EVERY_CPU
void sm_answer_bins(sm_question *asked, int32_t count) {
    int32_t row[TILE];
    for (int32_t i = 0; i < count; i++, asked++) {
        int32_t low = asked->low, high = asked->high;
        asked->above = asked->largest = 0;
        for (int64_t at = 0; at < asked->numel; at += TILE) {
            int64_t in_tile = asked->numel - at < TILE ? asked->numel - at : TILE;
            if (load_magnitudes(row, asked, at, in_tile) == 0) continue;
            for (int64_t k = 0; k < in_tile; k++)
                if (row[k] >= low && row[k] <= high)
                    asked->histogram[(row[k] - low) >> asked->shift]++;
        }
    }
}
