// The fused projection: out += gradients x P^T, with P made in registers and never stored.
//
// Two kernels a launch. `pack_*` turns float gradients into scaled 16-bit limbs in the order in which the product reads them.
// `product` keeps a tile of the output (128 TILES rows of P by ROWS rows of gradients) in registers while it walks over a
// span of parameters, making fragments of P from the counter-based generator as it goes.
//
// Compiled at first use for one choice of KIND (0 signs, 1 normals), LIMBS, ROWS, TILES and STAGES. All sums are in a fixed
// order that depends on parameters' indices alone: not on the rows, nor on the number of multiprocessors.

#include "entries.cuh"
#include "fold.cuh"
#include "fragments.cuh"
#include "pack.cuh"

#if WGMMA
#include "wgmma.cuh"
#else
#include "mma.cuh"
#endif

extern "C" __global__ void __launch_bounds__(PACK_THREADS) pack_float32(const __grid_constant__ Pack job) {
    pack<float, LIMBS>(job);
}

extern "C" __global__ void __launch_bounds__(PACK_THREADS) pack_float16(const __grid_constant__ Pack job) {
    pack<Half, LIMBS>(job);
}

extern "C" __global__ void __launch_bounds__(PACK_THREADS) pack_bfloat16(const __grid_constant__ Pack job) {
    pack<BFloat, LIMBS>(job);
}
