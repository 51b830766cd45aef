/* Programs over tiles, as streammerge/tiles/program.py has them, and what a run of one is called with.
 *
 * Each has its twin in streammerge/native/machine.py.
 */
#ifndef STREAMMERGE_MACHINE_H
#define STREAMMERGE_MACHINE_H

#include <stdint.h>

/* Op of program.py. */
enum op {
    OP_BASE, OP_SOURCE, OP_TASK_VECTOR, OP_COMPUTED, OP_CHANGED, OP_FILL,
    OP_ADD, OP_SUBTRACT, OP_MULTIPLY, OP_DIVIDE, OP_MINIMUM, OP_MAXIMUM,
    OP_GREATER, OP_AT_LEAST, OP_EQUAL, OP_ADD_SCALED,
    OP_ABSOLUTE, OP_SIGN, OP_SQUARE_ROOT, OP_EXPONENTIAL, OP_LOGARITHM, OP_SELECT,
    OP_KEEP_LARGEST, OP_IN_TOP, OP_KEEP_RANDOM, OP_MAJORITY_MEAN,
    OP_EXPONENTIAL_LESS_ONE, OP_LOGARITHM_OF_ONE_MORE,
    OP_STORE, OP_SUM, OP_DOT, OP_LARGEST, OP_COUNT, OP_OPPOSED, OP_RANK,
};

/* Of OP_MAJORITY_MEAN. */
enum { BY_FREQUENCY = 1, DIVIDES = 2 };
/* Of a program. */
enum { LOADS_BASE = 1, USES_BASE = 2, HAS_ROW_NUMBERS = 4 };
/* What is asked about a ranked value. */
enum { NOT_ASKED, BAND, BINS, KEEP, SELECT };
enum { MOST_CROWDS = 4 };
/* As what was collected: there was not room enough. */
enum { CRAMMED = -1 };

typedef struct {
    int32_t op;
    int32_t out;       /* a register; of sinks, which of their kind it is */
    int32_t a;         /* a register; of loads, an operand */
    int32_t b;         /* a register; below 0 for none */
    int32_t c;         /* a register; a trim or a stream, below 0 for none */
    int32_t number;    /* the first of its numbers; below 0 for none */
    int32_t first_row; /* OP_MAJORITY_MEAN: of its registers, among the program's rows */
    int32_t n_rows;
    int32_t flags;
} sm_step;

typedef struct {
    const sm_step *steps;
    const int32_t *rows; /* registers of OP_MAJORITY_MEAN, step by step */
    int32_t n_steps;
    int32_t n_rows;
    int32_t n_registers;
    int32_t n_numbers;
    int32_t n_trims;
    int32_t n_streams;
    int32_t n_totals;
    int32_t n_ranked;
    int32_t flags;
    int32_t unused;
} sm_program;

typedef struct {
    const void *values; /* [numel] */
    int64_t dtype;
} sm_operand;

typedef struct {
    int64_t ties;       /* how many at the threshold are kept, the first; INT64_MAX for all of them.
                           Counted down. */
    int64_t kept;       /* set: how many entries were kept */
    float threshold;    /* a magnitude */
    int32_t everything; /* whether nothing is dropped, whatever the threshold says */
} sm_trim;

typedef struct {
    int64_t start;   /* flat index in the tensor of the first entry */
    uint64_t key[2]; /* of the source's stream for the tensor */
    uint64_t limit;  /* a number of 32 bits below it is kept; unused where a row says what is kept */
    int64_t kept;    /* set: how many entries were kept */
} sm_stream;

/* What is asked about a ranked value in one job. Magnitudes are told apart by their bit patterns. */
typedef struct {
    int64_t *histogram;          /* BINS: is added to */
    int64_t k;                   /* SELECT: in [1, numel] */
    int64_t first;               /* set, BAND, KEEP: where what was collected begins in the room */
    int64_t collected;           /* set, BAND, KEEP, SELECT: how many were, or CRAMMED */
    int64_t above;               /* set, BAND, BINS: how many lie above the interval; NaN does.
                                    SELECT: how many are larger than the k-th largest */
    int64_t equal;               /* set, SELECT: how many are as large */
    int64_t crowds[MOST_CROWDS]; /* set, BAND: how many there are of each crowded value */
    int32_t crowded[MOST_CROWDS]; /* BAND: values inside, which are counted, not collected */
    int32_t n_crowded;
    int32_t kind;
    int32_t low; /* BAND, BINS: the interval, with both ends */
    int32_t high;
    int32_t shift;   /* BINS: low bits that share a bin */
    int32_t largest; /* set: the largest value */
    float threshold; /* set, SELECT: the k-th largest; NaN ranks above infinity */
    int32_t unused;
} sm_asked;

/* A product of two factors that is computed before a job, in the place of one of its operands. */
typedef struct {
    const float *up;    /* [rows][rank] */
    const float *tiles; /* of [rank][columns], columns BROAD at a time, and the rest: [rank][width] each */
    int64_t rank;
    int64_t columns;
    float *out;         /* [numel] */
    float scaling;
    int32_t adds;       /* whether it is added to what is there */
} sm_change;

/* Computes some elements, from a flat index of the matrix on. */
void sm_change_range(const sm_change *change, int64_t start, int64_t numel);

typedef struct {
    const sm_program *program;
    const sm_operand *operands; /* the base, if the merge has one; sources; computed rows */
    void *out;                  /* [numel] */
    const float *numbers;       /* [n_numbers]; [rows][n_numbers] if they differ from row to row */
    sm_trim *trims;
    sm_stream *streams;
    sm_asked *asked;            /* one per ranked value */
    double *totals;             /* [rows][n_totals] */
    const sm_change *changes;
    int64_t numel;
    int64_t row_numel;          /* numel where rows do not matter */
    int64_t start;              /* flat index of the first element in the matrix that changes */
    float limit;                /* largest magnitude that fits the output type */
    int32_t out_dtype;
    int32_t refused;            /* set: a value that was loaded is not finite, or a result does not
                                   fit the output type */
    int32_t n_changes;
} sm_job;

/* Where values are collected, for the questions of all jobs of a call. */
typedef struct {
    float *values;
    int64_t size; /* numbers that it holds */
    int64_t used; /* set */
    int32_t done; /* set: how many jobs were done: up to the first for which it was too small */
    int32_t unused;
} sm_room;

#endif
