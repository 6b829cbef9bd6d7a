// The compiled part of a search: rounding rows to 8 bits, inner products in float64, sums of scaled integer products.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"
#include "levels.h"

namespace {

// What rounding a row gave: row = step * (high + low / finer) + rest, of finer steps twice as many as the largest integer.
struct Rounded {
    double step;    // infinite where the row is not finite
    double square;  // squared norm of `high`
    double second;  // squared norm of row - step * high
    double missed;  // squared norm of the rest
};

struct RoundJob {
    const void* values;    // [rows, classes, width] of float16 or float32, rows `stride` values apart
    const float* factors;  // [rows, classes]; values are multiplied by them, in float32
    int8_t *high, *low;    // [classes, rows, width], classes `plane` rows apart; no `low`, no second digit
    Rounded* found;        // [classes, rows], classes `plane` apart
    int64_t rows, classes, width, stride, plane;
    int32_t half;          // whether the values are float16
    int32_t largest;       // integer that a value is rounded to
};

struct DotJob {
    const void* values;    // [any, classes, width] of float16 or float32, rows `stride` values apart
    const float* factors;  // [any, classes]; values are multiplied by them, in float32
    const float* pieces;   // [classes, in a class, any, piece]: the queries, padded with zeros; pieces `apart` floats apart
    const int64_t* rows;   // [pairs]: which row; those of one follow one another
    const int64_t* places; // [pairs]: which query
    float* room;           // [piece]
    double* out;           // [pairs]
    int64_t pairs, classes, width, stride, piece, apart;
    int32_t half;          // whether the values are float16
};

struct ScaleJob {
    const int32_t* products;    // [rows, columns]
    const float *row_steps, *column_steps;
    float* out;                 // [rows, columns]
    int64_t rows, columns;
};

#define KERNELS "search_loops.h"
#define FOR_AMX 0
#define FOR_AVX512 1
#define FOR_AVX2 1
#include "each_level.h"

struct Level {
    void (*round)(const RoundJob&);
    void (*dot)(const DotJob&);
    void (*add_scaled)(const ScaleJob&);
};

#define LEVEL(name) {name::round_rows, name::dot_pairs, name::add_scaled},
constexpr Level LEVELS[] = {EACH_LEVEL(LEVEL)};

}  // namespace

EXPORT void gradstore_round(const RoundJob* job, int level) { LEVELS[level].round(*job); }
EXPORT void gradstore_dot(const DotJob* job, int level) { LEVELS[level].dot(*job); }
EXPORT void gradstore_add_scaled(const ScaleJob* job, int level) { LEVELS[level].add_scaled(*job); }
