/* The products of an adapter: of many rows with a matrix that has few, where the processor
 * multiplies bfloat16. Libraries pack both sides for products that are large in every way; here
 * the thin side stays in the nearest cache and the long one is read once, as it lies.
 *
 * x and y are [n, width], a is [r, width], low [n, r], all bfloat16 with float32 sums; width a
 * multiple of 32 and r of 8. Where the processor has AMX, oneDNN's products use it: not here.
 */
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#include "scalar.h"
#include <immintrin.h>

#define LANES 16      /* float32 sums in a register */
#define COLUMNS 64    /* of x that are packed together */
#define MOST 512      /* rows whose packed columns stay near */
#define AHEAD 4       /* pairs of rows: each is on another page, which no hardware foresees */

static inline __m512bh line(const uint16_t *from) { return (__m512bh)_mm512_loadu_si512(from); }

static inline __m512bh lanes(const uint32_t *from) { return (__m512bh)_mm512_loadu_si512(from); }

static inline __m512bh everywhere(uint32_t pair) {
    return (__m512bh)_mm512_set1_epi32((int32_t)pair);
}

static inline __m512i wide(const uint16_t *from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from));
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline uint32_t pair(uint16_t first, uint16_t second) {
    return first | (uint32_t)second << 16;
}

/* ROWS rows of x times four of a, over the whole width */
#define DEFINE(ROWS)                                                                            \
    static void dots_##ROWS(const uint16_t *x, const uint16_t *a, uint16_t *low, int64_t width, \
                            int64_t r, float scale) {                                           \
        __m512 sums[ROWS][4];                                                                   \
        _Pragma("GCC unroll 32")                                                                \
        for (int n = 0; n < ROWS * 4; n++) sums[n / 4][n % 4] = _mm512_setzero_ps();            \
        for (int64_t w = 0; w < width; w += 2 * LANES) {                                        \
            __m512bh right[4];                                                                  \
            _Pragma("GCC unroll 4")                                                             \
            for (int j = 0; j < 4; j++) right[j] = line(a + j * width + w);                     \
            _Pragma("GCC unroll 8")                                                             \
            for (int i = 0; i < ROWS; i++) {                                                    \
                __m512bh left = line(x + i * width + w);                                        \
                _Pragma("GCC unroll 4")                                                         \
                for (int j = 0; j < 4; j++)                                                     \
                    sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, right[j]);                  \
            }                                                                                   \
        }                                                                                       \
        _Pragma("GCC unroll 32")                                                                \
        for (int n = 0; n < ROWS * 4; n++)                                                      \
            low[n / 4 * r + n % 4] = rounded(scale * _mm512_reduce_add_ps(sums[n / 4][n % 4])); \
    }

DEFINE(1)
DEFINE(6)

/* low = scale x a^T */
void thin_dots(const uint16_t *x, const uint16_t *a, uint16_t *low, int64_t n, int64_t width,
               int64_t r, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t first = 0; first < n; first += 6)
        for (int64_t j = 0; j < r; j += 4) {
            const uint16_t *rows = x + first * width, *some = a + j * width;
            uint16_t *to = low + first * r + j;
            if (n - first >= 6)
                dots_6(rows, some, to, width, r, scale);
            else
                for (int64_t i = 0; i < n - first; i++)
                    dots_1(rows + i * width, some, to + i * r, width, r, scale);
        }
}

/* y, or zero without it, + scale low a for ROWS rows; a is packed [r / 2][width], low in pairs */
#define DEFINE_ADD(ROWS)                                                                        \
    static void add_##ROWS(const uint16_t *y, const uint32_t *low, const uint32_t *a,           \
                           uint16_t *out, int64_t width, int64_t pairs, float scale) {          \
        for (int64_t w = 0; w < width; w += 2 * LANES) {                                        \
            __m512 sums[ROWS][2];                                                               \
            _Pragma("GCC unroll 16")                                                            \
            for (int n = 0; n < ROWS * 2; n++) sums[n / 2][n % 2] = _mm512_setzero_ps();        \
            for (int64_t p = 0; p < pairs; p++) {                                               \
                const uint32_t *from = a + p * width + w;                                       \
                __m512bh right[2] = {lanes(from), lanes(from + LANES)};                         \
                _Pragma("GCC unroll 8")                                                         \
                for (int i = 0; i < ROWS; i++) {                                                \
                    __m512bh left = everywhere(low[i * pairs + p]);                             \
                    sums[i][0] = _mm512_dpbf16_ps(sums[i][0], left, right[0]);                  \
                    sums[i][1] = _mm512_dpbf16_ps(sums[i][1], left, right[1]);                  \
                }                                                                               \
            }                                                                                   \
            _Pragma("GCC unroll 16")                                                            \
            for (int i = 0; i < ROWS; i++) {                                                    \
                __m512 made[2], by = _mm512_set1_ps(scale);                                     \
                for (int half = 0; half < 2; half++) {                                          \
                    __m512 held = _mm512_setzero_ps();                                          \
                    if (y) {                                                                    \
                        const uint16_t *from = y + i * width + w + half * LANES;                \
                        held = _mm512_cvtpbh_ps((__m256bh)_mm256_loadu_si256((const void *)from)); \
                    }                                                                           \
                    made[half] = _mm512_fmadd_ps(sums[i][half], by, held);                      \
                }                                                                               \
                _mm512_storeu_si512(out + i * width + w,                                        \
                                    (__m512i)_mm512_cvtne2ps_pbh(made[1], made[0]));            \
            }                                                                                   \
        }                                                                                       \
    }

