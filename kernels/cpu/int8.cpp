// int8 rows on the CPU: w ~ code * absmax[row] / 127. Packing, unpacking (also of chosen rows), scaling of columns; bit-equal on every path.
// Plain C ABI, no torch.
//
// Codes are rounded half to even. A row is read twice, for its absmax and for its codes, the second time from the cache.
// Unpacking without absmax writes the codes themselves, exact in every dtype: the operand of a product that is scaled afterwards.
#include "simd.h"

namespace {

constexpr float STEP = 1.0f / 127.0f;
constexpr float MAGIC = 12582912.0f;    // 1.5 * 2^23: adding it rounds a number below 2^22 to an integer, ties to even

struct Pack { const void *w; int64_t cols; int8_t *codes; float *absmax; };
struct Scale { const void *x; const float *absmax; int64_t cols; void *out; };    // out may be x
struct Unpack { const int8_t *codes; const float *absmax; const int64_t *ids; int64_t cols; void *out; };   // ids null: every row

// 127 / absmax by way of the reciprocal, as torch divides a number by a tensor; 0 for a row of zeros and for one that holds a NaN.
inline float factor_of(float absmax) { return absmax > 0.0f ? (1.0f / absmax) * 127.0f : 0.0f; }
inline int64_t source_row(const Unpack &t, int64_t r) { return t.ids ? t.ids[r] : r; }
inline float scale_of(const Unpack &t, int64_t row) { return t.absmax ? t.absmax[row] * STEP : 1.0f; }

// Values i..cols-1 of a row: what is left of it, or all of it. Written so that compilers vectorize it.
template <int D> uint32_t largest_rest(const void *w, int64_t i, int64_t end) {
    uint32_t largest = 0;    // on the bits: a NaN is larger than everything and stays
    for (; i < end; ++i) {
        const uint32_t size = as_bits(load<D>(w, i)) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    return largest;
}

template <int D> void pack_rest(const Pack &t, float factor, int64_t i, int64_t end) {
    for (; i < end; ++i) {
        float v = load<D>(t.w, i) * factor;
        v = v == v ? v : 0.0f;    // zero times the overflowed factor of a subnormal absmax
        v = v < -127.0f ? -127.0f : v;
        v = v > 127.0f ? 127.0f : v;
        t.codes[i] = int8_t(int32_t((v + MAGIC) - MAGIC));
    }
}

template <int D> void unpack_rest(const Unpack &t, float scale, int64_t from, int64_t to, int64_t i) {
    auto *out = static_cast<typename Stored<D>::type *>(t.out);
    for (; i < t.cols; ++i) out[to + i] = rounded<D>(float(t.codes[from + i]) * scale);
}

template <int D> void pack_scalar(const void *task, int64_t first, int64_t last) {
    const Pack &t = *static_cast<const Pack *>(task);
    for (int64_t r = first; r < last; ++r) {
        const int64_t begin = r * t.cols, end = begin + t.cols;
        t.absmax[r] = as_float(largest_rest<D>(t.w, begin, end));
        pack_rest<D>(t, factor_of(t.absmax[r]), begin, end);
    }
}

template <int D> void unpack_scalar(const void *task, int64_t first, int64_t last) {
    const Unpack &t = *static_cast<const Unpack *>(task);
    for (int64_t r = first; r < last; ++r) unpack_rest<D>(t, scale_of(t, source_row(t, r)), source_row(t, r) * t.cols, r * t.cols, 0);
}

template <int D> void scale_rest(const Scale &t, int64_t row, int64_t i) {
    auto *out = static_cast<typename Stored<D>::type *>(t.out);
    for (; i < t.cols; ++i) out[row * t.cols + i] = rounded<D>(load<D>(t.x, row * t.cols + i) * (t.absmax[i] * STEP));
}

template <int D> void scale_scalar(const void *task, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) scale_rest<D>(*static_cast<const Scale *>(task), r, 0);
}

}  // namespace

#if QTUNE_X86
#include "int8_x86.h"
#endif

namespace {

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
#endif
    (void)isa;
    return unpack_scalar<D>;
}

template <int D> Work scale_work(int isa) {
#if QTUNE_X86
    if (isa == ISA_AVX512) return scale_avx512<D>;
    if (isa == ISA_AVX2) return scale_avx2<D>;
#endif
    (void)isa;
    return scale_scalar<D>;
}

}  // namespace

// w[rows, cols] -> codes[rows, cols], absmax[rows].
EXPORT int qtune_int8_pack(const void *w, int dtype, int64_t rows, int64_t cols, int8_t *codes, float *absmax, int threads, int isa) {
    if (rows < 0 || cols < 0 || dtype < F32 || dtype > F16) return BAD_ARGUMENT;
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    const Pack task = {w, cols, codes, absmax};
    const Work work = dtype == F32 ? pack_work<F32>(isa) : dtype == BF16 ? pack_work<BF16>(isa) : pack_work<F16>(isa);
    run(work, &task, rows, rows * cols, threads);
    return OK;
}

// Rows of codes[table, cols] -> out[rows, cols]: those that ids[rows] names, or, where it is null, the first `rows`. absmax may be null.
EXPORT int qtune_int8_unpack(const int8_t *codes, const float *absmax, const int64_t *ids, int64_t table, int64_t rows, int64_t cols, void *out,
                             int dtype, int threads, int isa) {
    if (rows < 0 || cols < 0 || dtype < F32 || dtype > F16 || (!ids && rows > table)) return BAD_ARGUMENT;
    for (int64_t r = 0; ids && r < rows; ++r)
        if (ids[r] < 0 || ids[r] >= table) return BAD_ARGUMENT;
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    const Unpack task = {codes, absmax, ids, cols, out};
    const Work work = dtype == F32 ? unpack_work<F32>(isa) : dtype == BF16 ? unpack_work<BF16>(isa) : unpack_work<F16>(isa);
    run(work, &task, rows, rows * cols, threads);
    return OK;
}

// out[rows, cols] = x[rows, cols] * absmax[cols] / 127; out may be x.
EXPORT int qtune_int8_scale(const void *x, int dtype, const float *absmax, int64_t rows, int64_t cols, void *out, int threads, int isa) {
    if (rows < 0 || cols < 0 || dtype < F32 || dtype > F16) return BAD_ARGUMENT;
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    const Scale task = {x, absmax, cols, out};
    const Work work = dtype == F32 ? scale_work<F32>(isa) : dtype == BF16 ? scale_work<BF16>(isa) : scale_work<F16>(isa);
    run(work, &task, rows, rows * cols, threads);
    return OK;
}
