// Vectors, packing and the block product of one SIMD path. attention.cpp includes this once per path, inside a namespace of its own, with
// TARGET (function attribute), WIDTH (floats of a vector), PAIRED (bf16 operands, packed in pairs, instead of fp32) and TILES (AMX).
// No include guard, no includes of its own.
//
// A product is C[m][n] (+)= A[m][k] B[k][n]: A row-major, B packed [k / PAIR][n][PAIR], C fp32, all sizes multiples of 32.

#define INLINE TARGET inline __attribute__((always_inline))

#if PAIRED
using Element = uint16_t;
constexpr int64_t PAIR = 2;
#else
using Element = float;
constexpr int64_t PAIR = 1;
#endif
typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));

// ---- vectors

INLINE Floats loaded(const float *p) { Floats v; std::memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, Floats v) { std::memcpy(p, &v, sizeof v); }
INLINE Floats all(float x) { return x - Floats{}; }    // minus, as 0 + x would not be x = -0

#if WIDTH == 16
INLINE Floats madd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats most(Floats a, Floats b) { return _mm512_max_ps(a, b); }    // b where one is NaN
INLINE Floats choose(uint64_t bits, Floats yes, Floats no) { return _mm512_mask_blend_ps(__mmask16(bits), no, yes); }
INLINE Floats where_lowest(Floats x, Floats yes, Floats no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, all(-INFINITY), _CMP_EQ_OQ), no, yes);
}
INLINE Floats where_above(Floats a, Floats b, Floats yes, Floats no) {    // a > b, or one is NaN
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ), no, yes);
}
template <int D> INLINE Floats get(const void *p, int64_t i) { return load16<D>(p, i); }
template <int D> INLINE void put(void *p, int64_t i, Floats v) { store16<D>(p, i, v); }
#else
INLINE Floats mix(Ints which, Floats yes, Floats no) { return Floats((which & Ints(yes)) | (~which & Ints(no))); }
INLINE Floats where_above(Floats a, Floats b, Floats yes, Floats no) { return mix(a <= b, no, yes); }
INLINE Floats where_lowest(Floats x, Floats yes, Floats no) { return mix(x == all(-INFINITY), yes, no); }
INLINE Floats choose(uint64_t bits, Floats yes, Floats no) {
    Ints lane;
    for (int i = 0; i < WIDTH; ++i) lane[i] = 1 << i;
    return mix((lane & int32_t(bits & 0xffff)) != 0, yes, no);
}
#if WIDTH == 8
INLINE Floats madd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Floats most(Floats a, Floats b) { return _mm256_max_ps(a, b); }
template <int D> INLINE Floats get(const void *p, int64_t i) { return load8<D>(p, i); }
template <int D> INLINE void put(void *p, int64_t i, Floats v) { store8<D>(p, i, v); }
#else
#if QTUNE_NEON
INLINE Floats madd(Floats a, Floats b, Floats c) { return Floats(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b))); }
#else
INLINE Floats madd(Floats a, Floats b, Floats c) { return a * b + c; }
#endif
INLINE Floats most(Floats a, Floats b) { return mix(a > b, a, b); }
template <int D> INLINE Floats get(const void *p, int64_t i) {
    Floats v;
    for (int j = 0; j < WIDTH; ++j) v[j] = load<D>(p, i + j);
    return v;
}
template <int D> INLINE void put(void *p, int64_t i, Floats v) {
    for (int j = 0; j < WIDTH; ++j) static_cast<typename Stored<D>::type *>(p)[i + j] = rounded<D>(v[j]);
}
#endif
#endif

// 2^x to about 2e-7 (bf16 operands) or 2e-8, and 0 below 2^-100: next to the largest probability that is nothing, and what is left is far
// enough from the denormals, which cost a hundred cycles each. NaN stays. The polynomials are minimax fits on [-1/2, 1/2].
INLINE Floats power2(Floats x) {
    const Floats round = all(12582912.0f);    // 1.5 * 2^23: sums with it are rounded to integers
    const Floats whole = x + round, part = x - (whole - round);
    Floats p = all(COEFFICIENTS[0]);
    for (int i = 1; i < TERMS; ++i) p = madd(p, part, all(COEFFICIENTS[i]));
    const Ints shift = Ints(whole) << 23;
#if WIDTH == 16
    const __mmask16 counts = _mm512_cmp_ps_mask(x, all(-100.0f), _CMP_NLT_UQ);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(counts, __m512i(Ints(p)), __m512i(shift)));
#else
    return mix(x < all(-100.0f), Floats{}, Floats(Ints(p) + shift));
#endif
}

// Scores, maxima and lse are kept in units in which the exponential is `power`: with bf16 operands those of log 2, which saves a product; with
// fp32 natural ones, so that score - lse has no error but lse's own.
#if PAIRED
constexpr float UNIT = LOG2E;
INLINE Floats power(Floats x) { return power2(x); }
#else
constexpr float UNIT = 1.0f;
INLINE Floats power(Floats x) { return power2(x * all(LOG2E)); }
#endif

