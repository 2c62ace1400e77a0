// Attention of a layer that trains, forward and backward, sequence by sequence; see training.h.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "crews.h"
#include "numbers.h"
#include "products.h"
#include "training.h"

namespace {

// --- attention to the keys of a window and to `<s>`, or to all keys before -------------------------

struct Sequences {
    int64_t number;
    const int64_t *starts;

    int64_t longest() const {
        int64_t most = 0;
        for (int64_t s = 0; s < number; ++s) most = std::max(most, starts[s + 1] - starts[s]);
        return most;
    }
};

// Rows and columns of one head of one sequence, in float.
struct HeadRoom {
    int64_t longest, dim;
    bool back;
    float *query, *key, *value, *key_columns, *scores, *out;
    float *grad, *value_columns, *grad_scores, *grad_key, *grad_value;

    void cut(Cutter &cutter) {
        const int64_t rows = (longest + 15) / 16 * 16, line = rows + 16;
        for (float **each : {&query, &key, &value, &key_columns}) cutter(*each, rows * dim);
        cutter(scores, ROWS * line);
        cutter(out, ROWS * dim);
        if (!back) return;
        for (float **each : {&grad, &value_columns, &grad_key, &grad_value})
            cutter(*each, rows * dim);
        cutter(grad_scores, ROWS * line);
    }
};

template <class T>
void take_rows(const T *rows, int64_t width, int64_t length, int64_t dim, float *to) {
    for (int64_t t = 0; t < length; ++t)
        for (int64_t d = 0; d < dim; d += 16) store(to + t * dim + d, load(rows + t * width + d));
}

// Asks for rows that take_rows will read.
template <class T>
void fetch_rows(const T *rows, int64_t width, int64_t length, int64_t dim) {
    for (int64_t t = 0; t < length; ++t)
        for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T)))
            _mm_prefetch(reinterpret_cast<const char *>(rows + t * width + d), _MM_HINT_T1);
}

// Columns of (L, D) rows: (D, C), zeros at columns beyond the last row.
inline void take_columns(const float *rows, int64_t length, int64_t dim, float *to) {
    const int64_t columns = (length + 15) / 16 * 16;
    for (int64_t t = 0; t < length; t += 16)
        for (int64_t d = 0; d < dim; d += 16)
            transpose(rows + t * dim + d, dim, std::min<int64_t>(16, length - t),
                      to + d * columns + t, columns);
}

// Keys that a query sees: `half` on each side and key 0; or, causal, itself and all before it.
struct Window {
    int64_t half;
    bool causal;

    int64_t first(int64_t query) const { return causal ? 0 : std::max<int64_t>(0, query - half); }
    int64_t last(int64_t query) const { return causal ? query : query + half; }
};

// Queries q..q+count-1 and the keys that they see: from..to-1 and, where those begin later, key 0.
struct Span {
    int64_t q, count, from, to, size, line;

    Span(int64_t q, int64_t length, const Window &window)
        : q(q), count(std::min(ROWS, length - q)), from(window.first(q) / 16 * 16),
          to(std::min(length, window.last(q + count - 1) + 1)), size((to - from + 15) / 16 * 16),
          line(size + 16) {}

    // Of keys from + k.., whether query q + r sees them.
    __mmask16 seen(int64_t r, int64_t k, const Window &window) const {
        if (k == size) return 1;  // key 0
        const __m512i j = _mm512_add_epi32(lanes(), _mm512_set1_epi32(int(from + k)));
        const __m512i low = _mm512_set1_epi32(int(window.first(q + r)));
        const __m512i high = _mm512_set1_epi32(int(std::min(to - 1, window.last(q + r))));
        const __mmask16 near = _mm512_cmp_epi32_mask(j, low, _MM_CMPINT_GE) &
                               _mm512_cmp_epi32_mask(j, high, _MM_CMPINT_LE);
        return near | _mm512_cmp_epi32_mask(j, _mm512_setzero_si512(), _MM_CMPINT_EQ);
    }

    // Columns of a row of scores, key 0 behind them if it is not among them.
    int64_t end() const { return from > 0 ? line : size; }
    int64_t key(int64_t k) const { return k == size ? 0 : from + k; }
};

