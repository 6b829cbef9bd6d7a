// 16 rows of gradients side by side. Included once per SIMD level.

typedef float Floats __attribute__((vector_size(VECTOR_BYTES), may_alias));

constexpr int LANES = 16;  // rows side by side
constexpr int PARTS = LANES * 4 / VECTOR_BYTES;

struct Sum {  // one number for each of 16 rows
    Floats part[PARTS];
};
