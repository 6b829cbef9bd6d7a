// From accumulators to the output: spans of a tile are added in their order, one launch and one thread block after another.
#pragma once

#include "pack.cuh"

struct Job {
    const u8* packed;
    const i32* exponents;
    float* out;  // [rows, count], adjacent columns, rows `out_stride` floats apart
    i32* turns;  // [tiles]: how many spans of this launch have been added to the tile
    i64 rows, count, out_stride;
    u64 first_group;
    u32 first_k, key0, key1, domain;
    i32 groups, spans, padded_rows, row_tiles, k_tiles;
};

// One unit of work: a tile of the output and a span. Neighbouring units share a tile of gradients, so that it stays in L2.
struct Unit {
    i32 span, tile, row_tile, k_tile;
    Groups groups;
};

BOTH i64 unit_count(const Job& job) { return (i64)job.spans * job.row_tiles * job.k_tiles; }

BOTH Unit unit_of(const Job& job, i64 index) {
    const i32 tiles = job.row_tiles * job.k_tiles;
    const i32 span = (i32)(index / tiles), tile = (i32)(index % tiles);
    return {span, tile, tile / job.k_tiles, tile % job.k_tiles, groups_of_span(job.first_group, job.groups, span)};
}

#ifdef __CUDACC__

// Named barrier of the warps that multiply; the warp that only copies takes no part.
template <int THREADS>
__device__ __forceinline__ void barrier() {
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

template <int THREADS>
__device__ void wait_for_turn(const Job& job, const Unit& unit) {
    if (unit.span == 0) return;
    if (threadIdx.x == 0) {
        i32 turn;
        do {
            asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(turn) : "l"(job.turns + unit.tile) : "memory");
        } while (turn != unit.span);
    }
    barrier<THREADS>();
}

template <int THREADS>
__device__ void pass_turn(const Job& job, const Unit& unit) {
    if (job.spans == 1) return;
    __threadfence();
    barrier<THREADS>();
    if (threadIdx.x == 0) {
        asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(job.turns + unit.tile), "r"(unit.span + 1) : "memory");
    }
}

// Adds accumulators to the output. sum[m][4 i + r] belongs to row 8 i + 2 t + r % 2 of gradients and to row
// first_row[m] + g + 8 (r / 2) of P. Reads and writes pass by the first-level cache: other multiprocessors write here too.
template <int THREADS, int TILES, int COUNT>
__device__ __forceinline__ void fold(const Job& job, const Unit& unit, const float (&sum)[TILES][COUNT],
                                     const i32 (&first_row)[TILES], int tile_rows) {
    wait_for_turn<THREADS>(job, unit);
    const u32 lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
    UNROLL
    for (int i = 0; i < COUNT / 4; ++i) {
        UNROLL
        for (int side = 0; side < 2; ++side) {
            const i64 row = (i64)unit.row_tile * tile_rows + 8 * i + 2 * t + side;
            if (row >= job.rows) continue;
            const i32 exponent = -__ldg(job.exponents + (i64)unit.span * job.padded_rows + row);
            float* out = job.out + row * job.out_stride;
            UNROLL
            for (int m = 0; m < TILES; ++m) {
                UNROLL
                for (int half = 0; half < 2; ++half) {
                    const i64 k = first_row[m] + (i64)g + 8 * half;
                    if (k < job.count) __stcg(out + k, __ldcg(out + k) + times_power(sum[m][4 * i + 2 * half + side], exponent));
                }
            }
        }
    }
    pass_turn<THREADS>(job, unit);
}

#endif
