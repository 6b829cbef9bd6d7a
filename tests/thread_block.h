// CUDA's thread blocks on the host, for whole kernels: every thread has a stack of its own and runs until it must wait for
// others of its warp (a shuffle, __syncwarp) or of its block (__syncthreads). Warps and lanes take turns in an order that
// differs from one wait to the next, and shared memory begins with garbage, so that a barrier or a value that is missing shows.
// What threads of a warp do between two waits they do one after another, which no card promises: kernels must not count on it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
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
    jmp_buf waits;
    bool began = false;
    State state = READY;
    unsigned shuffles = 0;
};

constexpr int WARP = 32;
constexpr size_t STACK = 64 << 10;
inline std::vector<char> stacks;  // of all threads, kept for the next block

struct Block {
    std::vector<Thread> threads;
    std::vector<double> given[2];  // what lanes hand to one another; a lane may be one shuffle ahead of others
    jmp_buf scheduler;
    unsigned current = 0, turn = 1;

    // Another order at every call: forwards or backwards, from anywhere.
    auto some_order(int count) {
        turn = turn * 1664525u + 1013904223u;
        const int first = (turn >> 8) % count, step = turn >> 31 ? 1 : count - 1;
        return [=](int i) { return (first + i * step) % count; };
    }

    // Of the thread that runs: lets the scheduler go on, until it is this one's turn again.
    void wait(State state) {
        Thread& thread = threads[current];
        thread.state = state;
        if (!_setjmp(thread.waits)) _longjmp(scheduler, 1);
    }

    // Of the scheduler: lets a thread go on until it waits or ends. Jumps ask nothing of the system, as swapcontext would.
    void go_on(int number) {
        current = number;
        Thread& thread = threads[number];
        thread.state = READY;
        if (_setjmp(scheduler)) return;
        if (thread.began) _longjmp(thread.waits, 1);
        thread.began = true;
        begin(thread);
    }

    static void begin(Thread& thread);

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
                if (threads[first + order(i)].state < AT_BLOCK) go_on(first + order(i));
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
    block->wait(DONE);
}

inline void Block::begin(Thread& thread) {
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks.data() + STACK * (&thread - block->threads.data());
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, begin_thread, 0);
    setcontext(&context);
}

// Runs a kernel for a grid of thread blocks, one after another, the last one first.
inline void launch(unsigned columns, unsigned rows, int threads, const std::function<void()>& work, void* shared, size_t bytes) {
    Block own;
    own.threads.resize(threads);
    for (auto& given : own.given) given.resize(threads);
    stacks.resize(std::max(stacks.size(), STACK * threads));
    block = &own;
    kernel = work;
    for (unsigned i = columns * rows; i-- > 0;) {
        block_index = {i % columns, i / columns};
        std::memset(shared, 0x5A, bytes);
        for (auto& thread : own.threads) thread.began = false;
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
