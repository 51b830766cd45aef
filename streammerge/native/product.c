/* Products of two matrices with a short side between them: see streammerge/adapters/onto_base/products.py.
 *
 * Every element is the sum of its terms from the first to the last, each product and each sum rounded,
 * so that its bits depend on its row and its column alone: on no cut, no processor and no library.
 */
#include "product.h"

enum {
    /* Terms whose part of the right factor is laid out side by side, in the first-level cache. */
    TERMS = 64,
};

/* A matrix anywhere in memory. */
typedef struct {
    const float *values;
    int64_t row_step;
    int64_t column_step;
} matrix;

ALWAYS_INLINE const float *place_in(matrix of, int64_t row, int64_t column) {
    return of.values + row * of.row_step + column * of.column_step;
}

/* Adds some terms to a tile, or begins with the first of them. */
ALWAYS_INLINE void add_terms(float *restrict out, int64_t step, matrix left, int64_t row,
                             int64_t first, int64_t terms, const float *restrict packed,
                             int tall, int64_t broad) {
    float sums[TALL][BROAD];
    if (first != 0) {
        for (int r = 0; r < tall; r++)
            for (int64_t c = 0; c < broad; c++) sums[r][c] = out[r * step + c];
    }
    sum_terms(sums, place_in(left, row, first), left.row_step, left.column_step, packed, BROAD,
              terms, first == 0, tall, broad);
    for (int r = 0; r < tall; r++)
        for (int64_t c = 0; c < broad; c++) out[r * step + c] = sums[r][c];
}

/* Adds some terms to all rows of a column of tiles. */
ALWAYS_INLINE void add_to_rows(float *out, int64_t step, matrix left, int64_t rows, int64_t first,
                               int64_t terms, const float *packed, int64_t broad) {
    int64_t row = 0;
    for (; row + TALL <= rows; row += TALL)
        add_terms(out + row * step, step, left, row, first, terms, packed, TALL, broad);
    for (; row < rows; row++)
        add_terms(out + row * step, step, left, row, first, terms, packed, 1, broad);
}

/* Multiplies `[rows][rank]` with `[rank][columns]` to `[rows][columns]`; no rank gives zeros. */
FOR_EVERY_CPU
void sm_product(float *out, const float *left, int64_t left_row, int64_t left_column,
                const float *right, int64_t right_row, int64_t right_column, int64_t rows,
                int64_t rank, int64_t columns) {
    matrix from_left = {left, left_row, left_column}, from_right = {right, right_row, right_column};
    float packed[TERMS * BROAD];
    if (rank == 0) memset(out, 0, (size_t)(rows * columns) * sizeof *out);
    for (int64_t column = 0; column < columns; column += BROAD) {
        int64_t broad = columns - column < BROAD ? columns - column : BROAD;
        for (int64_t first = 0; first < rank; first += TERMS) {
            int64_t terms = rank - first < TERMS ? rank - first : TERMS;
            for (int64_t term = 0; term < terms; term++)
                for (int64_t c = 0; c < broad; c++)
                    packed[term * BROAD + c] = *place_in(from_right, first + term, column + c);
            if (broad == BROAD) {
                add_to_rows(out + column, columns, from_left, rows, first, terms, packed, BROAD);
            } else {
                add_to_rows(out + column, columns, from_left, rows, first, terms, packed, broad);
            }
        }
    }
}
