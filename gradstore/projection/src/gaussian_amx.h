// The product with a matrix of normals by x86's matrix unit (AMX), which multiplies int8 exactly, twice as fast as bfloat16.
//
// Normals and gradients become integers of three digits to the base 256, from -128 to 127: normals in units of 2^-20 (they
// stay below 6.8), gradients in a unit of their row and DEPTH columns, so that the largest fills its digits. Products of
// digits make sums by weight, exact in int32. The least three of nine are left out; what that costs relative to the norms is
// known from the gradients' lower digits, as those of normals are random: some 1e-6. Of rows where it would exceed UNEVEN,
// two of the three are computed after all. Rounding normals adds 2.8e-7.
//
// Digits of gradients are made once for all k. A panel of normals stays in the second-level cache and meets all rows; while
// the matrix unit works, the vector unit makes the normals of the next DEPTH columns.

typedef int8_t Digit;

constexpr int SIDE = 16;                      // rows, or k, of a tile
constexpr int STEP = 64;                      // columns of a tile
constexpr int TILE = SIDE * STEP;             // digits of a tile, 1 KB: [16 rows][64 columns], or [16 times 4 columns][16 k][4]
constexpr int DIGITS = 3;
constexpr int64_t DEPTH = 256;                // columns whose products are summed in integers
constexpr int64_t STEPS = DEPTH / STEP;
constexpr int64_t STRIP = STEPS * DIGITS * TILE;  // digits of 16 rows or k: [STEPS][DIGITS][TILE]
constexpr int64_t DEEP = DEPTH / 4;           // counters of a strip
constexpr int64_t SPAN = 64 * DEPTH;          // columns between two additions to out
constexpr int64_t MOST_ROWS = 768, MOST_K = 320;  // of a task: 1 MB of totals, twice 0.2 MB of normals
constexpr int64_t CHUNK_BYTES = 16 << 20;     // digits of gradients that are held, if SPAN columns are no more
constexpr int WEIGHTS = 4;                    // sums by weight: 1, 2^-8, 2^-16, 2^-24
constexpr int NORMAL_BITS = 20, GRADIENT_BITS = 22;
constexpr float UNEVEN = 1.75e-6f;
constexpr int64_t MOST_CALLS = 4, LINE = 64;

static_assert(GROUP_K == SIDE, "normals are made a strip of k at a time");

struct ByteOrder {  // for permuting two registers of 64 bytes
    alignas(64) uint8_t from[64] = {};
};

// Of four columns for each of 16 k, in two registers: a digit of both columns, then another.
constexpr ByteOrder columns_order(int first, int second) {
    ByteOrder order;
    for (int i = 0; i < 64; ++i) order.from[i] = (i % 2 ? 64 : 0) + i / 4 * 4 + (i % 4 < 2 ? first : second);
    return order;
}

// Of 32 columns of a row, in two registers: a digit of all of them, then another.
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

// Makes the normals of DEPTH columns for a panel, little by little.
class Panel {
public:
    Panel(const Job& job, Digit* strips, int64_t count, uint64_t base, uint64_t stop, uint64_t k, const Keys& keys)
        : keys_(keys), strip_(strips - STRIP), end_(strips + count * STRIP), k_(k) {
        base_ = base / 4;
        first_ = (int64_t)((std::max(base, job.start) - base) / 4);
        stop_ = at_ = (int64_t)((std::min<uint64_t>(stop - base, DEPTH) + 3) / 4);
        for (int64_t i = first_; i < stop_; ++i) counters_[i] = of_counter(base_ + i, job.domain, keys);
    }

    // Calls of next() from the beginning to the end.
    int64_t calls() const { return ((end_ - strip_) / STRIP - 1) * (stop_ - first_) * 2; }

    // By turns, words of Philox and the normals from the last ones: they do not wait for each other. False at the end.
    bool next() {
        if (ready_) {
            store_normals(strip_, at_++, words_);
        } else {
            if (at_ == stop_ && !next_strip()) return false;
            words_ = philox_pair(group_.even, group_.odd, counters_[at_], keys_);
        }
        ready_ = !ready_;
        return true;
    }

