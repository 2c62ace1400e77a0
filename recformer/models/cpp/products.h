// Products of matrices: in vector registers, and in the tiles of AMX.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "numbers.h"
#include "stages.h"

namespace {

constexpr int64_t PANEL = 32;  // outputs a panel of weights
constexpr int64_t ROWS = 12;   // rows a tile of sums in vector registers

// Sums of R rows and 16 C columns: step by step, a number (or a pair of bfloat16) of each row times
// C vectors. Offsets in elements: `row` between rows of a, `next` between its steps, `line` between
// those of b. Sums begin with the rows of `first`, `first_line` apart, or with zeros if it is null.
template <class T, int R, int C>
[[gnu::noinline]] void tile(const T *a, int64_t row, int64_t next, const T *b, int64_t line,
                            int64_t steps, float *c, int64_t ldc, const float *first,
                            int64_t first_line) {
    __m512 sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < C; ++j)
            sum[r][j] = first ? _mm512_loadu_ps(first + r * first_line + 16 * j)
                              : _mm512_setzero_ps();
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
                             int64_t line, int64_t steps, float *c, int64_t ldc,
                             const float *first, int64_t first_line) {
    switch (rows) {
#define CASE(R) \
    case R: return tile<T, R, C>(a, row, next, b, line, steps, c, ldc, first, first_line);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}

// In c, or added to it.
template <class T, int C>
void tiles(int64_t rows, const T *a, int64_t row, int64_t next, const T *b, int64_t line,
           int64_t steps, float *c, int64_t ldc, bool add) {
    tiles<T, C>(rows, a, row, next, b, line, steps, c, ldc, add ? c : nullptr, ldc);
}

bool amx = false;

#ifdef __AMX_BF16__

struct TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// In memory from the start: GCC takes the instruction that loads it for one that reads eight bytes, and
// leaves out what would write the others before.
constexpr TileShapes TILE_SHAPES;

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

}  // namespace
