// The AVX2 and AVX-512 paths of blockwise4.cpp, which includes this file once, on x86-64 only. Both equal the scalar path bit for bit.
#pragma once
#include "simd_x86.h"

namespace {

// ---- AVX2: eight values a vector

struct Bounds8 { __m256 middle, low, high, quarters, odds; };

AVX2 inline Bounds8 bounds8(const float *b) {
    return {_mm256_set1_ps(b[7]), _mm256_set1_ps(b[3]), _mm256_set1_ps(b[11]),
            _mm256_setr_ps(b[1], b[5], b[9], b[13], 0, 0, 0, 0),
            _mm256_setr_ps(b[0], b[2], b[4], b[6], b[8], b[10], b[12], b[14])};
}

AVX2 inline __m256i above(__m256 v, __m256 bound, int bit) {
    return _mm256_and_si256(_mm256_castps_si256(_mm256_cmp_ps(v, bound, _CMP_NLE_UQ)), _mm256_set1_epi32(bit));
}

AVX2 inline __m256i bucket8(const Bounds8 &b, __m256 v) {    // four halvings of the sorted bounds
    __m256i code = above(v, b.middle, 8);
    code = _mm256_or_si256(code, above(v, _mm256_blendv_ps(b.low, b.high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28))), 4));
    code = _mm256_or_si256(code, above(v, _mm256_permutevar8x32_ps(b.quarters, _mm256_srli_epi32(code, 2)), 2));
    return _mm256_or_si256(code, above(v, _mm256_permutevar8x32_ps(b.odds, _mm256_srli_epi32(code, 1)), 1));
}

template <int D> AVX2 void pack_avx2(const void *task, int64_t first, int64_t last) {
    const Pack &t = *static_cast<const Pack *>(task);
    const Bounds8 bounds = bounds8(t.bounds);
    const __m256i order = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(t.order)));
    for (int64_t b = first; b < last; ++b) {
        int64_t i = b * t.block;
        const int64_t end = i + t.block;
        if (end > t.n) { pack_tail<D>(t, b); continue; }
        __m256i sizes = _mm256_setzero_si256();
        for (; i + 8 <= end; i += 8)
            sizes = _mm256_max_epu32(sizes, _mm256_and_si256(_mm256_castps_si256(load8<D>(t.w, i)), _mm256_set1_epi32(0x7fffffff)));
        uint32_t size[8], largest = as_bits(block_absmax<D>(t.w, i, end));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(size), sizes);
        for (int j = 0; j < 8; ++j) largest = size[j] > largest ? size[j] : largest;
        t.absmax[b] = as_float(largest);
        const float factor = reciprocal(t.absmax[b]);
        const __m256 scale = _mm256_set1_ps(factor);
        for (i = b * t.block; i + 32 <= end; i += 32) {
            __m256i codes[4];
            for (int j = 0; j < 4; ++j) codes[j] = bucket8(bounds, _mm256_mul_ps(load8<D>(t.w, i + 8 * j), scale));
            __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(codes[0], codes[1]), _mm256_packus_epi32(codes[2], codes[3]));
            bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));   // the packs work in 128-bit lanes
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_shuffle_epi8(order, bytes), _mm256_set1_epi16(0x0110));
            const __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
            _mm_storeu_si128(reinterpret_cast<__m128i *>(t.codes + i / 2), packed);
        }
        pack_values<D>(t, i, end, factor, false);
    }
}

