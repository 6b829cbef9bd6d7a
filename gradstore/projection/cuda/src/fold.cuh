// From accumulators to the output: spans of a tile are added in their order, one launch and one thread block after another.
#pragma once

#include "pack.cuh"
#include "waiting.cuh"

struct Job {
    const u8* packed;
    const float* undo;
    float* out;  // [rows, count], adjacent columns, rows `out_stride` floats apart
    i32* turns;  // [tiles][2]: how many spans of this launch have been added to the parts of a tile
    u32* trouble;  // in the host's memory: why the product gave up, if it did
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

BOTH u32 unit_count(const Job& job) { return (u32)job.spans * job.row_tiles * job.k_tiles; }

BOTH Unit unit_of(const Job& job, u32 index) {
    const u32 k_tiles = job.k_tiles, tiles = job.row_tiles * k_tiles, span = index / tiles, tile = index % tiles;
    return {(i32)span, (i32)tile, (i32)(tile / k_tiles), (i32)(tile % k_tiles),
            groups_of_span(job.first_group, job.groups, (i32)span)};
}

// Reads and writes of the output pass by the first-level cache: other multiprocessors write there too.
#ifdef __CUDACC__
__device__ __forceinline__ float read(const float* out) { return __ldcg(out); }
__device__ __forceinline__ void write(float* out, float value) { __stcg(out, value); }
#else
inline float read(const float* out) { return *out; }
inline void write(float* out, float value) { *out = value; }
#endif

constexpr int BATCH = 4;  // fragments of 8 rows whose old values are read together, to wait for memory once

// Adds a lane's accumulators to the output. sum[m][4 i + r] belongs to row 8 i + 2 t + r % 2 of gradients and to row
// first_k + PITCH m + g + 8 (r / 2) of P.
template <int PITCH, int PIECES, int COUNT>
BOTH void fold_lane(const Job& job, const Unit& unit, const float (&sum)[PIECES][COUNT], i32 first_k, u32 lane) {
    const u32 g = lane >> 2, t = lane & 3;
    const i64 first_row = (i64)unit.row_tile * (2 * COUNT) + 2 * t, k = (i64)first_k + g;
    const float* undo = job.undo + 2 * ((i64)unit.span * job.padded_rows + first_row);
    float* column = job.out + first_row * job.out_stride + k;
    i64 rows = job.rows - first_row;
    UNROLL
    for (int begin = 0; begin < COUNT / 4; begin += BATCH) {
        float old[BATCH][2][PIECES][2];
        Sixteen factors[BATCH];  // two for each of two rows
        float* at = column;
        UNROLL
        for (int i = 0; i < BATCH; ++i, at += 8 * job.out_stride) {
            factors[i] = *reinterpret_cast<const Sixteen*>(undo + 16 * i);
            UNROLL
            for (int j = 0; j < 4 * PIECES; ++j) {
                const int side = j & 1, half = (j >> 1) & 1, m = j >> 2;
                const bool inside = 8 * i + side < rows && k + PITCH * m + 8 * half < job.count;
                old[i][side][m][half] = inside ? read(at + side * job.out_stride + PITCH * m + 8 * half) : 0.0f;
            }
        }
        UNROLL
        for (int i = 0; i < BATCH; ++i, column += 8 * job.out_stride) {
            UNROLL
            for (int j = 0; j < 4 * PIECES; ++j) {
                const int side = j & 1, half = (j >> 1) & 1, m = j >> 2;
                if (8 * i + side < rows && k + PITCH * m + 8 * half < job.count) {
                    const float value = sum[m][4 * (begin + i) + 2 * half + side] * float_of(factors[i].word[2 * side]) *
                                        float_of(factors[i].word[2 * side + 1]);
                    write(column + side * job.out_stride + PITCH * m + 8 * half, old[i][side][m][half] + value);
                }
            }
        }
        rows -= 8 * BATCH;
        undo += 16 * BATCH;
    }
}

#ifdef __CUDACC__

// The threads that own a part of a tile, and take turns at it with those of other spans. On Hopper each warpgroup goes its
// own way, so that one may write while the other multiplies. A turn is another block's to pass, so all blocks must run at
// once: the launch is cooperative, and no larger than what the device holds.
template <int MEMBERS>
struct Crew {
    const Job& job;
    const Unit& unit;
    u32 part = threadIdx.x / MEMBERS;
    bool leads = threadIdx.x % MEMBERS == 0;

    __device__ i32* turn() const { return job.turns + 2 * unit.tile + part; }

    __device__ void meet() const { asm volatile("bar.sync %0, %1;" ::"r"(1 + part), "n"(MEMBERS) : "memory"); }

    __device__ void wait_for_turn() const {
        if (unit.span == 0) return;
        Patience patience{job.trouble, GAVE_UP_TURN};
        while (leads) {
            i32 reached;
            asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(reached) : "l"(turn()) : "memory");
            if (reached == unit.span) break;
            patience.wait();
        }
        __syncwarp();
        meet();
    }

    __device__ void pass_turn() const {
        if (unit.span + 1 == job.spans) return;
        __threadfence();
        meet();
        if (leads) asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(turn()), "r"(unit.span + 1) : "memory");
    }
};

template <int MEMBERS, int PITCH, int PIECES, int COUNT>
__device__ __forceinline__ void fold(const Job& job, const Unit& unit, const float (&sum)[PIECES][COUNT], i32 first_k) {
    const Crew<MEMBERS> crew{job, unit};
    crew.wait_for_turn();
    fold_lane<PITCH>(job, unit, sum, first_k, threadIdx.x % 32);
    crew.pass_turn();
}

#endif