// log2 x for x in [1, 2^30]: the exponent and a line, then three steps of Newton.
INLINE Floats logarithm2(Floats x) {
    Floats y;
    const Ints bits = Ints(x) - 0x3f800000;
    for (int i = 0; i < WIDTH; ++i) y[i] = float(bits[i]) * 1.1920929e-07f;
    for (int step = 0; step < 3; ++step) y = madd(madd(x, power2(-y), all(-1.0f)), all(LOG2E), y);
    return y;
}

// ---- elements

// Two vectors of one row, rounded; and what becomes of two such rows.
#if PAIRED
using Row = __m512i;
INLINE Floats element(const Element *p) { return load16<BF16>(p, 0); }
INLINE Row row_of(Floats left, Floats right) { return Row(_mm512_cvtne2ps_pbh(right, left)); }
INLINE void put_row(Element *p, Row r) { _mm512_storeu_si512(p, r); }
alignas(64) const uint16_t ZIP[2][32] = {{0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
                                         {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
INLINE void put_pairs(Element *p, Row upper, Row lower) {    // packed, in rows of BLOCK pairs
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16(upper, _mm512_load_si512(ZIP[0]), lower));
    _mm512_storeu_si512(p + 32, _mm512_permutex2var_epi16(upper, _mm512_load_si512(ZIP[1]), lower));
}
#else
struct Row { Floats left, right; };
INLINE Floats element(const Element *p) { return loaded(p); }
INLINE Row row_of(Floats left, Floats right) { return {left, right}; }
INLINE void put_row(Element *p, Row r) { store(p, r.left); store(p + WIDTH, r.right); }
INLINE void put_pairs(Element *p, Row upper, Row lower) { put_row(p, upper); put_row(p + BLOCK, lower); }
#endif

template <int D> TARGET void convert(const void *from, float *to, int64_t n) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) store(to + i, get<D>(from, i));
    for (; i < n; ++i) to[i] = load<D>(from, i);
}
template <int D> TARGET void write_rounded(const float *from, Floats scale, void *to, int64_t n) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) put<D>(to, i, loaded(from + i) * scale);
    for (; i < n; ++i) static_cast<typename Stored<D>::type *>(to)[i] = rounded<D>(from[i] * scale[0]);
}

// `rows` rows of D values as rows of `wide` elements, zeros around them: where they are if nothing has to change, else in `local`.
TARGET static const Element *staged(const Task &t, const char *from, int64_t stride, int64_t rows, Element *local, int64_t *step) {
    if ((PAIRED || t.dtype == F32) && rows == BLOCK && t.D == t.wide && stride % PAIR == 0) {
        *step = stride;
        return reinterpret_cast<const Element *>(from);
    }
    *step = t.wide;
    for (int64_t i = 0; i < BLOCK; ++i) {
        Element *to = local + i * t.wide;
        const char *source = from + i * stride * (t.dtype == F32 ? 4 : 2);
        const int64_t n = i < rows ? t.D : 0;
#if PAIRED
        if (n) std::memcpy(to, source, size_t(n) * 2);
#else
        if (t.dtype == F32) convert<F32>(source, to, n);
        else if (t.dtype == BF16) convert<BF16>(source, to, n);
        else convert<F16>(source, to, n);
#endif
        for (int64_t d = n; d < t.wide; ++d) to[d] = 0;
    }
    return local;
}

// Rows of `wide` fp32 times `scale` -> `rows` rows of the result, `stride` elements apart.
TARGET static void write_rows(const Task &t, const float *from, float scale, char *to, int64_t stride, int64_t rows) {
    const Floats factor = all(scale);
    for (int64_t i = 0; i < rows; ++i) {
        void *goal = to + i * stride * (t.dtype == F32 ? 4 : 2);
        if (t.dtype == F32) write_rounded<F32>(from + i * t.wide, factor, goal, t.D);
        else if (t.dtype == BF16) write_rounded<BF16>(from + i * t.wide, factor, goal, t.D);
        else write_rounded<F16>(from + i * t.wide, factor, goal, t.D);
    }
}

// ---- packing of 32-bit units: of one fp32 or of two bf16

// [rows][step] -> [columns][rows], both multiples of 16.
TARGET static void transpose(const void *from, int64_t step, int64_t rows, int64_t columns, void *to) {
    const auto *x = static_cast<const uint32_t *>(from);
    auto *y = static_cast<uint32_t *>(to);
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t c = 0; c < columns; c += 16) {
#if WIDTH == 16
            __m512i a[16];
            for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(x + (r + i) * step + c);
            transpose16(a);
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(y + (c + i) * rows + r, a[i]);
#else
            for (int64_t i = 0; i < 16; ++i)
                for (int64_t j = 0; j < 16; ++j) y[(c + i) * rows + r + j] = x[(r + j) * step + c + i];
#endif
        }
}

// Rows [64][step] -> [wide / PAIR][64][PAIR].
TARGET static void pack_columns(const Element *x, int64_t step, int64_t wide, void *to) { transpose(x, step / PAIR, BLOCK, wide / PAIR, to); }

