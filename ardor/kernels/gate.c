/* act(gate) * up, and its gradient from gate and up alone; rounded where the reference rounds.
 *
 * Both activations are x times the sigmoid of a polynomial: of x itself for silu, and for the gelu
 * by tanh, as tanh y = 2 sigmoid(2y) - 1, of 2 sqrt(2 / pi) (x + 0.044715 x^3).
 */
#include "scalar.h"

#define GELU 1.5957691216f
#define CUBE 0.044715f

static inline float silu_inner(float x) { return x; }
static inline float silu_slope(float x) { return (void)x, 1.0f; }
static inline float gelu_inner(float x) { return GELU * (x + CUBE * x * x * x); }
static inline float gelu_slope(float x) { return GELU * (1.0f + 3.0f * CUBE * x * x); }

#define DEFINE(ACT, TYPE, T, LOAD, STORE)                                                       \
    void ACT##_gate_##TYPE(const T *gate, const T *up, T *y, int64_t count, int threads) {      \
        _Pragma("omp parallel for simd num_threads(threads) schedule(static)")                  \
        for (int64_t i = 0; i < count; i++) {                                                   \
            float in = LOAD(gate[i]), out = in / (1.0f + exponential(-ACT##_inner(in)));        \
            y[i] = STORE(LOAD(STORE(out)) * LOAD(up[i]));                                       \
        }                                                                                       \
    }                                                                                           \
    void ACT##_gate_backward_##TYPE(const T *dy, const T *gate, const T *up, T *dgate, T *dup,  \
                                    int64_t count, int threads) {                               \
        _Pragma("omp parallel for simd num_threads(threads) schedule(static)")                  \
        for (int64_t i = 0; i < count; i++) {                                                   \
            float in = LOAD(gate[i]), small = exponential(-ACT##_inner(in));                    \
            /* small * sigmoid is 1 - sigmoid, which would cancel */                            \
            float sigmoid = 1.0f / (1.0f + small);                                              \
            float slope = sigmoid * (1.0f + in * ACT##_slope(in) * (small * sigmoid));          \
            dup[i] = STORE(LOAD(dy[i]) * LOAD(STORE(in * sigmoid)));                            \
            dgate[i] = STORE(LOAD(STORE(LOAD(dy[i]) * LOAD(up[i]))) * slope);                   \
        }                                                                                       \
    }

DEFINE(silu, bfloat16, uint16_t, widened, rounded)
DEFINE(silu, float32, float, same, same)
DEFINE(gelu, bfloat16, uint16_t, widened, rounded)
DEFINE(gelu, float32, float, same, same)
