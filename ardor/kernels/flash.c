/* Causal attention in blocks, forward and backward, where the processor multiplies bfloat16.
 * Windows and chunks skip the blocks that nobody reads; soft caps, ALiBi and sinks are steps between
 * the two products.
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
 * All tensors are [rows, positions, heads, width] without gaps; inside, heads are filled up to whole
 * tiles with zeros. One thread takes a row's kv head
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
    int64_t window, chunk; /* positions that one reads, itself included; chunks of so many */
    float scale, cap;      /* cap: 0 for none */
    const float *slopes, *sinks; /* of each head, or NULL */
} Shape;

static inline int64_t blocks_of(Shape shape) { return (shape.positions + BLOCK - 1) / BLOCK; }
static inline int64_t tiled(int64_t width) { return (width + 63) / 64 * 64; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }

/* the first position that one reads, and the last that reads it; without limits these are long */
static inline int64_t first_read(int64_t position, Shape shape) {
    return most_of(position - shape.window + 1, position - position % shape.chunk);
}

static inline int64_t last_reader(int64_t position, Shape shape) {
    int64_t last = least(position + shape.window - 1, position - position % shape.chunk + shape.chunk - 1);
    return least(last, shape.positions - 1);
}

/* bits from .. to - 1, both cut to 0 .. 64 */
static inline uint64_t bits(int64_t from, int64_t to) {
    uint64_t below = to >= 64 ? ~0ull : to <= 0 ? 0 : (1ull << to) - 1;
    return from >= 64 ? 0 : from <= 0 ? below : below & ~((1ull << from) - 1);
}

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

/* tanh x to 2e-6 */
static inline __m512 bent(__m512 x) {
    __m512 small = power(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-2 * (float)M_LOG2E)));
    __m512 one = _mm512_set1_ps(1.0f);
    __m512 size = _mm512_div_ps(_mm512_sub_ps(one, small), _mm512_add_ps(one, small));
    return _mm512_or_ps(size, _mm512_and_ps(x, _mm512_set1_ps(-0.0f)));
}

/* What turns the products of one head into scores to base 2. */
typedef struct {
    __m512 scale, cap, inverse, slope; /* of the product; 1 / cap; per position */
    int capped, leaning;
} Score;

static inline Score score_of(Shape shape, int64_t head) {
    float slope = shape.slopes ? shape.slopes[head] : 0.0f, log2e = (float)M_LOG2E;
    Score how = {_mm512_set1_ps(shape.scale * (shape.cap > 0 ? 1.0f : log2e)),
                 _mm512_set1_ps(shape.cap * log2e), _mm512_set1_ps(1.0f / shape.cap),
                 _mm512_set1_ps(slope * log2e), shape.cap > 0, slope != 0.0f};
    return how;
}

/* 16 scores; `distance` from query to key is not positive; *curve is the slope of the cap */
static inline __m512 scored(Score how, __m512 value, __m512 distance, __m512 *curve) {
    value = _mm512_mul_ps(value, how.scale);
    if (how.capped) {
        __m512 turned = bent(_mm512_mul_ps(value, how.inverse));
        *curve = _mm512_fnmadd_ps(turned, turned, _mm512_set1_ps(1.0f));
        value = _mm512_mul_ps(turned, how.cap);
    }
    return how.leaning ? _mm512_fmadd_ps(distance, how.slope, value) : value;
}

/* from .. from + 15 */
static inline __m512 counted(int64_t from) {
    const __m512 steps = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_add_ps(steps, _mm512_set1_ps((float)from));
}

/* A block of up to BLOCK positions, what is missing zero: as it is, for the left. */
static void copy_block(const uint16_t *x, int64_t stride, int64_t count, int64_t width,
                       uint32_t *to) {
    int64_t full = tiled(width);
    if (count < BLOCK || width < full) memset(to, 0, sizeof *x * (size_t)(BLOCK * full));
    for (int64_t r = 0; r < count; r++)
        memcpy(to + r * full / 2, x + r * stride, sizeof *x * (size_t)width);
}

