/* Attention of one new position per row over its cached ones: keys and values are read once.
 *
 * The heads of a group share keys and values, and one thread takes them together: it widens LANES
 * positions at a time to float32 and lets every head of the group use them. Scores and sums are
 * float32 whatever comes in.
 */
#include "scalar.h"
#include <math.h>

#define LANES 16

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Indices __attribute__((vector_size(4 * LANES)));

#ifdef __clang__
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (Indices){__VA_ARGS__})
#endif

static inline Lanes loaded(const float *from) {
    Lanes values;
    memcpy(&values, from, sizeof values);
    return values;
}

/* the sums of neighbours: those of a, then those of b */
static inline Lanes halved(Lanes a, Lanes b) {
    return SHUFFLED(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLED(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/* scores[j] = scale * (q . row j of the tile): all sums across lanes at once, by halving pairs */
static inline void score(const float *q, const float *tile, float *scores, int64_t padded,
                         float scale) {
    Lanes sums[LANES] = {0};
    for (int64_t i = 0; i < padded; i += LANES) {
        Lanes query = loaded(q + i);
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) sums[j] += query * loaded(tile + j * padded + i);
    }
#pragma GCC unroll 4
    for (int count = LANES / 2; count > 0; count /= 2)
#pragma GCC unroll 8
        for (int j = 0; j < count; j++) sums[j] = halved(sums[2 * j], sums[2 * j + 1]);
    sums[0] *= scale;
    memcpy(scores, sums, sizeof *sums);
}

/* sums += weights @ tile */
static inline void mix(const float *weights, const float *tile, float *sums, int64_t padded) {
    for (int64_t i = 0; i < padded; i += LANES) {
        Lanes sum = loaded(sums + i);
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) sum += weights[j] * loaded(tile + j * padded + i);
        memcpy(sums + i, &sum, sizeof sum);
    }
}

/* cap * tanh(score / cap); near zero by its series, where 1 - e^-2x would cancel */
static inline void bend(float *scores, int64_t length, float cap) {
#pragma omp simd
    for (int64_t s = 0; s < length; s++) {
        float x = scores[s] / cap, square = x * x, small = exponential(-2.0f * fabsf(x));
        float near = x * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15 - square * 17 / 315)));
        float far = copysignf((1.0f - small) / (1.0f + small), x);
        scores[s] = cap * (square < 0.0625f ? near : far);
    }
}

/* adds the distance to the newest position, times the slope */
static inline void lean(float *scores, int64_t length, float slope) {
#pragma omp simd
    for (int64_t s = 0; s < length; s++) scores[s] += slope * (float)(s + 1 - length);
}

/* scores -> their softmax, not yet divided, and 0 from `length` to `room`; returns the divisor, of
 * which a sink has its share */
static inline float softmax(float *scores, int64_t length, int64_t room, const float *sink) {
    float most = sink ? *sink : scores[0], sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t s = 0; s < length; s++) most = scores[s] > most ? scores[s] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t s = 0; s < length; s++) {
        scores[s] = exponential(scores[s] - most);
        sum += scores[s];
    }
    for (int64_t s = length; s < room; s++) scores[s] = 0;
    return sink ? sum + exponential(*sink - most) : sum;
}

