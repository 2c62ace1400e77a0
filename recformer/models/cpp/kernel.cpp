// The encoder over packed sequences on a CPU with AVX-512: what recformer/models/kernel.py loads.
//
// A thread takes a chunk of whole sequences, a few hundred tokens whose states stay in its cache,
// through all layers; where there are too few sequences for that, a crew of threads shares the rows
// of a chunk. What the layers compute is said in attention.py; here the sums of one token never
// depend on what else is in the batch or who computes it, so a sequence has the same vector in any
// batch and with any number of threads.
//
// Weights come in panels of 32 outputs: float [N / 32][K][32], or bfloat16 in pairs of inputs
// [N / 32][K / 2][32][2], as the instructions for both AVX512_BF16 and AMX want them. Sums, biases,
// LayerNorm and softmax are float.
//
// With AMX, float32 is computed as `Three`: a number is the sum of three bfloat16 (8 bits of its 24
// each, so exactly), and a product the sum of the six products of its parts that count: those left
// out are below 2**-24 of it. Weights [N / 32][K / 32][3][16][32][2].
//
// T tokens of a chunk, B sequences, L tokens of a sequence, H hidden, A heads, D = H / A.

#include "encoder.h"
#include "training.h"
#include "training_attention.h"
#include "training_products.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

template <class T>
const T *as(T, const void *numbers) {
    return static_cast<const T *>(numbers);
}
template <class T>
T *as(T, void *numbers) {
    return static_cast<T *>(numbers);
}

template <class Work>
int by_type(int numbers, Work work) {
    try {
        if (numbers == 1) work(bf16{});
        if (numbers == 0) work(float{});
    } catch (const std::bad_alloc &) {
        return 2;
    }
    return 0;
}

// The type of what is multiplied, and that of the weight.
template <class Work>
int by_types(int numbers, int64_t floats, Work work) {
    return by_type(numbers, [&](auto of) {
        if (floats)
            work(of, float{});
        else
            work(of, of);
    });
}

}  // namespace

