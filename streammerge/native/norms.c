/* Squares of a matrix's elements, added up in float64: see streammerge/adapters/onto_base/norms.py. */
#include "totals.h"

/* Writes the total of each row of `[rows][columns]`, in the order of every total. */
FOR_EVERY_CPU
void sm_row_squares(const float *values, int64_t rows, int64_t columns, double *totals) {
    for (int64_t row = 0; row < rows; row++) {
        double sums[SUMS];
        begin_total(OP_DOT, sums);
        total_square(sums, values + row * columns, columns);
        totals[row] = end_total(OP_DOT, sums);
    }
}

/* Adds each row of `[rows][columns]` to the totals of columns, one row after the other. */
FOR_EVERY_CPU
void sm_column_squares(const float *restrict values, int64_t rows, int64_t columns,
                       double *restrict totals) {
    /* A tile of totals stays in the first-level cache for all rows. */
    for (int64_t first = 0; first < columns; first += TILE) {
        int64_t end = first + TILE < columns ? first + TILE : columns;
        for (int64_t row = 0; row < rows; row++) {
            const float *own = values + row * columns;
            for (int64_t c = first; c < end; c++) totals[c] += (double)own[c] * (double)own[c];
        }
    }
}