    // All that is left.
    void finish() {
        if (ready_) next();
        do {
            const OfGroup group = group_;  // in registers
            Digit* const strip = strip_;
            Random words[DEEP];
            for (int64_t i = at_; i < stop_; ++i) words[i] = philox_pair(group.even, group.odd, counters_[i], keys_);
            for (int64_t i = at_; i < stop_; ++i) store_normals(strip, i, words[i]);
            at_ = stop_;
        } while (next_strip());
    }

private:
    bool next_strip() {
        if (strip_ + STRIP == end_) return false;
        strip_ += STRIP;
        group_ = OfGroup(k_, base_, keys_);  // the counters of a panel share their upper half
        k_ += SIDE;
        at_ = first_;
        return true;
    }

    static void store_normals(Digit* strip, int64_t counter, const Random& words) {
        alignas(64) float z[4][SIDE];
        words_to_normals(z[0], SIDE, words);
        __m512i x[4];
        for (int i = 0; i < 4; ++i) x[i] = digits_of(_mm512_mul_ps(_mm512_load_ps(z[i]), _mm512_set1_ps(1 << NORMAL_BITS)));
        const __m512i a = merge(x[0], COLUMNS_12, x[1]), b = merge(x[2], COLUMNS_21, x[3]);
        const __mmask32 upper = 0xAAAAAAAA;
        store_digits(strip + counter / SIDE * DIGITS * TILE + counter % SIDE * STEP, _mm512_mask_blend_epi16(upper, a, b),
                     _mm512_rol_epi32(_mm512_mask_blend_epi16(upper, b, a), 16),
                     _mm512_mask_blend_epi16(upper, merge(x[0], COLUMNS_3, x[1]), merge(x[2], COLUMNS_3, x[3])));
    }

    const Keys& keys_;
    Digit *strip_, *end_;
    uint64_t k_, base_;
    int64_t first_, stop_, at_;  // counters of the panel that are needed, and the next one
    bool ready_ = false;
    OfGroup group_;
    Random words_;
    OfCounter counters_[DEEP];
};

// The columns of a block of DEPTH that the job has.
struct Columns {
    int64_t first;                   // the block's first column in the job; may be negative
    int64_t begin, end;              // steps that have any
    __mmask16 masks[DEPTH / SIDE];   // those of 16 columns
    Columns(const Job& job, uint64_t base) : first((int64_t)(base - job.start)) {
        const int64_t from = std::max<int64_t>(0, -first), to = std::min(DEPTH, job.columns - first);
        for (int64_t i = 0; i < DEPTH / SIDE; ++i) {
            const int64_t low = std::clamp<int64_t>(from - i * SIDE, 0, SIDE), high = std::clamp<int64_t>(to - i * SIDE, 0, SIDE);
            masks[i] = (__mmask16)((1u << high) - (1u << std::min(low, high)));
        }
        begin = from / STEP;
        end = tiles(to, STEP);
    }
};

// What 16 rows of gradients in a block are worth: their sums times `unit` (NaN for a row that is not finite), those of the
// weight 2^-24 times `rest` before, 2^-8 or 0, with `missing` added to those of the weight 2^-16.
struct Worth {
    alignas(64) float unit[SIDE], rest[SIDE], missing[SIDE];
    bool uneven;  // whether any `rest` is not 0
};

// The bits of the largest magnitude of a row.
static inline uint32_t largest_bits(const float* from, const Columns& columns) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < DEPTH / SIDE; ++i) {
        const __m512i x = _mm512_maskz_loadu_epi32(columns.masks[i], from + i * SIDE);
        most = _mm512_max_epu32(most, _mm512_and_si512(x, _mm512_set1_epi32(0x7FFFFFFF)));
    }
    return _mm512_reduce_max_epu32(most);
}

// Adds digits up, and their squares.
static inline void add_digits(__m512i& sum, __m512i& squares, __m512i digits) {
    const __m512i ones = _mm512_set1_epi16(1);
    for (const __m256i half : {_mm512_castsi512_si256(digits), _mm512_extracti64x4_epi64(digits, 1)}) {
        const __m512i wide = _mm512_cvtepi8_epi16(half);
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(wide, ones));
        squares = _mm512_add_epi32(squares, _mm512_madd_epi16(wide, wide));
    }
}

