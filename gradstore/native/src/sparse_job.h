// What one call of the compiled sparse projection is asked to do: add the products of some segments, which may lie anywhere
// among the parameters, with P to out [rows, count].
#pragma once

#include <cstddef>
#include <cstdint>

#include "projection_job.h"

// Neighbouring columns of the gradients: values [rows, columns], or the weight [outputs, inputs] of a linear layer, whose
// gradient is a sum of outer products; then a row is an (example, class), values are activations [examples * positions,
// inputs], and deltas are [outputs, positions, lanes], with 16 lanes or more of padding behind the rows.
struct Segment {
    const float* values;
    const float* deltas;  // null for values of all columns
    int64_t stride;       // floats between rows of values
    uint64_t start;       // parameter of the first column
    int64_t columns;
    int64_t positions, inputs, lanes;
};

struct SparseJob {
    float* out;  // [rows, count], rows `out_stride` floats apart
    const Segment* segments;
    int64_t rows, count, out_stride, segment_count, classes;
    uint64_t first_k, seed;
    uint32_t domain;  // the fourth word of the counter
};

// Some columns of a segment, and where their codes begin.
struct Part {
    const Segment* segment;
    int64_t column, columns, codes;
};

// What one task adds: up to 16 rows of some blocks of P over some parts.
struct SparseTask {
    const Part* parts;
    int64_t part_count;
    const uint16_t* codes;  // of block blocks.begin; `stride` codes further those of the next
    int64_t stride;
    Range blocks;
    int64_t row, rows;
};
