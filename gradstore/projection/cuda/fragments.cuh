// Fragments of P on the device: the registers of one stage, made by one warp for 16 rows.
#pragma once

#include "entries.cuh"

#include "pack.cuh"

#ifndef KIND
#define KIND 0   // 0 signs, 1 normals
#define LIMBS 1  // of gradients: 1 (fast) or 2 (exact)
#endif

// Limbs of P: signs are exact in 16 bits; normals take as many as the gradients.
constexpr int P_LIMBS = KIND == 1 ? LIMBS : 1;

// What a lane keeps of P between the stages of a group.
struct Kept {
    Words words;
};

__device__ __forceinline__ void exchange(Words& words, int low, int high, bool upper, int mask) {
    take_word(words, low, high, upper, __shfl_xor_sync(0xFFFFFFFFu, word_to_give(words, low, high, upper), mask));
}

__device__ __forceinline__ void begin_group(Kept& kept, const Matrix& matrix, u64 group, u32 k, u32 lane) {
    if (KIND == 1) return;
    kept.words = lane_words(matrix, group, k, lane);
    exchange(kept.words, 0, 1, lane & 1, 1);
    exchange(kept.words, 2, 3, lane & 1, 1);
    exchange(kept.words, 0, 2, lane & 2, 2);
    exchange(kept.words, 1, 3, lane & 2, 2);
}

// Normals as halves: the nearest, and with two limbs what is left.
__device__ __forceinline__ void store_pair(u32 (&a)[P_LIMBS][4 * STEPS], int i, float even, float odd) {
    a[0][i] = two_halves(even, odd);
    if (P_LIMBS > 1) a[P_LIMBS - 1][i] = two_halves(even - low_half(a[0][i]), odd - high_half(a[0][i]));
}

// The registers of stage 0..3 of a group: a[limb][4 * step + register].
__device__ __forceinline__ void make_fragments(u32 (&a)[P_LIMBS][4 * STEPS], const Kept& kept, const Matrix& matrix,
                                               u64 group, u32 k, u32 lane, int stage) {
    if (KIND == 0) {
        sign_fragments(a[0], kept.words, stage);
        return;
    }
    const u32 g = lane >> 2, t = lane & 3;
    UNROLL
    for (int i = 0; i < 4; ++i) {
        const int m = i >> 1, row_half = i & 1;
        float even[4], odd[4];
        lane_normals<LIMBS == 1>(matrix, group, stage >> 1, k + g + 8 * row_half, t, 2 * (stage & 1) + m, even, odd);
        UNROLL
        for (int c = 0; c < 4; ++c) store_pair(a, 4 * (2 * m + (c >> 1)) + 2 * (c & 1) + row_half, even[c], odd[c]);
    }
}