// (count, line) products of rows with columns (D, C).
inline void times_columns(const Span &span, const float *rows, int64_t dim, const float *columns,
                          int64_t length, float *to) {
    const int64_t line = (length + 15) / 16 * 16;
    int64_t k = 0;
    for (; k + 32 <= span.size; k += 32)
        tiles<float, 2>(span.count, rows, dim, 1, columns + span.from + k, line, dim, to + k,
                        span.line, false);
    if (k < span.size)
        tiles<float, 1>(span.count, rows, dim, 1, columns + span.from + k, line, dim, to + k,
                        span.line, false);
    if (span.from > 0)
        tiles<float, 1>(span.count, rows, dim, 1, columns, line, dim, to + span.size, span.line,
                        false);
}

// (count, D) sums of the seen keys' rows under weights (count, line).
inline void weigh_rows(const Span &span, const float *weights, const float *rows, int64_t dim,
                       float *to) {
    for (int64_t d = 0; d < dim; d += PANEL) {
        tiles<float, 2>(span.count, weights, span.line, 1, rows + span.from * dim + d, dim,
                        span.to - span.from, to + d, dim, false);
        if (span.from > 0)
            tiles<float, 2>(span.count, weights + span.size, span.line, 1, rows + d, dim, 1, to + d,
                            dim, true);
    }
}

// Adds to the seen keys' rows those of the queries under weights (count, line).
inline void spread_rows(const Span &span, const float *weights, const float *rows, int64_t dim,
                        float *to) {
    for (int64_t d = 0; d < dim; d += PANEL) {
        for (int64_t k = 0; k < span.to - span.from; k += ROWS)
            tiles<float, 2>(std::min(ROWS, span.to - span.from - k), weights + k, 1, span.line,
                            rows + d, dim, span.count, to + (span.from + k) * dim + d, dim, true);
        if (span.from > 0)
            tiles<float, 2>(1, weights + span.size, 1, span.line, rows + d, dim, span.count, to + d,
                            dim, true);
    }
}

// Calls work(sequence, head, room) for all, of one sequence by one thread where there are many: it finds
// the next head's rows near those of the last.
template <class Work>
void share_heads(int64_t sequences, int64_t heads, int64_t threads, const HeadRoom &shape, Work work) {
    const int64_t together = sequences >= 16 * threads ? heads : 1, tasks = heads / together;
    share_out(sequences * tasks, threads, shape, [&](int64_t task, HeadRoom &room) {
        for (int64_t n = 0; n < together; ++n)
            work(task / tasks, task % tasks * together + n, room);
    });
}

// Contexts (T, H) of queries, keys and values (T, 3 H); (T, A) `levels` make weights of scores again.
template <class T>
void band(const Sequences &sequences, int64_t hidden, int64_t heads, const Window &window,
          const T *qkv, const Dropout &dropout, T *context, float *levels, int64_t threads) {
    const int64_t dim = hidden / heads, width = 3 * hidden;
    const float scale = 1.0f / std::sqrt(float(dim));
    const HeadRoom shape{sequences.longest(), dim, false};
    share_heads(sequences.number, heads, threads, shape, [&](int64_t s, int64_t head, HeadRoom &room) {
        const int64_t start = sequences.starts[s], length = sequences.starts[s + 1] - start;
        const T *rows = qkv + start * width + head * dim;
        take_rows(rows, width, length, dim, room.query);
        take_rows(rows + hidden, width, length, dim, room.key);
        take_rows(rows + 2 * hidden, width, length, dim, room.value);
        take_columns(room.key, length, dim, room.key_columns);
        if (head + 1 < heads)  // while this one is computed
            for (int64_t part = 0; part < 3; ++part)
                fetch_rows(rows + part * hidden + dim, width, length, dim);
        for (int64_t q = 0; q < length; q += ROWS) {
            const Span span(q, length, window);
            times_columns(span, room.query + q * dim, dim, room.key_columns, length, room.scores);
            float inverse[ROWS];
            for (int64_t r = 0; r < span.count; ++r) {
                float *row = room.scores + r * span.line;
                __m512 top = _mm512_set1_ps(-INFINITY);
                for (int64_t k = 0; k < span.end(); k += 16)
                    top = _mm512_mask_max_ps(top, span.seen(r, k, window), top, load(row + k));
                const float most = _mm512_reduce_max_ps(top);
                const int64_t place = (start + q + r) * heads + head;
                const Kept kept(dropout, place);
                __m512 total = _mm512_setzero_ps();
                for (int64_t k = 0; k < span.end(); k += 16) {
                    __m512 x = _mm512_sub_ps(load(row + k), _mm512_set1_ps(most));
                    x = exponential(_mm512_mul_ps(x, _mm512_set1_ps(scale)));
                    x = _mm512_maskz_mov_ps(span.seen(r, k, window), x);
                    total = _mm512_add_ps(total, x);
                    store(row + k, kept(span.key(k), x));
                }
                const float sum = _mm512_reduce_add_ps(total);
                inverse[r] = 1.0f / sum;
                levels[place] = most * scale + std::log(sum);
            }
            weigh_rows(span, room.scores, room.value, dim, room.out);
            for (int64_t r = 0; r < span.count; ++r)
                for (int64_t d = 0; d < dim; d += 16)
                    store(context + (start + q + r) * hidden + head * dim + d,
                          _mm512_mul_ps(load(room.out + r * dim + d), _mm512_set1_ps(inverse[r])));
        }
    });
}

