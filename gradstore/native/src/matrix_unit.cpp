// Products of rows at the pace of the processor's matrix unit, and right to float32's grade.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

#include "buffer.h"
#include "half.h"
#include "levels.h"

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

#define KERNELS "limb_product.h"
#define FOR_AMX 1
#define FOR_AVX512 0
#define FOR_AVX2 0
#include "each_level.h"

struct Level {
    void (*multiply)(const ProductJob&);
    void (*pack)(uint16_t*, const Rows&, int64_t);
    void (*place)(const PlaceJob&);
};

#define LEVEL(name) {name::multiply_rows, name::pack_right, name::place_rows},
constexpr Level LEVELS[] = {EACH_LEVEL(LEVEL)};

}  // namespace

// Adds the products to out. Returns 0, or 1 where memory ran out.
EXPORT int gradstore_multiply(const ProductJob* job, int level) {
    try {
        LEVELS[level].multiply(*job);
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
    LEVELS[level].pack(strips, *rows, width);
}

EXPORT void gradstore_place(const PlaceJob* job, int level) { LEVELS[level].place(*job); }
