// Numbers of float, bfloat16 and three bfloat16, 16 at a time, and functions of them.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct bf16 {
    uint16_t bits;
};

// Rows of these come in groups of 32 numbers: 32 times the first part, the second, the third.
struct Three {
    uint16_t parts[3];
};

inline __m512 load(const float *from) { return _mm512_loadu_ps(from); }
inline __m512 load(const bf16 *from) {
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store(float *to, __m512 value) { _mm512_storeu_ps(to, value); }

inline __m512i lanes() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

inline __m512i rounded(__m512 value) {  // to the nearest bfloat16, in the upper halves
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc00000));
}
inline __m256i half(__m512 value) {  // to the nearest bfloat16
#ifdef __AVX512BF16__
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
#else
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(value), 16));
#endif
}
inline void store(bf16 *to, __m512 value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), half(value));
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
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // in this order NaN stays
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

inline __m512 error_function(__m512 x) {  // erf(x / sqrt 2), a quotient of polynomials
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
    return _mm512_mul_ps(_mm512_mul_ps(z, p), reciprocal);
}

inline __m512 gelu(__m512 x) {  // x / 2 (1 + erf(x / sqrt 2))
    __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
    return _mm512_fmadd_ps(half, error_function(x), half);
}

inline __m512 gelu_slope(__m512 x) {  // (1 + erf(x / sqrt 2)) / 2 + x exp(-x x / 2) / sqrt(2 pi)
    __m512 half = _mm512_set1_ps(0.5f);
    __m512 bell = exponential(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f)));
    __m512 below = _mm512_fmadd_ps(half, error_function(x), half);
    return _mm512_fmadd_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.39894228f)), bell, below);
}

// Up to 16 rows, row(i), of 16 numbers into 16 columns.
template <class Row>
void transposed(int64_t count, Row row, float *to, int64_t line) {
    __m512 r[16], x[16];
    for (int64_t i = 0; i < 16; ++i) r[i] = i < count ? row(i) : _mm512_setzero_ps();
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
template <class N>
void transpose(const N *rows, int64_t width, int64_t count, float *to, int64_t line) {
    transposed(count, [=](int64_t i) { return load(rows + i * width); }, to, line);
}

}  // namespace
