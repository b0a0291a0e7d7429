// The AVX2 and AVX-512 paths of adamw8.cpp, which includes this file once, on x86-64 only. Both equal the scalar path bit for bit.
#pragma once
#include "simd_x86.h"

namespace {

// ---- AVX2: eight values a vector

AVX2 inline __m256 load_any8(int dtype, const void *p, int64_t i) {
    return dtype == F32 ? load8<F32>(p, i) : dtype == BF16 ? load8<BF16>(p, i) : load8<F16>(p, i);
}

AVX2 inline __m256 state8(const Map &map, const uint8_t *codes, __m256 scale) {
    const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes)));
    return _mm256_mul_ps(_mm256_i32gather_ps(map.values, code, 4), scale);
}

AVX2 inline __m256i random8(uint32_t key, int place) {
    const __m256i steps = _mm256_setr_epi32(0, int(0x9e3779b9u), int(2 * 0x9e3779b9u), int(3 * 0x9e3779b9u), int(4 * 0x9e3779b9u),
                                            int(5 * 0x9e3779b9u), int(6 * 0x9e3779b9u), int(7 * 0x9e3779b9u));
    __m256i x = _mm256_add_epi32(_mm256_set1_epi32(int(key + uint32_t(place) * 0x9e3779b9u)), steps);
    x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 16)), _mm256_set1_epi32(0x7feb352d));
    x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 15)), _mm256_set1_epi32(int(0x846ca68bu)));
    return _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
}

AVX2 inline void store_stochastic8(void *param, int64_t i, __m256 p, __m256i random) {
    const __m256i bits = _mm256_castps_si256(p), all = _mm256_set1_epi32(0x7f800000);
    const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_and_si256(random, _mm256_set1_epi32(0xffff))), 16);
    const __m256i words = _mm256_blendv_epi8(up, bf16_bits8(p), _mm256_cmpeq_epi32(_mm256_and_si256(bits, all), all));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(static_cast<uint16_t *>(param) + i),
                     _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

template <Kind K> AVX2 inline __m256i nearest8(const Map &map, __m256 value, __m256 scale) {
    const __m256i x = _mm256_castps_si256(_mm256_mul_ps(value, scale)), minus = _mm256_srai_epi32(x, 31);
    const __m256 size = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(0x7fffffff)));
    const __m256i kept = _mm256_castps_si256(_mm256_min_ps(size, _mm256_set1_ps(1.0f)));   // a NaN as 1
    const __m256i lowest = _mm256_set1_epi32(int(FIRST_BIN));
    __m256i bin = _mm256_sub_epi32(_mm256_max_epi32(_mm256_srli_epi32(kept, 16), lowest), lowest);
    bin = _mm256_add_epi32(bin, _mm256_and_si256(minus, _mm256_set1_epi32(BINS)));
    const __m256i entry = _mm256_i32gather_epi32(reinterpret_cast<const int *>(map.bins), bin, 4);
    const __m256i before = _mm256_cmpgt_epi32(_mm256_srli_epi32(entry, 8), _mm256_and_si256(kept, _mm256_set1_epi32(0xffff)));
    const __m256i step = _mm256_andnot_si256(before, _mm256_or_si256(minus, _mm256_set1_epi32(1)));
    const __m256i code = _mm256_add_epi32(_mm256_and_si256(entry, _mm256_set1_epi32(255)), step);
    if (K == SIGNED) return code;
    return _mm256_max_epi32(code, _mm256_srli_epi32(_mm256_castps_si256(_mm256_cmp_ps(value, _mm256_setzero_ps(), _CMP_GT_OQ)), 31));
}

template <Kind K> AVX2 inline void store_states8(const Map &map, const float *state, float scale, uint8_t *codes, int64_t size) {
    const __m256 wide = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + 32 <= size; i += 32) {
        __m256i c[4];
        for (int j = 0; j < 4; ++j) c[j] = nearest8<K>(map, _mm256_loadu_ps(state + i + 8 * j), wide);
        const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(c[0], c[1]), _mm256_packus_epi32(c[2], c[3]));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);    // the packs work in 128-bit lanes
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(codes + i), _mm256_permutevar8x32_epi32(bytes, order));
    }
    store_rest<K>(map, state, scale, codes, i, size);
}

AVX2 inline uint32_t largest8(__m256i sizes, uint32_t rest) {
    uint32_t size[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(size), sizes);
    for (int j = 0; j < 8; ++j) rest = size[j] > rest ? size[j] : rest;
    return rest;
}

