// Philox4x32-10 for several counters (b mod 2^32, b div 2^32, k, domain) at once. Included once per SIMD level, inside that
// level's namespace.
//
// A lane of 64 bits belongs to one k and holds a 32-bit word; its upper half may hold rubbish, because the multiplication
// reads the lower half only and the shift of a product brings down a clean upper half. The first two rounds mix b and k so
// little that what each contributes is computed once, for all b that meet a k and for all k that meet a b.

typedef uint64_t Words __attribute__((vector_size(VECTOR_BYTES)));
constexpr int COUNTERS = VECTOR_BYTES / 8;
constexpr uint64_t LOW_WORD = 0xFFFFFFFFu;
constexpr uint32_t MULTIPLIER0 = 0xD2511F53u, MULTIPLIER1 = 0xCD9E8D57u;
constexpr int ROUNDS = 10;

static inline Words times(Words a, uint32_t multiplier) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
    return (Words)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(multiplier));
#elif defined(__x86_64__) && VECTOR_BYTES == 32
    return (Words)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(multiplier));
#elif defined(__x86_64__)
    return (Words)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(multiplier));
#elif defined(__ARM_NEON)
    return (Words)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(multiplier));
#else
    return (a & LOW_WORD) * (uint64_t)multiplier;
#endif
}

struct Keys {  // of each round
    uint64_t key0[ROUNDS], key1[ROUNDS];
    explicit Keys(uint64_t seed) {
        uint32_t low = (uint32_t)seed, high = (uint32_t)(seed >> 32);
        for (int round = 0; round < ROUNDS; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
            key0[round] = low;
            key1[round] = high;
        }
    }
};

struct OfCounter {  // what b contributes to words 0 and 2 after two rounds, and to word 0 after three
    uint64_t word0, word2, later;
};

static inline OfCounter of_counter(uint64_t b, uint32_t domain, const Keys& keys) {
    const uint64_t product0 = (b & LOW_WORD) * MULTIPLIER0;
    const uint64_t product1 = (((product0 >> 32) ^ domain ^ keys.key1[0]) & LOW_WORD) * MULTIPLIER1;
    return {(product1 >> 32) ^ keys.key0[1], (product0 & LOW_WORD) ^ keys.key1[1], (product1 & LOW_WORD) ^ keys.key0[2]};
}

struct OfLanes {  // what k, and the upper half of b, contribute to words 0, 2 and 3 after two rounds
    Words word0, word2, word3;
};

static inline OfLanes of_lanes(Words k, uint64_t b, const Keys& keys) {
    const Words product1 = times(k, MULTIPLIER1), product0 = times((product1 >> 32) ^ ((b >> 32) ^ keys.key0[0]), MULTIPLIER0);
    return {product1, product0 >> 32, product0};
}

// k, k + step, k + 2 step ...
static inline Words lanes_from(uint64_t k, uint64_t step) {
    Words lanes;
    for (int lane = 0; lane < COUNTERS; ++lane) lanes[lane] = k + lane * step;
    return lanes;
}

struct Random {
    Words word[4];
};

static inline Random next_round(const Random& x, uint64_t key0, uint64_t key1) {
    const Words product0 = times(x.word[0], MULTIPLIER0), product1 = times(x.word[2], MULTIPLIER1);
    return {{(product1 >> 32) ^ x.word[1] ^ key0, product1, (product0 >> 32) ^ x.word[3] ^ key1, product0}};
}

// All rounds but the last.
static inline Random nine_rounds(const OfLanes& lanes, const OfCounter& counter, const Keys& keys) {
    const Words product0 = times(lanes.word0 ^ counter.word0, MULTIPLIER0);
    const Words product1 = times(lanes.word2 ^ counter.word2, MULTIPLIER1);
    Random x = {{(product1 >> 32) ^ counter.later, product1, (product0 >> 32) ^ lanes.word3 ^ keys.key1[2], product0}};
#pragma GCC unroll 10
    for (int round = 3; round + 1 < ROUNDS; ++round) x = next_round(x, keys.key0[round], keys.key1[round]);
    return x;
}

// The four words of each lane.
static inline Random philox(const OfLanes& lanes, const OfCounter& counter, const Keys& keys) {
    const Random x = next_round(nine_rounds(lanes, counter, keys), keys.key0[ROUNDS - 1], keys.key1[ROUNDS - 1]);
    return {{x.word[0] & LOW_WORD, x.word[1] & LOW_WORD, x.word[2] & LOW_WORD, x.word[3] & LOW_WORD}};
}

static inline Words lower_halves(Words even, Words odd) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
    return (Words)_mm512_mask_shuffle_epi32((__m512i)even, 0xAAAA, (__m512i)odd, _MM_PERM_CCAA);
#else
    return (even & LOW_WORD) | odd << 32;
#endif
}

static inline Words upper_halves(Words even, Words odd) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
    return (Words)_mm512_mask_shuffle_epi32((__m512i)odd, 0x5555, (__m512i)even, _MM_PERM_DDBB);
#else
    return even >> 32 | (odd & ~LOW_WORD);
#endif
}

// Words as 32-bit lanes, those of `even` and `odd` in turn.
static inline Random philox_pair(const OfLanes& even, const OfLanes& odd, const OfCounter& counter, const Keys& keys) {
    const Random x = nine_rounds(even, counter, keys), y = nine_rounds(odd, counter, keys);
    const uint64_t key0 = keys.key0[ROUNDS - 1] * 0x100000001u, key1 = keys.key1[ROUNDS - 1] * 0x100000001u;
    const Words x0 = times(x.word[0], MULTIPLIER0), x1 = times(x.word[2], MULTIPLIER1);
    const Words y0 = times(y.word[0], MULTIPLIER0), y1 = times(y.word[2], MULTIPLIER1);
    return {{upper_halves(x1, y1) ^ lower_halves(x.word[1], y.word[1]) ^ key0, lower_halves(x1, y1),
             upper_halves(x0, y0) ^ lower_halves(x.word[3], y.word[3]) ^ key1, lower_halves(x0, y0)}};
}
