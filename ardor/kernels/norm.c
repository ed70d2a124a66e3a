/* Root-mean-square norm, one pass forward and one backward; rounded where the reference rounds:
 * the normalised row, too, before it meets its weight, or only what becomes of it (late). */
#include "scalar.h"
#include <math.h>

int omp_get_thread_num(void);

static inline float through(float value) { return widened(rounded(value)); }

#define DEFINE(TYPE, T, LOAD, STORE, W, WEIGHT, UNIT)                                           \
    void rms_norm_##TYPE(const T *x, const W *w, T *y, float *inverse, int64_t rows,            \
                         int64_t width, float eps, int threads) {                               \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                       \
        for (int64_t row = 0; row < rows; row++) {                                              \
            const T *in = x + row * width;                                                      \
            T *out = y + row * width;                                                           \
            float squares = 0;                                                                  \
            _Pragma("omp simd reduction(+ : squares)")                                          \
            for (int64_t i = 0; i < width; i++) squares += LOAD(in[i]) * LOAD(in[i]);           \
            float scale = 1.0f / sqrtf(squares / (float)width + eps);                           \
            inverse[row] = scale;                                                               \
            _Pragma("omp simd")                                                                 \
            for (int64_t i = 0; i < width; i++)                                                 \
                out[i] = STORE(UNIT(LOAD(in[i]) * scale) * WEIGHT(w[i]));                       \
        }                                                                                       \
    }                                                                                           \
    /* dw has a row for each thread; the caller sums them */                                    \
    void rms_norm_backward_##TYPE(const T *dy, const T *x, const W *w, const float *inverse,    \
                                  T *dx, float *dw, int64_t rows, int64_t width, int threads) { \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                       \
        for (int64_t row = 0; row < rows; row++) {                                              \
            const T *up = dy + row * width, *in = x + row * width;                              \
            T *out = dx + row * width;                                                          \
            float *sums = dw + omp_get_thread_num() * width;                                    \
            float scale = inverse[row], along = 0;                                              \
            _Pragma("omp simd reduction(+ : along)")                                            \
            for (int64_t i = 0; i < width; i++) {                                               \
                float product = LOAD(up[i]) * UNIT(LOAD(in[i]) * scale);                        \
                sums[i] += product;                                                             \
                along += product * WEIGHT(w[i]);                                                \
            }                                                                                   \
            along /= (float)width;                                                              \
            _Pragma("omp simd")                                                                 \
            for (int64_t i = 0; i < width; i++) {                                               \
                float unit = LOAD(in[i]) * scale;                                               \
                out[i] = STORE((LOAD(up[i]) * WEIGHT(w[i]) - unit * along) * scale);            \
            }                                                                                   \
        }                                                                                       \
    }

DEFINE(bfloat16, uint16_t, widened, rounded, uint16_t, widened, through)
DEFINE(late_bfloat16, uint16_t, widened, rounded, float, same, same)
DEFINE(float32, float, same, same, float, same, same)
