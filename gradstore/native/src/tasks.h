// A product cut into tiles, and the threads that compute them.
//
// Threads live for one call (starting one takes microseconds, a call milliseconds), so a fork at any time is safe.

#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstdint>
#include <new>
#include <thread>
#include <vector>

#include "projection_job.h"

namespace {

struct Tiling {
    int64_t k, rows;  // the most columns of out and rows that one task takes
};

inline int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

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

}  // namespace