template <int D> AVX2 inline void unpack_narrow8(const Unpack &t, __m256 low, __m256 high, int64_t i, int64_t end) {
    uint16_t table[16];
    __m256i words;
    if (D == F16) words = _mm256_setr_m128i(_mm256_cvtps_ph(low, 0), _mm256_cvtps_ph(high, 0));
    else words = _mm256_permute4x64_epi64(_mm256_packus_epi32(bf16_bits8(low), bf16_bits8(high)), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(table), words);
    const __m256i first = _mm256_and_si256(words, _mm256_set1_epi16(0xff)), second = _mm256_srli_epi16(words, 8);
    const __m256i plane0 = _mm256_permute4x64_epi64(_mm256_packus_epi16(first, first), 0x88);   // low bytes of the 16 entries, twice
    const __m256i plane1 = _mm256_permute4x64_epi64(_mm256_packus_epi16(second, second), 0x88);
    for (; i + 32 <= end; i += 32) {
        const __m256i raw = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(t.codes + i / 2)));
        const __m256i nibbles = _mm256_or_si256(_mm256_srli_epi16(raw, 4), _mm256_and_si256(_mm256_slli_epi16(raw, 8), _mm256_set1_epi16(0x0f00)));
        const __m256i bytes0 = _mm256_shuffle_epi8(plane0, nibbles), bytes1 = _mm256_shuffle_epi8(plane1, nibbles);
        const __m256i a = _mm256_unpacklo_epi8(bytes0, bytes1), b = _mm256_unpackhi_epi8(bytes0, bytes1);
        auto *out = reinterpret_cast<__m256i *>(static_cast<uint16_t *>(t.out) + i);
        put32(out, _mm256_permute2x128_si256(a, b, 0x20), t.stream);
        put32(out + 1, _mm256_permute2x128_si256(a, b, 0x31), t.stream);
    }
    look_up<D>(t, reinterpret_cast<typename Stored<D>::type *>(table), i, end);
}

AVX2 inline void unpack_wide8(const Unpack &t, __m256 low, __m256 high, int64_t i, int64_t end) {
    uint32_t table[16];
    _mm256_storeu_ps(reinterpret_cast<float *>(table), low);
    _mm256_storeu_ps(reinterpret_cast<float *>(table) + 8, high);
    const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    for (; i + 8 <= end; i += 8) {
        int32_t four;
        std::memcpy(&four, t.codes + i / 2, 4);
        const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(four), shifts);
        const __m256 eighth = _mm256_castsi256_ps(_mm256_slli_epi32(nibbles, 28));
        const __m256 v = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, nibbles), _mm256_permutevar8x32_ps(high, nibbles), eighth);
        put32(static_cast<float *>(t.out) + i, _mm256_castps_si256(v), t.stream);
    }
    look_up<F32>(t, table, i, end);
}

template <int D> AVX2 inline void unpack_span8(const Unpack &t, int64_t b, int64_t begin, int64_t end) {    // of block b; begin is even
    const __m256 scale = _mm256_set1_ps(block_scale(t, b));
    const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(t.values), scale), high = _mm256_mul_ps(_mm256_loadu_ps(t.values + 8), scale);
    if (D == F32) unpack_wide8(t, low, high, begin, end);
    else unpack_narrow8<D>(t, low, high, begin, end);
}

template <int D> AVX2 void unpack_avx2(const void *task, int64_t first, int64_t last) {
    const Unpack &t = *static_cast<const Unpack *>(task);
    for (int64_t b = first; b < last; ++b) unpack_span8<D>(t, b, b * t.block, (b + 1) * t.block < t.n ? (b + 1) * t.block : t.n);
    if (t.stream) _mm_sfence();
}

template <int D> AVX2 void rows_avx2(const void *task, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
        for (Row<D> row(*static_cast<const Rows *>(task), r); row.i < row.end; row.next()) unpack_span8<D>(row.t, row.block, row.i, row.stop);
}

// ---- AVX-512: sixteen values a vector, so a table of sixteen fits in one register

struct Bounds16 { __m512 eight, four, two, one; };

AVX512 inline __m512i bucket16(const Bounds16 &b, __m512 v) {    // `two` and `one` are read at the code found so far
    __m512i code = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(v, b.eight, _CMP_NLE_UQ), 8);
    code = _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(code, b.four), _CMP_NLE_UQ), code, _mm512_set1_epi32(4));
    code = _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(code, b.two), _CMP_NLE_UQ), code, _mm512_set1_epi32(2));
    return _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(code, b.one), _CMP_NLE_UQ), code, _mm512_set1_epi32(1));
}

