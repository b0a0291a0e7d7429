// NF4/FP4 packing and unpacking, and the signed dynamic 8-bit packing of their scales, on the CPU. Plain C ABI, no torch.
//
// Weights are one flat row of n values in blocks; value = codebook[nibble] * scale(block), the high nibble first. Results equal bitsandbytes'
// bit for bit. A block has 16 possible values only, so unpacking multiplies and rounds 16 times a block and then looks nibbles up.
// Compile with -ffp-contract=off: a fused multiply-add would change the last bit of a nested scale.
// Blocks are even in size, so no two blocks share a byte and threads never write the same one. All sizes are int64.
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
enum Isa { AUTO = -1, SCALAR = 0, ISA_AVX2 = 1, ISA_AVX512 = 2, ISA_NEON = 3 };
enum Status { OK = 0, BAD_ARGUMENT = 1, NO_SUCH_ISA = 2 };
constexpr float SMALLEST = 1e-38f;      // bitsandbytes' lower limit of a divisor
constexpr int64_t NESTED_BLOCK = 256;   // scales that share one nested scale
constexpr int64_t GRAIN = 1 << 15;      // values below which one more thread costs more than it brings

struct Pack {
    const void *w; int64_t n, block; const float *bounds; const uint8_t *order; uint8_t *codes; float *absmax;
};
struct Unpack {
    const uint8_t *codes; const void *absmax; const float *map, *nested, *offset, *values; int64_t n, block; void *out;
};
struct Dynamic8 { const float *x; int64_t n; const uint8_t *nearest; uint8_t *codes; float *absmax; };
using Work = void (*)(const void *task, int64_t first, int64_t last);   // blocks first..last-1

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

// ---- packing, any machine

