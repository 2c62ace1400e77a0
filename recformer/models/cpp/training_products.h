// Products of a linear layer that trains, forward and backward, in vector registers: of float, or of
// bfloat16 with sums in float.
//
// Rows are shared among threads, and every sum goes over its numbers in one order, whoever computes
// it: neither results nor gradients depend on the threads.
//
// T tokens, at least one, K inputs (a multiple of 32), N outputs (of bfloat16 an even number). `T` is the
// type of the numbers that are multiplied, `W` that of the weight: T, or float.

#pragma once

#include <algorithm>
#include <cstdint>

#include "crews.h"
#include "products.h"
#include "training.h"

namespace {

constexpr int64_t TOKENS_A_TASK = 8 * ROWS;
constexpr int64_t WORDS_AT_ONCE = 1280;  // of tokens, at most, a gradient of weights is summed over
constexpr int64_t TOKENS_A_PACK = 32;    // of a task that packs, of which
constexpr int64_t TOKENS_A_READ = 8;     // are read side by side
constexpr int64_t MOST_BLOCKS = 8;       // of ROWS outputs that share a panel in the cache

struct LinearSizes {
    int64_t tokens, inputs, outputs;
};

// Of a number cut into as few equal shares as are at most so large: the largest.
inline int64_t share_of(int64_t number, int64_t most) {
    const int64_t shares = (number + most - 1) / most;
    return (number + shares - 1) / shares;
}

inline int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

// Products take a word of four bytes at a time: a number, or two of bfloat16, of two inputs.
template <class T>
constexpr int64_t A_WORD = 4 / sizeof(T);

// Of whole words: one more than an odd number of bfloat16.
template <class T>
int64_t whole_words(int64_t count) {
    return (count + A_WORD<T> - 1) / A_WORD<T> * A_WORD<T>;
}

// Tokens from a block of columns to the next, so that blocks of 32 begin in other lines of the caches.
template <class T>
int64_t line_of(int64_t tokens) {
    return (whole_words<T>(tokens) / A_WORD<T> / 32 * 32 + 33) * A_WORD<T>;
}

// 16 words of numbers that lie side by side.
template <class T, class W>
__m512 words(const W *at) {
    if constexpr (sizeof(W) == sizeof(T))
        return _mm512_loadu_ps(at);
    else
        return _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(half(load(at))),
                                                      half(load(at + 16)), 1));
}

// Of the first `count` of 16 numbers those bits that bfloat16 has.
inline __m512i short_bits(const bf16 *at, int64_t count) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1 << count) - 1), at));
}
inline __m512i short_bits(const float *at, int64_t count) {
    return _mm512_cvtepu16_epi32(half(_mm512_maskz_loadu_ps(__mmask16((1 << count) - 1), at)));
}

// A step: `columns` words of rows that lie `width` apart, one row of float or two that become pairs;
// `size` columns and `rows` rows are there. What lies past the last column is left as it is.
template <class T, int64_t columns, class W>
void pack_step(const W *row, int64_t width, int64_t rows, int64_t size, T *to) {
    if constexpr (sizeof(T) == 4) {
        std::copy_n(row, std::min(columns, size), to);
    } else {
        for (int64_t c = 0; c < std::min(columns, size); c += 16) {
            const int64_t count = std::min<int64_t>(16, std::min(columns, size) - c);
            __m512i pairs = short_bits(row + c, count);
            if (rows > 1)
                pairs = _mm512_or_si512(pairs,
                                        _mm512_slli_epi32(short_bits(row + width + c, count), 16));
            _mm512_mask_storeu_epi32(to + 2 * c, __mmask16((1 << count) - 1), pairs);
        }
    }
}

// Columns 32 p.. of rows (count, width), width a multiple of 32: [count] steps of 32.
template <class T, class W>
void pack_columns(const W *rows, int64_t count, int64_t width, int64_t p, T *to) {
    for (int64_t k = 0; k < count; k += A_WORD<T>)
        pack_step<T, PANEL>(rows + k * width + p * PANEL, width, count - k, PANEL, to + k * PANEL);
}

// Tokens `from`.. of (tokens, width) as blocks of columns: [width / columns][tokens][columns], of bfloat16
// in pairs of tokens, after an odd number of them zeros.
template <int64_t columns, class T>
void pack_tokens(const T *rows, int64_t tokens, int64_t width, int64_t from, T *to) {
    const int64_t end = std::min(tokens, from + TOKENS_A_PACK), line = line_of<T>(tokens);
    for (int64_t first = from; first < end; first += TOKENS_A_READ)
        for (int64_t n = 0; n < width; n += columns)
            for (int64_t t = first; t < std::min(end, first + TOKENS_A_READ); t += A_WORD<T>)
                pack_step<T, columns>(rows + t * width + n, width, tokens - t, width - n,
                                      to + n * line + t * columns);
}