static inline int64_t lanes_of(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

/* What becomes of the products of a head's query and the keys. */
typedef struct {
    float scale, cap;                 /* cap: 0 for none */
    const float *slopes, *sinks; /* of each head, or NULL */
} Scores;

/* floats of scratch that each pair of row and kv head needs */
int64_t attend_last_scratch(int64_t group, int64_t width, int64_t positions) {
    return LANES * lanes_of(width) + group * (2 * lanes_of(width) + lanes_of(positions));
}

/* q and out are [rows, kv_heads, group, width]; k and v [rows, kv_heads, positions, width] with
 * these strides. Row b reads positions firsts[b] .. lengths[b] - 1. */
#define DEFINE(TYPE, T, LOAD, STORE)                                                            \
    /* `count` rows of `from` as float32 in `to`, which has `most` rows; the rest is zero */    \
    static inline void widen_##TYPE(const T *from, float *to, int64_t stride, int64_t width,    \
                                    int64_t padded, int64_t count, int64_t most) {              \
        if (count < most || width < padded)                                                     \
            memset(to, 0, sizeof *to * (size_t)(most * padded));                                \
        for (int64_t j = 0; j < count; j++) {                                                   \
            _Pragma("omp simd")                                                                 \
            for (int64_t i = 0; i < width; i++) to[j * padded + i] = LOAD(from[j * stride + i]); \
        }                                                                                       \
    }                                                                                           \
    static void group_##TYPE(const T *q, const T *k, const T *v, T *out, float *scratch,        \
                             int64_t length, int64_t group, int64_t width, int64_t stride,      \
                             int64_t head, Scores how) {                                        \
        int64_t padded = lanes_of(width), room = lanes_of(length);                              \
        float *tile = scratch, *queries = tile + LANES * padded;                                \
        float *sums = queries + group * padded, *scores = sums + group * padded;                \
        widen_##TYPE(q, queries, width, width, padded, group, group);                           \
        memset(sums, 0, sizeof *sums * (size_t)(group * padded));                               \
        for (int64_t s = 0; s < length; s += LANES) {                                           \
            int64_t count = length - s < LANES ? length - s : LANES;                            \
            widen_##TYPE(k + s * stride, tile, stride, width, padded, count, LANES);            \
            for (int64_t g = 0; g < group; g++)                                                 \
                score(queries + g * padded, tile, scores + g * room + s, padded, how.scale);    \
        }                                                                                       \
        for (int64_t g = 0; g < group; g++) {                                                   \
            float *own = scores + g * room;                                                     \
            if (how.cap > 0) bend(own, length, how.cap);                                        \
            if (how.slopes) lean(own, length, how.slopes[head + g]);                            \
            /* the query is not needed any more */                                              \
            queries[g] = softmax(own, length, room, how.sinks ? how.sinks + head + g : NULL);   \
        }                                                                                       \
        for (int64_t s = 0; s < length; s += LANES) {                                           \
            int64_t count = length - s < LANES ? length - s : LANES;                            \
            widen_##TYPE(v + s * stride, tile, stride, width, padded, count, LANES);            \
            for (int64_t g = 0; g < group; g++)                                                 \
                mix(scores + g * room + s, tile, sums + g * padded, padded);                    \
        }                                                                                       \
        for (int64_t g = 0; g < group; g++)                                                     \
            for (int64_t i = 0; i < width; i++)                                                 \
                out[g * width + i] = STORE(sums[g * padded + i] / queries[g]);                  \
    }                                                                                           \
    void attend_last_##TYPE(const T *q, const T *k, const T *v, T *out, float *scratch,         \
                            const int64_t *firsts, const int64_t *lengths, const float *slopes, \
                            const float *sinks, int64_t rows, int64_t kv_heads, int64_t group,  \
                            int64_t width, int64_t each, int64_t row_stride,                    \
                            int64_t head_stride, int64_t stride, float scale, float cap,        \
                            int threads) {                                                      \
        Scores how = {scale, cap, slopes, sinks};                                               \
        _Pragma("omp parallel for num_threads(threads) schedule(dynamic)")                      \
        for (int64_t pair = 0; pair < rows * kv_heads; pair++) {                                \
            int64_t row = pair / kv_heads, shared = pair % kv_heads, start = firsts[row];       \
            int64_t at = row * row_stride + shared * head_stride + start * stride;              \
            int64_t own = pair * group * width;                                                 \
            group_##TYPE(q + own, k + at, v + at, out + own, scratch + pair * each,             \
                         lengths[row] - start, group, width, stride, shared * group, how);      \
        }                                                                                       \
    }

DEFINE(bfloat16, uint16_t, widened, rounded)
DEFINE(float32, float, same, same)
