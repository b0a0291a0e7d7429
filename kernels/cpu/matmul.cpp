// Products with a frozen matrix that is unpacked inside of the product, on the CPU, for bf16 on AMX. Plain C ABI, no torch.
//
//     y = x W^T  or  y = x W,  (+ inner factor^T or inner factor)      W [height, width]: 4-bit blocks, int8 rows, or bf16
//
// A thread owns columns of y: it unpacks that part of W once, rounded to bf16, into a panel that its L2 holds, in the layout of AMX's right
// operand, and passes all rows of x by it, 32 at a time, in blocks of 32 x 32 sums. Sums are fp32, rounded once; AMX takes denormals as 0.
// Blocking after Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), with unpacking in place of packing.
// Left out: machines without AMX, other dtypes. Results do not depend on the number of threads.
#define QTUNE_OWN_ISA
#include "simd.h"
#include "amx.h"
#include "matmul_task.h"
#if defined(_OPENMP)
#include <omp.h>
#endif
#if HAS_AMX
#include "matmul_fill.h"
#include "matmul_tile.h"
#endif

namespace {

bool can_run() {
#if HAS_AMX
    static const bool can = has_amx() && __builtin_cpu_supports("avx512vbmi");
    return can;
#else
    return false;
#endif
}

// numbers: M R C rank, form, block, transpose. W is [C, R], with transpose [R, C].
Task task_of(const int64_t *numbers) {
    Task t = {};
    t.M = numbers[0], t.R = numbers[1], t.C = numbers[2], t.rank = numbers[3], t.transpose = numbers[6] != 0;
    t.w.form = int(numbers[4]), t.w.block = numbers[5], t.w.height = t.transpose ? t.R : t.C, t.w.width = t.transpose ? t.C : t.R;
    t.factor.form = DENSE, t.factor.height = t.transpose ? t.rank : t.C, t.factor.width = t.transpose ? t.C : t.rank;
    return t;
}

bool sound(const Task &t) {
    if (t.M <= 0 || t.R <= 0 || t.C <= 0 || t.rank < 0 || t.w.form < BLOCKWISE4 || t.w.form > INT8) return false;
    if (t.w.form == BLOCKWISE4 && (t.w.block < TILE || t.w.block % TILE || t.w.width % t.w.block)) return false;
    return t.w.form != INT8 || t.w.width % TILE == 0;
}

}  // namespace

EXPORT int qtune_isa(int wanted) {    // the scalar path is none: it refuses
    const int best = can_run() ? ISA_AMX : SCALAR;
    return wanted == AUTO || wanted == best ? best : -1;
}

// Bytes of scratch (64-byte aligned) of a call with these numbers; the same number of threads must follow.
EXPORT int qtune_matmul_scratch(const int64_t *numbers, int threads, int64_t *bytes) {
    Task t = task_of(numbers);
    if (!sound(t)) return BAD_ARGUMENT;
    *bytes = plan(t, threads > 1 ? threads : 1);
    return OK;
}

// x[M, R] -> y[M, C], both bf16. codes, absmax, map, nested, offset, values: as in blockwise4.cpp; int8 and bf16 matrices are `codes` alone.
// scales: of y's columns, or null. inner[M, rank], factor[C, rank] (with transpose [rank, C]): bf16, or null.
EXPORT int qtune_matmul(const int64_t *numbers, const void *x, const void *codes, const void *absmax, const float *map, const float *nested,
                        const float *offset, const float *values, const float *scales, const void *inner, const void *factor, void *y,
                        void *scratch, int threads) {
    Task t = task_of(numbers);
    if (!sound(t)) return BAD_ARGUMENT;
    if (!can_run()) return NO_SUCH_ISA;
    threads = threads > 1 ? threads : 1;
    t.x = static_cast<const uint16_t *>(x), t.y = static_cast<uint16_t *>(y), t.inner = static_cast<const uint16_t *>(inner), t.scales = scales;
    t.w.codes = codes, t.w.absmax = absmax, t.w.map = map, t.w.nested = nested, t.w.offset = offset, t.w.values = values, t.factor.codes = factor;
    t.scratch = static_cast<char *>(scratch);
    plan(t, threads);
#if HAS_AMX
    const int64_t items = t.groups * t.talls;
#ifdef _OPENMP
    if (threads > 1 && items > 1) {
#pragma omp parallel for num_threads(int(smaller(items, threads))) schedule(dynamic, 1)
        for (int64_t item = 0; item < items; ++item) work(&t, item, omp_get_thread_num());
        return OK;
    }
#endif
    for (int64_t item = 0; item < items; ++item) work(&t, item, 0);
#endif
    return OK;
}