extern "C" {

// Ask the kernel for the matrix unit. 1: it will be used.
int recformer_use_amx(int wanted) {
    amx = false;
#ifdef __AMX_BF16__
    constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    amx = wanted && syscall(SYS_arch_prctl, request, tile_data) == 0;
#endif
    return amx;
}

int recformer_uses_amx() { return amx; }

// Compute on the threads of this OpenMP (GOMP_parallel, omp_get_num_threads, omp_get_thread_num); with
// null threads are made at every call.
void recformer_use_threads(decltype(OpenMp::parallel) parallel, decltype(OpenMp::size) size,
                           decltype(OpenMp::own) own) {
    open_mp = {parallel, size, own};
}

#ifdef RECFORMER_TIMES
// Ticks of each stage since the last call, of all threads.
void recformer_times(uint64_t *ticks) {
    for (int each = 0; each < STAGES; ++each) ticks[each] = spent[each].exchange(0);
}
#endif

// `numbers`, as the weights are: 0 float, 1 bfloat16, 2 float in three parts (with AMX alone).
// 0: done. 1: ids outside a table, or sequences that do not fit together. 2: no memory.
int recformer_encode(const Model *model, const Batch *batch, int64_t tokens, int numbers,
                     int64_t threads) {
    const int64_t *starts = batch->starts;
    if (starts[0] != 0 || starts[batch->sequences] != tokens) return 1;
    for (int64_t s = 0; s < batch->sequences; ++s)
        if (starts[s] >= starts[s + 1]) return 1;
    for (int table = 0; table < 4; ++table)
        if (batch->ids[table])
            for (int64_t t = 0; t < tokens; ++t)
                if (uint64_t(batch->ids[table][t]) >= uint64_t(model->rows[table])) return 1;
    try {
        if (numbers == 1) encode<bf16>(*model, *batch, tokens, threads);
        if (numbers == 0) encode<float>(*model, *batch, tokens, threads);
#ifdef __AMX_BF16__
        if (numbers == 2) encode<Three>(*model, *batch, tokens, threads);
#endif
    } catch (const std::bad_alloc &) {
        return 2;
    }
    return 0;
}

// Mixes `samples` numbers of each of `count` arrays of so many bytes.
uint64_t recformer_sample(const void *const *arrays, const int64_t *bytes, int64_t count,
                          int64_t samples) {
    uint64_t mixed = 1469598103934665603u;
    for (int64_t a = 0; a < count; ++a) {
        const int64_t words = bytes[a] / 4;
        for (int64_t s = 0; s < std::min(samples, words); ++s) {
            const uint32_t *from = static_cast<const uint32_t *>(arrays[a]);
            mixed = (mixed ^ from[words * s / std::min(samples, words)]) * 1099511628211u;
        }
    }
    return mixed;
}

// --- parts of a layer that trains, see training.h: `numbers` 0 float, 1 bfloat16; 2: no memory --

int recformer_norm(int numbers, int64_t rows, int64_t hidden, const void *x, const float *bias,
                   const void *residual, const float *weight, const float *shift, double eps,
                   uint64_t seed, int64_t dropped, void *sums, void *y, float *stats,
                   int64_t threads) {
    return by_type(numbers, [&](auto of) {
        norm(rows, hidden, as(of, x), bias, as(of, residual), weight, shift, eps, {seed, dropped},
             as(of, sums), as(of, y), stats, threads);
    });
}

int recformer_norm_back(int numbers, int64_t rows, int64_t hidden, const void *grad, const void *sums,
                        const float *stats, const float *weight, uint64_t seed, int64_t dropped,
                        void *grad_residual, void *grad_x, float *grads, int64_t threads) {
    return by_type(numbers, [&](auto of) {
        norm_back(rows, hidden, as(of, grad), as(of, sums), stats, weight, {seed, dropped},
                  as(of, grad_residual), as(of, grad_x), grads, threads);
    });
}

int recformer_gelu(int numbers, int64_t rows, int64_t width, const void *x, const float *bias, void *y,
                   int64_t threads) {
    return by_type(numbers, [&](auto of) {
        bias_gelu(rows, width, as(of, x), bias, as(of, y), threads);
    });
}

int recformer_gelu_back(int numbers, int64_t rows, int64_t width, const void *x, const float *bias,
                        const void *grad, void *grad_x, float *grad_bias, int64_t threads) {
    return by_type(numbers, [&](auto of) {
        bias_gelu_back(rows, width, as(of, x), bias, as(of, grad), as(of, grad_x), grad_bias, threads);
    });
}

int recformer_band(int numbers, int64_t sequences, const int64_t *starts, int64_t hidden, int64_t heads,
                   int64_t half, int64_t causal, const void *qkv, uint64_t seed, int64_t dropped,
                   void *context, float *levels, int64_t threads) {
    return by_type(numbers, [&](auto of) {
        band({sequences, starts}, hidden, heads, {half, causal != 0}, as(of, qkv), {seed, dropped},
             as(of, context), levels, threads);
    });
}

int recformer_band_back(int numbers, int64_t sequences, const int64_t *starts, int64_t hidden,
                        int64_t heads, int64_t half, int64_t causal, const void *qkv,
                        const void *context, const float *levels, const void *grad, uint64_t seed,
                        int64_t dropped, void *grad_qkv, int64_t threads) {
    return by_type(numbers, [&](auto of) {
        band_back({sequences, starts}, hidden, heads, {half, causal != 0}, as(of, qkv),
                  as(of, context), levels, as(of, grad), {seed, dropped}, as(of, grad_qkv), threads);
    });
}

int recformer_gather(int numbers, int64_t sequences, const int64_t *starts, int64_t hidden,
                     int64_t heads, const void *asked, const void *states, uint64_t seed,
                     int64_t dropped, float *weights, void *summed, float *mass, int64_t threads) {
    return by_type(numbers, [&](auto of) {
        gather({sequences, starts}, hidden, heads, as(of, asked), as(of, states), {seed, dropped},
               weights, as(of, summed), mass, threads);
    });
}

int recformer_gather_back(int numbers, int64_t sequences, const int64_t *starts, int64_t hidden,
                          int64_t heads, const void *asked, const void *states, const float *weights,
                          const void *grad_summed, const float *grad_mass, uint64_t seed,
                          int64_t dropped, void *grad_asked, void *grad_states, int64_t threads) {
    return by_type(numbers, [&](auto of) {
        gather_back({sequences, starts}, hidden, heads, as(of, asked), as(of, states), weights,
                    as(of, grad_summed), grad_mass, {seed, dropped}, as(of, grad_asked),
                    as(of, grad_states), threads);
    });
}

// `floats`: the weight is of float, whatever x is. `bias` may be null.
int recformer_linear(int numbers, int64_t tokens, int64_t inputs, int64_t outputs, const void *x,
                     int64_t floats, const void *weight, const float *bias, void *y, int64_t threads) {
    return by_types(numbers, floats, [&](auto of, auto of_weight) {
        linear({tokens, inputs, outputs}, as(of, x), as(of_weight, weight), bias, as(of, y), threads);
    });
}

int recformer_linear_back(int numbers, int64_t tokens, int64_t inputs, int64_t outputs,
                          const void *grad, int64_t floats, const void *weight, void *grad_x,
                          int64_t threads) {
    return by_types(numbers, floats, [&](auto of, auto of_weight) {
        linear_back({tokens, inputs, outputs}, as(of, grad), as(of_weight, weight), as(of, grad_x),
                    threads);
    });
}

int recformer_linear_back_weight(int numbers, int64_t tokens, int64_t inputs, int64_t outputs,
                                 const void *grad, const void *x, float *grad_weight,
                                 int64_t threads) {
    return by_type(numbers, [&](auto of) {
        linear_back_weight({tokens, inputs, outputs}, as(of, grad), as(of, x), grad_weight, threads);
    });
}

}  // extern "C"