// Gradients (T, 3 H) of queries, keys and values. Unless causal, the contexts of the sequences' first
// tokens were replaced by others: their gradients count as zero.
template <class T>
void band_back(const Sequences &sequences, int64_t hidden, int64_t heads, const Window &window,
               const T *qkv, const T *context, const float *levels, const T *grad, const Dropout &dropout,
               T *grad_qkv, int64_t threads) {
    const int64_t dim = hidden / heads, width = 3 * hidden;
    const float scale = 1.0f / std::sqrt(float(dim));
    const HeadRoom shape{sequences.longest(), dim, true};
    share_heads(sequences.number, heads, threads, shape, [&](int64_t s, int64_t head, HeadRoom &room) {
        const int64_t start = sequences.starts[s], length = sequences.starts[s + 1] - start;
        const T *rows = qkv + start * width + head * dim;
        T *result = grad_qkv + start * width + head * dim;
        take_rows(rows, width, length, dim, room.query);
        take_rows(rows + hidden, width, length, dim, room.key);
        take_rows(rows + 2 * hidden, width, length, dim, room.value);
        take_rows(grad + start * hidden + head * dim, hidden, length, dim, room.grad);
        if (!window.causal) std::fill_n(room.grad, dim, 0.0f);
        take_columns(room.key, length, dim, room.key_columns);
        take_columns(room.value, length, dim, room.value_columns);
        if (head + 1 < heads) {  // while this one is computed
            const int64_t at = start * hidden + (head + 1) * dim;
            for (int64_t part = 0; part < 3; ++part)
                fetch_rows(rows + part * hidden + dim, width, length, dim);
            fetch_rows(grad + at, hidden, length, dim);
            fetch_rows(context + at, hidden, length, dim);
        }
        std::fill_n(room.grad_key, length * dim, 0.0f);
        std::fill_n(room.grad_value, length * dim, 0.0f);
        for (int64_t q = 0; q < length; q += ROWS) {
            const Span span(q, length, window);
            const float *query = room.query + q * dim, *given = room.grad + q * dim;
            times_columns(span, query, dim, room.key_columns, length, room.scores);
            times_columns(span, given, dim, room.value_columns, length, room.grad_scores);
            for (int64_t r = 0; r < span.count; ++r) {
                const T *out = context + (start + q + r) * hidden + head * dim;
                __m512 total = _mm512_setzero_ps();  // the mean of the gradient under the weights
                for (int64_t d = 0; d < dim; d += 16)
                    total = _mm512_fmadd_ps(load(given + r * dim + d), load(out + d), total);
                const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total));
                const int64_t place = (start + q + r) * heads + head;
                const __m512 level = _mm512_set1_ps(levels[place]);
                const Kept kept(dropout, place);
                float *row = room.scores + r * span.line, *to = room.grad_scores + r * span.line;
                for (int64_t k = 0; k < span.end(); k += 16) {
                    __m512 x = _mm512_fmsub_ps(load(row + k), _mm512_set1_ps(scale), level);
                    x = _mm512_maskz_mov_ps(span.seen(r, k, window), exponential(x));
                    const __m512 left = _mm512_sub_ps(kept(span.key(k), load(to + k)), mean);
                    store(row + k, kept(span.key(k), x));
                    store(to + k, _mm512_mul_ps(_mm512_mul_ps(x, left), _mm512_set1_ps(scale)));
                }
            }
            spread_rows(span, room.scores, given, dim, room.grad_value);
            spread_rows(span, room.grad_scores, query, dim, room.grad_key);
            weigh_rows(span, room.grad_scores, room.key, dim, room.out);
            for (int64_t r = 0; r < span.count; ++r)
                for (int64_t d = 0; d < dim; d += 16)
                    store(result + (q + r) * width + d, load(room.out + r * dim + d));
        }
        for (int64_t t = 0; t < length; ++t)
            for (int64_t d = 0; d < dim; d += 16) {
                store(result + t * width + hidden + d, load(room.grad_key + t * dim + d));
                store(result + t * width + 2 * hidden + d, load(room.grad_value + t * dim + d));
            }
    });
}

