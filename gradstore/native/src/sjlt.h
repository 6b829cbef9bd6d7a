// The sparse product (SJLT): one non-zero in each block of 1024 rows and each column. Included once per SIMD level.
//
// 16 rows of gradients stand side by side, and so do their 1024 sums for a block: a gradient is added to the one sum, or
// subtracted, that its parameter's code names. The codes of SPARSE_SPAN parameters are made once for all rows. A part of a
// task's rows of gradients and the sums of a block stay in the second-level cache.
//
// A sum goes through the columns in their order, from zero at every SPARSE_SPAN of them, and is then added to the output: its
// bits depend neither on the rows beside its own, nor on tiles, threads or the width of the registers.

typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));

constexpr int LINE = 16;     // floats of a line of the cache
constexpr int PIECE = 2048;  // parameters of a task's rows that are side by side at a time

// to[c * to_stride + r] = from[r][c], for four r and four c.
static inline void turn(float* to, int64_t to_stride, const float* const* from, int64_t column) {
#if defined(__x86_64__)
    __m128 a = _mm_loadu_ps(from[0] + column), b = _mm_loadu_ps(from[1] + column);
    __m128 c = _mm_loadu_ps(from[2] + column), d = _mm_loadu_ps(from[3] + column);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(to, a);
    _mm_storeu_ps(to + to_stride, b);
    _mm_storeu_ps(to + 2 * to_stride, c);
    _mm_storeu_ps(to + 3 * to_stride, d);
#else
    for (int c = 0; c < 4; ++c) {
        for (int r = 0; r < 4; ++r) to[c * to_stride + r] = from[r][column + c];
    }
#endif
}

// x[i] of 16 rows, from columns [column, column + count) of some rows; the other lanes are left as they are.
static void side_by_side(Sum* x, const float* const* from, int64_t rows, int64_t column, int64_t count) {
    float* to = reinterpret_cast<float*>(x);
    const int64_t whole_rows = rows / 4 * 4, whole = count / 4 * 4;
    for (int64_t i = 0; i < whole; i += LINE) {  // a line of the cache at a time: rows may lie so that they evict each other
        const int64_t end = std::min(i + LINE, whole);
        for (int64_t r = 0; r < whole_rows; r += 4) {
            for (int64_t j = i; j < end; j += 4) turn(to + j * LANES + r, LANES, from + r, column + j);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = r < whole_rows ? whole : 0; i < count; ++i) to[i * LANES + r] = from[r][column + i];
    }
}

// Codes of parameters [p, p + count) for four blocks from block 4 * quad on: twice the row in the block, and 1 for minus.
static void make_codes(uint16_t* codes, int64_t stride, uint64_t p, int64_t count, uint64_t quad, int blocks,
                       const SparseJob& job) {
    const Keys keys(job.seed);
    const Words third = Words{} + (SPARSE_DOMAIN + quad), fourth = Words{} + job.domain;
    for (int64_t i = 0; i < count; i += COUNTERS) {
        const Words lanes = lanes_from(p + i, 1);
        Random x = {{lanes, lanes >> 32, third, fourth}};
#pragma GCC unroll 10
        for (int round = 0; round < ROUNDS; ++round) x = next_round(x, keys.key0[round], keys.key1[round]);
        for (int block = 0; block < blocks; ++block) {
            const Words w = x.word[block] & LOW_WORD, code = (w >> 22 << 1) | ((w & 1) ^ 1);
            uint16_t* to = codes + block * stride + i;
            for (int lane = 0; lane < std::min<int64_t>(COUNTERS, count - i); ++lane) to[lane] = (uint16_t)code[lane];
        }
    }
}

// Adds x[i] to the sum that codes[i] names.
static void scatter(Sum* sums, const Sum* x, const uint16_t* codes, int64_t count) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t code = codes[i];
        const Bits sign = Bits{} + (code << 31);
        Sum* sum = sums + (code >> 1);
        for (int part = 0; part < PARTS; ++part) sum->part[part] += (Floats)((Bits)x[i].part[part] ^ sign);
    }
}

