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
#endif
