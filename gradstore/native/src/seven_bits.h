// Products of TILE right rows by LEFT left rows at once, as many as registers hold. Included once per SIMD level, inside that
// level's namespace.

#if defined(__x86_64__) && VECTOR_BYTES == 64

typedef __m512i Vector;
constexpr int TILE = 4, LEFT = 4;

static inline Vector load(const void* from) { return _mm512_loadu_si512(from); }
static inline int32_t sum_of(Vector sums) { return _mm512_reduce_add_epi32(sums); }

// Adds the products of 128 values to the sums.
static inline void add_products(Vector& sums, const uint8_t* shifted, const int8_t* values) {
#ifdef MATRIX_UNIT  // every processor that has one multiplies bytes and adds them up in one instruction
    sums = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sums, load(shifted), load(values)), load(shifted + 64), load(values + 64));
#else
    const Vector first = _mm512_maddubs_epi16(load(shifted), load(values));
    const Vector both = _mm512_add_epi16(first, _mm512_maddubs_epi16(load(shifted + 64), load(values + 64)));
    sums = _mm512_add_epi32(sums, _mm512_madd_epi16(both, _mm512_set1_epi16(1)));
#endif
}

#elif defined(__x86_64__) && VECTOR_BYTES == 32

typedef __m256i Vector;
constexpr int TILE = 2, LEFT = 4;

static inline Vector load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

static inline int32_t sum_of(Vector sums) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

// Adds the products of 64 values to the sums.
static inline void add_products(Vector& sums, const uint8_t* shifted, const int8_t* values) {
    const Vector first = _mm256_maddubs_epi16(load(shifted), load(values));
    const Vector both = _mm256_add_epi16(first, _mm256_maddubs_epi16(load(shifted + 32), load(values + 32)));
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(both, _mm256_set1_epi16(1)));
}

#else

typedef int32_t Vector __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(16)));
constexpr int TILE = 2, LEFT = 2;

static inline int32_t sum_of(Vector sums) { return sums[0] + sums[1] + sums[2] + sums[3]; }

template <class Value>
static inline Shorts widened(const Value* from) {
    typedef Value Eight __attribute__((vector_size(8)));
    Eight values;
    memcpy(&values, from, sizeof values);
    return __builtin_convertvector(values, Shorts);
}

// Adds the products of 32 values to the sums; of four, a sum fits into 16 bits.
static inline void add_products(Vector& sums, const uint8_t* shifted, const int8_t* values) {
    Shorts four = {};
    for (int i = 0; i < 32; i += 8) four += widened(shifted + i) * widened(values + i);
    const Vector pairs = (Vector)four;
    sums += (pairs >> 16) + ((pairs << 16) >> 16);
}

#endif

// Adds the products of SOME left rows, `apart` from one another, with a tile to out[SOME, count], `stride` apart.
template <int SOME>
static inline void add_tile(const uint8_t (*tile)[DEPTH], const int8_t* left, int64_t apart, int64_t depth, int32_t* out,
                            int64_t stride, int64_t count) {
    Vector sums[SOME][TILE] = {};
    for (int64_t k = 0; k < depth; k += 2 * VECTOR_BYTES) {
#pragma GCC unroll 4
        for (int j = 0; j < TILE; ++j) {
#pragma GCC unroll 4
            for (int i = 0; i < SOME; ++i) add_products(sums[i][j], tile[j] + k, left + i * apart + k);
        }
    }
    for (int i = 0; i < SOME; ++i) {
        for (int j = 0; j < count; ++j) out[i * stride + j] += sum_of(sums[i][j]);
    }
}

// Rows of a tile behind the last are left as they were: their sums are not wanted.
static inline void write_tile(uint8_t (*tile)[DEPTH], const int8_t* right, int64_t width, int64_t some, int64_t depth,
                              int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
        for (int64_t k = 0; k < some; ++k) tile[j][k] = (uint8_t)right[j * width + k] + SHIFT;
        memset(tile[j] + some, 0, depth - some);
    }
}

static void multiply(const IntegerJob& job) {
    const int64_t apart = (job.width + STEP - 1) / STEP * STEP;
    for (int64_t i = 0; i < job.rows; ++i) std::fill_n(job.out + i * job.columns, job.columns, -SHIFT * job.sums[i]);
    alignas(64) uint8_t tile[TILE][DEPTH] = {};
    for (int64_t at = 0; at < job.width; at += DEPTH) {
        const int64_t some = std::min(DEPTH, job.width - at), depth = std::min(DEPTH, apart - at);
        for (int64_t first = 0; first < job.rows; first += TOGETHER) {
            const int64_t last = std::min(first + TOGETHER, job.rows);
            for (int64_t j = 0; j < job.columns; j += TILE) {
                const int64_t count = std::min<int64_t>(TILE, job.columns - j);
                write_tile(tile, job.right + j * job.width + at, job.width, some, depth, count);
                const int8_t* left = job.left + at;
                int32_t* out = job.out + j;
                int64_t i = first;
                for (; i + LEFT <= last; i += LEFT) {
                    add_tile<LEFT>(tile, left + i * apart, apart, depth, out + i * job.columns, job.columns, count);
                }
                for (; i < last; ++i) {
                    add_tile<1>(tile, left + i * apart, apart, depth, out + i * job.columns, job.columns, count);
                }
            }
        }
    }
}

// Adds the products of one right row with SOME left rows to out[SOME].
template <int SOME>
static inline void add_pairs(const uint8_t* shifted, const int8_t* left, const int64_t* places, int64_t apart, int64_t depth,
                             int32_t* out) {
    Vector sums[SOME] = {};
    for (int64_t k = 0; k < depth; k += 2 * VECTOR_BYTES) {
#pragma GCC unroll 4
        for (int i = 0; i < SOME; ++i) add_products(sums[i], shifted + k, left + places[i] * apart + k);
    }
    for (int i = 0; i < SOME; ++i) out[i] += sum_of(sums[i]);
}

static void multiply_pairs(const PairJob& job) {
    constexpr int MANY = 4;
    const int64_t apart = (job.width + STEP - 1) / STEP * STEP;
    for (int64_t i = 0; i < job.pairs; ++i) job.out[i] = -SHIFT * job.sums[job.places[i]];
    alignas(64) uint8_t row[1][DEPTH];
    for (int64_t at = 0; at < job.width; at += DEPTH) {
        const int64_t some = std::min(DEPTH, job.width - at), depth = std::min(DEPTH, apart - at);
        for (int64_t i = 0, last; i < job.pairs;) {
            for (last = i; last < job.pairs && job.columns[last] == job.columns[i];) ++last;
            write_tile(row, job.right + job.columns[i] * job.width + at, job.width, some, depth, 1);
            for (; i + MANY <= last; i += MANY) {
                add_pairs<MANY>(row[0], job.left + at, job.places + i, apart, depth, job.out + i);
            }
            for (; i < last; ++i) add_pairs<1>(row[0], job.left + at, job.places + i, apart, depth, job.out + i);
        }
    }
}
