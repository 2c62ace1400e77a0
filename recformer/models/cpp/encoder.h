// The layers of one chunk of sequences, and all chunks of a batch.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention.h"
#include "crews.h"
#include "model.h"
#include "numbers.h"
#include "products.h"
#include "stages.h"
#include "threads.h"

namespace {

constexpr int64_t INNER = 768 << 10;  // bytes of inner states of the feed-forward held at once
constexpr int64_t LEAST_TOKENS = 24;  // a thread
constexpr int64_t FIRST = 1, MEAN_AS_PUBLISHED = 3;  // of `pooling`
constexpr double MOST_WAITING = 1.2;  // busiest thread to mean, above which all share each chunk

struct Range {
    int64_t from, to;
};

// What a crew's threads read of each other.
template <class T>
struct Common {
    T *states, *context, *first_query, *first_key, *summed;
    Plain<T> *qkv;
    float *first_scores;

    void cut(const Model &model, const Chunks &chunks, Cutter &cutter) {
        const int64_t tokens = chunks.tokens + MOST_ROWS, sequences = chunks.sequences + MOST_ROWS;
        const int64_t hidden = model.hidden;
        cutter(states, tokens * (hidden + PAD));
        cutter(context, tokens * (hidden + PAD));
        cutter(qkv, tokens * (3 * hidden + PAD));
        cutter(first_query, sequences * (hidden + PAD));
        cutter(first_key, sequences * hidden * PANEL);
        cutter(first_scores, tokens * PANEL);
        cutter(summed, sequences * model.heads * hidden);
    }
};

// One of a crew: its rows, heads or columns of all that is computed of a chunk.
template <class T>
class Worker {
  public:
    Worker(const Model &model, const Batch &batch, const Chunks &chunks, Crew &crew, int64_t rank,
           const Common<T> &common)
        : model(model), batch(batch), crew(crew), rank(rank), hidden(model.hidden),
          heads(model.heads), dim(model.hidden / model.heads), wide(model.hidden + PAD),
          states(common.states), context(common.context), first_query(common.first_query),
          first_key(common.first_key), summed(common.summed), qkv(common.qkv),
          first_scores(common.first_scores), one_head(model) {
        const int64_t most = crew.size == 1 ? chunks.tokens
                                            : (chunks.tokens / crew.size / STEP + 2) * STEP;
        longest = chunks.longest;
        padded = (longest + MOST_ROWS + 15) / 16 * 16;
        const int64_t bytes = most * model.inner * int64_t(sizeof(T));
        const int64_t pieces = std::max<int64_t>(1, (bytes + INNER - 1) / INNER);
        piece = (model.inner / PANEL + pieces - 1) / pieces * PANEL;
        Cutter size(nullptr);
        cut(size, most + MOST_ROWS, chunks.sequences + MOST_ROWS);
        memory = std::make_unique<Memory>(size.bytes);
        Cutter cutter(memory->get());
        cut(cutter, most + MOST_ROWS, chunks.sequences + MOST_ROWS);
    }

    void chunk(int64_t from, int64_t to) {
        first_sequence = from;
        num_sequences = to - from;
        const int64_t *starts = batch.starts + from;
        first_token = starts[0];
        const Range rows = share(starts[num_sequences] - first_token, STEP);
        crew.meet();  // the chunk before is done
        if (rank == 0) std::fill_n(first_key, num_sequences * hidden * PANEL, T{});
        embed(rows);
        for (int64_t number = 0; number < model.layers; ++number) {
            const Layer &layer = model.layer[number];
            const bool firsts_only = batch.pooling == FIRST && number == model.layers - 1;
            crew.meet();  // all states are there
            if (!firsts_only) project(layer, rows);
            ask_for_first(layer);
            crew.meet();  // queries, keys and values are
            if (!firsts_only) attend(layer);
            score_for_first(rows);
            crew.meet();  // scores are
            for (int64_t s = 0; s < num_sequences; ++s) gather_for_first(s);
            crew.meet();  // sums are
            value_of_first(layer, firsts_only);
            crew.meet();  // contexts are
            if (!firsts_only)
                feed_forward(layer, rows.to - rows.from, context + rows.from * wide,
                             states + rows.from * wide);
        }
        auto *result = static_cast<Plain<T> *>(batch.result);
        if (batch.pooling == FIRST) {
            const Range own = share(num_sequences, 1);
            feed_forward(model.layer[model.layers - 1], own.to - own.from,
                         context + own.from * wide, firsts + own.from * wide);
            for (int64_t s = own.from; s < own.to; ++s)
                copy_row(result + (first_sequence + s) * hidden, firsts + s * wide);
        } else if (batch.pooling) {
            crew.meet();  // all states are there
            for (int64_t s = 0; s < num_sequences; ++s)
                average(s, result + (first_sequence + s) * hidden);
        } else {
            for (int64_t t = rows.from; t < rows.to; ++t)
                copy_row(result + (first_token + t) * hidden, states + t * wide);
        }
    }

