/* The random lanes of streammerge/rng.py: Philox 4x64 with ten rounds.
 *
 * Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", tables 2 and 3.
 */
#ifndef STREAMMERGE_PHILOX_H
#define STREAMMERGE_PHILOX_H

#include "block.h"

#if !defined(__SIZEOF_INT128__)
#error "products of 128 bits are needed"
#endif

enum {
    ROUNDS = 10,
    WORDS = 4,
    LANES = 16,
    /* Blocks computed side by side: a round waits for a product, which others can use. */
    ABREAST = 4,
};

/* Fills WORDS words for each of ABREAST consecutive counters. */
ALWAYS_INLINE void philox(uint64_t *restrict words, uint64_t counter, const uint64_t key[2]) {
    uint64_t c0[ABREAST], c1[ABREAST], c2[ABREAST], c3[ABREAST];
    uint64_t key_0 = key[0], key_1 = key[1];
    for (int i = 0; i < ABREAST; i++) {
        c0[i] = counter + (uint64_t)i;
        c1[i] = c2[i] = c3[i] = 0;
    }
#pragma GCC unroll 10
    for (int round = 0; round < ROUNDS; round++) {
#pragma GCC unroll 4
        for (int i = 0; i < ABREAST; i++) {
            unsigned __int128 first = (unsigned __int128)0xD2E7470EE14C6C93u * c0[i];
            unsigned __int128 second = (unsigned __int128)0xCA5A826395121157u * c2[i];
            c0[i] = (uint64_t)(second >> 64) ^ c1[i] ^ key_0;
            c1[i] = (uint64_t)second;
            c2[i] = (uint64_t)(first >> 64) ^ c3[i] ^ key_1;
            c3[i] = (uint64_t)first;
        }
        key_0 += 0x9E3779B97F4A7C15u;
        key_1 += 0xBB67AE8584CAA73Bu;
    }
    for (int i = 0; i < ABREAST; i++) {
        words[WORDS * i] = c0[i];
        words[WORDS * i + 1] = c1[i];
        words[WORDS * i + 2] = c2[i];
        words[WORDS * i + 3] = c3[i];
    }
}

/* Draws lanes `start` to `start + TILE` of a stream; `start` is a multiple of LANES. */
ALWAYS_INLINE void draw_lanes(uint16_t *restrict lanes, int64_t start, const uint64_t key[2]) {
    uint64_t words[TILE / LANES * WORDS];
    uint64_t counter = (uint64_t)start / LANES + 1;
    for (int64_t i = 0; i < TILE / LANES; i += ABREAST)
        philox(words + WORDS * i, counter + (uint64_t)i, key);
    memcpy(lanes, words, sizeof words);
}

/* One element's lane of the second stream, whose key differs in the lowest bit. */
ALWAYS_INLINE uint32_t draw_lower_lane(int64_t element, const uint64_t key[2]) {
    uint64_t words[ABREAST * WORDS], second[2] = {key[0] ^ 1, key[1]};
    uint64_t lane = (uint64_t)element % LANES;
    philox(words, (uint64_t)element / LANES + 1, second);
    return words[lane / 4] >> 16 * (lane % 4) & 0xffff;
}

#endif
