// The product with a matrix of normals by x86's matrix unit (AMX), which multiplies int8 exactly, twice as fast as bfloat16.
//
// Normals and gradients become integers of three digits to the base 256, in [-128, 127]: normals in units of 2^-20 (they stay
// below 6.8), gradients in a unit of the row and DEPTH columns, 2^-22 of the power of two at their largest one. Of the nine
// products of digits the least is left out, the others make four sums by weight, exact in int32. Relative to the norms of
// both, roundings are 2.8e-7 for normals and some 1e-7 for gradients, and 2^-24 sqrt(DEPTH / 3) = 6e-7 at the very worst.
//
// A panel of normals stays in the second-level cache and meets all rows, two to three thousand cycles for 16 of them. In
// that time the vector unit makes the normals of the next DEPTH columns.

typedef int8_t Digit;

constexpr int SIDE = 16;                      // rows, or k, of a tile
constexpr int STEP = 64;                      // columns of a tile
constexpr int TILE = SIDE * STEP;             // digits of a tile, 1 KB: [16 rows][64 columns], or [16 times 4 columns][16 k][4]
constexpr int DIGITS = 3;
constexpr int64_t DEPTH = 256;                // columns whose products are summed in integers
constexpr int64_t STEPS = DEPTH / STEP;
constexpr int64_t STRIP = STEPS * DIGITS * TILE;  // digits of 16 rows or k: [STEPS][DIGITS][TILE]
constexpr int64_t COUNTERS_DEEP = DEPTH / 4;
constexpr int64_t SPAN = 32 * DEPTH;          // parameters between two additions to the totals
constexpr int WEIGHTS = 4;                    // sums by weight: 1, 2^-8, 2^-16, 2^-24
constexpr int NORMAL_BITS = 20, GRADIENT_BITS = 22;

static_assert(GROUP_K == SIDE, "normals are made a strip of k at a time");

struct ByteOrder {  // for permuting two registers of 64 bytes
    alignas(64) uint8_t from[64] = {};
};

// Of four columns for each of 16 k: the upper two digits of two columns, then with the halves swapped, and the last digit.
constexpr ByteOrder columns_order(int first, int second) {
    ByteOrder order;
    for (int i = 0; i < 64; ++i) order.from[i] = (i % 2 ? 64 : 0) + i / 4 * 4 + (i % 4 < 2 ? first : second);
    return order;
}

// The same of 16 columns each in two registers: a digit of all of them, then another.
constexpr ByteOrder row_order(int first, int second) {
    ByteOrder order;
    for (int i = 0; i < 64; ++i) order.from[i] = i % 32 * 4 + (i < 32 ? first : second);
    return order;
}

static constexpr ByteOrder COLUMNS_12 = columns_order(2, 1), COLUMNS_21 = columns_order(1, 2), COLUMNS_3 = columns_order(0, 0);
static constexpr ByteOrder ROW_12 = row_order(2, 1), ROW_21 = row_order(1, 2), ROW_3 = row_order(0, 0);

static inline __m512i merge(__m512i a, const ByteOrder& order, __m512i b) {
    return _mm512_permutex2var_epi8(a, _mm512_load_si512(order.from), b);
}

// Integers whose bytes are the digits, the lower two with their sign bit flipped.
static inline __m512i digits_of(__m512 x) { return _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(0x8080)); }

static inline void store_digits(Digit* to, __m512i first, __m512i second, __m512i third) {
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    _mm512_store_si512(to, first);
    _mm512_store_si512(to + TILE, _mm512_xor_si512(second, flip));
    _mm512_store_si512(to + 2 * TILE, _mm512_xor_si512(third, flip));
}

// Makes the normals of DEPTH columns for a panel, 16 k by 4 columns at each call of next().
class Panel {
public:
    Panel(const Job& job, Digit* strips, int64_t count, uint64_t base, uint64_t stop, uint64_t k, const Keys& keys)
        : keys_(keys), strips_(strips), end_(strips + count * STRIP), first_k_(k), first_(std::max(base, job.start) / 4),
          skipped_((int64_t)(first_ - base / 4)), used_(std::min<int64_t>((int64_t)((stop + 3) / 4 - base / 4), COUNTERS_DEEP)),
          at_(used_) {
        for (int64_t i = skipped_; i < used_; ++i) counters_[i] = of_counter(base / 4 + i, job.domain, keys);
        if (skipped_ >= used_) strips_ = end_;
        strips_ -= STRIP;
    }

    int64_t calls() const { return (end_ - strips_ - STRIP) / STRIP * (used_ - skipped_); }