// Adds 32 times the sums of block `block` to out, for the rows of P that out has.
static void add_block(const SparseJob& job, const Sum* sums, int64_t block, int64_t row, int64_t rows) {
    const int64_t first = block * SPARSE_BLOCK - (int64_t)job.first_k;  // the column of out that the block's first row has
    const int64_t begin = std::max<int64_t>(0, -first), end = std::min<int64_t>(SPARSE_BLOCK, job.count - first);
    alignas(64) float turned[LANES][LANES];
    for (int64_t k = begin; k < end; k += LANES) {
        const int64_t some = std::min<int64_t>(LANES, end - k);
        const float* lines[LANES];
        for (int64_t i = 0; i < LANES; ++i) lines[i] = reinterpret_cast<const float*>(sums + std::min(k + i, end - 1));
        for (int i = 0; i < LANES; i += 4) {
            for (int r = 0; r < LANES; r += 4) turn(&turned[r][i], LANES, lines + i, r);
        }
        for (int64_t r = 0; r < rows; ++r) {
            float* out = job.out + (row + r) * job.out_stride + first + k;
            for (int64_t i = 0; i < some; ++i) out[i] += SPARSE_SCALE * turned[r][i];
        }
    }
}

// What 16 rows have at some columns of a segment.
struct Values {
    const Segment& segment;
    const float* rows[LANES];
    Values(const SparseJob&, const SparseTask& task, const Segment& segment) : segment(segment) {
        for (int64_t r = 0; r < task.rows; ++r) rows[r] = segment.values + (task.row + r) * segment.stride;
    }
    void read(Sum* x, int64_t used, int64_t column, int64_t count) { side_by_side(x, rows, used, column, count); }
};

// The same of a linear layer's weight: outer products that are formed here, and neither written to memory nor read from it.
struct OuterProducts {
    const Segment& segment;
    int64_t row;
    Buffer<Sum> activations;  // [positions, inputs]
    OuterProducts(const SparseJob& job, const SparseTask& task, const Segment& segment)
        : segment(segment), row(task.row), activations(segment.positions * segment.inputs) {
        activations.clear();
        const float* from[LANES];
        for (int64_t t = 0; t < segment.positions; ++t) {
            for (int64_t r = 0; r < task.rows; ++r) {
                from[r] = segment.values + ((row + r) / job.classes * segment.positions + t) * segment.stride;
            }
            side_by_side(activations.data + t * segment.inputs, from, task.rows, 0, segment.inputs);
        }
    }
    void read(Sum* x, int64_t, int64_t column, int64_t count) {
        for (int64_t i = 0; i < count;) {
            const int64_t output = (column + i) / segment.inputs, first = (column + i) % segment.inputs;
            const int64_t some = std::min(count - i, segment.inputs - first);
            for (int64_t t = 0; t < segment.positions; ++t) {
                Sum delta;
                memcpy(&delta, segment.deltas + (output * segment.positions + t) * segment.lanes + row, sizeof delta);
                add_outer(x + i, delta, activations.data + t * segment.inputs + first, some, t == 0);
            }
            i += some;
        }
    }
    static void add_outer(Sum* x, const Sum& delta, const Sum* a, int64_t count, bool first) {
        for (int64_t k = 0; k < count; ++k) {
            for (int part = 0; part < PARTS; ++part) {
                Floats product = delta.part[part] * a[k].part[part];
                ROUNDED(product);  // the same at every level, with fused multiply-adds or without
                x[k].part[part] = first ? product : x[k].part[part] + product;
            }
        }
    }
};

template <class Rows>
static void add_part(const SparseJob& job, const SparseTask& task, const Part& part, Sum* x, Sum* sums) {
    Rows rows(job, task, *part.segment);
    for (int64_t i = 0; i < part.columns; i += PIECE) {
        const int64_t some = std::min<int64_t>(PIECE, part.columns - i);
        rows.read(x, task.rows, part.column + i, some);
        for (int64_t b = 0; b < task.blocks.end - task.blocks.begin; ++b) {
            scatter(sums + b * SPARSE_BLOCK, x, task.codes + b * task.stride + part.codes + i, some);
        }
    }
}

static void add_task(const SparseJob& job, const SparseTask& task) {
    const int64_t blocks = task.blocks.end - task.blocks.begin;
    Buffer<Sum> x(PIECE), sums(blocks * SPARSE_BLOCK);
    x.clear();
    sums.clear();
    for (const Part* part = task.parts; part < task.parts + task.part_count; ++part) {
        const auto add = part->segment->deltas ? add_part<OuterProducts> : add_part<Values>;
        add(job, task, *part, x.data, sums.data);
    }
    for (int64_t b = 0; b < blocks; ++b) {
        add_block(job, sums.data + b * SPARSE_BLOCK, task.blocks.begin + b, task.row, task.rows);
    }
}
