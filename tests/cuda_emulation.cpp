// The CUDA projection's data flow on the host, lane by lane: the project's own headers say which registers a lane holds and
// where gradients lie; this file only knows what the instructions do with them (PTX ISA: mma.m16n8k16, ldmatrix, wgmma with
// A in registers and B behind a descriptor). Built by tests with the same definitions as the device source.
#include <algorithm>
#include <vector>

#include "entries.cuh"
#include "fold.cuh"
#include "fragments.cuh"
#include "pack.cuh"

namespace {

constexpr int SUMS = ROWS / 2;
constexpr u32 TILE_BYTES = ROWS * 128;
constexpr int PER_WARP = WGMMA ? 64 : 16;  // distance between the rows of P of a warp's fragments

template <class Value>
void pack(const Pack& job, int rows, int spans) {
    for (u32 i = 0; i < job.turn_count; ++i) job.turns[i] = 0;
    std::vector<Held> threads(PACK_THREADS);
    for (int row = 0; row < rows; ++row) {
        for (int span = 0; span < spans; ++span) {
            u32 largest = 0;
            for (int t = 0; t < PACK_THREADS; ++t) {
                load_held<Value>(threads[t], job, row, span, t);
                largest = std::max(largest, threads[t].largest);
            }
            for (int t = 0; t < PACK_THREADS; ++t) store_held<LIMBS>(threads[t], job, row, span, t, scale_exponent(largest));
        }
    }
}

// __shfl_xor_sync among 32 lanes.
void exchange(Words (&words)[32], int low, int high, u32 bit) {
    u32 given[32];
    for (u32 lane = 0; lane < 32; ++lane) given[lane] = word_to_give(words[lane], low, high, lane & bit);
    for (u32 lane = 0; lane < 32; ++lane) take_word(words[lane], low, high, lane & bit, given[lane ^ bit]);
}

struct Warp {
    u32 a[32][P_LIMBS][PAIR];
    Kept kept[32];

    void begin(const Matrix& matrix, u64 group, u32 k) {
        Words words[32];
        for (u32 lane = 0; lane < 32; ++lane) words[lane] = lane_words(matrix, group, k, lane);
        exchange(words, 0, 1, 1);
        exchange(words, 2, 3, 1);
        exchange(words, 0, 2, 2);
        exchange(words, 1, 3, 2);
        for (u32 lane = 0; lane < 32; ++lane) kept[lane].words = words[lane];
    }

    void make(const Matrix& matrix, u64 group, u32 k, int pair) {
        for (u32 lane = 0; lane < 32; ++lane) make_fragments(a[lane], kept[lane], matrix, group, k, lane, pair);
    }

