/* y = W x + b for one row of x: bound by reading W, so that each core streams its share of rows.
 *
 * Four rows at a time keep four streams of memory in flight. Sums are float32. The portable loops
 * are for the compiler to vectorize: the simd pragma lets it reassociate the sums.
 */
#include "scalar.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define ROWS 4

/* sums[r] = the product of x with row r of the `count` rows at w, four of them at most */

#define DEFINE_DOTS(NAME, TYPE, LOAD)                                                           \
    static inline void NAME(const TYPE *w, const TYPE *x, int64_t in, int64_t from,             \
                            int64_t count, float *sums) {                                       \
        for (int64_t r = 0; r < count; r++) {                                                   \
            float sum = sums[r];                                                                \
            _Pragma("omp simd reduction(+ : sum)")                                              \
            for (int64_t i = from; i < in; i++) sum += LOAD(w[r * in + i]) * LOAD(x[i]);        \
            sums[r] = sum;                                                                      \
        }                                                                                       \
    }                                                                                           \
    static inline void NAME##_four(const TYPE *w, const TYPE *x, int64_t in, float *sums) {     \
        const TYPE *a = w, *b = a + in, *c = b + in, *d = c + in;                               \
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;                                                   \
        _Pragma("omp simd reduction(+ : s0, s1, s2, s3)")                                       \
        for (int64_t i = 0; i < in; i++) {                                                      \
            float value = LOAD(x[i]);                                                           \
            s0 += LOAD(a[i]) * value;                                                           \
            s1 += LOAD(b[i]) * value;                                                           \
            s2 += LOAD(c[i]) * value;                                                           \
            s3 += LOAD(d[i]) * value;                                                           \
        }                                                                                       \
        sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;                                 \
    }

DEFINE_DOTS(dots_bfloat16, uint16_t, widened)
DEFINE_DOTS(dots_float32, float, same)

#ifdef __AVX512BF16__
static inline void dots_native(const uint16_t *w, const uint16_t *x, int64_t in, float *sums) {
    __m512 s[ROWS] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                      _mm512_setzero_ps()};
    int64_t whole = in - in % 32;
    for (int64_t i = 0; i < whole; i += 32) {
        __m512bh value = (__m512bh)_mm512_loadu_si512(x + i);
        for (int r = 0; r < ROWS; r++)
            s[r] = _mm512_dpbf16_ps(s[r], (__m512bh)_mm512_loadu_si512(w + r * in + i), value);
    }
    for (int r = 0; r < ROWS; r++) sums[r] = _mm512_reduce_add_ps(s[r]);
    dots_bfloat16(w, x, in, whole, ROWS, sums);
}
#define FOUR_BFLOAT16 dots_native
#else
#define FOUR_BFLOAT16 dots_bfloat16_four
#endif

#define DEFINE(NAME, TYPE, FOUR, DOTS, LOAD, STORE)                                             \
    void NAME(const TYPE *w, const TYPE *x, const TYPE *bias, TYPE *y, int64_t out, int64_t in, \
              int threads) {                                                                    \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                       \
        for (int64_t first = 0; first < out; first += ROWS) {                                   \
            int64_t count = out - first < ROWS ? out - first : ROWS;                            \
            float sums[ROWS] = {0};                                                             \
            if (count == ROWS)                                                                  \
                FOUR(w + first * in, x, in, sums);                                              \
            else                                                                                \
                DOTS(w + first * in, x, in, 0, count, sums);                                    \
            for (int64_t r = 0; r < count; r++)                                                 \
                y[first + r] = STORE(sums[r] + (bias ? LOAD(bias[first + r]) : 0.0f));          \
        }                                                                                       \
    }

DEFINE(matvec_bfloat16, uint16_t, FOUR_BFLOAT16, dots_bfloat16, widened, rounded)
DEFINE(matvec_float32, float, dots_float32_four, dots_float32, same, same)
