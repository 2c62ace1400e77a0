// The encoder over packed sequences on a CPU with AVX-512: what recformer/models/kernel.py loads.
//
// A thread takes a chunk of whole sequences, a few hundred tokens whose states stay in its cache,
// through all layers. What the layers compute is said in attention.py; here the sums of one token
// never depend on what else is in the batch, so a sequence has the same vector in any batch.
//
// Weights come in panels of 32 outputs: float [N / 32][K][32], or bfloat16 in pairs of inputs
// [N / 32][K / 2][32][2], as the instructions for both AVX512_BF16 and AMX want them. Sums, biases,
// LayerNorm and softmax are float.
//
// T tokens of a chunk, B sequences, L tokens of a sequence, H hidden, A heads, D = H / A.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t PANEL = 32;        // outputs a panel of weights
constexpr int64_t ROWS = 12;         // rows a tile of sums in vector registers
constexpr int64_t PAD = 32;          // between rows of states, so that they fall on all cache sets
constexpr int64_t INNER = 384 << 10; // bytes of inner states of the feed-forward held at once

struct bf16 {
    uint16_t bits;
};

struct Matrix {
    const void *weight;
    const float *bias;
};

struct Layer {
    Matrix qkv, out, inner, outer, first_query, first_key, first_value;
    const float *attention_norm, *attention_shift, *output_norm, *output_shift;
    int64_t half;
};

}  // namespace

extern "C" {

struct Model {
    int64_t hidden, inner, heads, layers, first_position, tables_are_bf16;
    double eps;
    const Layer *layer;
    const void *tables[4];  // of words, positions, token types, item positions
    int64_t rows[4];
    const float *norm, *shift;
};

struct Batch {
    int64_t sequences, chunks, first_only;
    const int64_t *ids[4];  // positions may be null: counted from first_position
    const int64_t *starts, *chunk_starts;
    void *result;
};

}  // extern "C"

namespace {

// --- numbers -------------------------------------------------------------------------------------

inline __m512 load(const float *from) { return _mm512_loadu_ps(from); }
inline __m512 load(const bf16 *from) {
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store(float *to, __m512 value) { _mm512_storeu_ps(to, value); }

inline __m512i rounded(__m512 value) {  // to the nearest bfloat16, in the upper halves
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc00000));
}
inline void store(bf16 *to, __m512 value) {
#ifdef __AVX512BF16__
    __m256i half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
#else
    __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(value), 16));
#endif
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), half);
}
inline void set(float *to, float value) { *to = value; }
inline void set(bf16 *to, float value) {
    to->bits = _mm512_cvtsi512_si32(rounded(_mm512_set1_ps(value))) >> 16;
}

inline __m512 exponential(__m512 x) {  // within 2 units of the last place; 0 below -104
    x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

inline __m512 gelu(__m512 x) {  // x / 2 (1 + erf(x / sqrt 2)); erf as a quotient of polynomials
    __m512 z = _mm512_mul_ps(x, _mm512_set1_ps(0.70710678f));
    z = _mm512_min_ps(_mm512_max_ps(z, _mm512_set1_ps(-4.0f)), _mm512_set1_ps(4.0f));
    __m512 s = _mm512_mul_ps(z, z);
    __m512 p = _mm512_set1_ps(-2.72614225801306e-10f);
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(2.77068142495902e-08f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-2.10102402082508e-06f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-5.69250639462346e-05f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-7.34990630326855e-04f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-2.95459980854025e-03f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-1.60960333262415e-02f));
    __m512 q = _mm512_set1_ps(-1.45660718464996e-05f);
    q = _mm512_fmadd_ps(q, s, _mm512_set1_ps(-2.13374055278905e-04f));
    q = _mm512_fmadd_ps(q, s, _mm512_set1_ps(-1.68282697438203e-03f));
    q = _mm512_fmadd_ps(q, s, _mm512_set1_ps(-7.37332916720468e-03f));
    q = _mm512_fmadd_ps(q, s, _mm512_set1_ps(-1.42647390514189e-02f));
    __m512 reciprocal = _mm512_rcp14_ps(q);
    __m512 correction = _mm512_fnmadd_ps(q, reciprocal, _mm512_set1_ps(2.0f));
    reciprocal = _mm512_mul_ps(reciprocal, correction);
    __m512 erf = _mm512_mul_ps(_mm512_mul_ps(z, p), reciprocal);
    __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
    return _mm512_fmadd_ps(half, erf, half);
}

