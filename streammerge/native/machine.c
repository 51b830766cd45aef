/* Runs programs over tiles: see streammerge/tiles/program.py for what the steps do.
 *
 * A row of a job goes through all steps tile by tile. A register is a pointer to a row of a tile: its
 * own memory, or the tile of the base, which all steps share.
 */
#include "machine.h"
#include "asking.h"
#include "majority.h"
#include "placed.h"
#include "product.h"
#include "totals.h"

enum { CACHE_LINE = 64 };

/* A run of one job. */
typedef struct {
    const sm_job *job;
    const sm_program *program;
    const float *numbers; /* of the row */
    const float **rows;   /* [n_registers] */
    const float **gathered; /* [n_rows] */
    float *own;           /* [n_registers][ROW] */
    float *base;          /* [ROW] */
    double *sums;         /* [n_totals][SUMS] */
    place *places;        /* [n_ranked] */
    uint8_t *wanted;      /* [n_registers] */
    uint8_t *live;        /* [n_steps] */
    float *values;        /* of the room */
    int64_t at;           /* element of the job */
    int64_t count;        /* elements of the tile */
    int32_t operands;     /* the largest magnitude that was loaded */
    int32_t results;      /* the largest that was stored */
} run;

/* Loads a tile; returns the largest magnitude. */
ALWAYS_INLINE int32_t load_checked_typed(float *restrict row, const void *values, enum dtype dtype,
                                         int64_t at, int64_t count) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        float value = load(values, dtype, at + i);
        int32_t magnitude = magnitude_of(value);
        largest = magnitude > largest ? magnitude : largest;
        row[i] = value;
    }
    return largest;
}

/* A source's value minus the base's, or the difference that it is. */
ALWAYS_INLINE float difference(const void *values, enum dtype dtype, int64_t at, float base) {
    if (dtype == DIFFERENCE) return ((const float *)values)[at];
    return load(values, dtype, at) - base;
}

/* Loads a tile minus the base. */
ALWAYS_INLINE int32_t subtract_typed(float *restrict row, const void *values, enum dtype dtype,
                                     int64_t at, const float *restrict base, int64_t count) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        float value = difference(values, dtype, at + i, base[i]);
        int32_t magnitude = magnitude_of(value);
        largest = magnitude > largest ? magnitude : largest;
        row[i] = value;
    }
    return largest;
}

/* Loads a tile minus the base, without what is smaller than `floor`. */
ALWAYS_INLINE int32_t trim_typed(float *restrict row, const void *values, enum dtype dtype,
                                 int64_t at, const float *restrict base, int64_t count,
                                 int32_t floor, int64_t *kept) {
    int32_t largest = 0, chosen = 0;
    for (int64_t i = 0; i < count; i++) {
        float value = difference(values, dtype, at + i, base[i]);
        int32_t magnitude = magnitude_of(value);
        largest = magnitude > largest ? magnitude : largest;
        chosen += magnitude >= floor;
        row[i] = magnitude >= floor ? value : 0.0f;
    }
    *kept += chosen;
    return largest;
}

/* Of operands of which the base is subtracted. */
#define SUBTRACTED(dtype, CALL)               \
    switch (dtype) {                          \
        case DIFFERENCE: CALL(DIFFERENCE); break; \
        default: TYPED(dtype, CALL)           \
    }

#define TYPED(dtype, CALL)           \
    switch (dtype) {                 \
        case BF16: CALL(BF16); break; \
        case F16: CALL(F16); break;   \
        default: CALL(F32);           \
    }

ALWAYS_INLINE int32_t load_checked(float *row, sm_operand from, int64_t at, int64_t count) {
    int32_t largest;
#define CALL(DTYPE) largest = load_checked_typed(row, from.values, DTYPE, at, count)
    TYPED(from.dtype, CALL)
#undef CALL
    return largest;
}

