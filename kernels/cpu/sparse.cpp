// Products of tokens with a sparse matrix S [out, in] in CSR on the CPU: y = x S^T, dx = dy S, and dy^T x at S's places. Plain C ABI, no torch.
//
// A coefficient costs one multiply-add a token whatever its place, so tokens run along the lanes: blocks of tokens are transposed to fp32
// scratch that stays in the L2 cache, and a coefficient is then a few vectors of contiguous memory. fp32 sums, rounded once.
// No result depends on the number of threads. Columns may repeat in a row and come in any order. All sizes are int64.
#include <utility>
#include "simd.h"

namespace {

constexpr int64_t BLOCK_BYTES = 1 << 20;    // of a transposed block at most: the L2 cache of today's cores

struct Matrix { const void *rows; bool long_rows, narrow; const void *cols; const float *values; int64_t out, in; };
struct Task { Matrix m; const void *x, *dy; void *y; int64_t tokens, slices, token; float *scratch; };
using Share = void (*)(const Task &t, int64_t share, int64_t first, int64_t last);
struct Works { Share matmul, sampled, fill; };

inline int64_t row_start(const Matrix &m, int64_t i) {
    return m.long_rows ? static_cast<const int64_t *>(m.rows)[i] : static_cast<const int32_t *>(m.rows)[i];
}

}  // namespace

#define PATH any_machine
#define LANES 4
#define TARGET
#include "lanes.h"
#include "sparse_path.h"
#undef PATH
#undef LANES
#undef TARGET
#undef INLINE

#if QTUNE_X86
#include "simd_x86.h"
#define PATH with_avx2
#define LANES 8
#define TARGET AVX2
#include "lanes.h"
#include "sparse_path.h"
#undef PATH
#undef LANES
#undef TARGET
#undef INLINE

#define PATH with_avx512
#define LANES 16
#define TARGET AVX512
#include "lanes.h"
#include "sparse_path.h"
#undef PATH
#undef LANES
#undef TARGET
#undef INLINE
#endif

namespace {

inline int64_t lanes_of(int isa) { return isa == ISA_AVX512 ? 16 : isa == ISA_AVX2 ? 8 : 4; }

inline Works works_of(int isa, int dtype, int vectors) {
#if QTUNE_X86
    if (isa == ISA_AVX512) return with_avx512::works_of(dtype, vectors);
    if (isa == ISA_AVX2) return with_avx2::works_of(dtype, vectors);
#endif
    (void)isa;
    return any_machine::works_of(dtype, vectors);
}

// `items` in equal consecutive shares, or from bounds[share] to bounds[share + 1] where there are bounds
inline void share_out(Share work, const Task &t, int64_t items, int64_t parts, const int64_t *bounds) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(int(parts)) schedule(static) if (parts > 1)
#endif
    for (int64_t p = 0; p < parts; ++p)
        work(t, p, bounds ? bounds[p] : items * p / parts, bounds ? bounds[p + 1] : items * (p + 1) / parts);
}

template <class R> int64_t bad_row(const R *rows, int64_t out, int64_t nnz) {
    if (rows[0] != 0) return 0;
    int64_t wrong = 0;
    for (int64_t i = 0; i < out; ++i) wrong += rows[i] > rows[i + 1];
    if (!wrong && rows[out] == nnz) return -1;
    for (int64_t i = 0; i < out; ++i)
        if (rows[i] > rows[i + 1]) return i + 1;
    return out;
}

// S^T in CSR: the columns' starts[in + 1], index[nnz] and moved[nnz] values; within a column the rows rise.
void turn(Matrix &m, int64_t *starts, int32_t *index, float *moved) {
    const int64_t nnz = row_start(m, m.out);
    const auto *narrow = static_cast<const uint16_t *>(m.cols);
    const auto *wide = static_cast<const int32_t *>(m.cols);
    std::memset(starts, 0, size_t(m.in + 1) * sizeof(int64_t));
    for (int64_t e = 0; e < nnz; ++e) ++starts[(m.narrow ? int64_t(narrow[e]) : int64_t(wide[e])) + 1];
    for (int64_t j = 0; j < m.in; ++j) starts[j + 1] += starts[j];
    for (int64_t i = 0, e = 0; i < m.out; ++i) {
        for (const int64_t end = row_start(m, i + 1); e < end; ++e) {
            const int64_t to = starts[m.narrow ? int64_t(narrow[e]) : int64_t(wide[e])]++;
            index[to] = int32_t(i);
            moved[to] = m.values[e];
        }
    }
    std::memmove(starts + 1, starts, size_t(m.in) * sizeof(int64_t));    // each start had moved on to the next
    starts[0] = 0;
    m = {starts, true, false, index, moved, m.in, m.out};
}

constexpr int64_t MOST_SHARES = 256;

}  // namespace

