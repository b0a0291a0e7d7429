// The AVX2 and AVX-512 paths of int8.cpp, which includes this file once, on x86-64 only. Both equal the scalar path bit for bit.
#pragma once
#include "simd_x86.h"

namespace {

// ---- AVX2: eight values a vector

AVX2 inline __m256i code8(__m256 v) {    // clamped, a NaN as 0, to the nearest integer, ties to even
    v = _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_ORD_Q));
    return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(v, _mm256_set1_ps(-127.0f)), _mm256_set1_ps(127.0f)));
}

template <int D> AVX2 void pack_avx2(const void *task, int64_t first, int64_t last) {
    const Pack &t = *static_cast<const Pack *>(task);
    for (int64_t r = first; r < last; ++r) {
        const int64_t begin = r * t.cols, end = begin + t.cols;
        int64_t i = begin;
        __m256i sizes = _mm256_setzero_si256();
        for (; i + 8 <= end; i += 8)
            sizes = _mm256_max_epu32(sizes, _mm256_and_si256(_mm256_castps_si256(load8<D>(t.w, i)), _mm256_set1_epi32(0x7fffffff)));
        uint32_t size[8], largest = largest_rest<D>(t.w, i, end);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(size), sizes);
        for (int j = 0; j < 8; ++j) largest = size[j] > largest ? size[j] : largest;
        t.absmax[r] = as_float(largest);
        const float factor = factor_of(t.absmax[r]);
        const __m256 wide = _mm256_set1_ps(factor);
        for (i = begin; i + 32 <= end; i += 32) {
            __m256i codes[4];
            for (int j = 0; j < 4; ++j) codes[j] = code8(_mm256_mul_ps(load8<D>(t.w, i + 8 * j), wide));
            const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(codes[0], codes[1]), _mm256_packs_epi32(codes[2], codes[3]));
            const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);    // the packs work in 128-bit lanes
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(t.codes + i), _mm256_permutevar8x32_epi32(bytes, order));
        }
        pack_rest<D>(t, factor, i, end);
    }
}

template <int D> AVX2 void unpack_avx2(const void *task, int64_t first, int64_t last) {
    const Unpack &t = *static_cast<const Unpack *>(task);
    for (int64_t r = first; r < last; ++r) {
        const int64_t row = source_row(t, r), from = row * t.cols, to = r * t.cols;
        const float scale = scale_of(t, row);
        const __m256 wide = _mm256_set1_ps(scale);
        int64_t i = 0;
        for (; i + 8 <= t.cols; i += 8) {
            const __m256i codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(t.codes + from + i)));
            store8<D>(t.out, to + i, _mm256_mul_ps(_mm256_cvtepi32_ps(codes), wide));
        }
        unpack_rest<D>(t, scale, from, to, i);
    }
}

template <int D> AVX2 void scale_avx2(const void *task, int64_t first, int64_t last) {
    const Scale &t = *static_cast<const Scale *>(task);
    for (int64_t r = first; r < last; ++r) {
        int64_t i = 0;
        for (; i + 8 <= t.cols; i += 8) {
            const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(t.absmax + i), _mm256_set1_ps(STEP));
            store8<D>(t.out, r * t.cols + i, _mm256_mul_ps(load8<D>(t.x, r * t.cols + i), scale));
        }
        scale_rest<D>(t, r, i);
    }
}

// ---- AVX-512: sixteen values a vector

template <int D> AVX512 void pack_avx512(const void *task, int64_t first, int64_t last) {
    const Pack &t = *static_cast<const Pack *>(task);
    const __m512 low = _mm512_set1_ps(-127.0f), high = _mm512_set1_ps(127.0f);
    for (int64_t r = first; r < last; ++r) {
        const int64_t begin = r * t.cols, end = begin + t.cols;
        int64_t i = begin;
        __m512i sizes = _mm512_setzero_si512();
        for (; i + 16 <= end; i += 16)
            sizes = _mm512_max_epu32(sizes, _mm512_and_si512(_mm512_castps_si512(load16<D>(t.w, i)), _mm512_set1_epi32(0x7fffffff)));
        const uint32_t rest = largest_rest<D>(t.w, i, end), whole = _mm512_reduce_max_epu32(sizes);
        t.absmax[r] = as_float(rest > whole ? rest : whole);
        const float factor = factor_of(t.absmax[r]);
        const __m512 wide = _mm512_set1_ps(factor);
        for (i = begin; i + 16 <= end; i += 16) {
            __m512 v = _mm512_mul_ps(load16<D>(t.w, i), wide);
            v = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v);
            v = _mm512_min_ps(_mm512_max_ps(v, low), high);
            _mm_storeu_si128(reinterpret_cast<__m128i *>(t.codes + i), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
        }
        pack_rest<D>(t, factor, i, end);
    }
}

template <int D> AVX512 void unpack_avx512(const void *task, int64_t first, int64_t last) {
    const Unpack &t = *static_cast<const Unpack *>(task);
    for (int64_t r = first; r < last; ++r) {
        const int64_t row = source_row(t, r), from = row * t.cols, to = r * t.cols;
        const float scale = scale_of(t, row);
        const __m512 wide = _mm512_set1_ps(scale);
        int64_t i = 0;
        for (; i + 16 <= t.cols; i += 16) {
            const __m512i codes = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(t.codes + from + i)));
            store16<D>(t.out, to + i, _mm512_mul_ps(_mm512_cvtepi32_ps(codes), wide));
        }
        unpack_rest<D>(t, scale, from, to, i);
    }
}

template <int D> AVX512 void scale_avx512(const void *task, int64_t first, int64_t last) {
    const Scale &t = *static_cast<const Scale *>(task);
    for (int64_t r = first; r < last; ++r) {
        int64_t i = 0;
        for (; i + 16 <= t.cols; i += 16) {
            const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(t.absmax + i), _mm512_set1_ps(STEP));
            store16<D>(t.out, r * t.cols + i, _mm512_mul_ps(load16<D>(t.x, r * t.cols + i), scale));
        }
        scale_rest<D>(t, r, i);
    }
}

}  // namespace