/* Drops what a trim drops while it loads; only a row in which ties end is looked at once more. */
ALWAYS_INLINE int32_t load_trimmed(float *row, sm_operand from, int64_t at, const float *base,
                                   int64_t count, sm_trim *trim) {
    int32_t largest, floor = floor_of(trim);
    int64_t kept = 0;
#define CALL(DTYPE) largest = trim_typed(row, from.values, DTYPE, at, base, count, floor, &kept)
    SUBTRACTED(from.dtype, CALL)
#undef CALL
    if (parts_ties(row, count, trim)) {
        keep_first_ties(row, row, count, trim, 0);
    } else {
        trim->kept += kept;
    }
    return largest;
}

ALWAYS_INLINE int32_t load_task_vector(float *row, sm_operand from, int64_t at, const float *base,
                                       int64_t count) {
    int32_t largest;
#define CALL(DTYPE) largest = subtract_typed(row, from.values, DTYPE, at, base, count)
    SUBTRACTED(from.dtype, CALL)
#undef CALL
    return largest;
}

/* Adds a base, if there is one, and stores; returns the largest magnitude. */
ALWAYS_INLINE int32_t store_typed(void *restrict out, enum dtype dtype, int64_t at,
                                  const float *merged, const float *base, int64_t count) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        float value = base ? base[i] + merged[i] : merged[i];
        int32_t magnitude = magnitude_of(value);
        largest = magnitude > largest ? magnitude : largest;
        if (dtype == BF16) {
            ((uint16_t *)out)[at + i] = bfloat16_of(value);
        } else if (dtype == F16) {
            ((uint16_t *)out)[at + i] = half_of(value);
        } else {
            ((float *)out)[at + i] = value;
        }
    }
    return largest;
}

ALWAYS_INLINE int32_t store(const sm_job *job, int64_t at, const float *merged, const float *base,
                            int64_t count) {
    int32_t largest;
#define CALL(DTYPE) largest = base ? store_typed(job->out, DTYPE, at, merged, base, count) \
                                   : store_typed(job->out, DTYPE, at, merged, 0, count)
    TYPED(job->out_dtype, CALL)
#undef CALL
    return largest;
}

#undef SUBTRACTED
#undef TYPED

ALWAYS_INLINE int32_t larger_of(int32_t a, int32_t b) { return a > b ? a : b; }

/* Averages the rows of a step; `numbers` are its own. */
ALWAYS_INLINE void average_step(run *now, const sm_step *step, float *out, const float *numbers) {
    const int32_t *registers = now->program->rows + step->first_row;
    for (int32_t k = 0; k < step->n_rows; k++) now->gathered[k] = now->rows[registers[k]];
    average_majority_of(out, now->gathered, step->n_rows, numbers, now->count, step->flags);
}

ALWAYS_INLINE void load_step(run *now, const sm_step *step, float *out) {
    const sm_job *job = now->job;
    int32_t largest = 0;
    switch (step->op) {
        case OP_BASE:
            /* No copy: nothing writes to the base's tile but the next load. */
            now->rows[step->out] = now->base;
            return;
        case OP_SOURCE:
            largest = load_checked(out, job->operands[step->a], now->at, now->count);
            break;
        case OP_COMPUTED:
            load_tile(out, job->operands[step->a].values, F32, now->at, now->count);
            break;
        default:
            if (step->c >= 0) {
                largest = load_trimmed(out, job->operands[step->a], now->at, now->base, now->count,
                                       &job->trims[step->c]);
            } else {
                largest = load_task_vector(out, job->operands[step->a], now->at, now->base,
                                           now->count);
            }
    }
    now->operands = larger_of(largest, now->operands);
}