// report[0]: the first row pointer that is wrong, or -1; report[1], [2]: the smallest and the largest column. Plain compares, which compilers
// vectorize: some hundredths of the time of a product.
EXPORT int qtune_sparse_check(const void *rows, int long_rows, const void *cols, int narrow, int64_t out, int64_t nnz, int64_t *report) {
    report[0] = long_rows ? bad_row(static_cast<const int64_t *>(rows), out, nnz) : bad_row(static_cast<const int32_t *>(rows), out, nnz);
    int32_t least = INT32_MAX, most = -1;
    if (narrow) {
        const auto *c = static_cast<const uint16_t *>(cols);
        uint16_t top = 0;
        for (int64_t e = 0; e < nnz; ++e) top = c[e] > top ? c[e] : top;
        least = 0;
        most = nnz ? top : -1;
    } else {
        const auto *c = static_cast<const int32_t *>(cols);
        for (int64_t e = 0; e < nnz; ++e) {
            least = c[e] < least ? c[e] : least;
            most = c[e] > most ? c[e] : most;
        }
    }
    report[1] = least;
    report[2] = most;
    return OK;
}

// plan[0]: vectors a block; plan[1]: shares; plan[2]: floats of scratch, for a product that gathers from `width` features. Sums of the sampled
// product run over the tokens of a block, so there the threads must not matter.
EXPORT int qtune_sparse_plan(int sampled, int dtype, int64_t tokens, int64_t width, int threads, int isa, int64_t *plan) {
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    const int64_t lanes = lanes_of(isa), most = threads < 1 ? 1 : threads < MOST_SHARES ? threads : MOST_SHARES;
    const int64_t bytes = lanes * (dtype == BF16 ? 2 : 4);
    int64_t vectors = 4;
    while (vectors > 2 && (width * vectors * bytes > BLOCK_BYTES || vectors / 2 * lanes >= tokens ||
                           (!sampled && (tokens + vectors * lanes - 1) / (vectors * lanes) < most))) vectors /= 2;
    plan[0] = vectors;
    plan[1] = most;
    plan[2] = width * vectors * bytes / 4 * (sampled ? 1 : most);
    return OK;
}

// x[tokens, in] -> y[tokens, out], y = x S^T. S must have passed the check above. With `starts` (then index and moved, see `turn`) y = x S:
// x[tokens, out] -> y[tokens, in]; as a gather from S^T, for adding into places all over a block costs twice as much.
EXPORT int qtune_sparse_matmul(const void *x, int dtype, int64_t tokens, const void *rows, int long_rows, const void *cols, int narrow,
                               const float *values, int64_t out, int64_t in, int64_t *starts, int32_t *index, float *moved, void *y,
                               float *scratch, const int64_t *plan, int isa) {
    if (tokens < 0 || out < 0 || in < 0 || dtype < F32 || dtype > F16) return BAD_ARGUMENT;
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    const int64_t width = plan[0] * lanes_of(isa), blocks = (tokens + width - 1) / width, parts = plan[1];
    Task t = {{rows, long_rows != 0, narrow != 0, cols, values, out, in}, x, nullptr, y, tokens, 1, 0, scratch};
    if (!blocks) return OK;
    if (starts) turn(t.m, starts, index, moved);
    t.slices = (parts + blocks - 1) / blocks;    // few tokens: threads share the rows of S
    share_out(works_of(isa, dtype, int(plan[0])).matmul, t, blocks * t.slices, parts, nullptr);
    return OK;
}

// dy[tokens, out], x[tokens, in] -> result[nnz]
EXPORT int qtune_sampled_product(const void *dy, const void *x, int dtype, int64_t tokens, const void *rows, int long_rows, const void *cols,
                                 int narrow, int64_t out, int64_t in, float *result, float *scratch, const int64_t *plan, int isa) {
    if (tokens < 0 || out < 0 || in < 0 || dtype < F32 || dtype > F16) return BAD_ARGUMENT;
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    const int64_t lanes = lanes_of(isa), width = plan[0] * lanes, parts = plan[1];
    const Works works = works_of(isa, dtype, int(plan[0]));
    Task t = {{rows, long_rows != 0, narrow != 0, cols, nullptr, out, in}, x, dy, result, tokens, 1, 0, scratch};
    const int64_t nnz = row_start(t.m, out);
    int64_t bounds[MOST_SHARES + 1];    // rows in shares of about as many coefficients
    for (int64_t p = 0, row = 0; p <= parts; ++p) {
        while (row < out && (p == parts || row_start(t.m, row) < nnz * p / parts)) ++row;
        bounds[p] = row;
    }
    for (int64_t e = 0; !tokens && e < nnz; ++e) result[e] = 0.0f;
    for (t.token = 0; t.token < tokens; t.token += width) {
        share_out(works.fill, t, (in + lanes - 1) / lanes, parts, nullptr);
        share_out(works.sampled, t, out, parts, bounds);
    }
    return OK;
}
