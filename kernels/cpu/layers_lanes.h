// Vectors of fp32 for kernels that are written once for every SIMD path: a body header is included in each of the namespaces `base`, `avx2`
// and `avx512`, which give it one set of names. + - * / are the compiler's own on vectors (gcc, clang). The base path has four lanes: NEON's or SSE2's.
// bf16 is read and written two vectors at a time, split into the values of even and of odd places: a shift or a mask instead of a widening.
#pragma once
#include "simd.h"
#include <cmath>
#if QTUNE_X86
#include "simd_x86.h"
#endif

namespace {

constexpr float LOWEST = -104.0f;   // exp is 0 there, as below
constexpr float LOG2E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;   // n * LN2_HIGH is exact
// (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2, fitted to a relative error of exp of 3.1e-9
constexpr float EXP[5] = {0.49999994f, 0.1666652f, 0.0416684f, 0.008368851f, 0.001381432f};
constexpr float MINUS_INFINITY = -__builtin_inff();

// ---- base: four lanes, portable

namespace base {

typedef float V __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
constexpr int LANES = 4;

template <int D> inline V load(const void *p, int64_t i) {
    if (D == F32) {
        V v;
        std::memcpy(&v, static_cast<const float *>(p) + i, sizeof v);
        return v;
    }
    return V{::load<D>(p, i), ::load<D>(p, i + 1), ::load<D>(p, i + 2), ::load<D>(p, i + 3)};
}
inline V even(V pairs) { return (V)((I)pairs << 16); }    // of 16-bit values in pairs: the first of each, widened
inline V odd(V pairs) { return (V)((I)pairs & int32_t(0xffff0000)); }
inline I high_bf16(V v) {    // v rounded to bf16, in the high halves; the low ones mean nothing
    const I bits = (I)v, up = bits + 0x7fff + (bits >> 16 & 1), number = v == v;
    return (up & number) | (0x7fc00000 & ~number);
}
inline V pair_bf16(V a, V b) { return (V)(((high_bf16(a) >> 16) & 0xffff) | (high_bf16(b) & int32_t(0xffff0000))); }
inline V reciprocal(V v) { return 1.0f / v; }
inline V set(float f) { return V{f, f, f, f}; }
template <int D> inline V load_part(const void *p, int64_t i, int64_t count, float fill) {
    V v = set(fill);
    for (int j = 0; j < count; ++j) v[j] = ::load<D>(p, i + j);
    return v;
}
template <int D> inline void store_part(void *p, int64_t i, V v, int64_t count) {
    for (int j = 0; j < count; ++j) static_cast<typename Stored<D>::type *>(p)[i + j] = rounded<D>(v[j]);
}
template <int D> inline void store(void *p, int64_t i, V v) {
    if (D == F32) std::memcpy(static_cast<float *>(p) + i, &v, sizeof v);
    else store_part<D>(p, i, v, LANES);
}
#ifdef __FP_FAST_FMAF
inline V fma(V a, V b, V c) {
    for (int j = 0; j < LANES; ++j) c[j] = __builtin_fmaf(a[j], b[j], c[j]);
    return c;
}
#else
inline V fma(V a, V b, V c) { return a * b + c; }
#endif
inline V from(V p, V q, I mask) { return (V)(((I)p & mask) | ((I)q & ~mask)); }   // p where the mask is set
inline V maximum(V limit, V v) { return from(limit, v, limit > v); }              // a NaN in v stays
inline V magnitude(V v) { return (V)((I)v & 0x7fffffff); }
inline V where_negative(V v, V yes, V no) { return from(yes, no, (I)v < 0); }
inline V times_power(V v, V n) {    // v * 2^n in two steps: n goes down to -150, and denormals are rounded once
    const I whole = I((V)(n + set(12582912.0f))) - 0x4b400000, half = whole >> 1;
    return v * (V)((half + 127) << 23) * (V)((whole - half + 127) << 23);
}
inline float sum(V v) { return (v[0] + v[1]) + (v[2] + v[3]); }
inline float top(V v) {
    float t = v[0];
    for (int j = 1; j < LANES; ++j) t = v[j] > t ? v[j] : t;
    return t;
}
template <int D> inline V round_to(V v) {
    if (D == F32) return v;
    if (D == BF16) return (V)(high_bf16(v) & int32_t(0xffff0000));
    uint16_t raw[LANES];
    store_part<D>(raw, 0, v, LANES);
    return load<D>(raw, 0);
}

}  // namespace base

#if QTUNE_X86

namespace avx2 {

typedef __m256 V;
constexpr int LANES = 8;

AVX2 inline V set(float f) { return _mm256_set1_ps(f); }
template <int D> AVX2 inline V load(const void *p, int64_t i) { return load8<D>(p, i); }
AVX2 inline V even(V pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16)); }
AVX2 inline V odd(V pairs) { return _mm256_and_ps(pairs, _mm256_castsi256_ps(_mm256_set1_epi32(int(0xffff0000)))); }
AVX2 inline __m256i high_bf16(V v) {
    const __m256i bits = _mm256_castps_si256(v), last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last);
    return _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
