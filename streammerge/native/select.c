/* The k-th largest magnitude of a task vector that is all here: see streammerge/statistics/selecting.py. */
#include "calls.h"
#include "digits.h"

ALWAYS_INLINE void load_patterns(int32_t *restrict patterns, const sm_selection *asked) {
    float values[TILE], base[TILE];
    for (int64_t at = 0; at < asked->numel; at += TILE) {
        int64_t count = asked->numel - at < TILE ? asked->numel - at : TILE;
        load_tile(values, asked->values, asked->dtype, at, count);
        load_tile(base, asked->base, asked->base_dtype, at, count);
        for (int64_t i = 0; i < count; i++) patterns[at + i] = magnitude_of(values[i] - base[i]);
    }
}

/* Selects in several task vectors; `patterns` has room for the longest. */
FOR_EVERY_CPU
void sm_select(sm_selection *asked, int32_t count, int32_t *patterns) {
    for (int32_t i = 0; i < count; i++) {
        load_patterns(patterns, &asked[i]);
        selected found = select_kth(patterns, asked[i].numel, asked[i].k);
        asked[i].threshold = float_of((uint32_t)found.threshold);
        asked[i].greater = found.greater;
        asked[i].equal = found.equal;
    }
}
