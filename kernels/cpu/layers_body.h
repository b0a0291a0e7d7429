// The loops of layers.cpp, which includes this file once for each SIMD path. D is the dtype of the activations, F that of weights, cos and sin.
namespace {
namespace PATH {

// ---- RMS norm

template <int D> TARGET float mean_square(const void *x, int64_t h) {
    V s[4] = {set(0), set(0), set(0), set(0)};
    int64_t i = 0;
    for (; i + 4 * LANES <= h; i += 4 * LANES)
        for (int j = 0; j < 4; j += 2) {
            const Two v = load2<D, D == BF16>(x, i + j * LANES);
            s[j] = fma(v.a, v.a, s[j]);
            s[j + 1] = fma(v.b, v.b, s[j + 1]);
        }
    for (; i < h; i += LANES) {
        const V v = take<D>(x, i, h);
        s[0] = fma(v, v, s[0]);
    }
    return sum((s[0] + s[1]) + (s[2] + s[3])) / float(h);
}

template <int D, bool FIRST> TARGET inline V normed(V x, V rstd, V weight) { return (FIRST ? round_to<D>(x * rstd) : x * rstd) * weight; }

template <int D, int F, bool FIRST> TARGET void norm(const void *task, int64_t first, int64_t last) {
    constexpr bool SPLIT = D == BF16 && F == BF16;
    const Norm &t = *static_cast<const Norm *>(task);
    const V offset = set(t.offset);
    for (int64_t row = first; row < last; ++row) {
        const void *x = at<D>(t.x, row * t.h);
        void *y = at<D>(t.y, row * t.h);
        const float scale = t.rstd[row] = float(1.0 / std::sqrt(double(mean_square<D>(x, t.h)) + double(t.eps)));
        const V rstd = set(scale);
        int64_t i = 0;
        for (; i + 2 * LANES <= t.h; i += 2 * LANES) {
            const Two v = load2<D, SPLIT>(x, i), w = load2<F, SPLIT>(t.w, i);
            store2<D, SPLIT>(y, i, {normed<D, FIRST>(v.a, rstd, w.a + offset), normed<D, FIRST>(v.b, rstd, w.b + offset)});
        }
        for (; i < t.h; i += LANES)
            put<D>(y, i, t.h, normed<D, FIRST>(take<D>(x, i, t.h), rstd, take<F>(t.w, i, t.h) + offset));
    }
}

template <int D, int F> TARGET void norm_backward(const void *task, int64_t first, int64_t last) {
    constexpr bool SPLIT = D == BF16 && F == BF16;
    const NormBackward &t = *static_cast<const NormBackward *>(task);
    const V offset = set(t.offset);
    for (int64_t row = first; row < last; ++row) {
        const void *x = at<D>(t.x, row * t.h), *dy = at<D>(t.dy, row * t.h);
        void *dx = at<D>(t.dx, row * t.h);
        const V rstd = set(t.rstd[row]);
        V dot = set(0), dot2 = set(0);
        int64_t i = 0;
        for (; i + 2 * LANES <= t.h; i += 2 * LANES) {
            const Two d = load2<D, SPLIT>(dy, i), v = load2<D, SPLIT>(x, i), w = load2<F, SPLIT>(t.w, i);
            dot = fma(d.a * (w.a + offset), v.a * rstd, dot);
            dot2 = fma(d.b * (w.b + offset), v.b * rstd, dot2);
        }
        for (; i < t.h; i += LANES)
            dot = fma(take<D>(dy, i, t.h) * (take<F>(t.w, i, t.h) + offset), take<D>(x, i, t.h) * rstd, dot);
        const V mean = set(-sum(dot + dot2) / float(t.h));
        for (i = 0; i + 2 * LANES <= t.h; i += 2 * LANES) {
            const Two d = load2<D, SPLIT>(dy, i), v = load2<D, SPLIT>(x, i), w = load2<F, SPLIT>(t.w, i);
            store2<D, SPLIT>(dx, i, {rstd * fma(v.a * rstd, mean, d.a * (w.a + offset)), rstd * fma(v.b * rstd, mean, d.b * (w.b + offset))});
        }
        for (; i < t.h; i += LANES) {
            const V g = take<D>(dy, i, t.h) * (take<F>(t.w, i, t.h) + offset);
            put<D>(dx, i, t.h, rstd * fma(take<D>(x, i, t.h) * rstd, mean, g));
        }
    }
}

// ---- SwiGLU: e = exp(-|g|) is at most 1, so neither of sigmoid(g) and sigmoid(-g) loses anything

TARGET inline V glu(V g, V up) {
    const V e = exponential(set(0) - magnitude(g));
    return g * where_negative(g, e, set(1)) * reciprocal(e + set(1)) * up;
}

template <int D> TARGET void gated(const void *task, int64_t first, int64_t last) {
    constexpr bool SPLIT = D == BF16;
    const Gated &t = *static_cast<const Gated *>(task);
    int64_t i = first;
    for (; i + 2 * LANES <= last; i += 2 * LANES) {
        const Two g = load2<D, SPLIT>(t.gate, i), up = load2<D, SPLIT>(t.up, i);
        store2<D, SPLIT>(t.a, i, {glu(g.a, up.a), glu(g.b, up.b)});
    }
    for (; i < last; i += LANES) put<D>(t.a, i, last, glu(take<D>(t.gate, i, last), take<D>(t.up, i, last)));
}

TARGET inline Two glu_backward(V d, V g, V up) {
    const V e = exponential(set(0) - magnitude(g)), r = reciprocal(e + set(1));
    const V s = where_negative(g, e, set(1)) * r, other = where_negative(g, set(1), e) * r;
    return {d * up * s * fma(g, other, set(1)), d * g * s};
}

template <int D> TARGET void gated_backward(const void *task, int64_t first, int64_t last) {
    constexpr bool SPLIT = D == BF16;
    const Gated &t = *static_cast<const Gated *>(task);
    int64_t i = first;
    for (; i + 2 * LANES <= last; i += 2 * LANES) {
        const Two d = load2<D, SPLIT>(t.dy, i), g = load2<D, SPLIT>(t.gate, i), up = load2<D, SPLIT>(t.up, i);
        const Two one = glu_backward(d.a, g.a, up.a), two = glu_backward(d.b, g.b, up.b);
        store2<D, SPLIT>(t.a, i, {one.a, two.a});
        store2<D, SPLIT>(t.b, i, {one.b, two.b});
    }
    for (; i < last; i += LANES) {
        const Two v = glu_backward(take<D>(t.dy, i, last), take<D>(t.gate, i, last), take<D>(t.up, i, last));
        put<D>(t.a, i, last, v.a);
        put<D>(t.b, i, last, v.b);
    }
}

// ---- rotary positions: an item is one token, whose angles all of its heads share

template <int D, int F> TARGET void turn(const void *task, int64_t first, int64_t last) {
    const Turn &t = *static_cast<const Turn *>(task);
    const int64_t half = t.r / 2;
    for (int64_t token = first; token < last; ++token) {
        const int64_t b = token / t.seq, s = token % t.seq;
        const void *x = at<D>(t.x, b * t.stride_b + s * t.stride_s);
        void *y = at<D>(t.y, token * t.heads * t.dim);
        const int64_t angle = (t.batches == 1 ? 0 : b) * t.angle_b + s * t.angle_s;
        const void *cos = at<F>(t.cos, angle), *sin = at<F>(t.sin, angle);
        for (int64_t i = 0; i < half; i += LANES) {
            const V cos_low = take<F>(cos, i, half), cos_high = take<F>(at<F>(cos, half), i, half);
            V sin_low = take<F>(sin, i, half), sin_high = take<F>(at<F>(sin, half), i, half);
            if (t.inverse) {
                const V kept = sin_low;
                sin_low = sin_high;
                sin_high = set(0) - kept;
            } else {
                sin_low = set(0) - sin_low;
            }
            for (int64_t h = 0; h < t.heads; ++h) {
                const void *head = at<D>(x, h * t.stride_h);
                void *out = at<D>(y, h * t.dim);
                const V low = take<D>(head, i, half), high = take<D>(at<D>(head, half), i, half);
                put<D>(out, i, half, fma(high, sin_low, low * cos_low));
                put<D>(at<D>(out, half), i, half, fma(low, sin_high, high * cos_high));
            }
        }
        const size_t rest = size_t(t.dim - t.r) * sizeof(typename Stored<D>::type);
        for (int64_t h = 0; rest && h < t.heads; ++h) std::memcpy(at<D>(y, h * t.dim + t.r), at<D>(x, h * t.stride_h + t.r), rest);
    }
}

}  // namespace PATH
}  // namespace
