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
    i32 groups, tile_rows, padded_rows;
    u32 turn_count;
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

constexpr int PACK_THREADS = 256;
constexpr int CHUNKS = SPAN / 8 / PACK_THREADS;  // of 8 values that a thread holds

// What one thread holds of a span of a row: lanes take neighbouring chunks, so each load is of 16 neighbours.
struct Held {
    float value[CHUNKS][8];
    u32 largest;  // absolute value as bits; NaN is larger than every number here
};

template <class Value>
BOTH void load_held(Held& held, const Pack& job, i64 row, i32 span, i32 thread) {
    const Groups groups = groups_of_span(job.first_group, job.groups, span);
    const i32 chunks = (groups.end - groups.begin) * (GROUP / 8);
    const Value* source = static_cast<const Value*>(job.block) + row * job.row_stride;
    held.largest = 0;
    UNROLL
    for (int i = 0; i < CHUNKS; ++i) {
        const i32 chunk = i * PACK_THREADS + thread;
        const i64 first = (i64)((job.first_group + groups.begin) * GROUP - job.start) + (chunk / 16) * 128;
        UNROLL
        for (int e = 0; e < 8; ++e) {
            const i64 column = first + parameter_of(chunk % 16, e);
            const bool inside = chunk < chunks && row < job.rows && column >= 0 && column < job.columns;
            held.value[i][e] = inside ? to_float(source[column]) : 0.0f;
            const u32 bits = bits_of(held.value[i][e]) & 0x7FFFFFFFu;
            held.largest = bits > held.largest ? bits : held.largest;
        }
    }
}

template <int PARTS>
BOTH void store_held(const Held& held, const Pack& job, i64 row, i32 span, i32 thread, i32 exponent) {
    const Groups groups = groups_of_span(job.first_group, job.groups, span);
    const i32 chunks = (groups.end - groups.begin) * (GROUP / 8);
    const i64 stages = (i64)job.groups * (GROUP / STAGE), row_tile = row / job.tile_rows;
    const int place = (int)(row % job.tile_rows);
    if (thread == 0) {
        float* undo = job.undo + 2 * ((i64)span * job.padded_rows + row);
        undo[0] = power_of_two(-exponent >> 1);
        undo[1] = power_of_two(-exponent - (-exponent >> 1));
    }
    UNROLL
    for (int i = 0; i < CHUNKS; ++i) {
        const i32 chunk = i * PACK_THREADS + thread;
        if (chunk >= chunks) continue;
        const i64 stage = (i64)groups.begin * (GROUP / STAGE) + chunk / 8;
        u8* tile = job.packed + place_of_tile(row_tile, stages, stage, PARTS, 0, job.tile_rows);
        Sixteen high, low;
        UNROLL
        for (int e = 0; e < 4; ++e) {
            const float x = times_power(held.value[i][2 * e], exponent), y = times_power(held.value[i][2 * e + 1], exponent);
            high.word[e] = two_halves(x, y);
            if (PARTS > 1) low.word[e] = two_halves(x - low_half(high.word[e]), y - high_half(high.word[e]));
        }
        *reinterpret_cast<Sixteen*>(tile + place_of_chunk(place, chunk % 8)) = high;
        if (PARTS > 1) *reinterpret_cast<Sixteen*>(tile + job.tile_rows * 128 + place_of_chunk(place, chunk % 8)) = low;
    }
}

#ifdef __CUDACC__

__device__ u32 largest_of_block(u32 mine) {
    __shared__ u32 of_warp[PACK_THREADS / 32];
    mine = __reduce_max_sync(0xFFFFFFFFu, mine);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
    __syncthreads();
    u32 all = 0;
    for (int warp = 0; warp < PACK_THREADS / 32; ++warp) all = max(all, of_warp[warp]);
    return all;
}

// One block of threads packs one span (blockIdx.y) of one row (blockIdx.x).
template <class Value, int PARTS>
__device__ __forceinline__ void pack(const Pack& job) {
    const u32 threads = gridDim.x * gridDim.y * PACK_THREADS;
    for (u32 i = (blockIdx.y * gridDim.x + blockIdx.x) * PACK_THREADS + threadIdx.x; i < job.turn_count; i += threads) {
        job.turns[i] = 0;
    }
    Held held;
    load_held<Value>(held, job, blockIdx.x, blockIdx.y, threadIdx.x);
    store_held<PARTS>(held, job, blockIdx.x, blockIdx.y, threadIdx.x, scale_exponent(largest_of_block(held.largest)));
}

#endif