// A row times 2^shift and the factor to digits. Whether it is uneven: the sums that are left out, of its lower digits with random lower
// digits of normals, would be worth more than UNEVEN of all. `missing` is their mean otherwise, in units of the third
// weight: digits from -128 to 127 have the mean -1/2.
static inline bool split(Digit* to, float* missing, const float* from, const Columns& columns, float shift,
                         float factor) {
    __m512i sum = _mm512_setzero_si512(), lower = sum;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t step = columns.begin; step < columns.end; ++step) {
        __m512i x[4];
        for (int i = 0; i < 4; ++i) {
            const __m512 some = _mm512_maskz_loadu_ps(columns.masks[4 * step + i], from + step * STEP + i * SIDE);
            const __m512 scaled = _mm512_mul_ps(_mm512_scalef_ps(some, _mm512_set1_ps(shift)), _mm512_set1_ps(factor));
            squares = _mm512_fmadd_ps(scaled, scaled, squares);
            x[i] = digits_of(scaled);
        }
        const __m512i a = merge(x[0], ROW_12, x[1]), b = merge(x[2], ROW_21, x[3]), flip = _mm512_set1_epi8((char)0x80);
        const __m512i second = _mm512_shuffle_i64x2(a, b, 0x4E);
        const __m512i third = _mm512_mask_blend_epi64(0xF0, merge(x[0], ROW_3, x[1]), merge(x[2], ROW_3, x[3]));
        store_digits(to + step * DIGITS * TILE, _mm512_mask_blend_epi64(0xF0, a, b), second, third);
        add_digits(sum, lower, _mm512_xor_si512(second, flip));
        add_digits(sum, lower, _mm512_xor_si512(third, flip));
    }
    constexpr float digit = (256 * 256 - 1) / 12.0f;  // mean square of a random one; those of normals count 2^8 at most
    const float left_out = 0x1p16f * digit * (float)_mm512_reduce_add_epi32(lower);
    const bool uneven = left_out > UNEVEN * UNEVEN * 0x1p40f * _mm512_reduce_add_ps(squares);
    *missing = uneven ? 0 : -0.5f * 0x1p-8f * (float)_mm512_reduce_add_epi32(sum);
    return uneven;
}

// Digits and worth of up to 16 rows in a block.
static void pack(Digit* digits, Worth* worth, const Job& job, int64_t row, int64_t count, const Columns& columns) {
    const float* from = job.block + row * job.block_stride + columns.first;
    alignas(64) uint32_t largest[SIDE] = {};
    alignas(64) float shift[SIDE], factor[SIDE];
    for (int64_t r = 0; r < count; ++r) largest[r] = largest_bits(from + r * job.block_stride, columns);
    const __m512i bits = _mm512_load_si512(largest);
    // The digits end at 127.5 * 2^16. Where the largest would reach further, the unit is twice as large; where it stays far
    // below, 1.5 times smaller, if what it is worth then is a normal number.
    const auto exponents = [](__m512i x) { return _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x10102)), 23); };
    const __m512 larger = _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(1.5f));
    const __mmask16 normal = _mm512_cmpge_epu32_mask(bits, _mm512_set1_epi32(16 << 23));
    const __mmask16 far = _mm512_mask_cmpeq_epi32_mask(normal, exponents(bits), exponents(_mm512_castps_si512(larger)));
    const __m512 factors = _mm512_mask_mov_ps(_mm512_set1_ps(1), far, _mm512_set1_ps(1.5f));
    const __m512 shifts = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(GRADIENT_BITS + 127), exponents(bits)));
    const __mmask16 some = _mm512_test_epi32_mask(bits, bits);
    const __mmask16 infinite = _mm512_cmpge_epu32_mask(bits, _mm512_set1_epi32(0x7F800000));
    const __m512 inverse = _mm512_mask_mov_ps(_mm512_set1_ps(1), far, _mm512_set1_ps(1 / 1.5f));
    const __m512 unit = _mm512_maskz_scalef_ps(some, inverse, _mm512_sub_ps(_mm512_set1_ps(32 - NORMAL_BITS), shifts));
    const __m512i nan = _mm512_set1_epi32(0x7FC00000);
    _mm512_store_ps(worth->unit, _mm512_mask_mov_ps(unit, infinite, _mm512_castsi512_ps(nan)));
    _mm512_store_ps(shift, shifts);
    _mm512_store_ps(factor, factors);
    unsigned uneven = 0;
    _mm512_store_ps(worth->missing, _mm512_setzero_ps());
    for (int64_t r = 0; r < count; ++r) {
        uneven |= split(digits + r * STEP, worth->missing + r, from + r * job.block_stride, columns, shift[r], factor[r]) << r;
    }
    _mm512_store_ps(worth->rest, _mm512_maskz_mov_ps((__mmask16)uneven, _mm512_set1_ps(0x1p-8f)));
    worth->uneven = uneven != 0;
}

