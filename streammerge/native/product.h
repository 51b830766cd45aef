/* A tile of a product of two matrices with a short side between them.
 *
 * Every element is the sum of its terms from the first to the last, each product and each sum rounded,
 * so that its bits depend on its row and its column alone: on no cut, no processor and no library.
 */
#ifndef STREAMMERGE_PRODUCT_H
#define STREAMMERGE_PRODUCT_H

#include "block.h"

enum {
    /* A tile of so many sums stays in registers, or close by. */
    TALL = 4,
    /* Its twin is TILE_COLUMNS in streammerge/native/library.py. */
    BROAD = 64,
};

/* Adds terms to the sums of a tile, or begins with the first of them.
 *
 * `left` is its first row's factor of the first term, `right` a row of it per term, `width` apart.
 */
ALWAYS_INLINE void sum_terms(float sums[TALL][BROAD], const float *left, int64_t row_step,
                             int64_t term_step, const float *restrict right, int64_t width,
                             int64_t terms, int begins, int tall, int64_t broad) {
    int64_t term = 0;
    if (begins) {
        for (int r = 0; r < tall; r++)
            for (int64_t c = 0; c < broad; c++) sums[r][c] = left[r * row_step] * right[c];
        term = 1;
    }
    for (; term < terms; term++) {
        const float *own = right + term * width;
        for (int r = 0; r < tall; r++) {
            float factor = left[r * row_step + term * term_step];
            for (int64_t c = 0; c < broad; c++) sums[r][c] = sums[r][c] + factor * own[c];
        }
    }
}

#endif
