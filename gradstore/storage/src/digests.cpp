// Digests of many rows at once: BLAKE3 without a key, of which the first 16 bytes are kept.
//
// A plain C interface, as that of the projection: no Python header is needed, and the caller holds no lock meanwhile.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../../matrix_unit/src/simd.h"

namespace {

constexpr int64_t CHUNK = 1024, BLOCK = 64;
constexpr int WORDS = 16;           // of a block
constexpr int VALUES = 8;           // 32-bit words of a chaining value
constexpr int DIGEST = 16;          // bytes that are kept of 32
constexpr int ROUNDS = 7;
constexpr int64_t ROOM = 1 << 18;   // bytes of chaining values of rows hashed together, where a row needs no more

enum Flags : uint32_t { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8 };

constexpr uint32_t START[VALUES] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
                                    0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};
constexpr int PERMUTATION[WORDS] = {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8};

struct Schedule {
    int word[ROUNDS][WORDS];  // which word of a block comes when
};

constexpr Schedule schedule() {
    Schedule made = {};
    for (int i = 0; i < WORDS; ++i) made.word[0][i] = i;
    for (int round = 1; round < ROUNDS; ++round) {
        for (int i = 0; i < WORDS; ++i) made.word[round][i] = made.word[round - 1][PERMUTATION[i]];
    }
    return made;
}

constexpr Schedule SCHEDULE = schedule();

struct DigestJob {
    const uint8_t* const* parts;  // [count]: each [rows, size]; a row is its slices of all parts, one after another
    const int64_t* sizes;         // [count]: bytes of a row in a part
    uint8_t* out;                 // [rows, DIGEST]
    int64_t count, rows;
};

inline int64_t row_bytes(const DigestJob& job) {
    int64_t bytes = 0;
    for (int64_t part = 0; part < job.count; ++part) bytes += job.sizes[part];
    return bytes;
}

// A place in a row.
class Cursor {
  public:
    Cursor(const DigestJob& job, int64_t row, int64_t at) : job(job), row(row), at(at) { pass_parts(); }

    // The next bytes: where they are, or, where they lie in several parts or end within a block, a copy with zeros after it.
    const uint8_t* next(int64_t bytes, uint8_t* copy) {
        if (part < job.count && job.sizes[part] - at >= bytes && bytes % BLOCK == 0) {
            const uint8_t* found = here();
            at += bytes;
            pass_parts();
            return found;
        }
        if (bytes % BLOCK || !bytes) memset(copy + bytes / BLOCK * BLOCK, 0, BLOCK);
        for (uint8_t* to = copy; bytes;) {
            const int64_t some = std::min(bytes, job.sizes[part] - at);
            memcpy(to, here(), some);
            to += some, bytes -= some, at += some;
            pass_parts();
        }
        return copy;
    }

  private:
    const DigestJob& job;
    int64_t row, part = 0, at;

    const uint8_t* here() const { return job.parts[part] + row * job.sizes[part] + at; }

    void pass_parts() {
        while (part < job.count && at >= job.sizes[part]) at -= job.sizes[part++];
    }
};

inline uint32_t little(uint32_t word) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap32(word);
#else
    return word;
#endif
}

#if defined(__x86_64__)
#define VECTOR_BYTES 64
BEGIN_TARGET("avx512f" WHOLE_REGISTERS)
namespace avx512 {
#include "blake3.h"
}  // namespace avx512
END_TARGET
#undef VECTOR_BYTES
#define VECTOR_BYTES 32
BEGIN_TARGET("avx2")
namespace avx2 {
#include "blake3.h"
}  // namespace avx2
END_TARGET
#undef VECTOR_BYTES
#endif

#define VECTOR_BYTES 16
namespace baseline {
#include "blake3.h"
}  // namespace baseline
#undef VECTOR_BYTES

struct Level {
    const char* name;
    bool available;
    int (*digest)(const DigestJob&);
};

const Level LEVELS[] = {
#if defined(__x86_64__)
    {"avx512", (bool)__builtin_cpu_supports("avx512f"), avx512::digest_rows},
    {"avx2", (bool)__builtin_cpu_supports("avx2"), avx2::digest_rows},
#endif
    {"plain", true, baseline::digest_rows},
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int gradstore_digests_interface() { return 1; }

// The name of a level, fastest first, and whether this processor has it; null past the last.
EXPORT const char* gradstore_digests_level(int index, int* available) {
    if (index < 0 || index >= (int)(sizeof(LEVELS) / sizeof(Level))) return nullptr;
    *available = LEVELS[index].available;
    return LEVELS[index].name;
}

// Not 0 where there was no memory.
EXPORT int gradstore_digests(const DigestJob* job, int level) { return LEVELS[level].digest(*job); }
