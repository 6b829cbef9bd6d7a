// The product with a matrix of signs, without a multiplication ("four Russians"). Included once per SIMD level.
//
// For a group of g consecutive parameters only 2^g signed sums exist. They are tabulated for 16 rows of gradients side by
// side, and then every k takes the sum that its g sign bits name: one load and one addition do the work of 16 * g
// multiply-adds. 64 parameters make a pass: 11 tables of 40 KB together, one 64-bit word of signs for every k. A tile of K
// keeps its float32 sums in the second-level cache; after SPAN parameters they are added to float64 totals, so the rounding
// error does not grow with the number of parameters.
//
// Every sum is made in an order fixed by the absolute index of its parameters: the bits of a row depend neither on the rows
// beside it, nor on tiles, threads or the width of the registers. There is no product that could be fused.

constexpr int PASS = 64;                  // parameters that one word of signs covers
constexpr int64_t SPAN = 4096;            // parameters between two additions to the totals
constexpr int WIDTH[] = {6, 6, 6, 6, 6, 6, 6, 6, 6, 5, 5};
constexpr int GROUPS = sizeof(WIDTH) / sizeof(WIDTH[0]);

constexpr int first_bit(int group) {
    int bit = 0;
    for (int i = 0; i < group; ++i) bit += WIDTH[i];
    return bit;
}

constexpr int first_entry(int group) {
    int entry = 0;
    for (int i = 0; i < group; ++i) entry += 1 << WIDTH[i];
    return entry;
}

static_assert(first_bit(GROUPS) == PASS, "the groups must cover a pass");

static inline Sum operator+(Sum a, const Sum& b) {
    for (int i = 0; i < PARTS; ++i) a.part[i] += b.part[i];
    return a;
}

static inline Sum operator-(Sum a, const Sum& b) {
    for (int i = 0; i < PARTS; ++i) a.part[i] -= b.part[i];
    return a;
}

// All 2^COUNT signed sums of x[0..COUNT); bit i of an index is the sign of x[i].
template <int COUNT>
static inline void signed_sums(Sum* sums, const Sum* x) {
    sums[0] = Sum{} - x[0];
    sums[1] = x[0];
#pragma GCC unroll 8
    for (int i = 1; i < COUNT; ++i) {
#pragma GCC unroll 16
        for (int j = 0; j < 1 << i; ++j) {
            sums[j | 1 << i] = sums[j] + x[i];
            sums[j] = sums[j] - x[i];
        }
    }
}

template <int GROUP>
static inline void build_table(Sum* tables, const Sum* x) {
    constexpr int low = WIDTH[GROUP] / 2, high = WIDTH[GROUP] - low;
    Sum lower[1 << low], upper[1 << high];
    signed_sums<low>(lower, x + first_bit(GROUP));
    signed_sums<high>(upper, x + first_bit(GROUP) + low);
    Sum* table = tables + first_entry(GROUP);
    for (int u = 0; u < 1 << high; ++u) {
#pragma GCC unroll 8
        for (int l = 0; l < 1 << low; ++l) table[u << low | l] = upper[u] + lower[l];
    }
}

template <int GROUP>
static inline const Sum& look_up(const Sum* tables, uint64_t word) {
    constexpr int shift = first_bit(GROUP) - __builtin_ctz(sizeof(Sum));  // the index, already in bytes
    constexpr uint64_t mask = ((1u << WIDTH[GROUP]) - 1) * sizeof(Sum);
    const uint64_t bytes = (shift < 0 ? word << (-shift & 63) : word >> (shift & 63)) & mask;
    return *reinterpret_cast<const Sum*>(reinterpret_cast<const char*>(tables + first_entry(GROUP)) + bytes);
}

template <size_t... GROUP>
static void add_pass(Sum* sums, const Sum* x, Sum* tables, const uint64_t* words, int64_t count,
                     std::index_sequence<GROUP...>) {
    (build_table<(int)GROUP>(tables, x), ...);
    for (int64_t k = 0; k < count; ++k) {
        Sum sum = look_up<0>(tables, words[k]);
        ((sum = GROUP ? sum + look_up<(int)GROUP>(tables, words[k]) : sum), ...);
        sums[k] = sums[k] + sum;
    }
}

