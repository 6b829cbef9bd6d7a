// The product with a sparse P by sums of integers: out += gradients x P^T. Compiles for the device and, for tests, on the host.
//
// A column of P has one non-zero, +32 or -32, in each block of 1024 rows. So a block of rows is a table of 1024 sums for each
// row of gradients, and a gradient is added to one of them. Tables of ROWS rows of gradients are in shared memory, a lane for
// a row: lanes never meet in a sum. Warps may meet in one, and integers add up to the same in any order: gradients become
// integers of a power-of-two unit for each (row, STRETCH parameters), so small that no sum overflows.
//
// Two kernels a launch. `pack_*` makes the integers, in the order in which `product` reads them. `product` takes the sums of a
// stretch out of shared memory as floats, adds them in registers, and adds these to the output after every CUT parameters.
// Stretches and cuts are counted from parameter 0, so the bits of a row depend neither on the launches nor on other rows.
//
// Compiled at first use for one choice of ROWS (by shared memory) and STRETCH (by precision).
#include "entries.cuh"

constexpr int CUT = 32768;   // parameters whose sums go to the output together; the same number stands in sparse_geometry.py
constexpr int BLOCK = 1024;  // rows of P with one non-zero a column
constexpr int SIZE = 32;     // of a non-zero
constexpr int PACK_WARPS = 8, WARPS = 16, THREADS = 32 * WARPS;
constexpr int HELD = BLOCK * ROWS / THREADS;  // sums that a thread takes out
constexpr int AT_ONCE = 32 / ROWS;            // columns that a warp adds together
constexpr int BATCH = 8;                      // gradients that a lane reads together, to wait for memory once
constexpr int OUTPUTS = 4;                    // and outputs
constexpr u32 FIRST_CALL = 0x80000000u;       // third words of the counter from here on are no k of a dense kind

// A row's sum of absolute values comes to [2^29, 2^30). Rounding moves each of its values by at most a half, so that all of
// them together stay below 2^30 + STRETCH / 2 + 1 < 2^31 in size, and so does every sum of some, in any order.
constexpr int TOP = 29;
static_assert((1u << (TOP + 1)) + STRETCH / 2 + 1 < 1u << 31, "no sum overflows");

struct SumsJob {
    const void* block;  // [rows, columns], adjacent columns, rows `row_stride` elements apart
    i32* packed;        // [row_tiles][stretches * STRETCH][ROWS]
    float* undo;        // [stretches][row_tiles * ROWS][2]: two powers of two whose product is the unit; NaN of what is not finite
    float* out;         // [rows, count], adjacent columns, rows `out_stride` floats apart
    i64 rows, columns, row_stride, count, out_stride;
    u64 first_stretch;  // of this launch, counted from parameter 0
    i64 column;         // of `block` that it begins with; negative where the block begins later
    u32 first_k, key0, key1, domain;
    i32 stretches, row_tiles;
};

// Chunks of 32 parameters of a stretch, counted from its first, in which the block has columns.
struct Chunks {
    int begin, end;
};

BOTH Chunks chunks_of(const SumsJob& job, i32 stretch) {
    const i64 column = job.column + (i64)stretch * STRETCH, left = job.columns - column;
    return {column < 0 ? (int)(-column / 32) : 0, left < STRETCH ? (int)((left + 31) / 32) : STRETCH / 32};
}

template <class Value>
BOTH float gradient(const SumsJob& job, i64 row, i64 column) {
    const bool inside = row < job.rows && column >= 0 && column < job.columns;
    return inside ? to_float(static_cast<const Value*>(job.block)[row * job.row_stride + column]) : 0.0f;
}

// ---- gradients to integers -------------------------------------------------------------------------------------------------

