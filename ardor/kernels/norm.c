/* Root-mean-square norm, one pass forward and one backward; rounded where the reference rounds. */
#include "scalar.h"
#include <math.h>

int omp_get_thread_num(void);

#define DEFINE(TYPE, T, LOAD, STORE)                                                            \
    void rms_norm_##TYPE(const T *x, const T *w, T *y, float *inverse, int64_t rows,            \
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
                out[i] = STORE(LOAD(STORE(LOAD(in[i]) * scale)) * LOAD(w[i]));                  \
        }                                                                                       \
    }                                                                                           \
    /* dw has a row for each thread; the caller sums them */                                    \
    void rms_norm_backward_##TYPE(const T *dy, const T *x, const T *w, const float *inverse,    \
                                  T *dx, float *dw, int64_t rows, int64_t width, int threads) { \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                       \
        for (int64_t row = 0; row < rows; row++) {                                              \
            const T *up = dy + row * width, *in = x + row * width;                              \
            T *out = dx + row * width;                                                          \
            float *sums = dw + omp_get_thread_num() * width;                                    \
            float scale = inverse[row], along = 0;                                              \
            _Pragma("omp simd reduction(+ : along)")                                            \
            for (int64_t i = 0; i < width; i++) {                                               \
                float product = LOAD(up[i]) * LOAD(STORE(LOAD(in[i]) * scale));                 \
                sums[i] += product;                                                             \
                along += product * LOAD(w[i]);                                                  \
            }                                                                                   \
            along /= (float)width;                                                              \
            _Pragma("omp simd")                                                                 \
            for (int64_t i = 0; i < width; i++) {                                               \
                float unit = LOAD(in[i]) * scale;                                               \
                out[i] = STORE((LOAD(up[i]) * LOAD(w[i]) - unit * along) * scale);              \
            }                                                                                   \
        }                                                                                       \
    }

DEFINE(bfloat16, uint16_t, widened, rounded)
DEFINE(float32, float, same, same)
