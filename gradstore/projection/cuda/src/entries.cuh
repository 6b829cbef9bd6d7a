// The entries of P, as the registers of a matrix instruction hold them. Compiles for the device and, for tests, on the host.
//
// Both tensor-core instructions (mma m16n8k16 and wgmma m64nNk16) take A, here P, in fragments of 16 rows x 16 columns: lane
// 4 g + t holds rows g and g + 8, and of each the columns 2 t, 2 t + 1 (registers 0 and 1) and 2 t + 8, 2 t + 9 (2 and 3).
// Which parameter a column stands for is ours to choose, as long as the gradients follow. 128 consecutive parameters, the
// bits of one generator call, fill eight fragments: chunk c of 16 (fragment c / 2, columns 8 (c % 2) to + 7) holds the
// parameters c, c + 16, ... c + 112. Then lane t needs exactly bits c and c + 16 of word t, in all chunks: a shift and one
// three-input logic operation make a register of two signs.
#pragma once

#ifdef __CUDACC__
#define BOTH __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#else
#include <cmath>
#include <cstring>
#define BOTH inline
#define UNROLL
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int GROUP = 256;         // parameters of two generator calls for each of two rows: one call for each lane of four
constexpr int STAGE = 64;          // parameters of four fragments: what is multiplied between two barriers
constexpr int SPAN = 8192;         // parameters that share a row's scale and are summed before they reach the output
constexpr int STEPS = STAGE / 16;  // fragments in a stage
constexpr int PAIR = 8;            // registers of two fragments, which are made together

struct Words {
    u32 w[4];
};

// Which P: the generator's key, and the fourth word of its counter.
struct Matrix {
    u32 key0, key1, domain;
};

