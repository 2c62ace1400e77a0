// Parts of a layer that trains, forward and backward: what lies between its products, but for attention.
// What fused.py calls.
//
// Every number is computed by one thread, whichever, and sums over rows go over blocks of rows that do
// not depend on the threads: neither do the gradients.
//
// T tokens, B sequences, L tokens of a sequence, H hidden, A heads, D = H / A.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "crews.h"
#include "numbers.h"
#include "threads.h"

namespace {

constexpr int64_t ROWS_A_SUM = 128;  // summed one after the other, before the blocks' sums are

// --- dropout -------------------------------------------------------------------------------------

// Each number's 16 random bits come from its row and column: none are kept for the way back.
struct Dropout {
    uint64_t seed = 0;
    int64_t dropped = 0;  // of the 65,536 values of 16 bits, the first so many

    float scale() const { return 65536.0f / float(65536 - dropped); }
};

inline uint64_t mixed(uint64_t x) {  // splitmix64
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// Which numbers of a row stay.
class Kept {
  public:
    Kept(const Dropout &dropout, int64_t row)
        : all(dropout.dropped == 0), scale(_mm512_set1_ps(dropout.scale())),
          least(_mm512_set1_epi32(int(uint32_t(dropout.dropped) << 16))) {
        const uint64_t key = mixed(dropout.seed ^ mixed(row));
        low = _mm512_set1_epi32(int(uint32_t(key)));
        high = _mm512_set1_epi32(int(uint32_t(key >> 32)));
    }

    // `values` of columns column..column+15, scaled, or zero.
    __m512 operator()(int64_t column, __m512 values) const {
        if (all) return values;
        __m512i x = _mm512_add_epi32(lanes(), _mm512_set1_epi32(int(column)));
        x = _mm512_add_epi32(_mm512_mullo_epi32(x, _mm512_set1_epi32(int(0x9e3779b1u))), low);
        x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
        x = _mm512_xor_si512(_mm512_mullo_epi32(x, _mm512_set1_epi32(int(0x85ebca6bu))), high);
        x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 13));
        x = _mm512_mullo_epi32(x, _mm512_set1_epi32(int(0xc2b2ae35u)));
        x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
        return _mm512_maskz_mul_ps(_mm512_cmpge_epu32_mask(x, least), values, scale);
    }

  private:
    bool all;
    __m512 scale;
    __m512i least, low, high;
};

// --- threads -------------------------------------------------------------------------------------

// Calls work(n, room) for every n below `count`, each by one thread with a room of its own.
template <class Room, class Work>
void share_out(int64_t count, int64_t threads, const Room &shape, Work work) {
    std::vector<Room> rooms(std::max<int64_t>(1, std::min(threads, count)), shape);
    std::vector<std::unique_ptr<Memory>> memory;
    for (Room &room : rooms) {
        Cutter size(nullptr);
        room.cut(size);
        memory.push_back(std::make_unique<Memory>(size.bytes));
        Cutter cutter(memory.back()->get());
        room.cut(cutter);
    }
    std::atomic<int64_t> next{0};
    auto run = [&](int64_t room) {
        for (int64_t n; (n = next++) < count;) work(n, rooms[room]);
    };
    if (!at_once(rooms.size(), threads, run)) run(0);
}

// `rows` in blocks, each with a row of `width` sums; the sums of all blocks into `sums`.
template <class Room, class Work>
void share_rows(int64_t rows, int64_t width, float *sums, int64_t threads, const Room &shape,
                Work work) {
    const int64_t blocks = (rows + ROWS_A_SUM - 1) / ROWS_A_SUM;
    std::vector<float> partial(blocks * width);
    share_out(blocks, threads, shape, [&](int64_t block, Room &room) {
        const int64_t from = block * ROWS_A_SUM;
        work(from, std::min(rows, from + ROWS_A_SUM), partial.data() + block * width, room);
    });
    for (int64_t w = 0; w < width; w += 16) {
        __m512 total = _mm512_setzero_ps();
        for (int64_t block = 0; block < blocks; ++block)
            total = _mm512_add_ps(total, load(partial.data() + block * width + w));
        store(sums + w, total);
    }
}

inline void add_to(float *sum, __m512 value) { store(sum, _mm512_add_ps(load(sum), value)); }

struct NoRoom {
    void cut(Cutter &) {}
};

// --- bias, dropout, residual and LayerNorm -------------------------------------------------------

struct RowRoom {
    int64_t hidden;
    float *row, *unit;

    void cut(Cutter &cutter) {
        cutter(row, hidden);
        cutter(unit, hidden);
    }
};