/* 16 rows of 16 words -> their columns. */
static inline void turn(const uint32_t *from, int64_t stride, uint32_t *to, int64_t to_stride) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int n = 0; n < 2; n++) {
            a[i + 2 * n] = _mm512_unpacklo_epi64(b[i + n], b[i + n + 2]);
            a[i + 2 * n + 1] = _mm512_unpackhi_epi64(b[i + n], b[i + n + 2]);
        }
    for (int i = 0; i < 16; i += 8) /* a[i + n]: column n of each quarter, of four rows */
        for (int n = 0; n < 4; n++) {
            b[i + n] = _mm512_shuffle_i32x4(a[i + n], a[i + n + 4], 0x88);
            b[i + n + 4] = _mm512_shuffle_i32x4(a[i + n], a[i + n + 4], 0xdd);
        }
    for (int n = 0; n < 8; n++) {
        _mm512_storeu_si512(to + n * to_stride, _mm512_shuffle_i32x4(b[n], b[n + 8], 0x88));
        _mm512_storeu_si512(to + (n + 8) * to_stride, _mm512_shuffle_i32x4(b[n], b[n + 8], 0xdd));
    }
}

/* For the right, summed over channels: to[channel pair][position]. */
static void pack_channels(const uint16_t *x, int64_t stride, int64_t count, int64_t width,
                          uint32_t *to) {
    if (count < BLOCK || width < tiled(width))
        memset(to, 0, sizeof *to * (size_t)(PAIRS * tiled(width)));
    int64_t rows = count / 16 * 16, pairs = width / 2 / 16 * 16;
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t p = 0; p < pairs; p += 16)
            turn((const uint32_t *)(x + r * stride) + p, stride / 2, to + p * BLOCK + r, BLOCK);
    for (int64_t r = 0; r < count; r++)
        for (int64_t p = r < rows ? pairs : 0; p < width / 2; p++)
            memcpy(to + p * BLOCK + r, x + r * stride + 2 * p, sizeof *to);
}

/* For the right, summed over positions: to[position pair][channel]. */
static void pack_positions(const uint16_t *x, int64_t stride, int64_t count, int64_t width,
                           uint32_t *to) {
    int64_t full = tiled(width);
    if (count < BLOCK || width < full) memset(to, 0, sizeof *to * (size_t)(PAIRS * full));
    for (int64_t r = 0; r + 1 < count; r += 2)
#pragma omp simd
        for (int64_t i = 0; i < width; i++)
            to[r / 2 * full + i] = x[r * stride + i] | (uint32_t)x[(r + 1) * stride + i] << 16;
    if (count % 2)
        for (int64_t i = 0; i < width; i++)
            to[count / 2 * full + i] = x[(count - 1) * stride + i];
}

/* One row of products, of a query with keys that stand `distance` from it and later, -> its
 * weights, not yet divided, in bfloat16; follows the running maximum and sum, and returns what the
 * earlier sums are to be multiplied with. */
