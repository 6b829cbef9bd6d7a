// Products of two sets of rows. Included once with the matrix unit in reach, and once without.
//
// DEPTH columns of RIGHT_ROWS rows of the right operand are packed and stay in the second-level cache; the left one's strips
// are packed, two after two, and meet them, INNER columns at a time. Further right rows follow before further columns do, so
// that the left ones come from memory once. The unit adds up DEPTH columns; their sums are scaled and added to the result.
// All that in the order of columns, so a value's bits depend on its two rows alone.
//
// Either side may be packed before, as one chunk of DEPTH columns after another, each with the strips of all rows: so what a
// product reads lies one after another in memory.

#include "limbs.h"

typedef void (*Pack)(Limb* strip, const void* rows, int64_t stride, int64_t count, int64_t width, double* rests);
typedef void (*Multiply)(float* panel, bool first, const Limb* left, int64_t left_strip, const Limb* right,
                         int64_t right_strip, int64_t steps);

// Where the chunk that begins at `column` starts, of so many rows.
static inline int64_t chunk_at(int64_t column, int64_t rows, int32_t limbs) {
    return column / STEP * (round_up(rows, BLOCK) / SIDE) * limbs * TILE;
}

template <int LIMBS, bool RIGHT_SIDE, class Value>
static void pack_some(Limb* strip, const void* rows, int64_t stride, int64_t count, int64_t width, double* rests) {
    const Value* values = static_cast<const Value*>(rows);
    if (!RIGHT_SIDE && rests) {
        pack_strip<LIMBS, RIGHT_SIDE, !RIGHT_SIDE>(strip, values, stride, count, width, rests);
    } else {
        pack_strip<LIMBS, RIGHT_SIDE, false>(strip, values, stride, count, width, nullptr);
    }
}

template <bool RIGHT_SIDE>
static Pack packing(bool half, int32_t limbs) {
    if (half) return limbs == 2 ? pack_some<2, RIGHT_SIDE, uint16_t> : pack_some<1, RIGHT_SIDE, uint16_t>;
    return limbs == 2 ? pack_some<2, RIGHT_SIDE, float> : pack_some<1, RIGHT_SIDE, float>;
}

template <bool BOTH>
static Multiply multiplying(int32_t left_limbs, int32_t right_limbs) {
    if (left_limbs == 2) return right_limbs == 2 ? multiply_block<2, 2, BOTH> : multiply_block<2, 1, BOTH>;
    return right_limbs == 2 ? multiply_block<1, 2, BOTH> : multiply_block<1, 1, BOTH>;
}

// `count` rows, or as many as there are, to strips one after another.
template <bool RIGHT_SIDE>
static void pack_rows(Limb* strips, const Rows& rows, int64_t first, int64_t count, int64_t column, int64_t width,
                      double* rests = nullptr) {
    const Pack pack = packing<RIGHT_SIDE>(rows.half, rows.limbs);
    const int64_t strip = steps_of(width) * rows.limbs * TILE, size = rows.half ? 2 : 4;
    for (int64_t i = 0; i < count; i += SIDE, strips += strip) {
        const char* from = static_cast<const char*>(rows.values) + ((first + i) * rows.stride + column) * size;
        const int64_t some = std::clamp<int64_t>(rows.count - first - i, 0, SIDE);
        pack(strips, from, rows.stride, some, width, rests ? rests + first + i : nullptr);
    }
}

// out[0 : columns] += sums[0 : columns] * factor * factors[0 : columns]
static inline void add_row(float* __restrict__ out, const float* __restrict__ sums, float factor,
                           const float* __restrict__ factors, int64_t columns) {
    if (factors) {
        for (int64_t j = 0; j < columns; ++j) out[j] = __builtin_fmaf(sums[j], factor * factors[j], out[j]);
    } else {
        for (int64_t j = 0; j < columns; ++j) out[j] = __builtin_fmaf(sums[j], factor, out[j]);
    }
}

// Columns before `from` are left out.
static void add_panel(const ProductJob& job, const float* panel, int64_t row, int64_t first, int64_t from) {
    const int64_t columns = std::min(RIGHT_ROWS, job.right.count - first) - from;
    const float* factors = job.right.factors ? job.right.factors + first + from : nullptr;
    for (int64_t i = 0; i < std::min<int64_t>(BLOCK, job.left.count - row); ++i) {
        const float factor = job.left.factors ? job.left.factors[row + i] : 1;
        add_row(job.out + (row + i) * job.out_stride + first + from, panel + i * PANEL + from, factor, factors, columns);
    }
}

