/* Causal attention in blocks, forward and backward, where the processor multiplies bfloat16.
 *
 * Nothing of size positions x positions is kept: a block of scores lives between two products, and
 * the logarithm of each row's sum is all that the way back needs (Dao 2023, arXiv:2307.08691).
 * bfloat16 comes in and goes out; scores, sums and exponentials are float32, to base 2.
 *
 * The instruction multiplies pairs along the summed axis. A right operand is therefore packed as
 * [pair][column], 32 bits each; a left operand is read pair by pair with any two strides, so that
 * one product serves S = Q K^T, O = P V and all five of the way back without a transposition of
 * scores: there S^T = K Q^T, dV = P^T dO, dP^T = V dO^T, dK = dS^T Q, and dQ^T = K^T dS^T.
 *
 * All tensors are [rows, positions, heads, width] without gaps. One thread takes a row's kv head
 * with all of its query heads; its share of `scratch` is flash_scratch() floats.
 *
 * Where the processor has AMX, oneDNN's products under PyTorch's own attention use it: not here.
 */
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#include "scalar.h"
#include <immintrin.h>
#include <math.h>

int omp_get_thread_num(void);

#define BLOCK 64 /* queries and keys at a time */
#define PAIRS (BLOCK / 2)
#define TILE (BLOCK * BLOCK)

typedef struct {
    int64_t rows, positions, heads, kv_heads, width;
    float scale;
} Shape;

static inline int64_t blocks_of(Shape shape) { return (shape.positions + BLOCK - 1) / BLOCK; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* c (+)= a b: c is [rows, columns], a multiple of 4 and of 64; a's pairs are a[m * row + p * pair],
 * and b's b[p * columns + n] */
static inline void product(const uint32_t *a, int64_t row, int64_t pair, const uint32_t *b,
                           float *c, int64_t rows, int64_t pairs, int64_t columns, int add) {
    for (int64_t n = 0; n < columns; n += 64)
        for (int64_t m = 0; m < rows; m += 4) {
            __m512 sums[4][4];
            float *out = c + m * columns + n;
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                sums[i / 4][i % 4] = add ? _mm512_loadu_ps(out + i / 4 * columns + i % 4 * 16)
                                         : _mm512_setzero_ps();
            for (int64_t p = 0; p < pairs; p++) {
                __m512bh right[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    right[j] = (__m512bh)_mm512_loadu_si512(b + p * columns + n + j * 16);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    int32_t both = (int32_t)a[(m + i) * row + p * pair];
                    __m512bh left = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++)
                        sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, right[j]);
                }
            }
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                _mm512_storeu_ps(out + i / 4 * columns + i % 4 * 16, sums[i / 4][i % 4]);
        }
}

/* 2^x for x <= 0, to 3e-6: far below the rounding of bfloat16 that follows */
static inline __m512 power(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-200.0f)); /* is 0 already, and stays finite on the way */
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_sub_ps(x, whole);
    __m512 series = _mm512_set1_ps(1.3333558e-3f); /* (ln 2)^n / n! */
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(9.6181291e-3f));
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(5.5504109e-2f));
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(2.4022651e-1f));
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(6.9314718e-1f));
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(series, whole);
}

/* A block of up to BLOCK positions, the missing ones zero: as it is, for the left. */
static void copy_block(const uint16_t *x, int64_t stride, int64_t count, int64_t width,
                       uint32_t *to) {
    for (int64_t r = 0; r < count; r++)
        memcpy(to + r * width / 2, x + r * stride, sizeof *x * (size_t)width);
    memset(to + count * width / 2, 0, sizeof *x * (size_t)((BLOCK - count) * width));
}

/* For the right, summed over channels: to[channel pair][position]. */
static void pack_channels(const uint16_t *x, int64_t stride, int64_t count, int64_t width,
                          uint32_t *to) {
    if (count < BLOCK) memset(to, 0, sizeof *to * (size_t)(PAIRS * width));
    for (int64_t r = 0; r < count; r++)
        for (int64_t p = 0; p < width / 2; p++)
            memcpy(to + p * BLOCK + r, x + r * stride + 2 * p, sizeof *to);
}

/* For the right, summed over positions: to[position pair][channel]. */
static void pack_positions(const uint16_t *x, int64_t stride, int64_t count, int64_t width,
                           uint32_t *to) {
    memset(to, 0, sizeof *to * (size_t)(PAIRS * width));
    for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < width; i++)
            to[r / 2 * width + i] |= (uint32_t)x[r * stride + i] << (r % 2 * 16);
}