DEFINE_ADD(1)
DEFINE_ADD(6)

/* out = y + scale low a, rounded once; y may be out, or NULL for zero. scratch: r * width / 2 */
void thin_add(const uint16_t *y, const uint16_t *low, const uint16_t *a, uint16_t *out,
              uint32_t *scratch, int64_t n, int64_t width, int64_t r, float scale, int threads) {
    int64_t pairs = r / 2;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t p = 0; p < pairs; p++) {
            const uint16_t *even = a + 2 * p * width, *odd = even + width;
#pragma omp simd
            for (int64_t w = 0; w < width; w++) scratch[p * width + w] = pair(even[w], odd[w]);
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t first = 0; first < n; first += 6) {
            int64_t at = first * width;
            const uint16_t *held = y ? y + at : NULL;
            const uint32_t *some = (const uint32_t *)(low + first * r);
            if (n - first >= 6)
                add_6(held, some, scratch, out + at, width, pairs, scale);
            else
                for (int64_t i = 0; i < n - first; i++)
                    add_1(held ? held + i * width : NULL, some + i * pairs, scratch,
                          out + at + i * width, width, pairs, scale);
        }
    }
}

/* sums over rows, in pairs: four of low's columns, 64 of x's, of which `columns` are there and
 * stored; added to what is there if `more` */
static void outer(const uint32_t *x, const uint32_t *low, float *out, int64_t pairs, int64_t width,
                  int64_t r, int64_t columns, float scale, int more) {
    __m512 sums[4][4];
#pragma GCC unroll 16
    for (int n = 0; n < 16; n++) sums[n / 4][n % 4] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh right[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) right[j] = lanes(x + p * COLUMNS + j * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m512bh left = everywhere(low[p * r + i]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, right[j]);
        }
    }
#pragma GCC unroll 16
    for (int n = 0; n < 16; n++) {
        if (n % 4 * LANES >= columns) continue;
        float *to = out + n / 4 * width + n % 4 * LANES;
        __m512 held = more ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
        _mm512_storeu_ps(to, _mm512_fmadd_ps(sums[n / 4][n % 4], _mm512_set1_ps(scale), held));
    }
}

/* out = scale low^T x, float32 [r, width]. scratch: (n + 1) / 2 * r */
void thin_outer(const uint16_t *x, const uint16_t *low, float *out, uint32_t *scratch, int64_t n,
                int64_t width, int64_t r, float scale, int threads) {
#pragma omp parallel num_threads(threads)
    {
        uint32_t packed[MOST / 2 * COLUMNS];
#pragma omp for
        for (int64_t p = 0; p < (n + 1) / 2; p++)
            for (int64_t j = 0; j < r; j++) {
                const uint16_t *even = low + 2 * p * r + j;
                scratch[p * r + j] = pair(*even, 2 * p + 1 < n ? even[r] : 0);
            }
#pragma omp for schedule(dynamic)
        for (int64_t w = 0; w < width; w += COLUMNS) {
            int64_t columns = least(COLUMNS, width - w);
            for (int64_t first = 0; first < n; first += MOST) {
                int64_t pairs = (least(MOST, n - first) + 1) / 2;
                for (int64_t p = 0; p < pairs; p++) {
                    const uint16_t *even = x + (first + 2 * p) * width + w;
                    const uint16_t *odd = first + 2 * p + 1 < n ? even + width : even; /* times 0 */
                    uint32_t *to = packed + p * COLUMNS;
                    if (p + AHEAD < pairs)
                        for (int64_t i = 0; i < columns; i += 32) {
                            _mm_prefetch(even + 2 * AHEAD * width + i, _MM_HINT_T0);
                            _mm_prefetch(odd + 2 * AHEAD * width + i, _MM_HINT_T0);
                        }
                    for (int64_t i = 0; i < columns; i += LANES) {
                        __m512i low = wide(even + i), high = _mm512_slli_epi32(wide(odd + i), 16);
                        _mm512_storeu_si512(to + i, _mm512_or_si512(low, high));
                    }
                }
                for (int64_t j = 0; j < r; j += 4)
                    outer(packed, scratch + first / 2 * r + j, out + j * width + w, pairs, width, r,
                          columns, scale, first > 0);
            }
        }
    }
}
#endif
