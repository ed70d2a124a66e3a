/* Gated feed-forwards of many rows, down (act(gate x) * up x), where the processor multiplies
 * bfloat16: of one feed-forward, or of each expert over the rows that chose it.
 *
 * Weights are read as they lie, as left operands, a pair of the summed axis at a time; rows are the
 * columns of the products, packed [pair][row]. What the first two products give is, with its
 * neighbour, already packed so for the third. Nothing between is written but that: no gathered
 * rows, no gate, no up. Sums are float32, and only what the third product reads is rounded.
 *
 * Where the processor has AMX, oneDNN's products use it: not here.
 */
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#include "gate.h"
#include <immintrin.h>

#define COLUMNS 64 /* rows of x in a tile */
#define ROWS 16    /* rows of a weight at a time */
#define MOST 512   /* rows of x whose packed forms stay near */

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* c = a b, of ROWS rows with `pairs` pairs each, and 16 * J columns; R rows at a time in registers */
#define DEFINE(J, R)                                                                            \
    static void product_##J(const uint32_t *a, const uint32_t *b, float *c, int64_t pairs) {    \
        for (int64_t first = 0; first < ROWS; first += R) {                                     \
            __m512 sums[R][J];                                                                  \
            _Pragma("GCC unroll 32")                                                            \
            for (int n = 0; n < R * J; n++) sums[n / J][n % J] = _mm512_setzero_ps();           \
            for (int64_t p = 0; p < pairs; p++) {                                               \
                __m512bh right[J];                                                              \
                _Pragma("GCC unroll 4")                                                         \
                for (int j = 0; j < J; j++)                                                     \
                    right[j] = (__m512bh)_mm512_loadu_si512(b + p * 16 * J + 16 * j);           \
                _Pragma("GCC unroll 16")                                                        \
                for (int i = 0; i < R; i++) {                                                   \
                    if (p % 16 == 0) __builtin_prefetch(a + (first + i + ROWS) * pairs + p, 0, 2); \
                    int32_t both = (int32_t)a[(first + i) * pairs + p];                         \
                    __m512bh left = (__m512bh)_mm512_set1_epi32(both);                          \
                    _Pragma("GCC unroll 4")                                                     \
                    for (int j = 0; j < J; j++)                                                 \
                        sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, right[j]);              \
                }                                                                               \
            }                                                                                   \
            _Pragma("GCC unroll 32")                                                            \
            for (int n = 0; n < R * J; n++)                                                     \
                _mm512_storeu_ps(c + (first + n / J) * COLUMNS + n % J * 16, sums[n / J][n % J]); \
        }                                                                                       \
    }

DEFINE(1, 16)
DEFINE(2, 8)
DEFINE(3, 8)
DEFINE(4, 4)

typedef void (*Product)(const uint32_t *a, const uint32_t *b, float *c, int64_t pairs);
static const Product PRODUCTS[] = {product_1, product_2, product_3, product_4};

/* Some of one expert's rows, in tiles. */
typedef struct {
    const int64_t *rows;  /* of x, that are read; NULL: 0, 1, ... */
    const float *weights; /* of each row's result; NULL: 1 */
    int64_t count;
} Rows;

static inline int64_t row_of(Rows some, int64_t index) {
    return some.rows ? some.rows[index] : index;
}

static inline int64_t tile_rows(Rows some, int64_t tile) {
    return least(COLUMNS, some.count - tile * COLUMNS);
}

/* of sixteen columns each; the last may not be full */
static inline int64_t tile_parts(Rows some, int64_t tile) {
    return (tile_rows(some, tile) + 15) / 16;
}

static void pack_tile(const uint16_t *x, uint32_t *to, int64_t width, Rows some, int64_t tile) {
    int64_t count = tile_rows(some, tile), columns = 16 * tile_parts(some, tile);
    if (count < columns) memset(to, 0, sizeof *to * (size_t)(columns * width / 2));
    for (int64_t r = 0; r < count; r++) {
        const uint16_t *from = x + row_of(some, tile * COLUMNS + r) * width;
        for (int64_t p = 0; p < width / 2; p++) memcpy(to + p * columns + r, from + 2 * p, sizeof *to);
    }
}

