// The loops of loss.cpp, which includes this file once for each SIMD path. D is the dtype of the logits.
namespace {
namespace PATH {

constexpr int64_t BLOCK = 64 * LANES;    // 32 values a partial sum, for fp32's sake; the block stays in the first cache

// The largest of values first .. last-1; a NaN does not count. `limit` is what is known already.
template <int D> TARGET float largest(const void *z, int64_t first, int64_t last, float limit) {
    V m = set(limit), m2 = m;
    int64_t i = first;
    for (; i + 2 * LANES <= last; i += 2 * LANES) {
        const Two v = load2<D, D == BF16>(z, i);
        m = maximum(v.a, m);
        m2 = maximum(v.b, m2);
    }
    for (; i < last; i += LANES) m = maximum(take<D>(z, i, last, MINUS_INFINITY), m);
    return top(maximum(m, m2));
}

template <int D> TARGET float sum_of_exp(const void *z, int64_t first, int64_t last, float shift) {
    V s = set(0), s2 = s;
    const V by = set(shift);
    int64_t i = first;
    for (; i + 2 * LANES <= last; i += 2 * LANES) {
        const Two v = load2<D, D == BF16>(z, i);
        s = s + exponential(v.a - by);
        s2 = s2 + exponential(v.b - by);
    }
    for (; i < last; i += LANES) s = s + exponential(take<D>(z, i, last, MINUS_INFINITY) - by);
    return sum(s + s2);
}

// The sum of z - shift.
template <int D> TARGET float sum_of(const void *z, int64_t first, int64_t last, float shift) {
    V s = set(0), s2 = s;
    const V by = set(shift);
    int64_t i = first;
    for (; i + 2 * LANES <= last; i += 2 * LANES) {
        const Two v = load2<D, D == BF16>(z, i);
        s = s + (v.a - by);
        s2 = s2 + (v.b - by);
    }
    for (; i < last; i += LANES) s = s + (take<D>(z, i, last, shift) - by);
    return sum(s + s2);
}

template <int D> TARGET void cross_entropy(const void *task, int64_t first, int64_t last) {
    const Task &t = *static_cast<const Task *>(task);
    for (int64_t row = first; row < last; ++row) {
        typename Stored<D>::type *z = static_cast<typename Stored<D>::type *>(t.logits) + row * t.stride;
        float most = MINUS_INFINITY, shift = 0.0f;
        double total = 0.0, linear = 0.0;    // of exp(z - shift), and of z
        for (int64_t start = 0; start < t.vocab; start += BLOCK) {
            const int64_t end = start + BLOCK < t.vocab ? start + BLOCK : t.vocab;
            const float now = largest<D>(z, start, end, most);
            if (now > most) {
                total *= std::exp(double(shift) - double(now));
                most = shift = now;
            }
            total += double(sum_of_exp<D>(z, start, end, shift));
            if (t.smoothing != 0) linear += double(sum_of<D>(z, start, end, shift)) + double(end - start) * double(shift);
        }
        const double at_label = double(load_one<D>(z, t.labels[row])) - double(shift);
        const double log_total = std::log(total), log_sum = log_total + double(shift), vocab = double(t.vocab);
        const double even = t.smoothing != 0 ? t.smoothing * (linear / vocab - double(shift)) : 0;
        const double square = t.z_loss != 0 ? t.z_loss * log_sum * log_sum : 0, slope = t.z_loss != 0 ? 1 + 2 * t.z_loss * log_sum : 1;
        t.losses[row] = float(log_total - (1 - t.smoothing) * at_label - even + square);
        if (!t.gradient) continue;
        const V by = set(shift), share = set(float(slope / total)), less = set(float(-t.smoothing / vocab));
        int64_t i = 0;
        for (; i + 2 * LANES <= t.vocab; i += 2 * LANES) {
            const Two v = load2<D, D == BF16>(z, i);
            store2<D, D == BF16>(z, i, {fma(exponential(v.a - by), share, less), fma(exponential(v.b - by), share, less)});
        }
        for (; i < t.vocab; i += LANES)
            put<D>(z, i, t.vocab, fma(exponential(take<D>(z, i, t.vocab) - by), share, less));
        z[t.labels[row]] = rounded<D>(float(std::exp(at_label) / total * slope - t.smoothing / vocab - (1 - t.smoothing)));
    }
}

}  // namespace PATH
}  // namespace
