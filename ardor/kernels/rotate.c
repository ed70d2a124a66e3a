/* Rotary positions: pairs (i, i + half) turned in one pass; what lies behind them is copied. */
#include "scalar.h"

/* x and y are [rows, heads, positions, width] with the same strides; cos and sin are
 * [rows, positions, half]. `way` is 1, or -1 to turn back. */
#define DEFINE(TYPE, T, LOAD, STORE)                                                            \
    void rotate_##TYPE(const T *x, const T *cos, const T *sin, T *y, int64_t rows,              \
                       int64_t heads, int64_t positions, int64_t width, int64_t half,           \
                       int64_t row_stride, int64_t head_stride, int64_t stride, float way,      \
                       int threads) {                                                           \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                       \
        for (int64_t each = 0; each < rows * positions; each++) {                               \
            const T *c = cos + each * half, *s = sin + each * half;                             \
            for (int64_t head = 0; head < heads; head++) {                                      \
                int64_t at = each / positions * row_stride + head * head_stride +               \
                             each % positions * stride;                                         \
                const T *in = x + at;                                                           \
                T *out = y + at;                                                                \
                _Pragma("omp simd")                                                             \
                for (int64_t i = 0; i < half; i++) {                                            \
                    float first = LOAD(in[i]), second = LOAD(in[i + half]);                     \
                    float along = LOAD(c[i]), across = way * LOAD(s[i]);                        \
                    out[i] = STORE(first * along - second * across);                            \
                    out[i + half] = STORE(second * along + first * across);                     \
                }                                                                               \
                for (int64_t i = 2 * half; i < width; i++) out[i] = in[i];                      \
            }                                                                                   \
        }                                                                                       \
    }

DEFINE(bfloat16, uint16_t, widened, rounded)
DEFINE(float32, float, same, same)
