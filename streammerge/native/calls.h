/* What the kernels are called with; each has its twin in streammerge/native/library.py. */
#ifndef STREAMMERGE_CALLS_H
#define STREAMMERGE_CALLS_H

#include <stdint.h>

enum keep { KEEP_ALL = 0, KEEP_LARGEST = 1, KEEP_RANDOM = 2 };
enum combine { SUM = 0, MAJORITY_TOTAL = 1, MAJORITY_FREQUENCY = 2 };
enum { SOURCES_AT_MOST = 16, CROWDS_AT_MOST = 4 };

typedef struct {
    const void *values;   /* [numel] */
    int64_t ties;         /* KEEP_LARGEST: how many entries at the threshold are kept, the first;
                             INT64_MAX for all of them. Counted down. */
    int64_t start;        /* KEEP_RANDOM: flat index in the tensor of the first entry */
    uint64_t key[2];      /* KEEP_RANDOM: of the source's stream for the tensor */
    int64_t kept;         /* set: how many entries were kept */
    float weight;
    float threshold;      /* KEEP_LARGEST: a magnitude */
    float density;        /* KEEP_RANDOM: what is kept is divided by it */
    int32_t upper_limit;  /* KEEP_RANDOM: a number of 32 bits below upper * 2^16 + lower is kept */
    int32_t lower_limit;
    int32_t keep;
    int32_t dtype;
} sm_source;

typedef struct {
    sm_source *sources;
    const void *base;  /* [numel]; null where operands are the values themselves */
    void *out;         /* [numel] */
    int64_t numel;
    float divisor;     /* of the sum; 1 for none */
    float limit;       /* largest magnitude that fits the output type */
    int32_t n_sources;
    int32_t base_dtype;
    int32_t out_dtype;
    int32_t combine;
    int32_t refused;   /* set: an operand is not finite, or a result does not fit the output type */
} sm_merge;

typedef struct {
    const void *values;       /* [numel] */
    const void *base;         /* [numel] */
    int64_t *histogram;       /* for bins */
    int64_t numel;
    int64_t above;            /* set: how many magnitudes lie above the interval; NaN does */
    int64_t inside;           /* set: how many were collected */
    int64_t crowds[CROWDS_AT_MOST]; /* set: how many there are of each crowded magnitude */
    int32_t crowded[CROWDS_AT_MOST]; /* bit patterns inside, which are counted, not collected */
    int32_t n_crowded;
    int32_t low;              /* the interval, as bit patterns, with both ends */
    int32_t high;
    int32_t shift;            /* low bits that share a bin */
    int32_t dtype;
    int32_t base_dtype;
    int32_t largest;          /* set: the largest bit pattern */
} sm_question;

typedef struct {
    const void *values;  /* [numel] */
    const void *base;    /* [numel] */
    int64_t numel;
    int64_t k;           /* in [1, numel] */
    int64_t greater;     /* set: how many magnitudes are larger than the k-th largest */
    int64_t equal;       /* set: how many are as large */
    float threshold;     /* set: the k-th largest magnitude; NaN ranks above infinity */
    int32_t dtype;
    int32_t base_dtype;
} sm_selection;

#endif
