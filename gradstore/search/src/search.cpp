// The compiled part of a search: rounding rows to 8 bits, inner products in float64, sums of scaled integer products.
//
// A plain C interface, as that of the projection: no Python header is needed, and the caller holds no lock meanwhile.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../matrix_unit/src/half.h"
#include "../../matrix_unit/src/simd.h"

namespace {

// What rounding a row gave: row = step * (high + low / FINER) + rest.
struct Rounded {
    double step;    // infinite where the row is not finite
    double square;  // squared norm of `high`
    double second;  // squared norm of row - step * high
    double missed;  // squared norm of the rest
};

constexpr float FINER = 254;  // half a step is 127 of the finer ones

struct RoundJob {
    const void* values;    // [rows, classes, width] of float16 or float32, rows `stride` values apart
    const float* factors;  // [rows, classes]; values are multiplied by them, in float32
    int8_t *high, *low;    // [classes, rows, width], classes `plane` rows apart; no `low`, no second digit
    Rounded* found;        // [classes, rows], classes `plane` apart
    int64_t rows, classes, width, stride, plane;
    int32_t half;          // whether the values are float16
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
    const int32_t *high, *low, *also_low;  // [rows, columns]
    const float *row_steps, *column_steps;
    float* out;                 // [rows, columns]
    int64_t rows, columns;
};

#if defined(__x86_64__)
#define VECTOR_BYTES 64
BEGIN_TARGET("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c" WHOLE_REGISTERS)
namespace avx512 {
#include "kernels.h"
}  // namespace avx512
END_TARGET
#undef VECTOR_BYTES
#define VECTOR_BYTES 32
BEGIN_TARGET("avx2,fma,f16c")
namespace avx2 {
#include "kernels.h"
}  // namespace avx2
END_TARGET
#undef VECTOR_BYTES
#endif

#define VECTOR_BYTES 16
namespace baseline {
#include "kernels.h"
}  // namespace baseline
#undef VECTOR_BYTES

struct Level {
    const char* name;
    bool available;
    void (*round)(const RoundJob&);
    void (*dot)(const DotJob&);
    void (*add_scaled)(const ScaleJob&);
};

const Level LEVELS[] = {
#if defined(__x86_64__)
    {"avx512",
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
     avx512::round_rows, avx512::dot_pairs, avx512::add_scaled},
    // Every processor with AVX2 converts float16.
    {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::round_rows, avx2::dot_pairs,
     avx2::add_scaled},
#endif
    {"plain", true, baseline::round_rows, baseline::dot_pairs, baseline::add_scaled},
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int gradstore_search_interface() { return 2; }

// The name of a level, fastest first, and whether this processor has it; null past the last.
EXPORT const char* gradstore_search_level(int index, int* available) {
    if (index < 0 || index >= (int)(sizeof(LEVELS) / sizeof(Level))) return nullptr;
    *available = LEVELS[index].available;
    return LEVELS[index].name;
}

EXPORT void gradstore_round(const RoundJob* job, int level) { LEVELS[level].round(*job); }
EXPORT void gradstore_dot(const DotJob* job, int level) { LEVELS[level].dot(*job); }
EXPORT void gradstore_add_scaled(const ScaleJob* job, int level) { LEVELS[level].add_scaled(*job); }