// Rows [64][step] -> [64 / PAIR][wide][PAIR].
TARGET static void pack_pairs(const Element *x, int64_t step, int64_t wide, void *to) {
    auto *y = static_cast<Element *>(to);
#if PAIRED
    for (int64_t i = 0; i < BLOCK; i += 2)
        for (int64_t d = 0; d < wide; d += 16) {
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(x + i * step + d)));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(x + (i + 1) * step + d)));
            _mm512_storeu_si512(y + i * wide + d * 2, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
#else
    for (int64_t i = 0; i < BLOCK; ++i) std::memcpy(y + i * wide, x + i * step, size_t(wide) * 4);
#endif
}

// Rows [64][step] -> [wide][64].
TARGET static void turn(const Element *x, int64_t step, int64_t wide, void *to) {
#if PAIRED
    alignas(64) uint32_t both[WIDEST / 2 * BLOCK];
    auto *y = static_cast<Element *>(to);
    pack_columns(x, step, wide, both);
    for (int64_t d = 0; d < wide / 2; ++d)
        for (int64_t i = 0; i < BLOCK; i += 16) {
            const __m512i pairs = _mm512_load_si512(both + d * BLOCK + i);
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(y + 2 * d * BLOCK + i), _mm512_cvtepi32_epi16(pairs));
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(y + (2 * d + 1) * BLOCK + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
        }
#else
    pack_columns(x, step, wide, to);
#endif
}

// ---- the product, summed over `count` pairs of operands that lie a_next and b_next elements apart

#if TILES
INLINE void begin() { _tile_loadconfig(&TILING); }    // others in this process set the thread's tiles too, so every item sets its own
INLINE void end() { _tile_release(); }

TARGET static void product(int64_t m, int64_t n, int64_t k, int64_t count, const Element *a, int64_t a_step, int64_t a_next,
                           const Element *b, int64_t b_next, float *c, bool add) {
    for (int64_t i = 0; i < m; i += 32)
        for (int64_t j = 0; j < n; j += 32) {
            float *c0 = c + i * n + j, *c1 = c0 + 16 * n;
            if (add) {
                _tile_loadd(0, c0, n * 4); _tile_loadd(1, c0 + 16, n * 4);
                _tile_loadd(2, c1, n * 4); _tile_loadd(3, c1 + 16, n * 4);
            } else {
                _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
            }
            for (int64_t s = 0; s < count; ++s)
                for (int64_t l = 0; l < k; l += 32) {
                    const Element *left = a + s * a_next + i * a_step + l, *right = b + s * b_next + l * n + j * 2;
                    _tile_loadd(4, left, a_step * 2);
                    _tile_loadd(6, right, n * 4);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_loadd(7, right + 32, n * 4);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_loadd(5, left + 16 * a_step, a_step * 2);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
            _tile_stored(0, c0, n * 4); _tile_stored(1, c0 + 16, n * 4);
            _tile_stored(2, c1, n * 4); _tile_stored(3, c1 + 16, n * 4);
        }
}
#else
INLINE void begin() {}
INLINE void end() {}
#if PAIRED
INLINE Floats both(const Element *p) { int32_t two; std::memcpy(&two, p, 4); return Floats(_mm512_set1_epi32(two)); }
INLINE Floats right(const Element *p) { return Floats(_mm512_loadu_si512(p)); }
INLINE Floats dot(Floats a, Floats b, Floats c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
#else
INLINE Floats both(const Element *p) { return all(*p); }
INLINE Floats right(const Element *p) { return loaded(p); }
INLINE Floats dot(Floats a, Floats b, Floats c) { return madd(a, b, c); }
#endif

TARGET static void product(int64_t m, int64_t n, int64_t k, int64_t count, const Element *a, int64_t a_step, int64_t a_next,
                           const Element *b, int64_t b_next, float *c, bool add) {
    constexpr int ROWS = WIDTH == 16 ? 8 : 4;    // times two vectors: what the registers hold
    for (int64_t j = 0; j < n; j += 2 * WIDTH)
        for (int64_t i = 0; i < m; i += ROWS) {
            Floats sum[ROWS][2];
            for (int r = 0; r < ROWS; ++r)
                for (int v = 0; v < 2; ++v) sum[r][v] = add ? loaded(c + (i + r) * n + j + v * WIDTH) : Floats{};
            for (int64_t s = 0; s < count; ++s) {
                const Element *left = a + s * a_next + i * a_step, *top = b + s * b_next + j * PAIR;
                for (int64_t l = 0; l < k; l += PAIR) {
                    const Floats b0 = right(top + l * n), b1 = right(top + l * n + WIDTH * PAIR);
                    for (int r = 0; r < ROWS; ++r) {
                        const Floats value = both(left + r * a_step + l);
                        sum[r][0] = dot(value, b0, sum[r][0]);
                        sum[r][1] = dot(value, b1, sum[r][1]);
                    }
                }
            }
            for (int r = 0; r < ROWS; ++r)
                for (int v = 0; v < 2; ++v) store(c + (i + r) * n + j + v * WIDTH, sum[r][v]);
        }
}
#endif
