// Vectors of LANES floats for kernels that are written once for every path: hadamard.cpp and sparse.cpp. Included once per path, with
// PATH (a namespace), LANES (4, 8 or 16) and TARGET (an attribute) defined; with LANES 4 it is any machine's SSE or NEON.
// Vectors are the compilers' own extension, so that +, - and * are one instruction and no intrinsic is needed but where one is better.
#define INLINE TARGET inline __attribute__((always_inline))

namespace {
namespace PATH {

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
using Lanes = std::make_integer_sequence<int, LANES>;

INLINE vec get(const float *p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
INLINE void put(float *p, vec v) { std::memcpy(p, &v, sizeof v); }
INLINE vec all(float f) { return f - vec{}; }

template <int D> INLINE vec take(const void *p, int64_t i) {
#if LANES == 16
    return (vec)load16<D>(p, i);
#elif LANES == 8
    return (vec)load8<D>(p, i);
#else
    vec v;
    for (int j = 0; j < LANES; ++j) v[j] = load<D>(p, i + j);
    return v;
#endif
}

template <int D> INLINE void give(void *p, int64_t i, vec v) {
#if LANES == 16
    store16<D>(p, i, (__m512)v);
#elif LANES == 8
    store8<D>(p, i, (__m256)v);
#else
    for (int j = 0; j < LANES; ++j) static_cast<typename Stored<D>::type *>(p)[i + j] = rounded<D>(v[j]);
#endif
}

template <int D> INLINE vec take_some(const void *p, int64_t i, int64_t count) {   // the rest are zeros
    float some[LANES] = {};
    for (int64_t j = 0; j < count; ++j) some[j] = load<D>(p, i + j);
    return get(some);
}

template <int D> INLINE void give_some(void *p, int64_t i, vec v, int64_t count) {
    float some[LANES];
    put(some, v);
    for (int64_t j = 0; j < count; ++j) static_cast<typename Stored<D>::type *>(p)[i + j] = rounded<D>(some[j]);
}

INLINE vec multiply_add(vec a, vec b, vec c) {   // fused where the path has it
#if LANES == 16
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// ---- lane i exchanged with lane i ^ H; of two vectors, the blocks off the diagonal exchanged, of which a transposition is made

#if defined(__clang__)
#define SHUFFLE2(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE2(a, b, ...) __builtin_shuffle(a, b, ivec{__VA_ARGS__})
#endif

template <int H, int... I> INLINE vec exchanged(vec v, std::integer_sequence<int, I...>) { return SHUFFLE2(v, v, (I ^ H)...); }
template <int H, int... I> INLINE vec alternating(std::integer_sequence<int, I...>) { return vec{(I & H ? -1.0f : 1.0f)...}; }
template <int H, int... I> INLINE vec upper(vec a, vec b, std::integer_sequence<int, I...>) {
    return SHUFFLE2(a, b, (I & H ? I - H + LANES : I)...);
}
template <int H, int... I> INLINE vec lower(vec a, vec b, std::integer_sequence<int, I...>) {
    return SHUFFLE2(a, b, (I & H ? I + LANES : I + H)...);
}

template <int H> INLINE void transpose_from(vec *v) {
    if constexpr (H < LANES) {
        for (int i = 0; i < LANES / 2; ++i) {
            const int first = i / H * 2 * H + i % H;
            const vec a = v[first], b = v[first + H];
            v[first] = upper<H>(a, b, Lanes{});
            v[first + H] = lower<H>(a, b, Lanes{});
        }
        transpose_from<2 * H>(v);
    }
}

#undef SHUFFLE2

}  // namespace PATH
}  // namespace