// Rows 32 p.. of (count, width) as columns: [width] steps of 32, zeros past the last row; width: of 32.
template <class T, class W>
void pack_rows(const W *rows, int64_t count, int64_t width, int64_t p, T *to) {
    for (int64_t part = 0; part < PANEL; part += 16) {
        const int64_t first = p * PANEL + part;
        const int64_t there = std::clamp<int64_t>(count - first, 0, 16);
        const W *from = rows + std::min(first, count - 1) * width;
        for (int64_t k = 0; k < width; k += 16 * A_WORD<T>)
            transposed(there, [=](int64_t i) { return words<T>(from + i * width + k); },
                       reinterpret_cast<float *>(to) + k / A_WORD<T> * PANEL + part, PANEL);
    }
}

// Up to 32 sums to where they belong.
inline void put_sums(const float *sums, int64_t size, float *to) { std::copy_n(sums, size, to); }
inline void put_sums(const float *sums, int64_t size, bf16 *to) {
    for (int64_t n = 0; n < size; n += 16)
        _mm256_mask_storeu_epi16(to + n, __mmask16((1 << std::min<int64_t>(16, size - n)) - 1),
                                 half(load(sums + n)));
}

// y (rows, outputs) = x (rows, inputs) times panels of the outputs, plus `bias` if any.
template <class T>
void multiply_rows(int64_t rows, int64_t inputs, int64_t outputs, const T *x, const T *panels,
                   const float *bias, T *y) {
    constexpr int64_t step = A_WORD<T>;
    alignas(64) float sums[ROWS * PANEL] = {};
    for (int64_t n = 0; n < outputs; n += PANEL, panels += inputs * PANEL) {
        const int64_t size = std::min(PANEL, outputs - n);
        alignas(64) float shift[PANEL] = {};
        if (bias) std::copy_n(bias + n, size, shift);
        for (int64_t m = 0; m < rows; m += ROWS) {
            const int64_t count = std::min(ROWS, rows - m);
            float *to = sums;
            int64_t line = PANEL;
            if constexpr (sizeof(T) == 4)
                if (size == PANEL) to = y + m * outputs + n, line = outputs;
            tiles<T, 2>(count, x + m * inputs, inputs, step, panels, PANEL * step, inputs / step, to,
                        line, bias ? shift : nullptr, 0);
            if (to == sums)
                for (int64_t r = 0; r < count; ++r)
                    put_sums(sums + r * PANEL, size, y + (m + r) * outputs + n);
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
template <class T, class Pack>
void multiply_packed(int64_t tokens, int64_t inputs, int64_t outputs, const T *x, const float *bias,
                     T *y, int64_t threads, Pack pack) {
    const int64_t count = panels_of(outputs), size = inputs * PANEL;
    const Memory memory(count * size * sizeof(T));
    T *panels = reinterpret_cast<T *>(memory.get());
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
template <class T, class W>
void linear(const LinearSizes &of, const T *x, const W *weight, const float *bias, T *y,
            int64_t threads) {
    multiply_packed(of.tokens, of.inputs, of.outputs, x, bias, y, threads, [&](int64_t p, T *to) {
        pack_rows(weight, of.outputs, of.inputs, p, to);
    });
}

// Gradient of x: (T, K) = grad (T, N) times weight (N, K).
template <class T, class W>
void linear_back(const LinearSizes &of, const T *grad, const W *weight, T *grad_x, int64_t threads) {
    multiply_packed<T>(of.tokens, of.outputs, of.inputs, grad, nullptr, grad_x, threads,
                       [&](int64_t p, T *to) {
                           pack_columns(weight, of.outputs, of.inputs, p, to);
                       });
}

// Gradient of the weight: (N, K) = the transpose of grad (T, N) times x (T, K).
template <class T>
void linear_back_weight(const LinearSizes &of, const T *grad, const T *x, float *grad_weight,
                        int64_t threads) {
    constexpr int64_t step = A_WORD<T>;
    const int64_t tokens = of.tokens, inputs = of.inputs, outputs = of.outputs;
    const int64_t most = whole_words<T>(share_of(tokens, WORDS_AT_ONCE * step));
    const int64_t panels = inputs / PANEL, blocks = (outputs + ROWS - 1) / ROWS;
    const int64_t together = std::clamp<int64_t>(blocks / (2 * threads), 1, MOST_BLOCKS);
    const Memory memory(line_of<T>(most) * (inputs + blocks * ROWS) * sizeof(T));
    T *right = reinterpret_cast<T *>(memory.get()), *left = right + line_of<T>(most) * inputs;
    for (int64_t from = 0; from < tokens; from += most) {
        const int64_t count = std::min(most, tokens - from), line = line_of<T>(count);
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
                    tiles<T, 2>(size, left + first * line, step, ROWS * step, right + p * line * PANEL,
                                PANEL * step, whole_words<T>(count) / step, sums, PANEL, false);
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
