// Part of matmul.cpp, on x86-64 with AMX: W's values, unpacked and rounded to bf16, in the layout in which tiles multiply.
//
// A panel is [pair of tiles][step][tile][16 pairs of the reduction][16 columns][2]. What lies outside of W is 0.

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace {

alignas(64) const uint16_t ZIP[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

struct Span { int64_t column, columns, start, length, next; };    // columns: a multiple of 32; next: values from pair to pair of tiles

INLINE __m128i sixteen(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }

// Four bytes of each of 16 rows a vector, from 16 bytes of each: z[d] holds bytes 4 d .. 4 d + 3.
INLINE void turned(const uint8_t *const *row, int64_t at, __m512i *z) {
    __m512i a[4];
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_inserti32x4(_mm512_castsi128_si512(sixteen(row[i] + at)), sixteen(row[4 + i] + at), 1);
        a[i] = _mm512_inserti32x4(_mm512_inserti32x4(a[i], sixteen(row[8 + i] + at), 2), sixteen(row[12 + i] + at), 3);
    }
    const __m512i low0 = _mm512_unpacklo_epi32(a[0], a[1]), high0 = _mm512_unpackhi_epi32(a[0], a[1]);
    const __m512i low1 = _mm512_unpacklo_epi32(a[2], a[3]), high1 = _mm512_unpackhi_epi32(a[2], a[3]);
    z[0] = _mm512_unpacklo_epi64(low0, low1);
    z[1] = _mm512_unpackhi_epi64(low0, low1);
    z[2] = _mm512_unpacklo_epi64(high0, high1);
    z[3] = _mm512_unpackhi_epi64(high0, high1);
}

INLINE __m512i upper_halves(__m512 even, __m512 odd) {    // of 32-bit numbers, in pairs
    return _mm512_mask_mov_epi16(_mm512_srli_epi32(_mm512_castps_si512(even), 16), 0xaaaaaaaa, _mm512_castps_si512(odd));
}

// ---- y = x W^T: columns are rows of W, sixteen a tile

TARGET void fill4_rows(const Weight &w, int64_t first, int64_t start, int64_t length, uint16_t *to) {
    const uint8_t *row[16];
    int64_t block[16];
    alignas(64) float scale[16];
    for (int i = 0; i < 16; ++i) {
        const int64_t n = smaller(first + i, w.height - 1);
        row[i] = static_cast<const uint8_t *>(w.codes) + n * w.width / 2;
        block[i] = n * w.width / w.block;
    }
    const __m512 values = _mm512_loadu_ps(w.values);
    const __m512i zip = _mm512_load_si512(ZIP);
    __m512 scales = _mm512_setzero_ps();
    for (int64_t k = start; k < start + length; k += TILE, to += 2 * TILE * 16) {
        if (k == start || k % w.block == 0) {
            for (int i = 0; i < 16; ++i) scale[i] = first + i < w.height ? scale_of(w, block[i] + k / w.block) : 0.0f;
            scales = _mm512_load_ps(scale);
        }
        __m512i z[4];
        turned(row, k / 2, z);
        for (int d = 0; d < 4; ++d)
            for (int b = 0; b < 4; ++b) {    // only the four lowest bits of an index count
                const __m512 even = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(z[d], 8 * b + 4), values), scales);
                const __m512 odd = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(z[d], 8 * b), values), scales);
                const __m512i both = __m512i(_mm512_cvtne2ps_pbh(odd, even));
                _mm512_storeu_si512(to + (4 * d + b) * TILE, _mm512_permutexvar_epi16(zip, both));
            }
    }
}

TARGET void fill8_rows(const Weight &w, int64_t first, int64_t start, int64_t length, uint16_t *to) {
    alignas(64) static const uint8_t nothing[16] = {};
    for (int64_t k = start; k < start + length; k += TILE, to += 2 * TILE * 16)
        for (int half = 0; half < 2; ++half) {
            const uint8_t *row[16];
            for (int i = 0; i < 16; ++i)
                row[i] = first + i < w.height ? static_cast<const uint8_t *>(w.codes) + (first + i) * w.width + k + 16 * half : nothing;
            __m512i z[4];
            turned(row, 0, z);
            for (int d = 0; d < 4; ++d)
                for (int b = 0; b < 2; ++b) {
                    const __m512 even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(z[d], 24 - 16 * b), 24));
                    const __m512 odd = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(z[d], 16 - 16 * b), 24));
                    _mm512_storeu_si512(to + (8 * half + 2 * d + b) * TILE, upper_halves(even, odd));
                }
        }
}

TARGET void fill16_rows(const Weight &w, int64_t first, int64_t start, int64_t length, uint16_t *to) {
    const auto *values = static_cast<const uint16_t *>(w.codes);
    for (int64_t k = start; k < start + length; k += TILE, to += 2 * TILE * 16) {
        const int64_t inside = smaller(TILE, w.width - k);
        const __mmask32 mask = inside <= 0 ? 0 : 0xffffffffu >> (TILE - inside);
        __m512i a[16];
        for (int i = 0; i < 16; ++i)
            a[i] = first + i < w.height ? _mm512_maskz_loadu_epi16(mask, values + (first + i) * w.width + k) : _mm512_setzero_si512();
        transpose16(a);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * TILE, a[i]);
    }
}

