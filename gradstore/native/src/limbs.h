// Numbers as sums of two bfloat16 limbs, and tiles of them multiplied: by the matrix unit of x86 (AMX) where MATRIX_UNIT is
// defined, and without it; both give the same bits.
//
// A strip is sixteen rows, cut into steps of 32 columns; a step is one tile of upper limbs, and one of lower limbs where
// there are two: [steps][limbs][TILE]. The left operand's tiles are [16 rows][32 columns], the right one's
// [16 pairs of columns][16 rows][2], as the unit wants them.

typedef uint16_t Limb;                 // bits of a bfloat16

constexpr int SIDE = 16;               // rows of a tile
constexpr int STEP = 32;               // columns of a tile
constexpr int TILE = SIDE * STEP;      // values of a tile, 1 KB
constexpr int BLOCK = 2 * SIDE;        // rows and columns of the result that are computed together, two strips a side
constexpr int64_t PANEL = RIGHT_ROWS + SIDE;  // from one row of sums to the next: no power of two, so that rows share no cache sets

#ifdef MATRIX_UNIT

// Some compilers do not see that loading tiles or their shape reads memory, and would leave out what was stored there.
static inline void finish_stores(const void* read) { __asm__ volatile("" : : "r"(read) : "memory"); }

// The tile registers, all of them 16 rows of 64 bytes. Must live on a thread while it multiplies tiles.
struct Tiles {
    Tiles() {
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = 16;
        finish_stores(&shape);
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// panel[32][32], rows PANEL apart, = or += the product of two strips `left_strip` limbs apart and two strips `right_strip`
// limbs apart, over `steps`: upper limbs with upper limbs, and upper with lower ones where a side has them; lower with
// lower ones are left out. Where not BOTH, the second right strip is left out, and its part of the panel is not written.
template <int LEFT, int RIGHT, bool BOTH>
static inline void multiply_block(float* panel, bool first, const Limb* left, int64_t left_strip, const Limb* right,
                                  int64_t right_strip, int64_t steps) {
    finish_stores(left);
    float* below = panel + SIDE * PANEL;
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, panel, PANEL * 4);
        _tile_loadd(2, below, PANEL * 4);
        if (BOTH) _tile_loadd(1, panel + SIDE, PANEL * 4);
        if (BOTH) _tile_loadd(3, below + SIDE, PANEL * 4);
    }
    for (int64_t step = 0; step < steps; ++step, left += LEFT * TILE, right += RIGHT * TILE) {
        _tile_loadd(6, right, 64);
        if (BOTH) _tile_loadd(7, right + right_strip, 64);
        if (LEFT == 2) {
            _tile_loadd(4, left + TILE, 64);
            _tile_loadd(5, left + left_strip + TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (BOTH) _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            if (BOTH) _tile_dpbf16ps(3, 5, 7);
        }
        _tile_loadd(4, left, 64);
        _tile_loadd(5, left + left_strip, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (BOTH) _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        if (BOTH) _tile_dpbf16ps(3, 5, 7);
        if (RIGHT == 2) {
            _tile_loadd(6, right + TILE, 64);
            if (BOTH) _tile_loadd(7, right + right_strip + TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (BOTH) _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            if (BOTH) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, panel, PANEL * 4);
    _tile_stored(2, below, PANEL * 4);
    if (BOTH) _tile_stored(1, panel + SIDE, PANEL * 4);
    if (BOTH) _tile_stored(3, below + SIDE, PANEL * 4);
}

struct Pair {
    __m512 low, high;  // columns 0-15 and 16-31
};

static inline Pair load_pair(const float* from, __mmask32 some) {
    return {_mm512_maskz_loadu_ps((__mmask16)some, from), _mm512_maskz_loadu_ps((__mmask16)(some >> 16), from + 16)};
}

static inline Pair load_pair(const uint16_t* from, __mmask32 some) {
    const __m512i halves = _mm512_maskz_loadu_epi16(some, from);
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
}

static inline __m512i round_pair(Pair x) { return (__m512i)_mm512_cvtne2ps_pbh(x.high, x.low); }

static inline __m512 widen(__m256i limbs) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(limbs), 16); }

static inline Pair rest_of(Pair x, __m512i upper) {
    return {_mm512_sub_ps(x.low, widen(_mm512_castsi512_si256(upper))),
            _mm512_sub_ps(x.high, widen(_mm512_extracti64x4_epi64(upper, 1)))};
}

// Squares of what the first limb leaves of values.
struct Squares {
    __m512 sums;

    Squares() : sums(_mm512_setzero_ps()) {}
    void add(Pair rest) { sums = _mm512_fmadd_ps(rest.low, rest.low, _mm512_fmadd_ps(rest.high, rest.high, sums)); }
    double total() const {
        const __m512i bits = _mm512_castps_si512(sums);
        const __m256 low = _mm256_castsi256_ps(_mm512_castsi512_si256(bits));
        const __m256 high = _mm256_castsi256_ps(_mm512_extracti64x4_epi64(bits, 1));
        return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(low), _mm512_cvtps_pd(high)));
    }
};

