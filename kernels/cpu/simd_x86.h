// AVX2 and AVX-512 loads and roundings that kernels share; on x86-64 only, each source includes it once.
#pragma once
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))

namespace {

template <int D> AVX2 inline __m256 load8(const void *w, int64_t i) {
    if (D == F32) return _mm256_loadu_ps(static_cast<const float *>(w) + i);
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i *>(static_cast<const uint16_t *>(w) + i));
    if (D == F16) return _mm256_cvtph_ps(raw);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

AVX2 inline __m256i bf16_bits8(__m256 v) {    // eight bf16 in 32-bit lanes, to nearest even
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), nan);
}

template <int D> AVX512 inline __m512 load16(const void *w, int64_t i) {
    if (D == F32) return _mm512_loadu_ps(static_cast<const float *>(w) + i);
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(static_cast<const uint16_t *>(w) + i));
    if (D == F16) return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

AVX512 inline __m256i bf16_bits16(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(up);
}

template <int D> AVX2 inline void store8(void *p, int64_t i, __m256 v) {
    if (D == F32) { _mm256_storeu_ps(static_cast<float *>(p) + i, v); return; }
    auto *out = reinterpret_cast<__m128i *>(static_cast<uint16_t *>(p) + i);
    if (D == F16) { _mm_storeu_si128(out, _mm256_cvtps_ph(v, 0)); return; }
    const __m256i bits = bf16_bits8(v);
    _mm_storeu_si128(out, _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}

template <int D> AVX512 inline void store16(void *p, int64_t i, __m512 v) {
    if (D == F32) { _mm512_storeu_ps(static_cast<float *>(p) + i, v); return; }
    auto *out = reinterpret_cast<__m256i *>(static_cast<uint16_t *>(p) + i);
    _mm256_storeu_si256(out, D == F16 ? _mm512_cvtps_ph(v, 0) : bf16_bits16(v));
}

AVX512 inline __attribute__((always_inline)) void transpose16(__m512i *a) {    // 16 x 16 numbers of 32 bits
    __m512i b[16];
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + 2 + j]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + 2 + j]);
        }
    for (int j = 0; j < 4; ++j) {    // a[4 i + j] holds columns j, 4 + j, 8 + j, 12 + j of rows 4 i .. 4 i + 3
        const __m512i even0 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), odd0 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const __m512i even1 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88), odd1 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        b[j] = _mm512_shuffle_i32x4(even0, even1, 0x88);
        b[4 + j] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
        b[8 + j] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
        b[12 + j] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
    }
    for (int i = 0; i < 16; ++i) a[i] = b[i];
}

// Stores of 32 and of 64 bytes, aligned where they stream past the caches (after those a thread ends with _mm_sfence).
AVX2 inline void put32(void *p, __m256i v, bool stream) {
    if (stream) _mm256_stream_si256(static_cast<__m256i *>(p), v);
    else _mm256_storeu_si256(static_cast<__m256i *>(p), v);
}

AVX512 inline void put64(void *p, __m512i v, bool stream) {
    if (stream) _mm512_stream_si512(static_cast<__m512i *>(p), v);
    else _mm512_storeu_si512(p, v);
}

}  // namespace
