// The product on every tensor core since Ampere: eight warps of 16 TILES rows of P each, gradients through cp.async.
#pragma once

#include "fold.cuh"
#include "fragments.cuh"

constexpr int THREADS = 256;
constexpr int SUMS = ROWS / 2;  // accumulators of a lane for 16 rows of P and ROWS rows of gradients
constexpr int TILE_K = 128 * TILES;
constexpr u32 TILE_BYTES = ROWS * 128;
constexpr u32 STAGE_BYTES = TILE_BYTES * LIMBS;
constexpr bool PROMOTE = LIMBS > 1;

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ void mma(float* sum, const u32* a, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Gradients of one step for 16 rows: two fragments of 8 rows, two registers each.
__device__ __forceinline__ void load_fragments(u32 (&b)[4], u32 tile, int first_row, int step, u32 lane) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(tile + place_for_lane(first_row, step, lane))
                 : "memory");
}

// Copies one stage, 16 bytes a thread and time; `source` is null beyond the end, where an empty group keeps the count.
__device__ __forceinline__ void fetch(u32 target, const u8* source) {
    if (source) {
        for (u32 at = threadIdx.x * 16; at < STAGE_BYTES; at += THREADS * 16) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target + at), "l"(source + at) : "memory");
        }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Multiplies two steps, the first or second `half` of a stage.
__device__ __forceinline__ void multiply(float (&sum)[TILES][SUMS], const u32 (&a)[TILES][P_LIMBS][PAIR], u32 stage, int half,
                                         u32 lane) {
    UNROLL
    for (int step = 0; step < 2; ++step) {
        UNROLL
        for (int limb = 0; limb < LIMBS; ++limb) {
            UNROLL
            for (int row = 0; row < ROWS; row += 16) {
                u32 b[4];
                load_fragments(b, stage + limb * TILE_BYTES, row, 2 * half + step, lane);
                UNROLL
                for (int m = 0; m < TILES; ++m) {
                    UNROLL
                    for (int p_limb = 0; p_limb < (limb ? 1 : P_LIMBS); ++p_limb) {
                        mma(&sum[m][row / 2], &a[m][p_limb][4 * step], b[0], b[1]);
                        mma(&sum[m][row / 2 + 4], &a[m][p_limb][4 * step], b[2], b[3]);
                    }
                }
            }
        }
    }
}

__device__ __forceinline__ void run(const Job& job, const Unit& unit, u32 ring) {
    const Matrix matrix = {job.key0, job.key1, job.domain};
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sum[TILES][SUMS], total[TILES][SUMS];
    u32 a[TILES][P_LIMBS][PAIR];
    Kept kept[TILES];
    i32 first_row[TILES];
    UNROLL
    for (int m = 0; m < TILES; ++m) {
        first_row[m] = unit.k_tile * TILE_K + (warp * TILES + m) * 16;
        UNROLL
        for (int i = 0; i < SUMS; ++i) {
            sum[m][i] = 0.0f;
            total[m][i] = 0.0f;
        }
    }
    constexpr int EACH = GROUP / STAGE;
    const i32 count = (unit.groups.end - unit.groups.begin) * EACH;
    const u8* source = job.packed + place_of_tile(unit.row_tile, (i64)job.groups * EACH, unit.groups.begin * EACH, LIMBS, 0, ROWS);
    for (i32 next = 0; next < STAGES - 1; ++next) {
        fetch(ring + next * STAGE_BYTES, next < count ? source + (i64)next * STAGE_BYTES : nullptr);
    }
    for (i32 local = unit.groups.begin, done = 0; local < unit.groups.end; ++local) {
        const u64 group = job.first_group + local;
        UNROLL
        for (int m = 0; m < TILES; ++m) begin_group(kept[m], matrix, group, job.first_k + first_row[m], lane);
        UNROLL
        for (int stage = 0; stage < EACH; ++stage, ++done) {
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
            __syncthreads();
            const i32 next = done + STAGES - 1;
            fetch(ring + next % STAGES * STAGE_BYTES, next < count ? source + (i64)next * STAGE_BYTES : nullptr);
            UNROLL
            for (int half = 0; half < 2; ++half) {
                UNROLL
                for (int m = 0; m < TILES; ++m) {
                    make_fragments(a[m], kept[m], matrix, group, job.first_k + first_row[m], lane, 2 * stage + half);
                }
                multiply(sum, a, ring + done % STAGES * STAGE_BYTES, half, lane);
            }
        }
        if (PROMOTE) {
            UNROLL
            for (int m = 0; m < TILES; ++m) {
                UNROLL
                for (int i = 0; i < SUMS; ++i) {
                    total[m][i] += sum[m][i];
                    sum[m][i] = 0.0f;
                }
            }
        }
    }
    __syncthreads();  // the next unit's copies may overwrite any stage
    fold<THREADS, 16>(job, unit, PROMOTE ? total : sum, first_row[0]);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) product(const __grid_constant__ Job job) {
    extern __shared__ u8 memory[];
    const u32 ring = (shared_address(memory) + 1023) & ~1023u;
    const u32 units = unit_count(job);
    for (u32 index = blockIdx.x; index < units; index += gridDim.x) run(job, unit_of(job, index), ring);
}