// Finds the unit of a row's stretch by one warp.
template <class Value>
__device__ __forceinline__ i32 find_unit(const SumsJob& job, i64 row, i32 stretch, int lane) {
    const i64 column = job.column + (i64)stretch * STRETCH;
    double sum = 0.0;
    for (int i = lane; i < STRETCH; i += 32) sum += fabs((double)gradient<Value>(job, row, column + i));
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    const bool finite = sum <= 1e300;
    const i32 exponent = finite && sum > 0.0 ? TOP - ilogb(sum) : 0;
    if (lane == 0) {
        float* undo = job.undo + 2 * ((i64)stretch * job.row_tiles * ROWS + row);
        undo[0] = finite ? power_of_two(-exponent >> 1) : float_of(0x7FC00000u);
        undo[1] = SIZE * power_of_two(-exponent - (-exponent >> 1));
    }
    return exponent;
}

// One block of threads packs a stretch (blockIdx.y) of a tile of rows (blockIdx.x).
template <class Value>
__device__ __forceinline__ void pack(const SumsJob& job) {
    __shared__ i32 exponents[ROWS];
    __shared__ i32 turned[PACK_WARPS][ROWS][33];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 first_row = (i64)blockIdx.x * ROWS;
    const i32 stretch = blockIdx.y;
    for (int r = warp; r < ROWS; r += PACK_WARPS) {
        const i32 exponent = find_unit<Value>(job, first_row + r, stretch, lane);
        if (lane == 0) exponents[r] = exponent;
    }
    __syncthreads();
    const i64 column = job.column + (i64)stretch * STRETCH + lane;
    i32* target = job.packed + ((i64)blockIdx.x * job.stretches + stretch) * STRETCH * ROWS + lane;
    const Chunks chunks = chunks_of(job, stretch);
    for (int chunk = chunks.begin + warp; chunk < chunks.end; chunk += PACK_WARPS) {
        for (int r = 0; r < ROWS; ++r) {
            const float value = gradient<Value>(job, first_row + r, column + chunk * 32);
            turned[warp][r][lane] = __float2int_rn(times_power(value, exponents[r]));
        }
        __syncwarp();
        for (int i = 0; i < ROWS; ++i) target[(chunk * ROWS + i) * 32] = turned[warp][lane % ROWS][i * AT_ONCE + lane / ROWS];
        __syncwarp();
    }
}

extern "C" __global__ void __launch_bounds__(32 * PACK_WARPS) pack_float32(const __grid_constant__ SumsJob job) {
    pack<float>(job);
}

extern "C" __global__ void __launch_bounds__(32 * PACK_WARPS) pack_float16(const __grid_constant__ SumsJob job) {
    pack<Half>(job);
}

extern "C" __global__ void __launch_bounds__(32 * PACK_WARPS) pack_bfloat16(const __grid_constant__ SumsJob job) {
    pack<BFloat>(job);
}

// ---- integers to sums ------------------------------------------------------------------------------------------------------

// Twice where the sums begin that a column is added to in block j of rows of P, and in bit 0 whether its non-zero is positive.
BOTH u32 place_of(const SumsJob& job, u64 p, u32 j) {
    const Words words = philox((u32)p, (u32)(p >> 32), FIRST_CALL + j / 4, job.domain, job.key0, job.key1);
    const u32 word = j % 4, w = word == 0 ? words.w[0] : word == 1 ? words.w[1] : word == 2 ? words.w[2] : words.w[3];
    return (w >> 22) * (2 * ROWS) | (w & 1);
}

