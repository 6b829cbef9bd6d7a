// The sum of a row's squares. Included once per SIMD level.
//
// A square of two floats is exact in float64, so that fused multiply-adds change no bit; sums are added up in a fixed order.

typedef double Doubles __attribute__((vector_size(VECTOR_BYTES)));
typedef float Halves __attribute__((vector_size(VECTOR_BYTES / 2)));

constexpr int WIDE = VECTOR_BYTES / 8;

static inline void add_squares(Doubles* sums, const float* values) {
    for (int part = 0; part < SUMS / WIDE; ++part) {
        Halves some;
        memcpy(&some, values + part * WIDE, sizeof some);
        const Doubles wide = __builtin_convertvector(some, Doubles);
        sums[part] += wide * wide;
    }
}

static double squares_of_row(const float* values, int64_t columns) {
    Doubles sums[SUMS / WIDE] = {};
    const int64_t whole = columns / SUMS * SUMS;
    for (int64_t i = 0; i < whole; i += SUMS) add_squares(sums, values + i);
    float rest[SUMS] = {};
    std::copy(values + whole, values + columns, rest);
    add_squares(sums, rest);
    double total[SUMS];
    memcpy(total, sums, sizeof total);
    for (int step = SUMS / 2; step; step /= 2) {
        for (int i = 0; i < step; ++i) total[i] += total[i + step];
    }
    return total[0];
}
