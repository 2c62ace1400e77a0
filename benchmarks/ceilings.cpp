// What a processor's arithmetic alone reaches, and one product of the encoder's kernel.

#include "products.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// Multiplications and additions of 24 sums that never leave their registers.
template <class T>
float in_registers(int64_t rounds) {
    __m512 sum[24];
    __m512 left = _mm512_castsi512_ps(_mm512_set1_epi32(0x30803080)), right = left;  // 2^-30
    for (auto &each : sum) each = _mm512_setzero_ps();
    for (int64_t n = 0; n < rounds; ++n) {
        asm volatile("" : "+v"(left), "+v"(right));  // so that no round is left out
#pragma GCC unroll 24
        for (auto &each : sum) {
            if constexpr (sizeof(T) == 4) {
                each = _mm512_fmadd_ps(left, right, each);
            } else {
#ifdef __AVX512BF16__
                each = _mm512_dpbf16_ps(each, reinterpret_cast<__m512bh>(left),
                                        reinterpret_cast<__m512bh>(right));
#endif
            }
        }
    }
    float total = 0;
    for (auto &each : sum) total += _mm512_reduce_add_ps(each);
    return total;
}

// As `product` of products.h goes over panels and rows, into c (rows + 32, outputs).
template <class T>
void multiply(int64_t rows, int64_t inputs, int64_t outputs, const void *a, const void *b,
              float *c) {
    const T *panel = static_cast<const T *>(b);
    const int64_t step = rows_a_block<T>();
    for (int64_t n = 0; n < outputs; n += PANEL, panel += inputs * PANEL)
        for (int64_t m = 0; m < rows; m += step)
            block(std::min(step, rows - m), static_cast<const T *>(a) + m * inputs, inputs, panel,
                  inputs, c + m * outputs + n, outputs, false);
}

#ifdef __AMX_BF16__
void with_tiles() { _tile_loadconfig(&TILE_SHAPES); }
#endif

}  // namespace

extern "C" {

// Whether there is AMX to be used.
int use_amx() {
#ifdef __AMX_BF16__
    constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    amx = syscall(SYS_arch_prctl, request, tile_data) == 0;
#endif
    return amx;
}

// Operations of a round: 768 of float32, 1,536 of bfloat16, 65,536 in tiles.
float registers(int numbers, int64_t rounds) {
#ifdef __AMX_BF16__
    if (amx && numbers) {
        with_tiles();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_zero(4);
        _tile_zero(5);
        _tile_zero(6);
        _tile_zero(7);
        for (int64_t n = 0; n < rounds; ++n) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_release();
        return 0;
    }
#endif
    return numbers ? in_registers<bf16>(rounds) : in_registers<float>(rounds);
}

// `numbers` and the order of b as in recformer/models/cpp/kernel.cpp.
void multiply(int numbers, int64_t rows, int64_t inputs, int64_t outputs, const void *a,
              const void *b, float *c) {
#ifdef __AMX_BF16__
    if (amx) with_tiles();
#endif
    if (numbers == 0) multiply<float>(rows, inputs, outputs, a, b, c);
    if (numbers == 1) multiply<bf16>(rows, inputs, outputs, a, b, c);
#ifdef __AMX_BF16__
    if (numbers == 2) multiply<Three>(rows, inputs, outputs, a, b, c);
    if (amx) _tile_release();
#endif
}

}  // extern "C"
