// Products of rows at the pace of the processor's matrix unit, and right to float32's grade.
//
// A plain C interface, as that of the projection: no Python header is needed, and the caller holds no lock meanwhile.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "amx.h"
#include "half.h"

namespace {

struct Rows {
    const void* values;    // [count, width] of float16 or float32, rows `stride` values apart
    const float* factors;  // [count]; a row is worth its values times its factor; null for 1
    int64_t count, stride;
    int32_t half, limbs;   // whether values are float16; limbs that are taken of each
};

struct ProductJob {
    Rows left, right;
    const uint16_t* packed_left;   // strips that gradstore_place wrote `left` to; null to pack it on the way
    const uint16_t* packed_right;  // what gradstore_pack made of `right`; null to pack it on the way
    float* out;                    // [left rows, right rows], rows `out_stride` apart, added to
    double* left_rests;            // [left rows], squares of what first limbs leave of each are added to; or null
    int64_t width, out_stride;
    int64_t packed_rows;           // for how many rows `packed_left` has room
    int64_t diagonal;              // left row i is right row i + diagonal, and only values at columns from there on are
                                   // wanted, of a symmetric product; at most minus the left rows where all are
};

// Rows that are written to strips of left rows, some at a time.
struct PlaceJob {
    const void* values;    // [count, segments, width] of float16 or float32, rows `stride` values apart
    uint16_t* strips;      // of each segment in turn, with room for `capacity` rows
    double* rests;         // [segments, capacity], squares of what first limbs leave; overwritten
    int64_t count, segments, width, stride, capacity;
    int64_t at;            // the place of the first row
    int32_t half, limbs;
};

constexpr int64_t DEPTH = 512, RIGHT_ROWS = 512;  // of a packed chunk of the right operand: 1 MB with two limbs
constexpr int64_t INNER = 256;                    // columns of two left strips that stay in the first-level cache

inline int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }
inline int64_t steps_of(int64_t width) { return (width + 31) / 32; }

template <class T>
struct Buffer {
    T* data;
    explicit Buffer(int64_t count) : data(static_cast<T*>(std::aligned_alloc(64, round_up(count * sizeof(T) + 1, 64)))) {
        if (!data) throw std::bad_alloc();
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

#if HAS_AMX
#define MATRIX_UNIT 1
BEGIN_TARGET(AMX_TARGET)
namespace amx {
#include "limbs.h"
#include "product.h"
}  // namespace amx
END_TARGET
#undef MATRIX_UNIT
#endif

#define MATRIX_UNIT 0
namespace plain {
#include "limbs.h"
#include "product.h"
}  // namespace plain
#undef MATRIX_UNIT

struct Level {
    const char* name;
    bool available;
    void (*multiply)(const ProductJob&);
    void (*pack)(uint16_t*, const Rows&, int64_t);
    void (*place)(const PlaceJob&);
};

const Level* levels(int* count) {
    static const Level all[] = {
#if HAS_AMX
        {"amx", amx_available(), amx::multiply_rows, amx::pack_right, amx::place_rows},
#endif
        {"plain", true, plain::multiply_rows, plain::pack_right, plain::place_rows},
    };
    *count = sizeof(all) / sizeof(Level);
    return all;
}

const Level& level_at(int index) {
    int count;
    return levels(&count)[index];
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int gradstore_matrix_unit_interface() { return 4; }

// The name of a level, fastest first, and whether this process may use it; null past the last.
EXPORT const char* gradstore_matrix_unit_level(int index, int* available) {
    int count;
    const Level* all = levels(&count);
    if (index < 0 || index >= count) return nullptr;
    *available = all[index].available;
    return all[index].name;
}

// Adds the products to out. Returns 0, or 1 where memory ran out.
EXPORT int gradstore_multiply(const ProductJob* job, int level) {
    try {
        level_at(level).multiply(*job);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

// Values of 16 bits that gradstore_pack writes.
EXPORT int64_t gradstore_packed_size(const Rows* rows, int64_t width) {
    return round_up(rows->count, 32) * steps_of(width) * 32 * rows->limbs;
}

EXPORT void gradstore_pack(uint16_t* strips, const Rows* rows, int64_t width, int level) {
    level_at(level).pack(strips, *rows, width);
}

EXPORT void gradstore_place(const PlaceJob* job, int level) { level_at(level).place(*job); }