  private:
    static constexpr int64_t STEP = sizeof(T) == 4 ? ROWS : 16;  // rows are shared in such steps

    void cut(Cutter &cutter, int64_t rows, int64_t sequences) {
        cutter(middle, rows * wide);
        cutter(inner, rows * (piece + PAD));
        cutter(sums, rows * hidden);
        one_head.cut(cutter, longest);
        cutter(firsts, sequences * wide);
        cutter(asked, sequences * heads * hidden);
        cutter(first_weights, padded * PANEL);
        cutter(first_states, padded * PANEL);
        cutter(first_sums, ROWS * PANEL);
    }

    // This thread's part of so many, in multiples of `step`.
    Range share(int64_t count, int64_t step) const {
        const int64_t units = (count + step - 1) / step;
        return {units * rank / crew.size * step,
                std::min(count, units * (rank + 1) / crew.size * step)};
    }

    // Those of the rows that are of sequence s.
    Range within(Range rows, int64_t s) const {
        return {std::max(rows.from, start(s)), std::min(rows.to, start(s + 1))};
    }

    template <class N>
    void copy_row(N *to, const T *from) const {
        if constexpr (std::is_same_v<N, T>)
            std::copy(from, from + hidden, to);
        else
            for (int64_t h = 0; h < hidden; h += 16) put(to, h, get(from, h));
    }
    int64_t start(int64_t s) const { return batch.starts[first_sequence + s] - first_token; }

    // Mean of a sequence's states, of this thread's columns; as published `<s>` weighs 2 of L + 1.
    void average(int64_t s, Plain<T> *to) const {
        const Range own = share(hidden, 16);
        const int64_t length = start(s + 1) - start(s);
        const T *rows = states + start(s) * wide;
        for (int64_t h = own.from; h < own.to; h += 16) {
            __m512 total = get(rows, h);
            for (int64_t t = 1; t < length; ++t)
                total = _mm512_add_ps(total, get(rows + t * wide, h));
            float count = float(length);
            if (batch.pooling == MEAN_AS_PUBLISHED) {
                total = _mm512_add_ps(total, get(rows, h));
                count += 1.0f;
            }
            store(to + h, _mm512_div_ps(total, _mm512_set1_ps(count)));
        }
    }

