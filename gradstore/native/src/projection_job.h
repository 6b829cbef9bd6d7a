// What one call of the compiled projection is asked to do: add block @ P[first_k : first_k + count, start : ...].T to out.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

struct Job {
    const float* block;        // [rows, columns], rows `block_stride` floats apart, columns adjacent
    float* out;                // [rows, count], rows `out_stride` floats apart
    int64_t rows, columns, count;
    int64_t block_stride, out_stride;
    uint64_t start, first_k;   // the entry of P that meets block[0, 0] in out[0, 0]
    uint64_t seed;
    uint32_t domain;           // the fourth word of the counter
    uint32_t kind;             // of the entries, one of those below
};

struct Range {
    int64_t begin, end;
};

constexpr uint32_t KIND_RADEMACHER = 0;
constexpr uint32_t KIND_GAUSSIAN = 1;

constexpr int PANEL = 64;  // columns of out that a task takes of a product with normals

// The weight [outputs, inputs] of a linear layer: weight.block holds activations [examples * positions, inputs], weight.out
// [examples * classes, count], and weight.start is the index of the weight's first entry.
struct SharedJob {
    Job weight;
    const float* deltas;  // [outputs, classes, lanes]; a lane is (example, position), with 16 or more of padding at the end
    int64_t examples, classes, positions, outputs, inputs, lanes;
};

// Outputs whose projected activations are kept together: enough multiply-adds for each update of a total, few enough to stay
// in the cache. Fixed by the shape of the weight, as the order of summation follows from it.
inline int64_t outputs_at_a_time(const SharedJob& job) {
    const int64_t wanted = std::max<int64_t>(32, 4096 / job.inputs), most = std::max<int64_t>(1, 65536 / job.inputs);
    return std::min(job.outputs, std::min(wanted, most));
}