template <int D> AVX512 void pack_avx512(const void *task, int64_t first, int64_t last) {
    const Pack &t = *static_cast<const Pack *>(task);
    float shifted[24] = {};
    std::memcpy(shifted, t.bounds, 15 * sizeof(float));
    const Bounds16 bounds = {_mm512_set1_ps(shifted[7]), _mm512_loadu_ps(shifted + 3), _mm512_loadu_ps(shifted + 1), _mm512_loadu_ps(shifted)};
    const __m256i order = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(t.order)));
    for (int64_t b = first; b < last; ++b) {
        int64_t i = b * t.block;
        const int64_t end = i + t.block;
        if (end > t.n) { pack_tail<D>(t, b); continue; }
        __m512i sizes = _mm512_setzero_si512();
        for (; i + 16 <= end; i += 16)
            sizes = _mm512_max_epu32(sizes, _mm512_and_si512(_mm512_castps_si512(load16<D>(t.w, i)), _mm512_set1_epi32(0x7fffffff)));
        const uint32_t rest = as_bits(block_absmax<D>(t.w, i, end)), whole = _mm512_reduce_max_epu32(sizes);
        t.absmax[b] = as_float(rest > whole ? rest : whole);
        const float factor = reciprocal(t.absmax[b]);
        const __m512 scale = _mm512_set1_ps(factor);
        for (i = b * t.block; i + 32 <= end; i += 32) {
            const __m128i low = _mm512_cvtepi32_epi8(bucket16(bounds, _mm512_mul_ps(load16<D>(t.w, i), scale)));
            const __m128i high = _mm512_cvtepi32_epi8(bucket16(bounds, _mm512_mul_ps(load16<D>(t.w, i + 16), scale)));
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_shuffle_epi8(order, _mm256_setr_m128i(low, high)), _mm256_set1_epi16(0x0110));
            _mm_storeu_si128(reinterpret_cast<__m128i *>(t.codes + i / 2), _mm256_cvtepi16_epi8(pairs));
        }
        pack_values<D>(t, i, end, factor, false);
    }
}

template <int D> AVX512 inline void unpack_span16(const Unpack &t, int64_t b, int64_t i, int64_t end) {    // of block b; i is even
    const __m512 products = _mm512_mul_ps(_mm512_loadu_ps(t.values), _mm512_set1_ps(block_scale(t, b)));
    typename Stored<D>::type table[16];
    if (D == F32) {
        _mm512_storeu_ps(table, products);
        for (; i + 16 <= end; i += 16) {
            const __m512i raw = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(t.codes + i / 2)));
            const __m512i nibbles = _mm512_or_si512(_mm512_srli_epi64(raw, 4), _mm512_slli_epi64(raw, 32));   // only 4 bits count
            put64(static_cast<float *>(t.out) + i, _mm512_castps_si512(_mm512_permutexvar_ps(nibbles, products)), t.stream);
        }
    } else {
        const __m256i words = D == F16 ? _mm512_cvtps_ph(products, 0) : bf16_bits16(products);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(table), words);
        const __m512i twice = _mm512_broadcast_i64x4(words);   // bit 4 of an index does not matter then
        for (; i + 32 <= end; i += 32) {
            const __m512i raw = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(t.codes + i / 2)));
            const __m512i nibbles = _mm512_or_si512(_mm512_srli_epi32(raw, 4), _mm512_slli_epi32(raw, 16));
            put64(static_cast<uint16_t *>(t.out) + i, _mm512_permutexvar_epi16(nibbles, twice), t.stream);
        }
    }
    look_up<D>(t, table, i, end);
}

template <int D> AVX512 void unpack_avx512(const void *task, int64_t first, int64_t last) {
    const Unpack &t = *static_cast<const Unpack *>(task);
    for (int64_t b = first; b < last; ++b) unpack_span16<D>(t, b, b * t.block, (b + 1) * t.block < t.n ? (b + 1) * t.block : t.n);
    if (t.stream) _mm_sfence();
}

template <int D> AVX512 void rows_avx512(const void *task, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
        for (Row<D> row(*static_cast<const Rows *>(task), r); row.i < row.end; row.next()) unpack_span16<D>(row.t, row.block, row.i, row.stop);
}

}  // namespace
