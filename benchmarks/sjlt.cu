// The sparse projection (SJLT) of gradients on a card, as `sjlt.py` launches it: what it would take, beside the dense product.
//
// A column p of P has one non-zero, +32 or -32, in each block of 1024 rows. So a block of rows is a table of 1024 sums for each
// row of gradients, and a gradient is added to one of them. Tables of 32 rows of gradients are in shared memory, a lane for a
// row: lanes never meet in a bank. Warps may meet in a sum, and integers add up to the same in any order: gradients become
// integers of a power-of-two unit for each (row, EACH parameters), so small that no sum overflows.
#include "entries.cuh"

constexpr int EACH = 4096;   // parameters that share a row's unit
constexpr int ROWS = 32;     // of gradients in a tile
constexpr int BLOCK = 1024;  // rows of P with one non-zero a column
constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int HELD = BLOCK * ROWS / THREADS;  // sums that a thread takes out
constexpr int PACK_WARPS = 8;

struct Job {
    const float* block;  // [rows, columns], rows `row_stride` apart
    i32* packed;         // [row_tiles][spans * EACH][ROWS]
    float* unit;         // [spans][row_tiles * ROWS]
    float* out;          // [rows, count], rows `out_stride` apart
    i64 rows, columns, row_stride, out_stride;
    u64 first;   // parameter that the launch begins with, a multiple of EACH
    i64 column;  // of `block` that it stands in; negative where the block begins later
    u32 key0, key1, domain;
    i32 spans, row_tiles;
};

__device__ __forceinline__ float gradient(const Job& job, i64 row, i64 column) {
    return row < job.rows && column >= 0 && column < job.columns ? job.block[row * job.row_stride + column] : 0.0f;
}

// Tile blockIdx.x, span blockIdx.y. The sum of a row's absolute values comes to [2^29, 2^30), so that no sum overflows.
extern "C" __global__ void __launch_bounds__(32 * PACK_WARPS) pack(const __grid_constant__ Job job) {
    __shared__ i32 exponents[ROWS];
    __shared__ i32 turned[PACK_WARPS][32][33];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 first_row = (i64)blockIdx.x * ROWS, first_column = job.column + (i64)blockIdx.y * EACH;
    for (int r = warp; r < ROWS; r += PACK_WARPS) {
        double sum = 0.0;
        for (int i = lane; i < EACH; i += 32) sum += fabs((double)gradient(job, first_row + r, first_column + i));
        for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
        if (lane == 0) {
            const bool finite = sum <= 1e300;
            const i32 exponent = finite && sum > 0.0 ? 29 - ilogb(sum) : 0;
            exponents[r] = exponent;
            const float unit = (float)ldexp(32.0, -exponent);
            job.unit[(i64)blockIdx.y * job.row_tiles * ROWS + first_row + r] = finite ? unit : float_of(0x7FC00000u);
        }
    }
    __syncthreads();
    i32* target = job.packed + ((i64)blockIdx.x * job.spans + blockIdx.y) * EACH * ROWS;
    for (int chunk = warp; chunk < EACH / 32; chunk += PACK_WARPS) {
        for (int r = 0; r < ROWS; ++r) {
            const float value = gradient(job, first_row + r, first_column + chunk * 32 + lane);
            turned[warp][r][lane] = __float2int_rn(times_power(value, exponents[r]));
        }
        __syncwarp();
        for (int i = 0; i < 32; ++i) target[(chunk * 32 + i) * ROWS + lane] = turned[warp][lane][i];
        __syncwarp();
    }
}

// Where a sum lies while rows of the output are read and written: lanes then take neighbouring sums of a row.
__device__ __forceinline__ int skewed(int bucket, int row) { return bucket * ROWS + (row ^ (bucket & 31)); }

// Block of rows of P blockIdx.x, tile of rows of gradients blockIdx.y.
extern "C" __global__ void __launch_bounds__(THREADS, 1) product(const __grid_constant__ Job job) {
    extern __shared__ i32 sums[];
    float* floats = reinterpret_cast<float*>(sums);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 first_row = (i64)blockIdx.y * ROWS;
    float* out = job.out + first_row * job.out_stride + (i64)blockIdx.x * BLOCK;
    for (int i = 0; i < HELD; ++i) {
        const int row = (i * WARPS + warp) / (BLOCK / 32), bucket = (i * WARPS + warp) % (BLOCK / 32) * 32 + lane;
        floats[skewed(bucket, row)] = first_row + row < job.rows ? out[row * job.out_stride + bucket] : 0.0f;
    }
    __syncthreads();
    float total[HELD];
    UNROLL
    for (int i = 0; i < HELD; ++i) total[i] = floats[skewed(i * WARPS + warp, lane)];
    __syncthreads();
    UNROLL
    for (int i = 0; i < HELD; ++i) sums[(i * WARPS + warp) * ROWS + lane] = 0;
    __syncthreads();
    const u32 call = 0x80000000u + blockIdx.x / 4, word = blockIdx.x % 4;
    for (int span = 0; span < job.spans; ++span) {
        const i32* source = job.packed + ((i64)blockIdx.y * job.spans + span) * EACH * ROWS + lane;
        for (int chunk = warp; chunk < EACH / 32; chunk += WARPS) {
            const u64 p = job.first + (u64)span * EACH + chunk * 32 + lane;
            const Words words = philox((u32)p, (u32)(p >> 32), call, job.domain, job.key0, job.key1);
            const u32 w = word == 0 ? words.w[0] : word == 1 ? words.w[1] : word == 2 ? words.w[2] : words.w[3];
            const u32 mine = (w >> 22) << 5 | (w & 1);
            _Pragma("unroll 1")
            for (int some = 0; some < 32; some += 8) {
                i32 value[8];
                UNROLL
                for (int i = 0; i < 8; ++i) value[i] = source[(chunk * 32 + some + i) * ROWS];
                UNROLL
                for (int i = 0; i < 8; ++i) {
                    const u32 place = __shfl_sync(0xFFFFFFFFu, mine, some + i);
                    atomicAdd(&sums[(place & ~31u) + lane], place & 1 ? value[i] : -value[i]);
                }
            }
        }
        __syncthreads();
        const float unit = job.unit[(i64)span * job.row_tiles * ROWS + first_row + lane];
        UNROLL
        for (int i = 0; i < HELD; ++i) {
            i32& sum = sums[(i * WARPS + warp) * ROWS + lane];
            total[i] += (float)sum * unit;
            sum = 0;
        }
        __syncthreads();
    }
    UNROLL
    for (int i = 0; i < HELD; ++i) floats[skewed(i * WARPS + warp, lane)] = total[i];
    __syncthreads();
    for (int i = 0; i < HELD; ++i) {
        const int row = (i * WARPS + warp) / (BLOCK / 32), bucket = (i * WARPS + warp) % (BLOCK / 32) * 32 + lane;
        if (first_row + row < job.rows) out[row * job.out_stride + bucket] = floats[skewed(bucket, row)];
    }
}
