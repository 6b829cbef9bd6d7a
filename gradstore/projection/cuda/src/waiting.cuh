// Waits that end: what should take microseconds is given up after seconds, with a code that the host can read afterwards.
#pragma once

#include "entries.cuh"

// What was waited for when the product gave up. The same numbers stand in driver.py.
constexpr u32 GAVE_UP_GRADIENTS = 1, GAVE_UP_ROOM = 2, GAVE_UP_TURN = 3;

#ifdef __CUDACC__

constexpr u64 PATIENCE = 10'000'000'000;  // nanoseconds; a neighbour that computes on the same card takes turns of milliseconds

struct Patience {
    u32* trouble;  // in the host's memory, which can be read when the device no longer answers
    u32 code;
    u64 began = 0;

    // After a look in vain. Time is read only here, where there is nothing else to do.
    __device__ __forceinline__ void wait() {
        u64 now;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
        if (began == 0) began = now;
        if (now - began > PATIENCE) {
            *(volatile u32*)trouble = code;
            __threadfence_system();
            asm volatile("trap;");
        }
    }
};

#endif