    // A[row][column] of one step, as both instructions read it from registers.
    float value(int limb, int step, int row, int column) const {
        const int lane = 4 * (row % 8) + column % 8 / 2, r = row / 8 + 2 * (column / 8);
        const u32 both = a[lane][limb][4 * step + r];
        return column % 2 ? high_half(both) : low_half(both);
    }
};

float half_at(const u8* address) {
    u16 bits;
    std::memcpy(&bits, address, sizeof bits);
    return to_float(Half{bits});
}

// B[row][column] as wgmma finds it: rows 128 bytes apart in eights, eights by the descriptor's stride, columns by the start;
// then the swizzle exchanges address bits 4-6 with their exclusive or with bits 7-9.
float by_descriptor(const u8* shared, u64 descriptor, int row, int column) {
    const u32 start = (u32)(descriptor & 0x3FFF) << 4, stride = (u32)(descriptor >> 32 & 0x3FFF) << 4;
    const u32 linear = start + row / 8 * stride + row % 8 * 128 + 2 * column;
    return half_at(shared + (descriptor >> 62 == 1 ? linear ^ (linear >> 3 & 0x70) : linear));
}

// B[row][column] as ldmatrix and mma find it: matrix i takes its rows from lanes 8 i to 8 i + 7, lane 4 g + t gets elements
// 2 t and 2 t + 1 of row g, and mma takes matrices 0 and 1 (2 and 3) as columns 0-7 and 8-15 of the first (second) 8 rows.
float by_ldmatrix(const u8* tile, int step, int row, int column) {
    const int matrix = 2 * (row % 16 / 8) + column / 8;
    const u32 source_lane = 8 * matrix + row % 8;
    return half_at(tile + place_for_lane(row / 16 * 16, step, source_lane) + 2 * (column % 8));
}

void multiply(const Warp& warp, const u8* stage, int half, std::vector<double>& product) {
    for (int step = 0; step < 2; ++step) {
        for (int limb = 0; limb < LIMBS; ++limb) {
            for (int p_limb = 0; p_limb < (limb ? 1 : P_LIMBS); ++p_limb) {
                for (int n = 0; n < ROWS; ++n) {
                    for (int column = 0; column < 16; ++column) {
                        const u64 tile = describe_tile(0);
                        const float b = WGMMA ? by_descriptor(stage, describe_step(tile, limb * TILE_BYTES, 2 * half + step), n, column)
                                              : by_ldmatrix(stage + limb * TILE_BYTES, 2 * half + step, n, column);
                        if (b == 0.0f) continue;
                        for (int row = 0; row < 16; ++row) product[row * ROWS + n] += (double)warp.value(p_limb, step, row, column) * b;
                    }
                }
            }
        }
    }
}

// One warp's fragments of one unit: 16 rows of P from `first_k` on.
void run(const Job& job, const Unit& unit, i32 first_k) {
    const Matrix matrix = {job.key0, job.key1, job.domain};
    std::vector<double> product(16 * ROWS);
    std::vector<Warp> warp(1);
    for (i32 local = unit.groups.begin; local < unit.groups.end; ++local) {
        const u64 group = job.first_group + local;
        if (KIND == 0) warp[0].begin(matrix, group, job.first_k + first_k);
        for (int pair = 0; pair < 8; ++pair) {
            warp[0].make(matrix, group, job.first_k + first_k, pair);
            const i64 stage = (i64)local * (GROUP / STAGE) + pair / 2, stages = (i64)job.groups * (GROUP / STAGE);
            multiply(warp[0], job.packed + place_of_tile(unit.row_tile, stages, stage, LIMBS, 0, ROWS), pair % 2, product);
        }
    }
    for (u32 lane = 0; lane < 32; ++lane) {
        float sum[1][SUMS];
        for (int i = 0; i < SUMS; ++i) {
            const int row = lane / 4 + 8 * (i % 4 / 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
            sum[0][i] = (float)product[row * ROWS + column];
        }
        fold_lane<PER_WARP>(job, unit, sum, first_k, lane);
    }
}

}  // namespace

extern "C" {

void emulate_pack(const Pack* job, int dtype, int rows, int spans) {
    (dtype == 0 ? pack<float> : dtype == 1 ? pack<Half> : pack<BFloat>)(*job, rows, spans);
}

void emulate_product(const Job* job) {
    for (u32 index = 0; index < unit_count(*job); ++index) {
        const Unit unit = unit_of(*job, index);
        for (int first = 0; first < 128 * TILES; first += 16) {
            if (unit.k_tile * 128 * TILES + first < job->count) run(*job, unit, unit.k_tile * 128 * TILES + first);
        }
    }
}

void philox_words(u32* out, const u32* counter, const u32* key) {
    const Words words = philox(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
    for (int i = 0; i < 4; ++i) out[i] = words.w[i];
}

void normals(float* out, const u32* words) {
    box_muller(words[0], words[1], out, out + 1);
    box_muller(words[2], words[3], out + 2, out + 3);
}

int pack_bytes() { return sizeof(Pack); }
int job_bytes() { return sizeof(Job); }
int exponent_of(u32 bits) { return scale_exponent(bits); }
}
