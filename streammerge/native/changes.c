/* What adapters add to a matrix: products of two factors, times a number.
 *
 * The right factor lies in tiles, as streammerge/adapters/onto_base/products.py lays it out: the rows of a
 * matrix are too far apart for the first-level cache, and to bring them together for every block would
 * take longer than to multiply.
 */
#include "machine.h"
#include "product.h"

/* Some columns of a tile, of a few rows. */
ALWAYS_INLINE void change_tile(const sm_change *change, float *restrict out, int64_t step,
                               const float *up, const float *restrict tile, int64_t width, int tall,
                               int64_t broad) {
    float sums[TALL][BROAD], scaling = change->scaling;
    if (change->rank == 0) memset(sums, 0, sizeof sums);
    if (change->rank > 0)
        sum_terms(sums, up, change->rank, 1, tile, width, change->rank, 1, tall, broad);
    for (int r = 0; r < tall; r++) {
        float *own = out + r * step;
        if (change->adds) {
            for (int64_t c = 0; c < broad; c++) own[c] = own[c] + sums[r][c] * scaling;
        } else {
            for (int64_t c = 0; c < broad; c++) own[c] = sums[r][c] * scaling;
        }
    }
}

/* The same columns of all rows. */
ALWAYS_INLINE void change_rows(const sm_change *change, float *out, int64_t step, const float *up,
                               const float *tile, int64_t width, int64_t rows, int64_t broad) {
    int64_t rank = change->rank, row = 0;
    for (; row + TALL <= rows; row += TALL)
        change_tile(change, out + row * step, step, up + row * rank, tile, width, TALL, broad);
    for (; row < rows; row++)
        change_tile(change, out + row * step, step, up + row * rank, tile, width, 1, broad);
}

/* Columns [first, end) of some rows, tile by tile. */
ALWAYS_INLINE void change_matrix(const sm_change *change, float *out, int64_t row, int64_t rows,
                                 int64_t first, int64_t end) {
    const float *up = change->up + row * change->rank;
    for (int64_t column = first, next; column < end; column = next) {
        int64_t begin = column / BROAD * BROAD;
        int64_t width = change->columns - begin < BROAD ? change->columns - begin : BROAD;
        const float *tile = change->tiles + begin * change->rank + (column - begin);
        next = end < begin + width ? end : begin + width;
        float *own = out + (column - first);
        if (next - column == BROAD) {
            change_rows(change, own, end - first, up, tile, BROAD, rows, BROAD);
        } else {
            change_rows(change, own, end - first, up, tile, width, rows, next - column);
        }
    }
}

/* The rest of a row, whole rows, the beginning of one.
 *
 * A function of its own: as a part of the machine it would be compiled to half the speed.
 */
FOR_EVERY_CPU
void sm_change_range(const sm_change *change, int64_t start, int64_t numel) {
    int64_t columns = change->columns;
    for (int64_t done = 0; done < numel;) {
        int64_t row = (start + done) / columns, first = (start + done) % columns;
        int64_t left = numel - done, rows = 1, end = columns;
        if (first == 0 && left >= columns) {
            rows = left / columns;
        } else if (left < columns - first) {
            end = first + left;
        }
        change_matrix(change, change->out + done, row, rows, first, end);
        done += rows * (end - first);
    }
}