// ---- y = x W: columns are columns of W, the reduction goes over its rows, two at a time

TARGET void fill4_columns(const Weight &w, const Span &s, uint16_t *panel) {
    const __m512 values = _mm512_loadu_ps(w.values);
    const __m512i shifts = _mm512_set1_epi64(0x00080000000c0004ll), low = _mm512_set1_epi16(15), second = _mm512_set1_epi32(0x00100000);
    for (int64_t n = s.start; n < s.start + s.length; n += 2) {
        const int64_t n0 = smaller(n, w.height - 1), n1 = smaller(n + 1, w.height - 1);
        const uint8_t *row0 = static_cast<const uint8_t *>(w.codes) + n0 * w.width / 2, *row1 = static_cast<const uint8_t *>(w.codes) + n1 * w.width / 2;
        uint16_t *to = panel + (n - s.start) * TILE / 2 % (16 * TILE) + (n - s.start) / TILE * TILE * TILE;
        __m512i table = _mm512_setzero_si512();
        for (int64_t k = s.column; k < s.column + s.columns; k += TILE, to += s.next) {
            if (k == s.column || k % w.block == 0) {
                const float scale0 = n < w.height ? scale_of(w, (n0 * w.width + k) / w.block) : 0.0f;
                const float scale1 = n + 1 < w.height ? scale_of(w, (n1 * w.width + k) / w.block) : 0.0f;
                table = __m512i(_mm512_cvtne2ps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(scale1)), _mm512_mul_ps(values, _mm512_set1_ps(scale0))));
            }
            const __m128i a = sixteen(row0 + k / 2), b = sixteen(row1 + k / 2);
            const __m512i left = _mm512_multishift_epi64_epi8(shifts, _mm512_cvtepu16_epi64(_mm_unpacklo_epi8(a, b)));
            const __m512i right = _mm512_multishift_epi64_epi8(shifts, _mm512_cvtepu16_epi64(_mm_unpackhi_epi8(a, b)));
            _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_ternarylogic_epi64(left, low, second, 0xea), table));
            _mm512_storeu_si512(to + 16 * TILE, _mm512_permutexvar_epi16(_mm512_ternarylogic_epi64(right, low, second, 0xea), table));
        }
    }
}

TARGET void fill8_columns(const Weight &w, const Span &s, uint16_t *panel) {
    alignas(64) static const uint8_t nothing[16] = {};
    const auto *codes = static_cast<const uint8_t *>(w.codes);
    for (int64_t n = s.start; n < s.start + s.length; n += 2) {
        uint16_t *to = panel + (n - s.start) * TILE / 2 % (16 * TILE) + (n - s.start) / TILE * TILE * TILE;
        for (int64_t k = s.column; k < s.column + s.columns; k += TILE, to += s.next)
            for (int half = 0; half < 2; ++half) {
                const __m128i a = sixteen(n < w.height ? codes + n * w.width + k + 16 * half : nothing);
                const __m128i b = sixteen(n + 1 < w.height ? codes + (n + 1) * w.width + k + 16 * half : nothing);
                const __m512 even = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(a)), odd = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b));
                _mm512_storeu_si512(to + half * 16 * TILE, upper_halves(even, odd));
            }
    }
}

TARGET void fill16_columns(const Weight &w, const Span &s, uint16_t *panel) {
    const auto *values = static_cast<const uint16_t *>(w.codes);
    for (int64_t n = s.start; n < s.start + s.length; n += 2) {
        uint16_t *to = panel + (n - s.start) * TILE / 2 % (16 * TILE) + (n - s.start) / TILE * TILE * TILE;
        for (int64_t k = s.column; k < s.column + s.columns; k += TILE, to += s.next)
            for (int half = 0; half < 2; ++half) {
                const int64_t at = k + 16 * half, inside = smaller(16, w.width - at);
                const __mmask16 mask = __mmask16(inside <= 0 ? 0 : 0xffff >> (16 - inside));
                const __m256i a = _mm256_maskz_loadu_epi16(n < w.height ? mask : __mmask16(0), values + n * w.width + at);
                const __m256i b = _mm256_maskz_loadu_epi16(n + 1 < w.height ? mask : __mmask16(0), values + (n + 1) * w.width + at);
                const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16);
                _mm512_storeu_si512(to + half * 16 * TILE, _mm512_or_si512(_mm512_cvtepu16_epi32(a), high));
            }
    }
}

// Columns and part of the reduction -> panel.
TARGET void fill(const Weight &w, bool transpose, const Span &s, uint16_t *panel) {
    if (transpose) {
        (w.form == BLOCKWISE4 ? fill4_columns : w.form == INT8 ? fill8_columns : fill16_columns)(w, s, panel);
        return;
    }
    const auto one = w.form == BLOCKWISE4 ? fill4_rows : w.form == INT8 ? fill8_rows : fill16_rows;
    for (int64_t c = 0; c < s.columns; c += 16) one(w, s.column + c, s.start, s.length, panel + c / TILE * s.next + c % TILE * TILE);
}

}  // namespace
