// The compiled projection by a sparse P (SJLT): its codes for some parameters at a time, then what they do to all rows.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "levels.h"
#include "sparse_job.h"
#include "tasks.h"

namespace {

constexpr int64_t SPARSE_BLOCK = 1024;          // rows of P that hold one non-zero of a column
constexpr float SPARSE_SCALE = 32;              // its size, the root of that
constexpr uint64_t SPARSE_DOMAIN = 1ull << 31;  // the third word of its counter, of blocks 0 to 3
constexpr int OF_COUNTER = 4;                   // blocks whose non-zeros come from one counter
constexpr int64_t SPARSE_SPAN = 1 << 16;        // columns whose codes are held, and that are added up before they go to out
constexpr int64_t BLOCKS_AT_ONCE = 16;          // blocks whose codes are held: 2 MB, and up to 1 MB of sums a thread
constexpr int64_t CODES_A_TASK = 1 << 12;
constexpr int64_t ROWS_A_TASK = 16;
constexpr double SMALL = 1e6;  // additions that one thread does before another has begun

#define KERNELS "sparse_kernels.h"
#define FOR_AMX 0
#define FOR_AVX512 1
#define FOR_AVX2 1
#include "each_level.h"

struct Level {
    void (*codes)(uint16_t*, int64_t, uint64_t, int64_t, uint64_t, int, const SparseJob&);
    void (*add)(const SparseJob&, const SparseTask&);
};

#define LEVEL(name) {name::make_codes, name::add_task},
constexpr Level LEVELS[] = {EACH_LEVEL(LEVEL)};

// The segments in order, SPARSE_SPAN columns at a time: their bits depend on where these are cut, and that on shapes alone.
std::vector<std::vector<Part>> spans_of(const SparseJob& job) {
    std::vector<std::vector<Part>> spans;
    int64_t filled = SPARSE_SPAN;
    for (const Segment* segment = job.segments; segment < job.segments + job.segment_count; ++segment) {
        for (int64_t column = 0; column < segment->columns;) {
            if (filled == SPARSE_SPAN) {
                spans.emplace_back();
                filled = 0;
            }
            const int64_t columns = std::min(segment->columns - column, SPARSE_SPAN - filled);
            spans.back().push_back({segment, column, columns, filled});
            column += columns;
            filled += columns;
        }
    }
    return spans;
}

// Codes of all parts for blocks [first, last), `first` a multiple of OF_COUNTER; false where memory ran out.
bool make_codes(const SparseJob& job, const std::vector<Part>& parts, Range blocks, uint16_t* codes, int64_t stride, int level,
                int threads) {
    std::vector<Part> pieces;
    for (const Part& part : parts) {
        for (int64_t at = 0; at < part.columns; at += CODES_A_TASK) {
            const int64_t columns = std::min(CODES_A_TASK, part.columns - at);
            pieces.push_back({part.segment, part.column + at, columns, part.codes + at});
        }
    }
    const int64_t counters = tiles(blocks.end - blocks.begin, OF_COUNTER);
    return run((int64_t)pieces.size(), counters, Tiling{1, 1}, threads, [&](Range piece, Range counter) {
        const Part& part = pieces[piece.begin];
        const int64_t block = blocks.begin + counter.begin * OF_COUNTER;
        uint16_t* to = codes + (block - blocks.begin) * stride + part.codes;
        LEVELS[level].codes(to, stride, part.segment->start + part.column, part.columns, block / OF_COUNTER,
                            (int)std::min<int64_t>(OF_COUNTER, blocks.end - block), job);
    });
}

// Blocks [blocks.begin, blocks.end) of out over one span; codes[0] belongs to block `first`.
bool add_span(const SparseJob& job, const std::vector<Part>& parts, Range blocks, const uint16_t* codes, int64_t stride,
              int level, int threads) {
    const int64_t groups = tiles(job.rows, ROWS_A_TASK), count = blocks.end - blocks.begin;
    const int64_t pieces = std::max<int64_t>(1, std::min(threads / groups, count));
    return run(count, groups, Tiling{tiles(count, pieces), 1}, threads, [&](Range some, Range group) {
        const int64_t row = group.begin * ROWS_A_TASK;
        const Range taken{blocks.begin + some.begin, blocks.begin + some.end};
        LEVELS[level].add(job, {parts.data(), (int64_t)parts.size(), codes + some.begin * stride, stride, taken, row,
                                std::min(ROWS_A_TASK, job.rows - row)});
    });
}

bool accumulate(const SparseJob& job, int level, int threads) {
    const int64_t first = job.first_k / SPARSE_BLOCK, last = (job.first_k + job.count - 1) / SPARSE_BLOCK + 1;
    int64_t columns = 0;
    for (int64_t i = 0; i < job.segment_count; ++i) columns += job.segments[i].columns;
    if ((double)job.rows * columns * (last - first) < SMALL) threads = 1;
    const int64_t stride = std::min(SPARSE_SPAN, columns), begin = first / OF_COUNTER * OF_COUNTER;
    Buffer<uint16_t> codes(std::min(BLOCKS_AT_ONCE, last - begin) * stride);
    const std::vector<std::vector<Part>> spans = spans_of(job);
    for (int64_t block = begin; block < last; block += BLOCKS_AT_ONCE) {
        const int64_t end = std::min(block + BLOCKS_AT_ONCE, last), used = std::max(block, first);
        for (const std::vector<Part>& parts : spans) {
            if (!make_codes(job, parts, {block, end}, codes.data, stride, level, threads)) return false;
            const uint16_t* theirs = codes.data + (used - block) * stride;
            if (!add_span(job, parts, {used, end}, theirs, stride, level, threads)) return false;
        }
    }
    return true;
}

}  // namespace

// Returns 0, or 1 where memory ran out.
EXPORT int gradstore_accumulate_sparse(const SparseJob* job, int level, int threads) {
    try {
        return !accumulate(*job, level, std::max(threads, 1));
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
