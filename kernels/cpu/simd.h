// What every CPU kernel shares: platform, dtypes, conversions that round to nearest even, the choice of a SIMD path, threads.
// Each source includes it once and becomes a library of its own. Compile with -ffp-contract=off: paths must agree where they claim to.
#pragma once
#include <cstdint>
#include <cstring>
// GCC spills AVX registers to a stack that Windows aligns to 16 bytes only, which crashes (GCC bug 54412): there the scalar path serves.
#if (defined(__x86_64__) || defined(_M_X64)) && !(defined(_WIN32) && !defined(__clang__))
#define QTUNE_X86 1
#elif defined(__aarch64__)
#define QTUNE_NEON 1
#include <arm_neon.h>
#endif
#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

enum Dtype { F32 = 0, BF16 = 1, F16 = 2 };
enum Isa { AUTO = -1, SCALAR = 0, ISA_AVX2 = 1, ISA_AVX512 = 2, ISA_NEON = 3, ISA_AVX512_BF16 = 4, ISA_AMX = 5 };
enum Status { OK = 0, BAD_ARGUMENT = 1, NO_SUCH_ISA = 2, NO_MEMORY = 3 };
constexpr int64_t GRAIN = 1 << 15;      // values below which one more thread costs more than it brings
using Work = void (*)(const void *task, int64_t first, int64_t last);   // items first..last-1

inline float as_float(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline uint32_t as_bits(float f) { uint32_t bits; std::memcpy(&bits, &f, 4); return bits; }

inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x400) return as_float(sign | ((rest << 13) + (112u << 23)));
    const float value = float(rest) * 5.9604644775390625e-08f;   // denormal: units of 2^-24, exact
    return sign ? -value : value;
}

inline uint16_t float_to_half(float f) {   // to nearest, ties to even
    const uint32_t bits = as_bits(f), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);      // 65520 and above round to infinity
    if (size >= 0x38800000) return uint16_t(sign | ((size + 0xfff + (size >> 13 & 1)) - (112u << 23)) >> 13);
    return uint16_t(sign | (as_bits(as_float(size) + 0.5f) - as_bits(0.5f)));   // the ulp of 0.5 is 2^-24: the addition rounds
}

inline uint16_t float_to_bf16(float f) {   // integer arithmetic keeps denormals, which vcvtneps2bf16 flushes
    const uint32_t bits = as_bits(f);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <int D> inline float load(const void *p, int64_t i) {
    if (D == F32) return static_cast<const float *>(p)[i];
    const uint16_t raw = static_cast<const uint16_t *>(p)[i];
    return D == BF16 ? as_float(uint32_t(raw) << 16) : half_to_float(raw);
}
template <int D> struct Stored { using type = uint16_t; };
template <> struct Stored<F32> { using type = uint32_t; };
template <int D> inline typename Stored<D>::type rounded(float f) {
    return D == F32 ? as_bits(f) : D == BF16 ? float_to_bf16(f) : float_to_half(f);
}

inline int best_isa() {
#if QTUNE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) return ISA_AVX512;
    if (__builtin_cpu_supports("avx2")) return ISA_AVX2;
#elif QTUNE_NEON
    return ISA_NEON;
#endif
    return SCALAR;
}

// work over `items`, whose cost is that of reading `values` numbers, in equal consecutive shares.
inline void run(Work work, const void *task, int64_t items, int64_t values, int threads) {
    const int64_t useful = values / GRAIN + 1;
    const int64_t parts = useful < threads ? useful : threads;
#ifdef _OPENMP
    if (parts > 1) {
#pragma omp parallel for num_threads(int(parts)) schedule(static)
        for (int64_t p = 0; p < parts; ++p) work(task, items * p / parts, items * (p + 1) / parts);
        return;
    }
#endif
    (void)parts;
    work(task, 0, items);
}

}  // namespace

#ifndef QTUNE_OWN_ISA    // a source with paths of its own (bf16 products) answers for itself
// The path that `wanted` (-1: the best) stands for on this machine, or -1: 0 scalar, 1 AVX2, 2 AVX-512, 3 NEON.
EXPORT int qtune_isa(int wanted) {
    const int best = best_isa();
    if (wanted == AUTO || wanted == best) return best;
    return wanted == SCALAR || (wanted == ISA_AVX2 && best == ISA_AVX512) ? wanted : -1;
}
#endif

EXPORT int qtune_openmp() {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
