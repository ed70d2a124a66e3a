/* bfloat16 as the upper half of a float32, which is all that the compiler needs to vectorize it. */
#ifndef ARDOR_SCALAR_H
#define ARDOR_SCALAR_H
#include <stdint.h>
#include <string.h>

static inline float widened(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t rounded(float value) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : nearest);
}

static inline float same(float value) { return value; }

/* e^x to 2 units in the last place, in operations that vectorize; the ends of the range hold beyond
 * it, and NaN stays NaN. e^x = 2^n e^r with r = x - n ln 2, where ln 2 comes in two parts so that
 * n times the first is exact. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer below */
    float shifted = x * 1.44269504f + magic, n = shifted - magic;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float series = 1.0f / 720.0f; /* Taylor: |r| <= ln 2 / 2, and the next term is below 2e-7 */
    series = series * r + 1.0f / 120.0f;
    series = series * r + 1.0f / 24.0f;
    series = series * r + 1.0f / 6.0f;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    int32_t bits, exponent;
    memcpy(&exponent, &shifted, sizeof exponent);
    memcpy(&bits, &series, sizeof bits);
    bits += (int32_t)((uint32_t)exponent << 23); /* the magic's own bits fall off the left end */
    memcpy(&x, &bits, sizeof x);
    return x;
}
#endif
