// The inner loops of a search. Included once per SIMD level, inside that level's namespace.
//
// The lanes of `dot`, which decide its bits, are sixteen whatever the width of the registers.

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef int8_t Bytes __attribute__((vector_size(VECTOR_BYTES / 4)));
typedef float HalfFloats __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef double Doubles __attribute__((vector_size(VECTOR_BYTES)));

constexpr int WIDE = VECTOR_BYTES / 4;        // values in a register
constexpr int LANES = 16;                     // of a dot product
constexpr int PARTS = LANES * 8 / VECTOR_BYTES;
constexpr float NEAREST = 0x1.8p23f;          // added and taken away again, leaves the nearest integer

template <class T>
static inline T load(const void* from) {
    T value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline Floats read(const float* from) { return load<Floats>(from); }

static inline Floats read(const uint16_t* from) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__x86_64__) && VECTOR_BYTES == 32
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    float values[WIDE];
    for (int i = 0; i < WIDE; ++i) values[i] = half_to_float(from[i]);
    return load<Floats>(values);
#endif
}

static inline float sum_lanes(Floats lanes) {
    float total = 0;
    for (int i = 0; i < WIDE; ++i) total += lanes[i];
    return total;
}

// The bits of the largest magnitude; those of an infinity or NaN are larger than any other.
template <class Unsigned, int BITS = 8 * sizeof(Unsigned) - 1>
static inline Unsigned peak_bits(const void* row, int64_t width) {
    typedef Unsigned Wide __attribute__((vector_size(VECTOR_BYTES)));
    constexpr int64_t many = VECTOR_BYTES / sizeof(Unsigned);
    const Unsigned *values = static_cast<const Unsigned*>(row), mask = (Unsigned)((1ull << BITS) - 1);
    Wide most = {};
    int64_t i = 0;
    for (; i + many <= width; i += many) {
        const Wide next = load<Wide>(values + i) & mask;
        most = next > most ? next : most;
    }
    Unsigned peak = 0;
    for (int64_t lane = 0; lane < many; ++lane) peak = std::max(peak, (Unsigned)most[lane]);
    for (; i < width; ++i) peak = std::max(peak, (Unsigned)(values[i] & mask));
    return peak;
}

static inline float peak_of(const float* row, int64_t width) {
    const uint32_t bits = peak_bits<uint32_t>(row, width);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float peak_of(const uint16_t* row, int64_t width) { return half_to_float(peak_bits<uint16_t>(row, width)); }

struct Sums {
    Floats square = {}, second = {}, missed = {};
};

struct Digits {
    float factor, step, inverse, fine_step, fine_inverse;
};

static inline Floats nearest(Floats x) { return (x + NEAREST) - NEAREST; }

// Compilers convert to bytes one value at a time where no instruction does it.
static inline void store(int8_t* to, Floats integers) {
#if defined(__x86_64__) && VECTOR_BYTES == 32
    const __m256i fours = _mm256_shuffle_epi8(_mm256_cvttps_epi32((__m256)integers), _mm256_set1_epi32(0x0c080400));
    _mm_storel_epi64((__m128i*)to, _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1)));
#elif defined(__x86_64__) && VECTOR_BYTES == 16
    const __m128i pairs = _mm_cvttps_epi32((__m128)integers), twos = _mm_packs_epi32(pairs, pairs);
    const int32_t bytes = _mm_cvtsi128_si32(_mm_packs_epi16(twos, twos));
    memcpy(to, &bytes, sizeof bytes);
#else
    const Bytes bytes = __builtin_convertvector(__builtin_convertvector(integers, Ints), Bytes);
    memcpy(to, &bytes, sizeof bytes);
#endif
}

// WIDE values to integers; what is added up is exact for the integers, and rounded a few times for what they miss.
template <bool TWO, class Value>
static inline void round_some(const Value* from, const Digits& digits, int8_t* high, int8_t* low, Sums& sums) {
    const Floats x = read(from) * digits.factor, first = nearest(x * digits.inverse);
    Floats rest = x - first * digits.step;
    sums.square += first * first;
    sums.second += rest * rest;
    store(high, first);
    if (!TWO) return;
    const Floats second = nearest(rest * digits.fine_inverse);
    rest -= second * digits.fine_step;
    sums.missed += rest * rest;
    store(low, second);
}

template <bool TWO, class Value>
static void round_row(const Value* row, float factor, float largest, int64_t width, int8_t* high, int8_t* low,
                      Rounded& found) {
    const float peak = peak_of(row, width) * std::fabs(factor);
    if (!(peak >= 0x1p-100f) || !(peak < INFINITY)) {  // nothing to speak of, or not finite
        const bool finite = peak < INFINITY;
        const double all = finite ? (double)width * peak * peak : INFINITY;
        memset(high, 0, width);
        if (TWO) memset(low, 0, width);
        found = {finite ? 1.0 : INFINITY, 0, all, all};
        return;
    }
    const float finest = largest * 2 * largest;
    const Digits digits = {factor, peak / largest, largest / peak, peak / finest, finest / peak};
    Sums sums, others;  // two of each, so that an addition need not wait for the one before
    int64_t i = 0;
    for (; i + 2 * WIDE <= width; i += 2 * WIDE) {
        round_some<TWO>(row + i, digits, high + i, TWO ? low + i : nullptr, sums);
        round_some<TWO>(row + i + WIDE, digits, high + i + WIDE, TWO ? low + i + WIDE : nullptr, others);
    }
    for (; i < width; i += WIDE) {
        const int64_t some = std::min<int64_t>(WIDE, width - i);
        Value last[WIDE] = {};
        int8_t integers[2][WIDE];
        memcpy(last, row + i, some * sizeof(Value));
        round_some<TWO>(last, digits, integers[0], integers[1], sums);
        memcpy(high + i, integers[0], some);
        if (TWO) memcpy(low + i, integers[1], some);
    }
    const double second = sum_lanes(sums.second + others.second), missed = sum_lanes(sums.missed + others.missed);
    found = {digits.step, sum_lanes(sums.square + others.square), second, TWO ? missed : second};
}