// Adds a stretch to the table of block j of rows: each lane finds the places of a column, and all take it in turns.
__device__ __forceinline__ void add_stretch(const SumsJob& job, i32* sums, i64 tile, i32 stretch, u32 j) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u64 first = (job.first_stretch + stretch) * STRETCH;
    const i32* source = job.packed + (tile * job.stretches + stretch) * STRETCH * ROWS + lane;
    const Chunks chunks = chunks_of(job, stretch);
    for (int chunk = chunks.begin + warp; chunk < chunks.end; chunk += WARPS) {
        const u32 mine = place_of(job, first + chunk * 32 + lane, j);
        _Pragma("unroll 1")
        for (int begin = 0; begin < ROWS; begin += BATCH) {
            i32 value[BATCH];
            UNROLL
            for (int i = 0; i < BATCH; ++i) value[i] = source[(chunk * ROWS + begin + i) * 32];
            UNROLL
            for (int i = 0; i < BATCH; ++i) {
                const u32 place = __shfl_sync(0xFFFFFFFFu, mine, (begin + i) * AT_ONCE + lane / ROWS);
                atomicAdd(&sums[(place >> 1) + lane % ROWS], place & 1 ? value[i] : -value[i]);
            }
        }
    }
}

// Where a sum lies while it goes to the output: lanes then take neighbouring sums of a row, from different banks.
BOTH int skewed(int bucket, int row) { return bucket * ROWS + (row ^ (bucket % ROWS)); }

// Adds what the threads hold to the output, by way of the table, whose sums have been taken out by all.
__device__ __forceinline__ void add_to_output(const SumsJob& job, float* table, const float (&held)[HELD], i64 tile, u32 j) {
    UNROLL
    for (int i = 0; i < HELD; ++i) {
        const int place = i * THREADS + threadIdx.x;
        table[skewed(place / ROWS, place % ROWS)] = held[i];
    }
    __syncthreads();
    const i64 first_row = tile * ROWS, first = (i64)j * BLOCK - job.first_k;
    _Pragma("unroll 1")
    for (int begin = 0; begin < HELD; begin += OUTPUTS) {
        float* at[OUTPUTS];
        float old[OUTPUTS];
        UNROLL
        for (int i = 0; i < OUTPUTS; ++i) {
            const int place = (begin + i) * THREADS + threadIdx.x;
            const i64 row = first_row + place / BLOCK, k = first + place % BLOCK;
            at[i] = row < job.rows && k >= 0 && k < job.count ? job.out + row * job.out_stride + k : nullptr;
            old[i] = at[i] ? *at[i] : 0.0f;
        }
        UNROLL
        for (int i = 0; i < OUTPUTS; ++i) {
            const int place = (begin + i) * THREADS + threadIdx.x;
            if (at[i]) *at[i] = old[i] + table[skewed(place % BLOCK, place / BLOCK)];
        }
    }
    __syncthreads();
}

__device__ __forceinline__ void clear(i32* sums) {
    UNROLL
    for (int i = 0; i < HELD; ++i) sums[i * THREADS + threadIdx.x] = 0;
}

// One block of threads multiplies a tile of rows of gradients (blockIdx.y) by a block of rows of P (blockIdx.x).
extern "C" __global__ void __launch_bounds__(THREADS, 1) product(const __grid_constant__ SumsJob job) {
    extern __shared__ i32 sums[];
    const i64 tile = blockIdx.y;
    const u32 j = job.first_k / BLOCK + blockIdx.x;
    const float* undo = job.undo + 2 * (tile * ROWS + threadIdx.x % ROWS);
    for (i32 stretch = 0; stretch < job.stretches;) {
        const i32 left = CUT / STRETCH - (i32)((job.first_stretch + stretch) % (CUT / STRETCH));
        const i32 end = left < job.stretches - stretch ? stretch + left : job.stretches;
        float held[HELD];
        UNROLL
        for (int i = 0; i < HELD; ++i) held[i] = 0.0f;
        for (; stretch < end; ++stretch, undo += 2 * (i64)job.row_tiles * ROWS) {
            clear(sums);
            __syncthreads();
            add_stretch(job, sums, tile, stretch, j);
            __syncthreads();
            const float unit0 = undo[0], unit1 = undo[1];
            UNROLL
            for (int i = 0; i < HELD; ++i) held[i] += (float)sums[i * THREADS + threadIdx.x] * unit0 * unit1;
        }
        __syncthreads();
        add_to_output(job, reinterpret_cast<float*>(sums), held, tile, j);
    }
}
