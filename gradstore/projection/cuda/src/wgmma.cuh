// The product on Hopper: two groups of four warps multiply with wgmma; a third fetches gradients ahead of them
// and hands over its registers.
#pragma once

#include "fold.cuh"
#include "fragments.cuh"

constexpr int MULTIPLIERS = 256;  // threads that multiply: two warpgroups
constexpr int THREADS = MULTIPLIERS + 128;
constexpr int SUMS = ROWS / 2;    // accumulators of a lane for 64 rows of P and ROWS rows of gradients
constexpr int TILE_K = 128 * TILES;
constexpr u32 TILE_BYTES = ROWS * 128;
constexpr u32 STAGE_BYTES = TILE_BYTES * LIMBS;

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool barrier_passed(u32 barrier, u32 parity) {
    u32 passed;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(passed)
        : "r"(barrier), "r"(parity)
        : "memory");
    return passed;
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity, u32* trouble, u32 code) {
    Patience patience{trouble, code};
    while (!barrier_passed(barrier, parity)) patience.wait();
}

// Copies one stage and completes the barrier by its bytes.
__device__ __forceinline__ void fetch(u32 target, const u8* source, u32 barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(STAGE_BYTES) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
                 "l"(source), "r"(STAGE_BYTES), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of the accumulators across a wait.
__device__ __forceinline__ void hold(float (&sum)[SUMS]) {
    UNROLL
    for (int i = 0; i < SUMS; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// Has fragments finished before the multiplication begins, which may not be interrupted by other instructions.
__device__ __forceinline__ void hold(u32 (&a)[2][P_LIMBS][PAIR]) {
    UNROLL
    for (int i = 0; i < 2 * P_LIMBS * PAIR; ++i) asm volatile("" : "+r"(a[i / (P_LIMBS * PAIR)][i / PAIR % P_LIMBS][i % PAIR])::"memory");
}

// Which stage of the ring is next, and the parity of its barriers.
struct Ring {
    u32 slot = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++slot == STAGES) {
            slot = 0;
            parity ^= 1;
        }
    }
};

// Multiplies the four steps of a stage: sum += a x tile for every pair of limbs that matters.
__device__ __forceinline__ void multiply(float (&sum)[SUMS], u32 (&a)[2][P_LIMBS][PAIR], u32 stage, bool add) {
    const u64 tile = describe_tile(stage);
    hold(a);
    wgmma_fence();
    UNROLL
    for (int step = 0; step < STEPS; ++step) {
        UNROLL
        for (int limb = 0; limb < LIMBS; ++limb) {
            wgmma(sum, &a[step >> 1][0][4 * (step & 1)], describe_step(tile, limb * TILE_BYTES, step), add || step > 0 || limb > 0);
        }
        if (P_LIMBS > 1) wgmma(sum, &a[step >> 1][P_LIMBS - 1][4 * (step & 1)], describe_step(tile, 0, step), 1);
    }
    wgmma_commit();
}

__device__ void fetch_all(const Job& job, u32 ring_address, u32 full, u32 empty) {
    Ring ring;
    const u32 units = unit_count(job);
    const i64 stages = (i64)job.groups * (GROUP / STAGE);
    for (u32 index = blockIdx.x; index < units; index += gridDim.x) {
        const Unit unit = unit_of(job, index);
        const i32 end = unit.groups.end * (GROUP / STAGE);
        for (i32 stage = unit.groups.begin * (GROUP / STAGE); stage < end; ++stage) {
            barrier_wait(empty + 8 * ring.slot, ring.parity ^ 1, job.trouble, GAVE_UP_ROOM);
            fetch(ring_address + ring.slot * STAGE_BYTES,
                  job.packed + place_of_tile(unit.row_tile, stages, stage, LIMBS, 0, ROWS), full + 8 * ring.slot);
            ring.advance();
        }
    }
}

// With two limbs the accumulators are emptied into float32 totals after every group: the tensor cores round towards zero.
constexpr bool PROMOTE = LIMBS > 1;
// A stage is free again when its last product is done, which is known after this many further stages.
constexpr int LAG = TILES == 1 ? 2 : 1;

struct Multiplier {
    Ring ring, behind;
    u32 ring_address, full, empty;

    __device__ __forceinline__ void release() {
        if (threadIdx.x % 32 == 0) barrier_arrive(empty + 8 * behind.slot);
        behind.advance();
    }

    __device__ __forceinline__ void run(const Job& job, const Unit& unit) {
        const Matrix matrix = {job.key0, job.key1, job.domain};
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        float sum[TILES][SUMS], total[TILES][SUMS];
        u32 a[2][2][P_LIMBS][PAIR];
        Kept kept[TILES];
        i32 first_row[TILES];
        UNROLL
        for (int m = 0; m < TILES; ++m) {
            first_row[m] = unit.k_tile * TILE_K + ((warp / 4) * TILES + m) * 64 + (warp % 4) * 16;
            UNROLL
            for (int i = 0; i < SUMS; ++i) {
                sum[m][i] = 0.0f;
                total[m][i] = 0.0f;
            }
        }
        for (i32 local = unit.groups.begin; local < unit.groups.end; ++local) {
            const u64 group = job.first_group + local;
            UNROLL
            for (int m = 0; m < TILES; ++m) begin_group(kept[m], matrix, group, job.first_k + first_row[m], lane);
            UNROLL
            for (int stage = 0; stage < GROUP / STAGE; ++stage) {
                barrier_wait(full + 8 * ring.slot, ring.parity, job.trouble, GAVE_UP_GRADIENTS);
                UNROLL
                for (int m = 0; m < TILES; ++m) {
                    u32(&fragments)[2][P_LIMBS][PAIR] = a[(stage * TILES + m) & 1];
                    wgmma_wait<1>();
                    if (m == TILES - 1 && (stage >= LAG || local > unit.groups.begin)) release();
                    UNROLL
                    for (int half = 0; half < 2; ++half) {
                        make_fragments(fragments[half], kept[m], matrix, group, job.first_k + first_row[m], lane, 2 * stage + half);
                    }
                    multiply(sum[m], fragments, ring_address + ring.slot * STAGE_BYTES, PROMOTE ? stage > 0 : true);
                }
                ring.advance();
            }
            if (PROMOTE || TILES == 1) wgmma_wait<0>();  // ptxas serialises one chain that stays open around a loop
            if (PROMOTE) {
                UNROLL
                for (int m = 0; m < TILES; ++m) {
                    hold(sum[m]);
                    UNROLL
                    for (int i = 0; i < SUMS; ++i) total[m][i] += sum[m][i];
                }
            }
        }
        wgmma_wait<0>();
        UNROLL
        for (int m = 0; m < TILES; ++m) hold(sum[m]);
        UNROLL
        for (int i = 0; i < LAG; ++i) release();
        fold<MULTIPLIERS / 2, 64>(job, unit, PROMOTE ? total : sum, first_row[0]);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) product(const __grid_constant__ Job job) {
    extern __shared__ u8 memory[];
    __shared__ u64 full_barriers[STAGES], empty_barriers[STAGES];
    const u32 ring_address = (shared_address(memory) + 1023) & ~1023u;
    const u32 full = shared_address(full_barriers), empty = shared_address(empty_barriers);
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < STAGES; ++slot) {
            barrier_init(full + 8 * slot, 1);
            barrier_init(empty + 8 * slot, MULTIPLIERS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= MULTIPLIERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == MULTIPLIERS) fetch_all(job, ring_address, full, empty);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    Multiplier multiplier;
    multiplier.ring_address = ring_address;
    multiplier.full = full;
    multiplier.empty = empty;
    const u32 units = unit_count(job);
    for (u32 index = blockIdx.x; index < units; index += gridDim.x) multiplier.run(job, unit_of(job, index));
}
