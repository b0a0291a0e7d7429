// The transform of one row on one path: included once per path, after lanes.h. Stages go in the order h = 1, 2, 4, ... on every
// path, and the sums over H_K in one order too, so all paths give the same bits.

namespace {
namespace PATH {

#if LANES == 16
constexpr int RADIX = 16;    // rows of vectors in registers at a time
#else
constexpr int RADIX = 8;     // of 16 registers
#endif

// ---- butterflies: inside of a vector, and between R vectors

template <int H> INLINE vec stage(vec v) {
    return multiply_add(v, alternating<H>(Lanes{}), exchanged<H>(v, Lanes{}));    // a product with 1 or -1 is exact
}

INLINE vec within(vec v, int64_t length) {
    if (length > 1) v = stage<1>(v);
    if (length > 2) v = stage<2>(v);
#if LANES > 4
    if (length > 4) v = stage<4>(v);
#endif
#if LANES > 8
    if (length > 8) v = stage<8>(v);
#endif
    return v;
}

template <int R, int H> INLINE void between(vec *v) {
    if constexpr (H < R) {
        for (int i = 0; i < R / 2; ++i) {
            const int first = i / H * 2 * H + i % H;
            const vec a = v[first], b = v[first + H];
            v[first] = a + b;
            v[first + H] = a - b;
        }
        between<R, 2 * H>(v);
    }
}

// ---- passes over a row: the first reads x, the last writes y or, before H_K, the buffer

template <int D, int R, bool LAST> TARGET void first_pass(const Task &t, int64_t row, float *buffer) {
    const int64_t start = row * t.n;
    const vec scale = all(t.scale);
    for (int64_t i = 0; i < t.n; i += R * LANES) {
        vec v[R];
        for (int r = 0; r < R; ++r) v[r] = within(take<D>(t.x, start + i + r * LANES), LANES);
        between<R, 1>(v);
        for (int r = 0; r < R; ++r) {
            if (LAST) give<D>(t.y, start + i + r * LANES, v[r] * scale);
            else put(buffer + i + r * LANES, v[r]);
        }
    }
}

template <int D, int R, bool LAST> TARGET void next_pass(const Task &t, int64_t row, float *buffer, int64_t h) {
    const vec scale = all(t.scale);
    for (int64_t block = 0; block < t.n; block += R * h) {
        for (int64_t i = block; i < block + h; i += LANES) {
            vec v[R];
            for (int r = 0; r < R; ++r) v[r] = get(buffer + i + r * h);
            between<R, 1>(v);
            for (int r = 0; r < R; ++r) {
                if (LAST) give<D>(t.y, row * t.n + i + r * h, v[r] * scale);
                else put(buffer + i + r * h, v[r]);
            }
        }
    }
}

template <int D, bool LAST> void first_of(int radix, const Task &t, int64_t row, float *buffer) {
#if LANES == 16
    if (radix == 16) return first_pass<D, RADIX, LAST>(t, row, buffer);
#endif
    if (radix == 8) return first_pass<D, 8, LAST>(t, row, buffer);
    if (radix == 4) return first_pass<D, 4, LAST>(t, row, buffer);
    if (radix == 2) return first_pass<D, 2, LAST>(t, row, buffer);
    first_pass<D, 1, LAST>(t, row, buffer);
}

template <int D, bool LAST> void next_of(int radix, const Task &t, int64_t row, float *buffer, int64_t h) {
#if LANES == 16
    if (radix == 16) return next_pass<D, RADIX, LAST>(t, row, buffer, h);
#endif
    if (radix == 8) return next_pass<D, 8, LAST>(t, row, buffer, h);
    if (radix == 4) return next_pass<D, 4, LAST>(t, row, buffer, h);
    next_pass<D, 2, LAST>(t, row, buffer, h);
}

// H_{2^m} shorter than a vector: whole vectors of the row, the last filled with zeros.
template <int D> TARGET void short_pass(const Task &t, int64_t row, float *buffer) {
    const int64_t start = row * t.n;
    for (int64_t i = 0; i < t.n; i += LANES) {
        const int64_t left = t.n - i;
        const vec v = within(left >= LANES ? take<D>(t.x, start + i) : take_some<D>(t.x, start + i, left), t.length);
        if (t.order > 1) put(buffer + i, v);
        else give_some<D>(t.y, start + i, v * all(t.scale), left < LANES ? left : LANES);
    }
}

// ---- H_K across the 2^m-vectors: the 16 signed sums of four rows are made once, then each output adds one of them per four rows

INLINE void signed_sums(const float *from, int64_t length, float *table) {
    const vec a = get(from), b = get(from + length), c = get(from + 2 * length), d = get(from + 3 * length);
    const vec low[4] = {a + b, b - a, a - b, -(a + b)}, high[4] = {c + d, d - c, c - d, -(c + d)};
    for (int j = 0; j < 4; ++j)
        for (int i = 0; i < 4; ++i) put(table + (4 * j + i) * LANES, low[i] + high[j]);
}

INLINE const float *entry(const float *table, int index) { return table + index * LANES; }

template <int D> TARGET void across(const Task &t, int64_t row, const float *buffer, float *sums) {
    alignas(64) float table[16 * GROUPS * LANES];
    const int64_t groups = t.order / 4;
    const vec scale = all(t.scale);
    for (int64_t column = 0; column < t.length; column += LANES) {
        for (int64_t group = 0; group < groups; group += GROUPS) {
            const int count = int(groups - group < GROUPS ? groups - group : GROUPS);
            const bool last = group + count == groups;
            for (int g = 0; g < count; ++g) signed_sums(buffer + 4 * (group + g) * t.length + column, t.length, table + 16 * g * LANES);
            const uint8_t *index = t.index + group * t.order;
            for (int64_t i = 0; i < t.order; i += 4, index += 4 * count) {
                vec s[4];    // four chains of additions, for one alone would wait for itself
                for (int c = 0; c < 4; ++c) s[c] = group ? get(sums + (i + c) * LANES) : vec{};
                for (int g = 0; g < count; ++g)
                    for (int c = 0; c < 4; ++c) s[c] = s[c] + get(entry(table, index[c * count + g]));
                for (int c = 0; c < 4; ++c) {
                    const int64_t at = row * t.n + (i + c) * t.length + column;
                    if (!last) put(sums + (i + c) * LANES, s[c]);
                    else if (t.length >= LANES) give<D>(t.y, at, s[c] * scale);
                    else give_some<D>(t.y, at, s[c] * scale, t.length);
                }
            }
        }
    }
}

template <int D> void transform(const void *task, int64_t first, int64_t last) {
    const Task &t = *static_cast<const Task *>(task);
    alignas(64) float buffer[LARGEST + 16];
    alignas(64) float sums[LARGEST_ORDER * LANES];
    std::memset(buffer + t.n, 0, 16 * sizeof(float));    // what `across` reads past the last short vector
    for (int64_t row = first; row < last; ++row) {
        if (t.length < LANES) {
            short_pass<D>(t, row, buffer);
        } else {
            int64_t h = t.length / LANES < RADIX ? t.length : RADIX * LANES;
            const bool only = h == t.length && t.order == 1;
            only ? first_of<D, true>(int(h / LANES), t, row, buffer) : first_of<D, false>(int(h / LANES), t, row, buffer);
            while (h < t.length) {
                const int64_t rest = t.length / h;    // two passes of like radix rather than a wide and a narrow one
                const int radix = rest <= RADIX ? int(rest) : rest < RADIX * RADIX / 4 ? RADIX / 2 : RADIX;
                const bool final = rest == radix && t.order == 1;
                final ? next_of<D, true>(radix, t, row, buffer, h) : next_of<D, false>(radix, t, row, buffer, h);
                h *= radix;
            }
        }
        if (t.order > 1) across<D>(t, row, buffer, sums);
    }
}

}  // namespace PATH
}  // namespace
