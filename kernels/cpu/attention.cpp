// Attention, forward and backward, on the CPU, without ever holding the score matrix. Plain C ABI, no torch.
//
//     S = scale Q K^T + mask,  P = softmax(S),  O = P V           the forward keeps lse = log sum exp S of each query
//     P = exp(S - lse),  dS = P (dO V^T - rowsum(dO O)),  dV = P^T dO,  dQ = scale dS K,  dK = scale dS^T Q
//
// FlashAttention (arXiv 2205.14135, 2307.08691), in blocks of 64 x 64. Scores, sums and accumulators are fp32. With bf16 operands (paths
// avx512_bf16 and amx) P and dS are rounded to bf16 as operands of the next product only; the other paths hold all operands in fp32.
// The backward has two steps instead of atomics: a thread owns a block of keys and sums dK and dV over the queries, leaving dS in scratch;
// then a thread owns a block of queries and sums dQ over the keys. Results do not depend on the number of threads.
#define QTUNE_OWN_ISA
#include "simd.h"
#include "attention_task.h"
#if defined(_OPENMP)
#include <omp.h>
#endif
#include "amx.h"

namespace {

struct Path { Work pack_keys, forward, pack_queries, keys_backward, queries_backward; int64_t size; };    // size: bytes of an operand's element

constexpr float EXACT[] = {0.000153458124f, 0.00133999309f, 0.00961848907f, 0.0555032864f, 0.240226462f, 0.693147182f, 1.0f};
constexpr float SHORT[] = {0.00132764725f, 0.00967554189f, 0.0555071309f, 0.240221202f, 0.693146944f, 1.00000012f};    // to 1.6e-7

}  // namespace

namespace base_path {
#define TARGET
#define WIDTH 4
#define PAIRED 0
#define TILES 0
#define COEFFICIENTS EXACT
#define TERMS 7
#include "attention_tile.h"
#include "attention_path.h"
#undef TARGET
#undef WIDTH
}  // namespace base_path

#if QTUNE_X86
namespace avx2_path {
#define TARGET AVX2
#define WIDTH 8
#include "attention_tile.h"
#include "attention_path.h"
#undef TARGET
#undef WIDTH
}  // namespace avx2_path

namespace avx512_path {
#define TARGET AVX512
#define WIDTH 16
#include "attention_tile.h"
#include "attention_path.h"
#undef TARGET
#undef PAIRED
#undef COEFFICIENTS
#undef TERMS
}  // namespace avx512_path
#endif

#if HAS_BF16
#define PAIRED 1
#define COEFFICIENTS SHORT
#define TERMS 6
namespace bf16_path {
#define TARGET AVX512_BF16
#include "attention_tile.h"
#include "attention_path.h"
#undef TARGET
}  // namespace bf16_path
#endif

#if HAS_AMX
#undef TILES
#define TILES 1
namespace amx_path {
#define TARGET AMX
#include "attention_tile.h"
#include "attention_path.h"
#undef TARGET
}  // namespace amx_path
#endif

namespace {

// ---- choice of path

// Intel multiplies pairs of bf16 no faster than AVX-512 does fp32 (measured on Sapphire Rapids: half as fast), so there only AMX is better.
int find_best() {
    if (has_amx()) return ISA_AMX;
#if HAS_BF16
    if (has_bf16() && !__builtin_cpu_is("intel")) return ISA_AVX512_BF16;
#endif
    return best_isa();
}

int own_best() {
    static const int best = find_best();
    return best;
}

const Path *path_of(int isa, int dtype) {
    (void)dtype;
#if HAS_AMX
    if (isa == ISA_AMX && dtype == BF16) return &amx_path::PATH;
#endif
#if HAS_BF16
    if (isa == ISA_AVX512_BF16 && dtype == BF16) return &bf16_path::PATH;
#endif
#if QTUNE_X86
    if (isa == ISA_AVX512 || isa == ISA_AVX512_BF16 || isa == ISA_AMX) return &avx512_path::PATH;
    if (isa == ISA_AVX2) return &avx2_path::PATH;
#endif
    return &base_path::PATH;
}

// Items cost unequally, so threads take one after the other.
void spread(Work work, const void *task, int64_t items, int threads) {
#ifdef _OPENMP
    if (threads > 1 && items > 1) {
#pragma omp parallel for num_threads(int(items < threads ? items : threads)) schedule(dynamic, 1)
        for (int64_t i = 0; i < items; ++i) work(task, i, i + 1);
        return;
    }
#endif
    (void)threads;
    work(task, 0, items);
}

// The backward of units t.unit0 .. t.unit0 + t.units - 1.
void backward_waves(Task &t, const Path &path, int threads) {
    spread(path.pack_keys, &t, t.units * t.key_blocks, threads);
    for (t.block0 = 0; t.block0 < t.query_blocks; t.block0 += t.wave_blocks) {
        t.blocks = smaller(t.wave_blocks, t.query_blocks - t.block0);
        spread(path.pack_queries, &t, t.units * t.G * t.blocks, threads);
        spread(path.keys_backward, &t, t.units * t.key_blocks, threads);
        spread(path.queries_backward, &t, t.units * t.G * t.blocks, threads);
    }
}

struct Backward { const Task &task; const Path &path; };

void unit_backward(const void *work, int64_t first, int64_t last) {    // items are units
    const Backward &all = *static_cast<const Backward *>(work);
    int thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    Task t = with_scratch_of(all.task, thread);
    t.units = 1;
    for (t.unit0 = first; t.unit0 < last; ++t.unit0) backward_waves(t, all.path, 1);
}

// numbers: B T S H HK D, strides (batch, position, head) of q, k, v, dout, strides (batch, query, key) of the mask.
Task task_of(const int64_t *numbers, int dtype, bool causal, float scale, const uint8_t *mask) {
    Task t = {};
    t.B = numbers[0], t.T = numbers[1], t.S = numbers[2], t.H = numbers[3], t.HK = numbers[4], t.D = numbers[5];
    View *views[] = {&t.q, &t.k, &t.v, &t.dout};
    for (int i = 0; i < 4; ++i) *views[i] = {nullptr, numbers[6 + 3 * i], numbers[7 + 3 * i], numbers[8 + 3 * i]};
    t.mask = mask, t.mask_batch = numbers[18], t.mask_query = numbers[19], t.mask_key = numbers[20];
    t.dtype = dtype, t.causal = causal, t.scale = scale;
    return t;
}

bool sound(const Task &t) {
    return t.B > 0 && t.T > 0 && t.S > 0 && t.H > 0 && t.HK > 0 && t.H % t.HK == 0 && t.D > 0 && t.D <= WIDEST && t.dtype >= F32 && t.dtype <= F16;
}

}  // namespace