// Sign words of passes [first, first + passes) for k tile [k, k + count): words[pass * count + k].
static void make_words(uint64_t* words, uint64_t first, int64_t passes, uint64_t k, int64_t count, const Job& job) {
    const Keys keys(job.seed);
    for (int64_t i = 0; i < count; i += COUNTERS) {
        const Words lanes = lanes_from(k + i, 1);
        OfLanes of_k = of_lanes(lanes, first / 2, keys);
        for (int64_t pass = 0; pass < passes; pass += 2) {
            const uint64_t b = (first + pass) / 2;
            if (!(b & LOW_WORD)) of_k = of_lanes(lanes, b, keys);
            const Random random = philox(of_k, of_counter(b, job.domain, keys), keys);
            const Words even = random.word[0] | random.word[1] << 32, odd = random.word[2] | random.word[3] << 32;
            memcpy(words + pass * count + i, &even, sizeof even);
            memcpy(words + (pass + 1) * count + i, &odd, sizeof odd);
        }
    }
}

// Parameters [p, p + PASS) of 16 rows, row by row in the block, to x[parameter] of 16 rows; zero outside the block.
static void gather(Sum* x, const Job& job, int64_t row, int64_t rows, int64_t column) {
    float* lanes = reinterpret_cast<float*>(x);
    const int64_t begin = std::max<int64_t>(0, -column), end = std::min<int64_t>(PASS, job.columns - column);
    if (rows < LANES || end - begin < PASS) memset(lanes, 0, PASS * sizeof(Sum));
    if (begin >= end) return;
    for (int64_t r = 0; r < rows; ++r) {
        const float* from = job.block + (row + r) * job.block_stride + column;
        for (int64_t j = begin; j < end; ++j) lanes[j * LANES + r] = from[j];
    }
}

static void add_to_totals(double* totals, Sum* sums, int64_t count) {
    float* values = reinterpret_cast<float*>(sums);
    for (int64_t i = 0; i < count * LANES; ++i) {
        totals[i] += values[i];
        values[i] = 0;
    }
}

static void add_to_out(const Job& job, const double* totals, Range ks, int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
        float* out = job.out + (row + r) * job.out_stride;
        for (int64_t k = ks.begin; k < ks.end; ++k) out[k] += (float)totals[(k - ks.begin) * LANES + r];
    }
}

// One tile: columns `ks` of out for `rows`. Holds SPAN/PASS words, a sum and 8 * rows bytes of totals for each k.
static void rademacher(const Job& job, Range ks, Range rows) {
    const int64_t count = (ks.end - ks.begin + LANES - 1) / LANES * LANES;
    const int64_t groups = (rows.end - rows.begin + LANES - 1) / LANES;
    Buffer<Sum> tables(first_entry(GROUPS)), x(PASS), sums(count);
    Buffer<uint64_t> words(count * (SPAN / PASS));
    Buffer<double> totals(groups * count * LANES);
    sums.clear();
    totals.clear();
    const uint64_t stop = job.start + job.columns;
    for (uint64_t span = job.start / SPAN * SPAN; span < stop; span += SPAN) {
        const uint64_t first = std::max(span, job.start) / 128 * 2;  // a pair of passes shares a counter
        const int64_t passes = (int64_t)((std::min(span + SPAN, stop) + 127) / 128 * 2 - first);
        make_words(words.data, first, passes, job.first_k + ks.begin, count, job);
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t row = rows.begin + group * LANES, used = std::min<int64_t>(LANES, rows.end - row);
            for (int64_t pass = 0; pass < passes; ++pass) {
                gather(x.data, job, row, used, (int64_t)((first + pass) * PASS - job.start));
                add_pass(sums.data, x.data, tables.data, words.data + pass * count, count,
                         std::make_index_sequence<GROUPS>());
            }
            add_to_totals(totals.data + group * count * LANES, sums.data, count);
        }
    }
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t row = rows.begin + group * LANES;
        add_to_out(job, totals.data + group * count * LANES, ks, row, std::min<int64_t>(LANES, rows.end - row));
    }
}
