// Products of a linear layer that trains, forward and backward, of float in vector registers.
//
// Rows are shared among threads, and every sum goes over its numbers in one order, whoever computes
// it: neither results nor gradients depend on the threads.
//
// T tokens, K inputs (a multiple of 32), N outputs.

#pragma once

#include <algorithm>
#include <cstdint>

#include "crews.h"
#include "products.h"
#include "training.h"

namespace {

constexpr int64_t TOKENS_A_TASK = 8 * ROWS;
constexpr int64_t TOKENS_AT_ONCE = 1024;  // at most, whose products a gradient of weights is summed over
constexpr int64_t TOKENS_A_PACK = 32;     // of a task that packs, of which
constexpr int64_t TOKENS_A_READ = 8;      // are read side by side
constexpr int64_t MOST_BLOCKS = 4;        // of ROWS outputs that share a panel in the cache

struct LinearSizes {
    int64_t tokens, inputs, outputs;
};

// Of a number cut into as few equal shares as are at most so large: the largest.
inline int64_t share_of(int64_t number, int64_t most) {
    const int64_t shares = (number + most - 1) / most;
    return (number + shares - 1) / shares;
}

inline int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

// Columns 32 p.. of rows (count, width) one after the other: [count][32], zeros past the last.
inline void pack_columns(const float *rows, int64_t count, int64_t width, int64_t p, float *to) {
    const int64_t from = p * PANEL, size = std::min(PANEL, width - from);
    for (int64_t k = 0; k < count; ++k, to += PANEL) {
        const float *at = rows + k * width + from;
        std::copy(at, at + size, to);
        std::fill(to + size, to + PANEL, 0.0f);
    }
}

// Tokens `from`.. of (tokens, width) as blocks of columns: [width / columns][tokens][columns]; what lies past
// the last column is left as it is.
template <int64_t columns>
inline void pack_tokens(const float *rows, int64_t tokens, int64_t width, int64_t from, float *to) {
    const int64_t end = std::min(tokens, from + TOKENS_A_PACK);
    for (int64_t first = from; first < end; first += TOKENS_A_READ)
        for (int64_t n = 0; n < width; n += columns)
            for (int64_t t = first; t < std::min(end, first + TOKENS_A_READ); ++t)
                std::copy_n(rows + t * width + n, std::min(columns, width - n),
                            to + n * tokens + t * columns);
}

// Rows 32 p.. of (count, width) as columns: [width][32], zeros past the last; width: of 16.
inline void pack_rows(const float *rows, int64_t count, int64_t width, int64_t p, float *to) {
    for (int64_t half = 0; half < PANEL; half += 16) {
        const int64_t first = p * PANEL + half;
        const int64_t there = std::clamp<int64_t>(count - first, 0, 16);
        for (int64_t k = 0; k < width; k += 16)
            transpose(rows + std::min(first, count - 1) * width + k, width, there,
                      to + k * PANEL + half, PANEL);
    }
}

// y (rows, outputs) = x (rows, inputs) times panels [inputs][32] of the outputs, plus `bias` if any.
inline void multiply_rows(int64_t rows, int64_t inputs, int64_t outputs, const float *x,
                          const float *panels, const float *bias, float *y) {
    alignas(64) float sums[ROWS * PANEL] = {};
    for (int64_t n = 0; n < outputs; n += PANEL, panels += inputs * PANEL) {
        const int64_t size = std::min(PANEL, outputs - n);
        for (int64_t m = 0; m < rows; m += ROWS) {
            const int64_t count = std::min(ROWS, rows - m);
            const bool whole = size == PANEL;
            float *to = whole ? y + m * outputs + n : sums;
            const int64_t line = whole ? outputs : PANEL;
            if (bias)
                for (int64_t r = 0; r < count; ++r) std::copy_n(bias + n, size, to + r * line);
            tiles<float, 2>(count, x + m * inputs, inputs, 1, panels, PANEL, inputs, to, line,
                            bias != nullptr);
            if (!whole)
                for (int64_t r = 0; r < count; ++r)
                    std::copy_n(sums + r * PANEL, size, y + (m + r) * outputs + n);
        }
    }
}

// Shares out first(n) of `before` tasks and, when all of them are done, then(n) of `count`.
template <class First, class Then>
void share_out_in_turn(int64_t before, int64_t count, int64_t threads, First first, Then then) {
    std::atomic<int64_t> done{0};
    share_out(before + count, threads, NoRoom{}, [&](int64_t task, NoRoom &) {
        if (task < before) {
            first(task);
            done.fetch_add(1, std::memory_order_release);
        } else {
            Crew::wait([&] { return done.load(std::memory_order_acquire) == before; });
            then(task - before);
        }
    });
}

// (T, outputs) = (T, inputs) times the panels that pack(p, to) makes of the weight.
template <class Pack>
void multiply_packed(int64_t tokens, int64_t inputs, int64_t outputs, const float *x,
                     const float *bias, float *y, int64_t threads, Pack pack) {
    const int64_t count = panels_of(outputs), size = inputs * PANEL;
    const Memory memory(count * size * sizeof(float));
    float *panels = reinterpret_cast<float *>(memory.get());
    share_out_in_turn(
        count, (tokens + TOKENS_A_TASK - 1) / TOKENS_A_TASK, threads,
        [&](int64_t p) { pack(p, panels + p * size); },
        [&](int64_t task) {
            const int64_t from = task * TOKENS_A_TASK;
            multiply_rows(std::min(TOKENS_A_TASK, tokens - from), inputs, outputs,
                          x + from * inputs, panels, bias, y + from * outputs);
        });
}

// y (T, N) = x (T, K) times the transpose of weight (N, K), plus `bias`, which may be null.
inline void linear(const LinearSizes &of, const float *x, const float *weight, const float *bias,
                   float *y, int64_t threads) {
    multiply_packed(of.tokens, of.inputs, of.outputs, x, bias, y, threads,
                    [&](int64_t p, float *to) { pack_rows(weight, of.outputs, of.inputs, p, to); });
}

// Gradient of x: (T, K) = grad (T, N) times weight (N, K).
inline void linear_back(const LinearSizes &of, const float *grad, const float *weight,
                        float *grad_x, int64_t threads) {
    multiply_packed(of.tokens, of.outputs, of.inputs, grad, nullptr, grad_x, threads,
                    [&](int64_t p, float *to) {
                        pack_columns(weight, of.outputs, of.inputs, p, to);
                    });
}

// Gradient of the weight: (N, K) = the transpose of grad (T, N) times x (T, K).
inline void linear_back_weight(const LinearSizes &of, const float *grad, const float *x,
                               float *grad_weight, int64_t threads) {
    const int64_t tokens = of.tokens, inputs = of.inputs, outputs = of.outputs;
    if (tokens == 0) {
        std::fill_n(grad_weight, outputs * inputs, 0.0f);
        return;
    }
    const int64_t most = share_of(tokens, TOKENS_AT_ONCE), panels = inputs / PANEL;
    const int64_t blocks = (outputs + ROWS - 1) / ROWS;
    const int64_t together = std::clamp<int64_t>(blocks / (2 * threads), 1, MOST_BLOCKS);
    const Memory memory(most * (inputs + blocks * ROWS) * sizeof(float));
    float *right = reinterpret_cast<float *>(memory.get()), *left = right + most * inputs;
    for (int64_t from = 0; from < tokens; from += most) {
        const int64_t count = std::min(most, tokens - from);
        auto pack = [&](int64_t task) {
            const int64_t t = task * TOKENS_A_PACK;
            pack_tokens<PANEL>(x + from * inputs, count, inputs, t, right);
            pack_tokens<ROWS>(grad + from * outputs, count, outputs, t, left);
        };
        auto multiply = [&](int64_t task) {
            const int64_t begin = task * together, end = std::min(blocks, begin + together);
            alignas(64) float sums[ROWS * PANEL];
            for (int64_t p = 0; p < panels; ++p)
                for (int64_t block = begin; block < end; ++block) {
                    const int64_t first = block * ROWS, size = std::min(ROWS, outputs - first);
                    tiles<float, 2>(size, left + first * count, 1, ROWS, right + p * count * PANEL,
                                    PANEL, count, sums, PANEL, false);
                    float *to = grad_weight + first * inputs + p * PANEL;
                    for (int64_t r = 0; r < size; ++r)
                        for (int64_t j = 0; j < PANEL; j += 16) {
                            float *at = to + r * inputs + j;
                            const __m512 sum = load(sums + r * PANEL + j);
                            store(at, from > 0 ? _mm512_add_ps(load(at), sum) : sum);
                        }
                }
        };
        share_out_in_turn((count + TOKENS_A_PACK - 1) / TOKENS_A_PACK,
                          (blocks + together - 1) / together, threads, pack, multiply);
    }
}

}  // namespace
