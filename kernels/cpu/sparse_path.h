// The products of sparse.cpp on one path: included once per path, after lanes.h. A block is V vectors of tokens, lanes run along the
// tokens; blocks are kept transposed, [features][stride], so that one coefficient is a few vectors of contiguous memory: in fp32, or, where x is
// bf16, two tokens to a lane, the later one in the upper half, which halves the cache lines that a coefficient takes.

namespace {
namespace PATH {

template <int D, int V> struct Form {
    static constexpr bool pairs = D == BF16;
    static constexpr int tokens = V * LANES, stride = pairs ? tokens / 2 : tokens;
};

// ---- between token-major memory and transposed blocks

template <int D> INLINE vec take_at(const void *x, int64_t width, int64_t first, int64_t token, int64_t tokens) {   // outside: zeros
    const int64_t left = width - first, i = token * width + first;
    return token >= tokens ? vec{} : left >= LANES ? take<D>(x, i) : take_some<D>(x, i, left);
}

// columns first..first+LANES-1 of V * LANES tokens -> tile[LANES][V * LANES], in fp32
template <int D, int V> TARGET void take_tile(const void *x, int64_t width, int64_t first, int64_t token, int64_t tokens, float *tile) {
    for (int s = 0; s < V; ++s) {
        vec v[LANES];
        for (int i = 0; i < LANES; ++i) v[i] = take_at<D>(x, width, first, token + s * LANES + i, tokens);
        transpose_from<1>(v);
        for (int i = 0; i < LANES; ++i) put(tile + (i * V + s) * LANES, v[i]);
    }
}

// the same in the block's form
template <int D, int V> TARGET void take_columns(const void *x, int64_t width, int64_t first, int64_t token, int64_t tokens, float *tile) {
    if constexpr (!Form<D, V>::pairs) return take_tile<D, V>(x, width, first, token, tokens, tile);
    for (int s = 0; s < V / 2; ++s) {
        vec v[LANES];
        for (int i = 0; i < LANES; ++i) {
            const int64_t at = token + 2 * s * LANES + i;
            const ivec early = (ivec)take_at<D>(x, width, first, at, tokens), late = (ivec)take_at<D>(x, width, first, at + LANES, tokens);
            v[i] = (vec)(late | (early >> 16 & 0xffff));
        }
        transpose_from<1>(v);
        for (int i = 0; i < LANES; ++i) put(tile + i * Form<D, V>::stride + s * LANES, v[i]);
    }
}

template <int D, int V> void take_block(const void *x, int64_t width, int64_t from, int64_t to, int64_t token, int64_t tokens, float *block) {
    constexpr int64_t stride = Form<D, V>::stride;
    for (int64_t j = from; j < to; j += LANES) {
        if (j + LANES <= width) {
            take_columns<D, V>(x, width, j, token, tokens, block + j * stride);
            continue;
        }
        alignas(64) float edge[LANES * stride];
        take_columns<D, V>(x, width, j, token, tokens, edge);
        std::memcpy(block + j * stride, edge, size_t((width - j) * stride) * sizeof(float));
    }
}

template <int D, int V> TARGET void give_tile(void *y, int64_t width, int64_t first, int64_t token, int64_t tokens, const float *tile) {
    const int64_t left = width - first;
    for (int s = 0; s < V; ++s) {
        vec v[LANES];
        for (int i = 0; i < LANES; ++i) v[i] = get(tile + (i * V + s) * LANES);
        transpose_from<1>(v);
        for (int i = 0; i < LANES; ++i) {
            const int64_t row = token + s * LANES + i;
            if (row >= tokens) break;
            if (left >= LANES) give<D>(y, row * width + first, v[i]);
            else give_some<D>(y, row * width + first, v[i], left);
        }
    }
}

// ---- rows of S, C the type of its columns

// to[k] = a[k] p[k] + to[k]; a one vector or one for each k
template <int D, int V, int ONE> INLINE void add_products(const vec *a, const float *p, vec *to) {
    if constexpr (Form<D, V>::pairs) {
        for (int k = 0; k < V; k += 2) {
            const ivec both = (ivec)get(p + k / 2 * LANES);
            to[k] = multiply_add(a[ONE ? 0 : k], (vec)(both << 16), to[k]);
            to[k + 1] = multiply_add(a[ONE ? 0 : k + 1], (vec)(both & int32_t(0xffff0000)), to[k + 1]);
        }
    } else {
        for (int k = 0; k < V; ++k) to[k] = multiply_add(a[ONE ? 0 : k], get(p + k * LANES), to[k]);
    }
}

// sums[rows][V * LANES] = S[first.., :] block; even and odd coefficients in two sums, for one alone would wait for itself
template <int D, int V, class C> TARGET void gather_rows(const Matrix &m, int64_t first, int64_t last, const float *block, float *sums) {
    const C *cols = static_cast<const C *>(m.cols);
    constexpr int64_t stride = Form<D, V>::stride;
    for (int64_t i = first; i < last; ++i, sums += V * LANES) {
        vec a[V] = {}, b[V] = {};
        int64_t e = row_start(m, i);
        const int64_t end = row_start(m, i + 1);
        for (; e + 2 <= end; e += 2) {
            const vec s = all(m.values[e]), t = all(m.values[e + 1]);
            add_products<D, V, 1>(&s, block + int64_t(cols[e]) * stride, a);
            add_products<D, V, 1>(&t, block + int64_t(cols[e + 1]) * stride, b);
        }
        if (e < end) {
            const vec s = all(m.values[e]);
            add_products<D, V, 1>(&s, block + int64_t(cols[e]) * stride, a);
        }
        for (int k = 0; k < V; ++k) put(sums + k * LANES, a[k] + b[k]);
    }
}

template <int H> INLINE vec folded(vec *v) {   // lane i: the sum of the lanes of v[i]
    for (int i = 0; i < H; ++i) v[i] = upper<H>(v[i], v[i + H], Lanes{}) + lower<H>(v[i], v[i + H], Lanes{});
    if constexpr (H > 1) return folded<H / 2>(v);
    else return v[0];
}

INLINE void add_sums(const float *pending, int count, float *out, bool first_block) {
    vec v[LANES];
    for (int i = 0; i < LANES; ++i) v[i] = get(pending + i * LANES);
    float sums[LANES];
    put(sums, folded<LANES / 2>(v));
    for (int i = 0; i < count; ++i) out[i] = first_block ? sums[i] : out[i] + sums[i];
}

// out[e] (+)= sum over the block's tokens of rows[i] block[j]; LANES coefficients, of whichever rows, are summed across at a time
template <int D, int V, class C> TARGET void dot_rows(const Matrix &m, int64_t first, int64_t last, const float *rows, const float *block,
                                                      float *out, bool first_block) {
    const C *cols = static_cast<const C *>(m.cols);
    alignas(64) float pending[LANES * LANES] = {};
    int count = 0;
    int64_t e = row_start(m, first);
    for (int64_t i = first; i < last; ++i, rows += V * LANES) {
        vec d[V];
        for (int k = 0; k < V; ++k) d[k] = get(rows + k * LANES);
        const int64_t end = row_start(m, i + 1);
        for (; e < end; ++e) {
            vec s[V] = {};
            add_products<D, V, 0>(d, block + int64_t(cols[e]) * Form<D, V>::stride, s);
            for (int half = V / 2; half; half /= 2)
                for (int k = 0; k < half; ++k) s[k] = s[k] + s[k + half];
            put(pending + count * LANES, s[0]);
            if (++count == LANES) {
                add_sums(pending, LANES, out + e + 1 - LANES, first_block);
                count = 0;
            }
        }
    }
    if (count) add_sums(pending, count, out + e - count, first_block);
}

// ---- one share of each product

template <int D, int V> void matmul(const Task &t, int64_t share, int64_t first, int64_t last) {
    constexpr int64_t B = Form<D, V>::tokens;
    float *block = t.scratch + share * t.m.in * Form<D, V>::stride;
    alignas(64) float sums[LANES * B];
    int64_t held = -1;
    for (int64_t item = first; item < last; ++item) {
        const int64_t token = item / t.slices * B, slice = item % t.slices, tiles = (t.m.out + LANES - 1) / LANES;
        if (held != token) take_block<D, V>(t.x, t.m.in, 0, t.m.in, token, t.tokens, block);
        held = token;
        for (int64_t tile = tiles * slice / t.slices; tile < tiles * (slice + 1) / t.slices; ++tile) {
            const int64_t row = tile * LANES, end = row + LANES < t.m.out ? row + LANES : t.m.out;
            if (t.m.narrow) gather_rows<D, V, uint16_t>(t.m, row, end, block, sums);
            else gather_rows<D, V, int32_t>(t.m, row, end, block, sums);
            give_tile<D, V>(t.y, t.m.out, row, token, t.tokens, sums);
        }
    }
}

// rows `first`..`last` of S for the tokens of one block, which is already there
template <int D, int V> void sampled(const Task &t, int64_t, int64_t first, int64_t last) {
    alignas(64) float rows[LANES * Form<D, V>::tokens];
    const bool first_block = t.token == 0;
    float *out = static_cast<float *>(t.y);
    for (int64_t row = first; row < last; row += LANES) {
        const int64_t end = row + LANES < last ? row + LANES : last;
        take_tile<D, V>(t.dy, t.m.out, row, t.token, t.tokens, rows);
        if (t.m.narrow) dot_rows<D, V, uint16_t>(t.m, row, end, rows, t.scratch, out, first_block);
        else dot_rows<D, V, int32_t>(t.m, row, end, rows, t.scratch, out, first_block);
    }
}

// the block of `sampled`, in units of LANES columns
template <int D, int V> void fill(const Task &t, int64_t, int64_t first, int64_t last) {
    const int64_t end = last * LANES < t.m.in ? last * LANES : t.m.in;
    take_block<D, V>(t.x, t.m.in, first * LANES, end, t.token, t.tokens, t.scratch);
}

template <int D, int V> Works works_of() { return {matmul<D, V>, sampled<D, V>, fill<D, V>}; }
template <int D> Works works_of(int vectors) { return vectors == 4 ? works_of<D, 4>() : works_of<D, 2>(); }
inline Works works_of(int dtype, int vectors) {
    return dtype == F32 ? works_of<F32>(vectors) : dtype == BF16 ? works_of<BF16>(vectors) : works_of<F16>(vectors);
}

}  // namespace PATH
}  // namespace