template <int D> float block_absmax(const void *w, int64_t first, int64_t last) {
    uint32_t largest = 0;    // on the bits: a NaN is larger than everything and stays
    for (int64_t i = first; i < last; ++i) {
        const uint32_t size = as_bits(load<D>(w, i)) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    return as_float(largest);
}

// A code is the number of bounds below the value: a tie goes to the lower code, a NaN to the last. Written so that compilers vectorize it.
template <int D> void pack_values(const Pack &t, int64_t first, int64_t last, float scale, bool divide) {
    constexpr int CHUNK = 64;
    float v[CHUNK];
    int32_t code[CHUNK];
    for (int64_t start = first; start < last; start += CHUNK) {
        const int size = last - start < CHUNK ? int(last - start) : CHUNK, padded = size + (size & 1);
        for (int i = 0; i < size; ++i) v[i] = divide ? load<D>(t.w, start + i) / scale : load<D>(t.w, start + i) * scale;
        for (int i = size; i < CHUNK; ++i) v[i] = 0.0f;    // the pad of an odd size is a zero
        for (int i = 0; i < CHUNK; ++i) code[i] = 0;
        for (int j = 0; j < 15; ++j) {
            const float bound = t.bounds[j];
            for (int i = 0; i < CHUNK; ++i) code[i] += !(v[i] <= bound);
        }
        for (int i = 0; i < padded; i += 2) t.codes[(start + i) / 2] = uint8_t(t.order[code[i]] << 4 | t.order[code[i + 1]]);
    }
}

// The last block, if it is not full, is divided by its absmax, and the stored absmax is the limited one: so does bitsandbytes.
template <int D> void pack_tail(const Pack &t, int64_t b) {
    float absmax = block_absmax<D>(t.w, b * t.block, t.n);
    absmax = absmax < SMALLEST ? SMALLEST : absmax;
    t.absmax[b] = absmax;
    pack_values<D>(t, b * t.block, t.n, absmax, true);
}
inline float reciprocal(float absmax) { return 1.0f / (absmax < SMALLEST ? SMALLEST : absmax); }

template <int D> void pack_scalar(const void *task, int64_t first, int64_t last) {
    const Pack &t = *static_cast<const Pack *>(task);
    for (int64_t b = first; b < last; ++b) {
        const int64_t begin = b * t.block, end = begin + t.block;
        if (end > t.n) { pack_tail<D>(t, b); continue; }
        t.absmax[b] = block_absmax<D>(t.w, begin, end);
        pack_values<D>(t, begin, end, reciprocal(t.absmax[b]), false);
    }
}

// bitsandbytes on the CPU finds the 8-bit code through 65536 equal bins over [-1, 1]; `nearest` holds the code of each bin.
void pack_dynamic8(const void *task, int64_t first, int64_t last) {
    const Dynamic8 &t = *static_cast<const Dynamic8 *>(task);
    for (int64_t b = first; b < last; ++b) {
        const int64_t begin = b * NESTED_BLOCK, end = begin + NESTED_BLOCK < t.n ? begin + NESTED_BLOCK : t.n;
        const float absmax = t.absmax[b] = block_absmax<F32>(t.x, begin, end), scale = 1.0f / absmax;
        for (int64_t i = begin; i < end; ++i) {
            float v = t.x[i] * scale;
            v = v < -1.0f ? -1.0f : v > 1.0f ? 1.0f : v;
            const float bin = float(double((v + 1.0f) * 0.5f) * 65535.0 + 0.5);   // exact in double, so one rounding, as a fused multiply-add
            t.codes[i] = absmax == 0.0f || !(bin >= 0.0f) ? 0 : t.nearest[int(bin)];
        }
    }
}

// ---- unpacking, any machine

inline float block_scale(const Unpack &t, int64_t b) {
    if (!t.map) return static_cast<const float *>(t.absmax)[b];
    const float product = t.map[static_cast<const uint8_t *>(t.absmax)[b]] * t.nested[b / NESTED_BLOCK];
    return product + *t.offset;
}

template <int D> inline void block_table(const Unpack &t, float scale, typename Stored<D>::type *table) {
    for (int j = 0; j < 16; ++j) table[j] = rounded<D>(t.values[j] * scale);
}

template <int D> inline void look_up(const Unpack &t, const typename Stored<D>::type *table, int64_t first, int64_t last) {
    auto *out = static_cast<typename Stored<D>::type *>(t.out);
    for (int64_t i = first; i < last; i += 2) {
        const uint8_t pair = t.codes[i / 2];
        out[i] = table[pair >> 4];
        if (i + 1 < last) out[i + 1] = table[pair & 15];
    }
}

template <int D> void unpack_scalar(const void *task, int64_t first, int64_t last) {
    const Unpack &t = *static_cast<const Unpack *>(task);
    for (int64_t b = first; b < last; ++b) {
        const int64_t begin = b * t.block, end = begin + t.block < t.n ? begin + t.block : t.n;
        typename Stored<D>::type table[16];
        block_table<D>(t, block_scale(t, b), table);
        look_up<D>(t, table, begin, end);
    }
}

#if QTUNE_NEON
// Nibbles select bytes: the table is split into the planes of its first, second (third, fourth) bytes.
template <int D> void unpack_neon(const void *task, int64_t first, int64_t last) {
    const Unpack &t = *static_cast<const Unpack *>(task);
    for (int64_t b = first; b < last; ++b) {
        int64_t i = b * t.block;
        const int64_t end = i + t.block < t.n ? i + t.block : t.n;
        typename Stored<D>::type table[16];
        block_table<D>(t, block_scale(t, b), table);
        const uint8_t *bytes = reinterpret_cast<const uint8_t *>(table);
        const uint8x16x4_t wide = D == F32 ? vld4q_u8(bytes) : uint8x16x4_t{};
        const uint8x16x2_t narrow = vld2q_u8(bytes);
        for (; i + 16 <= end; i += 16) {
            const uint8x8_t raw = vld1_u8(t.codes + i / 2);
            const uint8x8x2_t zipped = vzip_u8(vshr_n_u8(raw, 4), vand_u8(raw, vdup_n_u8(15)));
            const uint8x16_t nibbles = vcombine_u8(zipped.val[0], zipped.val[1]);
            uint8_t *out = static_cast<uint8_t *>(t.out) + i * int64_t(sizeof(table[0]));
            if (D == F32) {
                uint8x16x4_t found;
                for (int j = 0; j < 4; ++j) found.val[j] = vqtbl1q_u8(wide.val[j], nibbles);
                vst4q_u8(out, found);
            } else {
                uint8x16x2_t found;
                for (int j = 0; j < 2; ++j) found.val[j] = vqtbl1q_u8(narrow.val[j], nibbles);
                vst2q_u8(out, found);
            }
        }
        look_up<D>(t, table, i, end);
    }
}
#endif

}  // namespace