// --- what `<s>` gathers --------------------------------------------------------------------------

constexpr int64_t LANES = 32;  // heads a row of weights has place for

struct FirstRoom {
    int64_t longest, hidden, heads;
    bool back;
    float *states, *asked, *asked_columns, *scores;
    float *grad, *grad_columns, *grad_scores, *kept, *out;

    void cut(Cutter &cutter) {
        cutter(states, longest * hidden);
        cutter(asked, LANES * hidden);
        cutter(asked_columns, LANES * hidden);
        cutter(scores, longest * LANES);
        cutter(out, ROWS * hidden);
        if (!back) return;
        cutter(grad, LANES * hidden);
        cutter(grad_columns, LANES * hidden);
        cutter(grad_scores, longest * LANES);
        cutter(kept, longest * LANES);
    }
};

// (A, H) rows of heads, `apart` from each other, and as columns (H, 32).
template <class T>
void take_heads(const T *from, int64_t apart, int64_t heads, int64_t hidden, float *rows,
                float *columns) {
    for (int64_t head = 0; head < heads; ++head)
        take_rows(from + head * apart, 0, 1, hidden, rows + head * hidden);
    for (int64_t head = 0; head < LANES; head += 16)
        for (int64_t h = 0; h < hidden; h += 16)
            transpose(rows + head * hidden + h, hidden,
                      std::clamp<int64_t>(heads - head, 0, 16), columns + h * LANES + head, LANES);
}

// (L, 32) products of states (L, H) with the columns of heads.
inline void times_heads(int64_t length, const float *states, int64_t hidden, int64_t heads,
                        const float *columns, float *to) {
    for (int64_t t = 0; t < length; t += ROWS) {
        const int64_t count = std::min(ROWS, length - t);
        const float *rows = states + t * hidden;
        if (heads > 16)
            tiles<float, 2>(count, rows, hidden, 1, columns, LANES, hidden, to + t * LANES, LANES, false);
        else
            tiles<float, 1>(count, rows, hidden, 1, columns, LANES, hidden, to + t * LANES, LANES, false);
    }
}

// Of every head the sum of states (L, H) under its weights (L, 32), to rows that lie `apart`.
template <class T>
void sum_states(int64_t length, const float *weights, int64_t heads, const float *states,
                int64_t hidden, float *out, T *to, int64_t apart) {
    for (int64_t head = 0; head < heads; head += ROWS) {
        const int64_t count = std::min(ROWS, heads - head);
        for (int64_t h = 0; h < hidden; h += PANEL)
            tiles<float, 2>(count, weights + head, 1, LANES, states + h, hidden, length, out + h,
                            hidden, false);
        for (int64_t r = 0; r < count; ++r)
            for (int64_t h = 0; h < hidden; h += 16)
                store(to + (head + r) * apart + h, load(out + r * hidden + h));
    }
}

