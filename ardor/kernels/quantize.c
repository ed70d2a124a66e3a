/* Weights to 4 and 8 bits in one pass over them, each block or row while it is in the cache; and
 * from 4 bits back.
 *
 * The arithmetic is that of the torch code beside it (ardor/quant/bnb4.py, bnb8.py) to the last bit:
 * every operation is one correctly rounded float32 operation, and none is contracted or reordered.
 */
#include "scalar.h"

#define BLOCK 64
#define LANES 16
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

/* The largest magnitude, by its bits: integers keep the order of floats, and put NaN above all. */
static inline float largest_of(const float *x, int64_t n) {
    uint32_t top = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float value;
    memcpy(&value, &top, sizeof value);
    return value;
}

/* codes of one block: how many midpoints lie below each number over the largest, by `rising` */
static inline float coded_block(const float *x, uint8_t *packed, const float *midpoints,
                                const uint8_t *rising) {
    float largest = largest_of(x, BLOCK), inverse = 1.0f / (largest > 1e-38f ? largest : 1e-38f);
    int32_t places[BLOCK];
    for (int i = 0; i < BLOCK; i += LANES) {
        floats scaled;
        memcpy(&scaled, x + i, sizeof scaled);
        scaled *= inverse;
        ints count = {0};
        for (int m = 0; m < 15; m++) count -= scaled > midpoints[m];
        memcpy(places + i, &count, sizeof count);
    }
    for (int j = 0; j < BLOCK / 2; j++)
        packed[j] = (uint8_t)(rising[places[2 * j]] << 4 | rising[places[2 * j + 1]]);
    return largest;
}

/* Rounded to float16, as a float32: to 11 bits of mantissa, or to a multiple of 2^-24 below its
 * normal range, where adding 3/4 leaves just such multiples; infinity beyond its range. */
static inline float halved(float x) {
    uint32_t bits, sign;
    memcpy(&bits, &x, sizeof bits);
    sign = bits & 0x80000000;
    bits ^= sign;
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    float small = (magnitude + 0.75f) - 0.75f;
    uint32_t nearest = (bits + 0xfff + ((bits >> 13) & 1)) & ~(uint32_t)0x1fff, tiny;
    nearest = nearest >= 0x47800000 ? 0x7f800000 : nearest; /* 65536 */
    nearest = bits > 0x7f800000 ? bits : nearest;           /* NaN */
    memcpy(&tiny, &small, sizeof tiny);
    bits = (bits < 0x38800000 ? tiny : nearest) | sign; /* 2^-14 */
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The nearest of 127 steps on either side of zero, ties to even */
static inline void coded_row(const float *x, int8_t *codes, float largest, int64_t n) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it leaves the integer in the low bits */
    float inverse = largest > 0 ? 1.0f / largest * 127.0f : 0.0f; /* as torch divides a number */
    for (int64_t i = 0; i < n; i++) {
        float shifted = x[i] * inverse + magic;
        int32_t bits;
        memcpy(&bits, &shifted, sizeof bits);
        codes[i] = (int8_t)bits;
    }
}

#define QUANTIZE(NAME, TYPE, WIDE)                                                                 \
    void quantize_4bit_##NAME(const TYPE *w, uint8_t *packed, float *absmax,                       \
                              const float *midpoints, const uint8_t *rising, int64_t blocks,       \
                              int threads) {                                                       \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                          \
        for (int64_t b = 0; b < blocks; b++) {                                                     \
            float x[BLOCK];                                                                        \
            for (int i = 0; i < BLOCK; i++) x[i] = WIDE(w[b * BLOCK + i]);                         \
            absmax[b] = coded_block(x, packed + b * BLOCK / 2, midpoints, rising);                 \
        }                                                                                          \
    }                                                                                              \
    void quantize_rows_##NAME(const TYPE *w, int8_t *codes, float *largest, float *scratch,        \
                              int64_t rows, int64_t in, int threads) {                             \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                          \
        for (int thread = 0; thread < threads; thread++) {                                         \
            float *x = scratch + thread * in;                                                      \
            for (int64_t r = rows * thread / threads; r < rows * (thread + 1) / threads; r++) {    \
                for (int64_t i = 0; i < in; i++) x[i] = halved(WIDE(w[r * in + i]));               \
                largest[r] = largest_of(x, in);                                                    \
                coded_row(x, codes + r * in, largest[r], in);                                      \
            }                                                                                      \
        }                                                                                          \
    }
QUANTIZE(bfloat16, uint16_t, widened)
QUANTIZE(float32, float, same)

/* The values of two codes a byte, of half a block: in registers, where the processor can look up so */
#if defined(__AVX512BW__)
#include <immintrin.h>
static inline void look_up_bfloat16(const uint8_t *codes, const uint16_t *values, uint16_t *w) {
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    __m512i low = _mm512_slli_epi32(_mm512_and_si512(bytes, _mm512_set1_epi32(15)), 16);
    __m512i places = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), low);
    __m512i table = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)values));
    _mm512_storeu_si512(w, _mm512_permutexvar_epi16(places, table)); /* places are below 16 */
}
#else
static inline void look_up_bfloat16(const uint8_t *codes, const uint16_t *values, uint16_t *w) {
    for (int j = 0; j < BLOCK / 4; j++) {
        w[2 * j] = values[codes[j] >> 4];
        w[2 * j + 1] = values[codes[j] & 15];
    }
}
#endif
static inline void look_up_float32(const uint8_t *codes, const float *values, float *w) {
    for (int j = 0; j < BLOCK / 4; j++) {
        w[2 * j] = values[codes[j] >> 4];
        w[2 * j + 1] = values[codes[j] & 15];
    }
}

/* A block has 16 values, so each is multiplied and rounded once, and then looked up. */
#define DEQUANTIZE(NAME, TYPE, NARROW)                                                             \
    void dequantize_4bit_##NAME(const uint8_t *packed, const float *scales, const float *levels,   \
                                TYPE *out, int64_t blocks, int threads) {                          \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                          \
        for (int64_t b = 0; b < blocks; b++) {                                                     \
            TYPE values[16], *w = out + b * BLOCK;                                                 \
            for (int i = 0; i < 16; i++) values[i] = NARROW(levels[i] * scales[b]);                \
            look_up_##NAME(packed + b * BLOCK / 2, values, w);                                     \
            look_up_##NAME(packed + b * BLOCK / 2 + BLOCK / 4, values, w + BLOCK / 2);             \
        }                                                                                          \
    }
DEQUANTIZE(bfloat16, uint16_t, rounded)
DEQUANTIZE(float32, float, same)
