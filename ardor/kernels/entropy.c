/* Cross-entropy of rows of logits, and its slope in them, in one visit of each row.
 *
 * Exponentials are taken once and kept for the slope; they are summed in float32 over short runs
 * and in double over these, so that a large vocabulary costs no precision.
 */
#include "scalar.h"

#define RUN 512

/* e^(x - top) of a run into `kept`; what is 88 below the top is nothing beside it */
static inline double run_of(const float *x, float *kept, float top, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        float below = x[i] - top, value = exponential(below);
        kept[i] = below < -87.0f ? 0.0f : value;
        sum += kept[i];
    }
    return (double)sum;
}

/* nats[r] = log sum_v e^x[r,v] - x[r, targets[r]], over the first `vocab` of `stride` numbers a row;
 * with `slope` also slope[r] = factors[r] (softmax(x[r]) - onehot), a factor being 1 without them.
 * `scratch` has `vocab` floats a thread. */
#define DEFINE(NAME, TYPE, WIDE, NARROW)                                                           \
    void cross_entropy_##NAME(const TYPE *logits, const int64_t *targets, const float *factors,    \
                              float *nats, TYPE *slope, float *scratch, int64_t rows,              \
                              int64_t vocab, int64_t stride, int64_t slope_stride, int threads) {  \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                          \
        for (int thread = 0; thread < threads; thread++) {                                         \
            float *kept = scratch + thread * vocab;                                                \
            for (int64_t r = rows * thread / threads; r < rows * (thread + 1) / threads; r++) {    \
                const TYPE *x = logits + r * stride;                                               \
                float top = -__builtin_inff();                                                     \
                _Pragma("omp simd reduction(max : top)")                                           \
                for (int64_t v = 0; v < vocab; v++) {                                              \
                    kept[v] = WIDE(x[v]);                                                          \
                    top = kept[v] > top ? kept[v] : top;                                           \
                }                                                                                  \
                double sum = 0;                                                                    \
                float wanted = kept[targets[r]];                                                   \
                for (int64_t v = 0; v < vocab; v += RUN)                                           \
                    sum += run_of(kept + v, kept + v, top, v + RUN < vocab ? RUN : vocab - v);     \
                nats[r] = (float)(__builtin_log(sum) + ((double)top - (double)wanted));            \
                if (!slope) continue;                                                              \
                TYPE *d = slope + r * slope_stride;                                                \
                float factor = factors ? factors[r] : 1.0f, share = (float)(factor / sum);         \
                _Pragma("omp simd")                                                                \
                for (int64_t v = 0; v < vocab; v++) d[v] = NARROW(kept[v] * share);                \
                d[targets[r]] = NARROW(kept[targets[r]] * share - factor);                         \
            }                                                                                      \
        }                                                                                          \
    }
DEFINE(bfloat16, uint16_t, widened, rounded)
DEFINE(float32, float, same, same)
