// Attention of one head of one sequence, within the window and to `<s>`.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "crews.h"
#include "model.h"
#include "numbers.h"
#include "products.h"
#include "stages.h"

namespace {

constexpr int64_t PAD = 32;  // between rows of states, so that they fall on all cache sets

// Numbers that no product with weights takes.
template <class T>
using Plain = std::conditional_t<sizeof(T) == sizeof(Three), float, T>;

template <class T>
class HeadAttention {
  public:
    explicit HeadAttention(const Model &model)
        : hidden(model.hidden), dim(model.hidden / model.heads), wide(model.hidden + PAD) {}

    // Room for sequences of at most so many tokens.
    void cut(Cutter &cutter, int64_t longest) {
        const int64_t padded = (longest + MOST_ROWS + 15) / 16 * 16;
        cutter(key, dim * padded);
        cutter(values, padded * dim);
        cutter(queries, padded * dim);
        cutter(scores, 16 * (padded + 32));
        cutter(out, ROWS * dim);
    }

    // One head of one sequence of L tokens.
    void attend(const Plain<T> *rows, int64_t width, int64_t length, int64_t half, T *result) {
        COUNTED(SCORES);
        const int64_t columns = (length + 15) / 16 * 16;
        const float *query, *value;  // and between their rows:
        int64_t line_of = width;
        {
            COUNTED(COPIES);
            if constexpr (std::is_same_v<Plain<T>, float>) {
                query = rows;
                value = rows + 2 * hidden;
            } else {
                for (int64_t t = 0; t < length; ++t)
                    for (int64_t d = 0; d < dim; d += 16) {
                        if (!amx) store(queries + t * dim + d, load(rows + t * width + d));
                        store(values + t * dim + d, load(rows + t * width + 2 * hidden + d));
                    }
                query = queries;
                value = values;
                line_of = dim;
            }
            for (int64_t t = 0; t < length; t += 16) {
                const int64_t count = std::min<int64_t>(16, length - t);
                const Plain<T> *keys = rows + t * width + hidden;
                if (sizeof(T) == 2 && amx)  // pairs of bfloat16 as if they were floats
                    for (int64_t d = 0; d < dim; d += 32)
                        transpose(reinterpret_cast<const float *>(keys + d), width / 2, count,
                                  key + (d / 32 * columns + t) * 16, 16);
                else
                    for (int64_t d = 0; d < dim; d += 16)
                        transpose(keys + d, width, count, key + d * columns + t, columns);
            }
        }
        const float scale = 1.0f / std::sqrt(float(dim));
        for (int64_t q = 0; q < length; q += ROWS) {
            const int64_t count = std::min(ROWS, length - q);
            const int64_t from = std::max<int64_t>(0, q - half) / 16 * 16;
            const int64_t to = std::min(length, q + count + half);
            const int64_t span = (to - from + 15) / 16 * 16, line = span + 16;
            score(rows + q * width, width, query + q * line_of, line_of, count, columns, from, span);
            float inverse[ROWS];
            {
                COUNTED(SOFTMAX);
                for (int64_t r = 0; r < count; ++r)
                    inverse[r] = softmax(scores + r * line, from, span, q + r, half, to, scale);
            }
            for (int64_t d = 0; d < dim; d += 32) {
                tiles<float, 2>(count, scores, line, 1, value + from * line_of + d, line_of,
                                to - from, out + d, dim, false);
                if (from > 0)
                    tiles<float, 2>(count, scores + span, line, 1, value + d, line_of, 1,
                                    out + d, dim, true);
            }
            for (int64_t r = 0; r < count; ++r)
                for (int64_t d = 0; d < dim; d += 16)
                    put(result + (q + r) * wide, d,
                        _mm512_mul_ps(load(out + r * dim + d), _mm512_set1_ps(inverse[r])));
        }
    }

  private:
    // Scores of up to ROWS queries with keys from..from+span, and with `<s>` behind them.
    void score(const Plain<T> *rows, int64_t width, const float *asking, int64_t line_of,
               int64_t count, int64_t columns, int64_t from, int64_t span) {
        const int64_t line = span + 16;
#ifdef __AMX_BF16__
        if constexpr (sizeof(T) == 2)
            if (amx) {
                auto score_tile = [&](int64_t k, float *to) {  // of 16 keys
                    _tile_zero(0);
                    for (int64_t d = 0; d < dim; d += 32) {
                        _tile_loadd(4, rows + d, 2 * width);
                        _tile_loadd(6, key + (d / 32 * columns + k) * 16, 64);
                        _tile_dpbf16ps(0, 4, 6);
                    }
                    _tile_stored(0, to, 4 * line);
                };
                for (int64_t k = 0; k < span; k += 16) score_tile(from + k, scores + k);
                if (from > 0) score_tile(0, scores + span);
                return;
            }
#endif
        int64_t k = 0;
        for (; k + 32 <= span; k += 32)
            tiles<float, 2>(count, asking, line_of, 1, key + from + k, columns, dim,
                            scores + k, line, false);
        if (k < span)
            tiles<float, 1>(count, asking, line_of, 1, key + from + k, columns, dim,
                            scores + k, line, false);
        if (from > 0)
            tiles<float, 1>(count, asking, line_of, 1, key, columns, dim,
                            scores + span, line, false);
    }

    // Scores of keys from..from+span, and of `<s>` behind them, become weights up to a factor: the
    // inverse of their sum, which is returned. Key j is seen if |j - i| <= half and j < end.
    static float softmax(float *row, int64_t from, int64_t span, int64_t i, int64_t half,
                         int64_t end, float scale) {
        const __m512i low = _mm512_set1_epi32(int(std::max<int64_t>(0, i - half)));
        const __m512i high = _mm512_set1_epi32(int(std::min(end - 1, i + half)));
        const __m512 none = _mm512_set1_ps(-INFINITY);
        auto seen = [&](int64_t k) -> __mmask16 {
            const __m512i j = _mm512_add_epi32(lanes(), _mm512_set1_epi32(int(from + k)));
            const __mmask16 near = _mm512_cmp_epi32_mask(j, low, _MM_CMPINT_GE) &
                                   _mm512_cmp_epi32_mask(j, high, _MM_CMPINT_LE);
            return near | _mm512_cmp_epi32_mask(j, _mm512_setzero_si512(), _MM_CMPINT_EQ);
        };
        __m512 top = none;
        for (int64_t k = 0; k < span; k += 16)
            top = _mm512_mask_max_ps(top, seen(k), top, load(row + k));
        if (from > 0) top = _mm512_mask_max_ps(top, 1, top, load(row + span));
        const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(top));
        const __m512 factor = _mm512_set1_ps(scale);
        __m512 total = _mm512_setzero_ps();
        auto weigh = [&](float *at, __mmask16 mask) {
            __m512 x = _mm512_mul_ps(_mm512_sub_ps(load(at), most), factor);
            x = _mm512_maskz_mov_ps(mask, exponential(x));
            store(at, x);
            total = _mm512_add_ps(total, x);
        };
        for (int64_t k = 0; k < span; k += 16) weigh(row + k, seen(k));
        if (from > 0) weigh(row + span, 1);
        return 1.0f / _mm512_reduce_add_ps(total);
    }

    const int64_t hidden, dim, wide;
    float *key, *values, *queries, *scores, *out;
};

}  // namespace
