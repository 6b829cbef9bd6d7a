// The compiled projection by a dense P: which kernel does a job, and how it is cut into tasks.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include "buffer.h"
#include "levels.h"
#include "projection_job.h"
#include "tasks.h"

namespace {

// The largest tile of K up to `largest` that gives every thread the same number of tiles, unless that makes them small.
int64_t even_tile(int64_t count, int64_t largest, int64_t smallest, int64_t row_tiles, int threads) {
    int64_t k_tiles = tiles(count, largest);
    while (k_tiles * row_tiles % threads && count / k_tiles > smallest) ++k_tiles;
    return tiles(tiles(count, k_tiles), 16) * 16;
}

#define KERNELS "projection_kernels.h"
#define FOR_AMX 0
#define FOR_AVX512 1
#define FOR_AVX2 1
#include "each_level.h"

struct Level {
    void (*rademacher)(const Job&, Range, Range);
    void (*gaussian)(const Job&, Range, Range);
    void (*shared)(const SharedJob&, Range, Range);
};

#define LEVEL(name) {name::rademacher, name::gaussian, name::shared},
constexpr Level LEVELS[] = {EACH_LEVEL(LEVEL)};

Tiling rademacher_tiling(const Job& job, int threads) {
    return {even_tile(job.count, 2560, 512, tiles(job.rows, 256), threads), 256};
}

// Up to 16 MB of float64 totals (more for thousands of classes), 4 MB of sign words and of projected activations a task.
Tiling shared_tiling(const SharedJob& job, int threads) {
    const int64_t lanes = job.classes > 128 ? 16 : 64, outputs = outputs_at_a_time(job);
    const int64_t examples = std::max<int64_t>(1, lanes / job.positions);
    const int64_t totals = examples * job.positions * job.classes * 8, words = outputs * job.inputs / 8 + 64;
    const int64_t fitting = std::min({(16 << 20) / totals, (4 << 20) / words, (4 << 20) / (outputs * 64)});
    const int64_t largest = std::max<int64_t>(64, std::min<int64_t>(1024, fitting));
    return {even_tile(job.weight.count, largest, 256, tiles(job.examples, examples), threads), examples};
}

int useful_threads(double multiply_adds, int threads) { return multiply_adds < 1e7 ? 1 : std::max(threads, 1); }

}  // namespace

// Adds block @ P.T to out. Returns 0, 1 where memory ran out, or 2 for a kind that is not known here.
EXPORT int gradstore_accumulate(const Job* job, int level, int threads) {
    if (job->kind != KIND_RADEMACHER && job->kind != KIND_GAUSSIAN) return 2;
    threads = useful_threads((double)job->rows * job->columns * job->count, threads);
    const bool normals = job->kind == KIND_GAUSSIAN;
    const Tiling tiling = normals ? Tiling{PANEL, 4096} : rademacher_tiling(*job, threads);
    const auto kernel = normals ? LEVELS[level].gaussian : LEVELS[level].rademacher;
    return !run(job->count, job->rows, tiling, threads, [&](Range ks, Range rows) { kernel(*job, ks, rows); });
}

// Adds the projected gradients of a linear layer's weight to out, for signs only. Returns as gradstore_accumulate does.
EXPORT int gradstore_accumulate_shared(const SharedJob* job, int level, int threads) {
    if (job->weight.kind != KIND_RADEMACHER) return 2;
    threads = useful_threads((double)job->weight.rows * job->inputs * job->outputs * job->weight.count, threads);
    const auto kernel = LEVELS[level].shared;
    return !run(job->weight.count, job->examples, shared_tiling(*job, threads), threads,
                [&](Range ks, Range examples) { kernel(*job, ks, examples); });
}
