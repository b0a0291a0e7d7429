// Cross entropy on the CPU, with label smoothing and z-loss: logits become their gradient in place. Plain C ABI, no torch.
//
// The first pass over a row finds maximum and sum of exponentials together, a block that fits the first cache at a time, and rescales the sum
// when the maximum grows (online softmax); the second writes. Sums of blocks are kept in fp64, so that a vocabulary of any size loses nothing.
// A row is one thread's alone, so results do not depend on the number of threads. Sizes are int64.
#include "layers_lanes.h"

namespace {

constexpr int64_t COST = 8;    // of a logit, in values read
struct Task { void *logits; int64_t vocab, stride; const int64_t *labels; double smoothing, z_loss; bool gradient; float *losses; };

template <int D> inline float load_one(const void *z, int64_t i) { return load<D>(z, i); }

}  // namespace

#define PATH base
#define TARGET
#include "loss_body.h"
#undef PATH
#undef TARGET
#if QTUNE_X86
#define PATH avx2
#define TARGET AVX2
#include "loss_body.h"
#undef PATH
#undef TARGET
#define PATH avx512
#define TARGET AVX512
#include "loss_body.h"
#undef PATH
#undef TARGET
#endif

namespace {

template <int D> Work path(int isa) {
#if QTUNE_X86
    if (isa == ISA_AVX512) return avx512::cross_entropy<D>;
    if (isa == ISA_AVX2) return avx2::cross_entropy<D>;
#endif
    (void)isa;
    return base::cross_entropy<D>;
}

}  // namespace

// logits [rows, vocab], rows `stride` values apart, labels [rows] -> losses [rows]. A label out of [0, vocab) is refused before anything is written;
// without `gradient` no logit is.
EXPORT int qtune_cross_entropy(void *logits, int dtype, int64_t rows, int64_t vocab, int64_t stride, const int64_t *labels, double smoothing,
                               double z_loss, int gradient, float *losses, int threads, int isa) {
    if (rows < 0 || vocab < 0 || dtype < F32 || dtype > F16) return BAD_ARGUMENT;
    if ((isa = qtune_isa(isa)) < 0) return NO_SUCH_ISA;
    for (int64_t i = 0; i < rows; ++i)
        if (labels[i] < 0 || labels[i] >= vocab) return BAD_ARGUMENT;
    const Task task = {logits, vocab, stride, labels, smoothing, z_loss, gradient != 0, losses};
    const Work work = dtype == F32 ? path<F32>(isa) : dtype == BF16 ? path<BF16>(isa) : path<F16>(isa);
    run(work, &task, rows, rows * vocab * COST, threads);
    return OK;
}
