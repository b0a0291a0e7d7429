// Part of matmul.cpp, on x86-64 with AMX: one item of the product.

namespace {

// A part of x: bytes from row to row, values from step to step, where its reduction starts in a pair's panel.
struct Rows { const uint16_t *from; int64_t stride, next, steps, panel; };

// c[16 HEIGHT][32] (+)= a b over `steps` steps.
template <int HEIGHT> INLINE void multiply(const Rows &a, const uint16_t *b, float *c, bool add) {
    if (add) {
        _tile_loadd(0, c, 128); _tile_loadd(1, c + 16, 128);
        if (HEIGHT == 2) { _tile_loadd(2, c + 512, 128); _tile_loadd(3, c + 528, 128); }
    } else {
        _tile_zero(0); _tile_zero(1);
        if (HEIGHT == 2) { _tile_zero(2); _tile_zero(3); }
    }
    const uint16_t *left = a.from, *lower = a.from + 8 * a.stride;    // 16 rows below, in values of two bytes
    _tile_loadd(4, left, a.stride);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + 16 * TILE, 64);
    if (HEIGHT == 2) _tile_loadd(5, lower, a.stride);
    for (int64_t s = 1; s < a.steps; ++s) {    // each tile's next values come right after its last use: a fifth faster where tiles are not renamed
        left += a.next, lower += a.next, b += TILE * TILE;
        for (int i = 0; i < 32; ++i) _mm_prefetch(reinterpret_cast<const char *>(b + (TILE + i) * TILE), _MM_HINT_T0);
        _tile_dpbf16ps(0, 4, 6);
        if (HEIGHT == 2) _tile_dpbf16ps(3, 5, 7);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(4, left, a.stride);
        _tile_loadd(7, b + 16 * TILE, 64);
        if (HEIGHT == 2) _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(6, b, 64);
        if (HEIGHT == 2) _tile_loadd(5, lower, a.stride);
    }
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (HEIGHT == 2) { _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7); }
    _tile_stored(0, c, 128); _tile_stored(1, c + 16, 128);
    if (HEIGHT == 2) { _tile_stored(2, c + 512, 128); _tile_stored(3, c + 528, 128); }
}

// `rows` rows of 32 sums -> y from (row, column) on.
INLINE void write(const Task &t, const float *c, int64_t row, int64_t rows, int64_t column) {
    const int64_t inside = smaller(TILE, t.C - column);
    const __mmask32 mask = 0xffffffffu >> (TILE - inside);
    __m512 scale0 = _mm512_set1_ps(1.0f), scale1 = scale0;
    if (t.scales) {
        scale0 = _mm512_maskz_loadu_ps(__mmask16(mask), t.scales + column);
        scale1 = _mm512_maskz_loadu_ps(__mmask16(mask >> 16), t.scales + column + 16);
    }
    uint16_t *to = t.y + row * t.C + column;
    for (int64_t i = 0; i < rows; ++i, c += TILE, to += t.C) {
        const __m512 left = _mm512_mul_ps(_mm512_load_ps(c), scale0), right = _mm512_mul_ps(_mm512_load_ps(c + 16), scale1);
        _mm512_mask_storeu_epi16(to, mask, __m512i(_mm512_cvtne2ps_pbh(right, left)));
    }
}

// 32 rows from `row` on, `length` values from `start` on: where they are, or, if they end before, copied with zeros behind, step after step.
INLINE Rows staged(const uint16_t *x, int64_t M, int64_t R, int64_t row, int64_t start, int64_t length, int64_t panel, uint16_t *local) {
    const int64_t steps = ceil_div(length, TILE), rows = smaller(TILE, M - row);
    const uint16_t *from = x + row * R + start;
    if ((rows == TILE || rows == 16) && start + steps * TILE <= R) return {from, R * 2, TILE, steps, panel};
    for (int64_t s = 0; s < steps; ++s) {
        const int64_t inside = smaller(TILE, R - start - s * TILE);
        const __mmask32 mask = 0xffffffffu >> (TILE - inside);
        for (int64_t i = 0; i < TILE; ++i) {
            const __m512i values = i < rows ? _mm512_maskz_loadu_epi16(mask, from + i * R + s * TILE) : _mm512_setzero_si512();
            _mm512_store_si512(local + (s * TILE + i) * TILE, values);
        }
    }
    return {local, 64, TILE * TILE, steps, panel};
}

TARGET void work(const void *task, int64_t item, int64_t thread) {
    const Task &t = *static_cast<const Task *>(task);
    const int64_t group = item % t.groups, first = t.pairs * group / t.groups, pairs = t.pairs * (group + 1) / t.groups - first;
    const int64_t top = item / t.groups * t.tall, bottom = smaller(t.M, top + t.tall);
    char *own = t.scratch + thread * t.own;
    auto *panel = reinterpret_cast<uint16_t *>(own), *local = reinterpret_cast<uint16_t *>(own + t.rows_at);
    auto *sums = reinterpret_cast<float *>(own + t.sums_at);
    const int64_t length = rounded_up(t.R, TILE);
    _tile_loadconfig(&TILING);
    for (int64_t start = 0; start < length; start += t.segment) {
        const int64_t part = smaller(t.segment, length - start), tail = start + part == length ? t.tail : 0, next = (part + tail) * TILE;
        const int64_t chunks = ceil_div(part, CHUNK), chunk = rounded_up(ceil_div(part, chunks), TILE);
        fill(t.w, t.transpose, {first * TILE, pairs * TILE, start, part, next}, panel);
        if (tail) fill(t.factor, t.transpose, {first * TILE, pairs * TILE, 0, tail, next}, panel + part * TILE);
        for (int64_t row = top; row < bottom; row += TILE) {
            const int64_t rows = smaller(TILE, bottom - row);
            float *c = sums + (t.segment < length ? (row - top) * pairs * TILE : 0);
            for (int64_t at = 0; at < part + tail; at = at == part ? part + tail : smaller(at + chunk, part)) {
                const bool extra = at >= part, last = start + part == length && (extra || (!tail && at + chunk >= part));
                const Rows a = extra ? staged(t.inner, t.M, t.rank, row, 0, tail, at * TILE, local)
                                     : staged(t.x, t.M, t.R, row, start + at, smaller(chunk, part - at), at * TILE, local);
                for (int64_t p = 0; p < pairs; ++p) {
                    float *sum = c + p * TILE * TILE;
                    if (rows > 16) multiply<2>(a, panel + p * next + a.panel, sum, start + at > 0);
                    else multiply<1>(a, panel + p * next + a.panel, sum, start + at > 0);
                    if (last) write(t, sum, row, rows, (first + p) * TILE);
                }
            }
        }
    }
    _tile_release();
}

}  // namespace
