// AdamW with 8-bit states on the CPU, in place, one pass over each block of 256 values. Plain C ABI, no torch. Bit-equal on every path.
//
// The nearest of a map's 256 values takes one look into a table: the upper 16 bits of |x| <= 1 name a bin (128 an octave, 24 octaves), which at most
// one midpoint of the map lies in; its entry holds the code before that midpoint and, on the lower 16 bits, the first x past it.
// Bound by memory: read and written once are the parameter and both states (2 bytes of codes), read the gradient: 16 bytes a value in fp32.
#include "simd.h"
#include <cmath>

namespace {

constexpr int64_t BLOCK = 256;
constexpr float SMALLEST = 1e-38f;       // floor of the absmax that a block is divided by
constexpr uint32_t FIRST_BIN = 0x3380;   // 2^-24: below it every value has the code of zero
constexpr int32_t BINS = 0x3f80 - 0x3380 + 1;

struct Map { const float *values; const uint32_t *bins; };   // bins: [2][BINS], for x >= 0 and for x < 0
enum Kind { SIGNED, UNSIGNED };   // in an unsigned map code 0 is for 0 alone: what is larger has at least code 1
struct Update {
    void *param; const void *grad; int grad_dtype; int64_t n;
    uint8_t *m_codes; float *m_absmax; uint8_t *v_codes; float *v_absmax;
    Map m_map, v_map;
    float beta1, rest1, beta2, rest2, size, root, eps, keep;   // p = p * keep + (m * size) / (sqrt(v) * root + eps)
    uint64_t seed;
};
struct States { float m[BLOCK], v[BLOCK]; };   // of one block, between the update and its rounding

inline uint32_t block_key(uint64_t seed, int64_t block) {   // splitmix64
    uint64_t z = seed + (uint64_t(block) + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return uint32_t(z ^ (z >> 31));
}

inline uint32_t random_of(uint32_t key, uint32_t place) {   // lowbias32
    uint32_t x = key + place * 0x9e3779b9u;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

inline uint16_t stochastic_bf16(float f, uint32_t random) {
    const uint32_t bits = as_bits(f);
    if ((bits & 0x7f800000) == 0x7f800000) return float_to_bf16(f);
    return uint16_t((bits + (random & 0xffff)) >> 16);
}

inline float load_any(int dtype, const void *p, int64_t i) {
    return dtype == F32 ? load<F32>(p, i) : dtype == BF16 ? load<BF16>(p, i) : load<F16>(p, i);
}

template <Kind K> inline uint8_t nearest(const Map &map, float value, float scale) {
    const float x = value * scale;
    const uint32_t size = as_bits(x) & 0x7fffffff, kept = as_float(size) < 1.0f ? size : 0x3f800000, sign = as_bits(x) >> 31;
    const uint32_t bin = kept >> 16 > FIRST_BIN ? kept >> 16 : FIRST_BIN;
    const uint32_t entry = map.bins[(bin - FIRST_BIN) + sign * uint32_t(BINS)];
    const uint8_t code = uint8_t((entry & 255) + ((kept & 0xffff) >= entry >> 8 ? 1 - 2 * sign : 0));
    return K == UNSIGNED && code == 0 && value > 0.0f ? 1 : code;
}

inline float divisor(float absmax) { return 1.0f / (absmax < SMALLEST ? SMALLEST : absmax); }

// Places i..end-1 of block b: the update, with the new states kept in `now`; peaks: their largest sizes, as bits, in which a NaN stays.
template <int D> void update_rest(const Update &t, int64_t b, int64_t i, int64_t end, States &now, uint32_t *peaks) {
    auto *param = static_cast<typename Stored<D>::type *>(t.param);
    const float m_scale = t.m_absmax[b], v_scale = t.v_absmax[b];
    const uint32_t key = block_key(t.seed, b);
    for (; i < end; ++i) {
        const int64_t place = i - b * BLOCK;
        const float g = load_any(t.grad_dtype, t.grad, i);
        const float m = t.m_map.values[t.m_codes[i]] * m_scale * t.beta1 + g * t.rest1;
        const float v = t.v_map.values[t.v_codes[i]] * v_scale * t.beta2 + g * g * t.rest2;
        const float p = load<D>(t.param, i) * t.keep + (m * t.size) / (std::sqrt(v) * t.root + t.eps);
        if (D == BF16 && t.seed) param[i] = stochastic_bf16(p, random_of(key, uint32_t(place)));
        else param[i] = rounded<D>(p);
        now.m[place] = m;
        now.v[place] = v;
        const uint32_t m_size = as_bits(m) & 0x7fffffff, v_size = as_bits(v) & 0x7fffffff;
        peaks[0] = m_size > peaks[0] ? m_size : peaks[0];
        peaks[1] = v_size > peaks[1] ? v_size : peaks[1];
    }
}

template <Kind K> inline void store_rest(const Map &map, const float *state, float scale, uint8_t *codes, int64_t i, int64_t size) {
    for (; i < size; ++i) codes[i] = nearest<K>(map, state[i], scale);
}

template <int D> void update_scalar(const void *task, int64_t first, int64_t last) {
    const Update &t = *static_cast<const Update *>(task);
    States now;
    for (int64_t b = first; b < last; ++b) {
        const int64_t begin = b * BLOCK, end = begin + BLOCK < t.n ? begin + BLOCK : t.n;
        uint32_t peaks[2] = {};
        update_rest<D>(t, b, begin, end, now, peaks);
        t.m_absmax[b] = as_float(peaks[0]);
        t.v_absmax[b] = as_float(peaks[1]);
        store_rest<SIGNED>(t.m_map, now.m, divisor(t.m_absmax[b]), t.m_codes + begin, 0, end - begin);
        store_rest<UNSIGNED>(t.v_map, now.v, divisor(t.v_absmax[b]), t.v_codes + begin, 0, end - begin);
    }
}

}  // namespace

#if QTUNE_X86
#include "adamw8_x86.h"
#endif

namespace {

template <int D> Work update_work(int isa) {
#if QTUNE_X86
    if (isa == ISA_AVX512) return update_avx512<D>;
    if (isa == ISA_AVX2) return update_avx2<D>;
#endif
    (void)isa;
    return update_scalar<D>;
}

}  // namespace

// param[n], grad[n], codes[n], absmax[ceil(n/256)]; maps: 256 ascending values; bins: see above. scalars: beta1, 1-beta1, beta2, 1-beta2,
// -lr/(1-beta1^step), 1/sqrt(1-beta2^step), eps, 1-lr*decay. seed: 0 rounds to nearest.
EXPORT int qtune_adamw8(void *param, int dtype, const void *grad, int grad_dtype, int64_t n, uint8_t *m_codes, float *m_absmax, uint8_t *v_codes,
                        float *v_absmax, const float *m_values, const uint32_t *m_bins, const float *v_values, const uint32_t *v_bins,
                        const float *scalars, int64_t seed, int threads, int isa) {
    if (n < 0 || dtype < F32 || dtype > F16 || grad_dtype < F32 || grad_dtype > F16) return BAD_ARGUMENT;
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    const float *s = scalars;
    const Update task = {param, grad, grad_dtype, n, m_codes, m_absmax, v_codes, v_absmax, {m_values, m_bins}, {v_values, v_bins},
                         s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], uint64_t(seed)};
    const Work work = dtype == F32 ? update_work<F32>(isa) : dtype == BF16 ? update_work<BF16>(isa) : update_work<F16>(isa);
    run(work, &task, n / BLOCK + (n % BLOCK != 0), n * 4, threads);   // a value costs as much as four that are only read
    return OK;
}