    // LayerNorm of a row of H numbers, changed on the way, into `to`.
    void normalise(float *row, const float *weight, const float *shift, T *to) const {
        __m512 total = _mm512_setzero_ps();
        for (int64_t h = 0; h < hidden; h += 16) total = _mm512_add_ps(total, load(row + h));
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / hidden);
        total = _mm512_setzero_ps();
        for (int64_t h = 0; h < hidden; h += 16) {
            const __m512 away = _mm512_sub_ps(load(row + h), mean);
            total = _mm512_fmadd_ps(away, away, total);
        }
        const double variance = _mm512_reduce_add_ps(total) / hidden;
        const __m512 factor = _mm512_set1_ps(float(1.0 / std::sqrt(variance + model.eps)));
        for (int64_t h = 0; h < hidden; h += 16) {
            const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(load(row + h), mean), factor);
            put(to, h, _mm512_fmadd_ps(unit, load(weight + h), load(shift + h)));
        }
    }

    template <class N>
    void add_rows(int64_t token, int64_t place, float *row) const {
        for (int table = 0; table < 4; ++table) {
            const int64_t id = batch.ids[table] ? batch.ids[table][token]
                                                : place + model.first_position;
            const N *from = static_cast<const N *>(model.tables[table]) + id * hidden;
            for (int64_t h = 0; h < hidden; h += 16)
                store(row + h, table ? _mm512_add_ps(load(row + h), load(from + h)) : load(from + h));
        }
    }

    void embed(Range rows) {
        COUNTED(EMBEDDINGS);
        for (int64_t s = 0; s < num_sequences; ++s) {
            const Range own = within(rows, s);
            for (int64_t t = own.from; t < own.to; ++t) {
                if (model.tables_are_bf16)
                    add_rows<bf16>(first_token + t, t - start(s), sums);
                else
                    add_rows<float>(first_token + t, t - start(s), sums);
                normalise(sums, model.norm, model.shift, states + t * wide);
            }
        }
    }

    // Queries, keys and values of the rows.
    void project(const Layer &layer, Range rows) {
        const int64_t width = 3 * hidden + PAD;
        const float *bias = layer.qkv.bias;
        Plain<T> *to = qkv + rows.from * width;
        product<T>(rows.to - rows.from, states + rows.from * wide, wide, layer.qkv.weight,
                   3 * hidden, hidden, COPIES, [=](int64_t m, int64_t n, const float *c) {
                       Plain<T> *at = to + m * width + n;
                       store(at, _mm512_add_ps(load(c), load(bias + n)));
                       store(at + 16, _mm512_add_ps(load(c + 16), load(bias + n + 16)));
                   });
    }

    // Attention within the window and to `<s>`, of all tokens: `context`.
    void attend(const Layer &layer) {
        const int64_t width = 3 * hidden + PAD;
        for (int64_t task = rank; task < num_sequences * heads; task += crew.size) {
            const int64_t s = task / heads, head = task % heads;
            one_head.attend(qkv + start(s) * width + head * dim, width, start(s + 1) - start(s),
                            layer.half, context + start(s) * wide + head * dim);
        }
    }

    // What `<s>` of each sequence asks for, of this thread's heads: (H, heads) `first_key`.
    void ask_for_first(const Layer &layer) {
        COUNTED(FIRSTS);
        for (int64_t s = 0; s < num_sequences; ++s)
            copy_row(firsts + s * wide, states + start(s) * wide);
        const Range own = share(heads, 1);
        const float scale = 1.0f / std::sqrt(float(dim));
        const int64_t ld = wide, begin = own.from * dim;
        T *queries = first_query + begin;
        const float *bias = layer.first_query.bias + begin;
        product<T>(num_sequences, firsts, wide,
                   static_cast<const T *>(layer.first_query.weight) + begin * hidden,
                   (own.to - own.from) * dim, hidden, FIRSTS, [=](int64_t m, int64_t n, const float *c) {
                       for (int64_t j = 0; j < PANEL; j += 16)
                           put(queries + m * ld + n, j,
                               _mm512_mul_ps(_mm512_add_ps(load(c + j), load(bias + n + j)),
                                             _mm512_set1_ps(scale)));
                   });
        for (int64_t head = own.from; head < own.to; ++head) {
            float *to = asked + head * hidden;
            const int64_t size = heads * hidden;
            product<T>(num_sequences, first_query + head * dim, wide,
                       static_cast<const T *>(layer.first_key.weight) + head * dim * hidden, hidden,
                       dim, FIRSTS, [=](int64_t m, int64_t n, const float *c) {
                           std::copy(c, c + PANEL, to + m * size + n);
                       });
        }
        for (int64_t s = 0; s < num_sequences; ++s)
            for (int64_t head = own.from / 16 * 16; head < own.to; head += 16)
                for (int64_t h = 0; h < hidden; h += 32)
                    set_keys(s, head, own, h);
    }

    // Inputs h..h+31 of 16 outputs of a sequence's `first_key`, from the rows of `asked` in `own`.
    void set_keys(int64_t s, int64_t head, Range own, int64_t h) {
        alignas(64) float columns[32 * 16];
        const int64_t low = std::max(head, own.from) - head, high = std::min(head + 16, own.to) - head;
        for (int64_t half = 0; half < 32; half += 16)
            transpose(asked + (s * heads + head) * hidden + h + half, hidden, high,
                      columns + half * 16, 16);
        const __mmask16 mask = ((1 << high) - 1) & ~((1 << low) - 1);
        T *panel = first_key + (s * hidden + h) * PANEL;
        if constexpr (sizeof(T) == 4) {
            for (int64_t k = 0; k < 32; ++k)
                _mm512_mask_storeu_ps(panel + k * PANEL + head, mask, load(columns + k * 16));
        } else {
            uint32_t *to = reinterpret_cast<uint32_t *>(panel) + head;  // pairs of bfloat16
            constexpr int parts = sizeof(T) / 2;
            for (int64_t k = 0; k < 32; k += 2, to += PANEL) {
                __m512 left = load(columns + k * 16), right = load(columns + k * 16 + 16);
                for (int part = 0; part < parts; ++part) {
                    const __m512i high_bits = _mm512_set1_epi32(0xffff0000);
                    const __m512i first = _mm512_and_si512(rounded(left), high_bits);
                    const __m512i second = _mm512_and_si512(rounded(right), high_bits);
                    _mm512_mask_storeu_epi32(to + part * 16 * PANEL, mask,
                                             _mm512_or_si512(_mm512_srli_epi32(first, 16), second));
                    left = _mm512_sub_ps(left, _mm512_castsi512_ps(first));
                    right = _mm512_sub_ps(right, _mm512_castsi512_ps(second));
                }
            }
        }
    }

    // Scores that `<s>` gives the rows: (T, heads) `first_scores`.
    void score_for_first(Range rows) {
        COUNTED(FIRSTS);
        for (int64_t s = 0; s < num_sequences; ++s) {
            const Range own = within(rows, s);
            if (own.from >= own.to) continue;
            float *scored = first_scores + own.from * PANEL;
            product<T>(own.to - own.from, states + own.from * wide, wide,
                       first_key + s * hidden * PANEL, PANEL, hidden, FIRSTS,
                       [=](int64_t m, int64_t, const float *c) {
                           std::copy(c, c + PANEL, scored + m * PANEL);
                       });
        }
    }

    // Means of a sequence's states under the softmax of each head: this thread's columns of `summed`.
    void gather_for_first(int64_t s) {
        COUNTED(FIRSTS);
        const Range own = share(hidden, PANEL);
        if (own.from >= own.to) return;
        const int64_t length = start(s + 1) - start(s);
        const float *scored = first_scores + start(s) * PANEL;
        for (int64_t half = 0; half < heads; half += 16) {
            __m512 top = load(scored + half), total = _mm512_setzero_ps();
            for (int64_t t = 1; t < length; ++t)
                top = _mm512_max_ps(top, load(scored + t * PANEL + half));
            float *to = first_weights + half;
            for (int64_t t = 0; t < length; ++t) {
                const __m512 x = exponential(_mm512_sub_ps(load(scored + t * PANEL + half), top));
                store(to + t * PANEL, x);
                total = _mm512_add_ps(total, x);
            }
            const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), total);
            for (int64_t t = 0; t < length; ++t)
                store(to + t * PANEL, _mm512_mul_ps(load(to + t * PANEL), inverse));
        }
        const T *rows = states + start(s) * wide;
        for (int64_t h = own.from; h < own.to; h += PANEL) {
            const float *columns = first_states;
            int64_t line = PANEL;
            if constexpr (std::is_same_v<T, float>) {
                columns = rows + h;
                line = wide;
            } else {
                for (int64_t t = 0; t < length; ++t)
                    for (int64_t j = 0; j < PANEL; j += 16)
                        store(first_states + t * PANEL + j, get(rows + t * wide + h, j));
            }
            for (int64_t head = 0; head < heads; head += ROWS) {
                const int64_t count = std::min(ROWS, heads - head);
                tiles<float, 2>(count, first_weights + head, 1, PANEL, columns, line, length,
                                first_sums, PANEL, false);
                for (int64_t r = 0; r < count; ++r)
                    for (int64_t j = 0; j < PANEL; j += 16)
                        put(summed + (s * heads + head + r) * hidden + h, j,
                            load(first_sums + r * PANEL + j));
            }
        }
    }

    // Values of the sums, of this thread's heads: rows of `context`, of the sequences' first tokens,
    // or one a sequence.
    void value_of_first(const Layer &layer, bool firsts_only) {
        COUNTED(FIRSTS);
        const float *shift = layer.first_value.bias;
        const Range own = share(heads, 1);
        for (int64_t head = own.from; head < own.to; ++head)
            product<T>(num_sequences, summed + head * hidden, heads * hidden,
                       static_cast<const T *>(layer.first_value.weight) + head * dim * hidden, dim,
                       hidden, FIRSTS, [=, this](int64_t m, int64_t n, const float *c) {
                           T *at = context + (firsts_only ? m : start(m)) * wide + head * dim + n;
                           const float *b = shift + head * dim + n;
                           put(at, 0, _mm512_add_ps(load(c), load(b)));
                           put(at, 16, _mm512_add_ps(load(c + 16), load(b + 16)));
                       });
    }

    // From contexts and states of so many rows to their states after the layer.
    void feed_forward(const Layer &layer, int64_t rows, const T *contexts, T *before) {
        into_sums(rows, contexts, wide, layer.out.weight, hidden, hidden, false);
        finish(rows, layer.out.bias, before, layer.attention_norm, layer.attention_shift, middle);
        const int64_t ld = piece + PAD;
        for (int64_t from = 0; from < model.inner; from += piece) {
            const int64_t size = std::min(piece, model.inner - from);
            const float *bias = layer.inner.bias + from;
            T *to = inner;
            product<T>(rows, middle, wide,
                       static_cast<const T *>(layer.inner.weight) + from * hidden, size, hidden, GELU,
                       [=](int64_t m, int64_t n, const float *c) {
                           T *at = to + m * ld + n;
                           put(at, 0, gelu(_mm512_add_ps(load(c), load(bias + n))));
                           put(at, 16, gelu(_mm512_add_ps(load(c + 16), load(bias + n + 16))));
                       });
            into_sums(rows, inner, ld,
                      static_cast<const T *>(layer.outer.weight) + from * PANEL, size, model.inner,
                      from > 0);
        }
        finish(rows, layer.outer.bias, middle, layer.output_norm, layer.output_shift,
               before);
    }

    // Products with the first `size` of `inputs` inputs of H outputs, in or onto `sums`.
    void into_sums(int64_t rows, const T *a, int64_t row, const void *weight, int64_t size,
                   int64_t inputs, bool add) {
        const T *b = static_cast<const T *>(weight);
        const int64_t step = rows_a_block<T>();
        for (int64_t n = 0; n < hidden; n += PANEL, b += inputs * PANEL)
            for (int64_t m = 0; m < rows; m += step)
                block(std::min(step, rows - m), a + m * row, row, b, size,
                      sums + m * hidden + n, hidden, add);
    }

    // Bias and residual to `sums`, and LayerNorm of them.
    void finish(int64_t rows, const float *bias, const T *residual, const float *weight,
                const float *shift, T *to) {
        COUNTED(NORM);
        for (int64_t r = 0; r < rows; ++r) {
            float *row = sums + r * hidden;
            for (int64_t h = 0; h < hidden; h += 16)
                store(row + h, _mm512_add_ps(_mm512_add_ps(load(row + h), load(bias + h)),
                                             get(residual + r * wide, h)));
            normalise(row, weight, shift, to + r * wide);
        }
    }

    const Model &model;
    const Batch &batch;
    Crew &crew;
    const int64_t rank, hidden, heads, dim, wide;
    int64_t longest, padded, piece, first_sequence = 0, num_sequences = 0, first_token = 0;
    T *const states, *const context, *const first_query, *const first_key, *const summed;
    Plain<T> *const qkv;
    float *const first_scores;
    T *middle, *inner, *firsts;
    float *sums;
    HeadAttention<T> one_head;
    float *asked, *first_weights, *first_states, *first_sums;
    std::unique_ptr<Memory> memory;
};

