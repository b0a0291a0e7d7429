// exp, and loads and stores of two vectors or of a part of one, on the vectors of layers_lanes.h, which includes this file once for each SIMD path.
namespace {
namespace PATH {

// Values i .. i+LANES-1 of the first `end`; what is beyond reads as `fill` and is not written.
template <int D> TARGET inline V take(const void *p, int64_t i, int64_t end, float fill = 0.0f) {
    return i + LANES <= end ? load<D>(p, i) : load_part<D>(p, i, end - i, fill);
}
template <int D> TARGET inline void put(void *p, int64_t i, int64_t end, V v) {
    if (i + LANES <= end) store<D>(p, i, v);
    else store_part<D>(p, i, v, end - i);
}

// Values i .. i+2*LANES-1. SPLIT, for bf16: those of even places, then those of odd ones; all that meet must be loaded alike.
struct Two { V a, b; };
template <int D, bool SPLIT> TARGET inline Two load2(const void *p, int64_t i) {
    if (!SPLIT) return {load<D>(p, i), load<D>(p, i + LANES)};
    const V pairs = load<F32>(static_cast<const uint16_t *>(p) + i, 0);
    return {even(pairs), odd(pairs)};
}
template <int D, bool SPLIT> TARGET inline void store2(void *p, int64_t i, Two v) {
    if (SPLIT) { store<F32>(static_cast<uint16_t *>(p) + i, 0, pair_bf16(v.a, v.b)); return; }
    store<D>(p, i, v.a);
    store<D>(p, i + LANES, v.b);
}

// exp of x <= 0, within 2 ulp; 0 at -inf, NaN at NaN, denormals kept (but on a processor that is told to flush them).
TARGET inline V exponential(V x) {
    const V shift = set(12582912.0f);    // 1.5 * 2^23: adding it leaves no fraction
    x = maximum(set(LOWEST), x);
    const V n = fma(x, set(LOG2E), shift) - shift;
    const V r = fma(n, set(-LN2_LOW), fma(n, set(-LN2_HIGH), x));
    V p = fma(set(EXP[4]), r, set(EXP[3]));
    p = fma(p, r, set(EXP[2]));
    p = fma(p, r, set(EXP[1]));
    p = fma(p, r, set(EXP[0]));
    p = fma(p, r, set(1));
    return times_power(fma(p, r, set(1)), n);
}

}  // namespace PATH
}  // namespace