// sums[weight][16 rows][16 k], of the products of digits that have the weight. `between` is called at every step.
template <bool ALL, class Between>
static inline void multiply(int32_t* sums, const Digit* left, const Digit* right, int64_t steps, const Between& between) {
    finish_stores(left);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    if (ALL) _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step, left += DIGITS * TILE, right += DIGITS * TILE) {
        _tile_loadd(4, left, STEP);
        _tile_loadd(5, left + TILE, STEP);
        _tile_loadd(6, left + 2 * TILE, STEP);
        _tile_loadd(7, right, STEP);
        _tile_dpbssd(2, 6, 7);
        _tile_dpbssd(0, 4, 7);
        _tile_dpbssd(1, 5, 7);
        _tile_loadd(7, right + TILE, STEP);
        if (ALL) _tile_dpbssd(3, 6, 7);
        _tile_dpbssd(2, 5, 7);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(7, right + 2 * TILE, STEP);
        if (ALL) _tile_dpbssd(3, 5, 7);
        _tile_dpbssd(2, 4, 7);
        between();
    }
    _tile_stored(0, sums, STEP);
    _tile_stored(1, sums + SIDE * SIDE, STEP);
    _tile_stored(2, sums + 2 * SIDE * SIDE, STEP);
    if (ALL) _tile_stored(3, sums + 3 * SIDE * SIDE, STEP);
}

// totals[16 rows][16 k] += what the sums are worth
template <bool ALL>
static inline void add_sums(float* totals, const int32_t* sums, const Worth& worth) {
    for (int r = 0; r < SIDE; ++r) {
        const auto sum = [&](int weight) { return _mm512_cvtepi32_ps(_mm512_load_si512(sums + (weight * SIDE + r) * SIDE)); };
        const __m512 less = _mm512_set1_ps(0x1p-8f);
        __m512 value = _mm512_add_ps(sum(2), _mm512_set1_ps(worth.missing[r]));
        if (ALL) value = _mm512_fmadd_ps(sum(3), _mm512_set1_ps(worth.rest[r]), value);
        value = _mm512_fmadd_ps(_mm512_fmadd_ps(value, less, sum(1)), less, sum(0));
        float* to = totals + r * SIDE;
        _mm512_store_ps(to, _mm512_fmadd_ps(value, _mm512_set1_ps(worth.unit[r]), _mm512_load_ps(to)));
    }
}

// Gradients of some rows, from the parameter `begin` to `end`: [blocks][strips of rows].
struct Chunk {
    Range rows;
    uint64_t begin, end;
    int64_t strips;
    const Digit* digits;
    const Worth* worth;
};

// Part `part` of `parts` of a strip of gradients, to the second-level cache.
static inline void prefetch(const Digit* strip, int64_t part, int64_t parts) {
    for (int64_t line = STRIP / LINE * part / parts; line < STRIP / LINE * (part + 1) / parts; ++line) {
        _mm_prefetch(reinterpret_cast<const char*>(strip + line * LINE), _MM_HINT_T1);
    }
}

// Adds the totals to out and clears them.
static void add_totals(const Job& job, float* totals, Range ks, Range rows) {
    const int64_t k_strips = tiles(ks.end - ks.begin, SIDE);
    for (int64_t r = 0; r < rows.end - rows.begin; ++r) {
        float* out = job.out + (rows.begin + r) * job.out_stride + ks.begin;
        const float* from = totals + (r / SIDE * k_strips * SIDE + r % SIDE) * SIDE;
        for (int64_t i = 0; i < ks.end - ks.begin; ++i) out[i] += from[i / SIDE * SIDE * SIDE + i % SIDE];
    }
    memset(totals, 0, tiles(rows.end - rows.begin, SIDE) * k_strips * SIDE * SIDE * sizeof *totals);
}