    bool next() {
        if (at_ == used_) {
            if (strips_ + STRIP >= end_) return false;
            strips_ += STRIP;
            group_ = OfGroup(first_k_, first_, keys_);  // the counters of a panel share their upper half
            first_k_ += SIDE;
            at_ = skipped_;
        }
        alignas(64) float z[4][SIDE];
        make_normals(z[0], SIDE, group_, counters_[at_], keys_);
        __m512i x[4];
        for (int i = 0; i < 4; ++i) x[i] = digits_of(_mm512_mul_ps(_mm512_load_ps(z[i]), _mm512_set1_ps(1 << NORMAL_BITS)));
        const __m512i a = merge(x[0], COLUMNS_12, x[1]), b = merge(x[2], COLUMNS_21, x[3]);
        const __mmask32 upper = 0xAAAAAAAA;
        store_digits(strips_ + at_ / SIDE * DIGITS * TILE + at_ % SIDE * STEP, _mm512_mask_blend_epi16(upper, a, b),
                     _mm512_rol_epi32(_mm512_mask_blend_epi16(upper, b, a), 16),
                     _mm512_mask_blend_epi16(upper, merge(x[0], COLUMNS_3, x[1]), merge(x[2], COLUMNS_3, x[3])));
        ++at_;
        return true;
    }

private:
    const Keys& keys_;
    Digit *strips_, *end_;
    uint64_t first_k_, first_;
    int64_t skipped_, used_, at_;  // counters of the block: before the first that is needed, to the last, the next
    OfGroup group_;
    OfCounter counters_[COUNTERS_DEEP];
};

// The columns of a block that the job has: those of the block's register `i` are masks[i].
struct Columns {
    int64_t first;  // the block's first column in the job; may be negative
    __mmask16 masks[DEPTH / SIDE];
    int64_t begin, end;  // steps that have any
    Columns(const Job& job, uint64_t base) : first((int64_t)(base - job.start)) {
        const int64_t from = std::max<int64_t>(0, -first), to = std::min(DEPTH, job.columns - first);
        for (int64_t i = 0; i < DEPTH / SIDE; ++i) {
            const int64_t low = std::clamp<int64_t>(from - i * SIDE, 0, SIDE), high = std::clamp<int64_t>(to - i * SIDE, 0, SIDE);
            masks[i] = (__mmask16)((1u << high) - (1u << std::min(low, high)));
        }
        begin = from / STEP;
        end = (to + STEP - 1) / STEP;
    }
};

// Up to 16 rows of gradients as digits, and what each of their sums is worth. NaN where a row is not finite.
struct Rows {
    alignas(64) Digit digits[STRIP];
    alignas(64) float factors[SIDE];

    void take(const Job& job, int64_t row, int64_t count, const Columns& columns) {
        const float* from = job.block + row * job.block_stride + columns.first;
        alignas(64) uint32_t largest[SIDE] = {};
        for (int64_t r = 0; r < count; ++r) largest[r] = largest_bits(from + r * job.block_stride, columns);
        // The digits end at 127.5 * 2^16: where the largest would reach further, the unit is twice as large.
        const __m512i bits = _mm512_load_si512(largest);
        const __m512i exponents = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x10102)), 23);
        const __m512 shifts = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(GRADIENT_BITS + 127), exponents));
        const __mmask16 finite = _mm512_cmplt_epu32_mask(bits, _mm512_set1_epi32(0x7F800000));
        const __m512 worth = _mm512_sub_ps(_mm512_set1_ps(32 - NORMAL_BITS), shifts);
        const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000));
        _mm512_store_ps(factors, _mm512_mask_scalef_ps(nan, finite, _mm512_set1_ps(1), worth));
        alignas(64) float shift[SIDE];
        _mm512_store_ps(shift, shifts);
        for (int64_t r = 0; r < count; ++r) split(digits + r * STEP, from + r * job.block_stride, columns, shift[r]);
    }

private:
    static uint32_t largest_bits(const float* from, const Columns& columns) {
        __m512i largest = _mm512_setzero_si512();
        const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
        for (int64_t i = 0; i < DEPTH / SIDE; ++i) {
            const __m512i x = _mm512_maskz_loadu_epi32(columns.masks[i], from + i * SIDE);
            largest = _mm512_max_epu32(largest, _mm512_and_si512(x, magnitude));
        }
        return _mm512_reduce_max_epu32(largest);
    }

    static void split(Digit* to, const float* from, const Columns& columns, float shift) {
        for (int64_t step = columns.begin; step < columns.end; ++step) {
            __m512i x[4];
            for (int i = 0; i < 4; ++i) {
                const __m512 some = _mm512_maskz_loadu_ps(columns.masks[4 * step + i], from + step * STEP + i * SIDE);
                x[i] = digits_of(_mm512_scalef_ps(some, _mm512_set1_ps(shift)));
            }
            const __m512i a = merge(x[0], ROW_12, x[1]), b = merge(x[2], ROW_21, x[3]);
            store_digits(to + step * DIGITS * TILE, _mm512_mask_blend_epi64(0xF0, a, b), _mm512_shuffle_i64x2(a, b, 0x4E),
                         _mm512_mask_blend_epi64(0xF0, merge(x[0], ROW_3, x[1]), merge(x[2], ROW_3, x[3])));
        }
    }
};

