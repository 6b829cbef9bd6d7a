// Squared norms of rows, in float64 without a copy of the rows in it.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "levels.h"
#include "tasks.h"

namespace {

struct SquaresJob {
    const float* values;  // [rows, columns], rows `stride` floats apart
    double* out;          // [rows]
    int64_t rows, columns, stride;
};

constexpr int SUMS = 32;       // of a row: a column goes to the sum of its number modulo this
constexpr double SMALL = 1e5;  // values that one thread reads before another has begun

#define KERNELS "squares.h"
#define FOR_AMX 0
#define FOR_AVX512 1
#define FOR_AVX2 1
#include "each_level.h"

using SquaresOfRow = double (*)(const float*, int64_t);

#define LEVEL(name) name::squares_of_row,
constexpr SquaresOfRow LEVELS[] = {EACH_LEVEL(LEVEL)};

}  // namespace

EXPORT void gradstore_squares(const SquaresJob* job, int level, int threads) {
    if ((double)job->rows * job->columns < SMALL) threads = 1;
    run(1, job->rows, Tiling{1, 1}, threads, [&](Range, Range row) {
        job->out[row.begin] = LEVELS[level](job->values + row.begin * job->stride, job->columns);
    });
}