BOTH Words philox(u32 c0, u32 c1, u32 c2, u32 c3, u32 key0, u32 key1) {
    UNROLL
    for (int round = 0; round < 10; ++round) {
        const u64 product0 = (u64)c0 * 0xD2511F53u, product1 = (u64)c2 * 0xCD9E8D57u;
        c0 = (u32)(product1 >> 32) ^ c1 ^ key0;
        c2 = (u32)(product0 >> 32) ^ c3 ^ key1;
        c1 = (u32)product1;
        c3 = (u32)product0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

BOTH Words words_of(const Matrix& matrix, u64 b, u32 k) {
    return philox((u32)b, (u32)(b >> 32), k, matrix.domain, matrix.key0, matrix.key1);
}

// The parameter, within its 128, of an element of a chunk.
BOTH int parameter_of(int chunk, int element) { return 16 * element + chunk; }

// ---- numbers ------------------------------------------------------------------------------------------------------------

struct Half {
    u16 bits;
};
struct BFloat {
    u16 bits;
};
struct alignas(16) Sixteen {
    u32 word[4];
};

#ifdef __CUDACC__
__device__ __forceinline__ float float_of(u32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ u32 bits_of(float value) { return __float_as_uint(value); }

__device__ __forceinline__ float to_float(Half x) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
    return value;
}

// Two floats as halves, `low` in the lower 16 bits.
__device__ __forceinline__ u32 two_halves(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
#else
template <class To, class From>
inline To as(From from) {
    To to;
    static_assert(sizeof to == sizeof from, "the same bits");
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float float_of(u32 bits) { return as<float>(bits); }
inline u32 bits_of(float value) { return as<u32>(value); }
inline float to_float(Half x) { return (float)as<_Float16>(x.bits); }
inline u32 two_halves(float low, float high) { return as<u16>((_Float16)low) | (u32)as<u16>((_Float16)high) << 16; }
#endif

BOTH float to_float(float x) { return x; }
BOTH float to_float(BFloat x) { return float_of((u32)x.bits << 16); }
BOTH float low_half(u32 both) { return to_float(Half{(u16)both}); }
BOTH float high_half(u32 both) { return to_float(Half{(u16)(both >> 16)}); }

// ---- signs --------------------------------------------------------------------------------------------------------------

// The call that a lane makes for a group: block t / 2 of 128 parameters, row g + 8 (t % 2). `k` is the fragment's first row.
BOTH Words lane_words(const Matrix& matrix, u64 group, u32 k, u32 lane) {
    const u32 g = lane >> 2, t = lane & 3;
    return words_of(matrix, 2 * group + (t >> 1), k + g + 8 * (t & 1));
}

// A 4 x 4 transposition among the four lanes of a row, in two rounds of exchanges with the lane whose number differs in one
// bit. Before: lane t holds words 0..3 of call t. After: lane t holds word t of calls 0..3.
BOTH u32 word_to_give(const Words& words, int low, int high, bool upper) { return upper ? words.w[low] : words.w[high]; }

BOTH void take_word(Words& words, int low, int high, bool upper, u32 taken) {
    words.w[low] = upper ? taken : words.w[low];
    words.w[high] = upper ? words.w[high] : taken;
}

// Parameters c and c + 16 of a lane's word as two halves of +1.0 or -1.0: bit 1 is +1, so the sign is its complement.
BOTH u32 sign_pair(u32 word, int chunk) { return (~(word << (15 - chunk)) & 0x80008000u) | 0x3C003C00u; }

// The registers of two fragments, 32 parameters; `words` is transposed. `pair` is 0..7 within the group.
BOTH void sign_fragments(u32 (&a)[PAIR], const Words& words, int pair) {
    UNROLL
    for (int i = 0; i < PAIR; ++i) {
        const int step = i >> 2, row_half = i & 1, column_half = (i >> 1) & 1;
        a[i] = sign_pair(words.w[2 * (pair >> 2) + row_half], 4 * (pair & 3) + 2 * step + column_half);
    }
}

// ---- normals ------------------------------------------------------------------------------------------------------------

#ifndef __CUDACC__
inline void sincospif(float x, float* sine, float* cosine) {
    *sine = (float)std::sin(M_PI * x);
    *cosine = (float)std::cos(M_PI * x);
}
#endif

// Box-Muller in float32, from the integers: nothing is lost where u is near 0 or 1 or the angle near an axis.
BOTH void box_muller(u32 first, u32 second, float* x, float* y) {
    const float from_zero = ((float)first + 0.5f) * 0x1p-32f, from_one = ((float)~first + 0.5f) * 0x1p-32f;
    const float radius = sqrtf(-2.0f * (first >> 31 ? log1pf(-from_one) : logf(from_zero)));
    float sine, cosine;
    sincospif((float)(i32)second * 0x1p-31f + 0x1p-32f, &sine, &cosine);
    *x = radius * cosine;
    *y = radius * sine;
}

#ifdef __CUDACC__
// The same to about 2^-21 by the special function unit: enough where entries are rounded to 11 bits anyway.
__device__ __forceinline__ void box_muller_fast(u32 first, u32 second, float* x, float* y) {
    float log2, radius, sine, cosine;
    const float u = (float)first * 0x1p-32f + 0x1p-33f, angle = (float)(i32)second * (float)(3.14159265358979323846 * 0x1p-31);
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2) : "f"(u));
    const float squared = fmaxf(log2 * -1.3862943611198906f, 0.0f);
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(radius) : "f"(squared));
    asm("sin.approx.ftz.f32 %0, %1;" : "=f"(sine) : "f"(angle));
    asm("cos.approx.ftz.f32 %0, %1;" : "=f"(cosine) : "f"(angle));
    *x = radius * cosine;
    *y = radius * sine;
}
#else
inline void box_muller_fast(u32 first, u32 second, float* x, float* y) { box_muller(first, second, x, y); }
#endif

// The counter of parameters 32 t + 4 m (+ 16 if `odd`) of a block of 128, m = pair % 4: chunks 4 m to 4 m + 3 of lane t.
BOTH u64 normal_call(u64 group, int pair, u32 t, bool odd) {
    return (2 * group + (pair >> 2)) * 32 + 8 * t + (pair & 3) + (odd ? 4 : 0);
}

// Entries of row `k` in the pair of fragments: even[i], odd[i] are the two halves of the register of chunk 4 (pair % 4) + i.
template <bool FAST>
BOTH void lane_normals(const Matrix& matrix, u64 group, int pair, u32 k, u32 t, float (&even)[4], float (&odd)[4]) {
    const Words a = words_of(matrix, normal_call(group, pair, t, false), k);
    const Words b = words_of(matrix, normal_call(group, pair, t, true), k);
    UNROLL
    for (int i = 0; i < 4; i += 2) {
        if (FAST) {
            box_muller_fast(a.w[i], a.w[i + 1], &even[i], &even[i + 1]);
            box_muller_fast(b.w[i], b.w[i + 1], &odd[i], &odd[i + 1]);
        } else {
            box_muller(a.w[i], a.w[i + 1], &even[i], &even[i + 1]);
            box_muller(b.w[i], b.w[i + 1], &odd[i], &odd[i + 1]);
        }
    }
}

// The register, of a pair's eight, that holds chunk 4 (pair % 4) + i of row g + 8 row_half.
BOTH int register_of(int i, int row_half) { return 4 * (i >> 1) + 2 * (i & 1) + row_half; }

// ---- gradients in memory ------------------------------------------------------------------------------------------------

// Where 16 bytes (chunk 0..7 of a stage) of a row lie within a tile of rows x 128 bytes: the 128-byte swizzle that wgmma
// reads, which also keeps ldmatrix free of bank conflicts. The tile begins at a multiple of 1024 bytes.
BOTH int place_of_chunk(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// What wgmma is told of a tile at a shared address: this swizzle, and that 8 rows are 1024 bytes apart from the next 8.
BOTH u64 describe_tile(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// The same for the 16 columns of a step, of the tile that begins `offset` bytes later.
BOTH u64 describe_step(u64 tile, u32 offset, int step) { return tile + (offset + step * 32) / 16; }

// Where ldmatrix reads for a lane: of 16 rows from `first_row` on, eight rows and half a step for each eight lanes.
BOTH int place_for_lane(int first_row, int step, u32 lane) {
    return place_of_chunk(first_row + 8 * (lane >> 4) + (lane & 7), 2 * step + ((lane >> 3) & 1));
}

// The power of two by which a row is multiplied: its largest value comes to [2^14, 2^15), so that rounding to 16 bits
// cannot overflow. `bits` are those of the largest absolute value.
BOTH i32 scale_exponent(u32 bits) {
    if (bits < 0x00800000u) {  // zero or subnormal: position of the leading bit
        i32 exponent = -149;
        for (u32 rest = bits; rest > 1; rest >>= 1) ++exponent;
        return bits ? 14 - exponent : 0;
    }
    const i32 exponent = (i32)(bits >> 23) - 127;
    return exponent > 127 ? 0 : 14 - exponent;  // what is not finite stays so
}

// The float 2^e, for e within the normal range.
BOTH float power_of_two(i32 e) { return float_of((u32)(e + 127) << 23); }

// value * 2^e in two exact steps, as 2^e itself may be out of range.
BOTH float times_power(float value, i32 e) { return value * power_of_two(e >> 1) * power_of_two(e - (e >> 1)); }