// LayerNorm of residual + dropout(x + bias): (T, H) `y`. `sums` and their (T, 2) means and inverse
// deviations are for the way back; `bias` may be null.
template <class T>
void norm(int64_t rows, int64_t hidden, const T *x, const float *bias, const T *residual,
          const float *weight, const float *shift, double eps, const Dropout &dropout, T *sums, T *y,
          float *stats, int64_t threads) {
    const int64_t blocks = (rows + ROWS_A_SUM - 1) / ROWS_A_SUM;
    share_out(blocks, threads, RowRoom{hidden}, [&](int64_t block, RowRoom &room) {
        float *row = room.row;
        for (int64_t r = block * ROWS_A_SUM; r < std::min(rows, (block + 1) * ROWS_A_SUM); ++r) {
            const Kept kept(dropout, r);
            const int64_t at = r * hidden;
            __m512 total = _mm512_setzero_ps();
            for (int64_t h = 0; h < hidden; h += 16) {
                __m512 value = load(x + at + h);
                if (bias) value = _mm512_add_ps(value, load(bias + h));
                value = _mm512_add_ps(load(residual + at + h), kept(h, value));
                store(sums + at + h, value);
                store(row + h, value);
                total = _mm512_add_ps(total, value);
            }
            const float mean = _mm512_reduce_add_ps(total) / hidden;
            total = _mm512_setzero_ps();
            for (int64_t h = 0; h < hidden; h += 16) {
                const __m512 away = _mm512_sub_ps(load(row + h), _mm512_set1_ps(mean));
                total = _mm512_fmadd_ps(away, away, total);
            }
            const double variance = _mm512_reduce_add_ps(total) / hidden;
            const float factor = float(1.0 / std::sqrt(variance + eps));
            for (int64_t h = 0; h < hidden; h += 16) {
                const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(load(row + h), _mm512_set1_ps(mean)),
                                                  _mm512_set1_ps(factor));
                store(y + at + h, _mm512_fmadd_ps(unit, load(weight + h), load(shift + h)));
            }
            stats[2 * r] = mean;
            stats[2 * r + 1] = factor;
        }
    });
}

// Gradients of residual and x (one array if nothing was dropped), and (3, H) of weight, shift, bias.
template <class T>
void norm_back(int64_t rows, int64_t hidden, const T *grad, const T *sums, const float *stats,
               const float *weight, const Dropout &dropout, T *grad_residual, T *grad_x, float *grads,
               int64_t threads) {
    auto work = [&](int64_t from, int64_t to, float *own, RowRoom &room) {
        for (int64_t r = from; r < to; ++r) {
            const Kept kept(dropout, r);
            const int64_t at = r * hidden;
            const __m512 mean = _mm512_set1_ps(stats[2 * r]), factor = _mm512_set1_ps(stats[2 * r + 1]);
            __m512 total = _mm512_setzero_ps(), along = _mm512_setzero_ps();
            for (int64_t h = 0; h < hidden; h += 16) {
                const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(load(sums + at + h), mean), factor);
                const __m512 given = load(grad + at + h);
                add_to(own + h, _mm512_mul_ps(given, unit));
                add_to(own + hidden + h, given);
                const __m512 inner = _mm512_mul_ps(given, load(weight + h));
                store(room.unit + h, unit);
                store(room.row + h, inner);
                total = _mm512_add_ps(total, inner);
                along = _mm512_fmadd_ps(inner, unit, along);
            }
            const __m512 level = _mm512_set1_ps(_mm512_reduce_add_ps(total) / hidden);
            const __m512 slope = _mm512_set1_ps(_mm512_reduce_add_ps(along) / hidden);
            for (int64_t h = 0; h < hidden; h += 16) {
                __m512 left = _mm512_sub_ps(load(room.row + h), level);
                left = _mm512_fnmadd_ps(load(room.unit + h), slope, left);
                left = _mm512_mul_ps(left, factor);
                store(grad_residual + at + h, left);
                left = kept(h, left);
                if (grad_x != grad_residual) store(grad_x + at + h, left);
                add_to(own + 2 * hidden + h, left);
            }
        }
    };
    share_rows(rows, 3 * hidden, grads, threads, RowRoom{hidden}, work);
}

// --- bias and GELU -------------------------------------------------------------------------------

template <class T>
void bias_gelu(int64_t rows, int64_t width, const T *x, const float *bias, T *y, int64_t threads) {
    const int64_t blocks = (rows + ROWS_A_SUM - 1) / ROWS_A_SUM;
    share_out(blocks, threads, NoRoom(), [&](int64_t block, NoRoom &) {
        for (int64_t r = block * ROWS_A_SUM; r < std::min(rows, (block + 1) * ROWS_A_SUM); ++r)
            for (int64_t w = 0; w < width; w += 16)
                store(y + r * width + w,
                      gelu(_mm512_add_ps(load(x + r * width + w), load(bias + w))));
    });
}

template <class T>
void bias_gelu_back(int64_t rows, int64_t width, const T *x, const float *bias, const T *grad,
                    T *grad_x, float *grad_bias, int64_t threads) {
    auto work = [&](int64_t from, int64_t to, float *own, NoRoom &) {
        for (int64_t r = from; r < to; ++r)
            for (int64_t w = 0; w < width; w += 16) {
                const int64_t at = r * width + w;
                const __m512 slope = gelu_slope(_mm512_add_ps(load(x + at), load(bias + w)));
                const __m512 left = _mm512_mul_ps(load(grad + at), slope);
                store(grad_x + at, left);
                add_to(own + w, left);
            }
    };
    share_rows(rows, width, grad_bias, threads, NoRoom(), work);
}

}  // namespace