template <bool TWO, class Value>
static void round_all(const RoundJob& job) {
    for (int64_t i = 0; i < job.rows; ++i) {
        const Value* row = static_cast<const Value*>(job.values) + i * job.stride;
        for (int64_t c = 0; c < job.classes; ++c) {
            const int64_t to = c * job.plane + i, at = to * job.width;
            round_row<TWO>(row + c * job.width, job.factors[i * job.classes + c], job.largest, job.width, job.high + at,
                           TWO ? job.low + at : nullptr, job.found[to]);
        }
    }
}

static void round_rows(const RoundJob& job) {
    if (job.half) {
        job.low ? round_all<true, uint16_t>(job) : round_all<false, uint16_t>(job);
    } else {
        job.low ? round_all<true, float>(job) : round_all<false, float>(job);
    }
}

// Adds the products of LANES numbers to the running sums.
static inline void add_products(Doubles* sums, const float* a, const float* b) {
#pragma GCC unroll 8
    for (int part = 0; part < PARTS; ++part) {
        const Doubles x = __builtin_convertvector(load<HalfFloats>(a + part * WIDE / 2), Doubles);
        sums[part] += x * __builtin_convertvector(load<HalfFloats>(b + part * WIDE / 2), Doubles);
    }
}

// Sixteen running sums, number l of the products l, l + 16, ..., in that order; then the upper half of them is added to the
// lower, until one is left.
//
// Meanwhile as many values from `ahead` on are brought into the cache: pieces of one query lie apart, and are short. Behind
// the last piece there may be nothing, which a prefetch does not mind.
static double dot(const float* a, const float* b, int64_t width, const float* ahead) {
    Doubles sums[PARTS] = {};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        __builtin_prefetch(ahead + i);
        add_products(sums, a + i, b + i);
    }
    if (i < width) {
        float x[LANES] = {}, y[LANES] = {};
        memcpy(x, a + i, (width - i) * sizeof(float));
        memcpy(y, b + i, (width - i) * sizeof(float));
        add_products(sums, x, y);
    }
    double lanes[LANES];
    memcpy(lanes, sums, sizeof lanes);
    for (int half = LANES / 2; half; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
}

static inline void write_some(float* to, Floats values) { memcpy(to, &values, sizeof values); }

// to[0 : piece] = the values times the factor, and zeros where there are fewer.
template <class Value>
static inline void write_piece(float* to, const Value* from, float factor, int64_t count, int64_t piece) {
    int64_t i = 0;
    for (; i + WIDE <= count; i += WIDE) write_some(to + i, read(from + i) * factor);
    if (i < count) {
        Value last[WIDE] = {};
        memcpy(last, from + i, (count - i) * sizeof(Value));
        const Floats values = read(last) * factor;
        memcpy(to + i, &values, (count - i) * sizeof(float));
    }
    if (count < piece) memset(to + count, 0, (piece - count) * sizeof(float));
}

// The pairs [first, last) of one row; each of its pieces is written once.
template <class Value>
static void dot_row(const DotJob& job, int64_t first, int64_t last) {
    const Value* row = static_cast<const Value*>(job.values) + job.rows[first] * job.stride;
    const float *factors = job.factors + job.rows[first] * job.classes, *queries = job.pieces;
    for (int64_t c = 0; c < job.classes; ++c) {
        for (int64_t at = 0; at < job.width; at += job.piece, queries += job.apart) {
            write_piece(job.room, row + c * job.width + at, factors[c], std::min(job.piece, job.width - at), job.piece);
            for (int64_t i = first; i < last; ++i) {
                const float* query = queries + job.places[i] * job.piece;
                job.out[i] += dot(query, job.room, job.piece, query + job.apart);
            }
        }
    }
}

static void dot_pairs(const DotJob& job) {
    for (int64_t first = 0, last; first < job.pairs; first = last) {
        for (last = first; last < job.pairs && job.rows[last] == job.rows[first]; ++last) job.out[last] = 0;
        job.half ? dot_row<uint16_t>(job, first, last) : dot_row<float>(job, first, last);
    }
}

static void add_scaled(const ScaleJob& job) {
    for (int64_t i = 0; i < job.rows; ++i) {
        const int32_t* products = job.products + i * job.columns;
        float *out = job.out + i * job.columns, step = job.row_steps[i];
        for (int64_t j = 0; j < job.columns; ++j) out[j] += step * job.column_steps[j] * (float)products[j];
    }
}