// Sums (A, B, H) of each sequence's states (T, H) under the softmax of their products with what each
// head of its `<s>` asks for, (A, B, H). Weights (T, 32) are before dropout, `mass` (A, B) their sums
// after it.
template <class T>
void gather(const Sequences &sequences, int64_t hidden, int64_t heads, const T *asked,
            const T *states, const Dropout &dropout, float *weights, T *summed, float *mass,
            int64_t threads) {
    const int64_t apart = sequences.number * hidden;
    const FirstRoom shape{sequences.longest(), hidden, heads, false};
    share_out(sequences.number, threads, shape, [&](int64_t s, FirstRoom &room) {
        const int64_t start = sequences.starts[s], length = sequences.starts[s + 1] - start;
        take_rows(states + start * hidden, hidden, length, hidden, room.states);
        take_heads(asked + s * hidden, apart, heads, hidden, room.asked, room.asked_columns);
        times_heads(length, room.states, hidden, heads, room.asked_columns, room.scores);
        for (int64_t half = 0; half < heads; half += 16) {
            float *scores = room.scores + half, *to = weights + start * LANES + half;
            __m512 top = load(scores), total = _mm512_setzero_ps(), left = _mm512_setzero_ps();
            for (int64_t t = 1; t < length; ++t) top = _mm512_max_ps(top, load(scores + t * LANES));
            for (int64_t t = 0; t < length; ++t) {
                const __m512 x = exponential(_mm512_sub_ps(load(scores + t * LANES), top));
                store(to + t * LANES, x);
                total = _mm512_add_ps(total, x);
            }
            const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), total);
            for (int64_t t = 0; t < length; ++t) {
                const __m512 weight = _mm512_mul_ps(load(to + t * LANES), inverse);
                store(to + t * LANES, weight);
                const __m512 kept = Kept(dropout, start + t)(half, weight);
                store(scores + t * LANES, kept);
                left = _mm512_add_ps(left, kept);
            }
            alignas(64) float sums[16];
            store(sums, left);
            for (int64_t head = half; head < std::min(heads, half + 16); ++head)
                mass[head * sequences.number + s] = sums[head - half];
        }
        sum_states(length, room.scores, heads, room.states, hidden, room.out, summed + s * hidden,
                   apart);
    });
}

template <class T>
void gather_back(const Sequences &sequences, int64_t hidden, int64_t heads, const T *asked,
                 const T *states, const float *weights, const T *grad_summed, const float *grad_mass,
                 const Dropout &dropout, T *grad_asked, T *grad_states, int64_t threads) {
    const int64_t apart = sequences.number * hidden;
    const FirstRoom shape{sequences.longest(), hidden, heads, true};
    share_out(sequences.number, threads, shape, [&](int64_t s, FirstRoom &room) {
        const int64_t start = sequences.starts[s], length = sequences.starts[s + 1] - start;
        take_rows(states + start * hidden, hidden, length, hidden, room.states);
        take_heads(asked + s * hidden, apart, heads, hidden, room.asked, room.asked_columns);
        take_heads(grad_summed + s * hidden, apart, heads, hidden, room.grad, room.grad_columns);
        times_heads(length, room.states, hidden, heads, room.grad_columns, room.grad_scores);
        for (int64_t half = 0; half < heads; half += 16) {
            const float *own = weights + start * LANES + half;
            float *to = room.grad_scores + half, *after = room.kept + half;
            alignas(64) float sums[16] = {};
            for (int64_t head = half; head < std::min(heads, half + 16); ++head)
                sums[head - half] = grad_mass[head * sequences.number + s];
            __m512 mean = _mm512_setzero_ps();
            for (int64_t t = 0; t < length; ++t) {
                const Kept kept(dropout, start + t);
                const __m512 weight = load(own + t * LANES);
                const __m512 given = kept(half, _mm512_add_ps(load(to + t * LANES), load(sums)));
                store(to + t * LANES, given);
                store(after + t * LANES, kept(half, weight));
                mean = _mm512_fmadd_ps(weight, given, mean);
            }
            for (int64_t t = 0; t < length; ++t) {
                const __m512 given = _mm512_sub_ps(load(to + t * LANES), mean);
                store(to + t * LANES, _mm512_mul_ps(load(own + t * LANES), given));
            }
        }
        sum_states(length, room.grad_scores, heads, room.states, hidden, room.out,
                   grad_asked + s * hidden, apart);
        for (int64_t t = 0; t < length; t += ROWS) {
            const int64_t count = std::min(ROWS, length - t);
            for (int64_t h = 0; h < hidden; h += PANEL) {
                tiles<float, 2>(count, room.grad_scores + t * LANES, LANES, 1, room.asked + h, hidden,
                                heads, room.out + h, hidden, false);
                tiles<float, 2>(count, room.kept + t * LANES, LANES, 1, room.grad + h, hidden, heads,
                                room.out + h, hidden, true);
            }
            for (int64_t r = 0; r < count; ++r)
                for (int64_t h = 0; h < hidden; h += 16)
                    store(grad_states + (start + t + r) * hidden + h, load(room.out + r * hidden + h));
        }
    });
}

}  // namespace
