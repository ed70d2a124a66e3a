/* silu(gate) * up, and its gradient from gate and up alone; rounded where the reference rounds. */
#include "scalar.h"

#define DEFINE(TYPE, T, LOAD, STORE)                                                            \
    void silu_gate_##TYPE(const T *gate, const T *up, T *y, int64_t count, int threads) {       \
        _Pragma("omp parallel for simd num_threads(threads) schedule(static)")                  \
        for (int64_t i = 0; i < count; i++) {                                                   \
            float in = LOAD(gate[i]);                                                           \
            y[i] = STORE(LOAD(STORE(in / (1.0f + exponential(-in)))) * LOAD(up[i]));            \
        }                                                                                       \
    }                                                                                           \
    void silu_gate_backward_##TYPE(const T *dy, const T *gate, const T *up, T *dgate, T *dup,   \
                                   int64_t count, int threads) {                                \
        _Pragma("omp parallel for simd num_threads(threads) schedule(static)")                  \
        for (int64_t i = 0; i < count; i++) {                                                   \
            float in = LOAD(gate[i]), sigmoid = 1.0f / (1.0f + exponential(-in));               \
            float slope = sigmoid * (1.0f + in * (1.0f - sigmoid));                             \
            dup[i] = STORE(LOAD(dy[i]) * LOAD(STORE(in * sigmoid)));                            \
            dgate[i] = STORE(LOAD(STORE(LOAD(dy[i]) * LOAD(up[i]))) * slope);                   \
        }                                                                                       \
    }

DEFINE(bfloat16, uint16_t, widened, rounded)
DEFINE(float32, float, same, same)