template <int D> AVX2 void update_avx2(const void *task, int64_t first, int64_t last) {
    const Update &t = *static_cast<const Update *>(task);
    const __m256i positive = _mm256_set1_epi32(0x7fffffff);
    States now;
    for (int64_t b = first; b < last; ++b) {
        const int64_t begin = b * BLOCK, end = begin + BLOCK < t.n ? begin + BLOCK : t.n;
        const __m256 m_scale = _mm256_set1_ps(t.m_absmax[b]), v_scale = _mm256_set1_ps(t.v_absmax[b]);
        const uint32_t key = block_key(t.seed, b);
        __m256i m_sizes = _mm256_setzero_si256(), v_sizes = _mm256_setzero_si256();
        int64_t i = begin;
        for (; i + 8 <= end; i += 8) {
            const __m256 g = load_any8(t.grad_dtype, t.grad, i), g2 = _mm256_mul_ps(g, g);
            const __m256 m = _mm256_add_ps(_mm256_mul_ps(state8(t.m_map, t.m_codes + i, m_scale), _mm256_set1_ps(t.beta1)),
                                           _mm256_mul_ps(g, _mm256_set1_ps(t.rest1)));
            const __m256 v = _mm256_add_ps(_mm256_mul_ps(state8(t.v_map, t.v_codes + i, v_scale), _mm256_set1_ps(t.beta2)),
                                           _mm256_mul_ps(g2, _mm256_set1_ps(t.rest2)));
            const __m256 down = _mm256_add_ps(_mm256_mul_ps(_mm256_sqrt_ps(v), _mm256_set1_ps(t.root)), _mm256_set1_ps(t.eps));
            const __m256 change = _mm256_div_ps(_mm256_mul_ps(m, _mm256_set1_ps(t.size)), down);
            const __m256 p = _mm256_add_ps(_mm256_mul_ps(load8<D>(t.param, i), _mm256_set1_ps(t.keep)), change);
            if (D == BF16 && t.seed) store_stochastic8(t.param, i, p, random8(key, int(i - begin)));
            else store8<D>(t.param, i, p);
            _mm256_storeu_ps(now.m + (i - begin), m);
            _mm256_storeu_ps(now.v + (i - begin), v);
            m_sizes = _mm256_max_epu32(m_sizes, _mm256_and_si256(_mm256_castps_si256(m), positive));
            v_sizes = _mm256_max_epu32(v_sizes, _mm256_and_si256(_mm256_castps_si256(v), positive));
        }
        uint32_t peaks[2] = {};
        update_rest<D>(t, b, i, end, now, peaks);
        t.m_absmax[b] = as_float(largest8(m_sizes, peaks[0]));
        t.v_absmax[b] = as_float(largest8(v_sizes, peaks[1]));
        store_states8<SIGNED>(t.m_map, now.m, divisor(t.m_absmax[b]), t.m_codes + begin, end - begin);
        store_states8<UNSIGNED>(t.v_map, now.v, divisor(t.v_absmax[b]), t.v_codes + begin, end - begin);
    }
}

// ---- AVX-512: sixteen values a vector

AVX512 inline __m512 load_any16(int dtype, const void *p, int64_t i) {
    return dtype == F32 ? load16<F32>(p, i) : dtype == BF16 ? load16<BF16>(p, i) : load16<F16>(p, i);
}

AVX512 inline __m512 state16(const Map &map, const uint8_t *codes, __m512 scale) {
    const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes)));
    return _mm512_mul_ps(_mm512_i32gather_ps(code, map.values, 4), scale);
}

AVX512 inline __m512i random16(uint32_t key, int place) {
    const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(place), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    __m512i x = _mm512_add_epi32(_mm512_set1_epi32(int(key)), _mm512_mullo_epi32(places, _mm512_set1_epi32(int(0x9e3779b9u))));
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32(0x7feb352d));
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)), _mm512_set1_epi32(int(0x846ca68bu)));
    return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

AVX512 inline void store_stochastic16(void *param, int64_t i, __m512 p, __m512i random) {
    const __m512i bits = _mm512_castps_si512(p), all = _mm512_set1_epi32(0x7f800000);
    const __m512i up = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_and_si512(random, _mm512_set1_epi32(0xffff))), 16);
    const __mmask16 odd = _mm512_cmpeq_epi32_mask(_mm512_and_si512(bits, all), all);
    const __m256i words = _mm256_mask_mov_epi16(_mm512_cvtepi32_epi16(up), odd, bf16_bits16(p));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(static_cast<uint16_t *>(param) + i), words);
}