// sums[weight][16 rows][16 k], of the products of digits that have the weight, over some steps. Some of the next panel is
// made at every step.
static inline void multiply(int32_t* sums, const Digit* left, const Digit* right, int64_t steps, Panel& next, int64_t calls) {
    finish_stores(left);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step, left += DIGITS * TILE, right += DIGITS * TILE) {
        _tile_loadd(4, left, STEP);
        _tile_loadd(5, left + TILE, STEP);
        _tile_loadd(6, left + 2 * TILE, STEP);
        _tile_loadd(7, right, STEP);
        _tile_dpbssd(2, 6, 7);
        _tile_dpbssd(0, 4, 7);
        _tile_dpbssd(1, 5, 7);
        _tile_loadd(7, right + TILE, STEP);
        _tile_dpbssd(3, 6, 7);
        _tile_dpbssd(2, 5, 7);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(7, right + 2 * TILE, STEP);
        _tile_dpbssd(3, 5, 7);
        _tile_dpbssd(2, 4, 7);
        for (int64_t i = 0; i < calls && next.next(); ++i) continue;
    }
    _tile_stored(0, sums, STEP);
    _tile_stored(1, sums + SIDE * SIDE, STEP);
    _tile_stored(2, sums + 2 * SIDE * SIDE, STEP);
    _tile_stored(3, sums + 3 * SIDE * SIDE, STEP);
}

// totals[16 rows][16 k] += what the sums are worth
static inline void add_sums(float* totals, const int32_t* sums, const float* factors) {
    for (int r = 0; r < SIDE; ++r) {
        __m512 value = _mm512_setzero_ps();
        for (int weight = WEIGHTS - 1; weight >= 0; --weight) {
            const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + (weight * SIDE + r) * SIDE));
            value = _mm512_fmadd_ps(value, _mm512_set1_ps(0x1p-8f), sum);
        }
        float* to = totals + r * SIDE;
        _mm512_store_ps(to, _mm512_fmadd_ps(value, _mm512_set1_ps(factors[r]), _mm512_load_ps(to)));
    }
}

// One tile: columns `ks` of out for `rows`. For each k it holds two times 768 bytes of digits, and 12 bytes of totals a row.
static void gaussian(const Job& job, Range ks, Range rows) {
    const Tiles tiles;
    const Keys keys(job.seed);
    const int64_t k_strips = (ks.end - ks.begin + SIDE - 1) / SIDE, row_strips = (rows.end - rows.begin + SIDE - 1) / SIDE;
    const int64_t outputs = k_strips * row_strips * SIDE * SIDE;
    Buffer<Digit> first(k_strips * STRIP), second(k_strips * STRIP);
    Buffer<Rows> left(1);
    Buffer<float> totals(outputs);
    Buffer<double> exact(outputs);
    first.clear();  // what is not made meets zeros
    second.clear();
    left.clear();
    totals.clear();
    exact.clear();
    alignas(64) int32_t sums[WEIGHTS * SIDE * SIDE];
    const uint64_t stop = job.start + job.columns, k = job.first_k + ks.begin;
    Digit *now = first.data, *then = second.data;
    Panel panel(job, now, k_strips, job.start / DEPTH * DEPTH, stop, k, keys);
    while (panel.next()) continue;
    for (uint64_t base = job.start / DEPTH * DEPTH; base < stop; base += DEPTH, std::swap(now, then)) {
        const Columns columns(job, base);
        const int64_t steps = columns.end - columns.begin, skip = columns.begin * DIGITS * TILE;
        const bool last = base + DEPTH >= stop;
        Panel next(job, then, last ? 0 : k_strips, base + DEPTH, stop, k, keys);
        const int64_t slots = row_strips * k_strips * steps, calls = (next.calls() + slots - 1) / slots;
        float* to = totals.data;
        for (int64_t row = rows.begin; row < rows.end; row += SIDE) {
            left.data->take(job, row, std::min<int64_t>(SIDE, rows.end - row), columns);
            for (int64_t strip = 0; strip < k_strips; ++strip, to += SIDE * SIDE) {
                multiply(sums, left.data->digits + skip, now + strip * STRIP + skip, steps, next, calls);
                add_sums(to, sums, left.data->factors);
            }
        }
        while (next.next()) continue;
        if (last || (base + DEPTH) % SPAN == 0) {
            for (int64_t i = 0; i < outputs; ++i) exact.data[i] += totals.data[i], totals.data[i] = 0;
        }
    }
    for (int64_t r = rows.begin; r < rows.end; ++r) {
        float* out = job.out + r * job.out_stride + ks.begin;
        const double* from = exact.data + (r - rows.begin) / SIDE * k_strips * SIDE * SIDE + (r - rows.begin) % SIDE * SIDE;
        for (int64_t i = 0; i < ks.end - ks.begin; ++i) out[i] += (float)from[i / SIDE * SIDE * SIDE + i % SIDE];
    }
}