// The columns [column, column + width) of all left rows with `count` right rows from `first` on, whose strips are given.
static void multiply_chunk(const ProductJob& job, Limb* left, float* panel, int64_t first, int64_t count,
                           const Limb* right, int64_t column, int64_t width) {
    const Multiply both = multiplying<true>(job.left.limbs, job.right.limbs);
    const Multiply one = multiplying<false>(job.left.limbs, job.right.limbs);
    const int64_t rows = job.right.count - first;
    const int64_t steps = steps_of(width);
    const int64_t left_strip = steps * job.left.limbs * TILE, right_strip = steps * job.right.limbs * TILE;
    for (int64_t row = 0; row < job.left.count; row += BLOCK) {
        const int64_t from = std::max<int64_t>(0, row + job.diagonal - first) / BLOCK * BLOCK;
        if (from >= count) return;
        const Limb* strips = left;
        if (job.packed_left) {
            strips = job.packed_left + chunk_at(column, job.packed_rows, job.left.limbs) + row / SIDE * left_strip;
        } else {
            pack_rows<false>(left, job.left, row, BLOCK, column, width, first == 0 ? job.left_rests : nullptr);
        }
        for (int64_t step = 0; step < steps; step += INNER / STEP) {
            const Limb *some = strips + step * job.left.limbs * TILE, *with = right + step * job.right.limbs * TILE;
            for (int64_t j = from; j < count; j += BLOCK) {
                (j + SIDE < rows ? both : one)(panel + j, step == 0, some, left_strip, with + j / SIDE * right_strip, right_strip,
                         std::min<int64_t>(INNER / STEP, steps - step));
            }
        }
        add_panel(job, panel, row, first, from);
    }
}

static void multiply_rows(const ProductJob& job) {
    const Tiles tiles;
    const int64_t depth = std::min(steps_of(job.width) * STEP, DEPTH);
    const int64_t together = std::min(round_up(job.right.count, BLOCK), RIGHT_ROWS);
    Buffer<Limb> left(job.packed_left ? 0 : BLOCK * depth * job.left.limbs);
    Buffer<Limb> room(job.packed_right ? 0 : together * depth * job.right.limbs);
    Buffer<float> panel(BLOCK * PANEL);
    for (int64_t column = 0; column < job.width; column += depth) {
        const int64_t width = std::min(depth, job.width - column);
        for (int64_t first = 0; first < job.right.count; first += together) {
            const int64_t count = round_up(std::min(together, job.right.count - first), BLOCK);
            if (first + count <= job.diagonal) continue;  // all left of the diagonal
            const Limb* right = room.data;
            if (job.packed_right) {
                right = job.packed_right + chunk_at(column, job.right.count, job.right.limbs);
                right += first / SIDE * steps_of(width) * job.right.limbs * TILE;
            } else {
                pack_rows<true>(room.data, job.right, first, count, column, width);
            }
            multiply_chunk(job, left.data, panel.data, first, count, right, column, width);
        }
    }
}

static void pack_right(Limb* strips, const Rows& rows, int64_t width) {
    for (int64_t column = 0; column < width; column += DEPTH) {
        Limb* chunk = strips + chunk_at(column, rows.count, rows.limbs);
        pack_rows<true>(chunk, rows, 0, round_up(rows.count, BLOCK), column, std::min(DEPTH, width - column));
    }
}

// One row to its place in strips of left rows.
template <int LIMBS, class Value>
static void place_row(const PlaceJob& job, Limb* strips, int64_t at, const Value* row, double& rest) {
    rest = 0;
    for (int64_t column = 0; column < job.width; column += DEPTH) {
        Squares left;
        const int64_t width = std::min(DEPTH, job.width - column), strip = steps_of(width) * LIMBS * TILE;
        Limb* to = strips + chunk_at(column, job.capacity, LIMBS) + at / SIDE * strip + at % SIDE * STEP;
        int64_t i = 0;
        for (; i + STEP <= width; i += STEP, to += LIMBS * TILE) {
            split<LIMBS, true, true>(to, to + TILE, row + column + i, first_columns(STEP), left);
        }
        if (i < width) split<LIMBS, true, true>(to, to + TILE, row + column + i, first_columns(width - i), left);
        rest += left.total();
    }
}

template <int LIMBS, class Value>
static void place_some(const PlaceJob& job) {
    const int64_t segment = chunk_at(round_up(job.width, STEP), job.capacity, LIMBS);
    for (int64_t i = 0; i < job.count; ++i) {
        const Value* row = static_cast<const Value*>(job.values) + i * job.stride;
        for (int64_t s = 0; s < job.segments; ++s) {
            const int64_t at = job.at + i;
            place_row<LIMBS>(job, job.strips + s * segment, at, row + s * job.width, job.rests[s * job.capacity + at]);
        }
    }
    finish_places();
}

static void place_rows(const PlaceJob& job) {
    if (job.half) {
        job.limbs == 2 ? place_some<2, uint16_t>(job) : place_some<1, uint16_t>(job);
    } else {
        job.limbs == 2 ? place_some<2, float>(job) : place_some<1, float>(job);
    }
}