// --- products ------------------------------------------------------------------------------------

// Sums of R rows and 16 C columns: step by step, a number (or a pair of bfloat16) of each row times
// C vectors. Offsets in elements: `row` between rows of a, `next` between its steps, `line` between
// those of b.
template <class T, int R, int C>
[[gnu::noinline]] void tile(const T *a, int64_t row, int64_t next, const T *b, int64_t line, int64_t steps, float *c,
          int64_t ldc, bool add) {
    __m512 sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < C; ++j)
            sum[r][j] = add ? _mm512_loadu_ps(c + r * ldc + 16 * j) : _mm512_setzero_ps();
    const T *base[(R + 3) / 4];
    for (int g = 0; g < (R + 3) / 4; ++g) base[g] = a + 4 * g * row;
    for (int64_t k = 0; k < steps; ++k) {
        __m512 column[C];
        for (int j = 0; j < C; ++j)
            column[j] = _mm512_loadu_ps(reinterpret_cast<const float *>(b) + 16 * j);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const T *at = base[r / 4] + (r % 4) * row;
            if constexpr (sizeof(T) == 4) {
                __m512 left = _mm512_set1_ps(*reinterpret_cast<const float *>(at));
                for (int j = 0; j < C; ++j) sum[r][j] = _mm512_fmadd_ps(left, column[j], sum[r][j]);
            } else {
#ifdef __AVX512BF16__
                __m512i left = _mm512_set1_epi32(*reinterpret_cast<const int32_t *>(at));
                for (int j = 0; j < C; ++j)
                    sum[r][j] = _mm512_dpbf16_ps(sum[r][j], reinterpret_cast<__m512bh>(left),
                                                 reinterpret_cast<__m512bh>(column[j]));
#endif
            }
        }
        for (int g = 0; g < (R + 3) / 4; ++g) base[g] += next;
        b += line;
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < C; ++j) _mm512_storeu_ps(c + r * ldc + 16 * j, sum[r][j]);
}

