// Includes the header KERNELS once for each level, in a namespace of the level's name, with VECTOR_BYTES in a register and,
// at "amx", MATRIX_UNIT. A source says by FOR_AMX, FOR_AVX512 and FOR_AVX2, 1 or 0, for which levels code of its own pays;
// at others the next slower level's is used. To be included once, in the source's own namespace.

#define VECTOR_BYTES 16
namespace SLOWEST {
#include KERNELS
}
#undef VECTOR_BYTES

#if defined(__x86_64__)

#if FOR_AVX2
#define VECTOR_BYTES 32
BEGIN_TARGET(AVX2_TARGET)
namespace avx2 {
#include KERNELS
}
END_TARGET
#undef VECTOR_BYTES
#else
namespace avx2 = plain;
#endif

#if FOR_AVX512
#define VECTOR_BYTES 64
BEGIN_TARGET(AVX512_TARGET)
namespace avx512 {
#include KERNELS
}
END_TARGET
#undef VECTOR_BYTES
#else
namespace avx512 = avx2;
#endif

#if HAS_AMX && FOR_AMX
#define VECTOR_BYTES 64
#define MATRIX_UNIT
BEGIN_TARGET(AMX_TARGET)
namespace amx {
#include KERNELS
}
END_TARGET
#undef MATRIX_UNIT
#undef VECTOR_BYTES
#elif HAS_AMX
namespace amx = avx512;
#endif

#endif
