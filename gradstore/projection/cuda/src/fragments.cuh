// Fragments of P: the registers of two steps, made by one warp for 16 rows.
#pragma once

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

#ifdef __CUDACC__
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

#endif

// Normals as halves: the nearest, and with two limbs what is left.
BOTH void store_pair(u32 (&a)[P_LIMBS][PAIR], int i, float even, float odd) {
    a[0][i] = two_halves(even, odd);
    if (P_LIMBS > 1) a[P_LIMBS - 1][i] = two_halves(even - low_half(a[0][i]), odd - high_half(a[0][i]));
}

// The registers of pair 0..7 of a group's fragments: a[limb][4 * step + register].
BOTH void make_fragments(u32 (&a)[P_LIMBS][PAIR], const Kept& kept, const Matrix& matrix, u64 group,
                                               u32 k, u32 lane, int pair) {
    if (KIND == 0) {
        sign_fragments(a[0], kept.words, pair);
        return;
    }
    UNROLL
    for (int row_half = 0; row_half < 2; ++row_half) {
        float even[4], odd[4];
        lane_normals<LIMBS == 1>(matrix, group, pair, k + (lane >> 2) + 8 * row_half, lane & 3, even, odd);
        UNROLL
        for (int i = 0; i < 4; ++i) store_pair(a, register_of(i, row_half), even[i], odd[i]);
    }
}
