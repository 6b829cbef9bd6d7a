// Memory that a kernel works in.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// Uninitialised memory for vectors of any width; in huge pages if it is large, as a kernel permits.
template <class T>
struct Buffer {
    T* data;
    size_t bytes;
    explicit Buffer(int64_t count) : bytes(std::max<size_t>(count * sizeof(T), 1)) {
        const size_t page = bytes < (4 << 20) ? 64 : 2 << 20;
        bytes = (bytes + page - 1) / page * page;
        data = static_cast<T*>(std::aligned_alloc(page, bytes));
        if (!data) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        if (page > 64) madvise(data, bytes, MADV_HUGEPAGE);
#endif
    }
    void clear() { memset(static_cast<void*>(data), 0, bytes); }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

}  // namespace