// FAR memory is not read before it is written, nor kept in the cache; it is aligned to 64 bytes.
template <bool FAR>
static inline void store_limbs(Limb* to, __m512i limbs) {
    FAR ? _mm512_stream_si512(reinterpret_cast<__m512i*>(to), limbs) : _mm512_storeu_si512(to, limbs);
}

static inline void finish_places() { _mm_sfence(); }

// 32 values of a row to one row of a tile, or of one tile for each limb.
template <int LIMBS, bool MEASURE, bool FAR, class Value>
static inline void split(Limb* upper, Limb* lower, const Value* from, __mmask32 some, Squares& left) {
    const Pair x = load_pair(from, some);
    const __m512i first = round_pair(x);
    store_limbs<FAR>(upper, first);
    if (LIMBS == 1 && !MEASURE) return;
    const Pair rest = rest_of(x, first);
    if (MEASURE) left.add(rest);
    if (LIMBS == 2) store_limbs<FAR>(lower, round_pair(rest));
}

static inline __mmask32 first_columns(int64_t count) { return count >= STEP ? ~0u : (1u << count) - 1; }

// A tile's rows of 16 pairs become its columns.
static inline void transpose(Limb* tile) {
    __m512i a[SIDE], b[SIDE];
    for (int i = 0; i < SIDE; ++i) a[i] = _mm512_loadu_si512(tile + i * STEP);
    for (int i = 0; i < SIDE; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < SIDE; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < SIDE; ++i) {  // blocks of four pairs: a[4 g + i] holds pairs i, i + 4, i + 8, i + 12 of rows 4 g ...
        const int at = i / 8 * 8 + i % 4;
        b[i] = i % 8 < 4 ? _mm512_shuffle_i32x4(a[at], a[at + 4], 0x88) : _mm512_shuffle_i32x4(a[at], a[at + 4], 0xDD);
    }
    for (int i = 0; i < 4; ++i) {
        _mm512_storeu_si512(tile + i * STEP, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(tile + (i + 8) * STEP, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xDD));
        _mm512_storeu_si512(tile + (i + 4) * STEP, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_si512(tile + (i + 12) * STEP, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xDD));
    }
}

#else

struct Tiles {
    Tiles() {}
};

