// Normals from the words of Philox, by Box-Muller. Included once per SIMD level.
//
// It is done in float32 on the integer words, so that nothing is lost where the uniform is near 0 or 1 or the angle near an
// axis; entries agree with the float64 definition to float32 rounding. Lanes are k.

constexpr int GROUP_K = 2 * COUNTERS;  // k that share a call of philox_pair

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
    const uint32_t e = (as_bits(u) - 0x3F3504F3u) & 0xFF800000u;    // times 2^23; 1 + t in [sqrt(1/2), sqrt(2))
    const float mantissa = as_float(as_bits(u) - e), scaled = (float)(int32_t)e;
    const float below_one = -((float)~w + 0.5f) * 0x1p-32f;
    const float t = e == 0 ? below_one : mantissa - 1.0f;
    const float s = t / (2.0f + t), q = s * s;                      // ln(1 + t) = 2 atanh(s)
    const float series = q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9 + q * (1.0f / 11)))));
    const float log_u = 2.0f * (s + s * series) + scaled * 0x1.62e43p-24f;
    return __builtin_sqrtf(-2.0f * (log_u + scaled * -0x1.05c61p-52f));
}

// cos and sin of 2 pi (w + 1/2) / 2^32: the quadrant from the integer, a Taylor series on [-pi/4, pi/4].
static inline void circle(uint32_t w, float* cosine, float* sine) {
    const uint32_t turned = w + 0x20000000u;                        // its upper two bits are the quadrant
    const bool odd = turned & 0x40000000u;
    const float a = ((float)(int32_t)(w - (turned & 0xC0000000u)) + 0.5f) * (float)(2 * M_PI * 0x1p-32), q = a * a;
    const float s = a + a * q * (-1.0f / 6 + q * (1.0f / 120 + q * (-1.0f / 5040 + q * (1.0f / 362880))));
    const float c = 1 + q * (-0.5f + q * (1.0f / 24 + q * (-1.0f / 720 + q * (1.0f / 40320 + q * (-1.0f / 3628800)))));
    const float x = odd ? s : c, y = odd ? c : s;
    *cosine = as_float(as_bits(x) ^ ((w + 0x60000000u) & 0x80000000u));
    *sine = as_float(as_bits(y) ^ (turned & 0x80000000u));
}

struct OfGroup {  // what GROUP_K neighbouring k contribute to their words
    OfLanes even, odd;
    OfGroup() = default;
    OfGroup(uint64_t k, uint64_t b, const Keys& keys)
        : even(of_lanes(lanes_from(k, 2), b, keys)), odd(of_lanes(lanes_from(k + 1, 2), b, keys)) {}
};

// Entries P[k : k + GROUP_K, 4 b : 4 b + 4] from their words to z[4][GROUP_K], rows `stride` apart.
static inline void words_to_normals(float* z, int64_t stride, const Random& random) {
    uint32_t words[4][GROUP_K];
    float normals[4][GROUP_K];
    memcpy(words, &random, sizeof words);
    for (int pair = 0; pair < 4; pair += 2) {
        for (int i = 0; i < GROUP_K; ++i) {
            float cosine, sine;
            const float length = radius(words[pair][i]);
            circle(words[pair + 1][i], &cosine, &sine);
            normals[pair][i] = length * cosine;
            normals[pair + 1][i] = length * sine;
        }
    }
    for (int i = 0; i < 4; ++i) memcpy(z + i * stride, normals[i], sizeof normals[i]);
}
