// Exact inner products of rows of 7-bit integers: what a search goes by where there is no matrix unit.
//
// Bytes of one sign are what x86 multiplies by signed bytes, in pairs that are added up in 16 bits. So a tile of right rows
// is copied with 64 added to each value, 1 to 127, and 64 times the sum of a left row is taken away in the end. Two such
// pairs fit into 16 bits, 4 * 127 * 63 < 2^15, which saves one instruction in six.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "levels.h"

namespace {

struct IntegerJob {
    const int8_t* left;    // [rows, width rounded up to a multiple of STEP], within ±63, zeros behind the width
    const int32_t* sums;   // [rows]: of the values of each left row
    const int8_t* right;   // [columns, width], within ±63
    int32_t* out;          // [rows, columns], overwritten
    int64_t rows, columns, width;
};

struct PairJob {
    const int8_t* left;
    const int32_t* sums;
    const int8_t* right;
    const int64_t *places, *columns;  // [pairs]: which left row, and which right one; those of one right row follow one another
    int32_t* out;                     // [pairs], overwritten
    int64_t pairs, width;
};

constexpr int64_t STEP = 128;   // values that are multiplied at once, at most; _STEP in arithmetic/seven_bits.py
constexpr int64_t DEPTH = 2048; // values of a row in a tile: few enough for the first cache
constexpr int64_t TOGETHER = 64; // left rows whose values of that depth stay in the second cache
constexpr uint8_t SHIFT = 64;

#define KERNELS "seven_bits.h"
#define FOR_AMX 1
#define FOR_AVX512 1
#define FOR_AVX2 1
#include "each_level.h"

struct Level {
    void (*all)(const IntegerJob&);
    void (*pairs)(const PairJob&);
};

#define LEVEL(name) {name::multiply, name::multiply_pairs},
constexpr Level LEVELS[] = {EACH_LEVEL(LEVEL)};

}  // namespace

EXPORT void gradstore_multiply_seven_bits(const IntegerJob* job, int level) { LEVELS[level].all(*job); }
EXPORT void gradstore_multiply_seven_bit_pairs(const PairJob* job, int level) { LEVELS[level].pairs(*job); }