/* One row of scores -> its weights, not yet divided, in bfloat16; follows the running maximum and
 * sum, and returns what the earlier sums are to be multiplied with. */
static inline float soften(const float *scores, int64_t allowed, float scale, float *most,
                           float *sum, uint16_t *weights) {
    __m512 values[4], total = _mm512_setzero_ps(), top = _mm512_set1_ps(*most);
    __mmask64 mask = allowed < BLOCK ? (1ull << allowed) - 1 : ~0ull;
    for (int j = 0; j < 4; j++) {
        values[j] = _mm512_mul_ps(_mm512_loadu_ps(scores + 16 * j), _mm512_set1_ps(scale));
        top = _mm512_mask_max_ps(top, (__mmask16)(mask >> 16 * j), top, values[j]);
    }
    float before = *most;
    *most = _mm512_reduce_max_ps(top);
    for (int j = 0; j < 4; j++) {
        __m512 weight = power(_mm512_sub_ps(values[j], _mm512_set1_ps(*most)));
        weight = _mm512_maskz_mov_ps((__mmask16)(mask >> 16 * j), weight);
        total = _mm512_add_ps(total, weight);
        _mm256_storeu_si256((__m256i *)(weights + 16 * j), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    float factor = exp2f(before - *most);
    *sum = *sum * factor + _mm512_reduce_add_ps(total);
    return factor;
}

/* One query block over all keys up to it; `own` is scratch behind the packed keys and values. */
static void forward_block(const uint16_t *q, const uint32_t *keys, const uint32_t *values,
                          uint16_t *out, float *log_sums, float *own, int64_t index, Shape shape) {
    int64_t width = shape.width, stride = shape.heads * width, first = index * BLOCK;
    int64_t count = least(BLOCK, shape.positions - first);
    float *scores = own, *mixed = scores + TILE, most[BLOCK], sums[BLOCK];
    uint32_t *weights = (uint32_t *)(mixed + BLOCK * width), *query = weights + TILE / 2;
    copy_block(q + first * stride, stride, count, width, query);
    for (int r = 0; r < BLOCK; r++) most[r] = -INFINITY, sums[r] = 0;
    for (int64_t j = 0; j <= index; j++) {
        product(query, width / 2, 1, keys + j * PAIRS * width, scores, BLOCK, width / 2, BLOCK, 0);
        for (int64_t r = 0; r < BLOCK; r++) {
            float factor = soften(scores + r * BLOCK, j < index ? BLOCK : r + 1,
                                  shape.scale * (float)M_LOG2E, most + r, sums + r,
                                  (uint16_t *)(weights + r * PAIRS));
            if (j > 0 && factor != 1.0f)
                for (int64_t i = 0; i < width; i++) mixed[r * width + i] *= factor;
        }
        product(weights, PAIRS, 1, values + j * PAIRS * width, mixed, BLOCK, PAIRS, width, j > 0);
    }
    for (int64_t r = 0; r < count; r++) {
        log_sums[first + r] = most[r] + log2f(sums[r]);
        for (int64_t i = 0; i < width; i++)
            out[(first + r) * stride + i] = rounded(mixed[r * width + i] / sums[r]);
    }
}

/* floats of scratch for each thread */
int64_t flash_scratch(int64_t positions, int64_t width) {
    int64_t padded = (positions + BLOCK - 1) / BLOCK * BLOCK;
    return padded * (11 * width / 2 + 2) + 4 * TILE + 2 * BLOCK * width;
}

/* log_sums is [rows, heads, positions], to base 2 */
void flash_forward(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *out,
                   float *log_sums, float *scratch, int64_t rows, int64_t positions, int64_t heads,
                   int64_t kv_heads, int64_t width, float scale, int threads) {
    Shape shape = {rows, positions, heads, kv_heads, width, scale};
    int64_t group = heads / kv_heads, stride = kv_heads * width, blocks = blocks_of(shape);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t pair = 0; pair < rows * kv_heads; pair++) {
        int64_t row = pair / kv_heads, shared = pair % kv_heads;
        int64_t at = row * positions * stride + shared * width;
        float *own = scratch + omp_get_thread_num() * flash_scratch(positions, width);
        uint32_t *keys = (uint32_t *)own, *values = keys + blocks * PAIRS * width;
        for (int64_t j = 0; j < blocks; j++) {
            int64_t from = at + j * BLOCK * stride, count = least(BLOCK, positions - j * BLOCK);
            pack_channels(k + from, stride, count, width, keys + j * PAIRS * width);
            pack_positions(v + from, stride, count, width, values + j * PAIRS * width);
        }
        for (int64_t head = shared * group; head < (shared + 1) * group; head++)
            for (int64_t i = 0; i < blocks; i++) {
                int64_t start = (row * positions * heads + head) * width;
                forward_block(q + start, keys, values, out + start,
                              log_sums + (row * heads + head) * positions,
                              own + blocks * BLOCK * width, i, shape);
            }
    }
}

/* What one thread holds on the way back. */
typedef struct {
    /* packed for the right, of all positions; q and dO summed over channels and over positions */
    uint32_t *q_channels, *q_positions, *do_channels, *do_positions, *k_positions;
    float *dq, *dk, *dv; /* sums, of all positions; dq as [block][channel][position] */
    float *log_sums, *along; /* of each query; along = dO . O */
    float *scores, *slopes; /* one block, keys by queries */
    uint32_t *weights, *slope_rows, *slope_pairs, *keys, *values;
} Backward;

static Backward divided(float *scratch, int64_t blocks, int64_t width) {
    Backward own;
    int64_t packed = blocks * PAIRS * width, whole = blocks * BLOCK * width;
    float **floats[] = {&own.dq,    &own.dk,     &own.dv,    &own.log_sums,
                        &own.along, &own.scores, &own.slopes};
    int64_t sizes[] = {whole, whole, whole, blocks * BLOCK, blocks * BLOCK, TILE, TILE};
    for (int i = 0; i < 7; i++) *floats[i] = scratch, scratch += sizes[i];
    uint32_t *rest = (uint32_t *)scratch;
    uint32_t **words[] = {&own.q_channels, &own.q_positions, &own.do_channels, &own.do_positions,
                          &own.k_positions, &own.weights, &own.slope_rows, &own.slope_pairs,
                          &own.keys, &own.values};
    for (int i = 0; i < 10; i++)
        *words[i] = rest, rest += i < 5 ? packed : i < 8 ? TILE / 2 : PAIRS * width;
    return own;
}

/* Scores and d weights of two neighbouring keys -> their weights and d scores, in bfloat16: d
 * scores for the left, and as a pair for the right. Queries before `first` cannot see the first
 * key. */
static inline void slope_two(const Backward *own, int64_t key, int64_t first, float scale,
                             const float *log_sums, const float *along) {
    for (int j = 0; j < 4; j++) {
        __m512i pair = _mm512_setzero_si512();
        for (int64_t r = 0; r < 2; r++) {
            int64_t at = (key + r) * BLOCK + 16 * j;
            int64_t hidden = least(16, first + r > 16 * j ? first + r - 16 * j : 0);
            __m512 score = _mm512_mul_ps(_mm512_loadu_ps(own->scores + at), _mm512_set1_ps(scale));
            __m512 weight = power(_mm512_sub_ps(score, _mm512_loadu_ps(log_sums + 16 * j)));
            weight = _mm512_maskz_mov_ps((__mmask16)(0xffff << hidden), weight);
            __m512 slope = _mm512_loadu_ps(own->slopes + at);
            slope = _mm512_mul_ps(_mm512_sub_ps(slope, _mm512_loadu_ps(along + 16 * j)), weight);
            _mm256_storeu_si256((__m256i *)((uint16_t *)own->weights + at),
                                (__m256i)_mm512_cvtneps_pbh(weight));
            __m256i half = (__m256i)_mm512_cvtneps_pbh(slope);
            _mm256_storeu_si256((__m256i *)((uint16_t *)own->slope_rows + at), half);
            __m512i wide = _mm512_cvtepu16_epi32(half);
            pair = _mm512_or_si512(pair, r == 0 ? wide : _mm512_slli_epi32(wide, 16));
        }
        _mm512_storeu_si512(own->slope_pairs + key / 2 * BLOCK + 16 * j, pair);
    }
}

/* Key block j against query block i of one head. */
static void backward_block(const Backward *own, int64_t j, int64_t i, Shape shape) {
    int64_t width = shape.width, query = i * PAIRS * width;
    product(own->keys, width / 2, 1, own->q_channels + query, own->scores, BLOCK, width / 2, BLOCK,
            0);
    product(own->values, width / 2, 1, own->do_channels + query, own->slopes, BLOCK, width / 2,
            BLOCK, 0);
    for (int64_t r = 0; r < BLOCK; r += 2)
        slope_two(own, r, i == j ? r : -1, shape.scale * (float)M_LOG2E, own->log_sums + i * BLOCK,
                  own->along + i * BLOCK);
    product(own->weights, PAIRS, 1, own->do_positions + query, own->dv + j * BLOCK * width, BLOCK,
            PAIRS, width, 1);
    product(own->slope_rows, PAIRS, 1, own->q_positions + query, own->dk + j * BLOCK * width, BLOCK,
            PAIRS, width, 1);
    product(own->k_positions + j * PAIRS * width, 1, width, own->slope_pairs,
            own->dq + i * BLOCK * width, width, PAIRS, BLOCK, 1);
}

/* Everything of one query head that does not depend on the key block. */
static void read_head(const Backward *own, const uint16_t *q, const uint16_t *out,
                      const uint16_t *dout, const float *log_sums, Shape shape) {
    int64_t width = shape.width, stride = shape.heads * width, blocks = blocks_of(shape);
    memset(own->dq, 0, sizeof(float) * (size_t)(blocks * BLOCK * width));
    memset(own->log_sums, 0, sizeof(float) * (size_t)(2 * blocks * BLOCK)); /* and along */
    memcpy(own->log_sums, log_sums, sizeof(float) * (size_t)shape.positions);
    for (int64_t i = 0; i < blocks; i++) {
        int64_t at = i * BLOCK * stride, to = i * PAIRS * width;
        int64_t count = least(BLOCK, shape.positions - i * BLOCK);
        pack_channels(q + at, stride, count, width, own->q_channels + to);
        pack_positions(q + at, stride, count, width, own->q_positions + to);
        pack_channels(dout + at, stride, count, width, own->do_channels + to);
        pack_positions(dout + at, stride, count, width, own->do_positions + to);
    }
    for (int64_t t = 0; t < shape.positions; t++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++)
            sum += widened(out[t * stride + i]) * widened(dout[t * stride + i]);
        own->along[t] = sum;
    }
}

