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

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t PANEL = 32;        // outputs a panel of weights
constexpr int64_t ROWS = 12;         // rows a tile of sums in vector registers
constexpr int64_t PAD = 32;          // between rows of states, so that they fall on all cache sets
constexpr int64_t INNER = 768 << 10; // bytes of inner states of the feed-forward held at once
constexpr int64_t LEAST_TOKENS = 24;   // a thread
constexpr int64_t FIRST = 1, MEAN_AS_PUBLISHED = 3;  // of `pooling`
constexpr double MOST_WAITING = 1.2;   // busiest thread to mean, above which all share each chunk

struct bf16 {
    uint16_t bits;
};

// Rows of these come in groups of 32 numbers: 32 times the first part, the second, the third.
struct Three {
    uint16_t parts[3];
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
    int64_t sequences, chunk_tokens;
    int64_t pooling;  // 0: all states, 1: that of `<s>`, 2: mean, 3: mean as published
    const int64_t *ids[4];  // positions may be null: counted from first_position
    const int64_t *starts;
    void *result;
};

}  // extern "C"

namespace {

// --- where the time goes -------------------------------------------------------------------------

// What a thread does; compiled with RECFORMER_TIMES the time of each is added up.
enum Stage {
    REST, EMBEDDINGS, PRODUCTS, COPIES, GELU, NORM, SCORES, SOFTMAX, FIRSTS, WAITING, STAGES
};

#ifdef RECFORMER_TIMES
std::atomic<uint64_t> spent[STAGES];
thread_local uint64_t ticks[STAGES], since = 0;
thread_local Stage stage = REST;

inline Stage enter(Stage next) {
    const uint64_t now = __rdtsc();
    ticks[stage] += now - since;
    since = now;
    return std::exchange(stage, next);
}
// Counts for this stage until the end of the block; products of `<s>` stay with it.
struct Counted {
    Stage before;
    explicit Counted(Stage next)
        : before(enter(next == PRODUCTS && stage == FIRSTS ? FIRSTS : next)) {}
    ~Counted() { enter(before); }
};
#define COUNTED(stage) const Counted counted(stage)
#else
#define COUNTED(stage)
#endif

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
inline __m512 widen(const uint16_t *from) { return load(reinterpret_cast<const bf16 *>(from)); }

// Numbers column..column+15 of a row; columns are multiples of 16, rows begin at multiples of 32.
template <class T>
__m512 get(const T *row, int64_t column = 0) {
    if constexpr (sizeof(T) == sizeof(Three)) {
        const uint16_t *at = (row + column / 32 * 32)->parts + column % 32;
        return _mm512_add_ps(_mm512_add_ps(widen(at), widen(at + 32)), widen(at + 64));
    } else {
        return load(row + column);
    }
}
template <class T>
void put(T *row, int64_t column, __m512 value) {
    if constexpr (sizeof(T) == sizeof(Three)) {
        uint16_t *at = (row + column / 32 * 32)->parts + column % 32;
        for (int part = 0; part < 3; ++part, at += 32) {
            store(reinterpret_cast<bf16 *>(at), value);
            value = _mm512_sub_ps(value, widen(at));
        }
    } else {
        store(row + column, value);
    }
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
[[gnu::noinline]] void tile(const T *a, int64_t row, int64_t next, const T *b, int64_t line,
                            int64_t steps, float *c, int64_t ldc, bool add) {
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
[[gnu::noinline]] void tiles(int64_t rows, const T *a, int64_t row, int64_t next, const T *b,
                             int64_t line, int64_t steps, float *c, int64_t ldc, bool add) {
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

// Tiles 0 to 3 hold the sums of 32 rows (0 and 1: of 16) of a panel.
template <bool both>
[[gnu::always_inline]] inline void begin_sums(const float *c, int64_t ldc, bool add) {
    const int64_t c_bytes = 4 * ldc;
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
}

template <bool both>
[[gnu::always_inline]] inline void store_sums(float *c, int64_t ldc) {
    const int64_t c_bytes = 4 * ldc;
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
    if (both) {
        _tile_stored(2, c + 16 * ldc, c_bytes);
        _tile_stored(3, c + 16 * ldc + 16, c_bytes);
    }
}

// 32 rows (or 16) times a panel; rows past the last one are read and written, too.
template <bool both>
[[gnu::noinline]] void amx_tile(const bf16 *a, int64_t row, const bf16 *b, int64_t steps, float *c,
                                int64_t ldc, bool add) {
    const int64_t a_bytes = 2 * row, b_bytes = 4 * PANEL;
    begin_sums<both>(c, ldc, add);
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
    store_sums<both>(c, ldc);
}

// The same of numbers in three parts: the small products first.
template <bool both>
[[gnu::noinline]] void amx_tile(const Three *a, int64_t row, const Three *b, int64_t groups,
                                float *c, int64_t ldc, bool add) {
    constexpr int64_t group = 32, part = 16 * PANEL * 2;  // of b, in bfloat16
    const int64_t a_bytes = row * sizeof(Three), b_bytes = 4 * PANEL;
    begin_sums<both>(c, ldc, add);
    for (int64_t k = 0; k < groups; ++k, a += group, b += group * PANEL) {
        const uint16_t *left = a->parts, *right = b->parts;
#define LEFT(i)                                                            \
    _tile_loadd(4, left + i * group, a_bytes);                             \
    if (both) _tile_loadd(5, (a + 16 * row)->parts + i * group, a_bytes);
#define RIGHT(i)                                                           \
    _tile_loadd(6, right + i * part, b_bytes);                             \
    _tile_loadd(7, right + i * part + PANEL, b_bytes);
#define MULTIPLY                                                           \
    _tile_dpbf16ps(0, 4, 6);                                               \
    _tile_dpbf16ps(1, 4, 7);                                               \
    if (both) {                                                            \
        _tile_dpbf16ps(2, 5, 6);                                           \
        _tile_dpbf16ps(3, 5, 7);                                           \
    }
        LEFT(0) RIGHT(2) MULTIPLY
        RIGHT(1) MULTIPLY
        LEFT(1) MULTIPLY
        RIGHT(0) MULTIPLY
        LEFT(2) MULTIPLY
        LEFT(0) MULTIPLY
#undef LEFT
#undef RIGHT
#undef MULTIPLY
    }
    store_sums<both>(c, ldc);
}

#endif

constexpr int64_t MOST_ROWS = 32;  // of a block, and so past the last row that sums are written to

// Up to `most_rows` rows times a panel: (rows, 32) sums.
template <class T>
void block(int64_t rows, const T *a, int64_t row, const T *b, int64_t inputs, float *c, int64_t ldc,
           bool add) {
    COUNTED(PRODUCTS);
#ifdef __AMX_BF16__
    if constexpr (sizeof(T) != 4) {
        if (amx || sizeof(T) == sizeof(Three)) {
            const int64_t steps = sizeof(T) == 2 ? inputs / 2 : inputs / 32;
            if (rows > 16)
                amx_tile<true>(a, row, b, steps, c, ldc, add);
            else
                amx_tile<false>(a, row, b, steps, c, ldc, add);
            return;
        }
    }
#endif
    constexpr int64_t pair = sizeof(T) == 2 ? 2 : 1;
    if constexpr (sizeof(T) != sizeof(Three))
        tiles<T, 2>(rows, a, row, pair, b, PANEL * pair, inputs / pair, c, ldc, add);
}

template <class T>
int64_t rows_a_block() {
    return sizeof(T) != 4 && amx ? MOST_ROWS : ROWS;
}

// (rows, 32) sums of each panel, given to sink(row, first column, 32 sums).
template <class T, class Sink>
void product(int64_t rows, const T *a, int64_t row, const void *weight, int64_t outputs,
             int64_t inputs, Stage stage, Sink sink) {
    alignas(64) float sums[MOST_ROWS * PANEL];
    const T *b = static_cast<const T *>(weight);
    const int64_t step = rows_a_block<T>();
    for (int64_t n = 0; n < outputs; n += PANEL, b += inputs * PANEL)
        for (int64_t m = 0; m < rows; m += step) {
            const int64_t count = std::min(step, rows - m);
            block(count, a + m * row, row, b, inputs, sums, PANEL, false);
            COUNTED(stage);
            for (int64_t r = 0; r < count; ++r) sink(m + r, n, sums + r * PANEL);
        }
}

// --- threads and memory --------------------------------------------------------------------------

// Threads that compute one chunk together; alone it waits for nobody.
struct Crew {
    int64_t size = 1;
    std::atomic<int64_t> arrived{0}, meetings{0};

    // Goes on when all have come.
    void meet() {
        if (size == 1) return;
        COUNTED(WAITING);
        const int64_t before = meetings.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < size)
            return wait([&] { return meetings.load(std::memory_order_acquire) != before; });
        arrived.store(0, std::memory_order_relaxed);
        meetings.store(before + 1, std::memory_order_release);
    }

    // Spins for some microseconds, then leaves the core to others.
    template <class Done>
    static void wait(Done done) {
        for (int64_t turns = 0; !done(); ++turns)
            if (turns < 2000)
                _mm_pause();
            else
                std::this_thread::yield();
    }
};

// A block of memory. Freed ones are kept for the next call, which so fetches no pages anew.
class Memory {
  public:
    explicit Memory(size_t needed) : bytes((needed / ROUND + 1) * ROUND) {
        std::unique_lock lock(mutex, std::try_to_lock);  // a fork may have left it locked for ever
        Block *other = nullptr;
        for (Block &block : kept) {
            if (!lock || block.at == nullptr) continue;
            if (block.bytes >= bytes) {
                bytes = block.bytes;
                std::swap(at, block.at);
                return;
            }
            other = &block;
        }
        if (other) std::free(std::exchange(other->at, nullptr));  // too small: this one replaces it
        at = static_cast<char *>(std::aligned_alloc(64, bytes));
        if (at == nullptr) throw std::bad_alloc();
    }
    ~Memory() {
        std::unique_lock lock(mutex, std::try_to_lock);
        for (Block &block : kept)
            if (lock && bytes <= LARGEST && block.at == nullptr) {
                block = {at, bytes};
                return;
            }
        std::free(at);
    }
    Memory(const Memory &) = delete;

    char *get() const { return at; }

  private:
    static constexpr size_t ROUND = 1 << 18, LARGEST = 64 << 20;
    struct Block {
        char *at;
        size_t bytes;
    };
    static inline std::mutex mutex;
    static inline Block kept[64];

    char *at = nullptr;
    size_t bytes;
};

// Cuts a block into arrays; of no block it finds the size.
class Cutter {
  public:
    explicit Cutter(char *memory) : memory(memory) {}
    template <class N>
    void operator()(N *&array, int64_t count) {
        array = memory ? reinterpret_cast<N *>(memory + bytes) : nullptr;
        bytes += (count * sizeof(N) + 127) / 64 * 64;
    }
    size_t bytes = 0;

  private:
    char *memory;
};

// Chunks of whole sequences.
struct Chunks {
    std::vector<int64_t> first;  // sequence of each chunk, and their number
    int64_t tokens = 0, sequences = 0, longest = 0;  // at most, of a chunk; tokens of a sequence

    // Of about so many tokens.
    Chunks(const Batch &batch, int64_t size) : first{0} {
        const int64_t *starts = batch.starts;
        for (int64_t s = 1; s < batch.sequences; ++s)
            if (starts[s] / size != starts[s - 1] / size) first.push_back(s);
        first.push_back(batch.sequences);
        for (int64_t c = 0; c < number(); ++c) {
            tokens = std::max(tokens, starts[first[c + 1]] - starts[first[c]]);
            sequences = std::max(sequences, first[c + 1] - first[c]);
        }
        for (int64_t s = 0; s < batch.sequences; ++s)
            longest = std::max(longest, starts[s + 1] - starts[s]);
    }

    int64_t number() const { return first.size() - 1; }

    // Tokens of the thread with most of them, if each takes the next chunk when it is free.
    int64_t most(const Batch &batch, int64_t threads) const {
        std::vector<int64_t> load(threads);
        for (int64_t c = 0; c < number(); ++c)
            *std::min_element(load.begin(), load.end()) +=
                batch.starts[first[c + 1]] - batch.starts[first[c]];
        return *std::max_element(load.begin(), load.end());
    }
};

// --- one chunk -----------------------------------------------------------------------------------

// Numbers that no product with weights takes.
template <class T>
using Plain = std::conditional_t<sizeof(T) == sizeof(Three), float, T>;

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
          first_scores(common.first_scores) {
        const int64_t most = crew.size == 1 ? chunks.tokens
                                            : (chunks.tokens / crew.size / STEP + 2) * STEP;
        padded = (chunks.longest + MOST_ROWS + 15) / 16 * 16;
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
        cutter(key, dim * padded);
        cutter(values, padded * dim);
        cutter(queries, padded * dim);
        cutter(scores, 16 * (padded + 32));
        cutter(out, ROWS * dim);
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
            attend_head(qkv + start(s) * width + head * dim, width, start(s + 1) - start(s),
                        layer.half, context + start(s) * wide + head * dim);
        }
    }

    // One head of one sequence of L tokens.
    void attend_head(const Plain<T> *rows, int64_t width, int64_t length, int64_t half, T *result) {
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
    template <class N>
    static void transpose(const N *rows, int64_t width, int64_t count, float *to, int64_t line) {
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
    int64_t padded, piece, first_sequence = 0, num_sequences = 0, first_token = 0;
    T *const states, *const context, *const first_query, *const first_key, *const summed;
    Plain<T> *const qkv;
    float *const first_scores;
    T *middle, *inner, *firsts;
    float *sums, *key, *values, *queries, *scores, *out;
    float *asked, *first_weights, *first_states, *first_sums;
    std::unique_ptr<Memory> memory;
};

// All chunks, each by one thread, or by all of them if there are too few for that.
template <class T>
void encode(const Model &model, const Batch &batch, int64_t tokens, int64_t threads) {
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
        const TileShapes shapes;
        if (amx) _tile_loadconfig(&shapes);
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
    std::atomic<int> start{0};  // 1: go, -1: leave
    std::vector<std::thread> others;
    try {
        for (int64_t n = 1; n < threads; ++n)
            others.emplace_back([&, n] {
                Crew::wait([&] { return start != 0; });
                if (start > 0) run(n);
            });
        start = 1;
    } catch (...) {
        start = -1;
    }
    if (start > 0) run(0);
    for (auto &other : others) other.join();
    if (start < 0) encode<T>(model, batch, tokens, 1);  // no more threads to be had
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

}  // extern "C"
