// The rival's generator: signs of P as a bf16 matrix in memory, one generator call a thread, 128 entries of a row.
#include "entries.cuh"

// out[k][128 b + i] for k in [0, count), b in [0, blocks): entries P[k, start + 128 b + i] with start = 128 first_block.
extern "C" __global__ void signs(u16* out, i64 count, i64 blocks, u64 first_block, u32 key0, u32 key1, u32 domain) {
    const i64 index = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= count * blocks) return;
    const i64 k = index / blocks, b = index % blocks;
    const Words words = words_of({key0, key1, domain}, first_block + b, (u32)k);
    Sixteen* target = reinterpret_cast<Sixteen*>(out + (k * blocks + b) * 128);
    UNROLL
    for (int eight = 0; eight < 16; ++eight) {
        const u32 bits = words.w[eight / 4] >> (8 * (eight % 4));
        Sixteen values;
        UNROLL
        for (int i = 0; i < 4; ++i) {
            values.word[i] = 0x3F803F80u | (~bits >> (2 * i) & 1) << 15 | (~bits >> (2 * i + 1) & 1) << 31;
        }
        target[eight] = values;
    }
}