/* Does one step to one tile. */
ALWAYS_INLINE void do_step(run *now, const sm_step *step) {
    const sm_job *job = now->job;
    const float **rows = now->rows;
    const float *numbers = step->number >= 0 ? now->numbers + step->number : 0;
    int64_t count = now->count;
    enum op op = (enum op)step->op;
    if (op <= OP_COMPUTED) {
        float *out = now->own + step->out * ROW;
        rows[step->out] = out;
        load_step(now, step, out);
        return;
    }
    const float *a = step->a >= 0 ? rows[step->a] : 0;
    const float *b = step->b >= 0 ? rows[step->b] : 0;
    if (op == OP_STORE) {
        now->results = larger_of(store(job, now->at, a, b, count), now->results);
        return;
    }
    if (op == OP_RANK) {
        answer_tile(&job->asked[step->out], a, count, now->values, now->places[step->out]);
        return;
    }
    if (op >= OP_SUM) {
        total_tile(op, now->sums + step->out * SUMS, a, b, count);
        return;
    }
    const float *c = op == OP_SELECT ? rows[step->c] : 0;
    float *out = now->own + step->out * ROW;
    switch (op) {
        case OP_FILL: EACH(i, count) out[i] = numbers[0]; break;
        case OP_ADD_SCALED: add_scaled(out, a, b, numbers[0], count); break;
        case OP_SELECT: select_rows(out, a, b, c, count); break;
        case OP_KEEP_LARGEST: trim_row(out, a, count, &job->trims[step->c], 0); break;
        case OP_IN_TOP: trim_row(out, a, count, &job->trims[step->c], 1); break;
        case OP_KEEP_RANDOM:
            keep_by_chance(out, a, b, now->at, count, &job->streams[step->c]);
            break;
        case OP_MAJORITY_MEAN: average_step(now, step, out, numbers); break;
        case OP_ADD:
        case OP_SUBTRACT:
        case OP_MULTIPLY:
        case OP_DIVIDE:
        case OP_MINIMUM:
        case OP_MAXIMUM:
        case OP_GREATER:
        case OP_AT_LEAST:
        case OP_EQUAL: compute_binary(op, out, a, b, b ? 0.0f : numbers[0], count); break;
        default: compute_unary(op, out, a, count);
    }
    /* Only now: the step may have read the base's tile through it. */
    rows[step->out] = out;
}

ALWAYS_INLINE void run_row(run *now, int64_t end) {
    const sm_program *program = now->program;
    for (; now->at < end; now->at += now->count) {
        now->count = end - now->at < TILE ? end - now->at : TILE;
        if (program->flags & LOADS_BASE) {
            int32_t largest = load_checked(now->base, now->job->operands[0], now->at, now->count);
            if (program->flags & USES_BASE) now->operands = larger_of(largest, now->operands);
        }
        for (int32_t i = 0; i < program->n_steps; i++)
            if (now->live[i]) do_step(now, &program->steps[i]);
    }
}

ALWAYS_INLINE void want(run *now, int32_t place) {
    if (place >= 0) now->wanted[place] = 1;
}

/* Finds the steps that something depends on which is asked for. */
ALWAYS_INLINE void find_live(run *now) {
    const sm_program *program = now->program;
    memset(now->live, 1, (size_t)program->n_steps);
    int asked_all = 1;
    for (int32_t i = 0; i < program->n_ranked; i++)
        asked_all &= now->job->asked[i].kind != NOT_ASKED;
    if (asked_all) return;
    memset(now->wanted, 0, (size_t)program->n_registers);
    for (int32_t i = program->n_steps - 1; i >= 0; i--) {
        const sm_step *step = &program->steps[i];
        if (step->op == OP_RANK) {
            now->live[i] = now->job->asked[step->out].kind != NOT_ASKED;
        } else if (step->op < OP_STORE) {
            now->live[i] = now->wanted[step->out];
            now->wanted[step->out] = 0;
        }
        if (!now->live[i] || step->op <= OP_COMPUTED) continue;
        want(now, step->a);
        want(now, step->b);
        if (step->op == OP_SELECT) want(now, step->c);
        for (int32_t k = 0; k < step->n_rows; k++) want(now, program->rows[step->first_row + k]);
    }
}

/* The first place at or behind `from` that is aligned to a line of the cache. */
ALWAYS_INLINE char *aligned(char *from) {
    return from + (CACHE_LINE - (uintptr_t)from % CACHE_LINE) % CACHE_LINE;
}