void flash_backward(const uint16_t *q, const uint16_t *k, const uint16_t *v, const uint16_t *out,
                    const uint16_t *dout, const float *log_sums, uint16_t *dq, uint16_t *dk,
                    uint16_t *dv, float *scratch, int64_t rows, int64_t positions, int64_t heads,
                    int64_t kv_heads, int64_t width, float scale, int threads) {
    Shape shape = {rows, positions, heads, kv_heads, width, scale};
    int64_t group = heads / kv_heads, stride = kv_heads * width, blocks = blocks_of(shape);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t pair = 0; pair < rows * kv_heads; pair++) {
        int64_t row = pair / kv_heads, shared = pair % kv_heads;
        int64_t at = row * positions * stride + shared * width;
        Backward own = divided(scratch + omp_get_thread_num() * flash_scratch(positions, width),
                               blocks, width);
        memset(own.dk, 0, sizeof(float) * (size_t)(2 * blocks * BLOCK * width)); /* and dv */
        for (int64_t head = shared * group; head < (shared + 1) * group; head++) {
            int64_t start = (row * positions * heads + head) * width;
            read_head(&own, q + start, out + start, dout + start,
                      log_sums + (row * heads + head) * positions, shape);
            for (int64_t j = 0; j < blocks; j++) {
                int64_t from = at + j * BLOCK * stride, count = least(BLOCK, positions - j * BLOCK);
                copy_block(k + from, stride, count, width, own.keys);
                copy_block(v + from, stride, count, width, own.values);
                pack_positions(k + from, stride, count, width, own.k_positions + j * PAIRS * width);
                for (int64_t i = j; i < blocks; i++) backward_block(&own, j, i, shape);
            }
            for (int64_t t = 0; t < positions; t++)
                for (int64_t i = 0; i < width; i++) {
                    float sum = own.dq[(t / BLOCK * width + i) * BLOCK + t % BLOCK];
                    dq[start + t * heads * width + i] = rounded(sum * scale);
                }
        }
        for (int64_t t = 0; t < positions; t++)
            for (int64_t i = 0; i < width; i++) {
                dk[at + t * stride + i] = rounded(own.dk[t * width + i] * scale);
                dv[at + t * stride + i] = rounded(own.dv[t * width + i]);
            }
    }
}
#endif
