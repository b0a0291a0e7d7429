// RMS norm, SwiGLU and rotary positions with their gradients on the CPU: each one pass over its memory. Plain C ABI, no torch.
//
// Activations are fp32, bf16 or fp16, arithmetic is fp32, results are rounded once, to nearest even. The loops are in layers_body.h, once for
// every SIMD path. An item (row, value, token) is one thread's alone, so results do not depend on the number of threads. Sizes are int64.
#include "layers_lanes.h"

namespace {

struct Norm { const void *x, *w; int64_t h; float eps, offset; void *y; float *rstd; };
struct NormBackward { const void *dy, *x, *w; const float *rstd; int64_t h; float offset; void *dx; };
struct Gated { const void *dy, *gate, *up; void *a, *b; };
struct Turn {
    const void *x, *cos, *sin; int64_t seq, heads, dim, r, batches, stride_b, stride_s, stride_h, angle_b, angle_s; bool inverse; void *y;
};

template <int D> inline const void *at(const void *p, int64_t i) { return static_cast<const typename Stored<D>::type *>(p) + i; }
template <int D> inline void *at(void *p, int64_t i) { return static_cast<typename Stored<D>::type *>(p) + i; }

}  // namespace

#define PATH base
#define TARGET
#include "layers_body.h"
#undef PATH
#undef TARGET
#if QTUNE_X86
#define PATH avx2
#define TARGET AVX2
#include "layers_body.h"
#undef PATH
#undef TARGET
#define PATH avx512
#define TARGET AVX512
#include "layers_body.h"
#undef PATH
#undef TARGET
#define CHOOSE(isa, ...) (isa == ISA_AVX512 ? avx512::__VA_ARGS__ : isa == ISA_AVX2 ? avx2::__VA_ARGS__ : base::__VA_ARGS__)
#else
#define CHOOSE(isa, ...) (base::__VA_ARGS__)
#endif

namespace {

constexpr int64_t COST_OF_EXP = 4;   // in values read

template <int D, int F> Work norm_work(int isa, bool first) { return first ? CHOOSE(isa, norm<D, F, true>) : CHOOSE(isa, norm<D, F, false>); }
template <int D, int F> Work norm_backward_work(int isa) { return CHOOSE(isa, norm_backward<D, F>); }
template <int D> Work gated_work(int isa, bool backward) { return backward ? CHOOSE(isa, gated_backward<D>) : CHOOSE(isa, gated<D>); }
template <int D, int F> Work turn_work(int isa) { return CHOOSE(isa, turn<D, F>); }

inline bool known(int dtype) { return dtype >= F32 && dtype <= F16; }

}  // namespace

// x, y [rows, h] of `dtype`; w [h] of `dtype`, or fp32 where wide; rstd [rows]. cast_first: x * rstd is rounded before w + offset multiplies it.
EXPORT int qtune_rms_norm(const void *x, const void *w, int dtype, int wide, int64_t rows, int64_t h, float eps, float offset, int cast_first,
                          void *y, float *rstd, int threads, int isa) {
    if (rows < 0 || h < 0 || !known(dtype)) return BAD_ARGUMENT;
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    const Norm task = {x, w, h, eps, offset, y, rstd};
    const bool first = cast_first != 0;
    const Work work = dtype == F32    ? norm_work<F32, F32>(isa, first)
                      : dtype == BF16 ? (wide ? norm_work<BF16, F32>(isa, first) : norm_work<BF16, BF16>(isa, first))
                                      : (wide ? norm_work<F16, F32>(isa, first) : norm_work<F16, F16>(isa, first));
    run(work, &task, rows, rows * h, threads);
    return OK;
}

// dy, x, dx [rows, h] of `dtype`; w and rstd as above.
EXPORT int qtune_rms_norm_backward(const void *dy, const void *x, const void *w, const float *rstd, int dtype, int wide, int64_t rows, int64_t h,
                                   float offset, void *dx, int threads, int isa) {
    if (rows < 0 || h < 0 || !known(dtype)) return BAD_ARGUMENT;
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    const NormBackward task = {dy, x, w, rstd, h, offset, dx};
    const Work work = dtype == F32    ? norm_backward_work<F32, F32>(isa)
                      : dtype == BF16 ? (wide ? norm_backward_work<BF16, F32>(isa) : norm_backward_work<BF16, BF16>(isa))
                                      : (wide ? norm_backward_work<F16, F32>(isa) : norm_backward_work<F16, F16>(isa));
    run(work, &task, rows, rows * h, threads);
    return OK;
}

// gate, up [n] -> a = silu(gate) * up; with dy [n] -> a = dgate, b = dup.
EXPORT int qtune_swiglu(const void *dy, const void *gate, const void *up, int dtype, int64_t n, void *a, void *b, int threads, int isa) {
    if (n < 0 || !known(dtype) || (dy == nullptr) != (b == nullptr)) return BAD_ARGUMENT;
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    const Gated task = {dy, gate, up, a, b};
    const bool back = dy != nullptr;
    const Work work = dtype == F32 ? gated_work<F32>(isa, back) : dtype == BF16 ? gated_work<BF16>(isa, back) : gated_work<F16>(isa, back);
    run(work, &task, n, n * COST_OF_EXP, threads);
    return OK;
}

// x [batch, seq, heads, dim] with `strides` of the first three -> y contiguous. cos, sin [batches 1 or batch, seq, r] with strides angle_b and
// angle_s, of `dtype`, or fp32 where wide. shape: batch, seq, heads, dim, r, batches, strides (3), angle_b, angle_s.
EXPORT int qtune_rotary(const void *x, const void *cos, const void *sin, int dtype, int wide, const int64_t *shape, int inverse, void *y,
                        int threads, int isa) {
    const int64_t batch = shape[0], seq = shape[1], heads = shape[2], dim = shape[3], r = shape[4], batches = shape[5];
    if (batch < 0 || seq < 0 || heads < 0 || r < 0 || r > dim || r % 2 || (batches != 1 && batches != batch) || !known(dtype)) return BAD_ARGUMENT;
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    const Turn task = {x, cos, sin, seq, heads, dim, r, batches, shape[6], shape[7], shape[8], shape[9], shape[10], inverse != 0, y};
    const Work work = dtype == F32    ? turn_work<F32, F32>(isa)
                      : dtype == BF16 ? (wide ? turn_work<BF16, F32>(isa) : turn_work<BF16, BF16>(isa))
                                      : (wide ? turn_work<F16, F32>(isa) : turn_work<F16, F16>(isa));
    run(work, &task, batch * seq, batch * seq * heads * dim, threads);
    return OK;
}