/* act(gate) * up of ROWS channels, packed in pairs */
static void pack_gated(const float *gate, const float *up, uint32_t *to, int64_t columns, int gelu) {
    for (int64_t p = 0; p < ROWS / 2; p++) {
        const float *g = gate + 2 * p * COLUMNS, *u = up + 2 * p * COLUMNS;
        float made[2 * COLUMNS];
        for (int64_t half = 0; half < 2; half++)
#pragma omp simd
            for (int64_t n = 0; n < columns; n++) {
                float in = g[half * COLUMNS + n], inner = gelu ? gelu_inner(in) : in;
                made[half * COLUMNS + n] = in / (1.0f + exponential(-inner)) * u[half * COLUMNS + n];
            }
#pragma omp simd
        for (int64_t n = 0; n < columns; n++)
            to[p * columns + n] = rounded(made[n]) | (uint32_t)rounded(made[COLUMNS + n]) << 16;
    }
}

static void add_tile(const float *made, float *out, int64_t first, int64_t width, Rows some,
                     int64_t tile) {
    for (int64_t r = 0; r < tile_rows(some, tile); r++) {
        int64_t index = tile * COLUMNS + r;
        float weight = some.weights ? some.weights[index] : 1.0f;
        float *to = out + row_of(some, index) * width + first;
        for (int64_t i = 0; i < ROWS; i++) to[i] += weight * made[i * COLUMNS + r];
    }
}

/* uint32s of scratch for experts of which the busiest reads so many rows */
int64_t gated_mlp_scratch(int64_t most, int64_t width, int64_t inner) {
    return (least(most, MOST) + COLUMNS - 1) / COLUMNS * COLUMNS * (width + inner) / 2;
}

/* What every thread does for some rows of one expert: each `for` is shared among them. */
static void feed(const uint16_t *x, const uint16_t *gate, const uint16_t *up, const uint16_t *down,
                 float *out, uint32_t *packed, int64_t width, int64_t inner, int gelu, Rows some) {
    int64_t tiles = (some.count + COLUMNS - 1) / COLUMNS, pairs = width / 2;
    uint32_t *hidden = packed + tiles * COLUMNS * pairs;
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < tiles; t++)
        pack_tile(x, packed + t * COLUMNS * pairs, width, some, t);
#pragma omp for schedule(dynamic, 8)
    for (int64_t f = 0; f < inner; f += ROWS)
        for (int64_t t = 0; t < tiles; t++) {
            float gates[ROWS * COLUMNS], ups[ROWS * COLUMNS];
            int64_t parts = tile_parts(some, t);
            const uint32_t *right = packed + t * COLUMNS * pairs;
            PRODUCTS[parts - 1]((const uint32_t *)(gate + f * width), right, gates, pairs);
            PRODUCTS[parts - 1]((const uint32_t *)(up + f * width), right, ups, pairs);
            pack_gated(gates, ups, hidden + t * COLUMNS * inner / 2 + f / 2 * 16 * parts, 16 * parts,
                       gelu);
        }
#pragma omp for schedule(dynamic, 8)
    for (int64_t d = 0; d < width; d += ROWS)
        for (int64_t t = 0; t < tiles; t++) {
            float made[ROWS * COLUMNS];
            PRODUCTS[tile_parts(some, t) - 1]((const uint32_t *)(down + d * inner),
                                              hidden + t * COLUMNS * inner / 2, made, inner / 2);
            add_tile(made, out, d, width, some, t);
        }
}

/* Expert e reads the next counts[e] of `rows`, each at most once, and adds to float32 `out`. gate
 * and up are [experts, inner, width], down [experts, width, inner]; both sizes multiples of 16. */
void gated_mlp(const uint16_t *x, const int64_t *rows, const float *weights, const int64_t *counts,
               const uint16_t *gate, const uint16_t *up, const uint16_t *down, float *out,
               uint32_t *scratch, int64_t experts, int64_t width, int64_t inner, int gelu,
               int threads) {
#pragma omp parallel num_threads(threads)
    for (int64_t e = 0, first = 0; e < experts; first += counts[e++])
        for (int64_t done = 0; done < counts[e]; done += MOST) {
            int64_t at = e * width * inner, start = first + done;
            Rows some = {rows ? rows + start : NULL, weights ? weights + start : NULL,
                         least(MOST, counts[e] - done)};
            /* without a list the rows are those of x, from `start` on */
            int64_t skipped = rows ? 0 : start * width;
            feed(x + skipped, gate + at, up + at, down + at, out + skipped, scratch, width, inner,
                 gelu, some);
        }
}
#endif
