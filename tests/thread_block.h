// CUDA's thread blocks on the host, for whole kernels: every thread has a stack of its own and runs until it must wait for
// others of its warp (a shuffle, __syncwarp) or of its block (__syncthreads). Warps and lanes take turns in an order that
// differs from one wait to the next, and shared memory begins with garbage, so that a barrier or a value that is missing shows.
// What threads of a warp do between two waits they do one after another, which no card promises: kernels must not count on it.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local  // static within functions; one block runs at a time

namespace host {

struct Index {
    unsigned x = 0, y = 0;
};

enum State { READY, AT_WARP, AT_BLOCK, DONE };

struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 << 10);
    State state = READY;
    unsigned shuffles = 0;
};

constexpr int WARP = 32;

struct Block {
    std::vector<Thread> threads;
    std::vector<double> given[2];  // what lanes hand to one another; a lane may be one shuffle ahead of others
    ucontext_t scheduler;
    unsigned current = 0, turn = 1;

    // Another order at every call: forwards or backwards, from anywhere.
    std::function<int(int)> some_order(int count) {
        turn = turn * 1664525u + 1013904223u;
        const int first = (turn >> 8) % count, step = turn >> 31 ? 1 : count - 1;
        return [=](int i) { return (first + i * step) % count; };
    }

    void wait(State state) {
        Thread& thread = threads[current];
        thread.state = state;
        swapcontext(&thread.context, &scheduler);
    }

    bool all(int first, int count, State state) const {
        for (int i = first; i < first + count; ++i) {
            if (threads[i].state != state) return false;
        }
        return true;
    }

    // Runs a warp until it waits for the block or is done.
    void run_warp(int first) {
        do {
            const auto order = some_order(WARP);
            for (int i = 0; i < WARP; ++i) {
                current = first + order(i);
                if (threads[current].state == AT_WARP) threads[current].state = READY;
                if (threads[current].state == READY) swapcontext(&scheduler, &threads[current].context);
            }
        } while (all(first, WARP, AT_WARP));
        if (!all(first, WARP, AT_BLOCK) && !all(first, WARP, DONE)) stop("the lanes of a warp wait for different things");
    }

    void run() {
        const int count = (int)threads.size(), warps = count / WARP;
        do {
            const auto order = some_order(warps);
            for (auto& thread : threads) thread.state = READY;
            for (int i = 0; i < warps; ++i) run_warp(WARP * order(i));
        } while (all(0, count, AT_BLOCK));
        if (!all(0, count, DONE)) stop("some warps end where others wait");
    }

    [[noreturn]] static void stop(const char* why) {
        std::fprintf(stderr, "emulated thread block: %s\n", why);
        std::abort();
    }
};

inline Block* block;
inline std::function<void()> kernel;
inline Index block_index;

struct ThreadIndex {
    struct X {
        operator unsigned() const { return block->current; }
    } x;
};

inline void begin_thread() {
    kernel();
    block->threads[block->current].state = DONE;  // and then `uc_link`: the scheduler
}

// Runs a kernel for a grid of thread blocks, one after another, the last one first.
inline void launch(unsigned columns, unsigned rows, int threads, const std::function<void()>& work, void* shared, size_t bytes) {
    Block own;
    own.threads.resize(threads);
    for (auto& given : own.given) given.resize(threads);
    block = &own;
    kernel = work;
    for (unsigned i = columns * rows; i-- > 0;) {
        block_index = {i % columns, i / columns};
        std::memset(shared, 0x5A, bytes);
        for (auto& thread : own.threads) {
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data();
            thread.context.uc_stack.ss_size = thread.stack.size();
            thread.context.uc_link = &own.scheduler;
            makecontext(&thread.context, begin_thread, 0);
        }
        own.run();
    }
}

template <class Value>
Value shuffle(Value value, unsigned source_lane) {
    const unsigned self = block->current;
    std::vector<double>& given = block->given[block->threads[self].shuffles++ % 2];
    given[self] = (double)value;  // exact for what kernels hand over: 32-bit integers and doubles
    block->wait(AT_WARP);
    return (Value)given[self / WARP * WARP + source_lane];
}

}  // namespace host

#define blockIdx host::block_index
inline constexpr host::ThreadIndex threadIdx{};

inline void __syncthreads() { host::block->wait(host::AT_BLOCK); }
inline void __syncwarp() { host::block->wait(host::AT_WARP); }

template <class Value>
Value __shfl_sync(unsigned, Value value, unsigned lane) {
    return host::shuffle(value, lane);
}

template <class Value>
Value __shfl_xor_sync(unsigned, Value value, unsigned mask) {
    return host::shuffle(value, host::block->current % host::WARP ^ mask);
}

inline void atomicAdd(int* sum, int value) { *sum += value; }
inline int __float2int_rn(float value) { return (int)rintf(value); }