AVX2 inline V pair_bf16(V a, V b) {
    return _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_srli_epi32(high_bf16(a), 16), high_bf16(b), 0xaa));
}
AVX2 inline V reciprocal(V v) { return _mm256_set1_ps(1.0f) / v; }
template <int D> AVX2 inline void store(void *p, int64_t i, V v) { store8<D>(p, i, v); }
template <int D> AVX2 inline V load_part(const void *p, int64_t i, int64_t count, float fill) {
    float v[LANES];
    for (int j = 0; j < LANES; ++j) v[j] = j < count ? ::load<D>(p, i + j) : fill;
    return _mm256_loadu_ps(v);
}
template <int D> AVX2 inline void store_part(void *p, int64_t i, V v, int64_t count) {
    using Raw = typename Stored<D>::type;
    Raw raw[LANES];
    store8<D>(raw, 0, v);
    std::memcpy(static_cast<Raw *>(p) + i, raw, size_t(count) * sizeof(Raw));
}
AVX2 inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
AVX2 inline V maximum(V limit, V v) { return _mm256_max_ps(limit, v); }
AVX2 AVX2 inline V magnitude(V v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
AVX2 inline V where_negative(V v, V yes, V no) { return _mm256_blendv_ps(no, yes, v); }
AVX2 inline V times_power(V v, V n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
    const __m256i rest = _mm256_sub_epi32(whole, half);
    v = v * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    return v * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
}
AVX2 inline float sum(V v) {
    float s[LANES];
    _mm256_storeu_ps(s, v);
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}
AVX2 inline float top(V v) {
    float s[LANES], t;
    _mm256_storeu_ps(s, v);
    t = s[0];
    for (int j = 1; j < LANES; ++j) t = s[j] > t ? s[j] : t;
    return t;
}
template <int D> AVX2 inline V round_to(V v) {
    if (D == F32) return v;
    if (D == F16) return _mm256_cvtph_ps(_mm256_cvtps_ph(v, 0));
    return odd(_mm256_castsi256_ps(high_bf16(v)));
}

}  // namespace avx2

namespace avx512 {

typedef __m512 V;
constexpr int LANES = 16;

AVX512 inline V set(float f) { return _mm512_set1_ps(f); }
template <int D> AVX512 inline V load(const void *p, int64_t i) { return load16<D>(p, i); }
AVX512 inline V even(V pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16)); }
AVX512 inline V odd(V pairs) { return _mm512_and_ps(pairs, _mm512_castsi512_ps(_mm512_set1_epi32(int(0xffff0000)))); }
AVX512 inline __m512i high_bf16(V v) {
    const __m512i bits = _mm512_castps_si512(v), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
    return _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
AVX512 inline V pair_bf16(V a, V b) {
    return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(high_bf16(a), 16), high_bf16(b)));
}
AVX512 inline V reciprocal(V v) {    // within 1 ulp for v in [1, 2]: one Newton step from 14 bits
    const V r = _mm512_rcp14_ps(v);
    return r * _mm512_fnmadd_ps(v, r, _mm512_set1_ps(2.0f));
}
template <int D> AVX512 inline void store(void *p, int64_t i, V v) { store16<D>(p, i, v); }
template <int D> AVX512 inline V load_part(const void *p, int64_t i, int64_t count, float fill) {
    const __mmask16 mask = __mmask16((1u << count) - 1);
    if (D == F32) return _mm512_mask_loadu_ps(set(fill), mask, static_cast<const float *>(p) + i);
    const __m256i raw = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t *>(p) + i);
    const V v = D == F16 ? _mm512_cvtph_ps(raw) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    return _mm512_mask_mov_ps(set(fill), mask, v);
}
template <int D> AVX512 inline void store_part(void *p, int64_t i, V v, int64_t count) {
    const __mmask16 mask = __mmask16((1u << count) - 1);
    if (D == F32) { _mm512_mask_storeu_ps(static_cast<float *>(p) + i, mask, v); return; }
    _mm256_mask_storeu_epi16(static_cast<uint16_t *>(p) + i, mask, D == F16 ? _mm512_cvtps_ph(v, 0) : bf16_bits16(v));
}
AVX512 inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
AVX512 inline V maximum(V limit, V v) { return _mm512_max_ps(limit, v); }
AVX512 AVX512 inline V magnitude(V v) { return _mm512_abs_ps(v); }
AVX512 inline V where_negative(V v, V yes, V no) {
    return _mm512_mask_mov_ps(no, _mm512_movepi32_mask(_mm512_castps_si512(v)), yes);
}
AVX512 inline V times_power(V v, V n) { return _mm512_scalef_ps(v, n); }
AVX512 inline float sum(V v) { return _mm512_reduce_add_ps(v); }
AVX512 inline float top(V v) { return _mm512_reduce_max_ps(v); }
template <int D> AVX512 inline V round_to(V v) {
    if (D == F32) return v;
    if (D == F16) return _mm512_cvtph_ps(_mm512_cvtps_ph(v, 0));
    return odd(_mm512_castsi512_ps(high_bf16(v)));
}

}  // namespace avx512

#endif

}  // namespace

// What is the same on every path: PATH is its namespace, TARGET its attribute.
#define PATH base
#define TARGET
#include "layers_exp.h"
#undef PATH
#undef TARGET
#if QTUNE_X86
#define PATH avx2
#define TARGET AVX2
#include "layers_exp.h"
#undef PATH
#undef TARGET
#define PATH avx512
#define TARGET AVX512
#include "layers_exp.h"
#undef PATH
#undef TARGET
#endif