// One tile: columns `ks` of out for a chunk. For each k it holds 1.5 KB of digits, and 4 bytes a row.
static void multiply_chunk(const Job& job, const Chunk& chunk, Range ks) {
    const Tiles registers;
    const Keys keys(job.seed);
    const int64_t k_strips = tiles(ks.end - ks.begin, SIDE);
    Buffer<Digit> first(k_strips * STRIP), second(k_strips * STRIP);
    Buffer<float> totals(chunk.strips * k_strips * SIDE * SIDE);
    first.clear();  // what is not made meets zeros
    second.clear();
    totals.clear();
    alignas(64) int32_t sums[WEIGHTS * SIDE * SIDE];
    Digit *now = first.data, *then = second.data;
    const uint64_t k = job.first_k + ks.begin;
    Panel panel(job, now, k_strips, chunk.begin, chunk.end, k, keys);
    panel.finish();
    const Digit* left = chunk.digits;
    const Worth* worth = chunk.worth;
    for (uint64_t base = chunk.begin; base < chunk.end; base += DEPTH, std::swap(now, then)) {
        const Columns columns(job, base);
        const int64_t steps = columns.end - columns.begin, skip = columns.begin * DIGITS * TILE;
        const bool last = base + DEPTH >= chunk.end;
        Panel next(job, then, last ? 0 : k_strips, last ? base : base + DEPTH, chunk.end, k, keys);
        // Where rows are few it is faster to make the next panel after them, than to interrupt that again and again.
        const int64_t wanted = tiles(next.calls(), chunk.strips * k_strips * steps), calls = wanted > MOST_CALLS ? 0 : wanted;
        float* to = totals.data;
        const auto make_some = [&] {
            for (int64_t i = 0; i < calls && next.next(); ++i) continue;
        };
        for (int64_t i = 0; i < chunk.strips; ++i, left += STRIP, ++worth) {
            for (int64_t strip = 0; strip < k_strips; ++strip, to += SIDE * SIDE) {
                const Digit* right = now + strip * STRIP + skip;
                prefetch(left + STRIP, strip, k_strips);
                if (worth->uneven) {
                    multiply<true>(sums, left + skip, right, steps, make_some);
                    add_sums<true>(to, sums, *worth);
                } else {
                    multiply<false>(sums, left + skip, right, steps, make_some);
                    add_sums<false>(to, sums, *worth);
                }
            }
        }
        next.finish();
        if (last || (base + DEPTH) % SPAN == 0) add_totals(job, totals.data, ks, chunk.rows);
    }
}

static bool gaussian_rows(const Job& job, Range rows, int threads) {
    const uint64_t stop = job.start + job.columns;
    const int64_t strips = tiles(rows.end - rows.begin, SIDE);
    const int64_t spans = std::max<int64_t>(1, CHUNK_BYTES / (strips * STRIP * (SPAN / DEPTH)));
    const uint64_t whole = job.start / DEPTH * DEPTH, step = spans * SPAN;
    const int64_t most = tiles((int64_t)(std::min(stop - whole, step)), DEPTH) * strips;
    Buffer<Digit> digits(most * STRIP);
    Buffer<Worth> worth(most);
    digits.clear();
    for (uint64_t begin = whole, end; begin < stop; begin = end) {
        end = std::min(stop, (begin / SPAN + spans) * SPAN);
        const auto pack_strips = [&](Range blocks, Range some) {
            for (int64_t block = blocks.begin; block < blocks.end; ++block) {
                const Columns columns(job, begin + block * DEPTH);
                for (int64_t i = some.begin; i < some.end; ++i) {
                    const int64_t row = rows.begin + i * SIDE, at = block * strips + i;
                    pack(digits.data + at * STRIP, worth.data + at, job, row, std::min<int64_t>(SIDE, rows.end - row), columns);
                }
            }
        };
        const Chunk chunk = {rows, begin, end, strips, digits.data, worth.data};
        const int64_t k = even_tile(job.count, MOST_K, 64, 1, threads);
        const int64_t blocks = tiles((int64_t)(end - begin), DEPTH);
        if (!run(blocks, strips, {blocks, 1}, threads, pack_strips)) return false;
        if (!run(job.count, 1, {k, 1}, threads, [&](Range ks, Range) { multiply_chunk(job, chunk, ks); })) return false;
    }
    return true;
}

static bool gaussian(const Job& job, int threads) {
    const int64_t rows = tiles(tiles(job.rows, tiles(job.rows, MOST_ROWS)), SIDE) * SIDE;
    for (int64_t row = 0; row < job.rows; row += rows) {
        if (!gaussian_rows(job, {row, std::min(row + rows, job.rows)}, threads)) return false;
    }
    return true;
}
