// The compiled projection: which kernel does a job, and its threads.
//
// Threads live for one call (starting one takes microseconds, a call milliseconds), so a fork at any time is safe.

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "buffer.h"
#include "levels.h"
#include "projection_job.h"

namespace {

struct Tiling {
    int64_t k, rows;  // the most columns of out and rows that one task takes
};

int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// The largest tile of K up to `largest` that gives every thread the same number of tiles, unless that makes them small.
int64_t even_tile(int64_t count, int64_t largest, int64_t smallest, int64_t row_tiles, int threads) {
    int64_t k_tiles = tiles(count, largest);
    while (k_tiles * row_tiles % threads && count / k_tiles > smallest) ++k_tiles;
    return tiles(tiles(count, k_tiles), 16) * 16;
}

// Calls compute(ks, rows) for every tile, on up to `threads` threads; false where memory ran out.
template <class Compute>
bool run(int64_t count, int64_t rows, Tiling tile, int threads, const Compute& compute) {
    const int64_t k_tiles = tiles(count, tile.k), tasks = k_tiles * tiles(rows, tile.rows);
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    const auto work = [&] {
        fenv_t environment;
        feholdexcept(&environment);
        fesetenv(FE_DFL_ENV);  // a caller that flushes subnormals must not change the result
        try {
            for (int64_t task; !failed && (task = next++) < tasks;) {
                const int64_t k = task % k_tiles * tile.k, row = task / k_tiles * tile.rows;
                compute(Range{k, std::min(k + tile.k, count)}, Range{row, std::min(row + tile.rows, rows)});
            }
        } catch (const std::bad_alloc&) {
            failed = true;
        }
        fesetenv(&environment);
    };
    std::vector<std::thread> others;
    try {
        while ((int64_t)others.size() + 1 < std::min<int64_t>(threads, tasks)) others.emplace_back(work);
    } catch (const std::exception&) {  // fewer threads than asked for: the rest of the work is done here
    }
    work();
    for (std::thread& thread : others) thread.join();
    return !failed;
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

// Adds block @ P.T to out. Returns 0, or 1 where memory ran out.
EXPORT int gradstore_accumulate(const Job* job, int level, int threads) {
    threads = useful_threads((double)job->rows * job->columns * job->count, threads);
    const bool normals = job->kind == KIND_GAUSSIAN;
    const Tiling tiling = normals ? Tiling{PANEL, 4096} : rademacher_tiling(*job, threads);
    const auto kernel = normals ? LEVELS[level].gaussian : LEVELS[level].rademacher;
    return !run(job->count, job->rows, tiling, threads, [&](Range ks, Range rows) { kernel(*job, ks, rows); });
}

// Adds the projected gradients of a linear layer's weight to out, for signs only. Returns 0, or 1 where memory ran out.
EXPORT int gradstore_accumulate_shared(const SharedJob* job, int level, int threads) {
    threads = useful_threads((double)job->weight.rows * job->inputs * job->outputs * job->weight.count, threads);
    const auto kernel = LEVELS[level].shared;
    return !run(job->weight.count, job->examples, shared_tiling(*job, threads), threads,
                [&](Range ks, Range examples) { kernel(*job, ks, examples); });
}