/* Divides memory: as count_memory in streammerge/native/machine.py counts. */
ALWAYS_INLINE void divide_memory(run *now, float *memory) {
    const sm_program *program = now->program;
    char *free = aligned((char *)memory);
#define TAKE(WHAT, COUNT) \
    (now->WHAT = (void *)free, free = aligned(free + (size_t)(COUNT) * sizeof *now->WHAT))
    TAKE(base, ROW);
    TAKE(own, program->n_registers * ROW);
    TAKE(sums, program->n_totals * SUMS);
    TAKE(rows, program->n_registers);
    TAKE(gathered, program->n_rows);
    TAKE(places, program->n_ranked);
    TAKE(wanted, program->n_registers);
    TAKE(live, program->n_steps);
#undef TAKE
}

ALWAYS_INLINE void begin_totals(run *now) {
    for (int32_t i = 0; i < now->program->n_steps; i++) {
        const sm_step *step = &now->program->steps[i];
        if (step->op >= OP_SUM && step->op <= OP_OPPOSED)
            begin_total((enum op)step->op, now->sums + step->out * SUMS);
    }
}

ALWAYS_INLINE void end_totals(run *now, double *totals) {
    for (int32_t i = 0; i < now->program->n_steps; i++) {
        const sm_step *step = &now->program->steps[i];
        if (step->op >= OP_SUM && step->op <= OP_OPPOSED)
            totals[step->out] = end_total((enum op)step->op, now->sums + step->out * SUMS);
    }
}

/* Runs a job, row by row; returns whether there was room for all that was to be collected. */
ALWAYS_INLINE int run_job(sm_job *job, float *memory, sm_room *room) {
    const sm_program *program = job->program;
    run now = {.job = job, .program = program, .numbers = job->numbers};
    int64_t n_rows = job->row_numel ? job->numel / job->row_numel : 1;
    divide_memory(&now, memory);
    for (int32_t i = 0; i < job->n_changes; i++)
        sm_change_range(&job->changes[i], job->start, job->numel);
    for (int32_t i = 0; i < program->n_trims; i++) job->trims[i].kept = 0;
    for (int32_t i = 0; i < program->n_streams; i++) job->streams[i].kept = 0;
    if (program->n_ranked) {
        begin_answers(job->asked, now.places, program->n_ranked, job->numel, room);
        now.values = room ? room->values : 0;
    }
    find_live(&now);
    for (int64_t row = 0; row < n_rows; row++) {
        begin_totals(&now);
        run_row(&now, (row + 1) * job->row_numel);
        end_totals(&now, job->totals + row * program->n_totals);
        if (program->flags & HAS_ROW_NUMBERS) now.numbers += program->n_numbers;
    }
    job->refused = now.operands >= INFINITY_BITS || now.results > magnitude_of(job->limit);
    return program->n_ranked == 0 || end_answers(job->asked, now.places, program->n_ranked, room);
}

/* Runs jobs, in order; returns how many of those that were done are refused.
 *
 * What was written for those is not to be used: the caller looks for what is wrong.
 * `memory` has what count_memory counts for the largest program. `room`, which may be null where nothing
 * is collected, receives what questions collect, job by job and question by question. The first job in
 * which it is too small for one of them is the last that is done. It is enough for the first job, with a
 * single question, if it holds as many numbers as that has elements.
 */
FOR_EVERY_CPU
int32_t sm_run(sm_job *jobs, int32_t count, float *memory, sm_room *room) {
    int32_t refused = 0, done = 0, fits = 1;
    if (room) room->used = 0;
    while (done < count && fits) {
        fits = run_job(&jobs[done], memory, room);
        refused += jobs[done++].refused;
    }
    if (room) room->done = done;
    return refused;
}

/* Tells the caller whether both mean the same by a call. */
int32_t sm_machine_size_of(int32_t what) {
    static const int32_t sizes[] = {
        sizeof(sm_step),  sizeof(sm_program), sizeof(sm_operand), sizeof(sm_trim), sizeof(sm_stream),
        sizeof(sm_asked), sizeof(sm_change),  sizeof(sm_job),     sizeof(sm_room), sizeof(place),
        ROW,              MOST_CROWDS,        SUMS,               BROAD,
    };
    return sizes[what];
}
