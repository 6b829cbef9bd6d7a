// The product with a matrix of normals. Included once per SIMD level.
//
// A panel of 64 k by DEPTH parameters is generated once, stays in the second-level cache, and meets all rows. Box-Muller is
// done in float32 on the integer words, so that nothing is lost where the uniform is near 0 or 1 or the angle near an axis;
// entries agree with the float64 definition to float32 rounding. Lanes are k: rows never share a register.

constexpr int PANEL = 64;
constexpr int64_t DEPTH = 256;
constexpr int BLOCK_ROWS = 6;                                       // rows of the product kept in registers
constexpr int STRIP = (VECTOR_BYTES == 64 || NEON ? 4 : 2);         // registers of k beside them
constexpr int STRIP_K = STRIP * VECTOR_BYTES / 4;

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// sqrt(-2 ln u) for u = (w + 1/2) / 2^32. ln u = e ln 2 + ln(1 + t), with t exact even where u rounds to 1.
static inline float radius(uint32_t w) {
    const float u = ((float)w + 0.5f) * 0x1p-32f;
    const int32_t e = (int32_t)(as_bits(u) - 0x3F3504F3u) >> 23;    // 1 + t in [sqrt(1/2), sqrt(2))
    const float mantissa = as_float(as_bits(u) - ((uint32_t)e << 23));
    const float below_one = -((float)~w + 0.5f) * 0x1p-32f;
    const float t = e == 0 ? below_one : mantissa - 1.0f;
    const float s = t / (2.0f + t), q = s * s;                      // ln(1 + t) = 2 atanh(s)
    const float series = q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9 + q * (1.0f / 11)))));
    const float log_u = 2.0f * (s + s * series) + (float)e * 0x1.62e43p-1f;
    return __builtin_sqrtf(std::max(0.0f, -2.0f * (log_u + (float)e * -0x1.05c61p-29f)));
}

// cos and sin of 2 pi (w + 1/2) / 2^32: the quadrant from the integer, a Taylor series on [-pi/4, pi/4].
static inline void circle(uint32_t w, float* cosine, float* sine) {
    const uint32_t quadrant = (w + 0x20000000u) >> 30;
    const float a = ((float)(int32_t)(w - (quadrant << 30)) + 0.5f) * (float)(2 * M_PI * 0x1p-32), q = a * a;
    const float s = a + a * q * (-1.0f / 6 + q * (1.0f / 120 + q * (-1.0f / 5040 + q * (1.0f / 362880))));
    const float c = 1 + q * (-0.5f + q * (1.0f / 24 + q * (-1.0f / 720 + q * (1.0f / 40320 + q * (-1.0f / 3628800)))));
    const float x = quadrant & 1 ? s : c, y = quadrant & 1 ? c : s;
    *cosine = as_float(as_bits(x) ^ ((quadrant + 1) & 2) << 30);
    *sine = as_float(as_bits(y) ^ (quadrant & 2) << 30);
}

// Entries P[k : k + 64, 4 b : 4 b + 4] to z[4][64].
static void make_normals(float* z, uint64_t b, uint64_t k, const Job& job) {
    uint32_t words[4][PANEL];
    for (int i = 0; i < PANEL; i += COUNTERS) {
        const Random random = philox(b, k + i, job);
        for (int word = 0; word < 4; ++word) {
            for (int lane = 0; lane < COUNTERS; ++lane) words[word][i + lane] = (uint32_t)random.word[word][lane];
        }
    }
    for (int pair = 0; pair < 2; ++pair) {
        const uint32_t *first = words[2 * pair], *second = words[2 * pair + 1];
        float *x = z + 2 * pair * PANEL, *y = x + PANEL;
        for (int i = 0; i < PANEL; ++i) {
            float cosine, sine;
            const float length = radius(first[i]);
            circle(second[i], &cosine, &sine);
            x[i] = length * cosine;
            y[i] = length * sine;
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
    totals.clear();
    const uint64_t stop = job.start + job.columns;
    for (uint64_t span = job.start / DEPTH * DEPTH; span < stop; span += DEPTH) {
        const uint64_t begin = std::max(span, job.start), end = std::min(span + DEPTH, stop);
        for (uint64_t b = begin / 4; b < (end + 3) / 4; ++b) {
            make_normals(z.data + (4 * b - span) * PANEL, b, job.first_k + ks.begin, job);
        }
        multiply_panel(totals.data, job, rows, (int64_t)(begin - job.start), z.data + (begin - span) * PANEL,
                       (int64_t)(end - begin));
    }
    for (int64_t r = rows.begin; r < rows.end; ++r) {
        float* out = job.out + r * job.out_stride;
        const double* total = totals.data + (r - rows.begin) * PANEL;
        for (int64_t k = ks.begin; k < ks.end; ++k) out[k] += (float)total[k - ks.begin];
    }
}