static inline float soften(const float *products, uint64_t allowed, int64_t distance, Score how,
                           float *most, float *sum, uint16_t *weights) {
    __m512 values[4], total = _mm512_setzero_ps(), top = _mm512_set1_ps(*most), unused;
    for (int j = 0; j < 4; j++) {
        values[j] = _mm512_loadu_ps(products + 16 * j);
        values[j] = scored(how, values[j], counted(distance + 16 * j), &unused);
        top = _mm512_mask_max_ps(top, (__mmask16)(allowed >> 16 * j), top, values[j]);
    }
    float before = *most;
    *most = _mm512_reduce_max_ps(top);
    for (int j = 0; j < 4; j++) {
        __m512 weight = power(_mm512_sub_ps(values[j], _mm512_set1_ps(*most)));
        weight = _mm512_maskz_mov_ps((__mmask16)(allowed >> 16 * j), weight);
        total = _mm512_add_ps(total, weight);
        _mm256_storeu_si256((__m256i *)(weights + 16 * j), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    /* Nothing may have been read yet: both are -inf then, and there is nothing to multiply. */
    float factor = before == -INFINITY ? 0.0f : exp2f(before - *most);
    *sum = *sum * factor + _mm512_reduce_add_ps(total);
    return factor;
}

/* One query block over all keys that it reads; `own` is scratch behind the packed keys, values. */
static void forward_block(const uint16_t *q, const uint32_t *keys, const uint32_t *values,
                          uint16_t *out, float *log_sums, float *own, int64_t index, int64_t head,
                          Shape shape) {
    int64_t width = shape.width, full = tiled(width), stride = shape.heads * width;
    int64_t first = index * BLOCK, count = least(BLOCK, shape.positions - first);
    int64_t start = most_of(0, first_read(first, shape)) / BLOCK;
    float *scores = own, *mixed = scores + TILE, most[BLOCK], sums[BLOCK];
    uint32_t *weights = (uint32_t *)(mixed + BLOCK * full), *query = weights + TILE / 2;
    Score how = score_of(shape, head);
    copy_block(q + first * stride, stride, count, width, query);
    for (int r = 0; r < BLOCK; r++) {
        most[r] = shape.sinks ? shape.sinks[head] * (float)M_LOG2E : -INFINITY;
        sums[r] = shape.sinks ? 1.0f : 0.0f;
    }
    for (int64_t j = start; j <= index; j++) {
        product(query, full / 2, 1, keys + j * PAIRS * full, scores, BLOCK, full / 2, BLOCK, 0);
        for (int64_t r = 0; r < BLOCK; r++) {
            int64_t at = first + r - j * BLOCK; /* of the query, from the block's first key */
            uint64_t allowed = bits(first_read(first + r, shape) - j * BLOCK, at + 1);
            float factor = soften(scores + r * BLOCK, allowed, -at, how, most + r, sums + r,
                                  (uint16_t *)(weights + r * PAIRS));
            if (j > start && factor != 1.0f)
                for (int64_t i = 0; i < full; i++) mixed[r * full + i] *= factor;
        }
        product(weights, PAIRS, 1, values + j * PAIRS * full, mixed, BLOCK, PAIRS, full, j > start);
    }
    for (int64_t r = 0; r < count; r++) {
        log_sums[first + r] = most[r] + log2f(sums[r]);
        for (int64_t i = 0; i < width; i++)
            out[(first + r) * stride + i] = rounded(mixed[r * full + i] / sums[r]);
    }
}

/* floats of scratch for each thread */
int64_t flash_scratch(int64_t positions, int64_t width) {
    int64_t padded = (positions + BLOCK - 1) / BLOCK * BLOCK, full = tiled(width);
    return padded * (11 * full / 2 + 2) + 4 * TILE + 2 * BLOCK * full;
}

/* log_sums is [rows, heads, positions], to base 2; window and chunk are at least 1 */
void flash_forward(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *out,
                   float *log_sums, float *scratch, const float *slopes, const float *sinks,
                   int64_t rows, int64_t positions, int64_t heads, int64_t kv_heads, int64_t width,
                   int64_t window, int64_t chunk, float scale, float cap, int threads) {
    Shape shape = {rows,   positions, heads, kv_heads, width, window,
                   chunk,  scale,     cap,   slopes,   sinks};
    int64_t group = heads / kv_heads, stride = kv_heads * width, blocks = blocks_of(shape);
    int64_t packed = PAIRS * tiled(width);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t pair = 0; pair < rows * kv_heads; pair++) {
        int64_t row = pair / kv_heads, shared = pair % kv_heads;
        int64_t at = row * positions * stride + shared * width;
        float *own = scratch + omp_get_thread_num() * flash_scratch(positions, width);
        uint32_t *keys = (uint32_t *)own, *values = keys + blocks * packed;
        for (int64_t j = 0; j < blocks; j++) {
            int64_t from = at + j * BLOCK * stride, count = least(BLOCK, positions - j * BLOCK);
            pack_channels(k + from, stride, count, width, keys + j * packed);
            pack_positions(v + from, stride, count, width, values + j * packed);
        }
        for (int64_t head = shared * group; head < (shared + 1) * group; head++)
            for (int64_t i = 0; i < blocks; i++) {
                int64_t start = (row * positions * heads + head) * width;
                forward_block(q + start, keys, values, out + start,
                              log_sums + (row * heads + head) * positions,
                              own + 2 * blocks * packed, i, head, shape);
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

static Backward divided(float *scratch, int64_t blocks, int64_t width) { /* whole tiles */
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
 * scores for the left, and as a pair for the right. `readers` are the queries that read each;
 * `distance` is that from the block's first query to the first key. */
static inline void slope_two(const Backward *own, int64_t key, const uint64_t *readers,
                             int64_t distance, Score how, const float *log_sums,
                             const float *along) {
    for (int j = 0; j < 4; j++) {
        __m512i pair = _mm512_setzero_si512();
        for (int64_t r = 0; r < 2; r++) {
            int64_t at = (key + r) * BLOCK + 16 * j;
            __m512 curve, far = _mm512_sub_ps(_mm512_set1_ps((float)(distance + r)), counted(16 * j));
            __m512 score = scored(how, _mm512_loadu_ps(own->scores + at), far, &curve);
            __m512 weight = power(_mm512_sub_ps(score, _mm512_loadu_ps(log_sums + 16 * j)));
            weight = _mm512_maskz_mov_ps((__mmask16)(readers[r] >> 16 * j), weight);
            __m512 slope = _mm512_loadu_ps(own->slopes + at);
            slope = _mm512_mul_ps(_mm512_sub_ps(slope, _mm512_loadu_ps(along + 16 * j)), weight);
            if (how.capped) slope = _mm512_mul_ps(slope, curve);
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
static void backward_block(const Backward *own, int64_t j, int64_t i, Score how, Shape shape) {
    int64_t full = tiled(shape.width), query = i * PAIRS * full, shift = (j - i) * BLOCK;
    product(own->keys, full / 2, 1, own->q_channels + query, own->scores, BLOCK, full / 2, BLOCK, 0);
    product(own->values, full / 2, 1, own->do_channels + query, own->slopes, BLOCK, full / 2, BLOCK,
            0);
    for (int64_t r = 0; r < BLOCK; r += 2) {
        uint64_t readers[2];
        for (int64_t n = r; n < r + 2; n++)
            readers[n - r] = bits(shift + n, last_reader(j * BLOCK + n, shape) + 1 - i * BLOCK);
        slope_two(own, r, readers, shift + r, how, own->log_sums + i * BLOCK,
                  own->along + i * BLOCK);
    }
    product(own->weights, PAIRS, 1, own->do_positions + query, own->dv + j * BLOCK * full, BLOCK,
            PAIRS, full, 1);
    product(own->slope_rows, PAIRS, 1, own->q_positions + query, own->dk + j * BLOCK * full, BLOCK,
            PAIRS, full, 1);
    product(own->k_positions + j * PAIRS * full, 1, full, own->slope_pairs,
            own->dq + i * BLOCK * full, full, PAIRS, BLOCK, 1);
}

/* Everything of one query head that does not depend on the key block. */
static void read_head(const Backward *own, const uint16_t *q, const uint16_t *out,
                      const uint16_t *dout, const float *log_sums, Shape shape) {
    int64_t width = shape.width, full = tiled(width), stride = shape.heads * width;
    int64_t blocks = blocks_of(shape);
    memset(own->dq, 0, sizeof(float) * (size_t)(blocks * BLOCK * full));
    memset(own->log_sums, 0, sizeof(float) * (size_t)(2 * blocks * BLOCK)); /* and along */
    memcpy(own->log_sums, log_sums, sizeof(float) * (size_t)shape.positions);
    for (int64_t i = 0; i < blocks; i++) {
        int64_t at = i * BLOCK * stride, to = i * PAIRS * full;
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

/* One query head's part in the gradients; what it adds to its kv head's stays in `own`. */
static void backward_head(const Backward *own, const uint16_t *k, const uint16_t *v, uint16_t *dq,
                          int64_t head, Shape shape) {
    int64_t width = shape.width, full = tiled(width), stride = shape.kv_heads * width;
    int64_t blocks = blocks_of(shape);
    Score how = score_of(shape, head);
    for (int64_t j = 0; j < blocks; j++) {
        int64_t from = j * BLOCK * stride, count = least(BLOCK, shape.positions - j * BLOCK);
        int64_t last = last_reader(j * BLOCK + count - 1, shape) / BLOCK;
        copy_block(k + from, stride, count, width, own->keys);
        copy_block(v + from, stride, count, width, own->values);
        pack_positions(k + from, stride, count, width, own->k_positions + j * PAIRS * full);
        for (int64_t i = j; i <= last; i++) backward_block(own, j, i, how, shape);
    }
    for (int64_t i = 0; i < blocks; i++) {
        /* what was packed of q, over channels and then over positions, is not read again */
        uint32_t *sums = (uint32_t *)own->dq + i * BLOCK * full, *turned = own->q_channels;
        for (int64_t c = 0; c < full; c += 16)
            for (int64_t t = 0; t < BLOCK; t += 16)
                turn(sums + c * BLOCK + t, BLOCK, turned + t * full + c, full);
        for (int64_t t = 0; t < least(BLOCK, shape.positions - i * BLOCK); t++)
            for (int64_t n = 0; n < width; n++) {
                float sum;
                memcpy(&sum, turned + t * full + n, sizeof sum);
                dq[((i * BLOCK + t) * shape.heads) * width + n] = rounded(sum * shape.scale);
            }
    }
}

void flash_backward(const uint16_t *q, const uint16_t *k, const uint16_t *v, const uint16_t *out,
                    const uint16_t *dout, const float *log_sums, uint16_t *dq, uint16_t *dk,
                    uint16_t *dv, float *scratch, const float *slopes, const float *sinks,
                    int64_t rows, int64_t positions, int64_t heads, int64_t kv_heads, int64_t width,
                    int64_t window, int64_t chunk, float scale, float cap, int threads) {
    Shape shape = {rows,   positions, heads, kv_heads, width, window,
                   chunk,  scale,     cap,   slopes,   sinks};
    int64_t group = heads / kv_heads, stride = kv_heads * width, blocks = blocks_of(shape);
    int64_t full = tiled(width);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t pair = 0; pair < rows * kv_heads; pair++) {
        int64_t row = pair / kv_heads, shared = pair % kv_heads;
        int64_t at = row * positions * stride + shared * width;
        Backward own = divided(scratch + omp_get_thread_num() * flash_scratch(positions, width),
                               blocks, full);
        memset(own.dk, 0, sizeof(float) * (size_t)(2 * blocks * BLOCK * full)); /* and dv */
        for (int64_t head = shared * group; head < (shared + 1) * group; head++) {
            int64_t start = (row * positions * heads + head) * width;
            read_head(&own, q + start, out + start, dout + start,
                      log_sums + (row * heads + head) * positions, shape);
            backward_head(&own, k + at, v + at, dq + start, head, shape);
        }
        for (int64_t t = 0; t < positions; t++)
            for (int64_t i = 0; i < width; i++) {
                dk[at + t * stride + i] = rounded(own.dk[t * full + i] * scale);
                dv[at + t * stride + i] = rounded(own.dv[t * full + i]);
            }
    }
}
#endif
