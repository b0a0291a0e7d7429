// The Walsh-Hadamard transform of rows of n = K 2^m values on the CPU: y = scale x (H_K (x) H_{2^m})^T. Plain C ABI, no torch.
//
// A row is one fp32 buffer on the stack, in the L1 cache up to n = 8192: butterflies inside of vectors and between 16 (8) of them in registers,
// so that a row of 4096 is read twice and written twice. x is read and y written in their own dtype, rounded once.
// Compile with -ffp-contract=off: all paths add in the same order and give the same bits.
#include <utility>
#include "simd.h"

namespace {

constexpr int64_t LARGEST = 1 << 16, LARGEST_ORDER = 1 << 10;
constexpr int GROUPS = 16;    // groups of four rows of H_K at a time: their 16 sums each take 16 KiB at most, and an index of them one byte

struct Task { const void *x; void *y; int64_t n, order, length; const uint8_t *index; float scale; };

// Which of the 16 signed sums of each four columns an output row takes: [groups of GROUPS][row][group].
void make_index(const int8_t *base, int64_t order, bool transpose, uint8_t *index) {
    for (int64_t group = 0; group < order / 4; group += GROUPS) {
        const int count = int(order / 4 - group < GROUPS ? order / 4 - group : GROUPS);
        for (int64_t i = 0; i < order; ++i) {
            for (int g = 0; g < count; ++g) {
                int code = 0;
                for (int64_t q = 0; q < 4; ++q) {
                    const int64_t j = 4 * (group + g) + q;
                    code |= int(base[transpose ? j * order + i : i * order + j] < 0) << q;
                }
                *index++ = uint8_t(16 * g + code);
            }
        }
    }
}

}  // namespace

#define PATH any_machine
#define LANES 4
#define TARGET
#include "lanes.h"
#include "hadamard_path.h"
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
#include "hadamard_path.h"
#undef PATH
#undef LANES
#undef TARGET
#undef INLINE

#define PATH with_avx512
#define LANES 16
#define TARGET AVX512
#include "lanes.h"
#include "hadamard_path.h"
#endif

namespace {

template <int D> Work transform_work(int isa) {
#if QTUNE_X86
    if (isa == ISA_AVX512) return with_avx512::transform<D>;
    if (isa == ISA_AVX2) return with_avx2::transform<D>;
#endif
    (void)isa;    // four lanes are NEON's
    return any_machine::transform<D>;
}

}  // namespace

// x[rows, n] -> y[rows, n]; base[order, order] of 1 and -1 (null where order is 1), n = order * 2^m; index: order * order / 4 bytes of scratch.
EXPORT int qtune_hadamard(const void *x, int dtype, int64_t rows, int64_t n, const int8_t *base, int64_t order, int transpose, uint8_t *index,
                          float scale, void *y, int threads, int isa) {
    if (rows < 0 || n < 1 || n > LARGEST || order < 1 || order > LARGEST_ORDER || n % order || (order > 1 && order % 4)) return BAD_ARGUMENT;
    const int64_t length = n / order;
    if (length & (length - 1) || dtype < F32 || dtype > F16) return BAD_ARGUMENT;
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    if (order > 1) make_index(base, order, transpose != 0, index);
    const Task task = {x, y, n, order, length, index, scale};
    const Work work = dtype == F32 ? transform_work<F32>(isa) : dtype == BF16 ? transform_work<BF16>(isa) : transform_work<F16>(isa);
    run(work, &task, rows, rows * n, threads);
    return OK;
}