// All chunks, each by one thread, or by all of them if there are too few for that.
template <class T>
void encode(const Model &model, const Batch &batch, int64_t tokens, int64_t threads) {
    const int64_t of_torch = threads;
    threads = std::max<int64_t>(1, std::min(threads, tokens / LEAST_TOKENS));
    const double rounds = double(tokens) / batch.chunk_tokens / threads;
    const int64_t number = std::max<int64_t>(1, std::llround(rounds)) * threads;
    Chunks chunks(batch, (tokens + number - 1) / number);
    const bool together = chunks.most(batch, threads) * threads > MOST_WAITING * tokens;
    if (together) chunks = Chunks(batch, threads * batch.chunk_tokens);
    threads = together ? threads : std::min(threads, chunks.number());

    std::vector<std::unique_ptr<Memory>> memory;
    std::vector<Common<T>> common(together ? 1 : threads);
    for (Common<T> &each : common) {
        Cutter size(nullptr);
        each.cut(model, chunks, size);
        memory.push_back(std::make_unique<Memory>(size.bytes));
        Cutter cutter(memory.back()->get());
        each.cut(model, chunks, cutter);
    }
    std::vector<Crew> crews(common.size());
    for (Crew &crew : crews) crew.size = together ? threads : 1;
    std::vector<std::unique_ptr<Worker<T>>> workers;
    for (int64_t n = 0; n < threads; ++n)
        workers.push_back(std::make_unique<Worker<T>>(model, batch, chunks, crews[together ? 0 : n],
                                                      together ? n : 0, common[together ? 0 : n]));
    std::atomic<int64_t> next{0};
    auto run = [&](int64_t n) {
#ifdef __AMX_BF16__
        if (amx) _tile_loadconfig(&TILE_SHAPES);
#endif
#ifdef RECFORMER_TIMES
        since = __rdtsc();
#endif
        int64_t own = 0;
        for (int64_t c; (c = together ? own++ : next++) < chunks.number();)
            workers[n]->chunk(chunks.first[c], chunks.first[c + 1]);
#ifdef __AMX_BF16__
        if (amx) _tile_release();
#endif
#ifdef RECFORMER_TIMES
        enter(REST);
        for (int each = 0; each < STAGES; ++each) spent[each] += std::exchange(ticks[each], 0);
#endif
    };
    if (!at_once(threads, of_torch, run)) encode<T>(model, batch, tokens, 1);
}

}  // namespace
