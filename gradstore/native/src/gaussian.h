// The product with a matrix of normals by fused multiply-adds. Included once per SIMD level.
//
// A panel of PANEL k by DEPTH parameters is generated once, stays in the second-level cache, and meets all rows. Lanes are k:
// rows never share a register.

constexpr int64_t DEPTH = 256;
constexpr int BLOCK_ROWS = 6;                                       // rows of the product kept in registers
constexpr int STRIP = (VECTOR_BYTES == 64 || NEON ? 4 : 2);         // registers of k beside them
constexpr int STRIP_K = STRIP * VECTOR_BYTES / 4;

// Entries P[k : k + 64, 4 b : 4 b + 4] for b in [first, stop), to z[4 (stop - first)][64].
static void make_panel(float* z, uint64_t first, uint64_t stop, uint64_t k, const Job& job, const Keys& keys) {
    OfCounter counters[DEPTH / 4];
    for (uint64_t b = first; b < stop; ++b) counters[b - first] = of_counter(b, job.domain, keys);
    for (int i = 0; i < PANEL; i += GROUP_K) {
        const OfGroup group(k + i, first, keys);  // the b of a span share their upper half
        for (uint64_t j = 0; j < stop - first; ++j) {
            words_to_normals(z + 4 * j * PANEL + i, PANEL, philox_pair(group.even, group.odd, counters[j], keys));
        }
    }
}

// totals[r][strip] += sum over p of rows[r][p] * z[p][strip], for ROWS rows.
template <int ROWS>
static void multiply(double* totals, const float* rows, int64_t stride, const float* z, int64_t depth) {
    Floats sum[ROWS][STRIP] = {};
    for (int64_t p = 0; p < depth; ++p) {
        const Floats* column = reinterpret_cast<const Floats*>(z + p * PANEL);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
            for (int i = 0; i < STRIP; ++i) sum[r][i] += column[i] * rows[r * stride + p];
        }
    }
    float values[ROWS][STRIP_K];
    memcpy(values, sum, sizeof values);
    for (int r = 0; r < ROWS; ++r) {
        for (int i = 0; i < STRIP_K; ++i) totals[r * PANEL + i] += values[r][i];
    }
}

static void multiply_panel(double* totals, const Job& job, Range rows, int64_t column, const float* z, int64_t depth) {
    using Multiply = void (*)(double*, const float*, int64_t, const float*, int64_t);
    static constexpr Multiply by_rows[] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>};
    for (int64_t row = rows.begin; row < rows.end; row += BLOCK_ROWS) {
        const Multiply some = by_rows[std::min<int64_t>(BLOCK_ROWS, rows.end - row) - 1];
        const float* from = job.block + row * job.block_stride + column;
        double* to = totals + (row - rows.begin) * PANEL;
        for (int k = 0; k < PANEL; k += STRIP_K) some(to + k, from, job.block_stride, z + k, depth);
    }
}

// One panel: columns `ks` (at most 64) of out for `rows`. Holds 64 KB of entries and 512 bytes of totals a row.
static void gaussian(const Job& job, Range ks, Range rows) {
    Buffer<float> z(DEPTH * PANEL);
    Buffer<double> totals((rows.end - rows.begin) * PANEL);
    const Keys keys(job.seed);
    totals.clear();
    const uint64_t stop = job.start + job.columns;
    for (uint64_t span = job.start / DEPTH * DEPTH; span < stop; span += DEPTH) {
        const uint64_t begin = std::max(span, job.start), end = std::min(span + DEPTH, stop);
        make_panel(z.data + (begin / 4 * 4 - span) * PANEL, begin / 4, (end + 3) / 4, job.first_k + ks.begin, job, keys);
        multiply_panel(totals.data, job, rows, (int64_t)(begin - job.start), z.data + (begin - span) * PANEL,
                       (int64_t)(end - begin));
    }
    for (int64_t r = rows.begin; r < rows.end; ++r) {
        float* out = job.out + r * job.out_stride;
        const double* total = totals.data + (r - rows.begin) * PANEL;
        for (int64_t k = ks.begin; k < ks.end; ++k) out[k] += (float)total[k - ks.begin];
    }
}
