// The product by sums on the host: its kernels whole, from the same source, by emulated thread blocks.
#include "thread_block.h"

#include "entries.cuh"
#include "sums.cu"

thread_local i32 sums[BLOCK * ROWS];  // dynamic shared memory

extern "C" {

void emulate_pack(const SumsJob* job, int dtype, int tiles, int stretches) {
    const auto kernel = dtype == 0 ? pack_float32 : dtype == 1 ? pack_float16 : pack_bfloat16;
    host::launch(tiles, stretches, 32 * PACK_WARPS, [=] { kernel(*job); }, sums, sizeof sums);
}

void emulate_product(const SumsJob* job, int blocks) {
    host::launch(blocks, job->row_tiles, THREADS, [=] { product(*job); }, sums, sizeof sums);
}

int job_bytes() { return sizeof(SumsJob); }
int block_threads() { return THREADS; }
int pack_threads() { return 32 * PACK_WARPS; }
int cut() { return CUT; }
}