EXPORT int qtune_isa(int wanted) {
    const int best = own_best(), plain = best_isa();
    if (wanted == AUTO || wanted == best) return best;
    if (wanted == SCALAR || wanted == plain || (wanted == ISA_AVX2 && plain == ISA_AVX512)) return wanted;
    return wanted == ISA_AVX512_BF16 && has_bf16() ? wanted : -1;
}

// Bytes of scratch that a call with these arguments needs (64-byte aligned); all sizes above 0, D at most 256. mask: its strides count.
EXPORT int qtune_attention_scratch(const int64_t *numbers, int dtype, int has_mask, int backward, int threads, int isa, int64_t *bytes) {
    static const uint8_t some = 0;
    Task t = task_of(numbers, dtype, false, 1.0f, has_mask ? &some : nullptr);
    if (!sound(t)) return BAD_ARGUMENT;
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    *bytes = plan(t, backward != 0, path_of(isa, dtype)->size, larger(1, threads), nullptr);
    return OK;
}

// q [B, T, H, D], k, v [B, S, HK, D] -> out [B, T, H, D] contiguous, lse [B, H, T].
EXPORT int qtune_attention(const int64_t *numbers, const void *q, const void *k, const void *v, const uint8_t *mask, int dtype, int causal, float scale,
                           void *out, float *lse, void *scratch, int threads, int isa) {
    Task t = task_of(numbers, dtype, causal != 0, scale, mask);
    if (!sound(t)) return BAD_ARGUMENT;
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    const Path &path = *path_of(isa, dtype);
    t.q.data = q, t.k.data = k, t.v.data = v, t.out = out, t.lse = lse;
    plan(t, false, path.size, larger(1, threads), static_cast<char *>(scratch));
    t.units = t.wave_units, t.blocks = t.wave_blocks;
    spread(read_mask, &t, t.masks * t.query_blocks, threads);
    spread(path.pack_keys, &t, t.units * t.key_blocks, threads);
    spread(path.forward, &t, t.units * t.G * t.blocks, threads);
    return OK;
}

// -> dq, dk, dv, contiguous. out, lse: the forward's results.
EXPORT int qtune_attention_backward(const int64_t *numbers, const void *dout, const void *q, const void *k, const void *v, const void *out,
                                    const float *lse, const uint8_t *mask, int dtype, int causal, float scale, void *dq, void *dk, void *dv,
                                    void *scratch, int threads, int isa) {
    Task t = task_of(numbers, dtype, causal != 0, scale, mask);
    if (!sound(t)) return BAD_ARGUMENT;
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    const Path &path = *path_of(isa, dtype);
    t.dout.data = dout, t.q.data = q, t.k.data = k, t.v.data = v, t.o = out, t.lse = const_cast<float *>(lse);
    t.dq = dq, t.dk = dk, t.dv = dv;
    plan(t, true, path.size, larger(1, threads), static_cast<char *>(scratch));
    spread(read_mask, &t, t.masks * t.query_blocks, threads);
    if (t.alone) {
        const Backward own = {t, path};
        spread(unit_backward, &own, t.B * t.HK, threads);
        return OK;
    }
    for (t.unit0 = 0; t.unit0 < t.B * t.HK; t.unit0 += t.wave_units) {
        t.units = smaller(t.wave_units, t.B * t.HK - t.unit0);
        backward_waves(t, path, threads);
    }
    return OK;
}
