// Gradients to 16-bit limbs, scaled by a power of two per (row, span), in the order and place that the product reads.
#pragma once

#include "entries.cuh"

struct Pack {
    const void* block;  // [rows, columns], adjacent columns, rows `row_stride` elements apart
    u8* packed;         // [row_tiles][stages][limbs][tile_rows x 128 bytes]
    float* undo;        // [spans][padded_rows][2]: two powers of two whose product takes the scale back
    i32* turns;         // of the product, cleared here
    i64 rows, columns, row_stride;
    u64 start;          // parameter of column 0
    u64 first_group;    // of this launch, counted from parameter 0
    i32 groups, tile_rows, padded_rows, turn_count;
};

// The groups of span number `span` of a launch. Spans are cut at multiples of SPAN, so the first may begin late.
struct Groups {
    i32 begin, end;  // counted from the launch's first group
};

BOTH Groups groups_of_span(u64 first_group, i32 groups, i32 span) {
    constexpr i32 EACH = SPAN / GROUP;
    const i32 late = (i32)(first_group % EACH);
    const i32 begin = span * EACH - late, end = begin + EACH;
    return {begin < 0 ? 0 : begin, end > groups ? groups : end};
}

// The tile of a row, a stage and a limb, in bytes from the start of `packed`.
BOTH i64 place_of_tile(i64 row_tile, i64 stages, i64 stage, int limbs, int limb, int tile_rows) {
    return (((row_tile * stages + stage) * limbs + limb) * tile_rows) * 128;
}

#ifdef __CUDACC__

struct Half {
    u16 bits;
};
struct BFloat {
    u16 bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat x) { return __uint_as_float((u32)x.bits << 16); }
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

__device__ __forceinline__ float low_half(u32 both) { return to_float(Half{(u16)both}); }
__device__ __forceinline__ float high_half(u32 both) { return to_float(Half{(u16)(both >> 16)}); }

constexpr int PACK_THREADS = 256;
constexpr int CHUNKS = SPAN / 8 / PACK_THREADS;  // of 8 values that a thread holds

// The largest absolute value of the block's threads, as bits. NaN is larger than every number here.
__device__ u32 largest(u32 mine) {
    __shared__ u32 of_warp[PACK_THREADS / 32];
    mine = __reduce_max_sync(0xFFFFFFFFu, mine);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
    __syncthreads();
    u32 all = 0;
    for (int warp = 0; warp < PACK_THREADS / 32; ++warp) all = max(all, of_warp[warp]);
    return all;
}

// One block of threads packs one span of one row. Lanes take neighbouring chunks, so each load is of 16 neighbours.
template <class Value, int PARTS>
__device__ __forceinline__ void pack(const Pack& job) {
    const i64 row = blockIdx.x;
    const i32 span = blockIdx.y;
    for (i64 i = (blockIdx.y * (i64)gridDim.x + blockIdx.x) * PACK_THREADS + threadIdx.x; i < job.turn_count;
         i += (i64)gridDim.x * gridDim.y * PACK_THREADS) {
        job.turns[i] = 0;
    }
    const Groups groups = groups_of_span(job.first_group, job.groups, span);
    const i32 chunks = (groups.end - groups.begin) * (GROUP / 8);
    const Value* source = static_cast<const Value*>(job.block) + row * job.row_stride;
    float value[CHUNKS][8];
    u32 most = 0;
    UNROLL
    for (int i = 0; i < CHUNKS; ++i) {
        const i32 chunk = i * PACK_THREADS + threadIdx.x;
        const i64 first = (i64)((job.first_group + groups.begin) * GROUP - job.start) + (chunk / 16) * 128;
        UNROLL
        for (int e = 0; e < 8; ++e) {
            const i64 column = first + parameter_of(chunk % 16, e);
            const bool inside = chunk < chunks && row < job.rows && column >= 0 && column < job.columns;
            value[i][e] = inside ? to_float(source[column]) : 0.0f;
            most = max(most, __float_as_uint(value[i][e]) & 0x7FFFFFFFu);
        }
    }
    const i32 exponent = scale_exponent(largest(most));
    if (threadIdx.x == 0) {
        float* undo = job.undo + 2 * ((i64)span * job.padded_rows + row);
        undo[0] = power_of_two(-exponent >> 1);
        undo[1] = power_of_two(-exponent - (-exponent >> 1));
    }
    const i64 stages = (i64)job.groups * (GROUP / STAGE);
    const i64 row_tile = row / job.tile_rows;
    const int place = (int)(row % job.tile_rows);
    UNROLL
    for (int i = 0; i < CHUNKS; ++i) {
        const i32 chunk = i * PACK_THREADS + threadIdx.x;
        if (chunk >= chunks) continue;
        const i64 stage = (i64)groups.begin * (GROUP / STAGE) + chunk / 8;
        u32 high[4], low[4];
        UNROLL
        for (int e = 0; e < 4; ++e) {
            const float x = times_power(value[i][2 * e], exponent), y = times_power(value[i][2 * e + 1], exponent);
            high[e] = two_halves(x, y);
            if (PARTS > 1) low[e] = two_halves(x - low_half(high[e]), y - high_half(high[e]));
        }
        u8* tile = job.packed + place_of_tile(row_tile, stages, stage, PARTS, 0, job.tile_rows);
        *reinterpret_cast<uint4*>(tile + place_of_chunk(place, chunk % 8)) = make_uint4(high[0], high[1], high[2], high[3]);
        if (PARTS > 1) {
            u8* next = tile + job.tile_rows * 128;
            *reinterpret_cast<uint4*>(next + place_of_chunk(place, chunk % 8)) = make_uint4(low[0], low[1], low[2], low[3]);
        }
    }
}

#endif
