/* act(gate) * up, and its gradient from gate and up alone; rounded where the reference rounds. */
#include "gate.h"

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
