/* y = W x + b for one row of x: bound by reading W, so that each core streams its share of rows.
 *
 * One row after the other, without prefetching: a plain sequence is what the processor's own
 * prefetcher follows best. Several rows at a time, or prefetch instructions, read 3 to 20 % less a
 * second (docs/LOG.md). Sums are float32. The portable loop is for the compiler to vectorize: the
 * simd pragma lets it reassociate the sum.
 */
#include "scalar.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define STEP 64 /* elements at a time: two sums in flight hide the latency of one */

/* w . x over whole steps; *done counts their elements */
static inline float dot_native(const uint16_t *w, const uint16_t *x, int64_t in, int64_t *done) {
    float sum = 0;
    *done = 0;
#ifdef __AVX512BF16__
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (; *done + STEP <= in; *done += STEP) {
        const uint16_t *at = w + *done, *value = x + *done;
        even = _mm512_dpbf16_ps(even, (__m512bh)_mm512_loadu_si512(at),
                                (__m512bh)_mm512_loadu_si512(value));
        odd = _mm512_dpbf16_ps(odd, (__m512bh)_mm512_loadu_si512(at + STEP / 2),
                               (__m512bh)_mm512_loadu_si512(value + STEP / 2));
    }
    sum = _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
#else
    (void)w, (void)x, (void)in;
#endif
    return sum;
}

void matvec_bfloat16(const uint16_t *w, const uint16_t *x, const uint16_t *bias, uint16_t *y,
                     int64_t out, int64_t in, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < out; row++) {
        const uint16_t *at = w + row * in;
        int64_t done;
        float sum = dot_native(at, x, in, &done);
#pragma omp simd reduction(+ : sum)
        for (int64_t i = done; i < in; i++) sum += widened(at[i]) * widened(x[i]);
        y[row] = rounded(sum + (bias ? widened(bias[row]) : 0.0f));
    }
}
