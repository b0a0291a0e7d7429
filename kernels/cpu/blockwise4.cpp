// NF4/FP4 packing and unpacking, and the signed dynamic 8-bit packing of their scales, on the CPU. Plain C ABI, no torch.
//
// Weights are one flat row of n values in blocks; value = codebook[nibble] * scale(block), the high nibble first. Results equal bitsandbytes'
// bit for bit. A block has 16 possible values only, so unpacking multiplies and rounds 16 times a block and then looks nibbles up.
// Compile with -ffp-contract=off: a fused multiply-add would change the last bit of a nested scale.
// Blocks are even in size, so no two blocks share a byte and threads never write the same one. All sizes are int64.
#include "simd.h"

namespace {

constexpr float SMALLEST = 1e-38f;      // bitsandbytes' lower limit of a divisor
constexpr int64_t NESTED_BLOCK = 256;   // scales that share one nested scale
constexpr int64_t STREAMED = 16 << 20;  // bytes from which a result goes past the caches: it would not stay there, and is not read first

struct Pack {
    const void *w; int64_t n, block; const float *bounds; const uint8_t *order; uint8_t *codes; float *absmax;
};
struct Unpack {
    const uint8_t *codes; const void *absmax; const float *map, *nested, *offset, *values; int64_t n, block; void *out; bool stream;
};
struct Rows { Unpack all; const int64_t *ids; int64_t width; };    // all.out: [rows, width]
struct Dynamic8 { const float *x; int64_t n; const uint8_t *nearest; uint8_t *codes; float *absmax; };

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

// Row r of the result, seen as its values' places in the flat weight; steps through the parts of it that have one scale each. Places are even,
// as nibbles come in pairs, but for that of the first value of a row of odd width.
template <int D> struct Row {
    Unpack t;
    int64_t i, end, block, stop;    // from i to stop, in `block`; done at end
    Row(const Rows &rows, int64_t r) : t(rows.all), i(rows.ids[r] * rows.width), end(i + rows.width) {
        constexpr int64_t size = sizeof(typename Stored<D>::type);
        t.out = reinterpret_cast<void *>(reinterpret_cast<intptr_t>(t.out) + (r * rows.width - i) * size);   // place i of it is the row's first
        block = i / t.block;
        if (i % 2 && i < end) {
            static_cast<typename Stored<D>::type *>(t.out)[i] = rounded<D>(t.values[t.codes[i / 2] & 15] * block_scale(t, block));
            ++i;    // if that is the end of its block, the first part is empty
        }
        bound();
    }
    void bound() { stop = (block + 1) * t.block < end ? (block + 1) * t.block : end; }
    void next() { i = stop; ++block; bound(); }
};

template <int D> void rows_scalar(const void *task, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
        for (Row<D> row(*static_cast<const Rows *>(task), r); row.i < row.end; row.next()) {
            typename Stored<D>::type table[16];
            block_table<D>(row.t, block_scale(row.t, row.block), table);
            look_up<D>(row.t, table, row.i, row.stop);
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

// ---- choice of path

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

template <int D> Work rows_work(int isa) {
#if QTUNE_X86
    if (isa == ISA_AVX512) return rows_avx512<D>;
    if (isa == ISA_AVX2) return rows_avx2<D>;
#endif
    (void)isa;
    return rows_scalar<D>;
}

}  // namespace

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
    const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0 && block % 32 == 0;
    const bool stream = aligned && n * (dtype == F32 ? 4 : 2) >= STREAMED;
    const Unpack task = {codes, absmax, map, nested, offset, values, n, block, out, stream};
    const Work work = dtype == F32 ? unpack_work<F32>(isa) : dtype == BF16 ? unpack_work<BF16>(isa) : unpack_work<F16>(isa);
    run(work, &task, n / block + (n % block != 0), n, threads);
    return OK;
}

// As above, of the weight [table, width] only the rows ids[rows] -> out[rows, width].
EXPORT int qtune_blockwise4_rows(const uint8_t *codes, const void *absmax, const float *map, const float *nested, const float *offset,
                                 const float *values, const int64_t *ids, int64_t rows, int64_t table, int64_t width, int64_t block, void *out,
                                 int dtype, int threads, int isa) {
    if (rows < 0 || width < 0 || block < 2 || block % 2 || dtype < F32 || dtype > F16) return BAD_ARGUMENT;
    for (int64_t r = 0; r < rows; ++r)
        if (ids[r] < 0 || ids[r] >= table) return BAD_ARGUMENT;
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    const Rows task = {{codes, absmax, map, nested, offset, values, table * width, block, out}, ids, width};
    const Work work = dtype == F32 ? rows_work<F32>(isa) : dtype == BF16 ? rows_work<BF16>(isa) : rows_work<F16>(isa);
    run(work, &task, rows, rows * width, threads);
    return OK;
}
