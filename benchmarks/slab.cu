// The rival's generator: signs of P as a bf16 matrix in memory. A lane makes one generator call, 128 entries of a row; a warp
// writes the calls of its 32 lanes two at a time, so that what it writes lies together.
#include "entries.cuh"

// out[k][128 b + i] for k in [0, count), b in [0, blocks): entries P[k, start + 128 b + i] with start = 128 first_block.
// blocks is a multiple of 32.
extern "C" __global__ void signs(u16* out, i64 count, i64 blocks, u64 first_block, u32 key0, u32 key1, u32 domain) {
    const i64 index = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= count * blocks) return;
    const i64 k = index / blocks, b = index % blocks;
    const u32 lane = threadIdx.x % 32, eight = lane % 16;
    const Words words = words_of({key0, key1, domain}, first_block + b, (u32)k);
    Sixteen* target = reinterpret_cast<Sixteen*>(out + (index - lane) * 128);
    UNROLL
    for (int two = 0; two < 16; ++two) {
        const int owner = 2 * two + lane / 16;
        u32 word = 0;
        UNROLL
        for (int w = 0; w < 4; ++w) {
            const u32 found = __shfl_sync(0xFFFFFFFFu, words.w[w], owner);
            word = eight / 4 == w ? found : word;
        }
        const u32 bits = word >> (8 * (eight % 4));
        Sixteen values;
        UNROLL
        for (int i = 0; i < 4; ++i) {
            values.word[i] = 0x3F803F80u | (~bits >> (2 * i) & 1) << 15 | (~bits >> (2 * i + 1) & 1) << 31;
        }
        target[16 * owner + eight] = values;
    }
}