template <Kind K> AVX512 inline __m128i nearest16(const Map &map, __m512 value, __m512 scale) {
    const __m512i x = _mm512_castps_si512(_mm512_mul_ps(value, scale)), minus = _mm512_srai_epi32(x, 31);
    const __m512 size = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0x7fffffff)));
    const __m512i kept = _mm512_castps_si512(_mm512_min_ps(size, _mm512_set1_ps(1.0f)));   // a NaN as 1
    const __m512i lowest = _mm512_set1_epi32(int(FIRST_BIN));
    __m512i bin = _mm512_sub_epi32(_mm512_max_epi32(_mm512_srli_epi32(kept, 16), lowest), lowest);
    bin = _mm512_add_epi32(bin, _mm512_and_si512(minus, _mm512_set1_epi32(BINS)));
    const __m512i entry = _mm512_i32gather_epi32(bin, map.bins, 4);
    const __mmask16 past = _mm512_cmpge_epi32_mask(_mm512_and_si512(kept, _mm512_set1_epi32(0xffff)), _mm512_srli_epi32(entry, 8));
    const __m512i code = _mm512_mask_add_epi32(entry, past, entry, _mm512_or_si512(minus, _mm512_set1_epi32(1)));
    const __m128i bytes = _mm512_cvtepi32_epi8(code);   // the lowest byte of each
    if (K == SIGNED) return bytes;
    return _mm_max_epu8(bytes, _mm_maskz_set1_epi8(_mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_GT_OQ), 1));
}

template <Kind K> AVX512 inline void store_states16(const Map &map, const float *state, float scale, uint8_t *codes, int64_t size) {
    const __m512 wide = _mm512_set1_ps(scale);
    int64_t i = 0;
    for (; i + 16 <= size; i += 16)
        _mm_storeu_si128(reinterpret_cast<__m128i *>(codes + i), nearest16<K>(map, _mm512_loadu_ps(state + i), wide));
    store_rest<K>(map, state, scale, codes, i, size);
}

template <int D> AVX512 void update_avx512(const void *task, int64_t first, int64_t last) {
    const Update &t = *static_cast<const Update *>(task);
    const __m512i positive = _mm512_set1_epi32(0x7fffffff);
    States now;
    for (int64_t b = first; b < last; ++b) {
        const int64_t begin = b * BLOCK, end = begin + BLOCK < t.n ? begin + BLOCK : t.n;
        const __m512 m_scale = _mm512_set1_ps(t.m_absmax[b]), v_scale = _mm512_set1_ps(t.v_absmax[b]);
        const uint32_t key = block_key(t.seed, b);
        __m512i m_sizes = _mm512_setzero_si512(), v_sizes = _mm512_setzero_si512();
        int64_t i = begin;
        for (; i + 16 <= end; i += 16) {
            const __m512 g = load_any16(t.grad_dtype, t.grad, i), g2 = _mm512_mul_ps(g, g);
            const __m512 m = _mm512_add_ps(_mm512_mul_ps(state16(t.m_map, t.m_codes + i, m_scale), _mm512_set1_ps(t.beta1)),
                                           _mm512_mul_ps(g, _mm512_set1_ps(t.rest1)));
            const __m512 v = _mm512_add_ps(_mm512_mul_ps(state16(t.v_map, t.v_codes + i, v_scale), _mm512_set1_ps(t.beta2)),
                                           _mm512_mul_ps(g2, _mm512_set1_ps(t.rest2)));
            const __m512 down = _mm512_add_ps(_mm512_mul_ps(_mm512_sqrt_ps(v), _mm512_set1_ps(t.root)), _mm512_set1_ps(t.eps));
            const __m512 change = _mm512_div_ps(_mm512_mul_ps(m, _mm512_set1_ps(t.size)), down);
            const __m512 p = _mm512_add_ps(_mm512_mul_ps(load16<D>(t.param, i), _mm512_set1_ps(t.keep)), change);
            if (D == BF16 && t.seed) store_stochastic16(t.param, i, p, random16(key, int(i - begin)));
            else store16<D>(t.param, i, p);
            _mm512_storeu_ps(now.m + (i - begin), m);
            _mm512_storeu_ps(now.v + (i - begin), v);
            m_sizes = _mm512_max_epu32(m_sizes, _mm512_and_si512(_mm512_castps_si512(m), positive));
            v_sizes = _mm512_max_epu32(v_sizes, _mm512_and_si512(_mm512_castps_si512(v), positive));
        }
        uint32_t peaks[2] = {};
        update_rest<D>(t, b, i, end, now, peaks);
        const uint32_t m_peak = _mm512_reduce_max_epu32(m_sizes), v_peak = _mm512_reduce_max_epu32(v_sizes);
        t.m_absmax[b] = as_float(m_peak > peaks[0] ? m_peak : peaks[0]);
        t.v_absmax[b] = as_float(v_peak > peaks[1] ? v_peak : peaks[1]);
        store_states16<SIGNED>(t.m_map, now.m, divisor(t.m_absmax[b]), t.m_codes + begin, end - begin);
        store_states16<UNSIGNED>(t.v_map, now.v, divisor(t.v_absmax[b]), t.v_codes + begin, end - begin);
    }
}

}  // namespace
