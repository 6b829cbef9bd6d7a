// Philox4x32-10 for several counters at once. Included once per SIMD level, inside that level's namespace.
//
// A lane of 64 bits holds a 32-bit word; its upper half may hold rubbish until the end, because the multiplication reads
// the lower half only and the shift of a product brings down a clean upper half.

typedef uint64_t Words __attribute__((vector_size(VECTOR_BYTES)));
constexpr int COUNTERS = VECTOR_BYTES / 8;
constexpr uint64_t LOW_WORD = 0xFFFFFFFFu;

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

struct Random {
    Words word[4];
};

// The four words of the counters (b mod 2^32, b div 2^32, k + lane, domain).
static inline Random philox(uint64_t b, uint64_t k, const Job& job) {
    Words c0 = Words{} + (b & LOW_WORD), c1 = Words{} + (b >> 32), c2 = Words{} + k, c3 = Words{} + job.domain;
    for (int lane = 0; lane < COUNTERS; ++lane) c2[lane] += lane;
    uint32_t key0 = (uint32_t)job.seed, key1 = (uint32_t)(job.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const Words product0 = times(c0, 0xD2511F53u), product1 = times(c2, 0xCD9E8D57u);
        c0 = (product1 >> 32) ^ c1 ^ (uint64_t)key0;
        c2 = (product0 >> 32) ^ c3 ^ (uint64_t)key1;
        c1 = product1;
        c3 = product0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {{c0 & LOW_WORD, c1 & LOW_WORD, c2 & LOW_WORD, c3 & LOW_WORD}};
}
