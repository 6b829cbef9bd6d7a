// The compiled projection by a sparse P (SJLT): its codes for some parameters at a time, then what they do to all rows.

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "buffer.h"
#include "levels.h"
#include "projection_job.h"
#include "tasks.h"

namespace {

constexpr int64_t SPARSE_BLOCK = 1024;          // rows of P that hold one non-zero of a column
constexpr float SPARSE_SCALE = 32;              // its size, the root of that
constexpr uint64_t SPARSE_DOMAIN = 1ull << 31;  // the third word of its counter, of blocks 0 to 3
constexpr int64_t SPARSE_SPAN = 1 << 16;        // parameters whose codes are held
constexpr int64_t BLOCKS_AT_ONCE = 16;          // blocks whose codes are held: 2 MB, and up to 1 MB of sums a thread
constexpr int64_t CODES_A_TASK = 1 << 12;

#define KERNELS "sparse_kernels.h"
#define FOR_AMX 0
#define FOR_AVX512 1
#define FOR_AVX2 1
#include "each_level.h"

struct Level {
    void (*codes)(uint16_t*, int64_t, uint64_t, int64_t, uint64_t, int, const Job&);
    void (*dense)(const Job&, const SparseTask&);
    void (*outer)(const SharedJob&, const SparseTask&);
};

#define LEVEL(name) {name::make_codes, name::add_dense, name::add_outer},
constexpr Level LEVELS[] = {EACH_LEVEL(LEVEL)};

// Rows of out and columns of gradients; add(task) for groups of 16 rows and some blocks each. False where memory ran out.
template <class Add>
bool add_spans(const Job& job, int64_t rows, int64_t columns, int level, int threads, const Add& add) {
    if ((double)rows * columns * ((double)job.count / SPARSE_BLOCK + 1) < 1e6) threads = 1;
    const int64_t first = job.first_k / SPARSE_BLOCK, last = (job.first_k + job.count - 1) / SPARSE_BLOCK + 1;
    const int64_t groups = tiles(rows, ROWS_A_TASK), stride = std::min(SPARSE_SPAN, columns);
    Buffer<uint16_t> codes(std::min(BLOCKS_AT_ONCE, last - first / 4 * 4) * stride);
    for (int64_t block = first / 4 * 4; block < last; block += BLOCKS_AT_ONCE) {
        const Range blocks{std::max(block, first), std::min(block + BLOCKS_AT_ONCE, last)};
        const int64_t parts = std::max<int64_t>(1, std::min(threads / groups, blocks.end - blocks.begin));
        const Tiling tile{tiles(blocks.end - blocks.begin, parts), 1};
        const uint64_t stop = job.start + columns;
        for (uint64_t p = job.start; p < stop;) {
            const uint64_t end = std::min<uint64_t>(stop, (p / SPARSE_SPAN + 1) * SPARSE_SPAN);
            const int64_t count = end - p, quads = tiles(blocks.end - block, 4);
            const bool made = run(count, quads, Tiling{CODES_A_TASK, 1}, threads, [&](Range some, Range quad) {
                const int of_quad = (int)std::min<int64_t>(4, blocks.end - block - quad.begin * 4);
                uint16_t* to = codes.data + quad.begin * 4 * stride + some.begin;
                LEVELS[level].codes(to, stride, p + some.begin, some.end - some.begin, block / 4 + quad.begin, of_quad, job);
            });
            if (!made) return false;
            const bool added = run(blocks.end - blocks.begin, groups, tile, threads, [&](Range part, Range group) {
                const int64_t row = group.begin * ROWS_A_TASK;
                const Range taken{blocks.begin + part.begin, blocks.begin + part.end};
                const uint16_t* theirs = codes.data + (taken.begin - block) * stride;
                add({theirs, stride, taken, (int64_t)(p - job.start), count, row, std::min(ROWS_A_TASK, rows - row)});
            });
            if (!added) return false;
            p = end;
        }
    }
    return true;
}

}  // namespace

bool accumulate_sparse(const Job& job, int level, int threads) {
    return add_spans(job, job.rows, job.columns, level, threads,
                     [&](const SparseTask& task) { LEVELS[level].dense(job, task); });
}

bool accumulate_sparse_outer(const SharedJob& job, int level, int threads) {
    return add_spans(job.weight, job.examples * job.classes, job.outputs * job.inputs, level, threads,
                     [&](const SparseTask& task) { LEVELS[level].outer(job, task); });
}
