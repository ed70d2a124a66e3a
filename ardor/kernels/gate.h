/* What the sigmoid is taken of in an activation, which is x times it: x itself for silu, and for
 * the gelu by tanh, as tanh y = 2 sigmoid(2y) - 1, 2 sqrt(2 / pi) (x + 0.044715 x^3). */
#ifndef ARDOR_GATE_H
#define ARDOR_GATE_H
#include "scalar.h"

#define GELU 1.5957691216f
#define CUBE 0.044715f

static inline float silu_inner(float x) { return x; }
static inline float silu_slope(float x) { return (void)x, 1.0f; }
static inline float gelu_inner(float x) { return GELU * (x + CUBE * x * x * x); }
static inline float gelu_slope(float x) { return GELU * (1.0f + 3.0f * CUBE * x * x); }
#endif
