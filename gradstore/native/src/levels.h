// The SIMD levels that gradstore is compiled for: which there are, what code of each may use, and whether this processor
// has it. A source gets its kernels at every level from each_level.h.

#pragma once

#define EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__linux__) && ((defined(__clang__) && __clang_major__ >= 12) || __GNUC__ >= 11)
#define HAS_AMX 1
#define IF_AMX(...) __VA_ARGS__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_AMX 0
#define IF_AMX(...)
#endif
#define NEON 0

// Level by level, the fastest first. A number of a level is its place here.
#define EACH_LEVEL(DO) IF_AMX(DO(amx)) DO(avx512) DO(avx2) DO(plain)
#define SLOWEST plain

#define AVX2_TARGET "avx2,fma,f16c,bmi,bmi2"
#define AVX512_TARGET "avx512f,avx512dq,avx512bw,avx512vl," AVX2_TARGET WHOLE_REGISTERS
#define AMX_TARGET "amx-tile,amx-bf16,avx512bf16,avx512vnni," AVX512_TARGET

inline bool has_plain() { return true; }

// Every processor with AVX2 has bmi and converts float16.
inline bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

inline bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

#if HAS_AMX
// The matrix unit, for bfloat16. The kernel saves the tiles of a process only once that was asked for; it may refuse.
inline bool has_amx() {
    constexpr long request_permission = 0x1023, tile_data = 18;
    unsigned a, b, c, d;
    if (!has_avx512()) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 5) != 5) return false;   // AMX-BF16, AMX-TILE
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;        // AVX512-BF16
    if (!__builtin_cpu_supports("avx512vnni")) return false;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

#elif defined(__ARM_NEON)

#include <arm_neon.h>

#define NEON 1
#define EACH_LEVEL(DO) DO(neon)
#define SLOWEST neon
inline bool has_neon() { return true; }

#else

#define NEON 0
#define EACH_LEVEL(DO) DO(plain)
#define SLOWEST plain
inline bool has_plain() { return true; }

#endif

#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET _Pragma("clang attribute pop")
#define WHOLE_REGISTERS ""
#else
#define BEGIN_TARGET(features) _Pragma("GCC push_options") PRAGMA(GCC target(features))
#define END_TARGET _Pragma("GCC pop_options")
#define WHOLE_REGISTERS ",prefer-vector-width=512"
#endif

// Keeps a product from being fused with the addition after it.
#if defined(__x86_64__)
#define ROUNDED(value) asm("" : "+x"(value))
#elif NEON
#define ROUNDED(value) asm("" : "+w"(value))
#else
#define ROUNDED(value) (void)(value)
#endif
