// The compiled projection: the same source at several SIMD levels, the choice among them, and the threads.
//
// A plain C interface: no Python header is needed to build it, and the caller holds no lock while it runs.
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

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "job.h"
#include "../../matrix_unit/src/amx.h"

#if defined(__ARM_NEON)
#include <arm_neon.h>
#define NEON 1
#else
#define NEON 0
#endif

namespace {

// Uninitialised memory for vectors of any width; in huge pages if it is large, as a kernel permits.
template <class T>
struct Buffer {
    T* data;
    size_t bytes;
    explicit Buffer(int64_t count) : bytes(std::max<size_t>(count * sizeof(T), 1)) {
        const size_t page = bytes < (4 << 20) ? 64 : 2 << 20;
        bytes = (bytes + page - 1) / page * page;
        data = static_cast<T*>(std::aligned_alloc(page, bytes));
        if (!data) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        if (page > 64) madvise(data, bytes, MADV_HUGEPAGE);
#endif
    }
    void clear() { memset(static_cast<void*>(data), 0, bytes); }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

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

#if defined(__x86_64__)
#define VECTOR_BYTES 64
#if HAS_AMX
BEGIN_TARGET(AMX_INT8_TARGET)
namespace amx {
#include "../../matrix_unit/src/tiles.h"
#include "philox.h"
#include "normals.h"
#include "gaussian_amx.h"
}  // namespace amx
END_TARGET
#endif
BEGIN_TARGET("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,bmi,bmi2" WHOLE_REGISTERS)
namespace avx512 {
#include "philox.h"
#include "rademacher.h"
#include "normals.h"
#include "gaussian.h"
#include "shared.h"
}  // namespace avx512
END_TARGET
#undef VECTOR_BYTES
#define VECTOR_BYTES 32
BEGIN_TARGET("avx2,fma,bmi,bmi2")
namespace avx2 {
#include "philox.h"
#include "rademacher.h"
#include "normals.h"
#include "gaussian.h"
#include "shared.h"
}  // namespace avx2
END_TARGET
#undef VECTOR_BYTES
#endif

#define VECTOR_BYTES 16
namespace baseline {
#include "philox.h"
#include "rademacher.h"
#include "normals.h"
#include "gaussian.h"
#include "shared.h"
}  // namespace baseline
#undef VECTOR_BYTES

template <void (*compute)(const Job&, Range, Range), int PANEL>
bool by_panels(const Job& job, int threads) {
    return run(job.count, job.rows, {PANEL, 4096}, threads, [&](Range ks, Range rows) { compute(job, ks, rows); });
}

struct Level {
    const char* name;
    bool available;
    void (*rademacher)(const Job&, Range, Range);
    bool (*gaussian)(const Job&, int threads);  // false where memory ran out
    void (*shared)(const SharedJob&, Range, Range);
};

#if defined(__x86_64__)
bool avx512_available() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2");
}
#endif

const std::vector<Level>& levels() {
    static const std::vector<Level> all = {
#if HAS_AMX
        {"amx", avx512_available() && amx_int8_available(), avx512::rademacher, amx::gaussian, avx512::shared},
#endif
#if defined(__x86_64__)
        {"avx512", avx512_available(), avx512::rademacher, by_panels<avx512::gaussian, avx512::PANEL>, avx512::shared},
        {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"),
         avx2::rademacher, by_panels<avx2::gaussian, avx2::PANEL>, avx2::shared},
#endif
        {NEON ? "neon" : "plain", true, baseline::rademacher, by_panels<baseline::gaussian, baseline::PANEL>, baseline::shared},
    };
    return all;
}

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

#define EXPORT extern "C" __attribute__((visibility("default")))

// What this library and its caller must agree on: the structures in job.h and the functions below.
EXPORT int gradstore_interface() { return 3; }

// The name of SIMD level `index`, fastest first; null after the last. `available` says whether this processor has it.
EXPORT const char* gradstore_level(int index, int* available) {
    if (index < 0 || index >= (int)levels().size()) return nullptr;
    *available = levels()[index].available;
    return levels()[index].name;
}

// Adds block @ P.T to out. Returns 0, or 1 where memory ran out.
EXPORT int gradstore_accumulate(const Job* job, int level, int threads) {
    threads = useful_threads((double)job->rows * job->columns * job->count, threads);
    try {
        if (job->kind == KIND_GAUSSIAN) return !levels()[level].gaussian(*job, threads);
        return !run(job->count, job->rows, rademacher_tiling(*job, threads), threads,
                    [&](Range ks, Range rows) { levels()[level].rademacher(*job, ks, rows); });
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// Adds the projected gradients of a linear layer's weight to out, for signs only. Returns 0, or 1 where memory ran out.
EXPORT int gradstore_accumulate_shared(const SharedJob* job, int level, int threads) {
    threads = useful_threads((double)job->weight.rows * job->inputs * job->outputs * job->weight.count, threads);
    const auto kernel = levels()[level].shared;
    return !run(job->weight.count, job->examples, shared_tiling(*job, threads), threads,
                [&](Range ks, Range examples) { kernel(*job, ks, examples); });
}