static inline float widen(Limb limb) {
    const uint32_t bits = (uint32_t)limb << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float without_subnormals(float value) { return std::fabs(value) < FLT_MIN ? std::copysign(0.0f, value) : value; }

static inline Limb round_to_limb(float value) {
    uint32_t bits;
    value = without_subnormals(value);
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return (Limb)(bits >> 16 | 0x40);
    return (Limb)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// One instruction of the unit: even and odd columns are added up apart, then one sum of them to the result.
static inline void multiply_tiles(float* out, const Limb* left, const Limb* right) {
    for (int i = 0; i < SIDE; ++i) {
        for (int j = 0; j < SIDE; ++j) {
            float sum[2] = {};
            for (int pair = 0; pair < SIDE; ++pair) {
                for (int odd = 0; odd < 2; ++odd) {
                    const float a = without_subnormals(widen(left[i * STEP + 2 * pair + odd]));
                    const float b = without_subnormals(widen(right[(pair * SIDE + j) * 2 + odd]));
                    sum[odd] = without_subnormals(std::fma(a, b, sum[odd]));
                }
            }
            out[i * PANEL + j] = without_subnormals(out[i * PANEL + j] + without_subnormals(sum[0] + sum[1]));
        }
    }
}

template <int LEFT, int RIGHT, bool BOTH>
static inline void multiply_block(float* panel, bool first, const Limb* left, int64_t left_strip, const Limb* right,
                                  int64_t right_strip, int64_t steps) {
    for (int i = 0; first && i < BLOCK; ++i) memset(panel + i * PANEL, 0, BLOCK * sizeof *panel);
    for (int64_t step = 0; step < steps; ++step, left += LEFT * TILE, right += RIGHT * TILE) {
        for (int i = 0; i < 2; ++i) {
            for (int j = 0; j < (BOTH ? 2 : 1); ++j) {
                float* to = panel + SIDE * (i * PANEL + j);
                const Limb *a = left + i * left_strip, *b = right + j * right_strip;
                if (LEFT == 2) multiply_tiles(to, a + TILE, b);
                multiply_tiles(to, a, b);
                if (RIGHT == 2) multiply_tiles(to, a, b + TILE);
            }
        }
    }
}

static inline int64_t first_columns(int64_t count) { return std::min<int64_t>(count, STEP); }

static inline float as_float(float value) { return value; }
static inline float as_float(uint16_t half) { return half_to_float(half); }

struct Squares {
    double sum = 0;

    void add(float rest) { sum += rest * rest; }
    double total() const { return sum; }
};

static inline void finish_places() {}

template <int LIMBS, bool MEASURE, bool FAR, class Value>
static inline void split(Limb* upper, Limb* lower, const Value* from, int64_t some, Squares& left) {
    for (int64_t i = 0; i < STEP; ++i) {
        const float x = i < some ? as_float(from[i]) : 0;
        upper[i] = round_to_limb(x);
        if (MEASURE) left.add(x - widen(upper[i]));
        if (LIMBS == 2) lower[i] = round_to_limb(x - widen(upper[i]));
    }
}

static inline void transpose(Limb* tile) {
    Limb copy[TILE];
    memcpy(copy, tile, sizeof copy);
    for (int row = 0; row < SIDE; ++row) {
        for (int pair = 0; pair < SIDE; ++pair) memcpy(tile + (pair * SIDE + row) * 2, copy + row * STEP + 2 * pair, 4);
    }
}

#endif

// A strip of the left operand (or of the right one) from up to 16 rows of `width` values; what is missing becomes 0. With
// MEASURE, squares of what first limbs leave of each row are added to `rests`.
template <int LIMBS, bool RIGHT_SIDE, bool MEASURE, class Value>
static inline void pack_strip(Limb* strip, const Value* rows, int64_t stride, int64_t count, int64_t width, double* rests) {
    Squares left[SIDE];
    for (int64_t at = 0; at < width; at += STEP, strip += LIMBS * TILE) {
        const auto some = first_columns(width - at);
        for (int64_t i = 0; i < std::min<int64_t>(count, SIDE); ++i) {
            split<LIMBS, MEASURE, false>(strip + i * STEP, strip + TILE + i * STEP, rows + i * stride + at, some, left[i]);
        }
        for (int limb = 0; limb < LIMBS; ++limb) {
            Limb* tile = strip + limb * TILE;
            if (count < SIDE) memset(tile + count * STEP, 0, (SIDE - count) * STEP * sizeof *tile);
            if (RIGHT_SIDE) transpose(tile);
        }
    }
    if (MEASURE) {
        for (int64_t i = 0; i < std::min<int64_t>(count, SIDE); ++i) rests[i] += left[i].total();
    }
}
