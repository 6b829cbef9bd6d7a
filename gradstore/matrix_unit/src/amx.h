// Whether the matrix unit of x86 (AMX, bfloat16 or int8) can be compiled for, and whether this process may use it.

#pragma once

#include "simd.h"

#if defined(__x86_64__) && defined(__linux__) && ((defined(__clang__) && __clang_major__ >= 12) || __GNUC__ >= 11)
#define HAS_AMX 1
#define AMX_TARGET "amx-tile,amx-bf16,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c" WHOLE_REGISTERS
#define AMX_INT8_TARGET "amx-tile,amx-int8,avx512f,avx512dq,avx512bw,avx512vl,avx512vbmi,avx2,fma,bmi,bmi2" WHOLE_REGISTERS

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// The kernel saves the tiles of a process only once that was asked for; it may refuse.
static inline bool amx_permitted() {
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

static inline bool amx_available() {
    static const bool available = [] {
        unsigned a, b, c, d;
        if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) return false;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 5) != 5) return false;   // AMX-BF16, AMX-TILE
        if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;        // AVX512-BF16
        return amx_permitted();
    }();
    return available;
}

static inline bool amx_int8_available() {
    static const bool available = [] {
        unsigned a, b, c, d;
        if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vbmi")) return false;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) return false;   // AMX-TILE, AMX-INT8
        return amx_permitted();
    }();
    return available;
}

#else
#define HAS_AMX 0
#endif
