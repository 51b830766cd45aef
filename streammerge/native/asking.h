/* Answers what is asked about ranked values, tile by tile, while a program runs over them. */
#ifndef STREAMMERGE_ASKING_H
#define STREAMMERGE_ASKING_H

#include "arithmetic.h"
#include "digits.h"
#include "machine.h"

/* Where one question collects: `size` numbers from `first` on in the room. */
typedef struct {
    int64_t first;
    int64_t size;
} place;

/* Collects what lies inside a band and is not crowded, in flat order. */
ALWAYS_INLINE int64_t collect_inside(float *collected, const sm_asked *asked, const float *a,
                                     int64_t count) {
    int32_t low = asked->low, high = asked->high;
    uint8_t wanted[TILE + 8];
    int64_t inside = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t magnitude = magnitude_of(a[i]);
        wanted[i] = (magnitude >= low) & (magnitude <= high);
    }
    memset(wanted + count, 0, 8);
    for (int32_t crowd = 0; crowd < asked->n_crowded; crowd++) {
        int32_t value = asked->crowded[crowd];
        for (int64_t i = 0; i < count; i++) wanted[i] &= magnitude_of(a[i]) != value;
    }
    /* Few are wanted: eight at a time are passed over. */
    for (int64_t i = 0; i < count; i += 8) {
        uint64_t any;
        memcpy(&any, wanted + i, sizeof any);
        if (any == 0) continue;
        for (int64_t k = i; k < i + 8 && k < count; k++) {
            /* Written in any case, to be overwritten by the next one: no branch to guess. */
            collected[inside] = float_of((uint32_t)magnitude_of(a[k]));
            inside += wanted[k];
        }
    }
    return inside;
}

/* Counts a tile's values on either side of an interval; returns how many are inside. */
ALWAYS_INLINE int64_t count_around(sm_asked *asked, const float *a, int64_t count) {
    int32_t low = asked->low, high = asked->high, largest = asked->largest, above = 0, below = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t magnitude = magnitude_of(a[i]);
        above += magnitude > high;
        below += magnitude < low;
        largest = magnitude > largest ? magnitude : largest;
    }
    asked->largest = largest;
    asked->above += above;
    return count - above - below;
}

ALWAYS_INLINE void answer_band(sm_asked *asked, const float *a, int64_t count, float *values,
                              place at) {
    int64_t left = count_around(asked, a, count);
    for (int32_t crowd = 0; crowd < asked->n_crowded; crowd++) {
        int32_t value = asked->crowded[crowd], found = 0;
        for (int64_t i = 0; i < count; i++) found += magnitude_of(a[i]) == value;
        asked->crowds[crowd] += found;
        left -= found;
    }
    if (left == 0 || asked->collected == CRAMMED) return;
    if (asked->collected + count > at.size) {
        asked->collected = CRAMMED;
        return;
    }
    float *to = values + at.first + asked->collected;
    asked->collected += collect_inside(to, asked, a, count);
}

ALWAYS_INLINE void answer_bins(sm_asked *asked, const float *a, int64_t count) {
    int32_t low = asked->low, high = asked->high, shift = asked->shift;
    if (count_around(asked, a, count) == 0) return;
    for (int64_t i = 0; i < count; i++) {
        int32_t magnitude = magnitude_of(a[i]);
        if (magnitude >= low && magnitude <= high) asked->histogram[(magnitude - low) >> shift]++;
    }
}

ALWAYS_INLINE void keep_magnitudes(sm_asked *asked, const float *a, int64_t count, float *values,
                                   place at) {
    if (asked->collected == CRAMMED) return;
    float *to = values + at.first + asked->collected;
    EACH(i, count) to[i] = float_of((uint32_t)magnitude_of(a[i]));
    asked->collected += count;
}

ALWAYS_INLINE void answer_tile(sm_asked *asked, const float *a, int64_t count, float *values,
                              place at) {
    switch (asked->kind) {
        case BAND: answer_band(asked, a, count, values, at); break;
        case BINS: answer_bins(asked, a, count); break;
        case KEEP:
        case SELECT: keep_magnitudes(asked, a, count, values, at); break;
        default: break;
    }
}

ALWAYS_INLINE int keeps_all(const sm_asked *asked) {
    return asked->kind == KEEP || asked->kind == SELECT;
}

/* Divides the room that is left among a job's questions: first those that keep all. */
ALWAYS_INLINE void begin_answers(sm_asked *asked, place *places, int32_t n_ranked, int64_t numel,
                                 const sm_room *room) {
    int64_t first = room ? room->used : 0, left = room ? room->size - first : 0, bands = 0;
    for (int32_t i = 0; i < n_ranked; i++) {
        asked[i].above = asked[i].collected = asked[i].largest = 0;
        memset(asked[i].crowds, 0, sizeof asked[i].crowds);
        places[i] = (place){first, 0};
        bands += asked[i].kind == BAND;
        if (!keeps_all(&asked[i])) continue;
        if (left < numel) {
            asked[i].collected = CRAMMED;
            continue;
        }
        places[i].size = numel;
        first += numel;
        left -= numel;
    }
    for (int32_t i = 0; i < n_ranked; i++) {
        if (asked[i].kind != BAND) continue;
        places[i] = (place){first, left / bands};
        first += left / bands;
    }
}

/* Selects among what each question has kept; returns whether there was room for all of them. */
ALWAYS_INLINE int select_kept(sm_asked *asked, const place *places, int32_t n_ranked,
                              const sm_room *room) {
    int fits = 1;
    for (int32_t i = 0; i < n_ranked; i++, asked++) {
        if (asked->kind != SELECT) continue;
        if (asked->collected == CRAMMED) {
            fits = 0;
            continue;
        }
        int32_t *patterns = (int32_t *)(void *)(room->values + places[i].first);
        selected found = select_kth(patterns, asked->collected, asked->k);
        asked->threshold = float_of((uint32_t)found.threshold);
        asked->above = found.greater;
        asked->equal = found.equal;
    }
    return fits;
}

/* Moves what questions of a kind have collected to where it is to be found; likewise. */
ALWAYS_INLINE int close_gaps(sm_asked *asked, int32_t kind, const place *places, int32_t n_ranked,
                             sm_room *room) {
    int fits = 1;
    for (int32_t i = 0; i < n_ranked; i++, asked++) {
        if (asked->kind != kind) continue;
        if (asked->collected == CRAMMED) {
            fits = 0;
            continue;
        }
        asked->first = room->used;
        memmove(room->values + room->used, room->values + places[i].first,
                (size_t)asked->collected * sizeof *room->values);
        room->used += asked->collected;
    }
    return fits;
}

/* In the order of their places: what is moved overwrites nothing that is still needed. */
ALWAYS_INLINE int end_answers(sm_asked *asked, const place *places, int32_t n_ranked,
                              sm_room *room) {
    int selects = select_kept(asked, places, n_ranked, room);
    int keeps = close_gaps(asked, KEEP, places, n_ranked, room);
    return close_gaps(asked, BAND, places, n_ranked, room) && keeps && selects;
}

#endif