template <class T, int C>
[[gnu::noinline]] void tiles(int64_t rows, const T *a, int64_t row, int64_t next, const T *b, int64_t line,
           int64_t steps, float *c, int64_t ldc, bool add) {
    switch (rows) {
#define CASE(R) \
    case R: return tile<T, R, C>(a, row, next, b, line, steps, c, ldc, add);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}

bool amx = false;

#ifdef __AMX_BF16__

struct TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 32 rows (or 16) times a panel; rows past the last one are read and written, too.
template <bool both>
[[gnu::noinline]] void amx_tile(const bf16 *a, int64_t row, const bf16 *b, int64_t steps, float *c, int64_t ldc,
              bool add) {
    const int64_t a_bytes = 2 * row, b_bytes = 4 * PANEL, c_bytes = 4 * ldc;
    if (add) {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(1, c + 16, c_bytes);
        if (both) {
            _tile_loadd(2, c + 16 * ldc, c_bytes);
            _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < steps; k += 16, a += 32, b += 32 * PANEL) {
        _tile_loadd(4, a, a_bytes);
        _tile_loadd(6, b, b_bytes);
        _tile_loadd(7, b + PANEL, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, a + 16 * row, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
    if (both) {
        _tile_stored(2, c + 16 * ldc, c_bytes);
        _tile_stored(3, c + 16 * ldc + 16, c_bytes);
    }
}

#endif

constexpr int64_t MOST_ROWS = 32;  // of a block, and so past the last row that sums are written to

// Up to `most_rows` rows times a panel: (rows, 32) sums.
template <class T>
void block(int64_t rows, const T *a, int64_t row, const T *b, int64_t inputs, float *c, int64_t ldc,
           bool add) {
    constexpr int64_t pair = sizeof(T) == 2 ? 2 : 1;
#ifdef __AMX_BF16__
    if constexpr (sizeof(T) == 2) {
        if (amx) {
            if (rows > 16)
                amx_tile<true>(a, row, b, inputs / 2, c, ldc, add);
            else
                amx_tile<false>(a, row, b, inputs / 2, c, ldc, add);
            return;
        }
    }
#endif
    tiles<T, 2>(rows, a, row, pair, b, PANEL * pair, inputs / pair, c, ldc, add);
}

template <class T>
int64_t rows_a_block() {
    return sizeof(T) == 2 && amx ? MOST_ROWS : ROWS;
}

// (rows, 32) sums of each panel, given to sink(row, first column, 32 sums).
template <class T, class Sink>
void product(int64_t rows, const T *a, int64_t row, const void *weight, int64_t outputs,
             int64_t inputs, Sink sink) {
    alignas(64) float sums[MOST_ROWS * PANEL];
    const T *b = static_cast<const T *>(weight);
    const int64_t step = rows_a_block<T>();
    for (int64_t n = 0; n < outputs; n += PANEL, b += inputs * PANEL)
        for (int64_t m = 0; m < rows; m += step) {
            const int64_t count = std::min(step, rows - m);
            block(count, a + m * row, row, b, inputs, sums, PANEL, false);
            for (int64_t r = 0; r < count; ++r) sink(m + r, n, sums + r * PANEL);
        }
}

// --- one chunk -----------------------------------------------------------------------------------

// Memory of a thread, for chunks of at most so many tokens and sequences.
template <class T>
class Worker {
  public:
    Worker(const Model &model, const Batch &batch)
        : model(model), batch(batch), hidden(model.hidden), heads(model.heads),
          dim(model.hidden / model.heads), wide(model.hidden + PAD) {
        int64_t tokens = 0, sequences = 0, longest = 0;
        for (int64_t c = 0; c < batch.chunks; ++c) {
            const int64_t from = batch.chunk_starts[c], to = batch.chunk_starts[c + 1];
            tokens = std::max(tokens, batch.starts[to] - batch.starts[from]);
            sequences = std::max(sequences, to - from);
        }
        for (int64_t s = 0; s < batch.sequences; ++s)
            longest = std::max(longest, batch.starts[s + 1] - batch.starts[s]);
        tokens += MOST_ROWS;
        sequences += MOST_ROWS;
        longest += MOST_ROWS;
        padded = (longest + 15) / 16 * 16;
        const int64_t bytes = tokens * model.inner * int64_t(sizeof(T));
        const int64_t pieces = std::max<int64_t>(1, (bytes + INNER - 1) / INNER);
        piece = (model.inner / PANEL + pieces - 1) / pieces * PANEL;

        states = make<T>(tokens * wide);
        middle = make<T>(tokens * wide);
        context = make<T>(tokens * wide);
        qkv = make<T>(tokens * (3 * hidden + PAD));
        inner = make<T>(tokens * (piece + PAD));
        sums = make<float>(tokens * hidden);
        key = make<float>(dim * padded);
        value = make<float>(padded * dim);
        query = make<float>(padded * dim);
        scores = make<float>(ROWS * (padded + 32));
        out = make<float>(ROWS * dim);
        firsts = make<T>(sequences * wide);
        first_query = make<T>(sequences * wide);
        first_key = make<T>(sequences * hidden * PANEL);
        first_scores = make<float>(padded * PANEL + MOST_ROWS * PANEL);
        first_states = make<float>(padded * hidden);
        first_sums = make<float>(ROWS * hidden);
        summed = make<T>(sequences * heads * hidden);
    }

    void chunk(int64_t from, int64_t to) {
        first_sequence = from;
        num_sequences = to - from;
        const int64_t *starts = batch.starts + from;
        first_token = starts[0];
        num_tokens = starts[num_sequences] - first_token;
        embed();
        for (int64_t number = 0; number < model.layers; ++number) {
            const Layer &layer = model.layer[number];
            const bool firsts_only = batch.first_only && number == model.layers - 1;
            if (!firsts_only) attend(layer);
            attend_from_first(layer, firsts_only);
            if (firsts_only) {
                for (int64_t s = 0; s < num_sequences; ++s)
                    copy_row(firsts.get() + s * wide, states.get() + start(s) * wide);
                std::swap(states, firsts);  // the others are not needed any more
            }
            feed_forward(layer, firsts_only ? num_sequences : num_tokens);
            if (firsts_only) std::swap(states, firsts);
        }
        const T *source = batch.first_only ? firsts.get() : states.get();
        const int64_t rows = batch.first_only ? num_sequences : num_tokens;
        T *result = static_cast<T *>(batch.result) +
                    (batch.first_only ? first_sequence : first_token) * hidden;
        for (int64_t r = 0; r < rows; ++r) copy_row(result + r * hidden, source + r * wide);
    }

  private:
    template <class N>
    struct Free {
        void operator()(N *memory) const { std::free(memory); }
    };
    template <class N>
    using Room = std::unique_ptr<N[], Free<N>>;

    template <class N>
    static Room<N> make(int64_t count) {
        const size_t bytes = (count * sizeof(N) + 63) / 64 * 64 + 64;
        N *memory = static_cast<N *>(std::aligned_alloc(64, bytes));
        if (memory == nullptr) throw std::bad_alloc();
        return Room<N>(memory);
    }

    void copy_row(T *to, const T *from) const { std::copy(from, from + hidden, to); }
    int64_t start(int64_t s) const { return batch.starts[first_sequence + s] - first_token; }

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
            store(to + h, _mm512_fmadd_ps(unit, load(weight + h), load(shift + h)));
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

    void embed() {
        for (int64_t s = 0; s < num_sequences; ++s)
            for (int64_t t = start(s); t < start(s + 1); ++t) {
                if (model.tables_are_bf16)
                    add_rows<bf16>(first_token + t, t - start(s), sums.get());
                else
                    add_rows<float>(first_token + t, t - start(s), sums.get());
                normalise(sums.get(), model.norm, model.shift, states.get() + t * wide);
            }
    }

    // Attention within the window and to `<s>`, of all tokens: `context`.
    void attend(const Layer &layer) {
        const int64_t width = 3 * hidden + PAD;
        const float *bias = layer.qkv.bias;
        T *to = qkv.get();
        product<T>(num_tokens, states.get(), wide, layer.qkv.weight, 3 * hidden, hidden,
                   [=](int64_t m, int64_t n, const float *c) {
                       T *at = to + m * width + n;
                       store(at, _mm512_add_ps(load(c), load(bias + n)));
                       store(at + 16, _mm512_add_ps(load(c + 16), load(bias + n + 16)));
                   });
        for (int64_t s = 0; s < num_sequences; ++s)
            for (int64_t head = 0; head < heads; ++head)
                attend_head(qkv.get() + start(s) * width + head * dim, width,
                            start(s + 1) - start(s), layer.half,
                            context.get() + start(s) * wide + head * dim);
    }

    // One head of one sequence of L tokens.
    void attend_head(const T *rows, int64_t width, int64_t length, int64_t half, T *result) {
        const int64_t columns = (length + 15) / 16 * 16;
        for (int64_t t = 0; t < length; ++t)
            for (int64_t d = 0; d < dim; d += 16) {
                store(query.get() + t * dim + d, load(rows + t * width + d));
                store(value.get() + t * dim + d, load(rows + t * width + 2 * hidden + d));
            }
        for (int64_t t = 0; t < length; t += 16)
            for (int64_t d = 0; d < dim; d += 16)
                transpose(rows + t * width + hidden + d, width, std::min<int64_t>(16, length - t),
                          key.get() + d * columns + t, columns);
        const float scale = 1.0f / std::sqrt(float(dim));
        for (int64_t q = 0; q < length; q += ROWS) {
            const int64_t count = std::min(ROWS, length - q);
            const int64_t from = std::max<int64_t>(0, q - half) / 16 * 16;
            const int64_t to = std::min(length, q + count + half);
            const int64_t span = (to - from + 15) / 16 * 16, line = span + 16;
            const float *queries = query.get() + q * dim;
            int64_t k = 0;
            for (; k + 32 <= span; k += 32)
                tiles<float, 2>(count, queries, dim, 1, key.get() + from + k, columns, dim,
                                scores.get() + k, line, false);
            if (k < span)
                tiles<float, 1>(count, queries, dim, 1, key.get() + from + k, columns, dim,
                                scores.get() + k, line, false);
            if (from > 0)
                tiles<float, 1>(count, queries, dim, 1, key.get(), columns, dim,
                                scores.get() + span, line, false);
            float inverse[ROWS];
            for (int64_t r = 0; r < count; ++r)
                inverse[r] = softmax(scores.get() + r * line, from, span, q + r, half, to, scale);
            for (int64_t d = 0; d < dim; d += 32) {
                tiles<float, 2>(count, scores.get(), line, 1, value.get() + from * dim + d, dim,
                                to - from, out.get() + d, dim, false);
                if (from > 0)
                    tiles<float, 2>(count, scores.get() + span, line, 1, value.get() + d, dim, 1,
                                    out.get() + d, dim, true);
            }
            for (int64_t r = 0; r < count; ++r)
                for (int64_t d = 0; d < dim; d += 16)
                    store(result + (q + r) * wide + d,
                          _mm512_mul_ps(load(out.get() + r * dim + d), _mm512_set1_ps(inverse[r])));
        }
    }

    // Scores of keys from..from+span, and of `<s>` behind them, become weights up to a factor: the
    // inverse of their sum, which is returned. Key j is seen if |j - i| <= half and j < end.
    static float softmax(float *row, int64_t from, int64_t span, int64_t i, int64_t half,
                         int64_t end, float scale) {
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i low = _mm512_set1_epi32(int(std::max<int64_t>(0, i - half)));
        const __m512i high = _mm512_set1_epi32(int(std::min(end - 1, i + half)));
        const __m512 none = _mm512_set1_ps(-INFINITY);
        auto seen = [&](int64_t k) -> __mmask16 {
            const __m512i j = _mm512_add_epi32(lanes, _mm512_set1_epi32(int(from + k)));
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

    // Up to 16 rows of 16 numbers into 16 columns.
    static void transpose(const T *rows, int64_t width, int64_t count, float *to, int64_t line) {
        __m512 r[16], x[16];
        for (int64_t i = 0; i < 16; ++i)
            r[i] = i < count ? load(rows + i * width) : _mm512_setzero_ps();
        for (int i = 0; i < 16; i += 2) {
            x[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
            x[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
        }
        for (int i = 0; i < 16; i += 4)
            for (int j = 0; j < 2; ++j) {
                const __m512d low = _mm512_castps_pd(x[i + j]), high = _mm512_castps_pd(x[i + j + 2]);
                r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
                r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
            }
        for (int i = 0; i < 16; i += 8)
            for (int j = 0; j < 4; ++j) {
                x[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0x88);
                x[i + j + 4] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0xdd);
            }
        for (int j = 0; j < 8; ++j) {
            r[j] = _mm512_shuffle_f32x4(x[j], x[j + 8], 0x88);
            r[j + 8] = _mm512_shuffle_f32x4(x[j], x[j + 8], 0xdd);
        }
        for (int c = 0; c < 16; ++c) store(to + c * line, r[c]);
    }

    // What `<s>` of each sequence gathers from all its tokens: rows of `context`, of the sequences'
    // first tokens, or one a sequence.
    void attend_from_first(const Layer &layer, bool firsts_only) {
        for (int64_t s = 0; s < num_sequences; ++s)
            copy_row(firsts.get() + s * wide, states.get() + start(s) * wide);
        const float scale = 1.0f / std::sqrt(float(dim));
        T *queries = first_query.get();
        const float *bias = layer.first_query.bias;
        const int64_t ld = wide;
        product<T>(num_sequences, firsts.get(), wide, layer.first_query.weight, hidden, hidden,
                   [=](int64_t m, int64_t n, const float *c) {
                       for (int64_t j = 0; j < PANEL; j += 16)
                           store(queries + m * ld + n + j,
                                 _mm512_mul_ps(_mm512_add_ps(load(c + j), load(bias + n + j)),
                                               _mm512_set1_ps(scale)));
                   });
        constexpr int64_t pair = sizeof(T) == 2 ? 2 : 1;
        std::fill_n(first_key.get(), num_sequences * hidden * PANEL, T{});
        for (int64_t head = 0; head < heads; ++head) {
            T *to = first_key.get();
            const int64_t size = hidden * PANEL;
            product<T>(num_sequences, queries + head * dim, wide,
                       static_cast<const T *>(layer.first_key.weight) + head * dim * hidden, hidden,
                       dim, [=](int64_t m, int64_t n, const float *c) {
                           for (int64_t j = 0; j < PANEL; ++j)
                               set(to + m * size + (n + j) / pair * PANEL * pair + head * pair +
                                       (n + j) % pair,
                                   c[j]);
                       });
        }
        for (int64_t s = 0; s < num_sequences; ++s) gather_for_first(s);
        const float *shift = layer.first_value.bias;
        for (int64_t head = 0; head < heads; ++head)
            product<T>(num_sequences, summed.get() + head * hidden, heads * hidden,
                       static_cast<const T *>(layer.first_value.weight) + head * dim * hidden, dim,
                       hidden, [=, this](int64_t m, int64_t n, const float *c) {
                           T *at = context.get() + (firsts_only ? m : start(m)) * wide + head * dim + n;
                           const float *b = shift + head * dim + n;
                           store(at, _mm512_add_ps(load(c), load(b)));
                           store(at + 16, _mm512_add_ps(load(c + 16), load(b + 16)));
                       });
    }

    // Means of a sequence's states under the softmax of each head: (A, H) of `summed`.
    void gather_for_first(int64_t s) {
        const int64_t length = start(s + 1) - start(s);
        const T *rows = states.get() + start(s) * wide;
        float *scored = first_scores.get();
        product<T>(length, rows, wide, first_key.get() + s * hidden * PANEL, PANEL, hidden,
                   [=](int64_t m, int64_t, const float *c) {
                       std::copy(c, c + PANEL, scored + m * PANEL);
                   });
        for (int64_t half = 0; half < heads; half += 16) {
            __m512 top = load(scored + half), total = _mm512_setzero_ps();
            for (int64_t t = 1; t < length; ++t)
                top = _mm512_max_ps(top, load(scored + t * PANEL + half));
            for (int64_t t = 0; t < length; ++t) {
                const __m512 x = exponential(_mm512_sub_ps(load(scored + t * PANEL + half), top));
                store(scored + t * PANEL + half, x);
                total = _mm512_add_ps(total, x);
            }
            const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), total);
            for (int64_t t = 0; t < length; ++t)
                store(scored + t * PANEL + half,
                      _mm512_mul_ps(load(scored + t * PANEL + half), inverse));
        }
        for (int64_t t = 0; t < length; ++t)
            for (int64_t h = 0; h < hidden; h += 16)
                store(first_states.get() + t * hidden + h, load(rows + t * wide + h));
        for (int64_t head = 0; head < heads; head += ROWS) {
            const int64_t count = std::min(ROWS, heads - head);
            for (int64_t h = 0; h < hidden; h += 32)
                tiles<float, 2>(count, scored + head, 1, PANEL, first_states.get() + h, hidden,
                                length, first_sums.get() + h, hidden, false);
            for (int64_t r = 0; r < count; ++r)
                for (int64_t h = 0; h < hidden; h += 16)
                    store(summed.get() + (s * heads + head + r) * hidden + h,
                          load(first_sums.get() + r * hidden + h));
        }
    }

    // From `context` and `states` to the states after the layer, of so many rows.
    void feed_forward(const Layer &layer, int64_t rows) {
        into_sums(rows, context.get(), wide, layer.out.weight, hidden, hidden, false);
        finish(rows, layer.out.bias, states.get(), layer.attention_norm, layer.attention_shift,
               middle.get());
        const int64_t ld = piece + PAD;
        for (int64_t from = 0; from < model.inner; from += piece) {
            const int64_t size = std::min(piece, model.inner - from);
            const float *bias = layer.inner.bias + from;
            T *to = inner.get();
            product<T>(rows, middle.get(), wide,
                       static_cast<const T *>(layer.inner.weight) + from * hidden, size, hidden,
                       [=](int64_t m, int64_t n, const float *c) {
                           T *at = to + m * ld + n;
                           store(at, gelu(_mm512_add_ps(load(c), load(bias + n))));
                           store(at + 16, gelu(_mm512_add_ps(load(c + 16), load(bias + n + 16))));
                       });
            into_sums(rows, inner.get(), ld,
                      static_cast<const T *>(layer.outer.weight) + from * PANEL, size, model.inner,
                      from > 0);
        }
        finish(rows, layer.outer.bias, middle.get(), layer.output_norm, layer.output_shift,
               states.get());
    }

    // Products with the first `size` of `inputs` inputs of H outputs, in or onto `sums`.
    void into_sums(int64_t rows, const T *a, int64_t row, const void *weight, int64_t size,
                   int64_t inputs, bool add) {
        const T *b = static_cast<const T *>(weight);
        const int64_t step = rows_a_block<T>();
        for (int64_t n = 0; n < hidden; n += PANEL, b += inputs * PANEL)
            for (int64_t m = 0; m < rows; m += step)
                block(std::min(step, rows - m), a + m * row, row, b, size,
                      sums.get() + m * hidden + n, hidden, add);
    }

    // Bias and residual to `sums`, and LayerNorm of them.
    void finish(int64_t rows, const float *bias, const T *residual, const float *weight,
                const float *shift, T *to) {
        for (int64_t r = 0; r < rows; ++r) {
            float *row = sums.get() + r * hidden;
            for (int64_t h = 0; h < hidden; h += 16)
                store(row + h, _mm512_add_ps(_mm512_add_ps(load(row + h), load(bias + h)),
                                             load(residual + r * wide + h)));
            normalise(row, weight, shift, to + r * wide);
        }
    }

    const Model &model;
    const Batch &batch;
    const int64_t hidden, heads, dim, wide;
    int64_t padded, piece, first_sequence = 0, num_sequences = 0, first_token = 0, num_tokens = 0;
    Room<T> states, middle, context, qkv, inner, firsts, first_query, first_key, summed;
    Room<float> sums, key, value, query, scores, out, first_scores, first_states, first_sums;
};

template <class T>
void work(const Model &model, const Batch &batch, std::atomic<int64_t> &next,
          std::atomic<bool> &failed) {
    try {
        Worker<T> worker(model, batch);
#ifdef __AMX_BF16__
        const TileShapes shapes;
        if (amx) _tile_loadconfig(&shapes);
#endif
        for (int64_t c; (c = next++) < batch.chunks;)
            worker.chunk(batch.chunk_starts[c], batch.chunk_starts[c + 1]);
#ifdef __AMX_BF16__
        if (amx) _tile_release();
#endif
    } catch (const std::bad_alloc &) {
        failed = true;
    }
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

// 0: done. 1: ids outside a table, or sequences that do not fit together. 2: no memory.
int recformer_encode(const Model *model, const Batch *batch, int64_t tokens, int bfloat16,
                     int64_t threads) {
    const int64_t *starts = batch->starts;
    if (starts[0] != 0 || starts[batch->sequences] != tokens) return 1;
    for (int64_t s = 0; s < batch->sequences; ++s)
        if (starts[s] >= starts[s + 1]) return 1;
    for (int table = 0; table < 4; ++table)
        if (batch->ids[table])
            for (int64_t t = 0; t < tokens; ++t)
                if (uint64_t(batch->ids[table][t]) >= uint64_t(model->rows[table])) return 1;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    auto run = [&] {
        if (bfloat16)
            work<bf16>(*model, *batch, next, failed);
        else
            work<float>(*model, *batch, next, failed);
    };
    std::vector<std::thread> others;
    try {
        for (int64_t n = 1; n < std::min(threads, batch->chunks); ++n) others.emplace_back(run);
    } catch (...) {  // no more threads to be had: those there are do the work
    }
    run();
    for (auto &other : others) other.join();
    return failed ? 2 : 0;
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

}  // extern "C"
