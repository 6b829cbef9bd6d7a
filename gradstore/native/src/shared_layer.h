// The product with the weight of a linear layer, whose gradient is a sum of outer products. Included once per SIMD level.
//
// P_k . (sum_t delta_t^c (x) a_t) = sum_t sum_j delta_t^c[j] * (P_k[row j of the weight] . a_t). The bracket does not depend
// on the class c, so the table method runs over n * T rows of activations instead of n * c rows of gradients, and what is
// left is c multiply-adds for each output j. A lane is one (example, position); positions are added up at the very end.

constexpr int TOGETHER = 4;            // classes that share a load of the projected activations

// totals[k][c] += sum_j deltas[j][c] * projected[j][k] for CLASSES classes from `c` on and two neighbouring k.
template <int CLASSES>
static inline void contract(double* totals, const Sum* deltas, const Sum* projected, int64_t classes, int64_t count,
                            int64_t outputs) {
    Sum sum[2][CLASSES] = {};
    for (int64_t j = 0; j < outputs; ++j) {
#pragma GCC unroll 4
        for (int c = 0; c < CLASSES; ++c) {
#pragma GCC unroll 4
            for (int i = 0; i < PARTS; ++i) {
                const Floats delta = deltas[j * classes + c].part[i];
                sum[0][c].part[i] += delta * projected[j * count].part[i];
                sum[1][c].part[i] += delta * projected[j * count + 1].part[i];
            }
        }
    }
    float values[2][CLASSES * LANES];
    memcpy(values, sum, sizeof values);
    for (int k = 0; k < 2; ++k) {
        for (int i = 0; i < CLASSES * LANES; ++i) totals[k * classes * LANES + i] += values[k][i];
    }
}

static void contract_all(double* totals, const Sum* deltas, const Sum* projected, int64_t classes, int64_t count,
                         int64_t outputs) {
    for (int64_t k = 0; k < count; k += 2) {
        double* row = totals + k * classes * LANES;
        int64_t c = 0;
        for (; c + TOGETHER <= classes; c += TOGETHER) {
            contract<TOGETHER>(row + c * LANES, deltas + c, projected + k, classes, count, outputs);
        }
        for (; c < classes; ++c) contract<1>(row + c * LANES, deltas + c, projected + k, classes, count, outputs);
    }
}

// deltas[j][c] of the 16 lanes from `lane` on. Lanes beyond the last hold padding, and are never read from the totals.
static void gather_deltas(Sum* deltas, const SharedJob& job, int64_t first_output, int64_t outputs, int64_t lane) {
    const float* from = job.deltas + first_output * job.classes * job.lanes + lane;
    for (int64_t i = 0; i < outputs * job.classes; ++i) memcpy(deltas + i, from + i * job.lanes, sizeof(Sum));
}

// projected[k] = P[k, p : p + inputs] . activations, for 16 lanes, with sign words that begin at pass `first`.
static void project_output(Sum* projected, const Job& activations, uint64_t first, const uint64_t* words, Sum* tables,
                           Sum* x, int64_t lane, int64_t lanes, int64_t count) {
    memset(static_cast<void*>(projected), 0, count * sizeof(Sum));
    const uint64_t begin = activations.start / PASS, end = (activations.start + activations.columns + PASS - 1) / PASS;
    for (uint64_t pass = begin; pass < end; ++pass) {
        gather(x, activations, lane, lanes, (int64_t)(pass * PASS - activations.start));
        add_pass(projected, x, tables, words + (pass - first) * count, count, std::make_index_sequence<GROUPS>());
    }
}

// Adds the lanes of each example up, in the order of its positions. 16 k at a time, as far as a cache line of totals goes.
static void add_positions(const SharedJob& job, const double* totals, Range ks, Range examples, int64_t count) {
    const int64_t step = job.classes * LANES;
    for (int64_t k = 0; k < ks.end - ks.begin; k += LANES) {
        const int64_t some = std::min<int64_t>(LANES, ks.end - ks.begin - k);
        for (int64_t c = 0; c < job.classes; ++c) {
            for (int64_t example = examples.begin; example < examples.end; ++example) {
                double sum[LANES] = {};
                for (int64_t position = 0; position < job.positions; ++position) {
                    const int64_t lane = (example - examples.begin) * job.positions + position;
                    const double* from = totals + ((lane / LANES * count + k) * job.classes + c) * LANES + lane % LANES;
                    for (int64_t i = 0; i < LANES; ++i) sum[i] += from[i * step];
                }
                float* out = job.weight.out + (example * job.classes + c) * job.weight.out_stride + ks.begin + k;
                for (int64_t i = 0; i < some; ++i) out[i] += (float)sum[i];
            }
        }
    }
}

// One tile: columns `ks` of out for whole `examples`.
static void shared(const SharedJob& job, Range ks, Range examples) {
    const int64_t count = (ks.end - ks.begin + LANES - 1) / LANES * LANES;
    const int64_t first_lane = examples.begin * job.positions, last_lane = examples.end * job.positions;
    const int64_t groups = (last_lane - first_lane + LANES - 1) / LANES, some = outputs_at_a_time(job);
    Buffer<Sum> tables(first_entry(GROUPS)), x(PASS), projected(some * count), deltas(some * job.classes);
    Buffer<uint64_t> words(count * (some * job.inputs / PASS + 4));
    Buffer<double> totals(groups * count * job.classes * LANES);
    totals.clear();
    for (int64_t output = 0; output < job.outputs; output += some) {
        const int64_t outputs = std::min(some, job.outputs - output);
        const uint64_t start = job.weight.start + output * job.inputs, stop = start + outputs * job.inputs;
        const uint64_t first = start / 128 * 2;
        make_words(words.data, first, (int64_t)((stop + 127) / 128 * 2 - first), job.weight.first_k + ks.begin, count,
                   job.weight);
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t lane = first_lane + group * LANES, lanes = std::min<int64_t>(LANES, last_lane - lane);
            for (int64_t j = 0; j < outputs; ++j) {
                Job activations = job.weight;
                activations.start = start + j * job.inputs;
                project_output(projected.data + j * count, activations, first, words.data, tables.data, x.data, lane,
                               lanes, count);
            }
            gather_deltas(deltas.data, job, output, outputs, lane);
            contract_all(totals.data + group * count * job.classes * LANES, deltas.data, projected.data, job.classes,
                         count, outputs);
        }
    }
    add_positions(job, totals.data, ks, examples, count);
}