#if QTUNE_X86
#include "blockwise4_x86.h"
#endif

namespace {

// ---- choice of path, threads

int best_isa() {
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

template <int D> Work pack_work(int isa) {
#if QTUNE_X86
    if (isa == ISA_AVX512) return pack_avx512<D>;
    if (isa == ISA_AVX2) return pack_avx2<D>;
#endif
    (void)isa;    // the scalar loops are what compilers vectorize for NEON
    return pack_scalar<D>;
}

template <int D> Work unpack_work(int isa) {
#if QTUNE_X86
    if (isa == ISA_AVX512) return unpack_avx512<D>;
    if (isa == ISA_AVX2) return unpack_avx2<D>;
#elif QTUNE_NEON
    if (isa == ISA_NEON) return unpack_neon<D>;
#endif
    return unpack_scalar<D>;
}

void run(Work work, const void *task, int64_t blocks, int64_t values, int threads) {
    const int64_t useful = values / GRAIN + 1;
    const int64_t parts = useful < threads ? useful : threads;
#ifdef _OPENMP
    if (parts > 1) {
#pragma omp parallel for num_threads(int(parts)) schedule(static)
        for (int64_t p = 0; p < parts; ++p) work(task, blocks * p / parts, blocks * (p + 1) / parts);
        return;
    }
#endif
    (void)parts;
    work(task, 0, blocks);
}

}  // namespace

// The path that `wanted` (-1: the best) stands for on this machine, or -1: 0 scalar, 1 AVX2, 2 AVX-512, 3 NEON.
EXPORT int qtune_isa(int wanted) {
    const int best = best_isa();
    if (wanted == AUTO || wanted == best) return best;
    return wanted == SCALAR || (wanted == ISA_AVX2 && best == ISA_AVX512) ? wanted : -1;
}

EXPORT int qtune_openmp() {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

// w[n] -> codes[ceil(n/2)], absmax[ceil(n/block)]. bounds: 15 midpoints of the sorted codebook; order: the nibble of each of its ranks.
EXPORT int qtune_blockwise4_pack(const void *w, int dtype, int64_t n, int64_t block, const float *bounds, const uint8_t *order,
                                 uint8_t *codes, float *absmax, int threads, int isa) {
    if (n < 0 || block < 2 || block % 2 || dtype < F32 || dtype > F16) return BAD_ARGUMENT;
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    const Pack task = {w, n, block, bounds, order, codes, absmax};
    const Work work = dtype == F32 ? pack_work<F32>(isa) : dtype == BF16 ? pack_work<BF16>(isa) : pack_work<F16>(isa);
    run(work, &task, n / block + (n % block != 0), n, threads);
    return OK;
}

// x[n] -> codes[n], absmax[ceil(n/256)]. nearest: the code of each of the 65536 bins.
EXPORT int qtune_dynamic8_pack(const float *x, int64_t n, const uint8_t *nearest, uint8_t *codes, float *absmax, int threads) {
    if (n < 0) return BAD_ARGUMENT;
    const Dynamic8 task = {x, n, nearest, codes, absmax};
    run(pack_dynamic8, &task, n / NESTED_BLOCK + (n % NESTED_BLOCK != 0), n, threads);
    return OK;
}

// codes -> out[n]. absmax is fp32 where map is null, else uint8 codes into map[256], scaled by nested[ceil(blocks/256)] plus *offset.
EXPORT int qtune_blockwise4_unpack(const uint8_t *codes, const void *absmax, const float *map, const float *nested, const float *offset,
                                   const float *values, int64_t n, int64_t block, void *out, int dtype, int threads, int isa) {
    if (n < 0 || block < 2 || block % 2 || dtype < F32 || dtype > F16) return BAD_ARGUMENT;
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    const Unpack task = {codes, absmax, map, nested, offset, values, n, block, out};
    const Work work = dtype == F32 ? unpack_work<F32>(isa) : dtype == BF16 ? unpack_work<BF16>(isa) : unpack_work<F16>(isa);
    run(work, &task, n / block + (n % block != 0), n, threads);
    return OK;
}
