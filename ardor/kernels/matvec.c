/* y = W x + b for one row of x: bound by reading W, so that each core streams its share of rows.
 *
 * Sums are float32. The portable loop is for the compiler to vectorize: the simd pragma lets it
 * reassociate the sum.
 */
#include "scalar.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define ROWS 8    /* at a time: so many streams of memory in flight */
#define AHEAD 512 /* elements: the hardware's own prefetcher stops at the end of a page */

/* sums[r] += the product of x[from:in] with the same part of each of the `count` rows at w */
static inline void dots(const uint16_t *w, const uint16_t *x, int64_t in, int64_t from,
                        int64_t count, float *sums) {
    for (int64_t r = 0; r < count; r++) {
        float sum = sums[r];
#pragma omp simd reduction(+ : sum)
        for (int64_t i = from; i < in; i++) sum += widened(w[r * in + i]) * widened(x[i]);
        sums[r] = sum;
    }
}

/* the same for whole blocks of ROWS rows; returns how many columns it has done */
static inline int64_t dots_native(const uint16_t *w, const uint16_t *x, int64_t in, float *sums) {
    int64_t done = 0;
#ifdef __AVX512BF16__
    __m512 s[ROWS];
    for (int r = 0; r < ROWS; r++) s[r] = _mm512_setzero_ps();
    for (; done + 32 <= in; done += 32) {
        __m512bh value = (__m512bh)_mm512_loadu_si512(x + done);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const uint16_t *at = w + r * in + done;
            _mm_prefetch((const char *)(at + AHEAD), _MM_HINT_T0);
            s[r] = _mm512_dpbf16_ps(s[r], (__m512bh)_mm512_loadu_si512(at), value);
        }
    }
    for (int r = 0; r < ROWS; r++) sums[r] = _mm512_reduce_add_ps(s[r]);
#else
    (void)w, (void)x, (void)in, (void)sums;
#endif
    return done;
}

void matvec_bfloat16(const uint16_t *w, const uint16_t *x, const uint16_t *bias, uint16_t *y,
                     int64_t out, int64_t in, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < out; first += ROWS) {
        const uint16_t *rows = w + first * in;
        int64_t count = out - first < ROWS ? out - first : ROWS;
        float sums[ROWS] = {0};
        int64_t done = count == ROWS ? dots_native(rows, x, in, sums) : 0;
        dots(rows, x, in, done, count, sums);
        for (int64_t r = 0; r < count; r++)
            y[first + r] = rounded(sums[r] + (bias ? widened(bias[first + r]) : 0.0f));
    }
}
